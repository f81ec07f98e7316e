"""Attention inside packed sequences, computed in groups of similar length with a handwritten backward pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dropout import drop, keep_mask
from text.packing import Grouping


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(width)) v for one sequence; all tensors are [L, heads, width].

    This is the formula (Vaswani et al. 2017, section 3.2.1) with which the kernels are compared.
    """
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [heads, L, width]
    return ((q @ k.transpose(1, 2) * query.shape[2] ** -0.5).softmax(dim=2) @ v).transpose(0, 1)


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, grouping: Grouping, heads: int, dropout: float, cls_only: bool
) -> Tensor:
    """Return `plain_attention` inside each sequence of a packed batch, with `dropout` on the probabilities.

    `key` and `value` are [T, H]. `query` and the result are [T, H], or [S, H] with `cls_only`: one row for the first
    token of each sequence.
    """
    out: Tensor = _GroupedAttention.apply(query, key, value, grouping, heads, dropout, cls_only)
    return out


class _GroupedAttention(torch.autograd.Function):
    """Attention in the rectangle of each group, forward and backward written out.

    Autograd would compute the same numbers from sliced views. But it would allocate and add the whole buffer of each
    gradient once for every group, which on a CPU costs as much as the multiplications. Groups are gathered one by one,
    so that a group is still in the processor's cache when it is multiplied. Padded rows repeat a real row, so all
    numbers are finite. Masked keys and dropped outputs keep the padding out of the result.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grouping: Grouping,
        heads: int,
        dropout: float,
        cls_only: bool,
    ) -> Tensor:
        groups = _split_heads(grouping, heads, cls_only)
        width = query.shape[1] // heads
        query, key, value = (x.reshape(-1, width) for x in (query, key, value))  # [.., H] -> [.. * heads, width]
        out = torch.empty_like(query)
        probabilities, keeps = [], []
        for group in groups:
            q, k, v = group.gather_queries(query), group.gather(key), group.gather(value)  # [n * heads, L, width]
            scores = torch.bmm(q * width**-0.5, k.transpose(1, 2))  # scaled first, so that fp16 does not overflow
            if group.mask is not None:
                scores.unflatten(0, (-1, heads)).add_(group.mask)
            weights = scores.softmax(dim=-1).to(v.dtype)
            probabilities.append(weights)
            if dropout:
                keeps.append(keep_mask(weights.shape, dropout, weights.device))
                weights = drop(weights, keeps[-1], dropout)
            group.scatter_queries(torch.bmm(weights, v), out)
        ctx.save_for_backward(query, key, value, *probabilities, *keeps)
        ctx.settings = groups, heads, dropout
        return out.view(-1, heads * width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        groups, heads, dropout = ctx.settings
        query, key, value, *saved = ctx.saved_tensors
        width = query.shape[1]
        grad = grad.reshape(-1, width)
        grad_query, grad_key, grad_value = grads = [torch.empty_like(x) for x in (query, key, value)]
        for i, group in enumerate(groups):
            q, k, v = group.gather_queries(query), group.gather(key), group.gather(value)
            g = group.gather_queries(grad)
            if group.mask is not None and not group.cls_only:
                g.unflatten(0, (-1, heads)).mul_(group.mask.exp().transpose(2, 3))  # zero at padding
            weights = dropped = saved[i]
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            if dropout:
                keep = saved[len(groups) + i]
                dropped = drop(weights, keep, dropout)
                grad_weights.mul_(keep).mul_(1 / (1 - dropout))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(width**-0.5)
            group.scatter_queries(torch.bmm(grad_scores, k), grad_query)
            group.scatter(torch.bmm(grad_scores.transpose(1, 2), q), grad_key)
            group.scatter(torch.bmm(dropped.transpose(1, 2), g), grad_value)
        return *(x.view(-1, heads * width) for x in grads), None, None, None, None


@dataclass(frozen=True)
class _HeadGroup:
    """One group of a packed batch, with every row cut into one row for each head."""

    sequences: int  # n * heads: a sequence for each head
    filling: Tensor  # [n * heads * L] rows that fill the group's rectangle
    places: Tensor  # [t * heads] places in the rectangle of the group's rows
    mask: Tensor | None  # [n, 1, 1, L], as in Group
    rows: slice  # the group's rows
    query_rows: slice  # the rows of its queries: the same, or with `cls_only` one for each sequence and head
    cls_only: bool

    def gather(self, x: Tensor) -> Tensor:
        """Return the rectangle [n * heads, L, width] of rows [T * heads, width]."""
        return x.index_select(0, self.filling).view(self.sequences, -1, x.shape[1])

    def gather_queries(self, x: Tensor) -> Tensor:
        """Return the rectangle of the queries' rows; with `cls_only`, it is [n * heads, 1, width]."""
        return x[self.query_rows, None] if self.cls_only else self.gather(x)

    def scatter(self, rectangle: Tensor, x: Tensor) -> None:
        """Write a rectangle without its padding into the group's rows of `x`."""
        torch.index_select(rectangle.view(-1, x.shape[1]), 0, self.places, out=x[self.rows])

    def scatter_queries(self, rectangle: Tensor, x: Tensor) -> None:
        """Write the rectangle of queries into their rows of `x`."""
        if self.cls_only:
            x[self.query_rows] = rectangle[:, 0]
        else:
            self.scatter(rectangle, x)


def _split_heads(grouping: Grouping, heads: int, cls_only: bool) -> list[_HeadGroup]:
    groups, sequence = [], 0
    for group, (filling, places) in zip(grouping.groups, grouping.split(heads), strict=True):
        rows = slice(group.rows.start * heads, group.rows.stop * heads)
        query_rows = slice(sequence * heads, (sequence + group.sequences) * heads) if cls_only else rows
        groups.append(_HeadGroup(group.sequences * heads, filling, places, group.key_mask, rows, query_rows, cls_only))
        sequence += group.sequences
    return groups
