"""Attention inside packed sequences by one of the two kernels that torch contains for sequences of mixed lengths.

FlashAttention (Dao 2023) takes half precision on newer GPUs. The memory-efficient kernel (Rabe and Staats 2021, as in
xFormers) takes fp32 and older GPUs too. torch's public function, `varlen_attn`, has no dropout. The operators below
have it, and torch's own nested tensors call them as this module does. `works` tries a kernel once on each device,
dropout and gradients included, before anything relies on it. Where it fails, a line says so, and the next one is tried;
without any, attention uses padded groups.
"""

import logging
from collections import Counter
from functools import cache

import torch
from torch import Tensor

from kernels.grouped_attention import plain_attention
from utils.errors import first_line

logger = logging.getLogger("minbert.attention")
HALF = (torch.float16, torch.bfloat16)
MAX_WIDTH = 256  # of FlashAttention's heads; their widths are multiples of 8
calls: Counter[str] = Counter()  # of attention on a GPU, by the kernel, or by "groups" where there was none


def flash(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, starts: Tensor, longest: tuple[int, int],
    dropout: float,
) -> Tensor:  # fmt: skip
    """Compute `attend` by FlashAttention; `longest` are the lengths of the longest query and key."""
    scale = query.shape[2] ** -0.5
    out, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, query_starts, starts, *longest, dropout, False, False, scale=scale
    )
    return out


def memory_efficient(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, starts: Tensor, longest: tuple[int, int],
    dropout: float,
) -> Tensor:  # fmt: skip
    """Compute `attend` by the memory-efficient kernel; `longest` are the lengths of the longest query and key."""
    scale = query.shape[2] ** -0.5
    batches = (x.unsqueeze(0) for x in (query, key, value))  # one batch with all sequences
    out, *_ = torch.ops.aten._efficient_attention_forward(
        *batches, None, query_starts, starts, *longest, dropout, 0, compute_log_sumexp=True, scale=scale
    )
    return out.squeeze(0)


KERNELS = {"flash": flash, "memory-efficient": memory_efficient}  # in the order in which they are tried


def attend(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    starts: Tensor,
    longest: int,
    dropout: float,
) -> Tensor:
    """Return softmax(q k^T / sqrt(width)) v inside each sequence, with `dropout` on the probabilities.

    `query` and the result are [Q, heads, width]; `key` and `value` are [T, heads, width]. `query_starts` and `starts`
    [S+1] int32 hold the row where each sequence begins in them. Q is T, or S with one query for each sequence.
    """
    longest_query = 1 if len(query) == len(starts) - 1 else longest
    return KERNELS[kernel](query, key, value, query_starts, starts, (longest_query, longest), dropout)


def choose_kernel(query: Tensor, key: Tensor, value: Tensor, heads: int) -> str | None:
    """Return the kernel that takes these tensors [.., heads * width] as they are, or None; count it in `calls`."""
    if query.device.type != "cuda" or not len(key):  # kernels refuse a shard without examples
        return None
    same = query.dtype == key.dtype == value.dtype
    kernel = first_working(query.device, query.dtype, query.shape[1] // heads) if same else None
    calls[kernel or "groups"] += 1
    return kernel


def first_working(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Return the first kernel that works for heads of this width and type, or None."""
    return next((kernel for kernel in KERNELS if works(kernel, device, dtype, width)), None)


@cache
def works(kernel: str, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether a kernel computes what it should for heads of this width and type; log the reason if not."""
    if kernel == "flash" and (dtype not in HALF or width % 8 or width > MAX_WIDTH):
        return False
    state = torch.cuda.get_rng_state(device)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            check_kernel(kernel, device, dtype, width)
        return True
    except (RuntimeError, AttributeError) as error:
        reason = first_line(error)
        logger.warning("attention: torch's %s kernel does not work here (%s); going on without it", kernel, reason)
        return False
    finally:
        torch.cuda.set_rng_state(state, device)


def check_kernel(kernel: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Compare outputs and gradients with `plain_attention`, and dropout with its expectation.

    Raises RuntimeError where the kernel is wrong.
    """
    lengths, heads = [40, 24], 4
    tolerance = 0.05 if dtype in HALF else 1e-4  # products in TF32 are not exact enough for fp32
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, sum(lengths), heads, width, generator=generator).to(device, dtype)
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    query, key, value = leaves = [x.clone().requires_grad_() for x in inputs]
    found = _with_gradients(attend(kernel, query, key, value, starts, starts, max(lengths), 0.0).float(), leaves)
    leaves = [x.double().requires_grad_() for x in inputs]
    sequences = zip(*(x.split(lengths) for x in leaves), strict=True)
    wanted = _with_gradients(torch.cat([plain_attention(*sequence) for sequence in sequences]), leaves)
    for ours, formula in zip(found, wanted, strict=True):
        if not torch.allclose(ours.double(), formula, rtol=tolerance, atol=tolerance):
            raise RuntimeError("its numbers are not those of the formula")
    query, key, value = inputs
    ones = torch.ones_like(value)  # each output is then the sum of its probabilities
    sums = attend(kernel, query, key, ones, starts, starts, max(lengths), 0.5).double()
    if not (abs(sums.mean() - 1) < 0.2 and sums.std() > 0.05):
        raise RuntimeError("it loses dropout")
    value, weights = value.clone().requires_grad_(), value.flip(0)
    dropped = attend(kernel, query, key, value, starts, starts, max(lengths), 0.5)
    dropped.backward(weights)
    assert value.grad is not None
    # The output is linear in the values, so both sums are the same product unless backward used other masks.
    difference = (dropped.double() * weights.double()).sum() - (value.double() * value.grad.double()).sum()
    if not abs(difference) < 0.05 * len(dropped.flatten()) ** 0.5:
        raise RuntimeError("its gradients are not those of its dropout")


def _with_gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return `out` and the gradients of half its squared sum."""
    return [out, *torch.autograd.grad(out.square().sum() / 2, leaves)]
