"""What there is to report: studies (tables of sweep.py) and run directories, read as far as they are whole.

Nothing here raises for a damaged file: what is wrong with it becomes a line in `problems`, and the rest is read on.
"""

import csv
import io
import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cli.checks import flag_of
from cli.parser import build_config, build_parser
from config import Config, LoraOptions, ModelOptions
from lora import LoRAConfig
from models.checkpoint import load
from studies.results import FIGURES, per_task
from tasks import TASKS
from utils.errors import UserError, first_line
from utils.untrusted import read_json

SCRIPT = "multitask_classifier.py"
RUN_FILES = ("metrics.jsonl", "scores.json", "predictions")  # any of them makes a folder a run directory
COLUMNS = {"trial", "status", "score", "cause", "command", "commit"}  # that every table of sweep.py has


@dataclass(frozen=True)
class Trial:
    """A training run that has ended well, known by its row in a study's table or by its folder.

    `by_task` has each task's own metric on dev. `seconds` are those of training per epoch, of all tasks together, and
    `memory` bytes at the peak; None where they are not known. Adapters are always in `lora_mode` and its siblings of
    `config`, never in `lora_dict`.
    """

    name: str
    config: Config
    score: float
    by_task: Mapping[str, float]
    seconds: float | None
    memory: float | None
    command: str
    commit: str
    device: str


@dataclass(frozen=True)
class Study:
    """A table of sweep.py: all its rows, and those that ended well as trials."""

    name: str
    rows: Sequence[Mapping[str, str]]
    trials: Sequence[Trial]


@dataclass(frozen=True)
class Run:
    """A run directory as far as it can be read.

    `config` is None for an ensemble or an evaluation, `scores` (the dev scores) where the run is not finished.
    """

    path: Path
    name: str
    config: Config | None
    metrics: Sequence[Mapping[str, Any]]
    timing: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any] | None
    best_epoch: int | None
    commit: str

    @property
    def command(self) -> str:
        """The command line that asks for the run's options."""
        return "" if self.config is None else command_of(self.config)


@dataclass
class Sources:
    """All that was found, and a line for all that could not be used."""

    studies: list[Study] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def collect(paths: Sequence[Path]) -> Sources:
    """The studies and runs that `paths` (run directories, folders of them, tables) hold."""
    sources = Sources()
    found: dict[Path, Path] = {}
    for path in paths:
        try:
            own = list(below(path))
        except OSError as error:
            sources.problems.append(f"{path}: cannot be read ({error.strerror}); check the path")
            continue
        found |= {each.resolve(): each for each in own if each.resolve() not in found}
        if not own:
            sources.problems.append(f"{path}: holds neither a run directory nor a study's results.csv")
    names = short_names(list(found.values()))
    for path in found.values():
        if path.is_dir():
            sources.runs.append(read_run(path, names[path], sources.problems))
        elif (study := read_study(path, names[path], sources.problems)) is not None:
            sources.studies.append(study)
    return sources


def below(path: Path) -> Iterator[Path]:
    """Run directories and tables of studies in `path`. A study is known by its table, so its trials/ is left out.

    What lies in a run directory, an evaluation for instance, is found only where it is named itself, and so is what
    lies behind a link to a folder of runs.
    """
    if not path.is_dir():
        path.stat()  # raises FileNotFoundError
        yield path
        return
    if is_run(path):
        yield path
        return
    study = (path / "results.csv").is_file()
    if study:
        yield path / "results.csv"
    for child in sorted(path.iterdir()):
        hidden = child.name.startswith(".") or (study and child.name == "trials")
        if child.is_dir() and not hidden and (is_run(child) or not child.is_symlink()):
            yield from below(child)


def is_run(folder: Path) -> bool:
    """Whether a run is or was here: exported weights have a config.json too, beside their tensors."""
    begun = (folder / "config.json").is_file() and not (folder / "model.safetensors").exists()
    return begun or any((folder / name).exists() for name in RUN_FILES)


def stem(path: Path) -> Path:
    """What names a run or study: the folder of a results.csv, another table without its ending, or a run directory."""
    whole = path.resolve()
    if whole.name == "results.csv":
        return whole.parent
    return whole.with_suffix("") if whole.suffix == ".csv" and not whole.is_dir() else whole


def short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for each path: its last part, with as many before it as tell it from the others."""
    stems = {path: stem(path) for path in paths}
    taken = Counter(stems.values())
    alone = {path for path in paths if taken[stems[path]] == 1 or path.name == "results.csv"}
    parts = {path: (stems[path] if path in alone else path.resolve()).parts for path in paths}

    def short(path: Path, count: int) -> str:
        name = "/".join(parts[path][-count:])
        twins = [other for other in paths if "/".join(parts[other][-count:]) == name]
        return name if len(twins) == 1 or count >= len(parts[path]) else short(path, count + 1)

    return {path: short(path, 1) for path in paths}


# ----------------------------------------------------------------------------------------------------------------------
# Studies


def read_study(path: Path, name: str, problems: list[str]) -> Study | None:
    """The table of a study; None where it is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, restval="")
            missing = COLUMNS - set(reader.fieldnames or ())
            rows = [{key: value for key, value in row.items() if key is not None} for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        problems.append(f"{path}: cannot be read ({error}); name the results.csv of a study")
        return None
    if missing:
        problems.append(f"{path}: has no column {', '.join(sorted(missing))}; name the results.csv of a study")
        return None
    trials = []
    for number, row in enumerate(rows, start=2):
        if row["status"] == "ok":
            try:
                trials.append(trial_of_row(row))
            except (UserError, ValueError) as error:
                problems.append(f"{path}: row {number} ({row['trial']}) is left out: {first_line(error)}")
    if not trials:
        problems.append(f"{path}: no trial has ended well yet; run the study first")
        return None
    return Study(name, rows, trials)


def trial_of_row(row: Mapping[str, str]) -> Trial:
    """A row of a study's table. Raises UserError or ValueError where it is damaged or its command is unknown here."""
    config = config_of(row["command"])
    figures = {name: finite(row[name]) for name in FIGURES if row.get(name)}
    metrics = {name: f"{name}_{task.metric}" for name, task in TASKS.items()}
    seconds = [figures[column] for name in TASKS if (column := f"{name}_seconds_per_epoch") in figures]
    return Trial(
        name=row["trial"],
        config=with_adapters_named(config),
        score=finite(row["score"]),
        by_task={name: figures[column] for name, column in metrics.items() if column in figures},
        seconds=sum(seconds) if seconds else None,
        memory=figures.get("peak_memory_bytes"),
        command=row["command"],
        commit=row["commit"],
        device=row.get("device", ""),
    )


def finite(value: Any) -> float:
    """A number. Raises ValueError or TypeError for anything else, nan and infinity too."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is not a finite number")
    return number


def config_of(command: str) -> Config:
    """The configuration that a command line asks for. Raises UserError where this program does not know its flags."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            given = build_parser(SCRIPT, "", TASKS).parse_args(shlex.split(command)[2:])
    except SystemExit:
        raise UserError(said.getvalue().strip() or f"{command}: is no command that trains") from None
    return build_config(vars(given), TASKS)


def with_adapters_named(config: Config) -> Config:
    """The same configuration with adapters in `lora_mode` and its siblings, however they were asked for."""
    lora = LoRAConfig.from_options(config.lora)
    return replace(config, lora=LoraOptions() if lora is None else lora.to_options())


# ----------------------------------------------------------------------------------------------------------------------
# Run directories


def read_run(path: Path, name: str, problems: list[str]) -> Run:
    """A run directory, with a line in `problems` for each file that is missing or damaged."""
    config = read_config(path / "config.json", problems)
    metrics = read_lines(path / "metrics.jsonl", metrics_in, problems)
    timing = read_lines(path / "timing.jsonl", timing_in, problems)
    scores, epoch = read_scores(path / "scores.json", problems)
    commit = ""
    if (path / "best.pt").exists():
        try:
            commit = load(path / "best.pt", mmap=True).get("git_commit") or ""
        except UserError as error:
            problems.append(str(error))
    return Run(path, name, config, metrics, timing, scores, epoch, commit)


def read_config(path: Path, problems: list[str]) -> Config | None:
    """A run's options; None for a folder without them, such as an ensemble's."""
    try:
        config = Config.from_dict(read_json(path))
        if unknown := [name for name in config.tasks if name not in TASKS]:
            raise ValueError(f"task {unknown[0]} is unknown here")
        return config
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{path}: cannot be read ({first_line(error):.80}); the run counts in no comparison")
        return None


def metrics_in(line: Mapping[str, Any]) -> list[Any]:
    """The numbers that a report needs of a line of metrics.jsonl. Raises an error where they are not there."""
    dev = line["dev"]
    by_task = [part.get(name, {}) for part in (line["train"], dev) for name in TASKS]
    numbers = [number for figures in by_task for number in figures.values()]
    return [line["epoch"], line.get("trainable_parameters", 0), dev.get("score", 0.0), *numbers]


def timing_in(line: Mapping[str, Any]) -> list[Any]:
    """The same of timing.jsonl."""
    if not isinstance(line["device"], str):
        raise TypeError("a device without a name")
    return [line["epoch"], line["peak_memory_bytes"], *line["train_seconds"].values()]


def read_lines(
    path: Path, numbers_in: Callable[[Mapping[str, Any]], list[Any]], problems: list[str]
) -> list[dict[str, Any]]:
    """The epochs of a jsonl file up to the first line that is damaged; none where there is no file."""
    lines: list[dict[str, Any]] = []
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read ({first_line(error):.80})")
        return []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not all(isinstance(own, int | float) for own in numbers_in(line)):
                raise TypeError("not a number")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            problems.append(f"{path}: line {number} is damaged; it and all after it are left out")
            break
        lines.append(line)
    return lines


def read_scores(path: Path, problems: list[str]) -> tuple[dict[str, Any] | None, int | None]:
    """The dev scores of a run and the epoch that they are of; None where the run is not finished."""
    try:
        content = read_json(path)
        dev = content["dev"]
        if not dev:
            problems.append(f"{path.parent}: was pre-trained alone and has no scores; it counts in no comparison")
            return None, None
        for name, task in TASKS.items():
            if name in dev:
                finite(dev[name][task.metric])
        epoch = content.get("epoch")
        if not isinstance(epoch, int | None):
            raise TypeError(f"epoch {epoch}")
        return {**dev, "score": finite(dev["score"])}, epoch
    except FileNotFoundError:
        problems.append(f"{path.parent}: is not finished (no scores.json); it counts in no comparison")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{path}: is damaged ({first_line(error):.80}); the run counts in no comparison")
    return None, None


def trial_of_run(run: Run) -> Trial | None:
    """A run directory as a trial; None for one that is not finished or did not train."""
    if run.config is None or run.scores is None:
        return None
    seconds = per_task(run.timing, "train_seconds")
    return Trial(
        name=run.name,
        config=with_adapters_named(run.config),
        score=run.scores["score"],
        by_task={name: float(run.scores[name][task.metric]) for name, task in TASKS.items() if name in run.scores},
        seconds=sum(seconds.values()) if seconds else None,
        memory=max((float(line["peak_memory_bytes"]) for line in run.timing), default=None),
        command=run.command,
        commit=run.commit,
        device=run.timing[-1]["device"] if run.timing else "",
    )


# ----------------------------------------------------------------------------------------------------------------------
# Options as flags

ELSEWHERE = ("run",)  # groups that say where a run's files are and nothing about its result


def flags_of(config: Config) -> dict[str, Any]:
    """Every option by its flag's name, those of the run's files aside."""
    named = {key: value for key, value in config.flat().items() if key.split(".")[0] not in ELSEWHERE}
    return {flag_of(key).removeprefix("--"): value for key, value in named.items()}


def defaults_of(config: Config) -> dict[str, Any]:
    """`flags_of` a run of the same tasks and arch that asks for nothing else."""
    tasks = {f"tasks.{name}.enabled": True for name in config.tasks}
    return flags_of(build_config({"model.arch": config.model.arch, **tasks}, TASKS))


def command_of(config: Config) -> str:
    """The shortest command line that asks for `config`, where its files lie aside."""
    same_tasks = set(build_config({}, TASKS).tasks) == set(config.tasks)
    defaults = defaults_of(config)
    words = ["python", SCRIPT, *(f"--train_{name}" for name in config.tasks if not same_tasks)]
    if config.model.arch != ModelOptions().arch:
        words += ["--arch", config.model.arch]
    for name, value in flags_of(config).items():
        if value == defaults[name] or value is None or value == ():
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", ",".join(value) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)
