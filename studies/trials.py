"""The trials of a study, from a grid or a search, each checked as multitask_classifier.py would check it.

studies/table_plan.py makes those of a report's table.
"""

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cli.checks import check_processes
from cli.parser import OneLineParser, build_config, build_parser
from config import Config, option
from studies.study_table import StudyTable
from tasks import TASKS, task_by_alias
from utils.errors import UserError, first_line

SCRIPT = "multitask_classifier.py"
PLACES = (  # flags of a recipe that do not count, since each trial has its own
    *("--run_dir", "--name", "--filepath"),
    *(f"--{name}_{split}_out" for name in task_by_alias(TASKS) for split in ("dev", "test")),
)
NUMBER = r"-?\d*\.?\d+(?:[eE][+-]?\d+)?"


@dataclass
class SweepOptions:
    """Sweep."""

    out: str = option("", "folder of the study: results.csv, study.journal and trials/", metavar="DIR")
    storage: str = option("", "share the study: a file that all machines see, or a database's URL", metavar="FILE")
    retry: str = option("", "this machine is dead: run the trials again that were running there", metavar="HOST")
    tables: str = option("", "tables.toml of a report: run --table, or list all tables without it", metavar="FILE")
    table: str = option("", "the table of --tables whose rows are trained, by its id", metavar="ID")
    seeds: tuple[str, ...] | None = option(None, "seeds of --table; without it each recipe's own", metavar="1,2,3")
    search: int | None = option(None, "number of trials of the study, sampled from --range by Optuna's TPE", low=1)
    search_seed: int = option(0, "seed of --search; --seed is that of the trials", low=0, high=2**31)
    pruner: str = option(
        "none",
        "end a trial whose best dev score is below the median that finished trials had at the same epoch (median)",
        choices=("none", "median"),
    )
    jobs: int = option(1, "trials at a time; without --threads they share the CPU's cores", low=1)
    keep_checkpoints: bool = option(False, "keep best.pt and resume.pt of trials that have their row")
    dry_run: bool = option(False, "list the trials and stop; of a table with their steps, memory and hours")


@dataclass(frozen=True)
class Trial:
    """One run of a study: the flags that the study sets, all words of the command line, and the configuration.

    `refusal` is why multitask_classifier.py would not run it. `script` is what runs: the configuration of an ensemble
    is that of its first member. `needs` are the trials whose checkpoints it reads: it starts once all have status ok.
    """

    name: str
    flags: Mapping[str, str]
    words: Sequence[str]
    config: Config | None = None
    refusal: str = ""
    script: str = SCRIPT
    needs: Sequence[str] = ()

    @property
    def command(self) -> str:
        """Return the command line that runs this."""
        return shlex.join(["python", self.script, *self.words])


@dataclass(frozen=True)
class Plan:
    """The trials of a study by name, and the `ranges` (Optuna's) from which a search samples more flags for each.

    A trial comes after those that it needs. `table` is the report's table whose rows the trials are.
    """

    trials: Mapping[str, Trial]
    ranges: Mapping[str, Any]
    table: StudyTable | None = None

    @property
    def flags(self) -> list[str]:
        """Return the flags that the study sets, some of them several times."""
        return [*self.ranges, *(flag for trial in self.trials.values() for flag in trial.flags)]

    def trial(self, name: str, values: Mapping[str, object]) -> Trial:
        """Return the trial of this name, in a search with the values that were sampled for it."""
        flags = {flag: str(values[flag]) for flag in self.ranges}
        return make_trial(name, self.trials[name].words, flags, "--range") if flags else self.trials[name]


@cache
def training_parser() -> OneLineParser:
    """Return the parser of multitask_classifier.py's flags."""
    return build_parser(SCRIPT, "", TASKS)


def grid_name(flags: Mapping[str, str]) -> str:
    """Return a folder name made from the flags, the same in whatever order they are."""
    text = ",".join(f"{flag}={value}" for flag, value in sorted(flags.items()))
    plain = re.sub(r"[^\w.,=+-]+", "-", text)
    if plain == text and len(text) <= 100:
        return text
    return f"{plain[:90]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def flag_word(flag: str, value: str, source: str) -> str:
    """Return a flag as the command line spells it: --flag=value, or --flag and --no_flag for a switch.

    Raises UserError, which names `source`, for a flag that does not exist and for a switch that is not 0 or 1.
    """
    known = training_parser()._option_string_actions
    action = known.get(f"--{flag}")
    if action is None:
        raise UserError(f"{source} {flag}={value}: {SCRIPT} has no flag --{flag}; its --help lists all flags")
    if action.nargs != 0:
        return f"--{flag}={value}"
    if f"--no_{flag}" not in known or value not in ("0", "1"):
        raise UserError(f"{source} {flag}={value}: is a switch; write it as {flag.removeprefix('no_')}=0,1")
    return f"--{flag}" if value == "1" else f"--no_{flag}"


def make_trial(name: str, base: Sequence[str], flags: Mapping[str, str], source: str) -> Trial:
    """Return the trial of one combination; the checks of multitask_classifier.py say whether it can be.

    Exits with code 2 for a flag or value that does not exist; raises UserError for a flag that the sweep sets itself.
    """
    words = [*base, *(flag_word(flag, value, source) for flag, value in flags.items())]
    given = vars(training_parser().parse_args(words))
    for key in given:
        group, _, option_name = key.partition(".")
        if group == "run" and option_name not in ("tensorboard", "save_every", "log_every"):
            raise UserError(f"--{option_name}: a sweep sets it for each trial; leave it out")
    try:
        config = build_config(given, TASKS)
        check_processes(config)
        return Trial(name, flags, words, config)
    except UserError as error:
        return Trial(name, flags, words, None, str(error))


def read_list(text: str) -> list[str]:
    """Return the different values of a comma-separated list."""
    return list(dict.fromkeys(value.strip() for value in text.split(",") if value.strip()))


def read_words(words: Sequence[str], source: str) -> dict[str, str]:
    """Return what stands behind the = of each flag. Raises UserError where there is nothing or a flag comes twice."""
    found: dict[str, str] = {}
    for word in words:
        name, _, text = word.partition("=")
        flag = name.replace("-", "_")
        if not read_list(text):
            raise UserError(f"{source} {word}: has no values; write it as lora_rank=1,2,5")
        if flag in found:
            raise UserError(f"{source} {word}: {flag} is there twice; write all its values behind one =")
        found[flag] = text
    return found


def read_range(flag: str, text: str) -> Any:
    """Return Optuna's distribution for LOW..HIGH, LOW..HIGH:log or A,B,C. Numbers are whole where both bounds are.

    Raises UserError where the bounds do not rise, or do not begin above 0 with :log.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    bounds = re.fullmatch(rf"({NUMBER})\.\.({NUMBER})(:log)?", text)
    if bounds is None:
        return CategoricalDistribution(read_list(text))
    low, high, log = bounds.groups()
    try:
        if low.lstrip("-").isdigit() and high.lstrip("-").isdigit():
            return IntDistribution(int(low), int(high), log=bool(log))
        return FloatDistribution(float(low), float(high), log=bool(log))
    except ValueError as error:
        raise UserError(f"--range {flag}={text}: {first_line(error)}; write it as lr=1e-5..3e-3:log") from None


def plan_grid(grids: Sequence[Sequence[str]], base: Sequence[str]) -> Plan:
    """Return all combinations of each grid, each once. One that gives the same run as an earlier one is refused."""
    trials: dict[str, Trial] = {}
    first: dict[str, str] = {}  # configuration -> the trial that has it
    for words in grids:
        values = {flag: read_list(text) for flag, text in read_words(words, "--grid").items()}
        for combination in itertools.product(*values.values()):
            flags = dict(zip(values, combination, strict=True))
            trial = make_trial(grid_name(flags), base, flags, "--grid")
            if trial.config is not None:
                same = first.setdefault(json.dumps(trial.config.to_dict()), trial.name)
                if same != trial.name:
                    trial = replace(trial, config=None, refusal=f"is the same run as {same}")
            trials.setdefault(trial.name, trial)
    return Plan(trials, {})


def plan_search(count: int, words: Sequence[str], base: Sequence[str]) -> Plan:
    """Return the search of --search and --range. Raises UserError where a flag cannot have a value of its range."""
    ranges = {flag: read_range(flag, text) for flag, text in read_words(words, "--range").items()}
    for flag, values in ranges.items():
        for value in getattr(values, "choices", None) or (values.low, values.high):
            trial = make_trial("", base, {flag: str(value)}, "--range")
            if trial.config is not None and trial.config.train.mlm:
                raise UserError("--search compares dev scores, which --mlm does not compute; use --grid")
    names = [f"search-{number:03d}" for number in range(1, count + 1)]
    return Plan({name: Trial(name, {}, base) for name in names}, ranges)
