"""MultitaskBERT: every architecture's shapes, sizes, gradients and statistics."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, make_batch, make_model, make_texts, max_difference, model_options
from torch import Tensor, nn

from config import ARCHS, BertConfig, ModelOptions
from models.heads import BatchNorm, CosineHead
from models.multitask_bert import MultitaskBERT
from tasks import DEFAULT_TASKS, SST, STS
from text.packing import join_padded_pairs, pack_padded, stack_padded_pairs

H, BATCH = TINY.hidden_size, 6
all_archs = pytest.mark.parametrize("arch", list(ARCHS))


def modules_of(module: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, kind)]


def linear_widths(module: nn.Module | None) -> list[tuple[int, int]]:
    """Return (in, out) of every linear layer, in order."""
    assert module is not None
    return [(m.in_features, m.out_features) for m in modules_of(module, nn.Linear)]


def count(parameters: Iterator[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


@all_archs
@pytest.mark.parametrize("size", [BATCH, 1])
def test_outputs_have_the_right_shape_and_gradients_are_finite(arch: str, size: int) -> None:
    torch.manual_seed(4)  # of the dropout masks: with others all units of a small head may be 0
    model = make_model(arch=arch, hidden_dropout_prob=0.3).train()
    for task, shape in (("sst", (size, 5)), ("para", (size,)), ("sts", (size,))):
        model.zero_grad()
        batch = make_batch(model, task, size)
        out = model(task, batch)
        assert not torch.equal(out, model(task, batch))
        assert out.shape == shape and out.dtype == torch.float32 and out.isfinite().all()
        out.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads and all(grad.isfinite().all() for grad in grads) and any(grad.any() for grad in grads)


@pytest.mark.parametrize("given", [*({"arch": arch} for arch in ARCHS), {"arch": "v1", "pair_layer": "batchnorm"}])
def test_task_parameters_are_those_that_a_batch_reaches(given: dict[str, Any]) -> None:
    model = make_model(**given).train()
    for task in DEFAULT_TASKS:
        model.zero_grad()
        model(task, make_batch(model, task)).sum().backward()
        pooler = {id(p) for p in model.backbone(task).pooler_dense.parameters()}  # mean pooling does not reach it
        listed = [id(p) for p in model.task_parameters(task)]
        assert len(listed) == len(set(listed))
        assert set(listed) - pooler == {id(p) for p in model.parameters() if p.grad is not None} - pooler
    parts = [id(p) for _, parameters in model.parts() for p in parameters]
    assert sorted(parts) == sorted(id(p) for p in model.parameters())


@all_archs
def test_padded_predictions_equal_packed_ones(arch: str) -> None:
    model = make_model(arch=arch).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
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
            one = predict(*(x[3:4] for x in (*first, *second)))
            assert max_difference(one, model(task, batch)[3:4]) <= 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@all_archs
@pytest.mark.parametrize(
    "override",
    [
        {"backbones": "per-task"},
        {"pair_encoding": "cross"},
        {"pair_encoding": "siamese", "pair_features": ("abs", "mul")},
        {"pooling": "mean"},
        {"pair_layer": "batchnorm"},
        {"pair_layer": "linear"},
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
    once = ModelOptions(arch=arch).resolved()
    assert once.resolved() == once


def test_overrides_change_what_they_name() -> None:
    def pair_width(**given: Any) -> int:
        return linear_widths(make_model(**given).pair_layer)[0][0]

    assert pair_width() == 4 * H + 1
    assert pair_width(pair_features=("u", "v")) == 2 * H
    assert pair_width(pair_encoding="cross") == H
    assert not make_model(pair_encoding="cross").is_siamese("para")
    assert make_model(pair_layer="none").pair_layer is None
    for layer, linears, norms in (("linear", 1, 0), ("plain", 2, 0), ("batchnorm", 2, 2)):
        pair_layer = make_model(pair_layer=layer).pair_layer
        assert pair_layer is not None and len(modules_of(pair_layer, BatchNorm)) == norms
        assert len(linear_widths(pair_layer)) == linears
    features = torch.randn(3, 4 * H + 1)
    linear = make_model(pair_layer="linear").pair_layer
    assert linear is not None
    torch.testing.assert_close(linear(features, "sts"), features @ linear.dense.weight.T + linear.dense.bias)
    assert isinstance(make_model(sts_head="cosine").heads["sts"], CosineHead)
    assert linear_widths(make_model(sts_head="cosine", sts_projection=True).heads["sts"]) == [(H, H)]


def on_meta(arch: str) -> MultitaskBERT:
    """Return a model of BERT-base's size without memory for it."""
    with torch.device("meta"):
        return MultitaskBERT(model_options(arch=arch), BertConfig(), DEFAULT_TASKS)


def test_published_numbers_of_parameters() -> None:
    model = on_meta("r1-baseline")
    assert count(model.backbone("sst").parameters()) == 109_482_240
    assert count(model.heads.parameters()) == 5_383
    assert count(model.parameters()) == 109_482_240 + 5_383
    model = on_meta("yin-yang")
    assert model.pair_layer is not None and count(model.pair_layer.parameters()) == 7_088_640
    assert count(model.heads.parameters()) == 5_895_247
    assert count(model.parameters()) == 2 * 109_482_240 + 7_088_640 + 5_895_247


def test_feature_widths() -> None:
    width = 768
    assert linear_widths(on_meta("yin-yang").pair_layer) == [(4 * width + 1, 2 * width), (2 * width, 2 * width)]
    assert linear_widths(on_meta("duality").pair_layer) == [(2 * width + 1, 2 * width), (2 * width, 2 * width)]
    r4 = on_meta("r4")
    assert linear_widths(r4.heads["para"]) == [(3 * width, width), (width, 1)]
    assert linear_widths(r4.heads["sst"]) == [(width, width), (width, 5)]
    assert linear_widths(on_meta("v2").heads["para"]) == [(width, width), (width, 1)]
    assert linear_widths(on_meta("v1").heads["para"]) == [(2 * width, 1)]
    assert linear_widths(on_meta("baseline").heads["sts"]) == [(4 * (width - 2), 1)]
    assert linear_widths(on_meta("cosine").heads["para"]) == [(2 * width, width), (width, 1)]


def test_only_what_the_tasks_need_is_built() -> None:
    sst_only = MultitaskBERT(model_options(arch="yin-yang"), TINY, {"sst": SST})
    assert list(sst_only.backbones) == ["sentiment"] and list(sst_only.heads) == ["sst"]
    assert sst_only.pair_layer is None
    pair_only = MultitaskBERT(model_options(arch="yin-yang"), TINY, {"sts": STS})
    assert list(pair_only.backbones) == ["similarity"] and list(pair_only.heads) == ["sts"]
    assert pair_only.pair_layer is not None


def test_a_further_task_is_one_more_row() -> None:
    cfimdb = replace(SST, name="cfimdb", label_range=(0, 1))
    model = MultitaskBERT(model_options(arch="r4"), TINY, {**DEFAULT_TASKS, "cfimdb": cfimdb})
    assert model("cfimdb", pack_padded(*make_texts(0))).shape == (BATCH, 2)
    assert list(model.backbones) == ["sst", "para", "sts", "cfimdb"]


@pytest.mark.parametrize(
    "backbones, names",
    [
        ("shared", ["shared"]),
        ("sentiment-similarity", ["sentiment", "similarity"]),
        ("per-task", ["sst", "para", "sts"]),
    ],
)
def test_a_batch_trains_the_backbone_of_its_task_alone(backbones: str, names: list[str]) -> None:
    model = make_model(backbones=backbones).train()
    assert list(model.backbones) == names
    for task in DEFAULT_TASKS:
        model.zero_grad()
        model(task, make_batch(model, task)).square().sum().backward()
        for name, backbone in model.backbones.items():
            assert all((p.grad is not None) == (name == model.backbone_of[task]) for p in backbone.parameters())


def test_pair_outputs_match_numpy_from_features_to_logit() -> None:
    """The duality path by hand: features of the two embeddings, shared layer, convolution, linear layers."""
    model = make_model(arch="duality").double().eval()
    first, second = make_texts(1), make_texts(2, longest=14)
    backbone = model.backbone("para")
    with torch.no_grad():
        u, v = (backbone(*text)["pooler_output"].numpy() for text in (first, second))
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
    """u is the first text and v the second, whose tokens' mean r4 takes: [u; v; v - u]."""
    model = make_model(arch="r4").double().eval()
    first, second = make_texts(1), make_texts(2, longest=14)
    with torch.no_grad():
        u, v = (
            (model.backbone("para")(ids, mask)["last_hidden_state"].sum(1) / mask.sum(1, keepdim=True))
            for ids, mask in (first, second)
        )
        wanted = model.heads["para"](torch.cat([u, v, v - u], dim=1)).squeeze(1)
        assert max_difference(model.predict_paraphrase(*first, *second).double(), wanted) <= 1e-5
        assert max_difference(model.predict_paraphrase(*second, *first).double(), wanted) > 1e-3


@pytest.mark.parametrize("arch", ["v1", "cosine", "r4"])
def test_a_cosine_head_serves_similarity_alone_of_any_range_and_number_of_texts(arch: str) -> None:
    """As a fourth task may be: a cosine of 1 is its highest label, and one text has no cosine."""
    heads = make_model(arch=arch).heads
    assert {task for task, head in heads.items() if isinstance(head, CosineHead)} == {"sts"}
    far = replace(DEFAULT_TASKS["sts"], name="far", label_range=(0.0, 100.0))
    u = torch.randn(3, H)
    head = make_model(arch=arch, tasks={"far": far}).eval().heads["far"]
    assert max_difference(head(u, u), torch.full((3, 1), 100.0)) <= 1e-4
    grade = replace(DEFAULT_TASKS["sts"], name="grade", text_columns=("text",))
    model = make_model(arch=arch, tasks={"grade": grade})
    assert model("grade", make_batch(model, "grade")).shape == (BATCH,)


def statistics(model: MultitaskBERT, task: str) -> list[Tensor]:
    """Return copies of the running statistics of one task in the shared pair layer."""
    assert model.pair_layer is not None
    return [value.clone() for name, value in model.pair_layer.named_buffers() if name.endswith(f"_{task}")]


@pytest.mark.parametrize("shared", [False, True])
def test_pair_layer_keeps_statistics_for_each_task_unless_shared(shared: bool) -> None:
    model = make_model(arch="yin-yang", shared_batchnorm_stats=shared)

    def train_on(task: str) -> None:
        for seed in range(3):
            model.train()(task, make_batch(model, task, seed=seed))

    train_on("para")
    of_para, of_sts = ("all", "all") if shared else ("para", "sts")
    para, sts = statistics(model, of_para), statistics(model, of_sts)
    batch = make_batch(model, "para", seed=50)
    predictions = model.eval()("para", batch)
    assert len(para) == len(sts) == 4
    train_on("sts")
    assert all(torch.equal(a, b) != shared for a, b in zip(para, statistics(model, of_para), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(sts, statistics(model, of_sts), strict=True))
    assert torch.equal(predictions, model.eval()("para", batch)) != shared
