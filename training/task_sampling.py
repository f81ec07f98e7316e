"""Task sampling: which task the next batch comes from.

A routine is a function of the seed, the epoch and the sizes of the tasks. Any epoch can be computed again at any time,
so resuming needs no state, and a test can compare an order with a written trace.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
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


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a routine depends on.

    An epoch has `rounds` rounds of a task. Each takes the share `fractions` of its examples (R0's partial Quora,
    appendix G). `from_epochs` is the first epoch, counted from 1, that trains the task (late Quora). Routines that draw
    their tasks make `steps_per_epoch` steps, by default as many as all rounds of an epoch take. `anneal` is the fall of
    the exponent over `epochs` (see `annealed_shares`).

    A pass goes through all examples of a task once. Rounds and draws take the examples that come next in it, also
    across epochs, so that nothing is seen twice before everything is seen once. Where an epoch begins follows from the
    plan alone.
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
        return [name for name in self.sizes if self.rounds[name] and epoch >= self.first_epoch(name)]

    def first_epoch(self, task: str) -> int:
        """Return the first epoch, counted from 0, that trains a task."""
        return self.from_epochs.get(task, 1) - 1

    def examples_in_round(self, task: str) -> int:
        """Return how many examples of a task a round takes."""
        return math.ceil(self.fractions.get(task, 1.0) * self.sizes[task])

    def batches_in_round(self, task: str) -> int:
        """Return how many batches a round of a task takes; one more if another pass begins within it."""
        return math.ceil(self.examples_in_round(task) / self.batch_size)


def pass_order(plan: Plan, task: str, number: int) -> np.ndarray:
    """Return the order [N] of a task's examples in a pass. Passes count from 0.

    The address of the random numbers names the epoch and the round that the pass is if rounds take all examples.
    """
    epochs, round = divmod(number, plan.rounds[task])
    address = [plan.seed, plan.first_epoch(task) + epochs, *task.encode(), round]
    return np.random.default_rng(address).permutation(plan.sizes[task])


def in_batches(plan: Plan, task: str, order: np.ndarray) -> Iterator[TaskBatch]:
    """Yield the examples of a pass, or of a part of it, in batches; the last one may be smaller."""
    for i in range(0, len(order), plan.batch_size):
        yield TaskBatch(task, order[i : i + plan.batch_size])


def round_batches(plan: Plan, epoch: int, task: str, round: int) -> list[TaskBatch]:
    """Return the batches of one round. No batch has examples of two passes."""
    number, size = (epoch - plan.first_epoch(task)) * plan.rounds[task] + round, plan.sizes[task]
    start = number * plan.examples_in_round(task)
    stop = start + plan.examples_in_round(task)
    batches: list[TaskBatch] = []
    for pass_number in range(start // size, math.ceil(stop / size)):
        first, last = (max(end - pass_number * size, 0) for end in (start, stop))
        batches += in_batches(plan, task, pass_order(plan, task, pass_number)[first:last])
    return batches


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


# ----------------------------------------------------------------------------------------------------------------------
# Batches that continue a pass, and the routines that draw tasks

Turns = Callable[[Plan, int], list[str]]  # the task of each batch of an epoch


@cache
def batch_counts(plan: Plan, turns: Turns, epoch: int) -> Counter[str]:
    """Return how many batches an epoch has of each task."""
    return Counter(turns(plan, epoch))


def endless_batches(plan: Plan, task: str, done: int) -> Iterator[TaskBatch]:
    """Yield the batches of a task, pass after pass, without the first `done` ones."""
    passes, skipped = divmod(done, math.ceil(plan.sizes[task] / plan.batch_size))
    for number in count(passes):
        yield from in_batches(plan, task, pass_order(plan, task, number)[skipped * plan.batch_size :])
        skipped = 0


def next_batches(plan: Plan, epoch: int, turns: Turns) -> list[TaskBatch]:
    """Return the batches of an epoch: of each task those after the batches that it had in earlier epochs."""
    done: Counter[str] = Counter()
    for earlier in range(epoch):
        done.update(batch_counts(plan, turns, earlier))
    streams = {name: endless_batches(plan, name, done[name]) for name in plan.sizes}
    return [next(streams[name]) for name in turns(plan, epoch)]


def steps_in(plan: Plan, epoch: int) -> int:
    """Return the number of steps of an epoch in which tasks are drawn."""
    rounds = sum(plan.rounds[name] * plan.batches_in_round(name) for name in plan.tasks_in(epoch))
    return plan.steps_per_epoch or rounds


def generator_of(plan: Plan, epoch: int, routine: str) -> np.random.Generator:
    """Return the generator that draws an epoch's tasks."""
    return np.random.default_rng([plan.seed, epoch, *routine.encode()])


def random_epoch_turns(plan: Plan, epoch: int) -> list[str]:
    """One task for the whole epoch, all equally likely (R1, section 4): one round of it, or --steps_per_epoch."""
    task = str(generator_of(plan, epoch, "random-epoch").choice(plan.tasks_in(epoch)))
    return [task] * (plan.steps_per_epoch or plan.batches_in_round(task))


def random_turns(plan: Plan, epoch: int) -> list[str]:
    """One task for each batch, all equally likely (R1, section 4.1)."""
    return generator_of(plan, epoch, "random").choice(plan.tasks_in(epoch), steps_in(plan, epoch)).tolist()


def round_robin_turns(plan: Plan, epoch: int) -> list[str]:
    """The tasks in turn, small ones as often as large ones (R1, section 4.1)."""
    return list(islice(cycle(plan.tasks_in(epoch)), steps_in(plan, epoch)))


def annealed_shares(plan: Plan, epoch: int) -> np.ndarray:
    """Return the probability of each task in `epoch`: proportional to N^a, a = 1 - anneal e/(E - 1), 0 <= e < E.

    R1, section 4.1, equation 1, after Stickland and Murray (2019). N counts the examples of a round. With one epoch,
    a is 1.
    """
    exponent = 1.0 - plan.anneal * epoch / max(plan.epochs - 1, 1)
    sizes = [plan.fractions.get(name, 1.0) * plan.sizes[name] for name in plan.tasks_in(epoch)]
    weights = np.array(sizes, dtype=np.float64) ** exponent
    return weights / weights.sum()


def annealed_turns(plan: Plan, epoch: int) -> list[str]:
    """One task for each batch: at first in proportion to their sizes, in the end almost evenly (R1, section 4.1)."""
    generator, shares = generator_of(plan, epoch, "annealed"), annealed_shares(plan, epoch)
    return generator.choice(plan.tasks_in(epoch), steps_in(plan, epoch), p=shares).tolist()


def drawing(turns: Turns) -> Callable[[Plan, int], list[Step]]:
    """Return the routine that makes a step on the next batch of each task that `turns` names."""
    return lambda plan, epoch: single_steps(next_batches(plan, epoch, turns))


# ----------------------------------------------------------------------------------------------------------------------
# Joint steps


def equal_parts(plan: Plan, epoch: int) -> list[Step]:
    """Joint steps on all tasks, cut to the number of examples of the smallest one, which each epoch draws anew."""
    names = plan.tasks_in(epoch)
    orders = [pass_order(plan, name, epoch - plan.first_epoch(name))[: plan.examples_in_round(name)] for name in names]
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


def joint_turns(plan: Plan, epoch: int) -> list[str]:
    """All tasks, for each of --steps_per_epoch steps, or until the rounds of one task are over."""
    names = plan.tasks_in(epoch)
    rounds = min(plan.rounds[name] * plan.batches_in_round(name) for name in names)
    return names * (plan.steps_per_epoch or rounds)


def joint(plan: Plan, epoch: int) -> list[Step]:
    """Steps on one batch of each task: on equal parts of them (R3, section 4.2), or on all examples (R4, section 4.1).

    With --steps_per_epoch or several rounds of a task, the passes go on as where tasks are drawn, so that the smaller
    tasks begin again while the largest is gone through.
    """
    if plan.steps_per_epoch is None and max(plan.rounds.values()) == 1:
        return equal_parts(plan, epoch)
    names, batches = plan.tasks_in(epoch), next_batches(plan, epoch, joint_turns)
    return [Step(tuple(batches[i : i + len(names)])) for i in range(0, len(batches), len(names))]


ROUTINES: dict[str, Callable[[Plan, int], list[Step]]] = {
    "sequential": sequential,
    "interleave": interleave,
    "random-epoch": drawing(random_epoch_turns),
    "random": drawing(random_turns),
    "round-robin": drawing(round_robin_turns),
    "annealed": drawing(annealed_turns),
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
