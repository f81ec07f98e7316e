"""Linear layers and matrix products in fp32 on a CPU, by the faster of the two libraries that torch contains.

torch gives fp32 products to MKL, and only half precision to oneDNN. On AMD's processors with AVX-512, MKL is no faster
than with AVX2, and oneDNN takes less than half the time (EPYC, one core: 230 against 100 GFLOP/s; oneDNN limited to
AVX2 reaches 110). Both round fp32 sums, in different orders. The operator below is the one that torch's compiler uses
for linear layers. The plain forms are F.linear and the operator @.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.errors import is_out_of_memory

# oneDNN computes products with at least so many multiplications. It compiles a kernel for each new shape, in some
# 0.7 ms, which the six layers of a small BERT share.
MIN_MULTIPLICATIONS = 1 << 23


@cache
def has_onednn() -> bool:
    """Return whether torch has oneDNN, and a processor on which it is worth compiling a kernel for each shape."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    available = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return wide and available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. If oneDNN found no memory for a kernel, switch it off in this process.

    After that failure oneDNN compiles no kernel in this process, however much memory there is. A smaller batch would
    fail as well, and so would torch's operators that use oneDNN; switched off, they use others.
    """
    if "could not create a primitive" in str(error):
        torch.backends.mkldnn.set_flags(False)
        has_onednn.cache_clear()
    return is_out_of_memory(error)


def _usable(a: Tensor, b: Tensor) -> bool:
    """Return whether oneDNN takes the product of `a` [n, k] with `b`, which is [k, m] or transposed."""
    if torch.compiler.is_compiling():
        return False
    matrices = all(x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 2 for x in (a, b))
    large = matrices and len(a) * b.numel() >= MIN_MULTIPLICATIONS
    return large and has_onednn() and not torch.jit.is_tracing()  # --export_onnx knows no operator of oneDNN


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Return x [n, in] times weight^T [in, out], plus bias [out]. `activation` is "none" or "gelu"."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return y


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a [n, k] @ b [k, m], without a gradient."""
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


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Return F.linear of x [..., in], weight [out, in] and bias [out], which is [..., out]; with `gelu`, F.gelu of it.

    Where nothing needs a gradient, oneDNN computes the GELU while the values are still in registers.
    """
    usable = _usable(x, weight) and not torch.is_autocast_enabled("cpu")
    if usable and not _needs_gradient(x, weight, bias):
        return _onednn(x, weight, bias, "gelu" if gelu else "none")
    y: Tensor = _Linear.apply(x, weight, bias) if usable else F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y
