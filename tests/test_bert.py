"""BertModel against transformers' on the same weights, and what padding, packing and dropout may and may not change."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from base_bert import load_weights, read_config
from bert import BertLayer, BertModel, BertSelfAttention, attention
from config import BertConfig
from kernels.embedding import WordEmbedding
from text.packing import PackedBatch, join_padded_pairs, pack_padded, stack_padded_pairs, unpack

Models = tuple[BertModel, transformers.BertModel]

# hidden size, heads, layers, intermediate size
SHAPES = [(32, 2, 1, 64), (48, 4, 2, 96), (64, 4, 3, 160), (40, 2, 2, 48)]
VOCABULARY = 97
LENGTHS = [7, 1, 12, 3, 3, 19, 2, 12, 5, 9, 15, 4, 17, 23]  # more distinct ones than an attention call has groups
FP32, FP64 = 1e-5, 1e-10


def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter random values, so that no bias is zero and no LayerNorm the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(noise + 1 if re.search(r"[Nn]orm\.weight", name) else noise)


def make_pair(shape: tuple[int, int, int, int], folder: Path) -> Models:
    """Our model and transformers' with the same random weights, handed over as a model folder."""
    hidden, heads, layers, inner = shape
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=inner,
        max_position_embeddings=32,
    )
    random = transformers.BertModel(config)
    randomise(random, seed=sum(shape))
    random.save_pretrained(folder)
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
    ours = BertModel(read_config(folder))
    ours.load_state_dict(load_weights(folder, ours.config))
    return ours.eval(), theirs.eval()


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_pair(request.param, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def doubles(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """One pair of models in float64."""
    ours, theirs = make_pair(SHAPES[1], tmp_path_factory.mktemp("bert"))
    return ours.double(), theirs.double()


def make_inputs(lengths: list[int] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random ids, attention mask and token types [S, L]; the second text begins anywhere, or nowhere."""
    generator = torch.Generator().manual_seed(seed)
    column = torch.arange(max(lengths))
    mask = (column < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, VOCABULARY, mask.shape, generator=generator) * mask
    second = torch.tensor([int(torch.randint(0, n + 1, (), generator=generator)) for n in lengths])
    return ids, mask, (column >= second[:, None]).long() * mask


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference of two tensors of one shape."""
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def our_name(theirs: str) -> str:
    """The handout's name of a transformers parameter, written down independently of base_bert.py."""
    out = re.sub(r"^encoder\.layer\.", "bert_layers.", theirs)
    for old, new in (
        ("embeddings.word_embeddings", "word_embedding"),
        ("embeddings.position_embeddings", "pos_embedding"),
        ("embeddings.token_type_embeddings", "tk_type_embedding"),
        ("embeddings.LayerNorm", "embed_layer_norm"),
        ("attention.self", "self_attention"),
        ("attention.output.dense", "attention_dense"),
        ("attention.output.LayerNorm", "attention_layer_norm"),
        ("intermediate.dense", "interm_dense"),
        ("output.dense", "out_dense"),
        ("output.LayerNorm", "out_layer_norm"),
        ("pooler.dense", "pooler_dense"),
    ):
        out = out.replace(old, new)
    return out


def assert_gradients_equal(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    """Every parameter has the same gradient, to `tolerance` of the largest gradient of the model."""
    wanted = {our_name(name): parameter.grad for name, parameter in theirs.named_parameters()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == wanted.keys()
    scale = max(grad.abs().max().item() for grad in wanted.values() if grad is not None)
    for name, grad in wanted.items():
        own = found[name]
        assert (own is None) == (grad is None), name
        if own is not None and grad is not None:
            assert difference(own, grad) <= tolerance * scale, name


def weights_like(x: Tensor, seed: int = 5) -> Tensor:
    """Random weights that turn a tensor into a scalar loss."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x.dtype)


# ------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("with_types", [True, False])
def test_padded_inputs_match_transformers(models: Models, with_types: bool) -> None:
    ours, theirs = models
    ids, mask, types = make_inputs()
    given = (ids, mask, types) if with_types else (ids, mask)
    with torch.no_grad():
        found, wanted = ours(*given), theirs(*given)
    last, pooled = found["last_hidden_state"], found["pooler_output"]
    assert difference(last * mask[:, :, None], wanted.last_hidden_state * mask[:, :, None]) <= FP32
    assert difference(pooled, wanted.pooler_output) <= FP32
    assert not last[mask == 0].any()
    assert wanted.last_hidden_state.abs().max() > 1
    if with_types:  # token types matter, or the comparison would prove little
        assert difference(ours(ids, mask)["pooler_output"], pooled) > 1e-2


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_sentence_embeddings_match_transformers(models: Models, pooling: str) -> None:
    ours, theirs = models
    ids, mask, types = make_inputs(seed=1)
    with torch.no_grad():
        found = ours.sentence_embedding(pack_padded(ids, mask, types), pooling)
        wanted = theirs(ids, mask, types)
    weights = mask[:, :, None].float()
    mean = (wanted.last_hidden_state * weights).sum(1) / weights.sum(1)
    assert difference(found, wanted.pooler_output if pooling == "cls" else mean) <= FP32


def test_joined_pairs_match_transformers_with_segment_ids(models: Models) -> None:
    ours, theirs = models
    first, mask_1, _ = make_inputs([3, 9, 2, 5, 11], seed=2)
    second, mask_2, _ = make_inputs([8, 2, 13, 5, 3], seed=3)
    width = int((mask_1.sum(1) + mask_2.sum(1) - 1).max())
    ids, mask, types = (torch.zeros(5, width, dtype=torch.int64) for _ in range(3))
    for row in range(5):
        a, b = first[row][mask_1[row] == 1], second[row][mask_2[row] == 1][1:]
        ids[row, : len(a) + len(b)] = torch.cat([a, b])
        mask[row, : len(a) + len(b)] = 1
        types[row, len(a) : len(a) + len(b)] = 1
    with torch.no_grad():
        found = ours.sentence_embedding(join_padded_pairs(first, mask_1, second, mask_2), "cls")
        wanted = theirs(ids, mask, types)
    assert difference(found, wanted.pooler_output) <= FP32


def padded_loss(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A scalar of both outputs, at real tokens only."""
    out: Any = model(*inputs)
    last = out["last_hidden_state"] * inputs[1][:, :, None]
    return (last * weights_like(last)).sum() + (out["pooler_output"] * weights_like(out["pooler_output"], 6)).sum()


def test_gradients_match_transformers(models: Models) -> None:
    for model in models:
        model.zero_grad()
        padded_loss(model, make_inputs()).backward()
    assert_gradients_equal(*models, FP32)


def test_outputs_and_gradients_match_transformers_in_float64(doubles: Models) -> None:
    ours, theirs = doubles
    losses = []
    for model in doubles:
        model.zero_grad()
        losses.append(padded_loss(model, make_inputs()))
        losses[-1].backward()
    assert abs(losses[0] - losses[1]).item() <= FP64 * abs(losses[1]).item()
    assert_gradients_equal(*doubles, FP64)
    inputs = make_inputs(seed=9)
    with torch.no_grad():
        found, wanted = ours(*inputs), theirs(*inputs)
    assert difference(found["pooler_output"], wanted.pooler_output) <= 1e-12
    assert difference(found["last_hidden_state"], wanted.last_hidden_state * inputs[1][:, :, None]) <= 1e-11


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_gradients_of_sentence_embeddings_match_transformers(doubles: Models, pooling: str) -> None:
    ours, theirs = doubles
    ids, mask, types = make_inputs(seed=4)
    for model in doubles:
        model.zero_grad()
    found = ours.sentence_embedding(pack_padded(ids, mask, types), pooling)
    out = theirs(ids, mask, types)
    weights = mask[:, :, None].double()
    wanted = out.pooler_output if pooling == "cls" else (out.last_hidden_state * weights).sum(1) / weights.sum(1)
    (found * weights_like(found)).sum().backward()
    (wanted * weights_like(wanted)).sum().backward()
    assert_gradients_equal(ours, theirs, FP64)


def test_gradient_reaches_the_embedding_output(doubles: Models) -> None:
    """What SMART needs: the gradient of a loss with respect to the embedding output, at every token."""
    ours, theirs = doubles
    ids, mask, types = make_inputs(seed=6)
    batch = pack_padded(ids, mask, types)
    embedded = ours.embed(batch).detach().requires_grad_()
    pooled = ours.pool(ours.encode(embedded, batch, cls_only=True))[batch.restore]
    (grad,) = torch.autograd.grad((pooled * weights_like(pooled)).sum(), embedded)

    encoder: Any = theirs.encoder
    pooler: Any = theirs.pooler
    spread = unpack(embedded.detach(), batch).requires_grad_()  # [S, L, H]
    hidden: Any = encoder(spread, attention_mask=(1.0 - mask[:, None, None, :].double()) * -1e300)
    pooled = pooler(hidden.last_hidden_state)
    (wanted,) = torch.autograd.grad((pooled * weights_like(pooled)).sum(), spread)
    assert difference(unpack(grad, batch), wanted) <= FP64 * wanted.abs().max().item()


# -------------------------------------------------------------------------------------- padding and batch-mates


def test_neither_batch_mates_nor_padding_change_a_sentence(doubles: Models) -> None:
    ours, _ = doubles
    ids, mask, types = make_inputs()
    with torch.no_grad():
        together = ours(ids, mask, types)
        for row, length in enumerate(LENGTHS):
            own = (x[row : row + 1, :length] for x in (ids, mask, types))
            alone = ours(*own)
            assert difference(alone["pooler_output"][0], together["pooler_output"][row]) <= 1e-12
            assert difference(alone["last_hidden_state"][0], together["last_hidden_state"][row, :length]) <= 1e-12
        shuffled = torch.tensor([3, 0, 13, 8, 8, 5])
        wider = [torch.nn.functional.pad(x[shuffled], (0, 6)) for x in (ids, mask, types)]
        again = ours(*wider)
        assert again["last_hidden_state"].shape[1] == ids.shape[1] + 6
        assert difference(again["pooler_output"], together["pooler_output"][shuffled]) <= 1e-12
        for pooling in ("cls", "mean"):
            one = ours.sentence_embedding(pack_padded(ids, mask, types), pooling)
            other = ours.sentence_embedding(pack_padded(*wider), pooling)
            assert difference(other, one[shuffled]) <= 1e-12


def test_gradients_do_not_depend_on_batch_mates(doubles: Models) -> None:
    """Gradients of a batch are the sum of those of its sentences alone."""
    ours, _ = doubles
    ids, mask, types = make_inputs(seed=11)
    weights = weights_like(torch.empty(len(LENGTHS), ours.config.hidden_size, dtype=torch.float64))
    ours.zero_grad()
    (ours.sentence_embedding(pack_padded(ids, mask, types), "cls") * weights).sum().backward()
    together = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
    ours.zero_grad()
    for row, length in enumerate(LENGTHS):
        own = pack_padded(*(x[row : row + 1, :length] for x in (ids, mask, types)))
        (ours.sentence_embedding(own, "cls") * weights[row]).sum().backward()
    alone = [p.grad for p in ours.parameters() if p.grad is not None]
    scale = max(grad.abs().max().item() for grad in together)
    for one, other in zip(together, alone, strict=True):
        assert difference(one, other) <= 1e-12 * scale


def test_ids_at_padding_are_never_read(models: Models) -> None:
    ours, _ = models
    ids, mask, types = make_inputs()
    clean = ours(ids, mask, types)
    for garbage in (VOCABULARY - 1, 10**6, -1):
        poisoned = ours(ids.masked_fill(mask == 0, garbage), mask, types)
        for name, value in clean.items():
            assert torch.equal(value, poisoned[name])


def test_siamese_batch_is_both_texts_one_after_the_other(models: Models) -> None:
    ours, theirs = models
    first, mask_1, _ = make_inputs([3, 9, 2, 5, 11], seed=2)
    second, mask_2, _ = make_inputs([8, 2, 13, 5, 3], seed=3)
    with torch.no_grad():
        u, v = ours.sentence_embedding(stack_padded_pairs(first, mask_1, second, mask_2), "cls").chunk(2)
        assert difference(u, theirs(first, mask_1).pooler_output) <= FP32
        assert difference(v, theirs(second, mask_2).pooler_output) <= FP32


@pytest.mark.parametrize("lengths", [LENGTHS, [1], [8], [6, 6, 6], [1, 1], [1, 30]])
def test_cls_only_equals_the_first_tokens_of_all(doubles: Models, lengths: list[int]) -> None:
    ours, _ = doubles
    batch = pack_padded(*make_inputs(lengths))
    outputs, gradients = [], []
    for cls_only in (True, False):
        ours.zero_grad()
        hidden = ours.encode(ours.embed(batch), batch, cls_only)
        first = hidden if cls_only else hidden[batch.cu_seqlens[:-1]]
        (first * weights_like(first)).sum().backward()
        outputs.append(first.detach())
        gradients.append([p.grad for p in ours.parameters() if p.grad is not None])
    assert outputs[0].shape == (len(lengths), ours.config.hidden_size)
    assert difference(*outputs) <= 1e-12
    scale = max(grad.abs().max().item() for grad in gradients[1])
    for one, other in zip(*gradients, strict=True):
        assert difference(one, other) <= 1e-12 * scale


def naive_attention(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, heads: int) -> Tensor:
    """softmax(QK^T / sqrt(width)) V, one sequence and one head at a time: [T, H]."""
    width = query.shape[1] // heads
    starts = batch.cu_seqlens.tolist()
    rows = []
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        columns = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            q, k, v = (x[begin:end, part] for x in (query, key, value))
            columns.append(torch.softmax(q @ k.T / width**0.5, dim=1) @ v)
        rows.append(torch.cat(columns, dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("cls_only", [False, True])
def test_attention_and_its_gradients_match_the_formula(cls_only: bool) -> None:
    ids, mask, types = make_inputs()
    batch = pack_padded(ids, mask, types)
    torch.manual_seed(0)
    inputs = [torch.randn(batch.num_tokens, 12, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    query, key, value = inputs
    starts = batch.cu_seqlens[:-1].long()
    wanted = naive_attention(query, key, value, batch, 3)
    wanted = wanted[starts] if cls_only else wanted
    found = attention(query[starts] if cls_only else query, key, value, batch, 3, 0.0, cls_only)
    assert difference(found, wanted) <= 1e-13
    weights = weights_like(wanted)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        assert difference(one, other) <= 1e-12


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_bfloat16_autocast_stays_near_float32(pooling: str) -> None:
    model = dropout_model(0.1, 0.1)
    batch = pack_padded(*make_inputs())
    with torch.no_grad():
        clean = model.eval().sentence_embedding(batch, pooling)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = model.sentence_embedding(batch, pooling).float()
    assert 0 < difference(coarse, clean) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train().sentence_embedding(batch, pooling).float().square().sum()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) >= len(list(model.parameters())) - 2  # mean pooling does not reach the pooler
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


# -------------------------------------------------------------------------------------------------------- dropout


def test_second_derivatives_are_right_or_refused() -> None:
    """A backward written out by hand must not drop terms silently when it is differentiated itself."""
    batch = pack_padded(*make_inputs([3, 2, 5]))
    torch.manual_seed(0)
    inputs = [torch.randn(batch.num_tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def second(out: Tensor) -> tuple[Tensor, ...]:
        first = torch.cat(torch.autograd.grad((out.square() * weights_like(out)).sum(), inputs, create_graph=True))
        return torch.autograd.grad((first * weights_like(first)).sum(), inputs)

    query, key, value = inputs
    wanted = second(naive_attention(query, key, value, batch, 2))
    out = attention(query, key, value, batch, 2, 0.0, False)
    try:
        found = second(out)
    except RuntimeError as refusal:
        assert re.search("differentiate twice|not have been used in the graph", str(refusal))
        return
    for one, other in zip(found, wanted, strict=True):
        assert difference(one, other) <= 1e-11


def dropout_model(hidden_dropout: float, attention_dropout: float) -> BertModel:
    config = BertConfig(VOCABULARY, 32, 2, 4, 64, hidden_dropout, attention_dropout, 32)
    torch.manual_seed(0)
    model = BertModel(config)
    randomise(model, 1)
    return model


@pytest.mark.parametrize("hidden_dropout, attention_dropout", [(0.3, 0.0), (0.0, 0.3), (0.1, 0.1)])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_dropout_acts_in_training_only(hidden_dropout: float, attention_dropout: float, pooling: str) -> None:
    model = dropout_model(hidden_dropout, attention_dropout)
    plain = dropout_model(0.0, 0.0)
    batch = pack_padded(*make_inputs())
    with torch.no_grad():
        one, other = (model.train().sentence_embedding(batch, pooling) for _ in range(2))
        torch.manual_seed(3)
        seeded = model.sentence_embedding(batch, pooling)
        torch.manual_seed(3)
        again = model.sentence_embedding(batch, pooling)
        off = model.eval().sentence_embedding(batch, pooling)
        without = plain.train().sentence_embedding(batch, pooling)
    assert one.isfinite().all() and other.isfinite().all()
    assert (one - other).abs().max() > 1e-3
    assert torch.equal(seeded, again)
    assert torch.equal(off, without)
    assert (one - off).abs().max() > 1e-3


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_embedding_dropout_zeroes_a_share_and_scales_the_rest(p: float) -> None:
    model = dropout_model(p, 0.0)
    batch = pack_padded(*make_inputs())
    clean = model.eval().embed(batch)
    dropped = model.train().embed(batch)
    kept = dropped != 0
    assert difference(dropped, clean * kept / (1 - p)) <= 1e-6
    count = clean.numel()
    assert abs((~kept).sum().item() - count * p) < 5 * (count * p * (1 - p)) ** 0.5


def test_attention_dropout_acts_on_probabilities() -> None:
    """A single token attends to itself with probability 1, so each head is dropped as a whole or scaled as a whole."""
    p, heads = 0.25, 4
    layer = BertSelfAttention(dropout_model(0.0, p).config)
    randomise(layer, 2)
    lengths = [1] * 500
    batch = pack_padded(*make_inputs(lengths))
    hidden = torch.randn(len(lengths), 32)
    for cls_only in (False, True):
        with torch.no_grad():
            clean = layer.eval()(hidden, batch, cls_only).view(-1, heads, 8)
            dropped = layer.train()(hidden, batch, cls_only).view(-1, heads, 8)
        kept = (dropped != 0).all(dim=2)
        assert torch.equal(kept, (dropped != 0).any(dim=2))
        assert difference(dropped, clean * kept[:, :, None] / (1 - p)) <= 1e-6
        count = kept.numel()
        assert abs((~kept).sum().item() - count * p) < 5 * (count * p * (1 - p)) ** 0.5
        assert kept.sum(dim=1).unique().numel() > 1  # heads are dropped one by one


@pytest.mark.parametrize("silenced", ["attention_dense", "out_dense"])
def test_hidden_dropout_acts_on_both_branches_of_a_layer(silenced: str) -> None:
    """With one branch set to zero, randomness can only come from the dropout of the other."""
    model = dropout_model(0.3, 0.0)
    layer = model.bert_layers[0]
    assert isinstance(layer, BertLayer)
    with torch.no_grad():
        for parameter in layer.get_submodule(silenced).parameters():
            parameter.zero_()
        batch = pack_padded(*make_inputs())
        hidden = model.eval().embed(batch)
        layer.train()
        assert difference(layer(hidden, batch), layer(hidden, batch)) > 1e-2
        layer.eval()
        assert torch.equal(layer(hidden, batch), layer(hidden, batch))


@pytest.mark.parametrize("cls_only", [False, True])
def test_attention_dropout_keeps_the_expectation(cls_only: bool) -> None:
    p, draws = 0.3, 600
    layer = BertSelfAttention(dropout_model(0.0, p).config)
    randomise(layer, 2)
    batch = pack_padded(*make_inputs())
    torch.manual_seed(4)
    hidden = torch.randn(batch.num_tokens, 32)
    with torch.no_grad():
        clean = layer.eval()(hidden, batch, cls_only)
        layer.train()
        samples = torch.stack([layer(hidden, batch, cls_only) for _ in range(draws)])
    error = (samples.mean(0) - clean) / (samples.std(0) / draws**0.5)
    assert samples.std(0).min() > 0
    assert error.abs().max() < 6
    assert 0.9 < error.std() < 1.1


@pytest.mark.parametrize("cls_only", [False, True])
def test_under_autocast_attention_takes_mixed_types(cls_only: bool) -> None:
    """Adapters may put out fp32 beside the half precision of other layers."""
    batch = pack_padded(*make_inputs())
    torch.manual_seed(5)
    rows = batch.num_sequences if cls_only else batch.num_tokens
    query, key, value = leaves = [torch.randn(n, 32, requires_grad=True) for n in (rows, *[batch.num_tokens] * 2)]
    weights = torch.randn(rows, 32)
    expected = attention(query, key, value, batch, 4, 0.0, cls_only)
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), leaves)]
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(query, key.bfloat16(), value, batch, 4, 0.0, cls_only)
    assert found.dtype == torch.bfloat16
    for own, other in zip([found, *torch.autograd.grad((found * weights).sum(), leaves)], wanted, strict=True):
        assert difference(own.float(), other) < 0.05 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_gradients_under_dropout_match_finite_differences(pooling: str) -> None:
    """With the generator reset, dropout is a fixed function: backward must use the very masks of forward."""
    model = dropout_model(0.2, 0.2).double().train()
    batch = pack_padded(*make_inputs())

    def loss() -> Tensor:
        torch.manual_seed(7)
        out = model.sentence_embedding(batch, pooling)
        return (out * weights_like(out)).sum()

    loss().backward()
    # One direction for each parameter that the loss reaches, so that no error hides behind a larger one.
    for seed, parameter in enumerate(model.parameters()):
        if parameter.grad is None:
            continue
        direction = weights_like(parameter, seed)
        slope = (parameter.grad * direction).sum().item()
        step = 1e-6
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss().item()
            parameter.add_(direction, alpha=-2 * step)
            below = loss().item()
            parameter.add_(direction, alpha=step)
        assert abs((above - below) / (2 * step) - slope) <= 1e-6 * max(1.0, abs(slope))


def test_dropout_of_zero_draws_nothing_random() -> None:
    model = dropout_model(0.0, 0.0).train()
    before = torch.get_rng_state()
    model.sentence_embedding(pack_padded(*make_inputs()), "mean").sum().backward()
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ all-MiniLM-L6-v2

SENTENCES = [
    "A man is playing a guitar.",
    "The film is, at its best, a quietly moving portrait of two brothers growing old in the same house.",
    "Terrible!",
    "How do I learn Python quickly?",
    "What is the fastest way of learning the programming language Python?",
    "",
    "Prices rose by 3.7% in May, the statistics office said on Tuesday.",
    "An overlong, self-important mess whose two good jokes are both in the trailer - skip it.",
    "Why is the sky blue and not violet, although violet light is scattered more?",
    "naïve café façades, 東京, and other non-ASCII words",
    "Two dogs run through deep snow.",
    "no",
]


@pytest.fixture(scope="module")
def real(minilm: Path) -> tuple[BertModel, transformers.BertModel, Any]:
    """all-MiniLM-L6-v2 as our model and as transformers', and transformers' tokenizer."""
    ours = BertModel(read_config(minilm))
    ours.load_state_dict(load_weights(minilm, ours.config))
    theirs = transformers.BertModel.from_pretrained(minilm, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    return ours.eval(), theirs.eval(), tokenizer


def test_minilm_matches_transformers(real: tuple[BertModel, transformers.BertModel, Any]) -> None:
    ours, theirs, tokenizer = real
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    weights = mask[:, :, None].float()
    with torch.no_grad():
        found, wanted = ours(ids, mask), theirs(ids, mask)
        batch = pack_padded(ids, mask)
        cls, mean = (ours.sentence_embedding(batch, pooling) for pooling in ("cls", "mean"))
    assert difference(found["last_hidden_state"], wanted.last_hidden_state * weights) <= FP32
    assert difference(found["pooler_output"], wanted.pooler_output) <= FP32
    assert difference(cls, wanted.pooler_output) <= FP32
    assert difference(mean, (wanted.last_hidden_state * weights).sum(1) / weights.sum(1)) <= FP32


def test_minilm_matches_transformers_on_joined_pairs(real: tuple[BertModel, transformers.BertModel, Any]) -> None:
    ours, theirs, tokenizer = real
    seconds = SENTENCES[::-1]
    joined = tokenizer(SENTENCES, seconds, padding=True, return_tensors="pt")
    one, two = (tokenizer(texts, padding=True, return_tensors="pt") for texts in (SENTENCES, seconds))
    batch = join_padded_pairs(one["input_ids"], one["attention_mask"], two["input_ids"], two["attention_mask"])
    with torch.no_grad():
        wanted = theirs(**joined)
        found = ours(joined["input_ids"], joined["attention_mask"], joined["token_type_ids"])
        packed = ours.sentence_embedding(batch, "cls")
    real_tokens = joined["attention_mask"][:, :, None]
    assert joined["token_type_ids"].sum() > 100
    assert difference(found["last_hidden_state"], wanted.last_hidden_state * real_tokens) <= FP32
    assert difference(found["pooler_output"], wanted.pooler_output) <= FP32
    assert difference(packed, wanted.pooler_output) <= FP32


# ------------------------------------------------------------------------------------------------- initialisation


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


def test_layer_norm_eps_comes_from_the_configuration() -> None:
    config = BertConfig(VOCABULARY, 32, 1, 2, 64, layer_norm_eps=1e-3)
    norms = [m for m in BertModel(config).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 3
    assert {m.eps for m in norms} == {1e-3}
    other = BertModel(replace(config, layer_norm_eps=1e-12))
    assert {m.eps for m in other.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}


# ----------------------------------------------------------------------------------------------------------------------
# The word embedding's gradient


def word_tables() -> tuple[WordEmbedding, nn.Embedding]:
    """A WordEmbedding and torch's with the same weights."""
    torch.manual_seed(0)
    own, torchs = WordEmbedding(50, 6, padding_idx=3), nn.Embedding(50, 6, padding_idx=3)
    torchs.load_state_dict(own.state_dict())
    return own, torchs


def backward(table: nn.Embedding, seed: int, rows: int = 12) -> None:
    """Through a batch of words, some of them twice, among them padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.randint(0, 50, (rows,), generator=generator), torch.tensor([3, 7, 7])])
    weights = torch.randn(len(ids), 6, generator=generator).to(table.weight.dtype)
    (table(ids) * weights).sum().backward()


def grads(own: nn.Embedding, torchs: nn.Embedding) -> tuple[Tensor, Tensor]:
    assert own.weight.grad is not None and torchs.weight.grad is not None
    return own.weight.grad, torchs.weight.grad


def test_gradients_of_words_in_the_same_memory() -> None:
    """Batch after batch torch's gradient to the bit, in the same place."""
    own, torchs = word_tables()
    places = set()
    for seed in range(5):
        for table in (own, torchs):
            table.zero_grad(set_to_none=True)
            backward(table, seed)
        found, wanted = grads(own, torchs)
        assert torch.equal(found, wanted) and wanted.any()
        places.add(found.data_ptr())
        del found, wanted
    assert len(places) == 1


def test_a_gradient_of_words_that_is_kept_stays() -> None:
    """Whether by the caller, or to be added to."""
    own, torchs = word_tables()
    kept = []
    for seed in range(3):
        for table in (own, torchs):
            table.zero_grad(set_to_none=True)
            backward(table, seed)
        found, wanted = grads(own, torchs)
        kept.append((found, wanted))
    assert all(torch.equal(found, wanted) for found, wanted in kept)
    for table in (own, torchs):
        backward(table, 7)  # added to the last one
        backward(table, 8)
    assert torch.equal(*grads(own, torchs))
    for table in (own, torchs):
        table.zero_grad(set_to_none=True)
        backward(table, 9)
    assert torch.equal(*grads(own, torchs))


@pytest.mark.parametrize("change", [lambda grad: grad.add_(1.0), lambda grad: grad.mul_(torch.nan)])
def test_a_gradient_of_words_may_be_changed(change: Callable[[Tensor], object]) -> None:
    """As clipping does: rows that the batch had not reached are cleared, too."""
    own, torchs = word_tables()
    backward(own, 1)
    assert own.weight.grad is not None
    place = own.weight.grad.data_ptr()
    change(own.weight.grad)
    own.zero_grad(set_to_none=True)
    for table in (own, torchs):
        backward(table, 2)
    assert torch.equal(*grads(own, torchs)) and own.weight.grad.data_ptr() == place


def test_words_of_the_batch_before_may_be_overwritten() -> None:
    own, torchs = word_tables()
    ids = torch.tensor([4, 8, 8])
    for words in ([4, 8, 8], [5, 9, 9]):
        ids.copy_(torch.tensor(words))
        for table in (own, torchs):
            table.zero_grad(set_to_none=True)
            table(ids).square().sum().backward()
    assert torch.equal(*grads(own, torchs))


def test_words_used_twice_in_one_pass_and_in_another_precision() -> None:
    own, torchs = word_tables()
    for dtype in (torch.float32, torch.float64):
        for table in (own, torchs):
            table.to(dtype).zero_grad(set_to_none=True)
            first, second = table(torch.tensor([[1, 3], [1, 49]])), table(torch.tensor([49, 2]))
            (first.square().sum() * second.sin().sum()).backward()
        found, wanted = grads(own, torchs)
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
        del found, wanted
    own.weight.requires_grad_(False)
    assert not own(torch.tensor([1])).requires_grad
