"""MultitaskBERT: every architecture's shapes, sizes, gradients and statistics; heads, pair features and freezing."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import Tensor, nn

from bert import Linear
from config import ARCHS, BertConfig, ModelOptions
from kernels.dropout import Dropout
from models.freezing import scheduled_layers
from models.heads import BatchNorm, Convolution, CosineHead, PairLayer, build_head, pair_features
from models.multitask_bert import MultitaskBERT
from tasks import DEFAULT_TASKS, SST, STS, Task
from text.packing import PackedBatch, join_padded_pairs, pack_padded, stack_padded_pairs
from utils.errors import UserError

H, BATCH = 16, 6
TINY = BertConfig(
    vocab_size=60,
    hidden_size=H,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=48,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
all_archs = pytest.mark.parametrize("arch", list(ARCHS))
Padded = tuple[Tensor, Tensor]


def options(**given: Any) -> ModelOptions:
    return ModelOptions(**given).resolved()


def make_model(
    seed: int = 0, config: BertConfig = TINY, tasks: dict[str, Task] = DEFAULT_TASKS, **given: Any
) -> MultitaskBERT:
    """A model without dropout whose every parameter is random, so that no bias is zero and no norm the identity."""
    torch.manual_seed(seed)
    model = MultitaskBERT(options(**{"hidden_dropout_prob": 0.0, **given}), config, tasks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.2)
    return model


def make_texts(seed: int, size: int = BATCH, longest: int = 11) -> Padded:
    """Random ids and mask [size, longest], each text at least [CLS] [SEP]."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (size,), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return torch.randint(3, TINY.vocab_size, mask.shape, generator=generator) * mask, mask


def make_batch(model: MultitaskBERT, task: str, size: int = BATCH, seed: int = 0) -> PackedBatch:
    """A packed batch of `size` examples of a task, joined as the model wants them."""
    first, second = make_texts(seed, size), make_texts(seed + 1000, size, 14)
    if not model.tasks[task].is_pair:
        return pack_padded(*first)
    return (stack_padded_pairs if model.is_siamese(task) else join_padded_pairs)(*first, *second)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def modules_of(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, kind)]


def linear_layers(module: nn.Module) -> list[tuple[int, int]]:
    """(in, out) of every linear layer, in order."""
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


def count(parameters: Iterator[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


# --------------------------------------------------------------------------------------------- all architectures


@all_archs
@pytest.mark.parametrize("size", [BATCH, 1])
def test_outputs_have_the_right_shape_and_gradients_are_finite(arch: str, size: int) -> None:
    model = make_model(arch=arch, hidden_dropout_prob=0.3).train()
    for task, shape in (("sst", (size, 5)), ("para", (size,)), ("sts", (size,))):
        model.zero_grad()
        out = model(task, make_batch(model, task, size))
        assert out.shape == shape
        assert out.dtype == torch.float32
        assert out.isfinite().all()
        out.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads and all(grad.isfinite().all() for grad in grads)
        assert max(grad.abs().max().item() for grad in grads) > 0


@all_archs
def test_task_parameters_are_those_that_a_batch_reaches(arch: str) -> None:
    model = make_model(arch=arch).train()
    for task in DEFAULT_TASKS:
        model.zero_grad()
        model(task, make_batch(model, task)).sum().backward()
        got_gradient = {id(p) for p in model.parameters() if p.grad is not None}
        listed = [id(p) for p in model.task_parameters(task)]
        if model.options.pooling == "mean":  # reaches everything but the pooler
            got_gradient |= {id(p) for p in model.backbone(task).pooler_dense.parameters()}
        assert len(listed) == len(set(listed))
        assert set(listed) == got_gradient


@all_archs
def test_parts_hold_every_parameter_once(arch: str) -> None:
    model = make_model(arch=arch)
    listed = [id(p) for _, parameters in model.parts() for p in parameters]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


@all_archs
def test_padded_predictions_equal_packed_ones(arch: str) -> None:
    model = make_model(arch=arch).eval()
    first, second = make_texts(1), make_texts(2, longest=14)
    with torch.no_grad():
        packed_sst = model("sst", make_batch(model, "sst", seed=1))
        assert torch.equal(model.predict_sentiment(*first), packed_sst)
        assert torch.equal(model.predict_sentiment(pack_padded(*first)), packed_sst)
        for task, predict in (("para", model.predict_paraphrase), ("sts", model.predict_similarity)):
            join = stack_padded_pairs if ARCHS[arch].pair_encoding == "siamese" else join_padded_pairs
            batch = join(*first, *second)
            assert torch.equal(predict(*first, *second), model(task, batch))
            assert torch.equal(predict(batch), model(task, batch))
            swapped = predict(*second, *first)  # the comparison above would not see a batch built from one text only
            assert torch.isfinite(swapped).all()
            one = predict(*(x[3:4] for x in (*first, *second)))
            assert difference(one, model(task, batch)[3:4]) <= 1e-5


@all_archs
def test_evaluation_changes_no_buffer(arch: str) -> None:
    model = make_model(arch=arch).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for task in DEFAULT_TASKS:
        model(task, make_batch(model, task)).sum().backward()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@all_archs
def test_resolving_twice_changes_nothing(arch: str) -> None:
    once = ModelOptions(arch=arch).resolved()
    assert once.resolved() == once


def test_only_what_the_tasks_need_is_built() -> None:
    sst_only = MultitaskBERT(options(arch="yin-yang"), TINY, {"sst": SST})
    assert list(sst_only.backbones) == ["sentiment"]
    assert sst_only.pair_layer is None
    assert list(sst_only.heads) == ["sst"]
    pair_only = MultitaskBERT(options(arch="yin-yang"), TINY, {"sts": STS})
    assert list(pair_only.backbones) == ["similarity"]
    assert pair_only.pair_layer is not None
    assert list(pair_only.heads) == ["sts"]


def test_a_further_task_is_one_more_row() -> None:
    cfimdb = replace(SST, name="cfimdb", label_range=(0, 1))
    model = MultitaskBERT(options(arch="r4"), TINY, {**DEFAULT_TASKS, "cfimdb": cfimdb})
    assert model("cfimdb", pack_padded(*make_texts(0))).shape == (BATCH, 2)
    assert list(model.backbones) == ["sst", "para", "sts", "cfimdb"]


# -------------------------------------------------------------------------------------------------------- sizes


def on_meta(**given: Any) -> MultitaskBERT:
    """A model of BERT-base's size without memory for it."""
    with torch.device("meta"):
        return MultitaskBERT(options(**given), BertConfig(), DEFAULT_TASKS)


def test_r1_baseline_has_the_published_number_of_parameters() -> None:
    model = on_meta(arch="r1-baseline")
    assert count(model.backbone("sst").parameters()) == 109_482_240
    assert count(model.heads.parameters()) == 5_383
    assert count(model.parameters()) == 109_482_240 + 5_383


def test_yin_yang_has_the_published_number_of_parameters() -> None:
    model = on_meta(arch="yin-yang")
    assert model.pair_layer is not None
    assert count(model.pair_layer.parameters()) == 7_088_640
    assert count(model.heads.parameters()) == 5_895_247
    assert count(model.parameters()) == 2 * 109_482_240 + 7_088_640 + 5_895_247


def test_feature_widths() -> None:
    width = 768
    yin_yang, duality = on_meta(arch="yin-yang").pair_layer, on_meta(arch="duality").pair_layer
    assert yin_yang is not None and duality is not None
    assert linear_layers(yin_yang) == [(4 * width + 1, 2 * width), (2 * width, 2 * width)]
    assert linear_layers(duality) == [(2 * width + 1, 2 * width), (2 * width, 2 * width)]
    r4 = on_meta(arch="r4")
    assert linear_layers(r4.heads["para"]) == [(3 * width, width), (width, 1)]
    assert linear_layers(r4.heads["sst"]) == [(width, width), (width, 5)]
    assert linear_layers(on_meta(arch="v2").heads["para"]) == [(width, width), (width, 1)]
    assert linear_layers(on_meta(arch="v1").heads["para"]) == [(2 * width, 1)]
    assert linear_layers(on_meta(arch="baseline").heads["sts"]) == [(4 * (width - 2), 1)]
    assert linear_layers(on_meta(arch="cosine").heads["para"]) == [(2 * width, width), (width, 1)]


# ---------------------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize("arch", ["yin-yang", "duality"])
def test_sentiment_and_similarity_backbones_are_apart(arch: str) -> None:
    model = make_model(arch=arch).train()
    assert model.backbone_of == {"sst": "sentiment", "para": "similarity", "sts": "similarity"}
    model("sst", make_batch(model, "sst")).square().sum().backward()
    assert all(p.grad is None for p in model.backbone("para").parameters())
    assert all(p.grad is not None for p in model.backbone("sst").parameters())
    for task in ("para", "sts"):
        model.zero_grad()
        model(task, make_batch(model, task)).square().sum().backward()
        assert all(p.grad is None for p in model.backbone("sst").parameters())
        assert all(p.grad is not None for p in model.backbone(task).parameters())


@pytest.mark.parametrize(
    "backbones, names",
    [
        ("shared", ["shared"]),
        ("sentiment-similarity", ["sentiment", "similarity"]),
        ("per-task", ["sst", "para", "sts"]),
    ],
)
def test_backbones_follow_the_option(backbones: str, names: list[str]) -> None:
    assert list(make_model(backbones=backbones).backbones) == names


# ------------------------------------------------------------------------------------------------ pair features


def test_pair_features_match_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = u.numpy(), v.numpy()
    cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    wanted = {"u": a, "v": b, "abs": np.abs(a - b), "mul": a * b, "cos": cosine[:, None], "diff": b - a}
    for names in (
        *((name,) for name in wanted),
        tuple(wanted),
        ("diff", "cos", "u"),
        *(a.pair_features for a in ARCHS.values()),
    ):
        if not names:  # cross-encoders compare nothing
            continue
        found = pair_features(u, v, names).numpy()
        reference = np.concatenate([wanted[name] for name in names], axis=1)
        assert found.shape == reference.shape
        assert np.abs(found - reference).max() <= 1e-14


def test_pair_outputs_match_numpy_from_features_to_logit() -> None:
    """The duality path by hand: features of the two embeddings, shared layer, convolution, linear layers."""
    model = make_model(arch="duality").double().eval()
    first, second = make_texts(1), make_texts(2, longest=14)
    backbone = model.backbone("para")
    with torch.no_grad():
        u = backbone(*first)["pooler_output"].numpy()
        v = backbone(*second)["pooler_output"].numpy()
        found = model.classify("para", torch.from_numpy(np.concatenate([u, v]))).numpy()
    cosine = (u * v).sum(1) / np.sqrt((u * u).sum(1) * (v * v).sum(1))
    x = np.concatenate([np.abs(u - v), u * v, cosine[:, None]], axis=1)  # [B, 2H+1]
    w = {name: value.numpy() for name, value in model.state_dict().items()}
    x = np.maximum(x @ w["pair_layer.dense.weight"].T + w["pair_layer.dense.bias"], 0)
    x = x @ w["pair_layer.out.weight"].T + w["pair_layer.out.bias"]  # [B, 2H]
    head = [name.rpartition(".")[0] for name in w if name.startswith("heads.para") and name.endswith("weight")]
    kernel, bias = w[f"{head[0]}.weight"], w[f"{head[0]}.bias"]  # [4, 1, 3], [4]
    windows = np.stack([x[:, k : x.shape[1] - 2 + k] for k in range(3)], axis=2)  # [B, 2H-2, 3]
    x = (np.einsum("blk,ck->bcl", windows, kernel[:, 0]) + bias[:, None]).reshape(BATCH, -1)
    x = np.maximum(x @ w[f"{head[1]}.weight"].T + w[f"{head[1]}.bias"], 0)
    x = x @ w[f"{head[2]}.weight"].T + w[f"{head[2]}.bias"]
    assert len(head) == 3
    assert np.abs(found - x).max() <= 1e-12 * np.abs(x).max()


def test_first_and_second_text_keep_their_places() -> None:
    """u is the first text and v the second: v1's head on [u; v] weighs them apart."""
    model = make_model(arch="v1").eval()
    first, second = make_texts(1), make_texts(2, longest=14)
    with torch.no_grad():
        u, v = (model.backbone("para")(*text)["pooler_output"] for text in (first, second))
        (linear,) = modules_of(model.heads["para"], nn.Linear)
        wanted = linear(torch.cat([u, v], dim=1)).squeeze(1)
        assert difference(model.predict_paraphrase(*first, *second), wanted) <= 1e-5
        assert difference(model.predict_paraphrase(*second, *first), wanted) > 1e-3


# ---------------------------------------------------------------------------------------------------- batch norm


@pytest.mark.parametrize("shape", [(9, 4), (5, 4, 6), (1, 4, 6), (2, 4)])
def test_batch_norm_equals_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours, theirs = BatchNorm(4).double(), nn.BatchNorm1d(4).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(1, 0.5)
        theirs.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias)
    for step in range(4):
        training = step != 2  # train, train, eval, train
        inputs = [(torch.randn(shape, dtype=torch.float64) * 3 + 2).requires_grad_()]
        inputs.append(inputs[0].detach().clone().requires_grad_())
        for module, x in zip((ours, theirs), inputs, strict=True):
            module.train(training).zero_grad()
            module(x).pow(3).sum().backward()
        with torch.no_grad():
            x = torch.randn(shape, dtype=torch.float64)
            assert difference(ours.eval()(x), theirs.eval()(x)) <= 1e-13
        pairs = [
            (ours.running_mean_all, theirs.running_mean),
            (ours.running_var_all, theirs.running_var),
            (ours.weight.grad, theirs.weight.grad),
            (ours.bias.grad, theirs.bias.grad),
            (inputs[0].grad, inputs[1].grad),
        ]
        for a, b in pairs:
            assert isinstance(a, Tensor) and isinstance(b, Tensor)
            assert difference(a, b) <= 1e-12 * max(1.0, b.abs().max().item())
    assert ours.get_buffer("running_mean_all").abs().min() > 0


def test_batch_norm_of_one_value_uses_running_statistics_and_leaves_them() -> None:
    norm = BatchNorm(3).train()
    norm(torch.randn(20, 3) * 2 + 5)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(1, 3)
    wanted = (x - before["running_mean_all"]) / (before["running_var_all"] + 1e-5).sqrt()
    assert difference(norm(x), wanted) <= 1e-6
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def statistics(model: MultitaskBERT, task: str) -> list[Tensor]:
    """Copies of the running statistics of one task in the shared pair layer."""
    assert model.pair_layer is not None
    return [value.clone() for name, value in model.pair_layer.named_buffers() if name.endswith(f"_{task}")]


def train_on(model: MultitaskBERT, task: str, steps: int) -> None:
    for step in range(steps):
        model.train()(task, make_batch(model, task, seed=step))


def test_pair_layer_keeps_statistics_per_task() -> None:
    model = make_model(arch="yin-yang")
    train_on(model, "para", 3)
    para, untouched = statistics(model, "para"), statistics(model, "sts")
    batch = make_batch(model, "para", seed=50)
    predictions = model.eval()("para", batch)
    assert len(para) == len(untouched) == 4
    assert all((m == 0).all() for m in untouched[::2]) and all((v == 1).all() for v in untouched[1::2])

    train_on(model, "sts", 3)
    assert all(torch.equal(a, b) for a, b in zip(para, statistics(model, "para"), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(untouched, statistics(model, "sts"), strict=True))
    assert torch.equal(predictions, model.eval()("para", batch))


def test_shared_batchnorm_stats_let_tasks_overwrite_each_other() -> None:
    model = make_model(arch="yin-yang", shared_batchnorm_stats=True)
    assert statistics(model, "para") == statistics(model, "sts") == []
    train_on(model, "para", 3)
    after_para = statistics(model, "all")
    batch = make_batch(model, "para", seed=50)
    predictions = model.eval()("para", batch)
    train_on(model, "sts", 3)
    assert len(after_para) == 4
    assert all(not torch.equal(a, b) for a, b in zip(after_para, statistics(model, "all"), strict=True))
    assert difference(predictions, model.eval()("para", batch)) > 1e-4


def test_pair_layer_equals_torch_modules() -> None:
    """Linear-BN-ReLU-Linear-BN, both norms with the statistics of the task at hand."""
    torch.manual_seed(0)
    layer = PairLayer(7, 5, True, ("para", "sts")).double()
    reference = nn.Sequential(layer.dense, nn.BatchNorm1d(5), nn.ReLU(), layer.out, nn.BatchNorm1d(5)).double()
    for _ in range(3):
        layer(torch.randn(8, 7, dtype=torch.float64) + 3, "para")
        x = torch.randn(8, 7, dtype=torch.float64)
        assert difference(layer(x, "sts"), reference(x)) <= 1e-12
    x = torch.randn(8, 7, dtype=torch.float64)
    assert difference(layer.eval()(x, "sts"), reference.eval()(x)) <= 1e-12
    assert difference(layer(x, "para"), reference(x)) > 1e-2
    plain = PairLayer(7, 5, False, ("para",)).double()
    wanted = nn.Sequential(plain.dense, nn.ReLU(), plain.out)(x)
    assert difference(plain(x, "para"), wanted) <= 1e-14


# ----------------------------------------------------------------------------------------------------------- heads

HEAD_LAYERS = {
    "linear": [Dropout, Linear],
    "nonlinear": [Dropout, Linear, BatchNorm, nn.ReLU, Linear],
    "conv": [
        Dropout,
        nn.Unflatten,
        Convolution,
        BatchNorm,
        nn.Flatten,
        Linear,
        BatchNorm,
        nn.ReLU,
        Linear,
        BatchNorm,
        nn.ReLU,
        Linear,
    ],
    "mlp": [Dropout, Linear, nn.ReLU, Dropout, Linear, nn.ReLU, Dropout, Linear],
}


def test_a_convolution_is_that_of_torch() -> None:
    torch.manual_seed(0)
    own, reference = Convolution(1, 4, 3).double(), nn.Conv1d(1, 4, 3).double()
    reference.load_state_dict(own.state_dict())
    weights = torch.randn(5, 4, 15, dtype=torch.float64)
    found = []
    for module in (own, reference):
        x = torch.linspace(-2, 3, 85, dtype=torch.float64).view(5, 1, 17).sin().requires_grad_()
        out = module(x)
        (out.square() * weights).sum().backward()
        found.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        assert difference(a, b) <= 1e-12


@pytest.mark.parametrize("clf", list(HEAD_LAYERS))
@pytest.mark.parametrize("batchnorm", [True, False])
def test_only_the_chosen_head_is_built(clf: str, batchnorm: bool) -> None:
    own: dict[str, Any] = {"head_layers": 2} if clf in ("conv", "mlp") else {}
    if clf in ("conv", "nonlinear"):
        own["head_batchnorm"] = batchnorm
    chosen = options(clf=clf, **own)
    model = MultitaskBERT(chosen, TINY, DEFAULT_TASKS)
    wanted = [kind for kind in HEAD_LAYERS[clf] if batchnorm or kind is not BatchNorm]
    for task in DEFAULT_TASKS:
        head = model.heads[task]
        assert isinstance(head, nn.Sequential)
        assert [type(layer) for layer in head] == wanted
        assert [layer.p for layer in head if isinstance(layer, nn.Dropout)][0] == chosen.hidden_dropout_prob


def test_widths_inside_heads() -> None:
    def widths(clf: str, depth: int | None = None) -> list[tuple[int, int]]:
        return linear_layers(build_head(options(clf=clf, head_layers=depth), 50, H, 5))

    assert widths("linear") == [(50, 5)]
    assert widths("nonlinear") == [(50, H // 2), (H // 2, 5)]
    assert widths("conv", 0) == [(4 * 48, 5)]
    assert widths("conv", 2) == [(4 * 48, H // 2), (H // 2, H // 2), (H // 2, 5)]
    assert widths("mlp", 0) == [(50, 5)]
    assert widths("mlp", 3) == [(50, H), (H, H), (H, H), (H, 5)]
    assert linear_layers(build_head(options(clf="mlp", head_layers=2, head_width=7), 50, H, 5)) == [
        (50, 7),
        (7, 7),
        (7, 5),
    ]
    assert linear_layers(build_head(options(clf="conv", head_layers=1, head_width=7), 50, H, 5)) == [
        (4 * 48, 7),
        (7, 5),
    ]
    assert linear_layers(build_head(options(clf="nonlinear", head_width=7), 50, H, 5)) == [(50, 7), (7, 5)]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_mlp_head_matches_numpy(activation: str, depth: int) -> None:
    """N times linear and activation, then a linear layer (R2, section 4.1; R4, section 4.2); biases random."""
    torch.manual_seed(0)
    chosen = options(clf="mlp", head_layers=depth, head_activation=activation, head_width=9 if depth else None)
    head = build_head(chosen, 12, H, 5).double().eval()
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

    def shares(**given: Any) -> list[float]:
        head = build_head(options(clf="mlp", hidden_dropout_prob=0.2, **given), 12, H, 5).train()
        ones = [layer.p for layer in head if isinstance(layer, nn.Dropout)]
        # where each stands: before each linear layer
        kinds = [type(layer) for layer in head if isinstance(layer, nn.Dropout | Linear)]
        assert kinds == [Dropout, Linear] * len(ones)
        return ones

    assert shares(head_layers=3) == [0.2] * 4
    assert shares(head_layers=3, output_dropout_prob=0.1) == [0.2, 0.2, 0.2, 0.1]
    assert shares(head_layers=1, output_dropout_prob=0.0) == [0.2, 0.0]
    assert shares(head_layers=0) == [0.2]


def test_super_concat_matches_numpy() -> None:
    """R4's [u; v; v - u], mean-pooled, through two layers with GELU."""
    model = make_model(arch="r4", head_layers=2, head_width=10).double().eval()
    first, second = make_texts(1), make_texts(2, longest=14)
    with torch.no_grad():
        means = []
        for ids, mask in (first, second):
            hidden = model.backbone("para")(ids, mask)["last_hidden_state"]
            means.append(((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)).numpy())
        found = model.classify("para", model.embed("para", stack_padded_pairs(*first, *second))).squeeze(1).numpy()
    u, v = means
    x = np.concatenate([u, v, v - u], axis=1)
    layers = [m for m in model.heads["para"] if isinstance(m, nn.Linear)]
    assert [m.in_features for m in layers] == [3 * H, 10, 10]
    for number, layer in enumerate(layers):
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        x = x * (1 + erf(x / np.sqrt(2))) / 2 if number < 2 else x
    assert np.abs(found - x[:, 0]).max() <= 1e-10 * np.abs(x).max()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("projected", [False, True])
def test_cosine_head_matches_numpy(activation: str, projected: bool) -> None:
    torch.manual_seed(0)
    head = (
        CosineHead(H, options(arch="cosine", head_activation=activation, sts_projection=projected), 5.0).double().eval()
    )
    u, v = (torch.randn(9, H, dtype=torch.float64) for _ in range(2))
    a, b = u, v
    if projected:
        (linear,) = modules_of(head, nn.Linear)
        assert isinstance(linear, nn.Linear)
        act = {"relu": torch.relu, "gelu": nn.functional.gelu}[activation]
        a, b = (act(x @ linear.weight.T + linear.bias) for x in (u, v))
    else:
        assert count(head.parameters()) == 0
    wanted = 5 * (a * b).sum(1, keepdim=True) / (a.norm(dim=1) * b.norm(dim=1))[:, None]
    assert difference(head(u, v), wanted) <= 1e-13
    assert difference(head(u, u), torch.full((9, 1), 5.0, dtype=torch.float64)) <= 1e-12


def test_cosine_head_serves_similarity_only() -> None:
    for arch in ("v1", "cosine", "r4"):
        model = make_model(arch=arch)
        assert {task: isinstance(head, CosineHead) for task, head in model.heads.items()} == {
            "sst": False,
            "para": False,
            "sts": True,
        }


@pytest.mark.parametrize("arch", ["v1", "cosine", "r4"])
def test_a_similarity_of_its_own_range_or_of_one_text(arch: str) -> None:
    """As a fourth task may be: a cosine of 1 is its highest label, and one text has no cosine."""
    far = replace(DEFAULT_TASKS["sts"], name="far", label_range=(0.0, 100.0))
    model = make_model(arch=arch, tasks={"far": far}).eval()
    u = torch.randn(3, model.bert_config.hidden_size)
    assert difference(model.heads["far"](u, u), torch.full((3, 1), 100.0)) <= 1e-4
    grade = replace(DEFAULT_TASKS["sts"], name="grade", text_columns=("text",))
    model = make_model(arch=arch, tasks={"grade": grade})
    assert model("grade", make_batch(model, "grade")).shape == (BATCH,)


def test_cosine_sts_does_not_pass_the_pair_layer() -> None:
    model = make_model(arch="v1", pair_layer="batchnorm").train()
    model("sts", make_batch(model, "sts")).sum().backward()
    assert model.pair_layer is not None
    assert all(p.grad is None for p in model.pair_layer.parameters())
    assert not {id(p) for p in model.pair_layer.parameters()} & {id(p) for p in model.task_parameters("sts")}


def test_head_dropout_acts_in_training_only() -> None:
    model = make_model(arch="r1-baseline", hidden_dropout_prob=0.5)
    batch = make_batch(model, "sst")
    assert difference(model.train()("sst", batch), model("sst", batch)) > 1e-3
    assert torch.equal(model.eval()("sst", batch), model("sst", batch))


# ----------------------------------------------------------------------------------------------- option overrides


def pair_width(model: MultitaskBERT) -> int:
    """Width of the pair features."""
    assert model.pair_layer is not None
    return model.pair_layer.dense.in_features


def test_overrides_of_yin_yang_change_what_they_name() -> None:
    plain = make_model()
    assert list(plain.backbones) == ["sentiment", "similarity"]
    assert pair_width(plain) == 4 * H + 1
    assert list(make_model(backbones="shared").backbones) == ["shared"]
    assert pair_width(make_model(pair_features=("u", "v"))) == 2 * H
    assert pair_width(make_model(pair_encoding="cross")) == H
    assert not make_model(pair_encoding="cross").is_siamese("para")
    assert make_model(pair_layer="none").pair_layer is None
    for layer, norms in (("plain", 0), ("batchnorm", 2)):
        pair_layer = make_model(pair_layer=layer).pair_layer
        assert pair_layer is not None
        assert len(modules_of(pair_layer, BatchNorm)) == norms
    assert not modules_of(make_model(clf="mlp").heads, nn.Conv1d)
    assert len(modules_of(make_model(head_layers=3).heads["sst"], nn.Linear)) == 4
    assert not modules_of(make_model(head_batchnorm=False).heads, BatchNorm)
    assert modules_of(make_model(head_activation="gelu").heads["sst"], nn.GELU)
    assert isinstance(make_model(sts_head="cosine").heads["sts"], CosineHead)
    projected = make_model(sts_head="cosine", sts_projection=True).heads["sts"]
    assert linear_layers(projected) == [(H, H)]


def test_pooling_override_changes_the_sentence_embedding() -> None:
    batch = make_batch(make_model(), "sst")
    model = make_model(pooling="mean", clf="linear").eval()
    (linear,) = modules_of(model.heads["sst"], nn.Linear)
    with torch.no_grad():
        wanted = linear(model.backbone("sst").sentence_embedding(batch, "mean"))
        assert difference(model("sst", batch), wanted) <= 1e-6
        assert difference(make_model(clf="linear").eval()("sst", batch), wanted) > 1e-3


@all_archs
@pytest.mark.parametrize(
    "override",
    [
        {"backbones": "per-task"},
        {"pair_encoding": "cross"},
        {"pair_encoding": "siamese", "pair_features": ("abs", "mul")},
        {"pooling": "mean"},
        {"pair_layer": "batchnorm"},
        {"clf": "conv"},
        {"clf": "mlp", "head_layers": 2},
        {"head_activation": "gelu"},
        {"sts_head": "regression"},
    ],
    ids=lambda override: ",".join(override),
)
def test_any_arch_takes_any_override_and_runs(arch: str, override: dict[str, Any]) -> None:
    model = make_model(arch=arch, **override)
    for name, value in override.items():
        assert getattr(model.options, name) == value
    for task in DEFAULT_TASKS:
        assert model.train()(task, make_batch(model, task)).isfinite().all()


# ------------------------------------------------------------------------------------------------------- freezing


def trainable(model: MultitaskBERT, backbone: str) -> set[str]:
    """Names of the trainable parts of one backbone: the layers' numbers, `pooler`, `embeddings`."""
    out = set()
    for name, parameter in model.backbones[backbone].named_parameters():
        parts = name.split(".")
        if parameter.requires_grad:
            part = parts[1] if parts[0] == "bert_layers" else {"pooler_dense": "pooler"}.get(parts[0], "embeddings")
            out.add(part)
    return out


DEEP = replace(TINY, num_hidden_layers=12)
LAYERS = [str(n) for n in range(12)]


@pytest.mark.parametrize(
    "structure, wanted",
    [
        ("freezeall", set()),
        ("unfreezeall", {"embeddings", *LAYERS, "pooler"}),
        ("unfreezetop0", set()),
        ("unfreezetop1", {"11", "pooler"}),
        ("unfreezetop3", {"9", "10", "11", "pooler"}),
        ("unfreezetop12", {*LAYERS, "pooler"}),
    ],
)
def test_manage_freezing(structure: str, wanted: set[str]) -> None:
    model = MultitaskBERT(options(), DEEP, DEFAULT_TASKS)
    for before in ("unfreezeall", "freezeall", "unfreezetop5"):  # a command says all, whatever stood before
        model.manage_freezing(before)
        model.manage_freezing(structure)
        for backbone in ("sentiment", "similarity"):
            assert trainable(model, backbone) == wanted
        heads = [model.heads, model.pair_layer]
        assert all(p.requires_grad for part in heads if part is not None for p in part.parameters())
    unfrozen = {p.requires_grad for p in model.backbone("sst").bert_layers[11].parameters()}
    assert unfrozen == {"11" in wanted}


def test_frozen_layers_get_no_gradient_and_do_not_change() -> None:
    model = make_model(arch="r1-baseline").train()
    model.manage_freezing("unfreezetop1")
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model("sst", make_batch(model, "sst")).square().sum().backward()
    optimizer.step()
    for name, value in model.named_parameters():
        trained = "bert_layers.1" in name or "pooler" in name or name.startswith("heads.sst")
        assert (value.grad is not None) == trained, name
        if not trained:
            assert torch.equal(value, before[name]), name


def test_frozen_backbone_still_trains_the_head() -> None:
    model = make_model(arch="yin-yang").train()
    model.manage_freezing("freezeall")
    model("para", make_batch(model, "para")).square().sum().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, _ in model.named_parameters() if name.startswith(("pair_layer", "heads.para"))}


@pytest.mark.parametrize(
    "structure",
    ["freeze", "", "unfreezetop", "unfreezetop13", "unfreezetop-1", "unfreezetop1.5", " unfreezeall", "unfreezeall\n"],
)
def test_unknown_freezing_commands_raise_and_change_nothing(structure: str) -> None:
    model = MultitaskBERT(options(arch="r1-baseline"), DEEP, {"sst": SST})
    model.manage_freezing("unfreezetop2")
    with pytest.raises(UserError, match="12") as caught:
        model.manage_freezing(structure)
    assert repr(structure) in str(caught.value)
    assert trainable(model, "shared") == {"10", "11", "pooler"}


@pytest.mark.parametrize(
    "depth, wanted", [(12, [0, 3, 6, 9, 13, 13]), (6, [0, 2, 3, 5, 7, 7]), (4, [0, 1, 2, 3, 5, 5])]
)
def test_the_schedule_of_each_fine_tune_mode(depth: int, wanted: list[int]) -> None:
    assert [scheduled_layers("iterative", stage, depth) for stage in range(6)] == wanted
    assert {scheduled_layers("last-layer", stage, depth) for stage in range(8)} == {0}
    assert {scheduled_layers("full-model", stage, depth) for stage in range(8)} == {depth + 1}
