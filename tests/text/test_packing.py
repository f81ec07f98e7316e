"""Packed batches against simple reference code: the round trip, the grouping, the masks, the pairs."""

import itertools
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_batch, packed, ragged_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from base_bert import read_config
from bert import BertModel
from text.packing import (
    GROUPS,
    PIECE,
    EncodedBatch,
    PackedBatch,
    bucket,
    group,
    join_padded_pairs,
    joined_bytes,
    pack,
    pack_padded,
    pad_to_bucket,
    ragged_rows,
    split_bytes,
    stack_padded_pairs,
    take,
    unpack,
)

lengths_lists = st.lists(st.integers(1, 30), min_size=1, max_size=40)
QUICK = settings(max_examples=60, deadline=None)


def padded(rows: list[np.ndarray], width: int, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [S, width], written row by row."""
    ids, mask = np.full((len(rows), width), fill), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


@QUICK
@given(lengths_lists, st.integers(0, 2**32 - 1))
def test_pack_lays_the_sequences_down_by_rising_length(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = ragged_ids(lengths, rng)
    seconds = [int(rng.integers(0, n + 1)) for n in lengths]
    batch = packed(rows, seconds)

    stored = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # sorted() is stable, as the order must be
    assert batch.order.tolist() == stored
    assert batch.restore[batch.order].tolist() == batch.order[batch.restore].tolist() == list(range(len(rows)))
    assert batch.input_ids.tolist() == [int(t) for i in stored for t in rows[i]]
    assert batch.position_ids.tolist() == [t for i in stored for t in range(len(rows[i]))]
    assert batch.token_type_ids.tolist() == [int(t >= seconds[i]) for i in stored for t in range(len(rows[i]))]
    assert batch.cu_seqlens.tolist() == [0, *itertools.accumulate(len(rows[i]) for i in stored)]
    assert batch.lengths.tolist() == [len(rows[i]) for i in stored]
    assert batch.sequence_ids.tolist() == [s for s, i in enumerate(stored) for _ in rows[i]]
    assert (batch.num_sequences, batch.num_tokens, batch.max_seqlen) == (len(rows), sum(lengths), max(lengths))
    assert batch.cu_seqlens.dtype == torch.int32
    for tensor in (batch.input_ids, batch.token_type_ids, batch.position_ids, batch.order, batch.restore):
        assert tensor.dtype == torch.int64


@QUICK
@given(lengths_lists, st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_pack_padded_and_unpack_are_inverse(lengths: list[int], extra: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = ragged_ids(lengths, rng)
    width = max(lengths) + extra
    seconds = [int(rng.integers(0, n + 1)) for n in lengths]
    ids, mask = padded(rows, width, fill=-7)  # whatever stands at padding is never read
    types = (torch.arange(width) >= torch.tensor(seconds)[:, None]).long()

    batch = pack_padded(ids, mask, types)
    assert_same_batch(batch, packed(rows, seconds))
    assert_same_batch(pack_padded(ids, mask.bool()), packed(rows))
    assert torch.equal(unpack(batch.input_ids, batch, width), ids * mask)
    assert torch.equal(unpack(batch.token_type_ids, batch, width), types * mask)
    assert unpack(batch.input_ids, batch).shape == (len(rows), max(lengths))
    features = torch.randn(batch.num_tokens, 2, 3)
    spread = unpack(features, batch)  # [S, L, 2, 3]
    assert spread.shape == (len(rows), max(lengths), 2, 3)
    kept = spread[mask[:, : max(lengths)].bool()]  # in the caller's order, end to end
    assert torch.equal(kept, features[torch.argsort(batch.order[batch.sequence_ids], stable=True)])
    assert spread[~mask[:, : max(lengths)].bool()].abs().sum() == 0


def test_ragged_rows_count_up_from_each_start() -> None:
    rows = ragged_rows(np.array([5, 0, 9]), np.array([2, 3, 1]))
    assert rows.tolist() == [5, 6, 0, 1, 2, 9]
    assert ragged_rows(np.array([], int), np.array([], int)).tolist() == []


def assert_grouping_is_exact(lengths: np.ndarray, groups: int) -> None:
    """Each packed row has one padded row, the masks mark just those, and padding repeats its own sequence."""
    grouping = group(lengths, groups)
    owners = np.repeat(np.arange(len(lengths)), lengths)  # [T] sequence of each packed row
    sequence, next_row, real_rows = 0, 0, []
    assert 1 <= len(grouping.groups) <= groups
    for made in grouping.groups:
        assert made.first == next_row
        own = lengths[sequence : sequence + made.sequences]
        assert made.length == own.max()
        real = np.arange(made.length) < own[:, None]
        if made.key_mask is None:
            assert real.all()
        else:
            assert made.key_mask.shape == (made.sequences, 1, 1, made.length)
            assert (made.key_mask[:, 0, 0].numpy() == np.where(real, 0.0, -np.inf)).all()
            assert not real.all()
        block = grouping.padded_rows[next_row : next_row + real.size].numpy().reshape(real.shape)
        assert (owners[block] == sequence + np.arange(made.sequences)[:, None]).all()
        real_rows += block[real].tolist()
        assert made.rows == slice(len(real_rows) - real.sum(), len(real_rows))
        sequence, next_row = sequence + made.sequences, next_row + real.size
    assert sequence == len(lengths)
    assert real_rows == list(range(lengths.sum()))
    assert len(grouping.padded_rows) == next_row
    assert len(grouping.packed_rows) == lengths.sum()
    assert grouping.padded_rows[grouping.packed_rows].tolist() == list(range(lengths.sum()))


@QUICK
@given(lengths_lists, st.integers(1, GROUPS))
def test_grouping_covers_every_row_once(lengths: list[int], groups: int) -> None:
    assert_grouping_is_exact(np.array(sorted(lengths)), groups)


@QUICK
@given(lengths_lists, st.integers(1, 5))
def test_rows_of_one_head_fill_each_group_head_by_head(lengths: list[int], heads: int) -> None:
    grouping = group(np.array(sorted(lengths)))
    rows = torch.arange(sum(lengths) * heads).view(-1, heads)  # [T, heads], each a number of its own
    own_rows = [rows[made.rows] for made in grouping.groups]
    for made, (taken, places), own in zip(grouping.groups, grouping.split(heads), own_rows, strict=True):
        padded = grouping.padded_rows[made.first : made.first + made.sequences * made.length]
        rectangle = rows[padded].view(made.sequences, made.length, heads).transpose(1, 2)
        assert torch.equal(rows.flatten()[taken], rectangle.flatten())
        assert torch.equal(rectangle.flatten()[places], own.flatten())
    assert grouping.split(heads) is grouping.split(heads)


def least_padded_rows(lengths: list[int], groups: int) -> int:
    """Minimum over all ways to cut sorted lengths into at most `groups` runs, by trying them all."""
    best = len(lengths) * lengths[-1]
    for count in range(1, min(groups, len(lengths))):
        for inner in itertools.combinations(range(1, len(lengths)), count):
            cuts = [0, *inner, len(lengths)]
            best = min(best, sum((e - b) * lengths[e - 1] for b, e in itertools.pairwise(cuts)))
    return best


@QUICK
@given(st.lists(st.integers(1, 12), min_size=1, max_size=10), st.integers(1, GROUPS))
def test_grouping_pads_as_little_as_any_cut(lengths: list[int], groups: int) -> None:
    lengths = sorted(lengths)
    assert len(group(np.array(lengths), groups).padded_rows) == least_padded_rows(lengths, groups)


def test_grouping_of_many_sequences() -> None:
    lengths = np.sort(np.random.default_rng(0).integers(1, 120, 300))
    assert_grouping_is_exact(lengths, GROUPS)
    eighths = sum(part.max() * len(part) for part in np.array_split(lengths, GROUPS))
    assert lengths.sum() < len(group(lengths).padded_rows) < eighths


@pytest.mark.parametrize("lengths", [[1], [17], [6] * 20, [1] * 9, [3, 3, 5, 5, 5, 9]])
def test_no_masks_where_nothing_is_padded(lengths: list[int]) -> None:
    grouping = group(np.array(lengths))
    assert [made.key_mask for made in grouping.groups] == [None] * len(set(lengths))
    assert grouping.padded_rows.tolist() == grouping.packed_rows.tolist() == list(range(sum(lengths)))


@pytest.mark.parametrize(
    "mask",
    [[[1, 0, 1], [1, 1, 1]], [[0, 1, 1], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]],
    ids=["hole in the middle", "padding in front", "empty row"],
)
def test_invalid_attention_masks_raise(mask: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="attention_mask"):
        pack_padded(torch.ones(2, 3, dtype=torch.int64), torch.tensor(mask))


@pytest.mark.parametrize("types", [[[0, 1, 0]], [[1, 0, 1]], [[1, 1, 0]]])
def test_token_types_that_fall_raise(types: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="token_type_ids"):
        pack_padded(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3), torch.tensor(types))


def test_token_types_at_padding_are_ignored() -> None:
    ids, mask = padded([np.array([5, 6, 7])], 5)
    garbage = pack_padded(ids, mask, torch.tensor([[0, 0, 1, 0, 1]]))
    assert_same_batch(garbage, packed([np.array([5, 6, 7])], [2]))


def random_pairs() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return pairs of [CLS] .. [SEP] sequences (ids 101, 102), of which the shortest have nothing between."""
    rng = np.random.default_rng(0)

    def texts(longest: int) -> list[np.ndarray]:
        return [np.array([101, *rng.integers(1000, 2000, n), 102]) for n in (*rng.integers(0, longest, 8), 0)]

    return texts(9), texts(14)


def test_stack_padded_pairs_puts_all_first_texts_before_all_second_ones() -> None:
    first, second = random_pairs()
    one, two = padded(first, 12), padded(second, 17)
    assert_same_batch(stack_padded_pairs(*one, *two), packed(first + second))
    assert_same_batch(stack_padded_pairs(*two, *one), packed(second + first))


def test_join_padded_pairs_drops_the_second_cls_and_sets_token_types() -> None:
    first, second = random_pairs()
    joined = [np.concatenate([a, b[1:]]) for a, b in zip(first, second, strict=True)]
    batch = join_padded_pairs(*padded(first, 12), *padded(second, 17))
    assert_same_batch(batch, packed(joined, [len(a) for a in first]))
    types = unpack(batch.token_type_ids, batch)
    for row, a, b in zip(types.tolist(), first, second, strict=True):
        assert row[: len(a) + len(b) - 1] == [0] * len(a) + [1] * (len(b) - 1)


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = packed(ragged_ids([5, 1, 3, 3, 9, 2, 2, 7, 8, 4, 6, 10, 11], np.random.default_rng(1)))
    assert batch.to(torch.device("cpu")) is batch
    meta = batch.to(torch.device("meta"))
    assert any(g.key_mask is not None for g in batch.grouping.groups)
    moved = [getattr(meta, f.name) for f in fields(PackedBatch)] + [g.key_mask for g in meta.grouping.groups]
    moved += [meta.grouping.padded_rows, meta.grouping.packed_rows]
    tensors = [x for x in moved if isinstance(x, Tensor)]
    assert len(tensors) == 6 + 2 + sum(g.key_mask is not None for g in batch.grouping.groups)
    assert all(x.device.type == "meta" for x in tensors)
    assert_same_batch(batch.to(torch.device("cpu", 0)), batch)  # another device by name, the same memory


def test_a_batch_on_its_way_through_a_backbone_moves_whole() -> None:
    """With the layers that it has behind it, and with the tokens where some still need them."""
    for rest in (packed(ragged_ids([5, 1, 3], np.random.default_rng(1))), None):
        batch = EncodedBatch(torch.randn(9, 4), 2, rest)
        moved = batch.to(torch.device("meta"))
        assert moved.layers == 2 and (moved.packed is None) == (rest is None)
        assert list(moved.tensors()) == list(batch.tensors()) == ["hidden", *(rest.tensors() if rest else ())]
        for name, tensor in moved.tensors().items():
            wanted = batch.tensors()[name]
            assert (tensor.device.type, tensor.shape, tensor.dtype) == ("meta", wanted.shape, wanted.dtype)


def test_an_empty_batch_passes_through_a_bert(tiny_bert: Path) -> None:
    """The shard of a process that has nothing of a batch: no rows out, and a gradient of zeros for every parameter."""
    none = np.arange(0)
    batch = pack(none, none, none)
    assert (batch.num_sequences, batch.num_tokens, batch.max_seqlen, batch.grouping.groups) == (0, 0, 0, ())
    for pooling in ("cls", "mean"):
        model = BertModel(read_config(tiny_bert)).train()
        out = model.sentence_embedding(batch, pooling)
        assert out.shape == (0, 32)
        out.sum().backward()
        grads = {name: own.grad for name, own in model.named_parameters() if own.grad is not None}
        assert set(grads) >= {name for name, _ in model.named_parameters() if "pooler" not in name}
        assert all(not own.any() for own in grads.values())


@QUICK
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([torch.int64, torch.int32, torch.bool, torch.bfloat16]))))
def test_bytes_of_many_tensors_travel_together(shapes: list[tuple[int, torch.dtype]]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(0, 2, (size, 1, 2), generator=generator).to(dtype) for size, dtype in shapes]
    tensors += [torch.arange(3).expand(4, 3).t(), torch.arange(1).expand(0)]  # strides of every kind
    joined = joined_bytes(tensors, pinned=False)
    assert joined.dtype == torch.uint8
    for found, wanted in zip(split_bytes(joined, tensors), tensors, strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(found, wanted)
        assert found.data_ptr() % found.itemsize == 0


@QUICK
@given(lengths_lists, st.integers(0, 2**32 - 1))
def test_a_tail_is_short_sequences_more(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = packed(ragged_ids(lengths, rng), [int(rng.integers(0, n + 1)) for n in lengths])
    tailed = pad_to_bucket(batch)
    tokens, pieces, longest = bucket(batch.num_tokens, batch.max_seqlen)
    tail = list(tailed.tail)
    assert (tailed.num_tokens, len(tail), tailed.max_seqlen) == (tokens, pieces, longest)
    assert tail == sorted(tail) and tail[0] >= 1 and tail[-1] <= PIECE and sum(tail) == tokens - sum(lengths)
    assert tailed.num_sequences == len(lengths) + pieces and batch.num_sequences == len(lengths)
    for name in ("input_ids", "token_type_ids", "position_ids"):
        rows = getattr(tailed, name)
        assert torch.equal(rows[: batch.num_tokens], getattr(batch, name)) and not rows[batch.num_tokens :].any()
    assert tailed.cu_seqlens.dtype == torch.int32 and tailed.cu_seqlens[-1] == tokens
    assert torch.equal(tailed.restore, batch.restore) and torch.equal(tailed.order, batch.order)
    assert tailed.lengths.tolist() == [*batch.lengths.tolist(), *tail]
    plain, made = batch.grouping, tailed.grouping
    last = made.groups[-1]
    assert len(made.groups) == len(plain.groups) + 1 and (last.sequences, last.length) == (pieces, tail[-1])
    assert (last.first, last.rows) == (len(plain.padded_rows), slice(batch.num_tokens, tokens))
    assert made.padded_rows[made.packed_rows].tolist() == list(range(tokens))
    assert made.padded_rows[: len(plain.padded_rows)].tolist() == plain.padded_rows.tolist()


@given(st.integers(1, 1 << 17), st.integers(1, 512))
def test_the_tail_of_any_batch_has_short_sequences_and_none_is_empty(tokens: int, longest: int) -> None:
    whole, pieces, bound = bucket(tokens, longest)
    assert pieces <= whole - tokens <= pieces * PIECE and longest <= bound < longest + PIECE


def test_a_part_knows_its_longest_sequence() -> None:
    whole = pack(np.arange(1, 12), np.array([3, 1, 5, 2]), np.array([3, 1, 5, 2]))
    part, _ = take(whole, np.array([0, 2]))
    assert part.max_seqlen == part.lengths.max() == 3
