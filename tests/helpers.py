"""What several test modules use."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cli.parser import parse
from config import Config
from models.multitask_bert import MultitaskBERT
from reporting.page import ReportItem
from tasks import TASKS, Task
from training import commands
from training import trainer as trainer_module
from training.distributed import SINGLE_PROCESS, DistributedContext
from training.meters import StepResult
from training.task_sampling import ROUTINES, Step
from training.trainer import Trainer
from utils.device import Device
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def configure(*words: object) -> Config:
    """Return the configuration of these flags."""
    return parse([str(word) for word in words], TASKS, "multitask_classifier.py", "Test.")


def refusal(run: Callable[..., object], *words: object) -> str:
    """Return the message of the UserError that a call raises. It must be one line."""
    with pytest.raises(UserError) as error:
        run(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def shell(script: str, *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, without network."""
    command = [sys.executable, ROOT / script, *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=cwd)


# ----------------------------------------------------------------------------------------------------------------------
# Training

State = dict[str, Tensor]


def make_trainer(
    flags: list[str],
    run_dir: Path,
    *more: object,
    device: Device | None = None,
    context: DistributedContext = SINGLE_PROCESS,
    double: bool = False,
) -> Trainer:
    """Return the trainer of a command line without TensorBoard and test data; of a float64 model if `double`."""
    config = configure(*flags, "--no_tensorboard", "--no_test_predictions", "--run_dir", run_dir, *more)
    inputs = commands.load_inputs(config, context)
    inputs.device = device or inputs.device
    if double:
        inputs.model.double()
    return commands.make_trainer(config, inputs, context)


def first_steps(trainer: Trainer, number: int, per_epoch: int | None = None) -> Iterator[tuple[Step, StepResult]]:
    """Make the first steps of a run, at most `per_epoch` of each epoch, and yield them with their results."""
    progress, options = trainer.progress, trainer.config.train
    while True:
        trainer.freeze(progress.epoch)
        trainer.model.train()
        steps = ROUTINES[options.routine](trainer.plan, progress.epoch)[:per_epoch]
        trainer.loader.begin_epoch(steps, 0, progress.batches)
        for step in steps:
            trainer.optimizers.set_rates(trainer.optimizers.for_step(step), progress.epoch)
            yield step, trainer.train_step(step, measure_norm=True)
            progress.steps += 1
            progress.batches += len(step.batches)
            if progress.steps == number:
                return
        progress.epoch += 1


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def copied(model: torch.nn.Module) -> State:
    """Return copies of a model's tensors by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: State, after: State) -> set[str]:
    """Return the names of the tensors that differ."""
    assert list(before) == list(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def digest(state: State, prefix: str) -> str:
    """Return a hash of the tensors whose names begin with `prefix`."""
    out = hashlib.sha256()
    for name, tensor in state.items():
        if name.startswith(prefix):
            out.update(name.encode() + tensor.numpy().tobytes())
    return out.hexdigest()


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return copies of all numbers in an optimizer's state, parameter by parameter."""
    return [
        torch.as_tensor(value).clone()
        for group in optimizer.param_groups
        for parameter in group["params"]
        for _, value in sorted(optimizer.state.get(parameter, {}).items())
    ]


def states_by_epoch(flags: list[str], run_dir: Path, *more: object) -> tuple[MultitaskBERT, list[State]]:
    """Train; return the model, and its tensors before training and after each epoch."""
    trainer = make_trainer(flags, run_dir, *more)
    states = [copied(trainer.model)]

    def after_epoch(line: str) -> None:
        if line.startswith("\nEpoch"):
            states.append(copied(trainer.model))

    trainer.say = after_epoch
    trainer.fit()
    return trainer.model, states


class Killed(BaseException):
    """The process ends here, without any warning."""


def kill_at(trainer: Trainer, method: str, epoch: int) -> None:
    """Train, and stop as if killed where the trainer calls its `method` for the first time with `epoch` epochs done."""
    original = getattr(trainer, method)

    def kill_in_time(*arguments: Any) -> Any:
        if trainer.progress.epoch == epoch:
            raise Killed
        return original(*arguments)

    setattr(trainer, method, kill_in_time)
    with pytest.raises(Killed):
        trainer.fit()


def interrupted(trainer: Trainer, epochs: int) -> None:
    """Train, and stop as if killed when so many epochs are done and saved."""
    kill_at(trainer, "train_epoch", epochs)


def assert_resumes(flags: list[str], folder: Path, *more: object, after: int) -> Trainer:
    """Check that a run that is killed after so many epochs ends to the bit as a whole run, and return the latter."""
    whole = make_trainer(flags, folder / "whole", *more)
    whole.fit()
    interrupted(make_trainer(flags, folder / "part", *more), after)
    torch.manual_seed(77)  # another process
    resumed = make_trainer(flags, folder / "part", *more, "--resume")
    resumed.fit()
    assert changed(copied(whole.model), copied(resumed.model)) == set()
    assert (folder / "whole" / "metrics.jsonl").read_bytes() == (folder / "part" / "metrics.jsonl").read_bytes()
    return whole


def set_dev_scores(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Let the overall dev scores of a run be these; everything else of an evaluation is as it is."""
    overall, given = trainer_module.overall, iter(scores)
    monkeypatch.setattr(trainer_module, "overall", lambda *arguments: {**overall(*arguments), "score": next(given)})


FILMS = Task(
    name="films",
    title="Film reviews",
    kind="classes",
    label_column="sentiment",
    label_range=(0, 1),
    text_columns=("sentence",),
    files={"train": "films-train.csv", "dev": "films-dev.csv", "test": "films-test-student.csv"},
    prediction_column="Predicted_Sentiment",
    backbone="sentiment",
    losses=("ce",),
    lr_multiplier=2.0,
    weight_decay=1e-3,
    lr_floor=1 / 4,
    aliases=("movies",),
    by_default=False,
)


def write_films(folder: Path, stem: str) -> None:
    """Write sentences with labels 0 and 1 to STEM-train.csv, STEM-dev.csv and STEM-test-student.csv."""
    words = {0: "dreadful and dull", 1: "superb and charming"}
    for split, rows in (("train", 10), ("dev", 6), ("test-student", 4)):
        lines = ["\tid\tsentence\tsentiment" if split != "test-student" else "\tid\tsentence"]
        for i in range(rows):
            label = "" if split == "test-student" else f"\t{i % 2}"
            lines.append(f"{i}\tfilm{i}\tThe film is {words[i % 2]} , number {i} .{label}")
        (folder / f"{stem}-{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Reports


def figure_of(item: ReportItem | str) -> Any:
    """Return an item's figure."""
    assert isinstance(item, ReportItem) and item.figure is not None, item
    return item.figure


def cells_of(item: ReportItem | str) -> list[list[str]]:
    """Return an item's table as text."""
    assert isinstance(item, ReportItem) and item.table is not None, item
    return item.table.cells()


def check_layout(figure: Any) -> None:
    """Check that everything is inside the figure, and that legend, panels and footnote are below one another."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns if a layout collapses
        figure.draw_without_rendering()
    (footnote,) = figure.texts
    panels = [axes.get_tightbbox() for axes in figure.axes]
    boxes = [*(legend.get_window_extent() for legend in figure.legends), *panels, footnote.get_window_extent()]
    whole = figure.bbox
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    assert all(upper.y0 >= lower.y1 for upper, lower in zip(boxes, boxes[1:], strict=False))
    assert all(axes.get_position().width > 0.2 for axes in figure.axes)
    assert figure.get_figwidth() == 3.3


class Page(HTMLParser):
    """The contents of a page. All its elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids += [attributes["id"]] if "id" in attributes else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(out: Path, stem: str = "report") -> Page:
    """Read the page in `out`. It must need no other file, and its images must be the png files beside it."""
    text = (out / f"{stem}.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    images = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.images]
    assert sorted(images) == sorted(path.read_bytes() for path in out.glob("*.png"))
    assert all(image["alt"] for image in page.images)
    return page
