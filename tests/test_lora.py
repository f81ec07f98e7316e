"""LoRA and DoRA against peft and against their formulas; freezing, merging, files and messages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora
from base_bert import load_weights, read_config, save_pretrained
from bert import BertModel
from config import BertConfig, check_values
from kernels import linear as products
from lora import ColumnDoRALinear, DoRALinear, LoRAConfig, LoRALinear
from models.freezing import frozen_by_adapters, set_trainable
from models.peft_exchange import export_peft, import_peft
from utils.errors import UserError

IN, OUT, ROWS = 12, 9, 17
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 5.0},
    "rslora": {"alpha": 5.0, "rslora": True},
    "dora": {"alpha": 5.0, "dora": True},
}
COLUMN: dict[str, Any] = {"alpha": 5.0, "dora": True, "dora_norm": "column"}
PEFT_TARGETS = {  # written out again, so that a wrong name in lora.py cannot agree with itself
    "self_attention.query": "attention.self.query",
    "self_attention.key": "attention.self.key",
    "self_attention.value": "attention.self.value",
    "attention_dense": "attention.output.dense",
    "interm_dense": "intermediate.dense",
    "out_dense": "output.dense",
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def randomise(module: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    """Add random values of this size to every parameter, biases and magnitudes included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((size * noise).to(parameter.dtype))


def make_layer(kind: type[LoRALinear], dtype: torch.dtype = torch.float64, bias: bool = True, **options: Any) -> Any:
    """A wrapped layer of rank 3 with random values everywhere."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    layer = kind(linear, LoRAConfig(rank=3, **options))
    randomise_adapters(layer)
    return layer


def randomise_adapters(model: nn.Module, size: float = 0.3) -> None:
    """Random adapters, the base untouched."""
    for _, layer in lora.adapted_layers(model):
        for i, name in enumerate(layer.adapters):
            randomise(nn.ParameterList([layer.get_parameter(name)]), seed=i + 1, size=size)


def gradients(out: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of `out`."""
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weights).sum(), wanted)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to `tolerance`, relative to the largest element where that is above 1."""
    assert actual.shape == expected.shape
    bound = tolerance * max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= bound


# ----------------------------------------------------------------------------------------------------------------------
# Against peft


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_layer_equals_pefts(name: str, bias: bool, dtype: torch.dtype) -> None:
    options = KINDS[name]
    layer = make_layer(DoRALinear if "dora" in options else LoRALinear, dtype, bias, **options)
    theirs: Any = nn.Sequential(nn.Linear(IN, OUT, bias=bias, dtype=dtype))
    with torch.no_grad():
        theirs[0].weight.copy_(layer.weight)
        if bias:
            theirs[0].bias.copy_(layer.bias)
    wanted = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora="dora" in options, use_rslora="rslora" in options, target_modules=["0"]
    )
    wrapped_model: Any = peft.get_peft_model(theirs, wanted)
    wrapped = wrapped_model.base_model.model[0]
    parameters = [wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight]
    if "dora" in options:
        parameters.append(wrapped.lora_magnitude_vector["default"].weight)
    with torch.no_grad():
        for parameter, own in zip(parameters, layer.adapters, strict=True):
            parameter.copy_(layer.get_parameter(own).view_as(parameter))

    x = torch.randn(ROWS, IN, dtype=dtype, requires_grad=True)
    ours, oracle = layer(x), wrapped(x)
    close(ours, oracle, TOLERANCE[dtype])
    mine = gradients(ours, x, *(layer.get_parameter(own) for own in layer.adapters))
    for actual, expected in zip(mine, gradients(oracle, x, *parameters), strict=True):
        close(actual.view_as(expected), expected, TOLERANCE[dtype])


def small_bert(dtype: torch.dtype = torch.float32) -> BertModel:
    """A random two-layer BERT without dropout."""
    config = BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(3)
    model = BertModel(config)
    randomise(model, size=0.1)
    return model.to(dtype)


def tokens() -> tuple[Tensor, Tensor]:
    """Three sequences of 7, 4 and 2 tokens, padded."""
    ids = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    return ids * mask, mask.long()


def transformers_bert(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model of the weights that save_pretrained wrote."""
    model: Any = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
    return model.to(dtype)


def peft_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """peft's parameter of one of our adapter names."""
    _, number, rest = name.split(".", 2)
    path, own = rest.rsplit(".", 1)
    suffix = {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "lora_magnitude_vector"}[own]
    return model.get_parameter(f"base_model.model.encoder.layer.{number}.{PEFT_TARGETS[path]}.{suffix}.default.weight")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_bert_equals_pefts_after_export(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_bert()
    save_pretrained(tmp_path / "base", model.config, model.state_dict())
    model = model.to(dtype)
    config = LoRAConfig("all-lin", rank=3, **KINDS[name])
    lora.inject(model, config)
    randomise_adapters(model, size=0.1)
    export_peft(model, config, tmp_path / "adapter", "base")
    base = transformers_bert(tmp_path / "base", dtype)
    theirs: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    embedding = base.embeddings.word_embeddings.weight.requires_grad_(True)

    ids, mask = tokens()
    ours, oracle = model(ids, mask), theirs(ids, mask)
    last = oracle.last_hidden_state * mask[:, :, None]  # ours is zero at padding
    close(ours["last_hidden_state"], last, TOLERANCE[dtype])
    close(ours["pooler_output"], oracle.pooler_output, TOLERANCE[dtype])
    names = list(lora.adapter_state_dict(model))
    assert len(names) == 2 * 6 * (3 if "dora" in KINDS[name] else 2)
    mine = gradients(ours["last_hidden_state"], model.word_embedding.weight, *map(model.get_parameter, names))
    parameters = [peft_parameter(theirs, own) for own in names]
    for actual, expected in zip(mine, gradients(last, embedding, *parameters), strict=True):
        close(actual.view_as(expected), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("targets", [["query", "value"], ["attention.output.dense", "intermediate.dense"]])
@pytest.mark.parametrize("name", KINDS)
def test_pefts_adapter_is_imported(name: str, targets: list[str], tmp_path: Path) -> None:
    model = small_bert()
    save_pretrained(tmp_path / "base", model.config, model.state_dict())
    options = KINDS[name]
    wanted = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        lora_dropout=0.25,
        use_dora="dora" in options,
        use_rslora="rslora" in options,
        target_modules=targets,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(transformers_bert(tmp_path / "base", torch.float32), wanted).eval()
    theirs.save_pretrained(str(tmp_path / "adapter"))

    config, tensors = import_peft(tmp_path / "adapter")
    linears = ("query", "value") if targets[0] == "query" else ("attention_dense", "interm_dense")
    assert config.linears == linears and config.freezes_rest
    assert (config.rank, config.alpha, config.dropout) == (3, 5, 0.25)
    assert (config.dora, config.rslora) == ("dora" in options, "rslora" in options)
    lora.inject(model, config)
    lora.load_adapter_state_dict(model, tensors)
    ids, mask = tokens()
    with torch.no_grad():
        ours, oracle = model.eval()(ids, mask), theirs(ids, mask)
    close(ours["pooler_output"], oracle.pooler_output, 1e-5)
    close(ours["last_hidden_state"], oracle.last_hidden_state * mask[:, :, None], 1e-5)


@pytest.mark.parametrize("kind", [peft.TaskType.SEQ_CLS, peft.TaskType.TOKEN_CLS])
def test_of_pefts_classifier_only_the_adapters_are_imported(kind: peft.TaskType, tmp_path: Path) -> None:
    """peft adds the classifier to what is saved by itself."""
    model = small_bert()
    save_pretrained(tmp_path / "base", model.config, model.state_dict())
    sentences = kind == peft.TaskType.SEQ_CLS
    of = transformers.BertForSequenceClassification if sentences else transformers.BertForTokenClassification
    wanted = peft.LoraConfig(task_type=kind, r=3, target_modules=["query", "value"], init_lora_weights=False)
    base: Any = of.from_pretrained(tmp_path / "base", num_labels=5)
    theirs = peft.get_peft_model(base, wanted).eval()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    assert any("classifier" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))

    config, tensors = import_peft(tmp_path / "adapter")
    assert len(tensors) == 2 * 2 * 2
    lora.inject(model, config)
    lora.load_adapter_state_dict(model, tensors)
    ids, mask = tokens()
    with torch.no_grad():
        ours, oracle = model.eval()(ids, mask), base.bert(ids, mask)
    close(ours["last_hidden_state"], oracle.last_hidden_state * mask[:, :, None], 1e-5)


@pytest.mark.parametrize("mode", lora.MODES)
def test_export_and_import_are_inverse(mode: str, tmp_path: Path) -> None:
    model, config = small_bert(), LoRAConfig(mode, rank=2, alpha=7.0, dora=True)
    lora.inject(model, config)
    randomise_adapters(model)
    export_peft(model, config, tmp_path, "base")
    back, tensors = import_peft(tmp_path)
    assert back.linears == config.linears and back.scaling == config.scaling and back.dora
    assert back.mode == mode.removesuffix("-only") + "-only"
    expected = lora.adapter_state_dict(model)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_peft_has_no_column_norm(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dora_norm column; export the merged backbone"):
        export_peft(small_bert(), LoRAConfig(**COLUMN), tmp_path, "base")


def peft_folder(folder: Path, **changes: Any) -> Path:
    model, config = small_bert(), LoRAConfig()
    lora.inject(model, config)
    export_peft(model, config, folder, "base")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"bias": "all"},
        {"rank_pattern": {"query": 2}},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["classifier", "pooler"]},
    ],
    ids=str,
)
def test_unsupported_adapters_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{next(iter(changes))} is .* not supported"):
        import_peft(peft_folder(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 1e300}, r"alpha is 1e\+300; give .* at most 1e\+30"),
        ({"lora_dropout": 0.995}, "dropout is 0.995; give a number from 0 to 0.99"),
    ],
    ids=str,
)
def test_adapters_beyond_the_bounds_of_the_flags_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A checkpoint keeps them as flags, and could not be loaded."""
    with pytest.raises(UserError, match=rf"adapter_config\.json: .*{message}") as caught:
        import_peft(peft_folder(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_adapters_at_the_bounds_of_the_flags_are_saved_as_flags() -> None:
    config = LoRAConfig.from_lora_dict('{"r": 17592186044416, "alpha": 1e30, "dropout": 0.99}')
    assert config is not None
    check_values(config.to_options())


def test_unreadable_and_foreign_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: cannot be read .* name a folder with adapter_config\.json"):
        import_peft(tmp_path / "nowhere")
    path = peft_folder(tmp_path) / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.pooler.dense.lora_A.weight": torch.ones(1, 24)}, path)
    with pytest.raises(UserError, match=r"pooler\.dense\.lora_A\.weight is no adapter of query,"):
        import_peft(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The formulas


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, ColumnDoRALinear])
def test_a_new_adapter_changes_nothing_and_learns_through_b(kind: type[LoRALinear]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    x = torch.randn(ROWS, IN)
    expected = products.linear(x, linear.weight, linear.bias).detach()
    layer = kind(linear, LoRAConfig(rank=3, dora=kind is not LoRALinear))
    out = layer(x)
    assert (out - expected).abs().max() <= (0 if kind is LoRALinear else 1e-6)
    grad_a, grad_b = gradients(out, layer.lora_A, layer.lora_B)
    assert not grad_a.any() and grad_b.all()
    assert 0.2 < layer.lora_A.std() < 0.5  # N(0, 1/r^2)


def test_scaling() -> None:
    assert LoRAConfig(rank=4).scaling == 1
    assert LoRAConfig(rank=4, alpha=8).scaling == 2
    assert LoRAConfig(rank=4, alpha=8, rslora=True).scaling == 4


def reference(layer: Any, x: Tensor, dropped: Tensor) -> Tensor:
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
@pytest.mark.parametrize(
    ("kind", "options"),
    [(LoRALinear, KINDS["rslora"]), (DoRALinear, KINDS["dora"]), (ColumnDoRALinear, COLUMN)],
)
def test_layers_equal_their_formulas(kind: type[LoRALinear], options: dict[str, Any], dropout: float) -> None:
    layer = make_layer(kind, dropout=dropout, **options)
    x = torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    dropped = layer.dropout(x)
    assert torch.equal(dropped, x) == (dropout == 0.0)
    torch.manual_seed(5)
    ours, expected = layer(x), reference(layer, x, dropped)
    close(ours, expected, 1e-12)
    parameters = [layer.get_parameter(name) for name in layer.adapters]
    for actual, wanted in zip(gradients(ours, x, *parameters), gradients(expected, x, *parameters), strict=True):
        close(actual, wanted, 1e-12)
    close(layer.eval()(x), reference(layer, x, x), 1e-12)


def test_leading_dimensions_are_kept() -> None:
    layer = make_layer(DoRALinear, dora=True)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(layer.get_parameter(name) for name in layer.adapters)]
    flat = layer(x.flatten(0, 1)).view(2, 3, OUT)
    close(layer(x), flat, 1e-12)
    for actual, expected in zip(gradients(layer(x), *parameters), gradients(flat, *parameters), strict=True):
        close(actual, expected, 1e-12)


def test_magnitudes_have_one_number_per_row_or_column() -> None:
    rows, columns = make_layer(DoRALinear, dora=True), make_layer(ColumnDoRALinear, **COLUMN)
    assert rows.magnitude.shape == (OUT, 1) and columns.magnitude.shape == (1, IN)
    fresh = DoRALinear(nn.Linear(IN, OUT), LoRAConfig(dora=True))
    close(fresh.magnitude, fresh.weight.norm(dim=1, keepdim=True), 1e-6)


def direct_norm(layer: DoRALinear) -> Tensor:
    w, a, b = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B))
    return (w + layer.scaling * b @ a).norm(dim=1)


def test_the_expanded_norm_equals_the_direct_one() -> None:
    layer = make_layer(DoRALinear, **KINDS["dora"])
    close(layer.norm(), direct_norm(layer), 1e-12)
    layer = make_layer(DoRALinear, torch.float32, **KINDS["dora"])
    assert layer.norm().dtype == torch.float32 and not layer.norm().requires_grad
    close(layer.norm().double(), direct_norm(layer), 1e-6)


def test_a_row_whose_expansion_cancels_is_computed_directly() -> None:
    layer = make_layer(DoRALinear, torch.float32, dora=True)
    with torch.no_grad():
        layer.lora_A[0] = layer.weight[2]
        layer.lora_B[2] = torch.tensor([-(1 - 1e-3) / layer.scaling, 0, 0])  # what is left is above 0, but rounded
    expected = direct_norm(layer)
    assert expected[2] < 2e-3 * layer.weight[2].norm()
    assert ((layer.norm().double() - expected) / expected).abs().max() < 2e-3


def test_a_row_of_zeros_stays_finite() -> None:
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight[1] = 0
    layer = DoRALinear(linear, LoRAConfig(dora=True))
    x = torch.randn(ROWS, IN, requires_grad=True)
    out = layer(x)
    assert torch.equal(out[:, 1], linear.bias[1].expand(ROWS))
    assert all(grad.isfinite().all() for grad in gradients(out, x, layer.lora_A, layer.lora_B, layer.magnitude))


def test_base_weights_loaded_later_renew_the_cached_norm() -> None:
    layer = make_layer(DoRALinear, dora=True)
    other = {name: tensor + 1 for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(other)
    close(layer.norm(), direct_norm(layer), 1e-12)
    assert set(other) == {"weight", "bias", "lora_A", "lora_B", "magnitude"}


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, ColumnDoRALinear])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_autocast(kind: type[LoRALinear], dropout: float) -> None:
    layer = make_layer(kind, torch.float32, dora=kind is not LoRALinear, dropout=dropout)
    x = torch.randn(ROWS, IN, requires_grad=True)
    parameters = [x, *(layer.get_parameter(name) for name in layer.adapters)]
    torch.manual_seed(5)
    expected = layer(x)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16
        layer.merge()
        factor = layer.factor() if isinstance(layer, DoRALinear) else None
    merged = layer.merged_weight
    layer.merge()
    assert torch.equal(merged, layer.merged_weight) and merged.dtype == torch.float32
    assert factor is None or torch.equal(factor, layer.factor())  # norms and weights keep their precision
    close(out.float(), expected, 0.03)
    for actual, wanted in zip(gradients(out, *parameters), gradients(expected, *parameters), strict=True):
        assert actual.dtype == torch.float32
        close(actual, wanted, 0.03)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    layer = make_layer(DoRALinear, dora=True)
    layer.lora_A.requires_grad_(False)
    layer(torch.randn(ROWS, IN, dtype=torch.float64)).sum().backward()
    grads = {name: parameter.grad is not None for name, parameter in layer.named_parameters()}
    assert grads == {"weight": False, "bias": False, "lora_A": False, "lora_B": True, "magnitude": True}


# ----------------------------------------------------------------------------------------------------------------------
# Merging


def adapted_bert(**options: Any) -> BertModel:
    model = small_bert()
    lora.inject(model, LoRAConfig("all-lin", rank=3, **options))
    randomise_adapters(model, size=0.1)
    return model.eval()


@pytest.mark.parametrize("options", [*KINDS.values(), COLUMN], ids=str)
def test_merged_weights_compute_the_same(options: dict[str, Any]) -> None:
    layer = make_layer(ColumnDoRALinear if options is COLUMN else DoRALinear if "dora" in options else LoRALinear)
    layer = layer.float()
    x = torch.randn(ROWS, IN)
    before = layer(x).detach()
    layer.merge()
    assert torch.equal(layer(x), products.linear(x, layer.merged_weight, layer.bias))
    assert (layer(x) - before).abs().max() < 1e-6 * max(1, before.abs().max())

    model = adapted_bert(**options)
    ids, mask = tokens()
    with torch.no_grad():
        plain = model(ids, mask)["last_hidden_state"]
        with lora.merged(model):
            inside = model(ids, mask)["last_hidden_state"]
        close(inside, plain, 1e-6)
        exported = BertModel(model.config).eval()
        exported.load_state_dict(lora.merged_state_dict(model))
        assert torch.equal(exported(ids, mask)["last_hidden_state"], inside)
        assert torch.equal(model(ids, mask)["last_hidden_state"], plain)


@pytest.mark.parametrize("options", [{}, {"dora": True}, COLUMN], ids=str)
def test_a_hundred_merges_leave_no_trace(options: dict[str, Any]) -> None:
    model = adapted_bert(**options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    digest = lora.base_weights_sha256(model)
    for _ in range(100):
        with lora.merged(model):
            pass
    with lora.merged(model), lora.merged(model):
        assert lora.base_weights_sha256(model) == digest  # so a checkpoint made inside is right
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_merged_is_idempotent_and_ends_with_its_context() -> None:
    model = adapted_bert()
    layers = [layer for _, layer in lora.adapted_layers(model)]
    with lora.merged(model):
        first = layers[0].merged_weight
        layers[0].merge()
        assert torch.equal(layers[0].get_buffer("merged_weight"), first)  # type: ignore[arg-type]
        with lora.merged(model):
            pass
        assert all(layer.merged_weight is not None for layer in layers)
    assert all(layer.merged_weight is None for layer in layers)
    with pytest.raises(RuntimeError, match="stop"), lora.merged(model):
        raise RuntimeError("stop")
    assert all(layer.merged_weight is None for layer in layers)


# ----------------------------------------------------------------------------------------------------------------------
# Injecting, counting, freezing


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
    base = sum(p.numel() for p in model.parameters())
    lora.inject(model, LoRAConfig(**options))
    assert base == 109_482_240
    assert sum(tensor.numel() for tensor in lora.adapter_state_dict(model).values()) == expected
    assert sum(p.numel() for p in model.parameters()) == base + expected


@pytest.mark.parametrize("mode", lora.MODES)
def test_inject_wraps_the_modes_linears_only(mode: str) -> None:
    model = small_bert()
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    lora.inject(model, LoRAConfig(mode))
    wrapped = {name for name, _ in lora.adapted_layers(model)}
    attention = {name for name in names if name.endswith(("query", "key", "value"))}
    assert wrapped == (attention if mode.startswith("attn") else names - {"pooler_dense"})
    with pytest.raises(ValueError, match="no Linear named"):
        lora.inject(model, LoRAConfig(mode))


@pytest.mark.parametrize("options", [{}, {"dora": True}, COLUMN], ids=str)
def test_restore_undoes_inject(options: dict[str, Any]) -> None:
    model, plain = adapted_bert(**options), small_bert().eval()
    lora.restore(model)
    ids, mask = tokens()
    assert torch.equal(model(ids, mask)["pooler_output"], plain(ids, mask)["pooler_output"])
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters()) and str(model) == str(plain)
    assert list(map(type, model.modules())) == list(map(type, plain.modules()))


def test_the_hash_names_the_base_whatever_the_adapters() -> None:
    model = small_bert()
    digest = lora.base_weights_sha256(model)
    lora.inject(model, LoRAConfig("all-lin", dora=True))
    randomise_adapters(model)
    assert lora.base_weights_sha256(model) == digest
    with torch.no_grad():
        model.get_parameter("bert_layers.1.out_dense.bias")[3] += 1e-6
    assert lora.base_weights_sha256(model) != digest


def trained_names(mode: str, layers: int, adapters_always: bool) -> tuple[set[str], set[str]]:
    """Names of the parameters whose values three steps of SGD change, and of those that ask for a gradient."""
    model, config = small_bert(), LoRAConfig(mode, rank=2, dora=True)
    lora.inject(model, config)
    randomise_adapters(model)
    set_trainable(model, layers, config, adapters_always)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    ids, mask = tokens()
    for _ in range(3):
        out = model(ids, mask)
        if out["pooler_output"].requires_grad:
            (out["pooler_output"].square().sum() + out["last_hidden_state"].square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    return changed, {name for name, p in model.named_parameters() if p.requires_grad}


def is_adapter(name: str) -> bool:
    return name.endswith(("lora_A", "lora_B", "magnitude"))


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("mode", lora.MODES)
def test_trainable_is_schedule_and_policy(mode: str, layers: int) -> None:
    model = small_bert()
    lora.inject(model, LoRAConfig(mode, dora=True))
    wrapped = {f"{name}.{own}" for name, _ in lora.adapted_layers(model) for own in ("weight", "bias")}
    reached = {
        0: lambda name: False,
        1: lambda name: name.startswith(("bert_layers.1", "pooler")),
        3: lambda name: True,
    }[layers]
    kept: Callable[[str], bool] = is_adapter if mode.endswith("-only") else lambda name: name not in wrapped
    names = {name for name, _ in model.named_parameters()}

    changed, asking = trained_names(mode, layers, adapters_always=False)
    assert asking == {name for name in names if reached(name) and kept(name)}
    # A key's bias moves no softmax, so its gradient is rounding; it may or may not change.
    assert {name for name in asking ^ changed if "key.bias" not in name} == set()

    changed, asking = trained_names(mode, layers, adapters_always=True)
    assert asking == {name for name in names if is_adapter(name) or (reached(name) and kept(name))}
    assert changed == asking


@pytest.mark.parametrize("mode", lora.MODES)
def test_frozen_by_policy(mode: str) -> None:
    model, config = small_bert(), LoRAConfig(mode)
    plain = {name for name, _ in model.named_parameters()}
    lora.inject(model, config)
    frozen = frozen_by_adapters(model, config)
    if mode.endswith("-only"):
        assert frozen == plain
    else:
        assert len(frozen) == 2 * 2 * len(config.linears)
        assert "bert_layers.1.self_attention.key.weight" in frozen and "pooler_dense.weight" not in frozen


# ----------------------------------------------------------------------------------------------------------------------
# State and options


def test_adapters_go_from_one_model_to_another() -> None:
    source = adapted_bert(dora=True)
    state = {name: tensor.clone() for name, tensor in lora.adapter_state_dict(source).items()}
    assert all(is_adapter(name) for name in state)
    target = small_bert().eval()
    lora.inject(target, LoRAConfig("all-lin", rank=3, dora=True))
    lora.load_adapter_state_dict(target, state)
    ids, mask = tokens()
    assert torch.equal(target(ids, mask)["pooler_output"], source(ids, mask)["pooler_output"])


def test_adapters_that_do_not_fit_are_listed_and_nothing_changes() -> None:
    model = adapted_bert()
    before = {name: tensor.clone() for name, tensor in lora.adapter_state_dict(model).items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    first, second, *_ = state
    state["other.lora_A"] = state.pop(first)
    state[second] = state[second][:1]
    with pytest.raises(
        UserError,
        match=rf"^a\.pt: .*\(1 missing: {first}; 1 left over: other\.lora_A; "
        rf"1 of the wrong shape: {second} is \[1, 3\], not \[24, 3\]\); use the --lora_dict",
    ):
        lora.load_adapter_state_dict(model, state, "a.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.adapter_state_dict(model).items())


def test_the_reports_flag_is_read() -> None:
    config = LoRAConfig.from_lora_dict('{"mode": "attn-only", "r": 1, "dora": 1}')
    assert config == LoRAConfig("attn-only", rank=1, dora=True)
    config = LoRAConfig.from_lora_dict(
        '{"mode": "attn", "r": 8, "alpha": 16, "rslora": true, "dropout": 0.1, "targets": "query, value"}'
    )
    assert config == LoRAConfig("attn", 8, 16, True, 0.1, targets=("query", "value"))
    assert LoRAConfig.from_lora_dict('{"mode": "all-lin", "dora": 1, "dora_norm": "column"}') == LoRAConfig(
        "all-lin", dora=True, dora_norm="column"
    )
    assert LoRAConfig.from_lora_dict('{"mode": "none", "r": 5}') is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'mode': 'attn'}", r"is no JSON .* write it as '\{\"mode\""),
        ('["attn"]', "is no JSON object; write it as"),
        ('{"rnak": 1}', "unknown key 'rnak'; choose from mode, r, alpha"),
        ('{"mode": "attention"}', "mode is 'attention'; choose one of attn, attn-only, all-lin, all-lin-only, or none"),
        ('{"mode": ["attn"]}', r"mode is \['attn'\]; choose"),
        ('{"r": 0}', "r is 0; give a whole number of at least 1"),
        ('{"r": 1.5}', "r is 1.5; give"),
        ('{"r": true}', "r is True; give"),
        ('{"r": 99999999999999999999999}', "r is 99999999999999999999999; give .* at most 17592186044416"),
        ('{"alpha": -1}', "alpha is -1; give a number above 0"),
        ('{"r": 2, "alpha": 1e300}', r"alpha is 1e\+300; give .* at most 1e\+30"),
        ('{"r": 2, "alpha": 1' + "0" * 400 + "}", r"alpha is 10+; give .* at most 1e\+30"),
        ('{"alpha": Infinity}', "alpha is inf; give"),
        ('{"alpha": NaN}', "alpha is nan; give"),
        ('{"dropout": 1}', "dropout is 1; give a number from 0 to 0.99"),
        ('{"dropout": 0.995}', "dropout is 0.995; give a number from 0 to 0.99"),
        ('{"dropout": NaN}', "dropout is nan; give"),
        ('{"dora": "yes"}', "dora is 'yes'; give 0 or 1"),
        ('{"rslora": 2}', "rslora is 2; give 0 or 1"),
        ('{"dora": 1, "dora_norm": "both"}', "dora_norm is 'both'; choose one of row, column"),
        ('{"dora_norm": "column"}', "dora_norm is 'column'; it belongs to DoRA"),
        ('{"targets": ["query", "pooler"]}', "targets is 'pooler'; choose from query,key,value,attention_dense"),
        ('{"targets": []}', r"targets is \[\]; give a list of names"),
        ('{"targets": 3}', "targets is 3; give a list of names"),
    ],
)
def test_wrong_options_are_explained(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^--lora_dict.*{message}") as caught:
        LoRAConfig.from_lora_dict(text)
    assert "\n" not in str(caught.value)


def test_merged_backbones_are_saved_as_plain_ones(tmp_path: Path) -> None:
    model = adapted_bert(dora=True)
    save_pretrained(tmp_path, model.config, lora.merged_state_dict(model))
    loaded = BertModel(read_config(tmp_path)).eval()
    loaded.load_state_dict(load_weights(tmp_path, loaded.config))
    ids, mask = tokens()
    with torch.no_grad(), lora.merged(model):
        assert torch.equal(loaded(ids, mask)["pooler_output"], model(ids, mask)["pooler_output"])
