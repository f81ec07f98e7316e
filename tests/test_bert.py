"""BertModel against transformers' on the same weights, and what padding, packing and dropout may and may not change."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import TINY, hf_model, max_difference, our_names, randomise, weighted_sum
from torch import Tensor, nn

from base_bert import load_weights, read_config
from bert import BertLayer, BertModel, attention
from config import BertConfig
from text.packing import PackedBatch, join_padded_pairs, pack_padded, unpack

Models = tuple[BertModel, Any, float]

# hidden size, heads, layers, intermediate size
SHAPES = [(32, 2, 1, 64), (48, 4, 2, 96), (64, 4, 3, 160), (40, 2, 2, 48)]
LENGTHS = [7, 1, 12, 3, 3, 19, 2, 12, 5, 9, 15, 4, 17, 23]  # more distinct ones than an attention call has groups
FP32, FP64 = 1e-5, 1e-10


def make_pair(shape: tuple[int, int, int, int], folder: Path) -> tuple[BertModel, Any]:
    """Return our model and transformers' with the same random weights, by way of a folder that transformers wrote."""
    hidden, heads, layers, inner = shape
    config = BertConfig(60, hidden, layers, heads, inner, max_position_embeddings=32)
    randomise(hf_model(config=config), sum(shape), 0.15).save_pretrained(folder)
    ours = BertModel(read_config(folder))
    ours.load_state_dict(load_weights(folder, ours.config))
    return ours.eval(), transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=[*SHAPES, "float64"], ids=str)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Both models and the tolerance of their precision."""
    if request.param == "float64":
        ours, theirs = make_pair(SHAPES[1], tmp_path_factory.mktemp("bert"))
        return ours.double(), theirs.double(), FP64
    return *make_pair(request.param, tmp_path_factory.mktemp("bert")), FP32


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertModel, Any]:
    ours, theirs = make_pair(SHAPES[1], tmp_path_factory.mktemp("bert"))
    return ours.double(), theirs.double()


def make_inputs(lengths: list[int] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return random ids, attention mask and token types [S, L]; the second text begins anywhere, or nowhere."""
    generator = torch.Generator().manual_seed(seed)
    column = torch.arange(max(lengths))
    mask = (column < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 60, mask.shape, generator=generator) * mask
    second = torch.tensor([int(torch.randint(0, n + 1, (), generator=generator)) for n in lengths])
    return ids, mask, (column >= second[:, None]).long() * mask


def test_gelu_python_is_the_same_gelu(tmp_path: Path) -> None:
    """transformers' spelled-out GELU, by its own implementation."""
    make_pair(SHAPES[0], tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "hidden_act": "gelu_python"}))
    theirs = transformers.BertModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert "python" in theirs.config.hidden_act
    ours = BertModel(read_config(tmp_path))
    ours.load_state_dict(load_weights(tmp_path, ours.config))
    ids, mask, types = make_inputs()
    found, wanted = ours.eval()(ids, mask, types), theirs(ids, mask, types)
    assert max_difference(found["last_hidden_state"], wanted.last_hidden_state * mask[:, :, None]) <= FP32
    assert max_difference(found["pooler_output"], wanted.pooler_output) <= FP32


def assert_gradients_equal(ours: nn.Module, theirs: Any, tolerance: float) -> None:
    """Every parameter has the same gradient, to `tolerance` of the largest gradient of the model."""
    wanted = {name: parameter.grad for name, parameter in our_names(theirs).items()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == wanted.keys()
    scale = max(grad.abs().max().item() for grad in wanted.values() if grad is not None)
    for name, grad in wanted.items():
        other = found[name]
        assert (other is None) == (grad is None), name
        assert grad is None or other is None or max_difference(other, grad) <= tolerance * scale, name


@pytest.mark.parametrize("with_types", [True, False])
def test_padded_inputs_and_all_gradients_match_transformers(models: Models, with_types: bool) -> None:
    ours, theirs, tolerance = models
    ids, mask, types = make_inputs()
    results = []
    for model in (ours, theirs):
        model.zero_grad()
        out: Any = model(ids, mask, types) if with_types else model(ids, mask)
        last = out["last_hidden_state"] * mask[:, :, None]
        (weighted_sum(last) + weighted_sum(out["pooler_output"], 6)).backward()
        results.append((last, out["pooler_output"]))
    (last, pooled), (wanted_last, wanted_pooled) = results
    assert max_difference(last, wanted_last) <= tolerance and max_difference(pooled, wanted_pooled) <= tolerance
    assert_gradients_equal(ours, theirs, tolerance)
    assert wanted_last.abs().max() > 1 and not ours(ids, mask)["last_hidden_state"][mask == 0].any()
    if with_types:  # token types matter, or the comparison would prove little
        assert max_difference(ours(ids, mask)["pooler_output"], pooled) > 1e-2


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_sentence_embeddings_and_all_gradients_match_transformers(models: Models, pooling: str) -> None:
    ours, theirs, tolerance = models
    ids, mask, types = make_inputs(seed=1)
    ours.zero_grad()
    theirs.zero_grad()
    found = ours.sentence_embedding(pack_padded(ids, mask, types), pooling)
    out = theirs(ids, mask, types)
    mean = (out.last_hidden_state * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    wanted = out.pooler_output if pooling == "cls" else mean
    assert max_difference(found, wanted) <= tolerance
    weighted_sum(found).backward()
    weighted_sum(wanted).backward()
    assert_gradients_equal(ours, theirs, tolerance)


def test_gradient_reaches_the_embedding_output(double: tuple[BertModel, Any]) -> None:
    """What SMART needs: the gradient of a loss with respect to the embedding output, at every token."""
    ours, theirs = double
    ids, mask, types = make_inputs(seed=6)
    batch = pack_padded(ids, mask, types)
    embedded = ours.embed(batch).detach().requires_grad_()
    pooled = ours.pool(ours.encode(embedded, batch, cls_only=True))[batch.restore]
    (grad,) = torch.autograd.grad(weighted_sum(pooled), embedded)

    spread = unpack(embedded.detach(), batch).requires_grad_()  # [S, L, H]
    hidden = theirs.encoder(spread, attention_mask=(1.0 - mask[:, None, None, :].double()) * -1e300)
    (wanted,) = torch.autograd.grad(weighted_sum(theirs.pooler(hidden.last_hidden_state)), spread)
    assert max_difference(unpack(grad, batch), wanted) <= FP64 * wanted.abs().max().item()


SENTENCES = [
    "A man is playing a guitar.",
    "The film is, at its best, a quietly moving portrait of two brothers growing old in the same house.",
    "How do I learn Python quickly?",
    "",
    "Prices rose by 3.7% in May, the statistics office said on Tuesday.",
    "An overlong, self-important mess whose two good jokes are both in the trailer - skip it.",
    "naïve café façades, 東京, and other non-ASCII words",
    "no",
]


def test_minilm_matches_transformers_on_texts_and_pairs(minilm: Path) -> None:
    ours = BertModel(read_config(minilm)).eval()
    ours.load_state_dict(load_weights(minilm, ours.config))
    theirs = transformers.BertModel.from_pretrained(minilm, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    one, two = (tokenizer(texts, padding=True, return_tensors="pt") for texts in (SENTENCES, SENTENCES[::-1]))
    joined = tokenizer(SENTENCES, SENTENCES[::-1], padding=True, return_tensors="pt")
    batch = join_padded_pairs(one["input_ids"], one["attention_mask"], two["input_ids"], two["attention_mask"])
    assert joined["token_type_ids"].sum() > 60
    with torch.no_grad():
        for tokens, packed in ((one, pack_padded(one["input_ids"], one["attention_mask"])), (joined, batch)):
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            found, wanted = ours(ids, mask, tokens["token_type_ids"]), theirs(**tokens)
            cls, mean = (ours.sentence_embedding(packed, pooling) for pooling in ("cls", "mean"))
            last = wanted.last_hidden_state * mask[:, :, None]
            assert max_difference(found["last_hidden_state"], last) <= FP32
            assert max_difference(found["pooler_output"], wanted.pooler_output) <= FP32
            assert max_difference(cls, wanted.pooler_output) <= FP32
            assert max_difference(mean, last.sum(1) / mask.sum(1, keepdim=True)) <= FP32


def test_neither_batch_mates_nor_padding_change_a_sentence(double: tuple[BertModel, Any]) -> None:
    ours, _ = double
    ids, mask, types = make_inputs()
    with torch.no_grad():
        together = ours(ids, mask, types)
        for row, length in enumerate(LENGTHS):
            alone = ours(*(x[row : row + 1, :length] for x in (ids, mask, types)))
            assert max_difference(alone["pooler_output"][0], together["pooler_output"][row]) <= 1e-12
            assert max_difference(alone["last_hidden_state"][0], together["last_hidden_state"][row, :length]) <= 1e-12
        shuffled = torch.tensor([3, 0, 13, 8, 8, 5])
        wider = [nn.functional.pad(x[shuffled], (0, 6)) for x in (ids, mask, types)]
        again = ours(*wider)
        assert again["last_hidden_state"].shape[1] == ids.shape[1] + 6
        assert max_difference(again["pooler_output"], together["pooler_output"][shuffled]) <= 1e-12
        for pooling in ("cls", "mean"):
            one = ours.sentence_embedding(pack_padded(ids, mask, types), pooling)
            other = ours.sentence_embedding(pack_padded(*wider), pooling)
            assert max_difference(other, one[shuffled]) <= 1e-12
        for garbage in (59, 10**6, -1):  # ids at padding are never read
            poisoned = ours(ids.masked_fill(mask == 0, garbage), mask, types)
            assert all(torch.equal(value, poisoned[name]) for name, value in together.items())


@pytest.mark.parametrize("lengths", [LENGTHS, [1], [8], [6, 6, 6], [1, 1], [1, 30]])
def test_cls_only_equals_the_first_tokens_of_all(double: tuple[BertModel, Any], lengths: list[int]) -> None:
    ours, _ = double
    batch = pack_padded(*make_inputs(lengths))
    results = []
    for cls_only in (True, False):
        ours.zero_grad()
        hidden = ours.encode(ours.embed(batch), batch, cls_only)
        first = hidden if cls_only else hidden[batch.cu_seqlens[:-1]]
        weighted_sum(first).backward()
        results.append([first, *(p.grad for p in ours.parameters() if p.grad is not None)])
    assert results[0][0].shape == (len(lengths), ours.config.hidden_size)
    scale = max(x.abs().max().item() for x in results[1])
    for one, other in zip(*results, strict=True):
        assert max_difference(one, other) <= 1e-12 * scale


def dropout_model(hidden_dropout: float, attention_dropout: float) -> BertModel:
    model = BertModel(BertConfig(60, 32, 2, 4, 64, hidden_dropout, attention_dropout, 32))
    randomise(model, 1, 0.15)
    return model


def batch_of(lengths: list[int] = LENGTHS) -> PackedBatch:
    return pack_padded(*make_inputs(lengths))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_bfloat16_autocast_stays_near_float32(pooling: str) -> None:
    model, batch = dropout_model(0.1, 0.1), batch_of()
    with torch.no_grad():
        clean = model.eval().sentence_embedding(batch, pooling)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = model.sentence_embedding(batch, pooling).float()
    assert 0 < max_difference(coarse, clean) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train().sentence_embedding(batch, pooling).float().square().sum()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) >= len(list(model.parameters())) - 2  # mean pooling does not reach the pooler
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("cls_only", [False, True])
def test_under_autocast_attention_takes_mixed_types(cls_only: bool) -> None:
    """Adapters may return fp32 beside the half precision of other layers."""
    batch = batch_of()
    torch.manual_seed(5)
    rows = batch.num_sequences if cls_only else batch.num_tokens
    query, key, value = leaves = [torch.randn(n, 32, requires_grad=True) for n in (rows, *[batch.num_tokens] * 2)]
    wanted = attention(query, key, value, batch, 4, 0.0, cls_only)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(query, key.bfloat16(), value, batch, 4, 0.0, cls_only)
    assert found.dtype == torch.bfloat16
    results = [[x.float(), *torch.autograd.grad(weighted_sum(x), leaves)] for x in (found, wanted)]
    for ours, exact in zip(*results, strict=True):
        assert max_difference(ours, exact) < 0.05 * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("hidden_dropout, attention_dropout", [(0.3, 0.0), (0.0, 0.3), (0.1, 0.1)])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_dropout_acts_in_training_only(hidden_dropout: float, attention_dropout: float, pooling: str) -> None:
    model, plain = dropout_model(hidden_dropout, attention_dropout), dropout_model(0.0, 0.0)
    batch = batch_of()
    with torch.no_grad():
        one, other = (model.train().sentence_embedding(batch, pooling) for _ in range(2))
        torch.manual_seed(3)
        seeded = model.sentence_embedding(batch, pooling)
        torch.manual_seed(3)
        assert torch.equal(seeded, model.sentence_embedding(batch, pooling))
        off = model.eval().sentence_embedding(batch, pooling)
        before = torch.get_rng_state()
        assert torch.equal(off, plain.train().sentence_embedding(batch, pooling))
        assert torch.equal(before, torch.get_rng_state())  # dropout of zero draws nothing
    assert one.isfinite().all() and max_difference(one, other) > 1e-3 and max_difference(one, off) > 1e-3


@pytest.mark.parametrize("silenced", ["attention_dense", "out_dense"])
def test_hidden_dropout_acts_on_both_branches_of_a_layer(silenced: str) -> None:
    """With one branch set to zero, randomness can only come from the dropout of the other."""
    model, batch = dropout_model(0.3, 0.0), batch_of()
    layer = model.bert_layers[0]
    assert isinstance(layer, BertLayer)
    with torch.no_grad():
        for parameter in layer.get_submodule(silenced).parameters():
            parameter.zero_()
        hidden = model.eval().embed(batch)
        assert torch.equal(layer(hidden, batch), layer(hidden, batch))
        layer.train()
        assert max_difference(layer(hidden, batch), layer(hidden, batch)) > 1e-2


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_gradients_under_dropout_match_finite_differences(pooling: str) -> None:
    """With the generator reset, dropout is a fixed function: backward must use the very masks of forward."""
    model, batch = dropout_model(0.2, 0.2).double().train(), batch_of()

    def loss() -> Tensor:
        torch.manual_seed(7)
        return weighted_sum(model.sentence_embedding(batch, pooling))

    loss().backward()
    # One direction for each parameter that the loss reaches, so that no error hides behind a larger one.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope, step = (parameter.grad * direction).sum().item(), 1e-6
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss().item()
            parameter.add_(direction, alpha=-2 * step)
            below = loss().item()
            parameter.add_(direction, alpha=step)
        assert abs((above - below) / (2 * step) - slope) <= 1e-6 * max(1.0, abs(slope))


def test_fresh_model_is_initialised_as_bert() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(2000, 64, 2, 4, 256, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if "layer_norm" in name:
            assert (values == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert not values.any(), name
        else:
            spread = 5 * 0.05 / np.sqrt(2 * values.numel())  # five standard errors of a standard deviation
            assert abs(values.std().item() - 0.05) < spread, name
            assert abs(values.mean().item()) < 5 * 0.05 / np.sqrt(values.numel()), name
    norms = [m for m in BertModel(replace(TINY, layer_norm_eps=1e-3)).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 5 and {m.eps for m in norms} == {1e-3}
