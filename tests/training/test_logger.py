"""The curves and figures in TensorBoard, and the losses in the bar."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import configure, make_model, make_trainer

from config import PalOptions
from lora import LoRAConfig
from tasks import SST, TASKS, Task
from training import logger
from training.meters import EpochRecord, StepResult
from training.run_directory import RunDirectory
from training.task_sampling import Step
from utils.device import Device


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_titles_of_figures_are_whole(task: Task) -> None:
    low, high = task.label_range
    labels = np.random.default_rng(0).integers(int(low), int(high) + 1, size=40)
    values = np.eye(int(high) + 1)[labels] if task.kind == "classes" else labels.astype(np.float64)
    draw = logger.residual_figure if task.kind == "similarity" else logger.confusion_figure
    figure = draw(task, values, labels)
    figure.draw_without_rendering()
    title = figure.axes[0].title.get_window_extent()
    assert figure.bbox.x0 <= title.x0 and title.x1 <= figure.bbox.x1 and title.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    ("epochs", "eval_every", "drawn_after"),
    [
        (7, 1, [1, 2, 3, 4, 5, 6, 7]),
        (20, 3, [3, 6, 9, 12, 15, 18, 20]),
        (45, 1, [*range(3, 46, 3)]),
        (200, 1, [*range(10, 201, 10)]),
        (200, 7, [*range(14, 200, 14), 200]),
    ],
)
def test_a_long_run_draws_few_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, eval_every: int, drawn_after: list[int]
) -> None:
    """Drawing them takes as long as a short epoch. Curves have every epoch."""
    monkeypatch.setattr(logger, "confusion_figure", lambda *_: None)
    config = configure("--train_sst", "--epochs", epochs, "--eval_every", eval_every, "--tensorboard")
    recorder = logger.Logger(config, {"sst": SST}, RunDirectory(tmp_path), Device(torch.device("cpu")), print, True)
    recorder.open()
    figures, scalars = [], []
    monkeypatch.setattr(recorder.writer, "add_figure", lambda tag, figure, step: figures.append(step))
    monkeypatch.setattr(recorder.writer, "add_scalar", lambda tag, value, step: scalars.append((tag, step)))
    for number in range(1, epochs + 1):
        due = number % eval_every == 0 or number == epochs
        dev = {"sst": (np.eye(5), np.arange(5))} if due else {}
        scores = {"sst": {"accuracy": 1.0}} if due else {}
        recorder.end_epoch(EpochRecord(number, "all", number, {}, scores), dev)
    assert figures == drawn_after
    assert [step for tag, step in scalars if tag.startswith("perf/examples")] == [*range(1, epochs + 1)]


@pytest.mark.parametrize("routine", ["interleave", "joint"])
def test_curves_and_the_bar_show_means(tiny_flags: list[str], tmp_path: Path, routine: str) -> None:
    """Each is over the examples of all steps since the point before; the epoch's last step always gives one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--tensorboard", "--routine", routine, "--log_every", 2, "--num_sts_trains", 2, "--epochs", 1]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    train_step, made = trainer.train_step, []

    def watched(step: Step, measure_norm: bool) -> StepResult:
        made.append((step, train_step(step, measure_norm)))
        return made[-1][1]

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.fit()
    wanted: dict[str, list[tuple[int, float]]] = {name: [] for name in trainer.model.tasks}
    for first in range(0, len(made), 2):
        batches = sum(len(step.batches) for step, _ in made[: first + 2])
        for name in wanted:
            losses = [
                float(found.loss)
                for step, result in made[first : first + 2]
                for batch, found in zip(step.batches, result.batches, strict=True)
                for _ in batch.indices
                if batch.task == name
            ]
            if losses:
                wanted[name].append((batches, pytest.approx(np.mean(losses), rel=1e-6)))
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for name, points in wanted.items():
        assert [(point.step, point.value) for point in events.Scalars(f"loss/{name}")] == points
    last = {name: events.Scalars(f"loss/{name}")[-1].value for name in wanted}
    assert trainer.logger.bar.postfix == "  ".join(f"{name} {loss:.3f}" for name, loss in last.items())


@pytest.mark.parametrize(
    ("lora_mode", "pals", "layers", "mode", "told"),
    [
        (None, False, 0, "iterative", "the heads train"),
        (None, False, 1, "iterative", "the heads, the pooler and the top 1 layer train"),
        (None, False, 2, "iterative", "the heads, the pooler and the top 2 layers train"),
        (None, False, 3, "iterative", "everything trains"),
        (None, True, 0, "last-layer", "the heads and PALs train"),
        ("attn-only", False, 0, "iterative", "the heads train"),
        ("attn-only", False, 1, "iterative", "the heads and the adapters of the top 1 layer train"),
        ("attn-only", False, 3, "full-model", "the heads and all adapters train"),
        ("attn", False, 0, "last-layer", "the heads and all adapters train"),
        ("attn", False, 3, "full-model", "everything trains, of layers with adapters only those"),
        ("attn-only", True, 0, "last-layer", "the heads and PALs and all adapters train"),
    ],
)
def test_what_trains_is_told(lora_mode: str | None, pals: bool, layers: int, mode: str, told: str) -> None:
    model = make_model()
    if lora_mode is not None:
        model.add_adapters(LoRAConfig(lora_mode))
    if pals:
        model.add_pals(PalOptions(pal="low-rank"))
    assert logger.describe_freezing(model, layers, mode) == told
