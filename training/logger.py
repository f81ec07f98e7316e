"""The logger: the epoch table, progress bars, metrics.jsonl and TensorBoard.

metrics.jsonl holds figures that depend on the seed only, so that two runs can be compared to the letter. Clocks and
memory go to timing.jsonl.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from config import Config
from datasets import Batches
from evaluation.metrics import confusion, decide, linear_fit, primary
from models.multitask_bert import MultitaskBERT
from tasks import Task
from training.hparams import BEST_SCORE, hparams_summaries
from training.meters import (
    BatchResult,
    EpochRecord,
    StepResult,
    StepTimer,
    SyncedStepTimer,
    TaskEpoch,
    TaskMeter,
    check_losses_finite,
    mean_loss,
)
from training.profiling import Profiler
from training.run_directory import RunDirectory
from training.task_sampling import Step
from utils.console import format_table, progress
from utils.device import Device
from utils.errors import UserError
from utils.files import cause

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tqdm import tqdm

# Of a task in a run, about: one takes a tenth of a second, as long as an epoch of a small or frozen model does, and
# TensorBoard itself shows ten.
MOST_FIGURES = 20


def epoch_table(tasks: Mapping[str, Task], epoch: EpochRecord, epochs: int) -> str:
    """Return the table that is printed after each epoch."""
    title = f"Epoch {epoch.number}/{epochs}: {epoch.trains}"
    rows = []
    for name, task in tasks.items():
        done = epoch.tasks.get(name)
        train = f"{primary(task, done.train):.3f}" if done and done.train else "-"
        scores = epoch.dev.get(name)
        dev = [f"{metric} {scores[metric]:.3f}" for metric in task.metrics] if scores else ["-", "-"]
        figures = [str(done.steps), f"{done.lr:.2e}", f"{done.loss:.4f}"] if done else ["0", "-", "-"]
        rows.append([task.title, *figures, train, *dev])
    table = format_table(["task", "steps", "last lr", "loss", "train", "dev", ""], rows)
    footer = (
        f"{epoch.seconds:.0f} s, {epoch.examples_per_second:.0f} examples/s, {epoch.peak_memory / 1e9:.1f} GB at most"
    )
    if epoch.gpu_utilization is not None:
        footer += f", GPU at work {epoch.gpu_utilization:.0f}% of the time"
    if epoch.conflicts is not None:
        footer += f", {epoch.conflicts:.0%} of the pairs of tasks in conflict"
    if epoch.skipped_steps:
        footer += f", {epoch.skipped_steps} steps skipped, whose gradients overflowed fp16"
    if "score" in epoch.dev:
        best = "  <- best so far, saved" if epoch.is_best else ""
        footer = f"dev score {epoch.dev['score']:.4f}{best}   ({footer})"
    return f"\n{title}\n{table}\n{footer}"


def describe_freezing(model: MultitaskBERT, trainable_layers: int, fine_tune_mode: str) -> str:
    """Say in words what trains when so many layers do (see models/freezing.py)."""
    heads = "the heads of masked words" if model.mlm else "the heads and PALs" if model.pals else "the heads"
    top = f"top {trainable_layers} layer{'s' * (trainable_layers > 1)}"
    partly = trainable_layers <= model.bert_config.num_hidden_layers
    adapters = model.lora is not None
    if trainable_layers == 0:
        return f"{heads} and all adapters train" if adapters and fine_tune_mode == "last-layer" else f"{heads} train"
    if model.lora is not None and model.lora.freezes_rest:
        return f"{heads} and {f'the adapters of the {top}' if partly else 'all adapters'} train"
    everything = f"the backbones and {heads} train" if model.mlm else "everything trains"
    what = f"{heads}, the pooler and the {top} train" if partly else everything
    return f"{what}, of layers with adapters only those" if adapters else what


def parameter_table(model: MultitaskBERT) -> str:
    """Return a table of the total and trainable parameters of each part of the model as it is now."""
    rows = []
    for name, parameters in model.parts():
        total = sum(p.numel() for p in parameters)
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        rows.append((name, total, trainable))
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    text = [
        [name, f"{total:,}", f"{trainable:,}", f"{trainable / total:.1%}" if total else "-"]
        for name, total, trainable in rows
    ]
    return format_table(["part", "parameters", "trainable", "share"], text)


def metrics_line(epoch: EpochRecord) -> dict[str, Any]:
    """Return the line of metrics.jsonl: all that the seed decides and nothing that the clock decides."""
    train = {
        name: {"loss": done.loss, "lr": done.lr, "steps": done.steps, **done.train}
        for name, done in epoch.tasks.items()
    }
    more = {"conflicts": epoch.conflicts, "skipped_steps": epoch.skipped_steps}
    return {
        "epoch": epoch.number,
        "step": epoch.batches,
        "trains": epoch.trains,
        "trainable_parameters": epoch.trainable_parameters,
        "train": train,
        "dev": epoch.dev,
        **{name: value for name, value in more.items() if value is not None},
    }


def timing_line(epoch: EpochRecord) -> dict[str, Any]:
    """Return the line of timing.jsonl: seconds, tokens, speed, bytes, and the device."""
    seconds = {name: round(done.seconds, 3) for name, done in epoch.tasks.items()}
    peaks = {name: done.peak_memory for name, done in epoch.tasks.items() if done.peak_memory}
    return {
        "epoch": epoch.number,
        "seconds": round(epoch.seconds, 3),
        "seconds_without_evaluation": round(epoch.seconds_without_evaluation, 3),
        "train_seconds": seconds,
        "tokens": {name: done.tokens for name, done in epoch.tasks.items()},
        "examples_per_second": round(epoch.examples_per_second, 2),
        "peak_memory_bytes": epoch.peak_memory,
        "device": epoch.device,
        **({"train_peak_memory_bytes": peaks} if peaks else {}),
        **({} if epoch.gpu_utilization is None else {"gpu_utilization": round(epoch.gpu_utilization, 1)}),
    }


def epoch_scalars(epoch: EpochRecord) -> dict[str, float]:
    """Return the points that an epoch adds to curves, by their tags.

    TensorBoard sorts tags. What people look for first therefore begins with an early letter: `dev` and then `loss`.
    """
    scalars = {
        "dev/score": epoch.dev.get("score"),
        BEST_SCORE: epoch.best_score,
        "optim/conflicting_pairs": epoch.conflicts,
        "optim/skipped_steps": epoch.skipped_steps,
        "perf/examples_per_second": epoch.examples_per_second,
        "perf/gpu_utilization": epoch.gpu_utilization,
        "perf/peak_memory_gb": epoch.peak_memory / 1e9,
    }
    for name, scores in epoch.dev.items():
        if isinstance(scores, dict):
            scalars |= {f"dev/{name}_{metric}": value for metric, value in scores.items()}
    for name, done in epoch.tasks.items():
        scalars |= {f"train/{name}_{metric}": value for metric, value in done.train.items()}
    return {tag: value for tag, value in scalars.items() if value is not None}


def class_names(task: Task) -> tuple[str, ...]:
    """Return the names of the labels of a task with classes or two labels."""
    return task.label_names or tuple(map(str, range(int(task.label_range[1]) + 1)))


def draw_confusion(axes: "Axes", counts: np.ndarray, names: Sequence[str], fontsize: float) -> None:
    """Draw a confusion matrix [K, K]: each row in percent of its true label, above the number of examples."""
    share = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(*counts.shape):
        colour = "white" if share[i, j] > 0.6 else "black"
        text = f"{share[i, j]:.0%}\n{counts[i, j]}"
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=fontsize)
    axes.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="predicted", ylabel="true")
    axes.set_xticklabels(names, rotation=30, ha="right")
    axes.set_yticklabels(names)


def confusion_figure(task: Task, values: np.ndarray, labels: np.ndarray) -> "Figure":
    """Return the confusion matrix of dev predictions, each row in percent of the true label."""
    from matplotlib.figure import Figure

    size = 2.2 + 0.55 * len(class_names(task))
    figure = Figure(figsize=(size + 0.8, size), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    draw_confusion(axes, confusion(task, decide(task, values), labels), class_names(task), 9)
    axes.set_title(f"{task.title}, dev:\nshare of each true label")
    figure.colorbar(axes.images[0], ax=axes, shrink=0.8)
    return figure


def residual_figure(task: Task, values: np.ndarray, labels: np.ndarray) -> "Figure":
    """Return the residuals of dev predictions over true similarity, after the best linear fit.

    A head trained with the Pearson loss has no scale. Predictions are therefore mapped to labels by least squares; what
    remains is the error that correlation sees.
    """
    from matplotlib.figure import Figure

    slope, intercept = linear_fit(values, labels)
    residuals = slope * values + intercept - labels
    figure = Figure(figsize=(5.6, 4.2), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    axes.axhline(0, color="grey", linewidth=1)
    axes.scatter(labels, residuals, s=12, alpha=0.5, color="#0072B2", edgecolors="none")
    axes.set(xlabel="true similarity", ylabel="fitted prediction - true similarity")
    axes.set_title(f"{task.title}, dev: residuals (standard deviation {residuals.std():.2f})")
    return figure


class Logger:
    """Records a run: metrics.jsonl and timing.jsonl always, TensorBoard unless it is switched off, bars and tables."""

    def __init__(
        self,
        config: Config,
        tasks: Mapping[str, Task],
        run: RunDirectory,
        device: Device,
        say: Callable[[str], None],
        is_main_process: bool,
    ) -> None:
        self.config, self.tasks, self.run, self.device, self.say = config, tasks, run, device, say
        self.timer = (StepTimer if config.run.benchmark is None else SyncedStepTimer)(device)
        self.profiler = Profiler(run.path, device, say) if config.run.profile and is_main_process else None
        self.meters: dict[str, TaskMeter] = {}  # of the tasks of the epoch at hand
        self.recent: dict[str, list[BatchResult]] = {}  # of each task since the last point of the curves
        self.mean_losses: dict[str, float] = {}  # of each task at its last point in the epoch at hand
        self.utilization: list[int] = []  # of the GPU in percent, at points of the curves of the epoch at hand
        self.writer: Any = None

    def open(self) -> None:
        """Open TensorBoard's file, when a resumed run has cut the older ones back."""
        if not self.config.run.tensorboard:
            return
        from torch.utils.tensorboard import SummaryWriter

        with self.writing():
            self.writer = SummaryWriter(str(self.run.path))
            if not self.config.run.resume:
                self.writer.add_text("config", f"```json\n{json.dumps(self.config.to_dict(), indent=2)}\n```")
                for summary in hparams_summaries(self.config, self.tasks):
                    self.writer.file_writer.add_summary(summary)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError of TensorBoard's writer inside into a UserError."""
        self.run.require()
        try:
            yield
        except OSError as error:
            self.run.require()
            reason = cause(error, self.run.path)
            raise UserError(f"{self.run.path}: TensorBoard's events cannot be written ({reason})") from error

    # Steps

    def begin_steps(self, steps: Sequence[Step], done: int, epoch: int, data: Mapping[str, Batches]) -> "tqdm[Step]":
        """Return a bar over the steps of `epoch`, counted from 0, of which `done` are done."""
        self.epoch, self.data, self.steps, self.steps_done = epoch, data, len(steps), done
        self.batches = [batch for step in steps for batch in step.batches]
        named = {batch.task for batch in self.batches}
        scored = not self.config.train.mlm
        self.meters = {name: self.meters.get(name) or TaskMeter(scored) for name in self.tasks if name in named}
        shown = sum(len(step.batches) for step in steps[: done - done % self.config.run.log_every])
        self.recent = {name: meter.results_from(shown) for name, meter in self.meters.items()}
        self.mean_losses = {}
        name = f"epoch {epoch + 1}/{self.config.train.epochs}"
        self.bar = progress(steps[done:], name, "step", done=done)
        return self.bar

    def wants_norm(self, step: Step) -> bool:
        """Whether the curves get the gradient's norm of this step, which costs a pass over memory."""
        return any(self._wants_norm(batch.task) for batch in step.batches)

    def _wants_norm(self, task: str) -> bool:
        return len(self.meters[task].results) % self.config.run.log_every == 0

    def add_step(
        self, step: Step, number: int, batches_before: int, result: StepResult, rates: Mapping[str, float]
    ) -> None:
        """Add the results of a step.

        `number` counts the batches of the epoch before it, `batches_before` those of the run. Raises UserError if a
        loss is not finite.
        """
        seconds, peak_memory = self.timer.stop()
        for i, (batch, done) in enumerate(zip(step.batches, result.batches, strict=True)):
            meter, share = self.meters[batch.task], seconds / len(step.batches)
            if result.norm is not None and self._wants_norm(batch.task):
                meter.norm = result.norm
            meter.add(number + i, done, len(batch.indices), rates[batch.task], share, peak_memory)
            self.recent[batch.task].append(done)
        self.steps_done += 1
        if self.steps_done % self.config.run.log_every == 0 or self.steps_done == self.steps:
            self._wait()
            self._add_point(batches_before + len(step.batches))

    def _wait(self) -> None:
        """Wait until the device has done all steps, and share the seconds between the batches since the last point."""
        started = time.perf_counter()
        self.device.synchronize()
        seconds = time.perf_counter() - started
        count = sum(map(len, self.recent.values()))
        for name, results in self.recent.items():
            self.meters[name].seconds += seconds * len(results) / count

    def _add_point(self, batches: int) -> None:
        """Show the mean losses of the steps since the last point in the bar and the curves.

        `batches` of the run are done. Raises UserError if a loss is not finite.
        """
        if (percent := self.device.utilization()) is not None:
            self.utilization.append(percent)
        means = {name: mean_loss(results) for name, results in self.recent.items() if results}
        if not all(map(math.isfinite, means.values())):
            check_losses_finite(self.meters, self.batches, self.epoch + 1, self.data, self.run)
        self.recent = {name: [] for name in self.meters}
        self.mean_losses |= means
        losses = "  ".join(f"{name} {self.mean_losses[name]:.3f}" for name in self.tasks if name in self.mean_losses)
        self.bar.set_postfix_str(losses, refresh=False)
        if self.writer is None:
            return
        with self.writing():
            for name, mean in means.items():
                self.writer.add_scalar(f"loss/{name}", mean, batches)
                self.writer.add_scalar(f"lr/{name}", self.meters[name].lr, batches)
                if (norm := self.meters[name].take_norm()) is not None and math.isfinite(norm):
                    self.writer.add_scalar(f"optim/gradient_norm_{name}", norm, batches)

    def end_steps(self) -> None:
        """Complete the tasks' figures when all steps of the epoch are done."""
        for name, meter in self.meters.items():
            drawn = np.concatenate([batch.indices for batch in self.batches if batch.task == name])
            meter.tokens = int(self.data[name].lengths[drawn].sum())

    def epoch_figures(self) -> dict[str, TaskEpoch]:
        """Return the training figures of each task in the epoch at hand."""
        return {name: meter.epoch_figures(self.tasks[name]) for name, meter in self.meters.items()}

    # Epochs

    def end_epoch(self, epoch: EpochRecord, dev: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Record an epoch. `dev` maps tasks to values and labels on dev, for the figures."""
        self.meters, self.utilization = {}, []
        self.run.append_json("metrics.jsonl", metrics_line(epoch))
        self.run.append_json("timing.jsonl", timing_line(epoch))
        if self.writer is None:
            return
        with self.writing():
            for tag, value in epoch_scalars(epoch).items():
                self.writer.add_scalar(tag, value, epoch.batches)
            for name, (values, labels) in dev.items():
                if self._has_figures(epoch.number):
                    self._figure(name, values, labels, epoch.batches)
            self.writer.flush()

    def _figure(self, task: str, values: np.ndarray, labels: np.ndarray, number: int) -> None:
        similarity = self.tasks[task].kind == "similarity"
        figure = (residual_figure if similarity else confusion_figure)(self.tasks[task], values, labels)
        self.writer.add_figure(f"plots/{task}_{'residuals' if similarity else 'confusion'}", figure, number)

    def _has_figures(self, epoch: int) -> bool:
        """Whether an evaluation after so many epochs has figures: each one in short runs, and the last one always."""
        train = self.config.train
        every = train.eval_every * math.ceil(train.epochs / (MOST_FIGURES * train.eval_every))
        return epoch % every == 0 or epoch == train.epochs

    def flush(self) -> None:
        """Write all that was recorded to the files."""
        if self.writer is not None:
            with self.writing():
                self.writer.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return the figures of the epoch at hand."""
        return {name: meter.state_dict() for name, meter in self.meters.items() if meter.results}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        scored = not self.config.train.mlm
        meters = state.items()
        self.meters = {name: TaskMeter.from_state(meter, scored, self.device.device) for name, meter in meters}

    def close(self) -> None:
        """Complete TensorBoard's file."""
        if self.writer is not None:
            with self.writing():
                self.writer.close()
