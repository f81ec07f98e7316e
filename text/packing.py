"""Packed batches: all sequences of a batch end to end, without padding.

Everything in a BERT but attention works token by token and needs no padding. `pack` stores the sequences by length.
For attention, `Grouping` maps them, once for each batch, to a few rectangles with little padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

GROUPS = 8  # rectangles in a batch: more have less padding, but each costs a few kernel calls in each layer
ALIGNMENT = 16  # bytes; no tensor has wider numbers
PIECE = 128  # tokens: a block of FlashAttention has as many queries, and every sequence gets the blocks of the longest


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on `device` without waiting for it: a GPU fetches it from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def joined_bytes(tensors: Sequence[Tensor], pinned: bool) -> Tensor:
    """Return the bytes of CPU tensors end to end; each starts at a multiple of ALIGNMENT."""
    joined = torch.empty(byte_starts(tensors)[-1], dtype=torch.uint8, pin_memory=pinned)
    for part, tensor in zip(split_bytes(joined, tensors), tensors, strict=True):
        part.copy_(tensor)
    return joined


def split_bytes(joined: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the output of `joined_bytes` with the types and shapes of `tensors`."""
    return [
        joined[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, byte_starts(tensors), strict=False)
    ]


def byte_starts(tensors: Sequence[Tensor]) -> list[int]:
    """Return the offset in bytes at which `joined_bytes` puts each tensor, and the total length."""
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    return [0, *accumulate(sizes)]


def all_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return copies on `device` without waiting for them; a GPU fetches all of them in one transfer."""
    if device.type != "cuda" or any(tensor.device.type != "cpu" for tensor in tensors):
        return [tensor.to(device) for tensor in tensors]
    return split_bytes(joined_bytes(tensors, pinned=True).to(device, non_blocking=True), tensors)


@dataclass(frozen=True)
class Group:
    """Neighbouring sequences of similar length, padded to the longest of them."""

    first: int  # first row of the padded buffer
    sequences: int  # n
    length: int  # L
    rows: slice  # the packed rows of its t tokens
    key_mask: Tensor | None  # [n, 1, 1, L], added to scores: -inf at padding; None if nothing is padded


@dataclass(frozen=True)
class Grouping:
    """How packed rows [T] map to the padded rows [P] of all groups, and back."""

    groups: tuple[Group, ...]
    padded_rows: Tensor  # [P] packed row that fills each padded row (padding repeats a row of its sequence)
    packed_rows: Tensor  # [T] padded row of each packed row
    by_heads: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # the results of `split`

    def to(self, device: torch.device) -> "Grouping":
        """Return the same grouping on another device."""
        masks = [group.key_mask for group in self.groups if group.key_mask is not None]
        padded_rows, packed_rows, *masks = all_to_device([self.padded_rows, self.packed_rows, *masks], device)
        moved = iter(masks)
        groups = [group if group.key_mask is None else replace(group, key_mask=next(moved)) for group in self.groups]
        return Grouping(tuple(groups), padded_rows, packed_rows)

    def split(self, heads: int) -> list[tuple[Tensor, Tensor]]:
        """Return the same mapping for each group after each row is cut into one row for each head: [T * heads] rows.

        The rectangle of a group is then [n, heads, L]. The first tensor [n * heads * L] holds the packed rows that fill
        it. The second tensor [t * heads] holds the places in it of the packed rows of the group.
        """
        if heads not in self.by_heads:
            pairs = []
            head = torch.arange(heads, device=self.padded_rows.device)
            for group in self.groups:
                n, length = group.sequences, group.length
                padded = self.padded_rows[group.first : group.first + n * length]
                packed = self.packed_rows[group.rows] - group.first
                rows = padded.view(n, 1, length) * heads + head[:, None]  # [n, heads, L]
                places = (packed // length * heads)[:, None] + head  # [t, heads], of [n, heads]
                pairs.append((rows.flatten(), (places * length + (packed % length)[:, None]).flatten()))
            self.by_heads[heads] = pairs
        return self.by_heads[heads]


@dataclass(frozen=True)
class PackedBatch:
    """S sequences with T tokens in all, stored by rising length.

    `order` holds the index of each stored sequence in the caller's batch; `restore` is its inverse.

    More sequences may follow, the tail, which only fill up the batch (see `pad_to_bucket`). T and the offsets count
    them, but `order`, `restore` and everything in the caller's order do not.
    """

    input_ids: Tensor  # [T] int64
    token_type_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S+1] int32, first row of each sequence, then T; more with a tail
    max_seqlen: int  # upper bound of the lengths
    order: Tensor  # [S] int64
    restore: Tensor  # [S] int64
    sizes: np.ndarray  # [S] int64, the lengths, on the host wherever the tensors are
    tail: tuple[int, ...] = ()  # the rising lengths of the tail's sequences

    @property
    def num_sequences(self) -> int:
        """S, and the sequences of the tail."""
        return len(self.cu_seqlens) - 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @cached_property
    def lengths(self) -> Tensor:
        """Lengths of the sequences [S] int64, in stored order."""
        return self.cu_seqlens.diff().long()

    @cached_property
    def sequence_ids(self) -> Tensor:
        """Number of the stored sequence of each row [T] int64."""
        return torch.repeat_interleave(self.lengths, output_size=self.num_tokens)

    @cached_property
    def grouping(self) -> Grouping:
        """The sequences as rectangles."""
        grouping = group(self.sizes)
        if self.tail:
            grouping = joined_groupings(grouping, group(np.array(self.tail), groups=1))
        return grouping.to(self.cu_seqlens.device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the batch by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}

    def with_tensors(self, tensors: dict[str, Any]) -> "PackedBatch":
        """Return the same batch with other tensors; everything derived from `tensors()` is computed again."""
        return replace(self, **tensors)

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the same batch on another device."""
        if self.input_ids.device == device:
            return self
        tensors = self.tensors()
        return self.with_tensors(dict(zip(tensors, all_to_device(list(tensors.values()), device), strict=True)))


@dataclass(frozen=True)
class EncodedBatch:
    """A batch that went through a part of a backbone: `hidden` [T, H] is the output of the lowest `layers` layers.

    With 0 layers, that is the output of the embeddings. Without `packed`, `hidden` [S, H] holds the sentence embeddings
    in the caller's order.
    """

    hidden: Tensor
    layers: int
    packed: PackedBatch | None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the batch by name."""
        return {"hidden": self.hidden, **(self.packed.tensors() if self.packed is not None else {})}

    def to(self, device: torch.device) -> "EncodedBatch":
        """Return the same batch on another device."""
        packed = None if self.packed is None else self.packed.to(device)
        return EncodedBatch(to_device(self.hidden, device), self.layers, packed)


Batch = PackedBatch | EncodedBatch


def ragged_rows(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the rows start, start+1, ... of each sequence, end to end: [sum(lengths)] int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def best_cuts(lengths: np.ndarray, groups: int) -> list[int]:
    """Return the boundaries that cut sorted `lengths` [S] into at most `groups` runs with the least padding.

    Boundaries lie where the length changes. Dynamic programming over these places finds the optimum.
    """
    places = np.flatnonzero(np.diff(lengths, prepend=-1))  # first sequence of each distinct length
    ends = np.append(places[1:], len(lengths))
    tallest = lengths[places]
    # area[i, j]: padded rows of one rectangle over the distinct lengths i..j
    area = (ends[None, :] - places[:, None]) * tallest[None, :].astype(np.float64)
    area[np.tril_indices(len(places), -1)] = np.inf
    best, choices = area[0], []
    for _ in range(min(groups, len(places)) - 1):
        total = np.concatenate([[0.0], best[:-1]])[:, None] + area  # [i, j]: the last rectangle begins at i
        total[0] = best
        choices.append(total.argmin(axis=0))
        best = total.min(axis=0)
    cuts, j = [len(lengths)], len(places) - 1
    for choice in reversed(choices):
        i = int(choice[j])
        if i == 0:
            continue
        cuts.append(int(places[i]))
        j = i - 1
    return [0, *reversed(cuts)]


def group(lengths: np.ndarray, groups: int = GROUPS) -> Grouping:
    """Return the grouping, in at most `groups` rectangles, of packed sequences with rising `lengths` [S]."""
    if not len(lengths):
        empty = torch.empty(0, dtype=torch.int64)
        return Grouping((), empty, empty)
    cuts = best_cuts(lengths, groups)
    starts = np.cumsum(lengths) - lengths
    padded_rows, packed_rows, rectangles = [], [], []
    first = 0
    for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
        column, length = lengths[begin:end, None], int(lengths[end - 1])
        position = np.arange(length)
        real = position < column  # [n, L]
        padded_rows.append((starts[begin:end, None] + np.minimum(position, column - 1)).ravel())
        packed_rows.append(first + np.flatnonzero(real))
        mask = None if real.all() else torch.from_numpy(np.where(real, 0, -np.inf).astype(np.float32))[:, None, None]
        rows = slice(int(starts[begin]), int(starts[begin] + column.sum()))
        rectangles.append(Group(first, end - begin, length, rows, mask))
        first += real.size
    padded, packed = (torch.from_numpy(np.concatenate(rows)) for rows in (padded_rows, packed_rows))
    return Grouping(tuple(rectangles), padded, packed)


def joined_groupings(first: Grouping, second: Grouping) -> Grouping:
    """Return the grouping of two packed batches end to end."""
    tokens, padded = len(first.packed_rows), len(first.padded_rows)
    moved = [
        replace(group, first=group.first + padded, rows=slice(group.rows.start + tokens, group.rows.stop + tokens))
        for group in second.groups
    ]
    return Grouping(
        (*first.groups, *moved),
        torch.cat([first.padded_rows, second.padded_rows + tokens]),
        torch.cat([first.packed_rows, second.packed_rows + padded]),
    )


def pack(input_ids: np.ndarray, lengths: np.ndarray, second_start: np.ndarray) -> PackedBatch:
    """Return a PackedBatch of sequences that are given end to end.

    `input_ids` [T] holds the tokens, `lengths` [S] the lengths of the sequences (each at least 1), and `second_start`
    [S] the position where token type 1 begins (the length itself for a single text). S may be 0, as in the empty shard
    of a process.
    """
    order = np.argsort(lengths, kind="stable")
    starts = (np.cumsum(lengths) - lengths)[order]
    sorted_lengths = lengths[order].astype(np.int64)
    rows = ragged_rows(starts, sorted_lengths)
    positions = ragged_rows(np.zeros_like(sorted_lengths), sorted_lengths)
    types = positions >= np.repeat(second_start[order], sorted_lengths)
    restore = np.empty_like(order)
    restore[order] = np.arange(len(order))
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids[rows].astype(np.int64)),
        token_type_ids=torch.from_numpy(types.astype(np.int64)),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(np.append(0, np.cumsum(sorted_lengths)).astype(np.int32)),
        max_seqlen=int(sorted_lengths.max(initial=0)),
        order=torch.from_numpy(order),
        restore=torch.from_numpy(restore),
        sizes=sorted_lengths,
    )


def take(batch: PackedBatch, stored: np.ndarray) -> tuple[PackedBatch, Tensor]:
    """Return some sequences of a batch as a new batch, and their rows [T'] in the old one.

    `stored` [n] holds rising numbers of stored sequences. The new batch has them in this order.
    """
    whole = batch.to(torch.device("cpu"))
    lengths = whole.sizes[stored]
    rows = torch.from_numpy(ragged_rows(whole.cu_seqlens.numpy()[stored].astype(np.int64), lengths))
    part = PackedBatch(
        input_ids=whole.input_ids[rows],
        token_type_ids=whole.token_type_ids[rows],
        position_ids=whole.position_ids[rows],
        cu_seqlens=torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)),
        max_seqlen=int(lengths[-1]),
        order=torch.arange(len(stored)),
        restore=torch.arange(len(stored)),
        sizes=lengths,
    )
    device = batch.input_ids.device
    return part.to(device), rows.to(device)


def pack_padded(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> PackedBatch:
    """Return a PackedBatch of padded tensors [S, L].

    Raises ValueError if a row has no token, has padding before a token, or has token types that fall.
    """
    mask = attention_mask.bool().cpu().numpy()
    lengths = mask.sum(axis=1)
    if not (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all() or not lengths.all():
        raise ValueError("attention_mask: each row must be ones followed by zeros, with at least one one")
    second_start = lengths.copy()
    if token_type_ids is not None:
        types = token_type_ids.cpu().numpy().astype(bool) & mask
        second_start = np.where(types.any(axis=1), types.argmax(axis=1), lengths)
        if not (types == ((np.arange(mask.shape[1]) >= second_start[:, None]) & mask)).all():
            raise ValueError("token_type_ids: each row must be zeros followed by ones")
    ids = input_ids.cpu().numpy()[mask]
    return pack(ids, lengths, second_start).to(input_ids.device)


def unpack(rows: Tensor, batch: PackedBatch, length: int | None = None) -> Tensor:
    """Return packed rows [T, ...] as a padded tensor [S, L, ...] in the caller's order, with zeros at padding."""
    out = rows.new_zeros((batch.num_sequences, length or batch.max_seqlen, *rows.shape[1:]))
    out[batch.order[batch.sequence_ids], batch.position_ids] = rows
    return out


def stack_padded_pairs(ids_1: Tensor, mask_1: Tensor, ids_2: Tensor, mask_2: Tensor) -> PackedBatch:
    """Return 2B sequences for a siamese pass: all first texts [B, L1], then all second texts [B, L2]."""
    length = max(ids_1.shape[1], ids_2.shape[1])

    def widen(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, length - x.shape[1]))

    return pack_padded(torch.cat([widen(ids_1), widen(ids_2)]), torch.cat([widen(mask_1), widen(mask_2)]))


def join_padded_pairs(ids_1: Tensor, mask_1: Tensor, ids_2: Tensor, mask_2: Tensor) -> PackedBatch:
    """Return B sequences [CLS] a [SEP] b [SEP] with token types 0 and 1; the [CLS] of the second texts is dropped."""
    ids, lengths, second_start = [], [], []
    rows = zip(ids_1.cpu(), mask_1.cpu().bool(), ids_2.cpu(), mask_2.cpu().bool(), strict=True)
    for first, keep_1, second, keep_2 in rows:
        a, b = first[keep_1].numpy(), second[keep_2].numpy()[1:]
        ids += [a, b]
        lengths.append(len(a) + len(b))
        second_start.append(len(a))
    return pack(np.concatenate(ids), np.array(lengths), np.array(second_start)).to(ids_1.device)


def bucket(tokens: int, longest: int) -> tuple[int, int, int]:
    """Return the size that a batch is filled up to: tokens, sequences of the tail, and a bound of the lengths.

    Few sizes occur. The tokens are a multiple of an eighth of the power of two below them, and of 64, so a tail adds
    1/16 on average. It has at least one token and at most PIECE for each of its sequences.
    """
    step = max(64, 1 << max(tokens.bit_length() - 4, 0))
    pieces = step // PIECE + 1
    return -(-(tokens + pieces) // step) * step, pieces, -(-longest // PIECE) * PIECE


def pad_to_bucket(batch: PackedBatch) -> PackedBatch:
    """Return a batch on the host that is filled up to its `bucket` by a tail of short sequences.

    Nothing reads the output of these sequences, so losses and gradients stay the same.
    """
    tokens, pieces, longest = bucket(batch.num_tokens, batch.max_seqlen)
    fill = tokens - batch.num_tokens
    lengths = np.full(pieces, fill // pieces)
    lengths[pieces - fill % pieces :] += 1

    def grown(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, fill))  # token, type and position 0, which every backbone has

    ends = torch.from_numpy(batch.num_tokens + lengths.cumsum()).to(batch.cu_seqlens.dtype)
    return replace(
        batch,
        input_ids=grown(batch.input_ids),
        token_type_ids=grown(batch.token_type_ids),
        position_ids=grown(batch.position_ids),
        cu_seqlens=torch.cat([batch.cu_seqlens, ends]),
        max_seqlen=longest,
        tail=tuple(lengths.tolist()),
    )
