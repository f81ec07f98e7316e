"""A linear layer whose weight is a frozen matrix plus a low-rank update, with a gradient as thin as the update."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear import linear, product


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast. It does nothing if autocast is off, since entering costs 50 microseconds."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def updated_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return V = W0 + s B A [out, in] in the precision of the parameters, under autocast too."""
    with without_autocast(weight.device):
        return torch.addmm(weight, b, a, alpha=scaling)


def plain_low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, factor: Tensor | None = None
) -> Tensor:
    """Return c * ((W0 + s B A) x) + bias as the formula has it; see `low_rank_linear`."""
    y = F.linear(x, weight + scaling * (b @ a))
    y = y if factor is None else y * factor
    return y if bias is None else y + bias


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, factor: Tensor | None = None
) -> Tensor:
    """Return c * ((W0 + s B A) x) + bias for `x` [..., in]: the numbers of `plain_low_rank_linear`, in less time.

    `weight` W0 [out, in] and `bias` [out] get no gradient. `a` A is [r, in], `b` B is [out, r], `scaling` is s, and
    `factor` c is [out] or None, which means 1.
    """
    y: Tensor = _LowRankLinear.apply(x, weight, bias, a, b, scaling, factor)
    return y


class _LowRankLinear(torch.autograd.Function):
    """`low_rank_linear`, without a gradient of [out, in].

    A batch has many more tokens than features, so adding s B A to the weight costs far less than adding s B A x to the
    output. Forward and the input's gradient are then one full matrix product each, as in a plain frozen layer. Autograd
    would compute the gradients of A and B from that of V = W0 + s B A, which is one more full product. Here they are
    thin products. Backward makes V again and does not keep it, since it is as large as the weights of the whole model.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        factor: Tensor | None,
    ) -> Tensor:
        updated = updated_weight(weight, a, b, scaling)
        y = linear(x, updated, None if factor is not None else bias)  # [..., out]
        ctx.save_for_backward(x, weight, a, b, factor, None if factor is None else y)
        ctx.scaling = scaling
        if factor is None:
            return y
        return y * factor.to(y.dtype) if bias is None else torch.addcmul(bias.to(y.dtype), y, factor.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, factor, y = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _, needs_factor = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_factor = None
        if needs_x:
            updated = updated_weight(weight, a, b, ctx.scaling)
            if factor is not None:
                updated.mul_(factor[:, None])
            grad_x = product(grad, updated.to(grad.dtype)).to(x.dtype)
        grad, x = grad.flatten(0, -2), x.flatten(0, -2).to(grad.dtype)  # [T, out], [T, in]
        scaled_b = ctx.scaling * (b if factor is None else factor[:, None] * b)  # [out, r]
        # Thin products come out as [r, T]. As [T, r] they take up to four times as long on a CPU.
        if needs_a:
            grad_a = product(product(scaled_b.t().to(grad.dtype), grad.t()), x).to(a.dtype)  # [r, T] @ [T, in]
        if needs_b:
            grad_b = product(product(a.to(x.dtype), x.t()), grad).t().to(b.dtype) * ctx.scaling  # ([r, T] @ [T, out])^T
            grad_b = grad_b if factor is None else grad_b * factor[:, None]
        if needs_factor:
            grad_factor = (grad * y.flatten(0, -2)).sum(0, dtype=factor.dtype)
        return grad_x, None, None, grad_a, grad_b, None, grad_factor
