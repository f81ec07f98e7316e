"""Gradient surgery (PCGrad: Yu et al. 2020, Algorithm 1): conflicting tasks give up the conflicting part of a gradient.

Every projected gradient is a combination of the tasks' gradients, so the inner products of the gradients decide all
projections. Memory is passed over once for the products and once for the result.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

ALIGNMENT = 16  # each part begins at a multiple of so many numbers, as aligned as memory that torch allocates for it
PIECE = 1024  # numbers whose products are added in the gradients' precision


class TaskGradients:
    """The gradients of a step's tasks: a row of one matrix [K, N] for each, zero where its task reaches no parameter.

    A GPU then needs one launch where it would need one for each parameter.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], tasks: int) -> None:
        self.parameters = parameters
        self.sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
        width = -(-sum(self.sizes) // PIECE) * PIECE
        self.rows = parameters[0].new_zeros(tasks, width) if parameters else torch.zeros(tasks, 0)
        self.reached: list[list[bool]] = []  # by row: whether the task reaches each parameter

    def parts(self, row: int) -> list[Tensor]:
        """Return views of a row in the shapes of the parameters."""
        used = self.rows[row, : sum(self.sizes)]
        spaces = zip(used.split(self.sizes), self.parameters, strict=True)
        return [space[: parameter.numel()].view(parameter.shape) for space, parameter in spaces]

    @torch.no_grad()
    def take(self) -> None:
        """Copy the gradients of the parameters into the next row, and clear them.

        A copy, since the next backward pass writes to the memory of a gradient that DistributedDataParallel or a CUDA
        graph has made.
        """
        found = [(part, p.grad) for part, p in zip(self.parts(len(self.reached)), self.parameters, strict=True)]
        if copies := [(part, gradient) for part, gradient in found if gradient is not None]:
            into, gradients = zip(*copies, strict=True)
            torch._foreach_copy_(into, gradients)
        self.reached.append([gradient is not None for _, gradient in found])
        for parameter in self.parameters:
            parameter.grad = None

    def give_first(self) -> None:
        """Give the parameters the first row as their gradient, and none to those that no task reaches."""
        for parameter, part, *reached in zip(self.parameters, self.parts(0), *self.reached, strict=True):
            parameter.grad = part if any(reached) else None

    def pairs(self) -> int:
        """Return the number of pairs of tasks that reach any parameter."""
        return math.comb(sum(map(any, self.reached)), 2)


@torch.no_grad()
def pcgrad(gradients: Tensor, generator: np.random.Generator) -> Tensor:
    """Replace the first of the tasks' `gradients` [K, N] by the sum of the projected ones.

    Return the number of pairs of tasks in conflict. Task i goes through the other tasks in an order drawn from
    `generator`. Where its gradient, as projected so far, has a negative product with the original gradient of task j,
    it loses its part along that gradient. The host does not wait for the device. The other rows are overwritten.
    """
    products = inner_products(gradients)
    conflicts = (products < 0).sum() / 2
    gradients.mul_(projected_shares(products, generator).to(gradients.dtype)[:, None])
    for row in gradients[1:]:  # in place: another row would be the size of the model
        gradients[0].add_(row)
    return conflicts


def inner_products(gradients: Tensor) -> Tensor:
    """Return the products [K, K] of the rows of `gradients` [K, N], in float64 if the device has it."""
    wide = torch.float32 if gradients.device.type == "mps" else torch.float64
    pieces = gradients.unflatten(1, (-1, PIECE)).transpose(0, 1)  # [N / PIECE, K, PIECE]
    # A sum over all N in fp32 would lose digits: two in a thousand over 22 million numbers on a CPU.
    return (pieces @ pieces.mT).sum(dim=0, dtype=wide)


def projected_shares(products: Tensor, generator: np.random.Generator) -> Tensor:
    """Return how much [K] of each task's gradient is in the sum of all projected ones."""
    count = len(products)
    shares = torch.eye(count, dtype=products.dtype, device=products.device)  # row i: task i in original gradients
    squared = products.diagonal()
    divisors = torch.where(squared > 0, squared, torch.inf)  # nothing is projected on a gradient of zero
    for i in range(count):
        for j in generator.permutation([other for other in range(count) if other != i]).tolist():
            conflict = (shares[i] @ products[:, j]).clamp_max(0.0)
            shares[i, j].addcdiv_(conflict, divisors[j], value=-1.0)
    return shares.sum(dim=0)
