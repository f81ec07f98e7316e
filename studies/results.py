"""A row for each run: its scores and what it cost, and the csv file that many processes may add rows to.

The costs are those of R0's section 5.2: mean seconds of training and mean peak of memory per epoch, for each task.
"""

import csv
import fcntl
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from config import Config
from models.checkpoint import git_commit
from tasks import TASKS
from utils.errors import UserError, first_line
from utils.files import write_text
from utils.schema import METRICS, RUN_SCORES, TIMING, check
from utils.untrusted import parse_json, read_json, read_text

FIGURES = (
    "score",
    "score_raw_r",
    *(f"{name}_{metric}" for name, task in TASKS.items() for metric in task.metrics),
    "minutes",
    *(f"{name}_{cost}" for cost in ("seconds_per_epoch", "peak_memory_bytes") for name in TASKS),
    "peak_memory_bytes",
    "gpu_utilization",
    "minutes_without_evaluation",
    "tokens_per_second",
    "trainable_parameters",
    "checkpoint_bytes",
)
COLUMNS = (*FIGURES, "seed", "device", "commit", "cause", "command")
SETTINGS = ("amp", "lr", "batch_size", "lora_rank", "lora_mode", "dora", "fine_tune_mode", "epochs")  # R0, table 4
BENCHMARK_COLUMNS = ("trial", "status", *SETTINGS, *COLUMNS)


def read_lines(path: Path, kind: Any, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the lines of a jsonl file, up to one that is not of this `kind`; none where there is no file.

    A kill may have cut the last line short. What is damaged adds a line to `problems`.
    """
    lines: list[dict[str, Any]] = []
    problems = [] if problems is None else problems
    try:
        texts = read_text(path).splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read ({first_line(error)})")
        return []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(check(parse_json(text), kind, "it"))
        except ValueError:
            problems.append(f"{path}: line {number} is damaged; this line and all after it are left out")
            break
    return lines


def read_scores(path: Path) -> dict[str, Any]:
    """Return the content of a scores.json. Raises ValueError if it is damaged, and OSError if it cannot be read."""
    return dict(check(read_json(path), RUN_SCORES, "it"))


def per_task(timing: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    """Return the mean over epochs of a figure that timing.jsonl has for each task that trained in the epoch."""
    found = {name: [line[key][name] for line in timing if name in line.get(key, {})] for name in TASKS}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def minutes(timing: Sequence[Mapping[str, Any]]) -> float:
    """Return the minutes of a run from its timing.jsonl, evaluations included."""
    return sum(line["seconds"] for line in timing) / 60


def minutes_without_evaluation(timing: Sequence[Mapping[str, Any]]) -> float:
    """Return the minutes of a run's steps from its timing.jsonl."""
    return sum(sum(line["train_seconds"].values()) for line in timing) / 60


def gpu_utilization(timing: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean percentage of time in which a run's GPU was at work; None where it was not measured."""
    measured = [line["gpu_utilization"] for line in timing if "gpu_utilization" in line]
    return sum(measured) / len(measured) if measured else None


def figures(folder: Path) -> dict[str, Any]:
    """Return what a run directory says of a run, finished or not, as columns of a table.

    Raises UserError if its scores.json is damaged.
    """
    metrics, timing = read_lines(folder / "metrics.jsonl", METRICS), read_lines(folder / "timing.jsonl", TIMING)
    row: dict[str, Any] = {}
    if metrics and timing:
        row["trainable_parameters"] = metrics[-1]["trainable_parameters"]
        row["peak_memory_bytes"] = max(line["peak_memory_bytes"] for line in timing)
        row["device"] = timing[-1]["device"]
        row["minutes"] = round(minutes(timing), 3)
        row["minutes_without_evaluation"] = round(minutes_without_evaluation(timing), 3)
        if (utilization := gpu_utilization(timing)) is not None:
            row["gpu_utilization"] = round(utilization, 1)
        counted = [line for line in timing if "tokens" in line]  # a resumed run may have begun before tokens were
        tokens, seconds = (sum(sum(line[key].values()) for line in counted) for key in ("tokens", "train_seconds"))
        row["tokens_per_second"] = round(tokens / max(seconds, 1e-9), 1)
        row |= {f"{name}_seconds_per_epoch": round(mean, 3) for name, mean in per_task(timing, "train_seconds").items()}
        peaks = per_task(timing, "train_peak_memory_bytes")
        row |= {f"{name}_peak_memory_bytes": round(mean) for name, mean in peaks.items()}
    if (folder / "best.pt").exists():
        row["checkpoint_bytes"] = (folder / "best.pt").stat().st_size
    if (folder / "scores.json").exists():
        try:
            dev = read_scores(folder / "scores.json")["dev"]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / 'scores.json'}: is damaged ({error}); delete the folder") from error
        row |= {name: dev[name] for name in ("score", "score_raw_r") if name in dev}  # none after --mlm
        scored = [(name, metric) for name, task in TASKS.items() for metric in task.metrics if name in dev]
        row |= {f"{name}_{metric}": dev[name][metric] for name, metric in scored}
    return row


def benchmark_row(folder: Path, config: Config, command: str) -> dict[str, Any]:
    """Return the row of a finished run in the table of --benchmark."""
    options = {**vars(config.compute), **vars(config.lora), **vars(config.train)}
    settings = {name: int(options[name]) if isinstance(options[name], bool) else options[name] for name in SETTINGS}
    about = {"trial": folder.name, "status": "ok", "seed": config.train.seed, "command": command}
    return {**about, "commit": git_commit(), **settings, **figures(folder)}


class Table:
    """A csv file to which several processes may add rows; the file is whole at every moment."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns

    def rows(self) -> list[dict[str, str]]:
        """Return all rows, none where there is no file. A row that another program has cut short is left out.

        Raises UserError where the file cannot be read or has other columns.
        """
        try:
            reader = csv.DictReader(io.StringIO(read_text(self.path), newline=""))
            header = reader.fieldnames or ()
            rows = [row for row in reader if None not in row.values()]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{self.path}: cannot be read ({error}); mend it or choose another file") from error
        needed = set(self.columns) - set(COLUMNS)  # a table may be older than some of the figures
        if header and not needed <= set(header) <= set(self.columns):
            raise UserError(f"{self.path}: is the table of another grid or program; choose another file")
        return rows

    def add(self, new: Sequence[Mapping[str, Any]], key: str | None = None) -> None:
        """Add rows. With `key`, a row is left out if the table has one with the same value in that column."""
        with self.path.with_name(f".{self.path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system ends it with the process
            rows = self.rows()
            known = {row[key] for row in rows} if key else set()
            fresh = [row for row in new if not key or row[key] not in known]
            if fresh:
                text = io.StringIO()
                writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n", extrasaction="ignore")
                writer.writeheader()
                writer.writerows([*rows, *fresh])
                write_text(self.path, text.getvalue())


def study_results(out: Path, flags: Iterable[str]) -> Table:
    """Return the table of the study in the folder `out`, whose trials set these flags."""
    return Table(out / "results.csv", list(dict.fromkeys(["trial", "status", *flags, *COLUMNS])))
