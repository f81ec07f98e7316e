"""Heads, the pair layer, batch normalisation and pair features against torch and numpy."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from helpers import max_difference, model_options
from scipy.special import erf
from torch import Tensor, nn

from bert import Linear
from config import ARCHS
from kernels.dropout import Dropout
from models.heads import AddChannel, BatchNorm, Convolution, CosineHead, PairLayer, build_head, pair_features

H = 16
BLOCK = [Linear, BatchNorm, nn.ReLU]


def linear_widths(module: nn.Module) -> list[tuple[int, int]]:
    """Return (in, out) of every linear layer, in order."""
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("shape", [(9, 4), (5, 4, 6), (1, 4, 6), (2, 4)])
def test_batch_norm_equals_torch(shape: tuple[int, ...], counted: bool) -> None:
    """Running statistics forget by a momentum, or count every batch alike."""
    torch.manual_seed(0)
    ours, theirs = BatchNorm(4).double(), nn.BatchNorm1d(4, momentum=None if counted else 0.1).double()
    ours.batches = Counter() if counted else None
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.normal_(1, 0.5))
        theirs.bias.copy_(ours.bias.normal_(1, 0.5))
    for training in (True, True, False, True):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 2
        results = []
        for norm in (ours, theirs):
            norm.train(training).zero_grad()
            leaf = x.clone().requires_grad_()
            out = norm(leaf)
            out.pow(3).sum().backward()
            results.append([out, leaf.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()][:6])
        for a, b in zip(*results, strict=True):
            assert isinstance(a, Tensor) and isinstance(b, Tensor)
            assert max_difference(a, b) <= 1e-12 * max(1.0, b.abs().max().item())


def test_batch_norm_of_one_value_uses_running_statistics_and_leaves_them() -> None:
    norm = BatchNorm(3).train()
    norm(torch.randn(20, 3) * 2 + 5)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(1, 3)
    wanted = (x - before["running_mean_all"]) / (before["running_var_all"] + 1e-5).sqrt()
    assert max_difference(norm(x), wanted) <= 1e-6
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_pair_layer_equals_torch_modules() -> None:
    """Linear-BN-ReLU-Linear-BN, both norms with the statistics of the task at hand."""
    torch.manual_seed(0)
    layer = PairLayer(7, 5, "batchnorm", ("para", "sts")).double()
    reference = nn.Sequential(layer.dense, nn.BatchNorm1d(5), nn.ReLU(), layer.out, nn.BatchNorm1d(5)).double()
    for _ in range(3):
        layer(torch.randn(8, 7, dtype=torch.float64) + 3, "para")
        x = torch.randn(8, 7, dtype=torch.float64)
        assert max_difference(layer(x, "sts"), reference(x)) <= 1e-12
    x = torch.randn(8, 7, dtype=torch.float64)
    assert max_difference(layer.eval()(x, "sts"), reference.eval()(x)) <= 1e-12
    assert max_difference(layer(x, "para"), reference(x)) > 1e-2
    plain = PairLayer(7, 5, "plain", ("para",)).double()
    assert max_difference(plain(x, "para"), nn.Sequential(plain.dense, nn.ReLU(), plain.out)(x)) <= 1e-14


def test_a_convolution_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = Convolution(1, 4, 3).double(), nn.Conv1d(1, 4, 3).double()
    theirs.load_state_dict(ours.state_dict())
    weights = torch.randn(5, 4, 15, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        x = torch.linspace(-2, 3, 85, dtype=torch.float64).view(5, 1, 17).sin().requires_grad_()
        out = module(x)
        (out.square() * weights).sum().backward()
        results.append([out, x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert max_difference(a, b) <= 1e-12


@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize(
    ("clf", "layers"),
    [
        ("linear", [Dropout, Linear]),
        ("nonlinear", [Dropout, *BLOCK, Linear]),
        (
            "conv",
            [Dropout, AddChannel, Convolution, BatchNorm, nn.Flatten, *[Linear, BatchNorm, nn.ReLU] * 2, Linear],
        ),
        ("mlp", [Dropout, Linear, nn.ReLU, Dropout, Linear, nn.ReLU, Dropout, Linear]),
    ],
)
def test_the_layers_of_each_head(clf: str, layers: list[type], batchnorm: bool) -> None:
    given: dict[str, Any] = {"head_layers": 2} if clf in ("conv", "mlp") else {}
    given |= {"head_batchnorm": batchnorm} if clf in ("conv", "nonlinear") else {}
    head = build_head(model_options(clf=clf, **given), 50, H, 5)
    assert [type(layer) for layer in head] == [kind for kind in layers if batchnorm or kind is not BatchNorm]


def test_widths_inside_heads() -> None:
    def widths(**given: Any) -> list[tuple[int, int]]:
        return linear_widths(build_head(model_options(**given), 50, H, 5))

    assert widths(clf="linear") == [(50, 5)]
    assert widths(clf="nonlinear") == [(50, H // 2), (H // 2, 5)]
    assert widths(clf="nonlinear", head_width=7) == [(50, 7), (7, 5)]
    assert widths(clf="conv", head_layers=0) == [(4 * 48, 5)]
    assert widths(clf="conv", head_layers=2) == [(4 * 48, H // 2), (H // 2, H // 2), (H // 2, 5)]
    assert widths(clf="conv", head_layers=1, head_width=7) == [(4 * 48, 7), (7, 5)]
    assert widths(clf="mlp", head_layers=0) == [(50, 5)]
    assert widths(clf="mlp", head_layers=3) == [(50, H), (H, H), (H, H), (H, 5)]
    assert widths(clf="mlp", head_layers=2, head_width=7) == [(50, 7), (7, 7), (7, 5)]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_mlp_head_matches_numpy(activation: str, depth: int) -> None:
    """N times linear and activation, then a linear layer (R2, section 4.1; R4, section 4.2); biases random."""
    torch.manual_seed(0)
    options = model_options(clf="mlp", head_layers=depth, head_activation=activation, head_width=9 if depth else None)
    head = build_head(options, 12, H, 5).double().eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(6, 12, dtype=torch.float64)
    act = {"relu": lambda z: np.maximum(z, 0), "gelu": lambda z: z * (1 + erf(z / np.sqrt(2))) / 2}[activation]
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in head if isinstance(m, nn.Linear)]
    assert len(layers) == depth + 1
    wanted = x.numpy()
    for number, (weight, bias) in enumerate(layers):
        wanted = wanted @ weight.T + bias
        wanted = act(wanted) if number < depth else wanted
    assert np.abs(head(x).detach().numpy() - wanted).max() <= 1e-12 * np.abs(wanted).max()


def test_dropout_of_each_layer() -> None:
    """R4, section 4.2: .2 before the hidden layers, .1 before the output; with one value, that one everywhere."""

    def dropouts(**given: Any) -> list[float]:
        head = build_head(model_options(clf="mlp", hidden_dropout_prob=0.2, **given), 12, H, 5).train()
        kinds = [type(layer) for layer in head if isinstance(layer, nn.Dropout | Linear)]
        assert kinds == [Dropout, Linear] * (len(kinds) // 2)  # one before each linear layer
        return [layer.p for layer in head if isinstance(layer, nn.Dropout)]

    assert dropouts(head_layers=3) == [0.2] * 4
    assert dropouts(head_layers=3, output_dropout_prob=0.1) == [0.2, 0.2, 0.2, 0.1]
    assert dropouts(head_layers=1, output_dropout_prob=0.0) == [0.2, 0.0]
    assert dropouts(head_layers=0) == [0.2]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("projected", [False, True])
def test_cosine_head_matches_the_formula(activation: str, projected: bool) -> None:
    torch.manual_seed(0)
    options = model_options(arch="cosine", head_activation=activation, sts_projection=projected)
    head = CosineHead(H, options, 5.0).double().eval()
    a, b = u, v = torch.randn(2, 9, H, dtype=torch.float64)
    layers = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == projected
    for layer in layers:
        act = {"relu": torch.relu, "gelu": nn.functional.gelu}[activation]
        a, b = (act(x @ layer.weight.T + layer.bias) for x in (u, v))
    wanted = 5 * (a * b).sum(1, keepdim=True) / (a.norm(dim=1) * b.norm(dim=1))[:, None]
    assert max_difference(head(u, v), wanted) <= 1e-13
    assert max_difference(head(u, u), torch.full((9, 1), 5.0, dtype=torch.float64)) <= 1e-12


def test_pair_features_match_numpy() -> None:
    u, v = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = u.numpy(), v.numpy()
    cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    wanted = {"u": a, "v": b, "abs": np.abs(a - b), "mul": a * b, "cos": cosine[:, None], "diff": b - a}
    of_archs = [arch.pair_features for arch in ARCHS.values() if arch.pair_features]  # cross-encoders have none
    for names in (*((name,) for name in wanted), ("diff", "cos", "u"), *of_archs):
        reference = np.concatenate([wanted[name] for name in names], axis=1)
        np.testing.assert_allclose(pair_features(u, v, names).numpy(), reference, rtol=0, atol=1e-14)
