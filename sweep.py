"""Run a study: a training run for each combination of a grid, each sample of a search, or each row of a report's table.

    python sweep.py --out runs/ranks --grid lora_rank=1,2,5 lora_mode=attn dora=0,1 @recipes/small/minilm-cpu.args
    python sweep.py --out runs/search --search 40 --range lr=1e-5..3e-3:log lora_rank=1..64:log optim=AdamW,Adamax \\
        --pruner median --lora_mode attn @recipes/small/minilm-cpu.args
    python sweep.py --out runs/r1-table-3 --tables recipes/r1/tables.toml --table 3 --seeds 1,2,3 --use_gpu

All other flags are those of multitask_classifier.py and hold for every trial. A switch takes 0 and 1. A value
that is itself a list is written with spaces: "lora_targets=query value,key". Each trial is a process, which
works in OUT/trials/NAME and prints into log.txt there. Trials leave the test files alone, since a study chooses by dev.

--table trains the rows of a report's table, each with every seed of --seeds; the other flags come after those of a
row's recipe. Stages that several rows start from are trained once, and ensembles wait for their members. A checkpoint
is kept as long as a trial needs it.

A sweep that was killed goes on when it is started again. The grid, or the number of a search, may grow. Several sweeps
share a study if each is started by the same command; on several machines --storage is needed too, and the last folder
in --out, which names the study there, must be the same. For --table all of them must see that folder, since trials
read one another's checkpoints. To run a trial again, delete its row in OUT/results.csv, its
folder and OUT/study.journal.
"""

import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path

from cli.parser import build_parser, expand_arguments, groups_of
from studies.report_tables import ReportTable, list_tables, read_tables
from studies.table_plan import plan_table
from studies.trials import PLACES, SCRIPT, Plan, SweepOptions, plan_grid, plan_search
from utils.console import run_script, say
from utils.errors import UserError
from utils.packages import check_packages

STATUSES = ("ok", "pruned", "refused", "out of memory", "failed")


def read_command(argv: Sequence[str]) -> tuple[SweepOptions, Plan | None]:
    """Return what the command line asks for; no plan for a list of tables. Raises UserError for what cannot be."""
    groups = {"sweep": SweepOptions}
    parser = build_parser("sweep.py", str(__doc__).split("\n\n")[0], {}, groups)
    what = "--grid FLAG=VALUE,... | --search N --range FLAG=LOW..HIGH | --tables FILE --table ID [--seeds 1,2,3]"
    parser.usage = f"sweep.py --out DIR ({what}) [flags] [flags of {SCRIPT}] [@file-of-flags]"
    about = "the values of each flag; every combination is a trial, and another --grid adds more"
    parser.add_argument("--grid", metavar="FLAG=VALUE,...", help=about, nargs="+", action="append", default=[])
    about = "what --search samples a flag from: words A,B,C, or numbers, whole ones where both bounds are"
    parser.add_argument("--range", metavar="FLAG=LOW..HIGH[:log]", help=about, nargs="+", action="extend", default=[])
    for flag in PLACES:
        parser.add_argument(flag, help=SUPPRESS)
    found, base = parser.parse_known_args(expand_arguments(argv))
    options: SweepOptions = groups_of(vars(found), groups)["sweep"]
    if options.tables and not options.table:
        return options, None
    if not options.out:
        raise UserError("--out: name the folder of the study")
    if options.table:
        check_table_options(options, bool(found.grid or found.range or options.search))
        return options, plan_table(choose_table(options), options.seeds or (), base, Path(options.out))
    if bool(found.grid) == bool(found.range) or bool(found.range) != (options.search is not None):
        raise UserError(
            "--grid or --search: give --grid lora_mode=attn lora_rank=1,2,5, flags with all their values, "
            "or --search 40 --range lr=1e-5..3e-3:log, a number of trials and flags with their ranges"
        )
    if options.seeds:
        raise UserError("--seeds: is for --table; a grid takes --grid seed=1,2,3")
    return options, plan_grid(found.grid, base) if found.grid else plan_search(options.search or 0, found.range, base)


def check_table_options(options: SweepOptions, has_others: bool) -> None:
    """Raise UserError for options that make no sense beside --table."""
    if not options.tables:
        raise UserError(f"--table {options.table}: name its file too, --tables recipes/r1/tables.toml")
    if has_others:
        raise UserError("--table: trains the rows of a table, and a grid or a search other trials; drop one of the two")
    if options.pruner != "none":
        raise UserError("--pruner: ends trials early, and a row of a table needs its whole training; leave it out")


def choose_table(options: SweepOptions) -> ReportTable:
    """Return the table that --table names. Raises UserError where the file has none of that id."""
    tables = {table.id: table for table in read_tables(Path(options.tables))}
    if options.table not in tables:
        raise UserError(f"--table {options.table}: {options.tables} has {', '.join(tables)}; choose one of them")
    return tables[options.table]


def main(argv: Sequence[str]) -> None:
    """Do what the command line asks; exits with code 1 where a trial failed otherwise than by lack of memory."""
    options, plan = read_command(argv)
    if plan is None:
        for line in list_tables(read_tables(Path(options.tables))):
            say(line)
        return
    for trial in plan.trials.values():
        if trial.refusal or (options.dry_run and plan.table is None):
            say(f"refused {trial.name}: {trial.refusal}" if trial.refusal else trial.name)
    if options.dry_run:
        refused = sum(bool(trial.refusal) for trial in plan.trials.values())
        if plan.table is not None:
            check_packages()
            from studies.estimates import describe_plan

            say(describe_plan(plan, Path(options.out)))
        say(f"{len(plan.trials) - refused} trials, {refused} refused")
        return

    check_packages("optuna")
    from studies.runner import Sweep

    sweep = Sweep(options, plan)
    counts = sweep.run()
    say(f"{', '.join(f'{counts[status]} {status}' for status in STATUSES if counts[status])}: {sweep.table.path}")
    if counts["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
