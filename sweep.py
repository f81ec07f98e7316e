"""Run a study: a training run for each combination of a grid, or for each sample of a search, and a row for each.

    python sweep.py --out runs/ranks --grid lora_rank=1,2,5 lora_mode=attn dora=0,1 @recipes/small/minilm-cpu.args
    python sweep.py --out runs/search --search 40 --range lr=1e-5..3e-3:log lora_rank=1..64:log optim=AdamW,Adamax \\
        --pruner median --lora_mode attn @recipes/small/minilm-cpu.args

All other flags are those of multitask_classifier.py and hold for every trial. A switch takes 0 and 1. A value
that is itself a list is written with spaces: "lora_targets=query value,key". Each trial is a process, which
works in OUT/trials/NAME and prints into log.txt there. Trials leave the test files alone, since a study chooses by dev.

A sweep that was killed goes on when it is started again. The grid, or the number of a search, may grow. Several sweeps
share a study if each is started by the same command; on several machines --storage is needed too, and the last folder
in --out, which names the study there, must be the same. To run a trial again, delete its row in OUT/results.csv, its
folder and OUT/study.journal.
"""

import sys
from argparse import SUPPRESS
from collections.abc import Sequence

from cli.parser import build_parser, expand_arguments, groups_of
from studies.trials import SCRIPT, Plan, SweepOptions, plan_grid, plan_search
from utils.console import run_script, say
from utils.errors import UserError

STATUSES = ("ok", "pruned", "refused", "out of memory", "failed")


def read_command(argv: Sequence[str]) -> tuple[SweepOptions, Plan]:
    """Return what the command line asks for. Raises UserError for what cannot be."""
    groups = {"sweep": SweepOptions}
    parser = build_parser("sweep.py", str(__doc__).split("\n\n")[0], {}, groups)
    what = "--grid FLAG=VALUE,... | --search N --range FLAG=LOW..HIGH"
    parser.usage = f"sweep.py --out DIR ({what}) [flags] [flags of {SCRIPT}] [@file-of-flags]"
    about = "the values of each flag; every combination is a trial, and another --grid adds more"
    parser.add_argument("--grid", metavar="FLAG=VALUE,...", help=about, nargs="+", action="append", default=[])
    about = "what --search samples a flag from: words A,B,C, or numbers, whole ones where both bounds are"
    parser.add_argument("--range", metavar="FLAG=LOW..HIGH[:log]", help=about, nargs="+", action="extend", default=[])
    for flag in ("--run_dir", "--name", "--filepath"):  # of a recipe: each trial has another
        parser.add_argument(flag, help=SUPPRESS)
    found, base = parser.parse_known_args(expand_arguments(argv))
    options: SweepOptions = groups_of(vars(found), groups)["sweep"]
    if not options.out:
        raise UserError("--out: name the folder of the study")
    if bool(found.grid) == bool(found.range) or bool(found.range) != (options.search is not None):
        raise UserError(
            "--grid or --search: give --grid lora_mode=attn lora_rank=1,2,5, flags with all their values, "
            "or --search 40 --range lr=1e-5..3e-3:log, a number of trials and flags with their ranges"
        )
    return options, plan_grid(found.grid, base) if found.grid else plan_search(options.search or 0, found.range, base)


def main(argv: Sequence[str]) -> None:
    """Do what the command line asks; exits with code 1 where a trial failed otherwise than by lack of memory."""
    options, plan = read_command(argv)
    for trial in plan.trials.values():
        if trial.refusal or options.dry_run:
            say(f"refused {trial.name}: {trial.refusal}" if trial.refusal else trial.name)
    if options.dry_run:
        refused = sum(bool(trial.refusal) for trial in plan.trials.values())
        say(f"{len(plan.trials) - refused} trials, {refused} refused")
        return

    from studies.runner import Sweep

    sweep = Sweep(options, plan)
    counts = sweep.run()
    say(f"{', '.join(f'{counts[status]} {status}' for status in STATUSES if counts[status])}: {sweep.table.path}")
    if counts["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
