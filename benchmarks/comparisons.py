"""The modes with a peer: speed and memory of training and evaluation, both sides in turn on the same work."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import ignore, matmul_peaks, run_in_process, say, square_peak, time_in_turn, work_per_round
from benchmarks.minbert import MinbertSide
from benchmarks.options import BenchmarkOptions
from benchmarks.peers import TransformersSide
from benchmarks.workloads import Workload, make_workload
from lora import LoRAConfig
from utils.console import progress
from utils.errors import UserError

TOLERANCE = 1e-4  # largest difference between the outputs of two sides that compute the same
EVAL_PASSES = 5  # most passes over dev
MEMORY_STEPS = 5  # training steps before the peak of memory is read


class Side(Protocol):
    """One of the two programs that a comparison measures."""

    @property
    def model(self) -> nn.Module:
        """The model, in training mode."""

    def forward(self, indices: np.ndarray) -> Tensor:
        """Return the outputs [B, classes] or [B] of training examples [B]."""

    def train_on(self, *batches: np.ndarray) -> None:
        """Make an optimizer step for the examples [B] of each batch, from token ids to new weights."""

    def evaluate(self) -> np.ndarray:
        """Return the outputs [N, classes] or [N] of all dev examples."""


LORA = LoRAConfig(mode="all-lin-only", rank=8)
DORA = LoRAConfig(mode="all-lin-only", rank=8, dora=True)
# Each comparison has the peer first, then our side.
COMPARISONS: dict[str, dict[str, Callable[[Workload], Side]]] = {
    "full-model": {"transformers": TransformersSide, "minbert": MinbertSide},
    "lora": {"peft": partial(TransformersSide, adapters=LORA), "minbert": partial(MinbertSide, adapters=LORA)},
    "dora": {"peft": partial(TransformersSide, adapters=DORA), "minbert": partial(MinbertSide, adapters=DORA)},
    "lora-over-full": {"full": MinbertSide, "lora": partial(MinbertSide, adapters=LORA)},
    "dora-over-lora": {"lora": partial(MinbertSide, adapters=LORA), "dora": partial(MinbertSide, adapters=DORA)},
}


def check_same(sides: Mapping[str, Side], work: Workload) -> float:
    """Return the largest difference between the sides' outputs without dropout. Raises UserError above TOLERANCE."""
    outputs = []
    for side in sides.values():
        side.model.eval()
        with torch.inference_mode():
            outputs.append(side.forward(work.batches[0]))
        side.model.train()
    difference = float((outputs[0] - outputs[1]).abs().max())
    if not difference <= TOLERANCE:  # nan is a difference too
        raise UserError(
            f"{work.task.title}: the outputs of {' and '.join(sides)} differ by up to {difference:.1e}, more than "
            f"{TOLERANCE:g}: they compute different things, so their times cannot be compared"
        )
    return difference


def time_training(
    options: BenchmarkOptions, comparison: str, work: Workload, sides: Mapping[str, Side]
) -> dict[str, Any]:
    """Return the seconds of each side's blocks of training steps, and the work in each block."""
    blocks = [tuple(work.batches[i : i + options.block]) for i in range(0, len(work.batches), options.block)]
    actions = {name: side.train_on for name, side in sides.items()}
    label = f"{comparison} {work.task.name} train"
    seconds = time_in_turn(actions, blocks, options.warmup, work.device, label)
    # A backward pass costs two forward passes, or one where the large weights need no gradient.
    passes = 3 if comparison == "full-model" else 2
    timed = [np.concatenate(block) for block in blocks[options.warmup :]]
    return {
        "batches": options.block,
        "seconds": seconds,
        **work_per_round(work.bert_config, work.train, timed, passes),
    }


def time_evaluation(
    options: BenchmarkOptions, comparison: str, work: Workload, sides: Mapping[str, Side]
) -> dict[str, Any]:
    """Return the seconds of each side's passes over dev, and the work in each pass."""
    passes = min(options.steps, EVAL_PASSES)
    actions = {name: side.evaluate for name, side in sides.items()}
    label = f"{comparison} {work.task.name} eval"
    seconds = time_in_turn(actions, [()] * (1 + passes), 1, work.device, label)
    return {
        "batches": -(-len(work.dev) // options.batch_size),
        "seconds": seconds,
        **work_per_round(work.bert_config, work.dev, [np.arange(len(work.dev))] * passes, 1),
    }


TIMERS = {"train": time_training, "eval": time_evaluation}


def measure_speed(options: BenchmarkOptions, comparison: str, task: str) -> list[dict[str, Any]]:
    """Return a record for each mode with the seconds of each side's rounds and the work in them.

    Raises UserError where the sides compute different things.
    """
    work = make_workload(options, task, say)
    sides = {name: build(work) for name, build in COMPARISONS[comparison].items()}
    difference = check_same(sides, work)
    say(f"{comparison} {task}: outputs differ by at most {difference:.1e}")
    tokens = int(np.mean([work.train.lengths[indices].sum() for indices in work.batches]))
    common = {
        "comparison": comparison,
        "task": task,
        "max_difference": difference,
        **matmul_peaks(work.bert_config, tokens, work.device),
        "square_peak": square_peak(work.device),
    }
    return [{**common, "mode": mode, **TIMERS[mode](options, comparison, work, sides)} for mode in options.modes]


def measure_memory(options: BenchmarkOptions, comparison: str, side_name: str, task: str) -> dict[str, int]:
    """Return the peak bytes of one side after building it and after each mode; run it in a separate process.

    A peak never falls, so evaluation, which takes less, comes before training.
    """
    work = make_workload(options, task, ignore)  # measure_speed prints the same lines
    side = COMPARISONS[comparison][side_name](work)
    peaks = {"built": work.device.peak_memory()}
    if "eval" in options.modes:
        side.evaluate()
        peaks["eval"] = work.device.peak_memory()
    if "train" in options.modes:
        for indices in work.batches[:MEMORY_STEPS]:
            side.train_on(indices)
        peaks["train"] = work.device.peak_memory()
    return peaks


def measure_all_memory(options: BenchmarkOptions) -> dict[tuple[str, str, str], dict[str, int]]:
    """Return the peak bytes of measure_memory for each (comparison, side, task)."""
    cases = [
        (comparison, side, task)
        for comparison in options.comparisons
        for side in COMPARISONS[comparison]
        for task in options.tasks
    ]
    bar = progress(cases, "memory", "process")
    return {case: run_in_process(" ".join(case), measure_memory, options, *case) for case in bar}


def compare_sides(options: BenchmarkOptions) -> list[dict[str, Any]]:
    """Return the records of each comparison, task and mode, with their memory.

    Memory comes first: Linux counts the size that the parent process has at the start as its child's.
    """
    if not options.modes:
        return []
    memory = measure_all_memory(options)
    return [
        {**record, "memory": {side: memory[comparison, side, task] for side in COMPARISONS[comparison]}}
        for comparison in options.comparisons
        for task in options.tasks
        for record in measure_speed(options, comparison, task)
    ]
