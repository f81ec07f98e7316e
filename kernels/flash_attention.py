"""Attention inside the sequences of a packed batch by the FlashAttention kernel that torch carries (Dao 2023).

torch's public function for it, `varlen_attn`, has no dropout. The operator below that has, and torch's own nested
tensors call it as this module does. Whether it works on a device is tried once, dropout and gradients included, before
anything relies on it; where it does not, a line says so, and attention goes on with padded groups.
"""

import logging
from collections import Counter
from functools import cache

import torch
from torch import Tensor

from utils.errors import first_line

logger = logging.getLogger("minbert.flash")
WIDEST = 256  # of a head; widths are multiples of 8
calls: Counter[str] = Counter()  # attention in half precision on a GPU: by "flash", or by "groups" where it should be


def attend(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, starts: Tensor, longest: int, dropout: float
) -> Tensor:
    """softmax(q k^T / sqrt(width)) v inside each sequence, with `dropout` on the probabilities.

    `query` and the result are [Q, heads, width], `key` and `value` [T, heads, width]; `query_starts` and `starts` [S+1]
    int32 say where each sequence begins in them. There are S queries, one for each sequence, or T.
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
    """Whether `attend` takes these [.., heads * width] as they are; counts the answer."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if not len(key):  # a shard without examples, which the kernel refuses
        return False
    same = query.dtype == key.dtype == value.dtype
    out = same and works(query.device, query.dtype, query.shape[1] // heads)
    calls["flash" if out else "groups"] += 1
    return out


@cache
def works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel does what it should, heads of this width and type; a line says what it does not."""
    if dtype not in (torch.float16, torch.bfloat16) or width % 8 or width > WIDEST:
        return False
    state = torch.cuda.get_rng_state(device)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            trial(device, dtype, width)
        return True
    except (RuntimeError, AttributeError) as error:
        reason = first_line(error)
        logger.warning("attention: torch's FlashAttention does not work here (%s); going on with padded groups", reason)
        return False
    finally:
        torch.cuda.set_rng_state(state, device)


def trial(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Compare outputs and gradients with the formula, and see that dropout acts; RuntimeError where they are wrong."""
    lengths, heads = [40, 24], 4
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, sum(lengths), heads, width, generator=generator).to(device, dtype)
    query, key, value = drawn
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    found = attend_and_differentiate(query, key, value, starts, max(lengths))
    parts = [formula(*(own.double() for own in part)) for part in drawn.split(lengths, dim=1)]
    for own, wanted in zip(found, (torch.cat(parts_of) for parts_of in zip(*parts, strict=True)), strict=True):
        if not torch.allclose(own.double(), wanted, rtol=0.05, atol=0.05):
            raise RuntimeError("its numbers are not those of the formula")
    ones = torch.ones_like(value)  # each output is the sum of its probabilities
    sums = attend(query, key, ones, starts, starts, max(lengths), 0.5).double()
    if not (abs(sums.mean() - 1) < 0.2 and sums.std() > 0.05):
        raise RuntimeError("it loses dropout")
    value, weights = value.clone().requires_grad_(), value.flip(0)
    dropped = attend(query, key, value, starts, starts, max(lengths), 0.5)
    dropped.backward(weights)
    assert value.grad is not None
    # The output is linear in the values: both sums are the same product, unless the masks were others backwards.
    difference = (dropped.double() * weights.double()).sum() - (value.double() * value.grad.double()).sum()
    if not abs(difference) < 0.05 * len(dropped.flatten()) ** 0.5:
        raise RuntimeError("its gradients are not those of its dropout")


def attend_and_differentiate(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> list[Tensor]:
    """The result without dropout, and the gradients of half its squared sum."""
    query, key, value = leaves = [own.clone().requires_grad_() for own in (query, key, value)]
    out = attend(query, key, value, starts, starts, longest, 0.0)
    return [out, *torch.autograd.grad(out.float().square().sum() / 2, leaves)]


def formula(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """The same for one sequence [L, heads, width], as the formula has it."""
    leaves = [own.clone().requires_grad_() for own in (query, key, value)]
    q, k, v = (own.transpose(0, 1) for own in leaves)  # [heads, L, width]
    out = ((q @ k.transpose(1, 2) * query.shape[2] ** -0.5).softmax(dim=2) @ v).transpose(0, 1)
    return [out, *torch.autograd.grad(out.square().sum() / 2, leaves)]
