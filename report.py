"""Tables and figures of studies and finished runs; where two checkpoints differ.

    python report.py runs/lora-ranks/results.csv runs/demo --out runs/report
    python report.py --compare a.pt b.pt --data_dir data --out runs/comparison

RUNS are run directories, folders of them, and tables of sweep.py. OUT/report.html holds everything in one file that
needs no network; beside it are report.md, and a png and a csv file for each figure and table.

Of trials (the rows of a table, or all run directories together): dev score, memory and time over the rank of adapters,
memory over batch size, with and without mixed precision, and means and deviations over seeds. Of run directories:
learning curves, and from their predictions/ confusion matrices, residuals, errors with bootstrap deviations, rates. The
labels are read from the dev files that a run's options name, or from --data_dir. The trials of a study are reported by
its table; name its folder trials/ to have their curves too. What the runs have no data for is left out and said so.

--compare predicts the dev sets with both checkpoints and writes OUT/comparison.html and its files: rates of
disagreement, the examples that differ most, and a paired test of each task's difference.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cli.parser import build_parser, expand_arguments, groups_of, task_options
from config import ComputeOptions, DataOptions, FileOptions, TaskOptions, option
from tasks import TASKS
from utils.console import run_script, say
from utils.errors import UserError

# torch takes seconds to import: everything that needs it is imported once the command line is known to be right.
if TYPE_CHECKING:
    from reporting.page import Report


@dataclass
class ReportOptions:
    """Report."""

    out: str = option("runs/report", "folder for the page, the tables and the figures", metavar="DIR")


def report_on(paths: Sequence[Path], data: DataOptions | None, files: Mapping[str, TaskOptions]) -> "Report":
    """The report on studies and runs, with the dev files of `data` in place of the runs' own, and those in `files`.

    Raises UserError where there is nothing to report.
    """
    from reporting.page import Report, Section
    from reporting.runs import DevSets, run_sections
    from reporting.sources import collect, trial_of_run
    from reporting.trials import compare_trials, study_piece

    sources = collect(paths)
    sections = []
    for study in sources.studies:
        section = Section(f"Study {study.name}")
        section.add(study_piece(study))
        compare_trials(section, study.name, study.trials)
        sections.append(section)
    runs = [run for run in sources.runs if run.scores or len(run.metrics) > 1]
    if runs:
        named = {name: own for name, own in files.items() if own.dev is not None}
        together, each = run_sections(runs, DevSets(data, named, sources.problems))
        trials = [trial for run in runs if (trial := trial_of_run(run)) is not None]
        if len(trials) > 1:
            compare_trials(together, "runs", trials)
        sections += [together, *each]
    if not any(section.pieces for section in sections):
        reasons = "; ".join(sources.problems[:3]) + ("; ..." if len(sources.problems) > 3 else "")
        raise UserError(f"nothing to report: {reasons}")
    return Report("Report", "", sections, sources.problems)


def main(argv: Sequence[str]) -> None:
    """Do what the command line asks."""
    groups = {"data": FileOptions, "compute": ComputeOptions, "report": ReportOptions}
    parser = build_parser("report.py", str(__doc__).split("\n\n")[0], TASKS, groups, ("dev",))
    parser.usage = "report.py RUNS ... [flags] | report.py --compare A.pt B.pt [flags]"
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUNS", help="run directories, folders of them, results.csv of studies"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.pt", "B.pt"),
        help="tell instead where two checkpoints differ on dev",
    )
    given = vars(parser.parse_args(expand_arguments(argv)))
    runs, checkpoints = given.pop("runs"), given.pop("compare")
    options = groups_of(given, groups)
    if bool(runs) == bool(checkpoints):
        raise UserError("name run directories or tables to report on, or two checkpoints behind --compare")

    from models.checkpoint import git_commit
    from reporting.compare import compare
    from reporting.page import write

    files = {name: task_options(given, task) for name, task in TASKS.items()}
    data = DataOptions(**vars(options["data"]))
    if checkpoints:
        report = compare(tuple(checkpoints), data, files, options["compute"], say)
    else:
        report = report_on(runs, data if "data.data_dir" in given else None, files)
    command, commit = shlex.join(["python", "report.py", *argv]), git_commit() or "not recorded"
    report = replace(report, about=f"{report.about} Made by {command}; commit {commit[:12]}.".strip())
    for line in [*report.problems, *report.left_out]:
        say(line)
    stem = "comparison" if checkpoints else "report"
    for path in write(report, Path(options["report"].out), stem):
        say(str(path))


if __name__ == "__main__":
    run_script(main)
