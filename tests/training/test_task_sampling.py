"""Routines: orders of tasks as written traces, and what each of the batches holds."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import DRAWING_ROUTINES
from training.task_sampling import (
    ROUTINES,
    Plan,
    Step,
    TaskBatch,
    annealed_shares,
    interleave,
    joint,
    pass_order,
    passes,
    sequential,
    task_batches,
)

SIZES = {"sst": 5, "para": 7, "sts": 3}
ROUNDS = {"sst": 2, "para": 1, "sts": 5}  # Run it Back
PLAN = Plan(seed=11711, batch_size=2, sizes=SIZES, rounds=ROUNDS)
ONCE = Plan(seed=11711, batch_size=2, sizes=SIZES, rounds=dict.fromkeys(SIZES, 1))

WHOLE = (sequential, interleave)  # go through each task a given number of times
DRAWING = {name: routine for name, routine in ROUTINES.items() if routine not in (*WHOLE, joint)}


def trace(steps: list[Step]) -> list[tuple[str, int]]:
    """Return task and size of each batch."""
    return [(batch.task, len(batch.indices)) for step in steps for batch in step.batches]


def order(steps: list[Step], task: str) -> list[int]:
    """Return the examples of a task in the order in which they come."""
    return [int(i) for step in steps for batch in step.batches if batch.task == task for i in batch.indices]


def tasks(steps: list[Step]) -> list[str]:
    """Return the task of each step."""
    return [step.batches[0].task for step in steps]


def test_sequential_trace_with_rounds() -> None:
    assert trace(sequential(PLAN, 3)) == [
        ("sst", 2), ("sst", 2), ("sst", 1), ("sst", 2), ("sst", 2), ("sst", 1),
        ("para", 2), ("para", 2), ("para", 2), ("para", 1),
        ("sts", 2), ("sts", 1), ("sts", 2), ("sts", 1), ("sts", 2), ("sts", 1), ("sts", 2), ("sts", 1),
        ("sts", 2), ("sts", 1),
    ]  # fmt: skip


def test_interleave_trace_goes_on_past_the_shortest() -> None:
    assert trace(interleave(PLAN, 0)) == [
        ("sst", 2), ("para", 2), ("sts", 2),
        ("sst", 2), ("para", 2), ("sts", 1),
        ("sst", 1), ("para", 2), ("sts", 2),
        ("sst", 2), ("para", 1), ("sts", 1),
        ("sst", 2), ("sts", 2),
        ("sst", 1), ("sts", 1),
        ("sts", 2),
        ("sts", 1),
        ("sts", 2),
        ("sts", 1),
    ]  # fmt: skip


def test_round_robin_trace_begins_again_with_the_short_ones() -> None:
    assert trace(DRAWING["round-robin"](replace(ONCE, steps_per_epoch=11), 0)) == [
        ("sst", 2), ("para", 2), ("sts", 2),
        ("sst", 2), ("para", 2), ("sts", 1),
        ("sst", 1), ("para", 2), ("sts", 2),
        ("sst", 2), ("para", 1),
    ]  # fmt: skip


def test_joint_trace_cuts_the_tasks_to_the_smallest() -> None:
    steps = joint(ONCE, 0)
    assert [trace([step]) for step in steps] == [
        [("sst", 2), ("para", 2), ("sts", 2)],
        [("sst", 1), ("para", 1), ("sts", 1)],
    ]


def test_golden_orders() -> None:
    """The very numbers and draws: a changed address would make old runs impossible to repeat or resume."""
    assert [order(sequential(ONCE, epoch), "para") for epoch in (0, 1)] == [
        [3, 5, 2, 4, 1, 6, 0],
        [3, 1, 0, 5, 6, 2, 4],
    ]
    assert {routine: tasks(DRAWING[routine](ONCE, 1)) for routine in ("random", "annealed")} == {
        "random": ["para", "sst", "para", "sts", "sst", "sts", "sst", "sst", "para"],
        "annealed": ["sts", "sts", "sst", "sst", "sts", "sst", "sts", "para", "sts"],
    }


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    rounds=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    batch_size=st.integers(1, 17),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 30),
)
def test_any_plan_is_kept(sizes: list[int], rounds: list[int], batch_size: int, seed: int, epoch: int) -> None:
    """Each example comes once a round, in the same batches whatever the order of the tasks."""
    names = ["sst", "para", "sts", "cfimdb"][: len(sizes)]
    plan = Plan(seed, batch_size, dict(zip(names, sizes, strict=True)), dict(zip(names, rounds, strict=False)))
    for routine in WHOLE:
        steps = routine(plan, epoch)
        assert all(len(step.batches) == 1 and step.batches[0].indices.dtype == np.int64 for step in steps)
        for name, size in plan.sizes.items():
            found = order(steps, name)
            assert found == order(sequential(plan, epoch), name)
            for number in range(plan.rounds[name]):
                assert sorted(found[number * size : (number + 1) * size]) == list(range(size))
            sizes_of_round = [batch_size] * (size // batch_size) + [size % batch_size] * (size % batch_size > 0)
            assert [n for task, n in trace(steps) if task == name] == sizes_of_round * plan.rounds[name]


def test_orders_differ_between_passes_tasks_and_seeds() -> None:
    """Nor do addresses run into each other: "s" and 116 are not what another name and round spell."""
    sizes = {"s": 100, "st": 100, "sts": 100}
    orders = {
        tuple(pass_order(Plan(seed, 8, sizes, dict.fromkeys(sizes, 117)), task, number).tolist())
        for seed in (0, 1, 2)
        for task in sizes
        for number in (*range(3), *range(115, 120), 232, 233)
    }
    assert len(orders) == 3 * 3 * 10 and all(sorted(one) == list(range(100)) for one in orders)


def counts_stay_even(batches: list[TaskBatch], sizes: dict[str, int]) -> bool:
    """Whether after each batch the numbers of times that two examples of a task have come differ by at most 1."""
    counts = {task: np.zeros(size, dtype=int) for task, size in sizes.items()}
    for batch in batches:
        np.add.at(counts[batch.task], batch.indices, 1)
        if np.ptp(counts[batch.task]) > 1:
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(
    routine=st.sampled_from([*DRAWING, "sequential", "interleave"]),
    sizes=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    fraction=st.floats(0.01, 1.0),
    rounds=st.integers(1, 3),
    batch_size=st.integers(1, 17),
    steps=st.none() | st.integers(1, 20),
    late=st.integers(1, 3),
)
def test_nothing_is_seen_twice_before_everything_is_seen_once(
    routine: str, sizes: list[int], fraction: float, rounds: int, batch_size: int, steps: int | None, late: int
) -> None:
    """Passes go on across rounds and epochs, whatever share of a task they take; no batch has parts of two passes."""
    names = dict(zip(SIZES, sizes, strict=True))
    number = dict.fromkeys(names, rounds if routine not in DRAWING else 1)
    plan = Plan(3, batch_size, names, number, {"para": fraction}, {"para": late}, 8, steps)
    batches = [batch for epoch in range(8) for step in ROUTINES[routine](plan, epoch) for batch in step.batches]
    assert counts_stay_even(batches, names)
    assert all(len(set(batch.indices)) == len(batch.indices) <= batch_size for batch in batches)


def test_a_fifth_of_a_task_shows_four_fifths_in_four_epochs() -> None:
    plan = Plan(7, 16, {"sst": 6, "para": 1000}, {"sst": 1, "para": 1}, fractions={"para": 0.2})
    for routine in WHOLE:
        seen = [i for epoch in range(5) for i in order(routine(plan, epoch), "para")]
        assert len(set(seen[:800])) == 800 and len(seen) == len(set(seen)) == 1000


def test_the_order_of_a_task_depends_on_its_passes_alone() -> None:
    """Not on where epochs end, nor on the other tasks, nor on what draws it."""
    runs = [(DRAWING["round-robin"], replace(ONCE, steps_per_epoch=steps), 60 // steps) for steps in (3, 12, 30)]
    runs += [(DRAWING["annealed"], replace(ONCE, steps_per_epoch=60, epochs=2), 2), (sequential, ONCE, 6)]
    runs += [(interleave, replace(ONCE, sizes={"para": 7}, fractions={"para": 0.4}), 14)]
    found = [
        [i for epoch in range(epochs) for i in order(routine(plan, epoch), "para")] for routine, plan, epochs in runs
    ]
    assert all(seen[:35] == found[0][:35] and len(seen) >= 35 for seen in found)


def test_r1s_annealed_epochs_show_all_of_quora() -> None:
    """At a tenth of the sizes and steps of R1's 100 x 300: about 1.3 passes, so each pair comes once or twice."""
    sizes = {"sst": 1024, "para": 28284, "sts": 604}
    plan = Plan(0, 16, sizes, dict.fromkeys(sizes, 1), epochs=100, steps_per_epoch=30)
    steps = [step for epoch in range(100) for step in ROUTINES["annealed"](plan, epoch)]
    counts = np.bincount(order(steps, "para"), minlength=28284)
    assert set(counts) == {1, 2} and 1.2 < counts.mean() < 1.4


def test_a_fraction_of_a_task_is_another_one_every_time() -> None:
    """Partial Quora (R0, appendix G): a twentieth of it in each round, and in twenty rounds all of it."""
    plan = Plan(7, 4, {"sst": 6, "para": 100}, {"sst": 1, "para": 1}, fractions={"para": 0.05})
    seen = Counter(i for epoch in range(200) for i in order(sequential(plan, epoch), "para"))
    assert seen == dict.fromkeys(range(100), 10)
    assert sorted(order(sequential(plan, 0), "sst")) == list(range(6))
    few = replace(plan, sizes={"sst": 6, "para": 101})  # a part of an example is one
    assert len(order(sequential(few, 0), "para")) == 6


def test_a_late_task_waits_for_its_epoch() -> None:
    """Late Quora (R0, appendix G): the epochs before are those of a run without it."""
    plan = Plan(7, 4, {"sst": 60, "para": 9, "sts": 4}, {"sst": 1, "para": 2, "sts": 0}, from_epochs={"para": 3})
    plan = replace(plan, epochs=4, steps_per_epoch=50)
    for routine in (*WHOLE, *(DRAWING[name] for name in ("random", "round-robin", "annealed"))):
        found = [set(tasks(routine(plan, epoch))) for epoch in range(4)]
        assert found == [{"sst"}, {"sst"}, {"sst", "para"}, {"sst", "para"}]
    for routine in WHOLE:
        assert order(routine(plan, 2), "para") == order(routine(replace(plan, from_epochs={}), 2), "para")


def test_the_command_line_knows_the_drawing_routines() -> None:
    assert tuple(DRAWING) == DRAWING_ROUTINES


@pytest.mark.parametrize("routine", DRAWING)
def test_a_drawn_task_is_gone_through_before_it_comes_again(routine: str) -> None:
    """Pass after pass, each in an order of its own, across epochs; any epoch can be made without those before it."""
    plan = replace(ONCE, steps_per_epoch=40)
    epochs = [DRAWING[routine](plan, epoch) for epoch in range(3)]
    assert all(len(steps) == 40 and all(type(task) is str for task in tasks(steps)) for steps in epochs)
    for task, size in SIZES.items():
        found = [i for steps in epochs for i in order(steps, task)]
        for number in range(len(found) // size):
            assert found[number * size : (number + 1) * size] == pass_order(plan, task, number).tolist()
    steps, plan = epochs[2], replace(plan)
    again = DRAWING[routine](plan, 2)
    assert trace(again) == trace(steps) and all(order(again, task) == order(steps, task) for task in SIZES)


def test_without_a_number_of_steps_an_epoch_is_as_long_as_a_sequential_one() -> None:
    for routine in ("random", "round-robin", "annealed"):
        assert len(DRAWING[routine](ONCE, 0)) == len(sequential(ONCE, 0)) == 9


def test_random_epoch_has_one_task_and_each_as_often() -> None:
    chosen: Counter[str] = Counter()
    for epoch in range(300):
        steps = DRAWING["random-epoch"](replace(ONCE, seed=1), epoch)
        (task,) = set(tasks(steps))
        assert sorted(order(steps, task)) == list(range(SIZES[task]))
        chosen[task] += 1
    assert all(70 < times < 130 for times in chosen.values())


def test_annealed_sampling_goes_through_the_tasks_as_often_as_in_r1() -> None:
    sizes = {"sst": 10245, "para": 282841, "sts": 6040}
    plan = Plan(0, 16, sizes, dict.fromkeys(sizes, 1), epochs=100, steps_per_epoch=300)
    shares = sum(annealed_shares(plan, epoch) for epoch in range(100))
    expected = shares * 300 * 16 / np.array(list(sizes.values()))
    assert expected.round(1).tolist() == [5.8, 1.3, 7.7]
    assert annealed_shares(plan, 0) == pytest.approx(np.array(list(sizes.values())) / sum(sizes.values()))
    found = passes(replace(plan, epochs=10), "annealed", 10)
    assert list(found.values()) == pytest.approx((expected / 10).tolist(), rel=0.2)


def test_annealing_over_a_single_epoch_by_another_factor_and_of_a_fraction() -> None:
    plan = Plan(0, 2, {"sst": 30, "sts": 10}, {"sst": 1, "sts": 1}, epochs=1)
    assert annealed_shares(plan, 0).tolist() == [0.75, 0.25] and len(DRAWING["annealed"](plan, 0)) == 20
    plan = Plan(0, 2, {"sst": 16, "sts": 4}, {"sst": 1, "sts": 1}, {"sst": 0.25}, epochs=3, anneal=1.0)
    assert annealed_shares(plan, 0).tolist() == [0.5, 0.5]
    plan = replace(plan, fractions={})
    assert annealed_shares(plan, 1) == pytest.approx([2 / 3, 1 / 3]) and annealed_shares(plan, 2).tolist() == [0.5, 0.5]


def test_passes_count_what_the_batches_hold() -> None:
    assert passes(PLAN, "sequential", 3) == {"sst": 6.0, "para": 3.0, "sts": 15.0}
    late = replace(PLAN, from_epochs={"para": 3}, fractions={"sts": 1 / 3})
    assert passes(late, "interleave", 3) == {"sst": 6.0, "para": 1.0, "sts": 5.0}
    assert [len(batch.indices) for batch in task_batches(late, 2, "sts")] == [1] * 5


def test_joint_takes_other_examples_of_the_large_tasks_in_each_epoch() -> None:
    taken = [frozenset(order(joint(ONCE, epoch), "para")) for epoch in range(60)]
    assert all(len(rows) == 3 for rows in taken) and len(set(taken)) > 10
    assert frozenset.union(*taken) == frozenset(range(7))
    assert all(sorted(order(joint(ONCE, epoch), "sts")) == [0, 1, 2] for epoch in range(5))


def test_joint_rounds_end_with_the_task_whose_rounds_are_over_first() -> None:
    """Of 5, 7 and 3 examples in batches of 2: 3, 4 and 2 batches a round. The others begin again."""
    steps = joint(replace(PLAN, rounds={"sst": 2, "para": 1, "sts": 5}), 0)
    assert [trace([step]) for step in steps] == [
        [("sst", 2), ("para", 2), ("sts", 2)],
        [("sst", 2), ("para", 2), ("sts", 1)],
        [("sst", 1), ("para", 2), ("sts", 2)],
        [("sst", 2), ("para", 1), ("sts", 1)],
    ]
    assert sorted(order(steps, "para")) == list(range(7))


LATE_ROUNDS = replace(PLAN, rounds={"sst": 1, "para": 1, "sts": 5}, from_epochs={"sts": 3})


@pytest.mark.parametrize("plan", [replace(ONCE, steps_per_epoch=3), LATE_ROUNDS], ids=str)
def test_joint_passes_go_on_across_epochs(plan: Plan) -> None:
    epochs = [joint(plan, epoch) for epoch in range(12)]
    assert all(len({batch.task for batch in step.batches}) == len(step.batches) for steps in epochs for step in steps)
    assert counts_stay_even([batch for steps in epochs for step in steps for batch in step.batches], SIZES)
    if plan.steps_per_epoch:
        assert [len(steps) for steps in epochs] == [3] * 12
        assert passes(plan, "joint", 4) == {"sst": 4.0, "para": 3.0, "sts": 6.0}
