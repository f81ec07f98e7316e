"""Gradient surgery (PCGrad: Yu et al. 2020, Algorithm 1): conflicting tasks give up the conflicting part of a gradient.

Every projected gradient is a combination of the tasks' gradients, so the inner products of the gradients decide all
projections. Memory is passed over once for the products and once for the result.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

Gradient = Sequence[Tensor | None]  # one tensor for each parameter; None if the task does not reach it


def detach_gradients(parameters: Sequence[nn.Parameter]) -> Gradient:
    """Return copies of the gradients and clear them.

    Copies, since the next backward pass writes to the memory of a gradient that DistributedDataParallel or a CUDA graph
    has made.
    """
    gradient = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradient


def assign_gradients(parameters: Sequence[nn.Parameter], gradient: Gradient) -> None:
    """Give the parameters this gradient."""
    for parameter, part in zip(parameters, gradient, strict=True):
        parameter.grad = part


def pcgrad(gradients: Sequence[Gradient], generator: np.random.Generator) -> tuple[Gradient, Tensor]:
    """Return the sum of the tasks' projected gradients, and the number of pairs of tasks in conflict.

    Task i goes through the other tasks in an order drawn from `generator`. Where its gradient, as projected so far, has
    a negative product with the original gradient of task j, it loses its part along that gradient. The host does not
    wait for the device.
    """
    products = inner_products(gradients)
    conflicts = (products < 0).sum() / 2
    return combine(gradients, projected_shares(products, generator)), conflicts


def inner_products(gradients: Sequence[Gradient]) -> Tensor:
    """Return the products [K, K] of the gradients of K tasks over all parameters, in float64."""
    count = len(gradients)
    device = next(part.device for gradient in gradients for part in gradient if part is not None)
    products = torch.zeros(count, count, dtype=torch.float64, device=device)
    for i in range(count):
        for j in range(i + 1):
            pairs = zip(gradients[i], gradients[j], strict=True)
            # float64 begins after each dot product: a copy of the gradients would cost more than it gives
            parts = [torch.dot(a.flatten(), b.flatten()) for a, b in pairs if a is not None and b is not None]
            if parts:
                products[i, j] = products[j, i] = torch.stack(parts).double().sum()
    return products


def projected_shares(products: Tensor, generator: np.random.Generator) -> Tensor:
    """Return how much [K] of each task's gradient is in the sum of all projected ones."""
    count = len(products)
    shares = torch.eye(count, dtype=products.dtype, device=products.device)  # row i: task i in original gradients
    for i in range(count):
        for j in generator.permutation([other for other in range(count) if other != i]).tolist():
            conflict = (shares[i] @ products[:, j]).clamp_max(0.0)
            squared = products[j, j]
            shares[i, j] -= torch.where(squared > 0, conflict / squared, 0.0)
    return shares.sum(dim=0)


def combine(gradients: Sequence[Gradient], shares: Tensor) -> Gradient:
    """Return the sum of the tasks' gradients by their shares [K]; None where no task has a gradient."""
    combined: list[Tensor | None] = []
    for parts in zip(*gradients, strict=True):
        scaled = [part * share.to(part.dtype) for part, share in zip(parts, shares, strict=True) if part is not None]
        combined.append(torch.stack(scaled).sum(dim=0) if scaled else None)
    return combined
