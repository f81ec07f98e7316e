"""Attention of packed sequences in groups of similar length, with a backward pass of its own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dropout import drop, keep_mask
from text.packing import Grouping


class _GroupedAttention(torch.autograd.Function):
    """Attention inside each group's rectangle, forward and backward written out.

    Autograd would get the same numbers from sliced views, but would assemble their gradients by one allocation and
    one addition of the whole buffer for every group, which on a CPU costs as much as the multiplications.
    Groups are gathered one by one, so that a group is still in the processor's cache when it is multiplied.
    Padded rows repeat a real row, so that all numbers are finite; masked keys and dropped outputs keep them out.
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
        first_only: bool,
    ) -> Tensor:
        parts = _parts(grouping, heads, first_only)
        width = query.shape[1] // heads
        query, key, value = (x.reshape(-1, width) for x in (query, key, value))  # [.., H] -> [.. * heads, width]
        out = torch.empty_like(query)
        probabilities, keeps = [], []
        for part in parts:
            q, k, v = part.queries(query), part.keys(key), part.keys(value)  # [n * heads, L, width]
            scores = torch.bmm(q * width**-0.5, k.transpose(1, 2))  # scaled before, lest fp16 overflows
            if part.mask is not None:
                scores.unflatten(0, (-1, heads)).add_(part.mask)
            weights = scores.softmax(dim=-1).to(v.dtype)
            probabilities.append(weights)
            if dropout:
                keeps.append(keep_mask(weights.shape, dropout, weights.device))
                weights = drop(weights, keeps[-1], dropout)
            part.put_queries(torch.bmm(weights, v), out)
        ctx.save_for_backward(query, key, value, *probabilities, *keeps)
        ctx.settings = parts, heads, dropout
        return out.view(-1, heads * width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts, heads, dropout = ctx.settings
        query, key, value, *saved = ctx.saved_tensors
        width = query.shape[1]
        grad = grad.reshape(-1, width)
        grad_query, grad_key, grad_value = grads = [torch.empty_like(x) for x in (query, key, value)]
        for i, part in enumerate(parts):
            q, k, v, g = part.queries(query), part.keys(key), part.keys(value), part.queries(grad)
            if part.mask is not None and not part.first_only:
                g.unflatten(0, (-1, heads)).mul_(part.mask.exp().transpose(2, 3))  # nothing is asked of padding
            weights = dropped = saved[i]
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            if dropout:
                keep = saved[len(parts) + i]
                dropped = drop(weights, keep, dropout)
                grad_weights.mul_(keep).mul_(1 / (1 - dropout))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(width**-0.5)
            part.put_queries(torch.bmm(grad_scores, k), grad_query)
            part.put_keys(torch.bmm(grad_scores.transpose(1, 2), q), grad_key)
            part.put_keys(torch.bmm(dropped.transpose(1, 2), g), grad_value)
        return *(x.view(-1, heads * width) for x in grads), None, None, None, None


@dataclass(frozen=True)
class _Part:
    """One group of a packed batch, each row of which is cut into rows of one head."""

    sequences: int  # n * heads, a sequence for each head
    rows: Tensor  # [n * heads * L] that fill the group's rectangle
    places: Tensor  # [t * heads] of its own rows in that rectangle
    mask: Tensor | None  # [n, 1, 1, L], as in Group
    own: slice  # its own rows
    asking: slice  # those of the queries: the same, or with `first_only` one for each sequence and head
    first_only: bool

    def keys(self, x: Tensor) -> Tensor:
        """The rectangle [n * heads, L, width] of rows [T * heads, width]."""
        return x.index_select(0, self.rows).view(self.sequences, -1, x.shape[1])

    def queries(self, x: Tensor) -> Tensor:
        """The same of the queries' rows, or with `first_only` [n * heads, 1, width]."""
        return x[self.asking, None] if self.first_only else self.keys(x)

    def put_keys(self, rectangle: Tensor, x: Tensor) -> None:
        """Write what is no padding back into rows."""
        torch.index_select(rectangle.view(-1, x.shape[1]), 0, self.places, out=x[self.own])

    def put_queries(self, rectangle: Tensor, x: Tensor) -> None:
        """The same for queries."""
        if self.first_only:
            x[self.asking] = rectangle[:, 0]
        else:
            self.put_keys(rectangle, x)


def _parts(grouping: Grouping, heads: int, first_only: bool) -> list[_Part]:
    parts, sequence = [], 0
    for group, (rows, places) in zip(grouping.groups, grouping.split(heads), strict=True):
        own = slice(group.rows.start * heads, group.rows.stop * heads)
        asking = slice(sequence * heads, (sequence + group.sequences) * heads) if first_only else own
        parts.append(_Part(group.sequences * heads, rows, places, group.key_mask, own, asking, first_only))
        sequence += group.sequences
    return parts
