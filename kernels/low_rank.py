"""The product with a weight plus a low-rank update, without the sum of the two."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear import linear, product


def _own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside; nothing where there is none, since entering costs 50 microseconds."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def _updated(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """V = W0 + s B A [out, in], in the parameters' own precision under autocast too."""
    with _own_precision(weight.device):
        return torch.addmm(weight, b, a, alpha=scaling)


class _LowRankLinear(torch.autograd.Function):
    """c * (V x) + bias with V = W0 + s B A and a factor c [out] or None, without a gradient of [out, in].

    With many more tokens than features, adding s B A to the weight costs far less than adding s B A x to the output:
    forward and the input's gradient are then one full matrix product each, as in a plain frozen linear. Autograd would
    get the gradients of A and B from that of V, one more full product; here they are thin ones, written out. V is made
    again in backward rather than kept, since it is as large as the weights of the whole model.
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
        updated = _updated(weight, a, b, scaling)
        y = linear(x, updated, None if factor is not None else bias)  # [T, out]
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
            updated = _updated(weight, a, b, ctx.scaling)
            if factor is not None:
                updated.mul_(factor[:, None])
            grad_x = product(grad, updated.to(grad.dtype)).to(x.dtype)
        grad, x = grad.flatten(0, -2), x.flatten(0, -2).to(grad.dtype)  # [T, out], [T, in]
        scaled_b = ctx.scaling * (b if factor is None else factor[:, None] * b)  # [out, r]
        # Thin products are made as [r, T]: the other way round they take up to four times as long on a CPU.
        if needs_a:
            grad_a = product(product(scaled_b.t().to(grad.dtype), grad.t()), x).to(a.dtype)  # [r, T] @ [T, in]
        if needs_b:
            grad_b = product(product(a.to(x.dtype), x.t()), grad).t().to(b.dtype) * ctx.scaling  # ([r, T] @ [T, out])^T
            grad_b = grad_b if factor is None else grad_b * factor[:, None]
        if needs_factor:
            grad_factor = (grad * y.flatten(0, -2)).sum(0, dtype=factor.dtype)
        return grad_x, None, None, grad_a, grad_b, None, grad_factor
