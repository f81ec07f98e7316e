"""Routines: which task the next batch comes from.

A routine is a function of (seed, epoch) and the sizes of the tasks alone, so any epoch can be made again at any time:
resuming needs no state, and an order can be tested against a written trace.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from config import TaskOptions, TrainOptions


@dataclass(frozen=True)
class Step:
    """One optimizer step: a task and the examples of its batch."""

    task: str
    indices: np.ndarray  # [B] int64


@dataclass(frozen=True)
class Plan:
    """What a routine needs to know of the run and of each task.

    `rounds` is how often a task is gone through per epoch, `fractions` the share of it in each round (R0's partial
    Quora, appendix G), `from_epochs` the first epoch, counted from 1, that has it (late Quora).
    """

    seed: int
    batch_size: int
    sizes: Mapping[str, int]
    rounds: Mapping[str, int]
    fractions: Mapping[str, float] = field(default_factory=dict)
    from_epochs: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, options: TrainOptions, tasks: Mapping[str, TaskOptions], sizes: Mapping[str, int]) -> "Plan":
        """What the flags ask for, with `sizes` examples of each task."""
        return cls(
            options.seed,
            options.batch_size,
            sizes,
            {name: own.num_trains for name, own in tasks.items()},
            {name: own.fraction for name, own in tasks.items()},
            {name: own.from_epoch for name, own in tasks.items()},
        )


def shuffled(plan: Plan, epoch: int, task: str, round: int) -> np.ndarray:
    """The order [N] of a task's examples in one round of one epoch, of as many as its fraction says."""
    address = [plan.seed, epoch, *task.encode(), round]
    order = np.random.default_rng(address).permutation(plan.sizes[task])
    return order[: math.ceil(plan.fractions.get(task, 1.0) * len(order))]


def task_batches(plan: Plan, epoch: int, task: str) -> list[Step]:
    """All batches of a task in one epoch, round after round; the last batch of a round may be smaller."""
    steps = []
    for round in range(plan.rounds[task] if epoch + 1 >= plan.from_epochs.get(task, 1) else 0):
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
