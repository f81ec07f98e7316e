"""What is measured while a run trains: the figures of a task over an epoch, and the time and memory of a step."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from datasets import Batches
from evaluation.metrics import Scores, probabilities, score_task
from tasks import Task
from training.run_directory import BAD_BATCH, RunDirectory
from training.task_sampling import TaskBatch
from utils.device import Device
from utils.errors import UserError

REMEDY = "lower --lr or set --clip (the best.pt of an earlier epoch, if there is one, stands unharmed)"


@dataclass
class TaskEpoch:
    """What one epoch did for one task."""

    steps: int = 0
    examples: int = 0
    loss: float = 0.0
    lr: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    peak_memory: int = 0  # bytes during its steps; 0 without --benchmark
    train: Scores = field(default_factory=dict)


@dataclass
class EpochRecord:
    """One epoch's figures; `number` counts from 1. `dev` has the tasks evaluated, and the score if all were."""

    number: int
    trains: str
    batches: int  # of the run so far
    tasks: dict[str, TaskEpoch]
    dev: Scores = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int = 0
    gpu_utilization: float | None = None  # percent during the steps; None where it is not known
    trainable_parameters: int = 0
    device: str = ""
    is_best: bool = False
    best_score: float | None = None  # on dev so far; None if not all tasks were evaluated
    conflicts: float | None = None  # share of the pairs of tasks whose gradients work against each other
    skipped_steps: int | None = None  # because their gradients overflowed fp16; None where nothing is scaled

    @property
    def seconds_without_evaluation(self) -> float:
        """Return the seconds of the steps."""
        return sum(task.seconds for task in self.tasks.values())

    @property
    def examples_per_second(self) -> float:
        """Return the training examples per second of training, without evaluation."""
        return sum(task.examples for task in self.tasks.values()) / max(self.seconds_without_evaluation, 1e-9)


@dataclass(frozen=True)
class BatchResult:
    """What training on a batch gave, without history: its loss, its outputs [B, classes] or [B], and its labels [B]."""

    loss: Tensor
    outputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step gave: the results of its batches, and the gradient's norm if it was measured."""

    batches: list[BatchResult]
    norm: Tensor | None


def mean_loss(results: Sequence[BatchResult]) -> float:
    """Return the mean loss over the examples of at least one batch; waits for the device."""
    losses = torch.stack([result.loss for result in results]).cpu().double()  # an Apple GPU has no float64
    sizes = torch.tensor([len(result.outputs) for result in results], dtype=torch.float64)
    return float((losses * sizes).sum() / sizes.sum().clamp_min(1))


class TaskMeter:
    """Collects one task's training figures over an epoch without waiting for the device."""

    figures = ("examples", "seconds", "lr", "tokens", "peak_memory")

    def __init__(self, scored: bool) -> None:
        """Without `scored`, outputs and labels are no predictions and have no scores, as in masked-LM."""
        self.scored = scored
        self.numbers: list[int] = []  # of the batches, counted from the start of the epoch
        self.results: list[BatchResult] = []
        self.examples = 0
        self.seconds = 0.0
        self.lr = 0.0
        self.tokens = 0
        self.peak_memory = 0
        self.norm: Tensor | None = None  # of a gradient since the last point of the curves

    def add(self, number: int, result: BatchResult, examples: int, lr: float, seconds: float, peak_memory: int) -> None:
        """Add the results of one batch; nothing is copied to the host yet."""
        self.numbers.append(number)
        self.results.append(result)
        self.examples += examples
        self.seconds += seconds
        self.lr = lr
        self.peak_memory = max(self.peak_memory, peak_memory)

    def losses(self) -> Tensor:
        """Return the losses of the batches so far."""
        return torch.stack([result.loss for result in self.results])

    def results_from(self, number: int) -> list[BatchResult]:
        """Return the results of the batches from `number` on, which counts from the start of the epoch."""
        return [done for at, done in zip(self.numbers, self.results, strict=True) if at >= number]

    def take_norm(self) -> float | None:
        """Return the gradient's norm, if one was measured since the last call; waits for the device."""
        norm, self.norm = self.norm, None
        return None if norm is None else float(norm)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs of a meter that has seen a batch."""
        return {
            "outputs": torch.cat([result.outputs for result in self.results]),
            "labels": torch.cat([result.labels for result in self.results]),
            "losses": self.losses(),
            "sizes": [len(result.labels) for result in self.results],
            "numbers": self.numbers,
            "norm": self.norm,
            **{name: getattr(self, name) for name in self.figures},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], scored: bool, device: torch.device) -> "TaskMeter":
        """Return the meter whose `state_dict` this was."""
        meter = cls(scored)
        outputs = state["outputs"].to(device).split(state["sizes"])
        labels = state["labels"].to(device).split(state["sizes"])
        parts = zip(state["losses"].to(device), outputs, labels, strict=True)
        meter.results, meter.numbers = [BatchResult(*part) for part in parts], state["numbers"]
        meter.norm = state.get("norm")  # older states have none
        for name in cls.figures:
            setattr(meter, name, state[name])
        return meter

    def epoch_figures(self, task: Task) -> TaskEpoch:
        """Return the figures of the epoch. Their scores are those of the training passes, with dropout."""
        scores: Scores = {}
        if self.scored:
            outputs = torch.cat([result.outputs for result in self.results]).float().cpu().numpy()
            labels = torch.cat([result.labels for result in self.results]).cpu().numpy()
            scores = score_task(task, probabilities(task, outputs), labels)
        return TaskEpoch(
            steps=len(self.results),
            examples=self.examples,
            loss=mean_loss(self.results),
            lr=self.lr,
            seconds=self.seconds,
            tokens=self.tokens,
            peak_memory=self.peak_memory,
            train=scores,
        )


def check_losses_finite(
    meters: Mapping[str, TaskMeter],
    batches: Sequence[TaskBatch],
    epoch: int,
    data: Mapping[str, Batches],
    run: RunDirectory,
) -> None:
    """Raise UserError for the first loss of `epoch`, counted from 1, that is not finite, and write down its batch.

    There must be one. `meters` have the losses of the epoch's `batches` so far. bad_batch.json in the run directory
    then names the examples of that batch and of the one before: weights that an update ruined show in the next loss
    only. Waits for the device.
    """
    bad: list[tuple[int, float]] = []
    for meter in meters.values():
        if meter.results:
            values = meter.losses().float().cpu()
            bad += [(meter.numbers[i], float(values[i])) for i in (~values.isfinite()).nonzero().flatten().tolist()[:1]]
    number, loss = min(bad)

    def examples_of(batch: TaskBatch) -> dict[str, Any]:
        ids = data[batch.task].examples.ids
        return {"task": batch.task, "ids": [ids[i] for i in batch.indices.tolist()]}

    batch = batches[number]
    before = examples_of(batches[number - 1]) if number else None
    known = {"epoch": epoch, "batch": number + 1, "loss": str(loss), **examples_of(batch), "batch_before": before}
    run.write_json(BAD_BATCH, known)
    title = data[batch.task].examples.task.title
    raise UserError(
        f"{title}: a loss is not finite any more, at first {loss} in batch {number + 1} of epoch {epoch}, whose "
        f"examples stand in {run.path / BAD_BATCH}; {REMEDY}"
    )


class StepTimer:
    """Measures the seconds of a training step as the CPU sees it; a GPU may still be at work on it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.started = 0.0

    def start(self) -> None:
        """Begin a step."""
        self.started = time.perf_counter()

    def stop(self) -> tuple[float, int]:
        """Return the step's seconds and the most bytes of memory during it (0 where that is not measured)."""
        return time.perf_counter() - self.started, 0


class SyncedStepTimer(StepTimer):
    """Measures the seconds until the device has done all of a step, and the most memory during it (--benchmark)."""

    def start(self) -> None:
        """Begin a step."""
        self.device.reset_peak_memory()
        super().start()

    def stop(self) -> tuple[float, int]:
        """Return the step's seconds and the most bytes of memory during it."""
        self.device.synchronize()
        seconds, _ = super().stop()
        return seconds, self.device.peak_memory()
