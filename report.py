"""Draw figures and write tables from the results of a study that sweep.py has run.

    python report.py runs/lora-ranks/results.csv --out runs/lora-ranks/report

OUT/results.md is a table of all trials. OUT/lora-ranks.png shows the dev score over the rank of the adapters, by mode,
relative to full fine-tuning where the study has it (--lora_mode none --fine_tune_mode full-model); trials that differ
in anything else than mode, rank and DoRA are averaged.
"""

import csv
import os
import shlex
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from config import (
    Config,
    LoraOptions,
    UserError,
    assemble,
    build_parser,
    expand_arguments,
    groups_of,
    option,
    run_script,
    say,
)
from tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

SCORES = tuple(f"{task.name}_{task.metric}" for task in TASKS.values())
COLUMN_WIDTH = 3.4  # inches
# Okabe and Ito's colours, which colour-blind people tell apart; the markers do so in black and white.
STYLES = {
    "attn": ("#0072B2", "o"),
    "attn-only": ("#56B4E9", "s"),
    "all-lin": ("#D55E00", "^"),
    "all-lin-only": ("#E69F00", "D"),
}


@dataclass
class ReportOptions:
    """Report."""

    out: str = option("runs/report", "folder for the tables and figures", metavar="DIR")


@dataclass(frozen=True)
class Trial:
    """A row of the study's table, by column, and the configuration that its command asks for."""

    values: Mapping[str, str]
    config: Config

    @property
    def score(self) -> float:
        """The dev score."""
        return float(self.values["score"])


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table of sweep.py. Raises UserError where it is none."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = {"trial", "status", "score", "cause", "command", "commit"} - set(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); name the results.csv of a study") from error
    if missing:
        raise UserError(f"{path}: has no column {', '.join(sorted(missing))}; name the results.csv of a study")
    return rows


def trials_of(rows: Sequence[Mapping[str, str]]) -> list[Trial]:
    """The trials that were run to their end."""
    parser = build_parser("multitask_classifier.py", "", TASKS)
    return [
        Trial(row, assemble(vars(parser.parse_args(shlex.split(row["command"])[2:])), TASKS))
        for row in rows
        if row["status"] == "ok"
    ]


def reference(trials: Sequence[Trial], mode: str) -> float | None:
    """The mean score of the trials without adapters in a fine-tune mode; None where there are none."""
    own = [
        trial.score
        for trial in trials
        if trial.config.lora == LoraOptions() and trial.config.train.fine_tune_mode == mode
    ]
    return mean(own) if own else None


def shared_command(commands: Sequence[str]) -> str:
    """The words with which all commands begin: what the trials have in common."""
    return shlex.join(os.path.commonprefix([shlex.split(command) for command in commands]))


# ----------------------------------------------------------------------------------------------------------------------
# Table


def cell(row: Mapping[str, str], column: str) -> str:
    """A value as the table shows it."""
    text = row.get(column, "")
    if not text:
        return ""
    if column.endswith("_bytes"):
        return f"{float(text) / 1e6:,.1f} MB"
    if column == "trainable_parameters":
        return f"{int(text):,}"
    if column in (*SCORES, "score", "score_raw_r"):
        return f"{float(text):.4f}"
    return text.replace("|", "\\|")


def markdown(rows: Sequence[Mapping[str, str]], baseline: float | None) -> str:
    """All trials with their figures, then what was not run and why."""
    done = [row for row in rows if row["status"] == "ok"]
    columns = list(rows[0])
    flags = columns[columns.index("status") + 1 : columns.index("score")]
    figures = ["score", *SCORES, *(f"{name}_seconds_per_epoch" for name in TASKS)]
    figures += ["peak_memory_bytes", "trainable_parameters", "checkpoint_bytes"]
    shown = [column for column in [*flags, *figures] if any(row.get(column) for row in done)]
    header = [column.removesuffix("_bytes").replace("_", " ") for column in shown]
    lines = [[cell(row, column) for column in shown] for row in done]
    if baseline is not None:
        at = shown.index("score") + 1
        header.insert(at, "relative")
        for line, row in zip(lines, done, strict=True):
            line.insert(at, f"{float(row['score']) / baseline:.3f}")
    table = [header, ["-"] * len(header), *lines]
    text = [f"| {' | '.join(line)} |" for line in table]
    causes = Counter((row["status"], row["cause"]) for row in rows if row["status"] != "ok")
    text += [""] * bool(causes) + [f"- {count} {status}: {cause}" for (status, cause), count in causes.items()]
    return "\n".join(text)


def small_print(rows: Sequence[Mapping[str, str]]) -> str:
    """Where the figures come from: commit, device, and what the commands have in common."""
    commits = dict.fromkeys(row["commit"][:12] + row["commit"][40:] for row in rows if row["commit"])
    devices = dict.fromkeys(row["device"] for row in rows if row.get("device"))
    about = [f"commit {', '.join(commits)}"] * bool(commits) + [", ".join(devices)] * bool(devices)
    return "; ".join([*about, shared_command([row["command"] for row in rows])])


# ----------------------------------------------------------------------------------------------------------------------
# Figure


def rank_lines(trials: Sequence[Trial]) -> dict[tuple[str, bool], dict[int, float]]:
    """Mean score by rank, for each mode without and with DoRA."""
    scores: dict[tuple[str, bool], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        lora = trial.config.lora
        if lora.lora_mode != "none":
            scores[lora.lora_mode, lora.dora][lora.lora_rank].append(trial.score)
    return {key: {rank: mean(own) for rank, own in sorted(by_rank.items())} for key, by_rank in scores.items()}


def line_style(dora: bool, colour: str) -> dict[str, Any]:
    """LoRA is a solid line with full markers, DoRA a dashed one with hollow markers."""
    kind = {"linestyle": "--", "markerfacecolor": "white"} if dora else {"linestyle": "-", "markerfacecolor": colour}
    return {"color": colour, "markersize": 3.2, "linewidth": 1.1, **kind}


def rank_labels(ranks: Sequence[int]) -> list[str]:
    """Labels of the ticks; one that is too near to its left neighbour stands a line lower."""
    labels: list[str] = []
    for left, rank in zip([0, *ranks], ranks, strict=False):
        near = bool(labels) and rank < 1.35 * left and not labels[-1].startswith("\n")
        labels.append("\n" * near + str(rank))
    return labels


def legend_keys(lines: Mapping[tuple[str, bool], object]) -> "list[Line2D]":
    """A key for each mode's colour and marker, then one for each kind of line that the modes have."""
    from matplotlib.lines import Line2D

    keys = []
    for mode, (colour, marker) in STYLES.items():
        if any(mode == name for name, _ in lines):
            keys.append(Line2D([], [], marker=marker, label=mode, **line_style(False, colour)))
    for dora in sorted({dora for _, dora in lines}):
        keys.append(Line2D([], [], marker="o", label="DoRA" if dora else "LoRA", **line_style(dora, "0.3")))
    return keys


def draw_ranks(trials: Sequence[Trial], note: str) -> "Figure":
    """Dev score over rank by mode, as wide as a column of a two-column page; `note` is the small print below."""
    from matplotlib.figure import Figure

    lines, full, frozen = rank_lines(trials), reference(trials, "full-model"), reference(trials, "last-layer")
    unit = full or 1.0
    small = textwrap.wrap(note, 96, break_on_hyphens=False)
    margin = 0.085 * len(small)  # inches
    height = 3.1 + margin
    figure = Figure(figsize=(COLUMN_WIDTH, height), dpi=300)
    figure.set_layout_engine("constrained", rect=(0, margin / height, 1, 1 - margin / height))
    axes = figure.add_subplot()
    for (mode, dora), by_rank in lines.items():
        colour, marker = STYLES[mode]
        heights = [score / unit for score in by_rank.values()]
        axes.plot(list(by_rank), heights, marker=marker, **line_style(dora, colour))
    keys = legend_keys(lines)
    for score, name, linestyle in ((full, "full fine-tuning", "-"), (frozen, "frozen backbone", ":")):
        if score is not None:
            keys.append(axes.axhline(score / unit, color="black", linewidth=0.9, linestyle=linestyle, label=name))
    ranks = sorted({rank for by_rank in lines.values() for rank in by_rank})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, rank_labels(ranks))
    axes.minorticks_off()
    axes.tick_params(labelsize=6.5, length=2)
    axes.set_xlabel("rank", fontsize=7.5)
    axes.set_ylabel("dev score" if full is None else "dev score relative to full fine-tuning", fontsize=7.5)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend: dict[str, Any] = {"ncols": 4, "fontsize": 6, "frameon": False, "columnspacing": 1.2, "handlelength": 2.4}
    figure.legend(handles=keys, loc="outside upper center", **legend)
    figure.text(0.01, 0.02 / height, "\n".join(small), fontsize=4.5, color="0.35", linespacing=1.25, va="bottom")
    return figure


def main(argv: Sequence[str]) -> None:
    """Do what the command line asks."""
    groups = {"report": ReportOptions}
    parser = build_parser("report.py", str(__doc__).split("\n\n")[0], {}, groups)
    parser.usage = "report.py RESULTS.csv [flags]"
    parser.add_argument("results", type=Path, metavar="RESULTS.csv", help="the table of a study")
    given = parser.parse_args(expand_arguments(argv))
    out = Path(groups_of(vars(given), groups)["report"].out)
    rows = read_rows(given.results)
    trials = trials_of(rows)
    if not trials:
        raise UserError(f"{given.results}: no trial has ended well yet; run the study first")
    from training.checkpoint import write_atomically, write_text

    note, baseline = small_print(rows), reference(trials, "full-model")
    if baseline is None:
        say("without a trial of --lora_mode none --fine_tune_mode full-model there is nothing to be relative to")
    write_text(out / "results.md", f"{markdown(rows, baseline)}\n\n{note}\n")
    say(str(out / "results.md"))
    if rank_lines(trials):
        figure = draw_ranks(trials, note)
        write_atomically(out / "lora-ranks.png", lambda temporary: figure.savefig(temporary, format="png"))
        say(str(out / "lora-ranks.png"))


if __name__ == "__main__":
    run_script(main)
