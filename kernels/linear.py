"""Matrix products in fp32 on a CPU, by the faster of the two libraries that torch carries.

torch gives fp32 products to MKL and only half precision to oneDNN. On AMD's processors with AVX-512, MKL is no faster
than AVX2 is, and oneDNN takes less than half the time (EPYC, one core: 230 against 100 GFLOP/s; kept to AVX2, oneDNN
has 110). Both round fp32 sums, in different orders. The operator below is the one that torch's compiler puts in place
of linear layers.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.errors import is_out_of_memory

# Multiplications of a product from which on oneDNN is asked: it compiles a kernel for each new shape, in some 0.7 ms,
# which the six layers of a small BERT share.
FEWEST = 1 << 23


@cache
def has_onednn() -> bool:
    """Whether oneDNN is there, and the processor one for which it is worth the compiling of a kernel for each shape."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    there = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return wide and there and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, and what runs again goes without oneDNN if it was that which found none for a kernel.

    From then on it compiles none in this process, however much memory there is: a smaller batch would fail as well,
    also in torch's own operators, which fall back to others of theirs.
    """
    if "could not create a primitive" in str(error):
        torch.backends.mkldnn.set_flags(False)
        has_onednn.cache_clear()
    return is_out_of_memory(error)


def _usable(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN takes the product of `a` [n, k] with `b`, [k, m] or transposed."""
    matrices = all(own.dtype == torch.float32 and own.device.type == "cpu" and own.dim() == 2 for own in (a, b))
    return matrices and len(a) * b.numel() >= FEWEST and has_onednn()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """x [n, in] times weight^T [in, out], plus bias [out]; `then` may be "gelu"."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "none")
    return y


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] @ b [k, m], without history."""
    return _onednn(a, b.t()) if _usable(a, b) else a @ b


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight) if needs_x else None,
            product(grad.t(), x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def _has_history(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(own is not None and own.requires_grad for own in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """F.linear: x [..., in], weight [out, in] and bias [out] to [..., out]; with `gelu`, F.gelu of that.

    Where nothing needs a gradient, oneDNN takes the GELU of what it has in registers.
    """
    usable = _usable(x, weight) and not torch.is_autocast_enabled("cpu")
    if usable and not _has_history(x, weight, bias):
        return _onednn(x, weight, bias, "gelu" if gelu else "none")
    y: Tensor = _Linear.apply(x, weight, bias) if usable else F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y
