"""Attention inside packed sequences by the FlashAttention kernel that torch contains (Dao 2023).

torch's public function for it, `varlen_attn`, has no dropout. The operator below has it, and torch's own nested tensors
call it as this module does. `works` tries it once on each device, dropout and gradients included, before anything
relies on it. Where it fails, a line says so, and attention uses padded groups instead.
"""

import logging
from collections import Counter
from functools import cache

import torch
from torch import Tensor

from kernels.grouped_attention import plain_attention
from utils.errors import first_line

logger = logging.getLogger("minbert.flash")
MAX_WIDTH = 256  # of a head; widths are multiples of 8
calls: Counter[str] = Counter()  # attention in half precision on a GPU: by "flash", or by "groups" where flash failed


def attend(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, starts: Tensor, longest: int, dropout: float
) -> Tensor:
    """Return softmax(q k^T / sqrt(width)) v inside each sequence, with `dropout` on the probabilities.

    `query` and the result are [Q, heads, width]; `key` and `value` are [T, heads, width]. `query_starts` and `starts`
    [S+1] int32 hold the row where each sequence begins in them. Q is T, or S with one query for each sequence.
    """
    longest_query = 1 if len(query) == len(starts) - 1 else longest
    out, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        query_starts,
        starts,
        longest_query,
        longest,
        dropout,
        False,
        False,
        scale=query.shape[2] ** -0.5,
    )
    return out


def usable(query: Tensor, key: Tensor, value: Tensor, heads: int) -> bool:
    """Return whether `attend` takes these tensors [.., heads * width] as they are, and count the answer in `calls`."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if not len(key):  # the kernel refuses a shard without examples
        return False
    same = query.dtype == key.dtype == value.dtype
    out = same and works(query.device, query.dtype, query.shape[1] // heads)
    calls["flash" if out else "groups"] += 1
    return out


@cache
def works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether the kernel computes what it should for heads of this width and type; log the reason if not."""
    if dtype not in (torch.float16, torch.bfloat16) or width % 8 or width > MAX_WIDTH:
        return False
    state = torch.cuda.get_rng_state(device)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            check_kernel(device, dtype, width)
        return True
    except (RuntimeError, AttributeError) as error:
        reason = first_line(error)
        logger.warning("attention: torch's FlashAttention does not work here (%s); going on with padded groups", reason)
        return False
    finally:
        torch.cuda.set_rng_state(state, device)


def check_kernel(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Compare outputs and gradients with `plain_attention`, and dropout with its expectation.

    Raises RuntimeError where the kernel is wrong.
    """
    lengths, heads = [40, 24], 4
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, sum(lengths), heads, width, generator=generator).to(device, dtype)
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    query, key, value = leaves = [x.clone().requires_grad_() for x in inputs]
    found = _with_gradients(attend(query, key, value, starts, starts, max(lengths), 0.0).float(), leaves)
    leaves = [x.double().requires_grad_() for x in inputs]
    sequences = zip(*(x.split(lengths) for x in leaves), strict=True)
    wanted = _with_gradients(torch.cat([plain_attention(*sequence) for sequence in sequences]), leaves)
    for ours, formula in zip(found, wanted, strict=True):
        if not torch.allclose(ours.double(), formula, rtol=0.05, atol=0.05):
            raise RuntimeError("its numbers are not those of the formula")
    query, key, value = inputs
    ones = torch.ones_like(value)  # each output is then the sum of its probabilities
    sums = attend(query, key, ones, starts, starts, max(lengths), 0.5).double()
    if not (abs(sums.mean() - 1) < 0.2 and sums.std() > 0.05):
        raise RuntimeError("it loses dropout")
    value, weights = value.clone().requires_grad_(), value.flip(0)
    dropped = attend(query, key, value, starts, starts, max(lengths), 0.5)
    dropped.backward(weights)
    assert value.grad is not None
    # The output is linear in the values, so both sums are the same product unless backward used other masks.
    difference = (dropped.double() * weights.double()).sum() - (value.double() * value.grad.double()).sum()
    if not abs(difference) < 0.05 * len(dropped.flatten()) ** 0.5:
        raise RuntimeError("its gradients are not those of its dropout")


def _with_gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return `out` and the gradients of half its squared sum."""
    return [out, *torch.autograd.grad(out.square().sum() / 2, leaves)]
