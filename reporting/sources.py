"""Studies (tables of sweep.py) and run directories, as far as they can be read.

A damaged file raises nothing here. It adds a line to `problems`, and the rest is read.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cli.commands import command_of, config_of
from config import Config, LoraOptions
from evaluation.prediction_files import prediction_file
from lora import LoRAConfig
from models.checkpoint import load
from studies.results import (
    FIGURES,
    gpu_utilization,
    minutes,
    minutes_without_evaluation,
    per_task,
    read_lines,
    read_scores,
)
from studies.study_table import FILE, StudyTable, read_study_table
from studies.table_plan import ENSEMBLE
from tasks import TASKS
from utils.errors import UserError, first_line
from utils.schema import METRICS, TIMING, finite_number
from utils.untrusted import MAX_DIGITS, open_regular, read_json, read_text, shown

RUN_FILES = ("metrics.jsonl", "scores.json", "predictions")  # a folder with any of these is a run directory
STUDY_COLUMNS = {"trial", "status", "score", "cause", "command", "commit"}  # every table of sweep.py has these


@dataclass(frozen=True)
class Trial:
    """A finished training run: a row of a study's table, or a run directory.

    `by_task` has each task's metric on dev. Costs are None if unknown: `seconds` of training per epoch of all tasks
    together, `memory`, the peak in bytes, `gpu_utilization` in percent, and minutes of the whole run, with evaluations
    (`minutes`) and without (`step_minutes`). In `config` adapters are given by `lora_mode` and the other single
    options, never by `lora_dict`. `dev_examples` counts the dev examples of each task, as far as that is known.
    """

    name: str
    config: Config
    score: float
    by_task: Mapping[str, float]
    seconds: float | None
    memory: float | None
    gpu_utilization: float | None
    minutes: float | None
    step_minutes: float | None
    command: str
    commit: str
    device: str
    dev_examples: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A table of sweep.py: all its rows, and the finished trainings as trials.

    `table` is the report's table that the study runs, if it runs one.
    """

    name: str
    rows: Sequence[Mapping[str, str]]
    trials: Sequence[Trial]
    table: StudyTable | None = None


@dataclass(frozen=True)
class Run:
    """A run directory as far as it can be read.

    `config` is None for an ensemble or an evaluation. `scores`, the dev scores, is None if the run is not finished.
    `dev_examples` counts the dev examples that it predicted, by task. `label` distinguishes it from the other runs of
    the report, if there are any.
    """

    path: Path
    name: str
    config: Config | None
    metrics: Sequence[Mapping[str, Any]]
    timing: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any] | None
    best_epoch: int | None
    commit: str
    dev_examples: Mapping[str, int] = field(default_factory=dict)
    label: str = ""

    @property
    def title(self) -> str:
        """What tables and figures call the run."""
        return self.label or self.name

    @property
    def command(self) -> str:
        """The command line for the run's options."""
        return "" if self.config is None else shown(command_of(self.config))

    @property
    def trial(self) -> Trial | None:
        """The run as a trial. None if it is not finished or did not train."""
        if self.config is None or self.scores is None:
            return None
        seconds = per_task(self.timing, "train_seconds")
        return Trial(
            name=self.name,
            config=with_single_lora_options(self.config),
            score=self.scores["score"],
            by_task={n: float(self.scores[n][task.metric]) for n, task in TASKS.items() if n in self.scores},
            seconds=sum(seconds.values()) if seconds else None,
            memory=max((float(line["peak_memory_bytes"]) for line in self.timing), default=None),
            gpu_utilization=gpu_utilization(self.timing),
            minutes=minutes(self.timing) if self.timing else None,
            step_minutes=minutes_without_evaluation(self.timing) if self.timing else None,
            command=self.command,
            commit=self.commit,
            device=shown(self.timing[-1]["device"]) if self.timing else "",
            dev_examples=self.dev_examples,
        )


@dataclass
class Sources:
    """All that was found, and a line for everything that cannot be used."""

    studies: list[Study] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def collect_sources(paths: Sequence[Path]) -> Sources:
    """Read the studies and runs in `paths`: run directories, folders of them, and tables."""
    sources = Sources()
    found: dict[Path, Path] = {}  # by the resolved path, so that nothing is read twice
    for path in paths:
        try:
            inside = list(find_sources(path))
        except OSError as error:
            sources.problems.append(f"{path}: cannot be read ({error.strerror}); check the path")
            continue
        for source in inside:
            found.setdefault(source.resolve(), source)
        if not inside:
            sources.problems.append(f"{path}: contains neither a run directory nor a study's results.csv")
    names = unique_names(list(found.values()))
    for path in found.values():
        if path.is_dir():
            sources.runs.append(read_run(path, names[path], sources.problems))
        elif (study := read_study(path, names[path], sources.problems)) is not None:
            sources.studies.append(study)
    return sources


def find_sources(path: Path) -> Iterator[Path]:
    """Yield the run directories and tables of studies in `path`.

    The table stands for its study, so the study's folder trials/ is left out. What is inside a run directory, such as
    an evaluation, or behind a link to a folder of runs, is found only if the user names it. Raise OSError if `path`
    does not exist.
    """
    if not path.is_dir() or is_run(path):
        path.stat()
        yield path
        return
    is_study = (path / "results.csv").is_file()
    if is_study:
        yield path / "results.csv"
    for child in sorted(path.iterdir()):
        hidden = child.name.startswith(".") or (is_study and child.name == "trials")
        if child.is_dir() and not hidden and (is_run(child) or not child.is_symlink()):
            yield from find_sources(child)


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run directory. Exported weights have a config.json too, beside their tensors."""
    started = (folder / "config.json").is_file() and not (folder / "model.safetensors").exists()
    return started or any((folder / name).exists() for name in RUN_FILES)


def without_ending(path: Path) -> Path:
    """Return the path that names a source: the folder of a results.csv, or the path without a table's ending."""
    whole = path.resolve()
    if whole.name == "results.csv":
        return whole.parent
    return whole.with_suffix("") if whole.suffix == ".csv" and not whole.is_dir() else whole


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a name for each path: its last part, and as many parts before it as make the name unique."""
    stems = {path: without_ending(path) for path in paths}
    counts = Counter(stems.values())
    names = {}
    for path, stem in stems.items():
        whole = stem if counts[stem] == 1 or path.name == "results.csv" else path.resolve()
        names[path] = ["/".join(whole.parts[-count:]) for count in range(1, len(whole.parts) + 1)]
    endings = Counter(name for candidates in names.values() for name in candidates)
    return {
        path: shown(next((name for name in candidates if endings[name] == 1), candidates[-1]))
        for path, candidates in names.items()
    }


def read_study(path: Path, name: str, problems: list[str]) -> Study | None:
    """Read a study's table. Return None if it is unusable."""
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restval="")
        if missing := STUDY_COLUMNS - set(reader.fieldnames or ()):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        raw = [{key: value for key, value in row.items() if key is not None} for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"{path}: cannot be read ({first_line(error)}); name the results.csv of a study")
        return None
    rows, trials = [], []
    for number, row in enumerate(raw, start=2):
        try:
            if row["status"] == "ok" and not row["command"].startswith(f"python {ENSEMBLE} "):
                trials.append(trial_of_row(row))
            elif row["status"] == "ok":
                figures_in(row)
        except (UserError, ValueError) as error:
            problems.append(f"{path}: row {number} ({row['trial']}) is left out: {first_line(error)}")
        else:
            rows.append({shown(key): shown(value) for key, value in row.items()})
    if not trials:
        problems.append(f"{path}: no trial has finished yet; run the study first")
        return None
    table = None
    if (path.parent / FILE).exists():
        try:
            table = read_study_table(path.parent)
        except UserError as error:
            problems.append(str(error))
    return Study(name, rows, trials, table)


def figures_in(row: Mapping[str, str]) -> dict[str, float]:
    """Return the figures of a finished trial's row. Raise ValueError if one is damaged."""
    texts = {name: row[name] for name in FIGURES if row.get(name)}
    if long := [name for name, text in texts.items() if len(text) > MAX_DIGITS]:
        raise ValueError(f"{long[0]} has {len(texts[long[0]])} characters")
    return {name: finite_number(float(text), name) for name, text in texts.items()}


def trial_of_row(row: Mapping[str, str]) -> Trial:
    """Return a row of a study's table as a trial. Raise UserError or ValueError if it is damaged or has no score."""
    figures = figures_in(row)
    if "score" not in figures:
        raise ValueError("it has no score")
    metrics = {name: f"{name}_{task.metric}" for name, task in TASKS.items()}
    seconds = [figures[column] for name in TASKS if (column := f"{name}_seconds_per_epoch") in figures]
    return Trial(
        name=shown(row["trial"]),
        config=with_single_lora_options(config_of(row["command"])),
        score=figures["score"],
        by_task={name: figures[column] for name, column in metrics.items() if column in figures},
        seconds=sum(seconds) if seconds else None,
        memory=figures.get("peak_memory_bytes"),
        gpu_utilization=figures.get("gpu_utilization"),
        minutes=figures.get("minutes"),
        step_minutes=figures.get("minutes_without_evaluation"),
        command=shown(row["command"]),
        commit=shown(row["commit"]),
        device=shown(row.get("device", "")),
    )


def with_single_lora_options(config: Config) -> Config:
    """Return the configuration with its adapters in `lora_mode` and the other single options."""
    lora = LoRAConfig.from_options(config.lora)
    return replace(config, lora=LoraOptions() if lora is None else lora.to_options())


def read_run(path: Path, name: str, problems: list[str]) -> Run:
    """Read a run directory."""
    config = read_config(path / "config.json", problems)
    metrics = read_lines(path / "metrics.jsonl", METRICS, problems)
    timing = read_lines(path / "timing.jsonl", TIMING, problems)
    scores, epoch = read_dev_scores(path / "scores.json", problems)
    commit = ""
    if (path / "best.pt").exists():
        try:
            commit = shown(load(path / "best.pt", mmap=True).get("git_commit") or "")
        except UserError as error:
            problems.append(str(error))
    return Run(path, name, config, metrics, timing, scores, epoch, commit, count_predictions(path))


def count_predictions(path: Path) -> dict[str, int]:
    """Return the number of dev examples that a run predicted, for each task with a file of predictions."""
    counts = {}
    for name in TASKS:
        with suppress(OSError), open_regular(prediction_file(path, name, "dev")) as lines:
            counts[name] = sum(1 for _ in lines) - 1  # without the header
    return counts


def read_config(path: Path, problems: list[str]) -> Config | None:
    """Read a run's options. Return None if there are none, as for an ensemble, or if they are damaged."""
    try:
        config = Config.from_dict(read_json(path))
        if unknown := [name for name in config.tasks if name not in TASKS]:
            raise ValueError(f"this version does not know the task {unknown[0]}")
        return config
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{path}: cannot be read ({first_line(error):.80}); the run is left out of comparisons")
        return None


def read_dev_scores(path: Path, problems: list[str]) -> tuple[dict[str, Any] | None, int | None]:
    """Read a run's dev scores and their epoch. Return None for both if the run is not finished."""
    try:
        content = read_scores(path)
        dev = content["dev"]
        if not dev:
            problems.append(f"{path.parent}: was only pre-trained and has no scores; it is left out of comparisons")
            return None, None
        if lacking := [name for name, task in TASKS.items() if name in dev and task.metric not in dev[name]]:
            raise ValueError(f"it lacks the metric of {lacking[0]}")
        return {**dev, "score": float(dev["score"])}, content.get("epoch")
    except FileNotFoundError:
        problems.append(f"{path.parent}: is not finished (no scores.json); it is left out of comparisons")
    except (OSError, ValueError, KeyError) as error:
        problems.append(f"{path}: is damaged ({first_line(error):.80}); the run is left out of comparisons")
    return None, None
