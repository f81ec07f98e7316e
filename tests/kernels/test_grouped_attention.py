"""Attention in padded groups against the formula, one sequence at a time."""

import pytest
import torch
from helpers import max_difference, weighted_sum
from torch import Tensor

from kernels.grouped_attention import grouped_attention, plain_attention
from text.packing import PackedBatch, pack_padded

LENGTHS = [7, 1, 12, 3, 3, 19, 2, 12, 5, 9, 15, 4, 17, 23]  # more distinct ones than there are groups
HEADS = 3


def batch_of(lengths: list[int]) -> PackedBatch:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pack_padded(mask.long(), mask)


def inputs_of(batch: PackedBatch) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch.num_tokens, 12, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def formula(query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch) -> Tensor:
    """Return `plain_attention` of each sequence, as rows [T, H]."""
    sequences = zip(
        *(x.unflatten(1, (HEADS, -1)).split(batch.lengths.tolist()) for x in (query, key, value)), strict=True
    )
    return torch.cat([plain_attention(*sequence).flatten(1) for sequence in sequences])


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [1, 1, 1], [6, 6]])
def test_outputs_and_gradients_match_the_formula(lengths: list[int], cls_only: bool) -> None:
    batch = batch_of(lengths)
    query, key, value = leaves = inputs_of(batch)
    starts = batch.cu_seqlens[:-1].long()
    wanted = formula(query, key, value, batch)
    wanted = wanted[starts] if cls_only else wanted
    found = grouped_attention(query[starts] if cls_only else query, key, value, batch.grouping, HEADS, 0.0, cls_only)
    results = [[x, *torch.autograd.grad(weighted_sum(x), leaves)] for x in (found, wanted)]
    for ours, exact in zip(*results, strict=True):
        assert max_difference(ours, exact) <= 1e-12


def test_second_derivatives_are_refused() -> None:
    """A backward pass written out by hand must not drop terms silently when it is differentiated itself."""
    batch = batch_of([3, 2, 5])
    query, key, value = leaves = inputs_of(batch)
    out = grouped_attention(query, key, value, batch.grouping, HEADS, 0.0, False)
    first = torch.cat(torch.autograd.grad(weighted_sum(out.square()), leaves, create_graph=True))
    with pytest.raises(RuntimeError, match="differentiate twice|not have been used in the graph"):
        torch.autograd.grad(weighted_sum(first), leaves)


@pytest.mark.parametrize("cls_only", [False, True])
def test_dropout_acts_on_probabilities(cls_only: bool) -> None:
    """A single token attends to itself with probability 1, so each head is dropped as a whole or scaled as a whole."""
    p, batch = 0.25, batch_of([1] * 500)
    query, key, value = inputs_of(batch)
    dropped = grouped_attention(query, key, value, batch.grouping, HEADS, p, cls_only).view(-1, HEADS, 4)
    kept = (dropped != 0).all(dim=2)
    assert torch.equal(kept, (dropped != 0).any(dim=2))
    assert max_difference(dropped, value.view(-1, HEADS, 4) * kept[:, :, None] / (1 - p)) <= 1e-12
    count = kept.numel()
    assert abs((~kept).sum().item() - count * p) < 5 * (count * p * (1 - p)) ** 0.5
    assert kept.sum(dim=1).unique().numel() > 1  # heads are dropped one by one
