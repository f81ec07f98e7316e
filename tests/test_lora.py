"""LoRA and DoRA against peft and against their formulas; merging, state and options."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import TINY, make_texts, max_difference, randomise, refusal, weighted_sum
from torch import Tensor, nn

import lora
from base_bert import load_weights, read_config, save_pretrained
from bert import BertModel
from config import BertConfig
from kernels.linear import linear
from lora import ColumnDoRALinear, DoRALinear, LoRAConfig, LoRALinear
from utils.options import check_values

IN, OUT, ROWS = 12, 9, 17
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 5.0},
    "rslora": {"alpha": 5.0, "rslora": True},
    "dora": {"alpha": 5.0, "dora": True},
    "column": {"alpha": 5.0, "dora": True, "dora_norm": "column"},
}
CLASSES = {"lora": LoRALinear, "rslora": LoRALinear, "dora": DoRALinear, "column": ColumnDoRALinear}
all_kinds = pytest.mark.parametrize("kind", KINDS)


def randomise_adapters(model: nn.Module, size: float = 0.3) -> None:
    """Add random values to the adapters and leave the base as it is."""
    torch.manual_seed(1)
    for _, layer in lora.adapted_layers(model):
        for name in layer.adapters:
            parameter = layer.get_parameter(name)
            parameter.data.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=size)


def make_layer(kind: str, dtype: torch.dtype = torch.float64, bias: bool = True, **options: Any) -> Any:
    """Return a wrapped layer of rank 3 with random values everywhere."""
    torch.manual_seed(0)
    wrapped = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    layer = CLASSES[kind](wrapped, LoRAConfig(rank=3, **KINDS[kind], **options))
    randomise_adapters(layer)
    return layer


def adapted_bert(kind: str = "lora") -> BertModel:
    """Return a random BERT with random adapters on all linear layers."""
    model = BertModel(TINY)
    randomise(model, std=0.1)
    lora.inject(model, LoRAConfig("all-lin", rank=3, **KINDS[kind]))
    randomise_adapters(model, 0.1)
    return model.eval()


def with_gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(weighted_sum(out), inputs)]


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal to `tolerance`, relative to the largest element where that is above 1."""
    assert max_difference(found, wanted) <= tolerance * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_layer_equals_pefts(kind: str, bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    layer = make_layer(kind, dtype, bias)
    theirs: Any = nn.Sequential(nn.Linear(IN, OUT, bias=bias, dtype=dtype))
    theirs[0].load_state_dict({name: t for name, t in layer.state_dict().items() if name in ("weight", "bias")})
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=kind == "dora", use_rslora=kind == "rslora", target_modules=["0"]
    )
    wrapped_model: Any = peft.get_peft_model(theirs, config)
    wrapped = wrapped_model.base_model.model[0]
    parameters = [wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight]
    parameters += [wrapped.lora_magnitude_vector["default"].weight] if kind == "dora" else []
    ours = [layer.get_parameter(name) for name in layer.adapters]
    for parameter, adapter in zip(parameters, ours, strict=True):
        parameter.data.copy_(adapter.data.view_as(parameter))
    x = torch.randn(ROWS, IN, dtype=dtype, requires_grad=True)
    results = with_gradients(layer(x), x, *ours), with_gradients(wrapped(x), x, *parameters)
    for found, wanted in zip(*results, strict=True):
        close(found.view_as(wanted), wanted, tolerance)


def formula(layer: Any, x: Tensor, dropped: Tensor) -> Tensor:
    """The layer's formula term by term, for autograd."""
    update = layer.scaling * layer.lora_B @ layer.lora_A
    w, b, m = layer.weight, layer.bias, getattr(layer, "magnitude", None)
    if isinstance(layer, ColumnDoRALinear):
        adapted = m * (w + update) / (w + update).square().sum(0, keepdim=True).sqrt()
        return x @ w.t() + dropped @ (adapted - w).t() + b
    if isinstance(layer, DoRALinear):
        ratio = m / (w + update).detach().square().sum(1, keepdim=True).sqrt()
        return x @ w.t() + b + dropped @ ((ratio - 1) * w + ratio * update).t()
    return x @ w.t() + b + dropped @ update.t()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@all_kinds
def test_layers_equal_their_formulas(kind: str, dropout: float) -> None:
    layer = make_layer(kind, dropout=dropout)
    x = torch.randn(2, ROWS, IN, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(layer.get_parameter(name) for name in layer.adapters)]
    torch.manual_seed(5)
    dropped = layer.dropout(x)
    assert torch.equal(dropped, x) == (dropout == 0.0)
    torch.manual_seed(5)
    results = with_gradients(layer(x), *parameters), with_gradients(formula(layer, x, dropped), *parameters)
    for found, wanted in zip(*results, strict=True):
        close(found, wanted, 1e-12)
    close(layer.eval()(x), formula(layer, x, x), 1e-12)
    layer.lora_A.requires_grad_(False)
    layer.train()(x).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {*layer.adapters} - {"lora_A"}


@all_kinds
def test_a_new_adapter_changes_nothing_and_learns_through_b(kind: str) -> None:
    torch.manual_seed(0)
    wrapped, x = nn.Linear(IN, OUT), torch.randn(ROWS, IN)
    wanted = linear(x, wrapped.weight, wrapped.bias).detach()
    layer: Any = CLASSES[kind](wrapped, LoRAConfig(rank=3, **KINDS[kind]))
    out, grad_a, grad_b = with_gradients(layer(x), layer.lora_A, layer.lora_B)
    assert max_difference(out, wanted) <= (1e-6 if "dora" in KINDS[kind] else 0)
    assert not grad_a.any() and grad_b.all()
    assert 0.2 < layer.lora_A.std() < 0.5  # N(0, 1/r^2)
    if "dora" in KINDS[kind]:
        dim = 0 if kind == "column" else 1
        close(layer.magnitude, layer.weight.norm(dim=dim, keepdim=True), 1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@all_kinds
def test_autocast(kind: str, dropout: float) -> None:
    layer = make_layer(kind, torch.float32, dropout=dropout)
    x = torch.randn(ROWS, IN, requires_grad=True)
    parameters = [x, *(layer.get_parameter(name) for name in layer.adapters)]
    torch.manual_seed(5)
    wanted = layer(x)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        layer.merge()
    merged = layer.merged_weight
    layer.merge()
    assert torch.equal(merged, layer.merged_weight)  # norms and weights keep their precision
    assert out.dtype == torch.bfloat16 and merged.dtype == torch.float32
    for found, exact in zip(with_gradients(out, *parameters), with_gradients(wanted, *parameters), strict=True):
        close(found.float(), exact, 0.03)


def direct_norm(layer: DoRALinear) -> Tensor:
    w, a, b = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B))
    return (w + layer.scaling * b @ a).norm(dim=1)


def test_the_expanded_norm_equals_the_direct_one() -> None:
    layer = make_layer("dora")
    close(layer.norm(), direct_norm(layer), 1e-12)
    layer.load_state_dict({name: tensor + 1 for name, tensor in layer.state_dict().items()})
    close(layer.norm(), direct_norm(layer), 1e-12)
    layer = make_layer("dora", torch.float32)
    assert layer.norm().dtype == torch.float32 and not layer.norm().requires_grad
    close(layer.norm().double(), direct_norm(layer), 1e-6)


def test_a_row_whose_expansion_cancels_is_computed_directly() -> None:
    layer = make_layer("dora", torch.float32)
    with torch.no_grad():
        layer.lora_A[0] = layer.weight[2]
        layer.lora_B[2] = torch.tensor([-(1 - 1e-3) / layer.scaling, 0, 0])  # what is left is above 0, but rounded
    wanted = direct_norm(layer)
    assert wanted[2] < 2e-3 * layer.weight[2].norm()
    assert ((layer.norm().double() - wanted) / wanted).abs().max() < 2e-3


def test_a_row_of_zeros_stays_finite() -> None:
    wrapped = nn.Linear(IN, OUT)
    wrapped.weight.data[1] = 0
    layer = DoRALinear(wrapped, LoRAConfig(dora=True))
    x = torch.randn(ROWS, IN, requires_grad=True)
    out, *grads = with_gradients(layer(x), x, layer.lora_A, layer.lora_B, layer.magnitude)
    assert torch.equal(out[:, 1], wrapped.bias[1].expand(ROWS)) and all(grad.isfinite().all() for grad in grads)


@all_kinds
def test_merged_weights_compute_the_same(kind: str, tmp_path: Path) -> None:
    """Inside `merged`, and as a plain backbone. A hundred merges leave no trace."""
    model, texts = adapted_bert(kind), make_texts(0)
    layers = [layer for _, layer in lora.adapted_layers(model)]
    before, digest = {n: t.clone() for n, t in model.state_dict().items()}, lora.base_weights_sha256(model)
    with torch.no_grad():
        plain = model(*texts)["last_hidden_state"]
        with lora.merged(model), lora.merged(model):
            inside = model(*texts)["last_hidden_state"]
            assert all(layer.merged_weight is not None for layer in layers)
            assert lora.base_weights_sha256(model) == digest  # so a checkpoint made inside is right
        close(inside, plain, 1e-6)
        save_pretrained(tmp_path, TINY, lora.merged_state_dict(model))
        exported = BertModel(read_config(tmp_path)).eval()
        exported.load_state_dict(load_weights(tmp_path, TINY))
        close(exported(*texts)["last_hidden_state"], inside, 1e-7)
        with pytest.raises(RuntimeError, match="stop"), lora.merged(model):
            raise RuntimeError("stop")
        for _ in range(100):
            with lora.merged(model):
                pass
        assert torch.equal(model(*texts)["last_hidden_state"], plain)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mode": "attn", "rank": 1}, 55_296),
        ({"mode": "attn-only", "rank": 10}, 552_960),
        ({"mode": "all-lin", "rank": 1}, 165_888),
        ({"mode": "all-lin-only", "rank": 4}, 663_552),
        ({"rank": 8, "targets": ("query", "value")}, 294_912),
        ({"rank": 8, "targets": ("query", "value"), "dora": True}, 294_912 + 18_432),
    ],
    ids=str,
)
def test_parameter_counts_at_bert_base(options: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        model = BertModel(BertConfig())
    lora.inject(model, LoRAConfig(**options))
    assert sum(tensor.numel() for tensor in lora.adapter_state_dict(model).values()) == expected
    assert sum(p.numel() for p in model.parameters()) == 109_482_240 + expected


@pytest.mark.parametrize("mode", lora.MODES)
def test_inject_wraps_the_linears_of_the_mode_only(mode: str) -> None:
    model = BertModel(TINY)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    lora.inject(model, LoRAConfig(mode))
    wrapped = {name for name, _ in lora.adapted_layers(model)}
    attention = {name for name in names if name.endswith(("query", "key", "value"))}
    assert wrapped == (attention if mode.startswith("attn") else names - {"pooler_dense"})
    with pytest.raises(ValueError, match="no Linear named"):
        lora.inject(model, LoRAConfig(mode))


@all_kinds
def test_restore_undoes_inject_and_the_hash_names_the_base(kind: str) -> None:
    model, plain = adapted_bert(kind), BertModel(TINY).eval()
    randomise(plain, std=0.1)
    digest = lora.base_weights_sha256(model)
    assert digest == lora.base_weights_sha256(plain)
    lora.restore(model)
    assert torch.equal(model(*make_texts(0))["pooler_output"], plain(*make_texts(0))["pooler_output"])
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
    assert list(map(type, model.modules())) == list(map(type, plain.modules()))
    model.get_parameter("bert_layers.1.out_dense.bias").data[3] += 1e-6
    assert lora.base_weights_sha256(model) != digest


def test_adapters_go_from_one_model_to_another_if_they_fit() -> None:
    source, target, texts = adapted_bert("dora"), adapted_bert("dora"), make_texts(0)
    randomise_adapters(target)
    before = {name: tensor.clone() for name, tensor in lora.adapter_state_dict(target).items()}
    state = {name: tensor.clone() for name, tensor in lora.adapter_state_dict(source).items()}
    first, second, *_ = state
    wrong = {**state, "other.lora_A": state[first], second: state[second][:1]}
    del wrong[first]
    message = refusal(lora.load_adapter_state_dict, target, wrong, "a.pt")
    assert message.startswith("a.pt: ") and "use the --lora_dict" in message
    assert f"(1 missing: {first}; 1 left over: other.lora_A; 1 of the wrong shape: {second} is [1, 3]" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.adapter_state_dict(target).items())
    lora.load_adapter_state_dict(target, state)
    assert torch.equal(target(*texts)["pooler_output"], source(*texts)["pooler_output"])


def test_scaling() -> None:
    assert LoRAConfig(rank=4).scaling == 1
    assert LoRAConfig(rank=4, alpha=8).scaling == 2
    assert LoRAConfig(rank=4, alpha=8, rslora=True).scaling == 4


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"mode": "attn-only", "r": 1, "dora": 1}', LoRAConfig("attn-only", rank=1, dora=True)),
        (
            '{"mode": "attn", "r": 8, "alpha": 16, "rslora": true, "dropout": 0.1, "targets": "query, value"}',
            LoRAConfig("attn", 8, 16, True, 0.1, targets=("query", "value")),
        ),
        (
            '{"mode": "all-lin", "dora": 1, "dora_norm": "column"}',
            LoRAConfig("all-lin", dora=True, dora_norm="column"),
        ),
        ('{"r": 17592186044416, "alpha": 1e30, "dropout": 0.99}', LoRAConfig("attn-only", 2**44, 1e30, dropout=0.99)),
        ('{"mode": "none", "r": 5}', None),
    ],
)
def test_the_flag_of_the_reports_is_read(text: str, wanted: LoRAConfig | None) -> None:
    """What it gives can be saved as flags."""
    found = LoRAConfig.from_lora_dict(text)
    assert found == wanted
    if found is not None:
        check_values(found.to_options())
        assert LoRAConfig.from_options(found.to_options()) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'mode': 'attn'}", "is no JSON"),
        ('["attn"]', "is no JSON object; write it as"),
        ('{"rnak": 1}', "unknown key 'rnak'; choose from mode, r, alpha"),
        ('{"mode": "attention"}', "mode is 'attention'; choose one of attn, attn-only, all-lin, all-lin-only, or none"),
        ('{"mode": ["attn"]}', "mode is ['attn']; choose"),
        ('{"r": 0}', "r is 0; give a whole number of at least 1"),
        ('{"r": 1.5}', "r is 1.5; give"),
        ('{"r": true}', "r is True; give"),
        ('{"r": 99999999999999999999999}', "give a whole number of at least 1 and at most 17592186044416"),
        ('{"alpha": -1}', "alpha is -1; give a number above 0"),
        ('{"alpha": 1' + "0" * 400 + "}", "a number has 401 digits"),
        ('{"alpha": Infinity}', "alpha is inf; give"),
        ('{"alpha": NaN}', "alpha is nan; give"),
        ('{"dropout": 1}', "dropout is 1; give a number from 0 to 0.99"),
        ('{"dropout": NaN}', "dropout is nan; give"),
        ('{"dora": "yes"}', "dora is 'yes'; give 0 or 1"),
        ('{"rslora": 2}', "rslora is 2; give 0 or 1"),
        ('{"dora": 1, "dora_norm": "both"}', "dora_norm is 'both'; choose one of row, column"),
        ('{"dora_norm": "column"}', "dora_norm is 'column'; it belongs to DoRA"),
        ('{"targets": ["query", "pooler"]}', "targets is 'pooler'; choose from query,key,value,attention_dense"),
        ('{"targets": []}', "targets is []; give a list of names"),
        ('{"targets": 3}', "targets is 3; give a list of names"),
    ],
)
def test_wrong_options_are_explained(text: str, message: str) -> None:
    found = refusal(LoRAConfig.from_lora_dict, text)
    assert found.startswith("--lora_dict") and message in found
