"""Gradient surgery (PCGrad: Yu et al. 2020, Algorithm 1): tasks whose gradients conflict give up the conflicting part.

Each projection is a combination of the tasks' own gradients, so all of them are decided by the gradients' inner
products; memory is passed over once for these and once for the result.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Gradient = Sequence[Tensor | None]  # one tensor for each parameter; None where the task does not reach it


def inner_products(gradients: Sequence[Gradient]) -> Tensor:
    """The products [K, K] of the gradients of K tasks over all parameters, float64."""
    count = len(gradients)
    device = next(own.device for gradient in gradients for own in gradient if own is not None)
    products = torch.zeros(count, count, dtype=torch.float64, device=device)
    for i in range(count):
        for j in range(i + 1):
            pairs = zip(gradients[i], gradients[j], strict=True)
            # in float64 only after each dot product: a copy of the gradients in it would cost more than it gives
            parts = [torch.dot(a.flatten(), b.flatten()) for a, b in pairs if a is not None and b is not None]
            if parts:
                products[i, j] = products[j, i] = torch.stack(parts).double().sum()
    return products


def projected_shares(products: Tensor, order: np.random.Generator) -> Tensor:
    """How much [K] of each task's gradient is in the sum of all projected ones.

    Task i goes through the others in an order drawn from `order`, and where its gradient, as projected so far, has a
    negative product with the original one of task j, it loses its part along that. Nothing waits for the device.
    """
    count = len(products)
    shares = torch.eye(count, dtype=products.dtype, device=products.device)  # row i: task i's gradient in originals
    for i in range(count):
        for j in order.permutation([other for other in range(count) if other != i]).tolist():
            conflict = (shares[i] @ products[:, j]).clamp_max(0.0)
            squared = products[j, j]
            shares[i, j] -= torch.where(squared > 0, conflict / squared, 0.0)
    return shares.sum(dim=0)


def combine(gradients: Sequence[Gradient], shares: Tensor) -> list[Tensor | None]:
    """The sum of the tasks' gradients by their shares [K]; None where no task has one."""
    out: list[Tensor | None] = []
    for of_parameter in zip(*gradients, strict=True):
        having = [(own, share) for own, share in zip(of_parameter, shares, strict=True) if own is not None]
        out.append(torch.stack([own * share.to(own.dtype) for own, share in having]).sum(dim=0) if having else None)
    return out


def conflicts(products: Tensor) -> tuple[Tensor, int]:
    """How many pairs of tasks have gradients with a negative product, and how many pairs there are."""
    count = len(products)
    return (products < 0).sum() / 2, count * (count - 1) // 2


class NoSurgery:
    """What the loop talks to without --pcgrad: the gradients of the tasks add up where they are."""

    per_task = False  # whether the gradient of each task has to be whole, and not only that of a step

    def take(self) -> None:
        """Take the gradient of one task off the parameters."""

    def put(self) -> None:
        """Give the parameters the gradient to move by."""

    def conflicting(self) -> float | None:
        """The share of conflicting pairs since it was last asked for."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs between two steps that move the weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned."""


class PCGrad(NoSurgery):
    """Collects the tasks' gradients of a joint step and combines them."""

    per_task = True

    def __init__(self, parameters: Sequence[nn.Parameter], seed: int) -> None:
        self.parameters, self.seed = parameters, seed
        self.gradients: list[Gradient] = []
        self.steps = 0
        self.found: Tensor | float = 0.0  # pairs in conflict, not fetched from the device before somebody asks
        self.pairs = 0

    def take(self) -> None:
        """Take the gradient of one task off the parameters."""
        gradient = [parameter.grad for parameter in self.parameters]
        if all(own is None for own in gradient):  # all that the task has is frozen
            return
        self.gradients.append(gradient)
        for parameter in self.parameters:
            parameter.grad = None

    def put(self) -> None:
        """Give the parameters the sum of the projected gradients; the order is one of (seed, step)."""
        if not self.gradients:  # nothing of what these tasks have trains in this epoch
            return
        products = inner_products(self.gradients)
        order = np.random.default_rng([self.seed, self.steps])
        found, pairs = conflicts(products)
        self.found, self.pairs = self.found + found, self.pairs + pairs
        combined = combine(self.gradients, projected_shares(products, order))
        for parameter, own in zip(self.parameters, combined, strict=True):
            parameter.grad = own
        self.gradients = []
        self.steps += 1

    def conflicting(self) -> float | None:
        """The share of conflicting pairs since it was last asked for; None where there was no pair."""
        share = float(self.found) / self.pairs if self.pairs else None
        self.found, self.pairs = 0.0, 0
        return share

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, which addresses the next one's order, and the pairs counted so far."""
        return {"steps": self.steps, "found": float(self.found), "pairs": self.pairs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        self.steps, self.found, self.pairs = state["steps"], state["found"], state["pairs"]
