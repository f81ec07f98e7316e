"""Build the report on studies and runs, print what a report lacks, and write its files."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from config import DataOptions, TaskOptions
from models.checkpoint import git_commit
from reporting.page import Report, Section, write_report
from reporting.predictions import DevSets
from reporting.report_table import report_table_item
from reporting.runs import run_sections
from reporting.sources import collect_sources
from reporting.trials import compare_trials, trials_item
from utils.console import say
from utils.errors import UserError
from utils.untrusted import shown


def build_report(paths: Sequence[Path], data: DataOptions | None, files: Mapping[str, TaskOptions]) -> Report:
    """Return the report on studies and runs. Raise UserError if there is nothing to report.

    `data` and `files` name dev files. If they are None or empty, each run's options do.
    """
    sources = collect_sources(paths)
    sections = []
    for study in sources.studies:
        sections.append(Section(f"Study {study.name}"))
        if study.table is not None:
            sections[-1].add(report_table_item(study, study.table))
        sections[-1].add(trials_item(study))
        compare_trials(sections[-1], study.name, study.trials)
    runs = [run for run in sources.runs if run.scores or len(run.metrics) > 1]
    if runs:
        named_files = {name: options for name, options in files.items() if options.dev is not None}
        summary, each = run_sections(runs, DevSets(data, named_files, sources.problems))
        trials = [run.trial for run in runs if run.trial is not None]
        if len(trials) > 1:
            compare_trials(summary, "runs", trials)
        sections += [summary, *each]
    if not any(section.items for section in sections):
        reasons = "; ".join(sources.problems[:3]) + ("; ..." if len(sources.problems) > 3 else "")
        raise UserError(f"nothing to report: {reasons}")
    return Report("Report", "", sections, list(map(shown, sources.problems)))


def publish(report: Report, stem: str, out: Path, argv: Sequence[str]) -> None:
    """Print what a report lacks and its main tables, write its files into `out`, and print the paths of its texts."""
    command, commit = shlex.join(["python", "report.py", *argv]), git_commit() or "not recorded"
    report = replace(report, about=f"{report.about} Made by {command}; commit {commit[:12]}.".strip())
    printed = [item.printed for section in report.sections for item in section.items if item.printed]
    for line in [*report.problems, *report.left_out, *printed]:
        say(line)
    for path in write_report(report, out, stem):
        say(str(path))
