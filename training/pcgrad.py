"""Gradient surgery (PCGrad: Yu et al. 2020, Algorithm 1): conflicting tasks give up the conflicting part of a gradient.

Every projected gradient is a combination of the tasks' gradients, so the inner products of the gradients decide all
projections. Memory is passed over once for the products and once for the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

ALIGNMENT = 16  # each part begins at a multiple of so many numbers, as aligned as memory that torch allocates for it


@dataclass(frozen=True)
class FlatGradient:
    """The gradient of a task in one piece of memory: a GPU then needs one launch, not one for each parameter."""

    numbers: Tensor  # [N], zero where there is no gradient
    parts: list[Tensor]  # views of `numbers` in the shapes of the parameters
    reached: list[bool]  # whether the task reaches each parameter


def flat_gradient(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> FlatGradient:
    """Return a copy of the gradients of some parameters; None stands for a parameter that the task does not reach."""
    sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
    numbers = parameters[0].new_zeros(sum(sizes)) if parameters else torch.zeros(0)
    parts = [
        space[: parameter.numel()].view(parameter.shape)
        for space, parameter in zip(numbers.split(sizes), parameters, strict=True)
    ]
    reached = [gradient is not None for gradient in gradients]
    if any(reached):
        into = [part for part, gradient in zip(parts, gradients, strict=True) if gradient is not None]
        torch._foreach_copy_(into, [gradient for gradient in gradients if gradient is not None])
    return FlatGradient(numbers, parts, reached)


@torch.no_grad()
def detach_gradients(parameters: Sequence[nn.Parameter]) -> FlatGradient:
    """Return a copy of the gradients and clear them.

    A copy, since the next backward pass writes to the memory of a gradient that DistributedDataParallel or a CUDA graph
    has made.
    """
    flat = flat_gradient([parameter.grad for parameter in parameters], parameters)
    for parameter in parameters:
        parameter.grad = None
    return flat


def assign_gradients(parameters: Sequence[nn.Parameter], gradient: FlatGradient) -> None:
    """Give the parameters this gradient, and none to those that it does not reach."""
    for parameter, part, reached in zip(parameters, gradient.parts, gradient.reached, strict=True):
        parameter.grad = part if reached else None


@torch.no_grad()
def pcgrad(gradients: Sequence[FlatGradient], generator: np.random.Generator) -> tuple[FlatGradient, Tensor]:
    """Return the sum of the tasks' projected gradients, and the number of pairs of tasks in conflict.

    Task i goes through the other tasks in an order drawn from `generator`. Where its gradient, as projected so far, has
    a negative product with the original gradient of task j, it loses its part along that gradient. The host does not
    wait for the device. The sum takes the memory of `gradients`.
    """
    products = inner_products(gradients)
    conflicts = (products < 0).sum() / 2
    return combine(gradients, projected_shares(products, generator)), conflicts


def inner_products(gradients: Sequence[FlatGradient]) -> Tensor:
    """Return the products [K, K] of the gradients of K tasks over all parameters, in float64 if the device has it."""
    count = len(gradients)
    found = {(i, j): dot(gradients[i], gradients[j]) for i in range(count) for j in range(i + 1)}
    products = torch.stack([found[max(i, j), min(i, j)] for i in range(count) for j in range(count)])
    return (products if products.device.type == "mps" else products.double()).view(count, count)


def dot(a: FlatGradient, b: FlatGradient) -> Tensor:
    """Return the inner product of two gradients. On a CPU, the products of the parameters are added in float64."""
    if a.numbers.device.type != "cpu":
        return torch.dot(a.numbers, b.numbers)
    both = [x and y for x, y in zip(a.reached, b.reached, strict=True)]
    parts = [torch.dot(x.flatten(), y.flatten()) for x, y, use in zip(a.parts, b.parts, both, strict=True) if use]
    return torch.stack(parts).double().sum() if parts else torch.zeros((), dtype=torch.float64)


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


def combine(gradients: Sequence[FlatGradient], shares: Tensor) -> FlatGradient:
    """Return the sum of the tasks' gradients by their shares [K], in the memory of the first."""
    numbers = [gradient.numbers for gradient in gradients]
    for task, share in zip(numbers, shares.to(numbers[0].dtype), strict=True):
        task.mul_(share)
    for task in numbers[1:]:
        numbers[0].add_(task)
    reached = [any(tasks) for tasks in zip(*(gradient.reached for gradient in gradients), strict=True)]
    return FlatGradient(numbers[0], gradients[0].parts, reached)
