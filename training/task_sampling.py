"""Task sampling: which task the next batch comes from.

A routine is a function of the seed, the epoch and the sizes of the tasks. Any epoch can be computed again at any time,
so resuming needs no state, and a test can compare an order with a written trace.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, cycle, islice, zip_longest

import numpy as np

from config import TaskOptions, TrainOptions


@dataclass(frozen=True)
class TaskBatch:
    """The examples of one task that pass through the model together."""

    task: str
    indices: np.ndarray  # [B] int64, numbers of training examples


@dataclass(frozen=True)
class Step:
    """One optimizer step: one batch or, in the joint routine, one batch of each task, whose mean loss is minimised."""

    batches: tuple[TaskBatch, ...]


@dataclass(frozen=True)
class Plan:
    """All that a routine depends on.

    A task is gone through `rounds` times an epoch. Each round takes the share `fractions` of its examples (R0's partial
    Quora, appendix G). `from_epochs` is the first epoch, counted from 1, that trains the task (late Quora). Routines
    that draw their tasks make `steps_per_epoch` steps, by default as many as going through every task takes. `anneal`
    is the fall of the exponent over `epochs` (see `annealed_shares`).
    """

    seed: int
    batch_size: int
    sizes: Mapping[str, int]
    rounds: Mapping[str, int]
    fractions: Mapping[str, float] = field(default_factory=dict)
    from_epochs: Mapping[str, int] = field(default_factory=dict)
    epochs: int = 1
    steps_per_epoch: int | None = None
    anneal: float = 0.8

    @classmethod
    def of(cls, options: TrainOptions, tasks: Mapping[str, TaskOptions], sizes: Mapping[str, int]) -> "Plan":
        """Return the plan that the flags ask for, with `sizes` examples of each task."""
        return cls(
            options.seed,
            options.batch_size,
            sizes,
            {name: task.num_trains for name, task in tasks.items()},
            {name: task.fraction for name, task in tasks.items()},
            {name: task.from_epoch for name, task in tasks.items()},
            options.epochs,
            options.steps_per_epoch,
            options.anneal_factor,
        )

    def tasks_in(self, epoch: int) -> list[str]:
        """Return the tasks that train in `epoch`, counted from 0."""
        return [name for name in self.sizes if self.rounds[name] and epoch + 1 >= self.from_epochs.get(name, 1)]


def shuffled(plan: Plan, epoch: int, task: str, round: int) -> np.ndarray:
    """Return the order [N] of a task's examples in one round of one epoch, cut to the task's fraction."""
    address = [plan.seed, epoch, *task.encode(), round]
    order = np.random.default_rng(address).permutation(plan.sizes[task])
    return order[: math.ceil(plan.fractions.get(task, 1.0) * len(order))]


def round_batches(plan: Plan, epoch: int, task: str, round: int) -> list[TaskBatch]:
    """Return the batches of one round; the last one may be smaller."""
    order = shuffled(plan, epoch, task, round)
    return [TaskBatch(task, order[i : i + plan.batch_size]) for i in range(0, len(order), plan.batch_size)]


def task_batches(plan: Plan, epoch: int, task: str) -> list[TaskBatch]:
    """Return all batches of a task in one epoch, round after round."""
    rounds = range(plan.rounds[task] if task in plan.tasks_in(epoch) else 0)
    return [batch for round in rounds for batch in round_batches(plan, epoch, task, round)]


def single_steps(batches: Iterable[TaskBatch]) -> list[Step]:
    """Return one optimizer step for each batch."""
    return [Step((batch,)) for batch in batches]


def sequential(plan: Plan, epoch: int) -> list[Step]:
    """All of the first task, then all of the second, and so on (R0, section 4.1)."""
    return single_steps(batch for task in plan.sizes for batch in task_batches(plan, epoch, task))


def interleave(plan: Plan, epoch: int) -> list[Step]:
    """One batch of each task in turn (R0, appendix K). A task that has run out is passed over until all have."""
    turns = zip_longest(*(task_batches(plan, epoch, task) for task in plan.sizes))
    return single_steps(batch for turn in turns for batch in turn if batch is not None)


def endless_batches(plan: Plan, epoch: int, task: str) -> Iterator[TaskBatch]:
    """Yield the batches of a task, round after round."""
    for round in count():
        yield from round_batches(plan, epoch, task, round)


def drawn(plan: Plan, epoch: int, names: Iterable[str]) -> list[Step]:
    """Return the next batch of each named task in turn; a task that has run out begins another round."""
    streams = {name: endless_batches(plan, epoch, name) for name in plan.sizes}
    return single_steps(next(streams[name]) for name in names)


def steps_in(plan: Plan, epoch: int) -> int:
    """Return the number of steps of an epoch in which tasks are drawn."""
    return plan.steps_per_epoch or len(sequential(plan, epoch))


def draws(plan: Plan, epoch: int, routine: str) -> np.random.Generator:
    """Return the generator that draws an epoch's tasks."""
    return np.random.default_rng([plan.seed, epoch, *routine.encode()])


def random_epoch(plan: Plan, epoch: int) -> list[Step]:
    """One task for the whole epoch, all equally likely (R1, section 4): one round of it, or --steps_per_epoch."""
    task = draws(plan, epoch, "random-epoch").choice(plan.tasks_in(epoch))
    return drawn(plan, epoch, [task] * (plan.steps_per_epoch or len(round_batches(plan, epoch, task, 0))))


def random(plan: Plan, epoch: int) -> list[Step]:
    """One task for each batch, all equally likely (R1, section 4.1)."""
    return drawn(plan, epoch, draws(plan, epoch, "random").choice(plan.tasks_in(epoch), steps_in(plan, epoch)))


def round_robin(plan: Plan, epoch: int) -> list[Step]:
    """The tasks in turn, small ones as often as large ones (R1, section 4.1)."""
    return drawn(plan, epoch, islice(cycle(plan.tasks_in(epoch)), steps_in(plan, epoch)))


def annealed_shares(plan: Plan, epoch: int) -> np.ndarray:
    """Return the probability of each task in `epoch`: proportional to N^a, a = 1 - anneal e/(E - 1), 0 <= e < E.

    R1, section 4.1, equation 1, after Stickland and Murray (2019). N counts the examples of a round. With one epoch,
    a is 1.
    """
    exponent = 1.0 - plan.anneal * epoch / max(plan.epochs - 1, 1)
    sizes = [plan.fractions.get(name, 1.0) * plan.sizes[name] for name in plan.tasks_in(epoch)]
    weights = np.array(sizes, dtype=np.float64) ** exponent
    return weights / weights.sum()


def annealed(plan: Plan, epoch: int) -> list[Step]:
    """One task for each batch: at first in proportion to their sizes, in the end almost evenly (R1, section 4.1)."""
    generator, shares = draws(plan, epoch, "annealed"), annealed_shares(plan, epoch)
    return drawn(plan, epoch, generator.choice(plan.tasks_in(epoch), steps_in(plan, epoch), p=shares))


def joint(plan: Plan, epoch: int) -> list[Step]:
    """Steps on one batch of each task (R3, section 4.2).

    All tasks are cut to the number of examples of the smallest one. Each epoch draws these examples anew.
    """
    names = plan.tasks_in(epoch)
    orders = [shuffled(plan, epoch, name, 0) for name in names]
    smallest = min(map(len, orders))
    return [
        Step(
            tuple(
                TaskBatch(name, order[i : min(i + plan.batch_size, smallest)])
                for name, order in zip(names, orders, strict=True)
            )
        )
        for i in range(0, smallest, plan.batch_size)
    ]


ROUTINES: dict[str, Callable[[Plan, int], list[Step]]] = {
    "sequential": sequential,
    "interleave": interleave,
    "random-epoch": random_epoch,
    "random": random,
    "round-robin": round_robin,
    "annealed": annealed,
    "joint": joint,
}


def passes(plan: Plan, routine: str, epochs: int) -> dict[str, float]:
    """Return how often `epochs` epochs go through each task."""
    examples = dict.fromkeys(plan.sizes, 0)
    for epoch in range(epochs):
        for step in ROUTINES[routine](plan, epoch):
            for batch in step.batches:
                examples[batch.task] += len(batch.indices)
    return {name: seen / plan.sizes[name] for name, seen in examples.items()}
