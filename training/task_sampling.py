"""Routines: which task the next batch comes from.

A routine is a function of (seed, epoch) and the sizes of the tasks alone, so any epoch can be made again at any time:
resuming needs no state, and an order can be tested against a written trace.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, cycle, islice, zip_longest

import numpy as np

from config import TaskOptions, TrainOptions


@dataclass(frozen=True)
class Step:
    """A batch of a task. Its loss counts by `share`; gradients add up until a batch that `moves` the weights."""

    task: str
    indices: np.ndarray  # [B] int64
    share: float = 1.0
    moves: bool = True


@dataclass(frozen=True)
class Plan:
    """What a routine needs to know of the run and of each task.

    `rounds` is how often a task is gone through per epoch, `fractions` the share of it in each round (R0's partial
    Quora, appendix G), `from_epochs` the first epoch, counted from 1, that has it (late Quora). Routines that draw
    their tasks make `steps_per_epoch` steps, else as many as going through every task would; `anneal` is the
    exponent's fall over `epochs` (see `annealed_shares`).
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
        """What the flags ask for, with `sizes` examples of each task."""
        return cls(
            options.seed,
            options.batch_size,
            sizes,
            {name: own.num_trains for name, own in tasks.items()},
            {name: own.fraction for name, own in tasks.items()},
            {name: own.from_epoch for name, own in tasks.items()},
            options.epochs,
            options.steps_per_epoch,
            options.anneal_factor,
        )

    def tasks_in(self, epoch: int) -> list[str]:
        """The tasks that train in `epoch`, counted from 0."""
        return [name for name in self.sizes if self.rounds[name] and epoch + 1 >= self.from_epochs.get(name, 1)]


def shuffled(plan: Plan, epoch: int, task: str, round: int) -> np.ndarray:
    """The order [N] of a task's examples in one round of one epoch, of as many as its fraction says."""
    address = [plan.seed, epoch, *task.encode(), round]
    order = np.random.default_rng(address).permutation(plan.sizes[task])
    return order[: math.ceil(plan.fractions.get(task, 1.0) * len(order))]


def round_batches(plan: Plan, epoch: int, task: str, round: int) -> list[Step]:
    """The batches of one round; the last one may be smaller."""
    order = shuffled(plan, epoch, task, round)
    return [Step(task, order[i : i + plan.batch_size]) for i in range(0, len(order), plan.batch_size)]


def task_batches(plan: Plan, epoch: int, task: str) -> list[Step]:
    """All batches of a task in one epoch, round after round."""
    rounds = range(plan.rounds[task] if task in plan.tasks_in(epoch) else 0)
    return [step for round in rounds for step in round_batches(plan, epoch, task, round)]


def sequential(plan: Plan, epoch: int) -> list[Step]:
    """All of the first task, then all of the second, and so on (R0, section 4.1)."""
    return [step for task in plan.sizes for step in task_batches(plan, epoch, task)]


def interleave(plan: Plan, epoch: int) -> list[Step]:
    """A batch of each task in turn (R0, appendix K); tasks that have run out are passed over until all have."""
    turns = zip_longest(*(task_batches(plan, epoch, task) for task in plan.sizes))
    return [step for turn in turns for step in turn if step is not None]


def endless_batches(plan: Plan, epoch: int, task: str) -> Iterator[Step]:
    """Round after round of a task."""
    for round in count():
        yield from round_batches(plan, epoch, task, round)


def drawn(plan: Plan, epoch: int, names: Iterable[str]) -> list[Step]:
    """The next batch of each named task in turn; a task that has run out begins another round."""
    streams = {name: endless_batches(plan, epoch, name) for name in plan.sizes}
    return [next(streams[name]) for name in names]


def steps_in(plan: Plan, epoch: int) -> int:
    """Steps of an epoch in which tasks are drawn."""
    return plan.steps_per_epoch or len(sequential(plan, epoch))


def draws(plan: Plan, epoch: int, routine: str) -> np.random.Generator:
    """The generator that draws an epoch's tasks."""
    return np.random.default_rng([plan.seed, epoch, *routine.encode()])


def random_epoch(plan: Plan, epoch: int) -> list[Step]:
    """One task for the whole epoch, each as likely (R1, section 4): one round of it, or --steps_per_epoch."""
    task = draws(plan, epoch, "random-epoch").choice(plan.tasks_in(epoch))
    return drawn(plan, epoch, [task] * (plan.steps_per_epoch or len(round_batches(plan, epoch, task, 0))))


def random(plan: Plan, epoch: int) -> list[Step]:
    """Another task for each batch, each as likely (R1, section 4.1)."""
    return drawn(plan, epoch, draws(plan, epoch, "random").choice(plan.tasks_in(epoch), steps_in(plan, epoch)))


def round_robin(plan: Plan, epoch: int) -> list[Step]:
    """The tasks in turn, the small ones as often as the large ones (R1, section 4.1)."""
    return drawn(plan, epoch, islice(cycle(plan.tasks_in(epoch)), steps_in(plan, epoch)))


def annealed_shares(plan: Plan, epoch: int) -> np.ndarray:
    """Probability of each task of `epoch`: in proportion to N^a, a = 1 - anneal e/(E - 1) with e from 0 to E - 1.

    R1, section 4.1, equation 1, after Stickland and Murray (2019). N counts what a round has. A single epoch has a = 1.
    """
    exponent = 1.0 - plan.anneal * epoch / max(plan.epochs - 1, 1)
    sizes = [plan.fractions.get(name, 1.0) * plan.sizes[name] for name in plan.tasks_in(epoch)]
    weights = np.array(sizes, dtype=np.float64) ** exponent
    return weights / weights.sum()


def annealed(plan: Plan, epoch: int) -> list[Step]:
    """Another task for each batch, at first in proportion to their sizes and in the end nearly evenly."""
    generator, shares = draws(plan, epoch, "annealed"), annealed_shares(plan, epoch)
    return drawn(plan, epoch, generator.choice(plan.tasks_in(epoch), steps_in(plan, epoch), p=shares))


def joint(plan: Plan, epoch: int) -> list[Step]:
    """A batch of each task, then one step on the mean of their losses (R3, section 4.2).

    All tasks are cut to the smallest one's number of examples, which are others in each epoch.
    """
    names = plan.tasks_in(epoch)
    orders = [shuffled(plan, epoch, name, 0) for name in names]
    smallest = min(map(len, orders))
    return [
        Step(name, order[i : min(i + plan.batch_size, smallest)], 1 / len(names), moves=name == names[-1])
        for i in range(0, smallest, plan.batch_size)
        for name, order in zip(names, orders, strict=True)
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
    """How often `epochs` epochs go through each task."""
    examples = dict.fromkeys(plan.sizes, 0)
    for epoch in range(epochs):
        for step in ROUTINES[routine](plan, epoch):
            examples[step.task] += len(step.indices)
    return {name: seen / plan.sizes[name] for name, seen in examples.items()}
