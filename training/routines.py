"""Routines: which task the next batch comes from.

A routine is a function of (seed, epoch) and the sizes of the tasks alone, so any epoch can be made again at any time:
resuming needs no state, and an order can be tested against a written trace.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np


@dataclass(frozen=True)
class Step:
    """One optimizer step: a task and the examples of its batch."""

    task: str
    indices: np.ndarray  # [B] int64


@dataclass(frozen=True)
class Plan:
    """What a routine needs to know. `sizes` and `rounds` map each task to its examples and rounds per epoch."""

    seed: int
    batch_size: int
    sizes: Mapping[str, int]
    rounds: Mapping[str, int]


def shuffled(plan: Plan, epoch: int, task: str, round: int) -> np.ndarray:
    """The order [N] of a task's examples in one round of one epoch."""
    address = [plan.seed, epoch, *task.encode(), round]
    return np.random.default_rng(address).permutation(plan.sizes[task])


def task_batches(plan: Plan, epoch: int, task: str) -> list[Step]:
    """All batches of a task in one epoch, round after round; the last batch of a round may be smaller."""
    steps = []
    for round in range(plan.rounds[task]):
        order = shuffled(plan, epoch, task, round)
        steps += [Step(task, order[i : i + plan.batch_size]) for i in range(0, len(order), plan.batch_size)]
    return steps


def sequential(plan: Plan, epoch: int) -> list[Step]:
    """All of the first task, then all of the second, and so on (R0, section 4.1)."""
    return [step for task in plan.sizes for step in task_batches(plan, epoch, task)]


def interleave(plan: Plan, epoch: int) -> list[Step]:
    """A batch of each task in turn (R0, appendix K); tasks that have run out are passed over until all have."""
    turns = zip_longest(*(task_batches(plan, epoch, task) for task in plan.sizes))
    return [step for turn in turns for step in turn if step is not None]


ROUTINES: dict[str, Callable[[Plan, int], list[Step]]] = {"sequential": sequential, "interleave": interleave}
