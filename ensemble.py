"""Ensemble saved checkpoints: average predictions or weights, choose members and votes, score dev, predict test.

    python ensemble.py --filepaths a.pt b.pt a.pt --data_dir data
    python ensemble.py a.pt b.pt c.pt --data_dir data --select 20 --run_dir runs/my-selection
    python ensemble.py a.pt b.pt c.pt --data_dir data --soup greedy --run_dir runs/my-soup

A file that is named twice has two votes. Members may differ in arch and weights. One member is in memory at a time, and
its predictions are kept by the hash of its file, so the next ensemble of the same members takes seconds.

--select and --soup greedy choose by one half of dev. The other half shows whether the choice is also good for examples
that did not make it; the best epochs of the members were chosen by both halves. The predictions are those of the last
row of the table. Members of a soup need one arch and the same start weights; RUN_DIR/soup.pt is a checkpoint like any.
"""

from collections.abc import Sequence
from pathlib import Path

from cli.parser import build_parser, expand_arguments, groups_of, task_options
from config import ComputeOptions, EnsembleOptions, FileOptions
from tasks import TASKS
from utils.console import run_script
from utils.errors import UserError
from utils.packages import check_packages


def main(argv: Sequence[str]) -> None:
    """Parse the command line, then combine the checkpoints."""
    groups = {"data": FileOptions, "compute": ComputeOptions, "ensemble": EnsembleOptions}
    of_tasks = ("dev", "test", "columns", "dev_out", "test_out")
    parser = build_parser("ensemble.py", str(__doc__).split("\n\n")[0], TASKS, groups, of_tasks)
    parser.usage = "ensemble.py CHECKPOINT [CHECKPOINT ...] [flags] [@file-of-flags]"
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="a best.pt; named twice, it votes twice")
    parser.add_argument("--filepaths", nargs="+", default=[], metavar="CHECKPOINT", help="the same, by a flag")
    given = vars(parser.parse_args(expand_arguments(argv)))
    names = given["checkpoints"] + given["filepaths"]
    if not names:
        raise UserError("--filepaths: name at least one checkpoint")
    options = groups_of(given, groups)
    by_task = {name: task_options(given, task) for name, task in TASKS.items()}

    check_packages()
    # after parsing, since importing torch takes seconds
    from evaluation.combine import run_ensemble
    from evaluation.prediction_files import copy_predictions, probe_requested_files

    probe_requested_files(by_task)
    run_ensemble(names, options["ensemble"], options["data"], by_task, options["compute"])
    copy_predictions(Path(options["ensemble"].run_dir), by_task)


if __name__ == "__main__":
    run_script(main)
