"""Half-precision copies of several trained tensors at once. The plain form is autocast, which casts them one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def half_copies(dtype: torch.dtype, groups: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Return a copy of each group as `dtype`, with the group's tensors end to end along the first dimension.

    A GPU makes all copies by one launch, and the gradients of all tensors by another one.
    """
    rows = [[len(tensor) for tensor in group] for group in groups]
    copies = [
        group[0].new_empty((sum(counts), *group[0].shape[1:]), dtype=dtype)
        for group, counts in zip(groups, rows, strict=True)
    ]
    out: tuple[Tensor, ...] = _HalfCopies.apply(copies, rows, *(tensor for group in groups for tensor in group))
    return out


def _parts(copies: Sequence[Tensor], rows: list[list[int]]) -> list[Tensor]:
    """Return the part of each tensor in the copies of its group, given the rows of each."""
    return [part for copy, counts in zip(copies, rows, strict=True) for part in copy.split(counts)]


class _HalfCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], rows: list[list[int]], *tensors: Tensor) -> tuple[Tensor, ...]:
        torch._foreach_copy_(_parts(copies, rows), list(tensors))
        ctx.rows, ctx.dtype = rows, tensors[0].dtype
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = _parts(grads, ctx.rows)
        out = [torch.empty_like(part, dtype=ctx.dtype) for part in parts]
        torch._foreach_copy_(out, parts)
        return None, None, *out
