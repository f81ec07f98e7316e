"""Low-rank linear layers in half precision, all those of a BERT layer at once, for GPUs.

The plain form is `low_rank_linear` under autocast, which casts each tensor by itself, in both passes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.half_copies import half_copies
from kernels.low_rank import without_autocast


class LowRank(NamedTuple):
    """A frozen weight W0 with its update, as `low_rank_linear` has them."""

    weight: Tensor  # W0 [out, in]
    bias: Tensor  # [out]
    a: Tensor  # A [r, in]
    b: Tensor  # B [out, r]
    scaling: float  # s
    magnitude: Tensor | None  # m [out, 1] of DoRA: the output is m/norm(V) V x + bias, with V = W0 + s B A


class HalfLowRank(NamedTuple):
    """Half-precision tensors of n layers with one input, end to end."""

    weight: Tensor  # V = W0 + s B A [n * out, in], without a gradient
    bias: Tensor  # [n * out]
    a: Tensor  # A [n * r, in]
    b: Tensor  # B [n * out, r]
    scaling: float  # s
    factor: Tensor | None  # m/norm(V) [n * out], or None for 1


def half_low_rank(dtype: torch.dtype, groups: Sequence[Sequence[LowRank]]) -> list[HalfLowRank]:
    """Return the tensors of each group as `dtype`.

    The layers of a group have one shape. All layers have one rank and one scaling.
    """
    layers = [layer for group in groups for layer in group]
    sizes = [len(group) for group in groups]
    with torch.no_grad(), without_autocast(layers[0].weight.device):
        updated = [torch.addmm(layer.weight, layer.b, layer.a, alpha=layer.scaling) for layer in layers]
        frozen = half_copies(dtype, _in_groups(updated, sizes) + _in_groups([x.bias for x in layers], sizes))
    trained = half_copies(dtype, _in_groups([x.a for x in layers], sizes) + _in_groups([x.b for x in layers], sizes))
    count = len(groups)
    factors: Sequence[Tensor | None] = [None] * count
    if layers[0].magnitude is not None:
        factor = _factor([layer.magnitude for layer in layers if layer.magnitude is not None], updated)
        factors = factor.to(dtype).split([len(weight) for weight in frozen[:count]])
    parts = zip(frozen[:count], frozen[count:], trained[:count], trained[count:], factors, strict=True)
    return [HalfLowRank(weight, bias, a, b, layers[0].scaling, factor) for weight, bias, a, b, factor in parts]


def _in_groups(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    """Return the tensors in lists of these sizes."""
    remaining = iter(tensors)
    return [[next(remaining) for _ in range(size)] for size in sizes]


def _factor(magnitudes: Sequence[Tensor], updated: Sequence[Tensor]) -> Tensor:
    """Return m/norm(V) of all layers, end to end. The gradient takes norm(V) for a constant."""
    with torch.no_grad():
        norms = updated[0].new_empty(sum(map(len, updated)))
        for weight, norm in zip(updated, norms.split([len(weight) for weight in updated]), strict=True):
            torch.linalg.vector_norm(weight, dim=1, out=norm)
        norms.clamp_(min=torch.finfo(norms.dtype).tiny)  # so that 0/0 gives 0
    return torch.cat([magnitude.flatten() for magnitude in magnitudes]) / norms


def half_low_rank_linear(x: Tensor, layers: HalfLowRank) -> Tensor:
    """Return the outputs [T, n * out] of all layers side by side, in their precision, for `x` [T, in]."""
    y: Tensor = _HalfLowRankLinear.apply(x.to(layers.weight.dtype), *layers)
    return y


class _HalfLowRankLinear(torch.autograd.Function):
    """The products of `low_rank_linear`. V is kept for backward: other passes could not make all of it at once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        factor: Tensor | None,
    ) -> Tensor:
        y = F.linear(x, weight, bias if factor is None else None)
        ctx.save_for_backward(x, weight, a, b, factor, None if factor is None else y)
        ctx.scaling = scaling
        return y if factor is None else torch.addcmul(bias, y, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, factor, y = ctx.saved_tensors
        rank = b.shape[1]
        count = len(a) // rank
        grad_factor = None
        if factor is not None:
            grad_factor = (grad * y).sum(0)
            grad = grad * factor
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        parts = grad.unflatten(1, (count, -1)).transpose(0, 1)  # [n, T, out]
        reduced = torch.bmm(parts, b.unflatten(0, (count, -1)))  # [n, T, r]
        grad_a = torch.bmm(reduced.transpose(1, 2), x.expand(count, -1, -1)).flatten(0, 1)
        projected = (x @ a.t()).unflatten(1, (count, rank)).transpose(0, 1)  # [n, T, r]
        grad_b = torch.bmm(parts.transpose(1, 2), projected).flatten(0, 1)
        if ctx.scaling != 1.0:
            grad_a, grad_b = grad_a * ctx.scaling, grad_b * ctx.scaling
        return grad_x, None, None, grad_a, grad_b, None, grad_factor
