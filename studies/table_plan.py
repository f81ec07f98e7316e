"""The trials of a report's table: stages first, then its rows, then its ensembles, each once for every seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cli.parser import OneLineParser, build_parser, expand_arguments
from config import ComputeOptions, FileOptions
from studies.report_tables import Member, ReportTable, Row, System, number_of
from studies.study_table import StudyRow, StudyTable
from studies.trials import PLACES, SCRIPT, Plan, Trial, grid_name, make_trial, training_parser
from tasks import TASKS
from utils.errors import UserError

ENSEMBLE = "ensemble.py"


def without_places(words: Sequence[str]) -> list[str]:
    """Return the words of a recipe without the flags that name a place for its run."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    for flag in PLACES:
        parser.add_argument(flag)
    return parser.parse_known_args(words)[1]


def ensemble_words(words: Sequence[str]) -> list[str]:
    """Return those flags of a training that ensemble.py has too: its data, and where it runs."""
    known = build_parser(ENSEMBLE, "", TASKS, {"data": FileOptions, "compute": ComputeOptions}, ("dev",))
    chosen, rest = [], iter(words)
    for word in rest:
        flag, equals, _ = word.partition("=")
        takes_value = not equals and training_parser()._option_string_actions[flag].nargs != 0
        both = [word, next(rest)] if takes_value else [word]
        chosen += both if flag in known._option_string_actions else []
    return chosen


@dataclass
class TablePlanner:
    """Makes the trials of a table that `out` will hold; `flags` come after those of each recipe.

    What several rows need is one trial.
    """

    table: ReportTable
    out: Path
    flags: Sequence[str]
    trials: dict[str, Trial] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # what a trial does -> its name

    def add(self, trial: Trial) -> str:
        """Add a trial, unless one that does the same is there. Return the name of the one that is there then."""
        config = trial.config if trial.script == SCRIPT else None
        name = self.names.setdefault(trial.command if config is None else json.dumps(config.to_dict()), trial.name)
        self.trials.setdefault(name, trial)
        return name

    def checkpoint(self, name: str) -> str:
        """Return the checkpoint that a trial will write."""
        return str(self.out / "trials" / name / "best.pt")

    def train(self, recipe: str, flags: Sequence[str], before: str, about: Mapping[str, str]) -> str:
        """Add the training of a recipe, which starts from the trial `before` if there is one. Return its name."""
        words = [*without_places(expand_arguments([f"@{self.table.recipe(recipe)}"])), *expand_arguments(flags)]
        words += [*self.flags, f"--init_from={self.checkpoint(before)}"] if before else self.flags
        words += [f"--seed={about['seed']}"] if "seed" in about else []
        trial = make_trial(grid_name(about), words, {}, "--tables")
        return self.add(replace(trial, flags=about, needs=[before] if before else []))

    def train_system(self, system: System, about: Mapping[str, str], seed: Mapping[str, str]) -> str:
        """Add the training of a system after its stages. Return its name."""
        before, stages = "", list[str]()
        for stage in system.stages:
            stages.append(stage)
            before = self.train(stage, (), before, {"recipe": "+".join(stages), **seed})
        return self.train(system.recipe, system.flags, before, {**about, **seed})

    def add_row(self, row: Row, seed: Mapping[str, str]) -> str:
        """Add the trials of a row with one seed. Return the name of the last one."""
        about = {"row": row.id}
        if row.system is not None:
            return self.train_system(row.system, about, seed)
        names = [self.train_system(member, {"recipe": member_name(member)}, seed) for member in row.members]
        first = self.trials[names[0]]
        votes = [self.checkpoint(n) for n, member in zip(names, row.members, strict=True) for _ in range(member.votes)]
        words = [*votes, *ensemble_words(first.words), f"--cache={self.out / 'ensemble-cache'}", *row.ensemble_flags]
        needs = list(dict.fromkeys(names))
        name = grid_name({**about, **seed})
        return self.add(Trial(name, {**about, **seed}, words, first.config, script=ENSEMBLE, needs=needs))


def member_name(member: Member) -> str:
    """Return what distinguishes a member from others."""
    return " ".join(["+".join([*member.stages, member.recipe]), *member.flags])


def plan_table(table: ReportTable, seeds: Sequence[str], flags: Sequence[str], out: Path) -> Plan:
    """Return the plan of all rows that can be run, with each of the seeds, or else with the recipes' own.

    Raises UserError for a flag that the sweep sets itself, and if no row can be run.
    """
    planner, rows = TablePlanner(table, out, flags), []
    by_seed = [{"seed": seed} for seed in seeds] or [{}]
    for row in table.rows:
        names = [planner.add_row(row, seed) for seed in by_seed] if row.systems else []
        reported = {name: number_of(value) for name, value in row.reported.items()}
        rows.append(StudyRow(row.id, row.name, row.split, reported, row.because, names))
    if not planner.trials:
        raise UserError(f"--table {table.id}: none of its rows can be run; docs/reports.md says why")
    study = StudyTable(table.report, table.id, table.label, table.title, table.columns, rows)
    return Plan(planner.trials, {}, study)
