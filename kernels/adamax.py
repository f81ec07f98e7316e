"""A step of Adamax that passes over memory once, on a GPU with Triton. The plain form is `plain_adamax`.

For each number it reads the weight, its gradient and two states, and writes all but the gradient: 28 bytes. Foreach
operations move 64, or 76 with weight decay. One launch serves all parameters, since a table says where they lie.
"""

import logging
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from utils.errors import first_line

logger = logging.getLogger("minbert.optimizer")
CHUNK = 16 * 1024  # elements of a program
BLOCK = 1024  # elements that a program takes at a time


def plain_adamax(
    p: Tensor, g: Tensor, m: Tensor, u: Tensor, step_size: float, gain: float, beta2: float, eps: float, keep: float,
    decay: float,
) -> None:  # fmt: skip
    """Update a parameter `p` and its states `m` and `u` in place by a gradient `g` (see optimizer.Adamax).

    `gain` is 1 - beta1, `step_size` is lr/(1-beta1^t), `keep` is what decoupled weight decay leaves of the parameter,
    and `decay` is the factor of coupled weight decay.
    """
    g = g + decay * p
    m += gain * (g - m)
    u.copy_(torch.maximum(beta2 * u, g.abs() + eps))
    p.copy_(keep * p - step_size * (m / u))


def chunk_table(columns: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Return the chunks of some fp32 tensors as int64 [C, columns + 1].

    A column of `columns` has a tensor for each parameter. A row has the address of the chunk in each column, and the
    number of its elements.
    """
    addresses = np.array([[tensor.data_ptr() for tensor in column] for column in columns]).T  # [N, columns]
    sizes = np.array([tensor.numel() for tensor in columns[0]])
    chunks = -(-sizes // CHUNK)
    tensor_of = np.repeat(np.arange(len(sizes)), chunks)  # [C]
    first = CHUNK * (np.arange(chunks.sum()) - np.repeat(chunks.cumsum() - chunks, chunks))  # elements before the chunk
    counts = np.minimum(sizes[tensor_of] - first, CHUNK)
    return np.column_stack([addresses[tensor_of] + 4 * first[:, None], counts]).astype(np.int64)


def one_pass_adamax(
    params: Sequence[Tensor], grads: Sequence[Tensor], m: Sequence[Tensor], u: Sequence[Tensor], **options: float
) -> None:
    """Do for each parameter what `plain_adamax` does; `options` are its numbers. All tensors are contiguous fp32."""
    from kernels.adamax_chunks import adamax_chunks

    table = torch.from_numpy(chunk_table([params, grads, m, u]))
    device = params[0].device
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    adamax_chunks[(len(table),)](table, **options, CHUNK=CHUNK, BLOCK=BLOCK)


@cache
def works(device: torch.device) -> bool:
    """Return whether the kernel computes on this GPU what it should; log the reason if not."""
    if device.type != "cuda":
        return False
    try:
        check_kernel(device)
        return True
    except Exception as error:  # Triton is missing, finds no C compiler, or knows no such GPU
        reason = first_line(error)
        logger.warning("Adamax: its kernel does not work here (%s); going on by foreach operations", reason)
        return False


def check_kernel(device: torch.device) -> None:
    """Compare a step with `plain_adamax`. Raises RuntimeError where the kernel is wrong."""
    generator = torch.Generator().manual_seed(0)
    sizes = (3, CHUNK + 5)
    p, g, m, u = found = [[torch.rand(size, generator=generator).to(device) for size in sizes] for _ in range(4)]
    wanted = [[tensor.clone() for tensor in column] for column in found]
    options = {"step_size": 0.1, "gain": 0.1, "beta2": 0.99, "eps": 1e-3, "keep": 0.9, "decay": 0.2}
    one_pass_adamax(p, g, m, u, **options)
    for ours, formula in zip(zip(*found, strict=True), zip(*wanted, strict=True), strict=True):
        plain_adamax(formula[0], formula[1], formula[2], formula[3], **options)
        if not all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(ours, formula, strict=True)):
            raise RuntimeError("its numbers are not those of the formula")
