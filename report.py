"""Tables and figures of studies and finished runs, and where two checkpoints differ.

    python report.py runs/lora-ranks/results.csv runs/demo --out runs/report
    python report.py --compare a.pt b.pt --data_dir data --out runs/comparison

RUNS are run directories, folders of them, and tables of sweep.py. OUT/report.html is one file with everything in it. It
needs no network. Beside it are report.md, and a csv and a png file for each table and figure.

The rows of a table are trials, and so are all run directories together. The report shows the trials' dev score, memory
and time over the rank of adapters, memory over batch size, the effect of mixed precision, and means and deviations over
seeds. Of each run directory it shows learning curves, and from predictions/ confusion matrices, residuals, errors with
bootstrap deviations, and rates. Labels are read from the dev files in a run's options, or from --data_dir. The table of
a study stands for its trials: name the study's folder trials/ to see their curves too. The report lists what is left
out because the data do not suffice.

--compare predicts the dev sets with both checkpoints and writes OUT/comparison.html and its files: how often they
disagree, the examples on which they differ most, and a paired test of each task's difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cli.parser import build_parser, expand_arguments, groups_of, task_options
from config import ComputeOptions, DataOptions, FileOptions, option
from tasks import TASKS
from utils.console import run_script
from utils.errors import UserError
from utils.packages import check_packages


@dataclass
class ReportOptions:
    """Report."""

    out: str = option("runs/report", "folder for the page, the tables and the figures", metavar="DIR")
    pretrained: str | None = option(
        None, "--compare: base weights of checkpoints with adapters, where they are not found otherwise", metavar="NAME"
    )


def main(argv: Sequence[str]) -> None:
    """Parse the command line, then write the report."""
    groups = {"data": FileOptions, "compute": ComputeOptions, "report": ReportOptions}
    parser = build_parser("report.py", str(__doc__).split("\n\n")[0], TASKS, groups, ("dev", "columns"))
    parser.usage = "report.py RUNS ... [flags] | report.py --compare A.pt B.pt [flags]"
    runs_help = "run directories, folders of them, and results.csv of studies"
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUNS", help=runs_help)
    compare_help = "show where two checkpoints differ on dev"
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A.pt", "B.pt"), help=compare_help)
    given = vars(parser.parse_args(expand_arguments(argv)))
    runs, checkpoints = given.pop("runs"), given.pop("compare")
    options = groups_of(given, groups)
    if bool(runs) == bool(checkpoints):
        raise UserError("give either run directories or tables to report on, or --compare and two checkpoints")

    check_packages("matplotlib")
    # torch takes seconds to import, so this comes after the command line is known to be right.
    from reporting.build import build_report, publish
    from reporting.compare import compare_checkpoints

    data, out = DataOptions(**vars(options["data"])), Path(options["report"].out)
    files = {name: task_options(given, task) for name, task in TASKS.items()}
    if checkpoints:
        pretrained = options["report"].pretrained
        made = compare_checkpoints(checkpoints, data, files, options["compute"], pretrained)
        publish(made, "comparison", out, argv)
    else:
        publish(build_report(runs, data if "data.data_dir" in given else None, files), "report", out, argv)


if __name__ == "__main__":
    run_script(main)
