"""What is measured of one task's training over an epoch."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evaluation.metrics import Scores, probabilities, score_task
from tasks import Task
from training.logger import TaskEpoch
from utils.device import Device


class TaskMeter:
    """Collects one task's training figures over an epoch, without waiting for the device."""

    figures = ("examples", "seconds", "lr", "tokens", "peak_memory")

    def __init__(self) -> None:
        self.numbers: list[int] = []  # of the steps, counted from the start of the epoch
        self.losses: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.examples = 0
        self.seconds = 0.0
        self.lr = 0.0
        self.tokens = 0
        self.peak_memory = 0

    def add(
        self,
        number: int,
        loss: Tensor,
        outputs: Tensor,
        labels: Tensor,
        examples: int,
        lr: float,
        seconds: float,
        peak: int,
    ) -> None:
        """Take the results of one step on so many examples; nothing is copied to the host yet."""
        self.numbers.append(number)
        self.losses.append(loss)
        self.outputs.append(outputs)
        self.labels.append(labels)
        self.examples += examples
        self.seconds += seconds
        self.lr = lr
        self.peak_memory = max(self.peak_memory, peak)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, of a meter that has seen a step."""
        return {
            "outputs": torch.cat(self.outputs),
            "labels": torch.cat(self.labels),
            "losses": torch.stack(self.losses),
            "sizes": [len(own) for own in self.labels],
            "numbers": self.numbers,
            **{name: getattr(self, name) for name in self.figures},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "TaskMeter":
        """The inverse of `state_dict`."""
        meter = cls()
        meter.losses, meter.numbers = list(state["losses"].to(device)), state["numbers"]
        meter.outputs = list(state["outputs"].to(device).split(state["sizes"]))
        meter.labels = list(state["labels"].to(device).split(state["sizes"]))
        for name in cls.figures:
            setattr(meter, name, state[name])
        return meter

    def result(self, task: Task) -> TaskEpoch:
        """The epoch's figures."""
        losses = torch.stack(self.losses).double()
        sizes = torch.tensor([len(outputs) for outputs in self.outputs], dtype=torch.float64, device=losses.device)
        return TaskEpoch(
            steps=len(self.losses),
            examples=self.examples,
            loss=float((losses * sizes).sum() / sizes.sum().clamp_min(1)),
            lr=self.lr,
            seconds=self.seconds,
            tokens=self.tokens,
            peak_memory=self.peak_memory,
            train=self.scores(task),
        )

    def scores(self, task: Task) -> Scores:
        """Those of the training passes themselves, dropout on, which cost nothing."""
        values = probabilities(task, torch.cat(self.outputs).float().cpu().numpy())
        return score_task(task, values, torch.cat(self.labels).cpu().numpy())


class StepClock:
    """Seconds of a training step as the CPU sees it; a GPU may still be at work on it."""

    def __init__(self, device: "Device") -> None:
        self.device = device
        self.started = 0.0

    def start(self) -> None:
        """Begin a step."""
        self.started = time.perf_counter()

    def stop(self) -> tuple[float, int]:
        """The step's seconds, and the most bytes of memory during it (0 where that is not measured)."""
        return time.perf_counter() - self.started, 0


class StepGauge(StepClock):
    """--benchmark: seconds until the device has done all of a step, and the most memory taken during it."""

    def start(self) -> None:
        """Begin a step."""
        self.device.reset_peak_memory()
        super().start()

    def stop(self) -> tuple[float, int]:
        """The step's seconds, and the most bytes of memory during it."""
        self.device.synchronize()
        seconds, _ = super().stop()
        return seconds, self.device.peak_memory()
