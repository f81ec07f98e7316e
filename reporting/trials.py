"""Comparisons of trials: tables and figures of a study, or of all run directories of a report."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from statistics import mean

from cli.commands import shared_command
from config import Config
from reporting.figures import Lines, amp_figure, bars_figure, batches_figure, costs_figure, ranks_figure, seeds_figure
from reporting.measures import mean_and_deviation
from reporting.page import ReportItem, Section
from reporting.sources import Run, Study, Trial
from reporting.tables import Column, Table, Value
from reporting.titles import (
    Method,
    dev_set_marks,
    dev_sets_note,
    differing_options,
    has_adapters,
    method_of,
    settings,
    short_title,
    titles_of,
)
from tasks import TASKS, Task

STUDY_NUMBERS = {  # column of a study's table -> column of the report; bytes become megabytes
    "score": Column("score", ".4f"),
    "relative": Column("relative to full-model", ".3f"),
    **{f"{task.name}_{task.metric}": Column(f"{task.name} {task.metric}", ".4f") for task in TASKS.values()},
    **{f"{name}_seconds_per_epoch": Column(f"{name} time (s per epoch)", ",.1f") for name in TASKS},
    **{f"{name}_peak_memory_bytes": Column(f"{name} peak memory (MB)", ",.1f") for name in TASKS},
    "peak_memory_bytes": Column("peak memory (MB)", ",.1f"),
    "gpu_utilization": Column("GPU utilization (%)", ",.1f"),
    "minutes": Column("training time (min)", ",.2f"),
    "minutes_without_evaluation": Column("training time without evaluation (min)", ",.2f"),
    "tokens_per_second": Column("tokens per second", ",.0f"),
    "trainable_parameters": Column("trainable parameters", ",.0f"),
    "checkpoint_bytes": Column("checkpoint (MB)", ",.1f"),
}
RANK, BATCH_SIZE = attrgetter("lora.lora_rank"), attrgetter("train.batch_size")  # of a Config
METHOD_OPTIONS = ("lora_mode", "lora_rank", "dora")
FIGURE_ROWS = 12  # the most configurations in a figure


@dataclass(frozen=True)
class Metric:
    """A figure that trials are compared by: its name with its unit, its format, and how to read it."""

    name: str
    format: str
    read: Callable[[Trial], float | None]
    short_name: str = ""

    def values(self, trials: Sequence[Trial]) -> list[float]:
        """Return the metric of those trials that have it."""
        return [value for trial in trials if (value := self.read(trial)) is not None]


SCORE = Metric("dev score", ".4f", lambda trial: trial.score, "score")
SECONDS = Metric("training time (s per epoch)", ",.1f", lambda trial: trial.seconds, "time")
MEMORY = Metric("peak memory (GB)", ".3f", lambda trial: trial.memory and trial.memory / 1e9, "memory")
MINUTES = Metric("training time (min)", ",.2f", lambda trial: trial.minutes)
STEP_MINUTES = Metric("training time without evaluation (min)", ",.2f", lambda trial: trial.step_minutes)
UTILIZATION = Metric("GPU utilization (%)", ",.1f", lambda trial: trial.gpu_utilization)
COSTS = (SECONDS, MEMORY, MINUTES, STEP_MINUTES, UTILIZATION)


def metric_of_task(task: Task) -> Metric:
    """Return a task's metric on dev."""
    return Metric(f"{task.name} {task.metric}", ".4f", lambda trial: trial.by_task.get(task.name))


def format_commits(sources: Sequence[Trial] | Sequence[Run]) -> str:
    """Return the commits of trials or runs, shortened. A mark after the 40 digits means changed files and is kept."""
    commits = dict.fromkeys(source.commit[:12] + source.commit[40:] for source in sources if source.commit)
    return f"commit {', '.join(commits) or 'not recorded'}"


def source_of(trials: Sequence[Trial]) -> str:
    """Return where numbers come from: commits, devices and the command with the flags that all trials share."""
    devices = dict.fromkeys(trial.device for trial in trials if trial.device)
    parts = [format_commits(trials)]
    if devices:
        parts.append(", ".join(devices))
    return "; ".join([*parts, shared_command([trial.command for trial in trials])])


def source_of_runs(runs: Sequence[Run]) -> str:
    """Return where numbers of these runs come from."""
    if trials := [run.trial for run in runs if run.trial is not None]:
        return source_of(trials)
    command = shared_command([run.command for run in runs if run.command])
    return f"{format_commits(runs)}; {command}" if command else format_commits(runs)


def other_differences(trials: Sequence[Trial], shown: Collection[str]) -> str:
    """Return a sentence on the options in which trials differ besides the `shown` ones. It is empty if in none."""
    names = differing_options([trial.config for trial in trials], without=shown)
    if not names:
        return ""
    return f" Trials also differ in {', '.join(names)}; a point is the mean of all trials at its place."


def group_trials(trials: Sequence[Trial], without: Collection[str]) -> list[list[Trial]]:
    """Return groups of trials with dev sets of the same sizes and the same settings, except those in `without`."""
    groups: dict[tuple[tuple[str, str | int], ...], list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[(*settings(trial.config, without).items(), *trial.dev_examples.items())].append(trial)
    return list(groups.values())


def titles_of_groups(groups: Sequence[Sequence[Trial]]) -> list[str]:
    """Return for each group, of trials that differ in the seed, what distinguishes it from the others."""
    firsts = [group[0] for group in groups]
    marks = dev_set_marks([trial.dev_examples for trial in firsts])
    return [title + mark for title, mark in zip(titles_of([trial.config for trial in firsts]), marks, strict=True)]


def relative_change(before: float | None, after: float | None) -> float | None:
    """Return the relative change of a figure. It is None if one of the two is unknown."""
    return after / before - 1 if before and after is not None else None


def reference_of(title: str, trials: Sequence[Trial], mode: str) -> tuple[float | None, str]:
    """Return the mean score of the trials without adapters in a fine-tune mode, and a sentence that says so.

    The score is None if there is no such trial. The sentence is empty if there are less than two.
    """
    chosen = [trial for trial in trials if method_of(trial.config) == Method(mode, False)]
    if len(chosen) < 2:
        return chosen[0].score if chosen else None, ""
    names = differing_options([trial.config for trial in chosen])
    difference = f", which differ in {', '.join(names)}" if names else ""
    return mean(trial.score for trial in chosen), f" {title} is the mean of {len(chosen)} trials{difference}."


def trials_item(study: Study) -> ReportItem:
    """Return the table of a study's finished trials. The text says what was not run, and why."""
    full, full_note = reference_of("Full-model", study.trials, "full-model")

    def number(row: Mapping[str, str], name: str) -> Value:
        if name == "relative":
            return float(row["score"]) / full if full else None
        text = row.get(name)
        return float(text) / (1e6 if name.endswith("_bytes") else 1) if text else None

    header = list(study.rows[0])
    flags = header[header.index("status") + 1 : header.index("score")]
    usable = {trial.name for trial in study.trials}
    rows = [
        [*(row.get(name) for name in flags), *(number(row, name) for name in STUDY_NUMBERS)]
        for row in study.rows
        if row["status"] == "ok" and row["trial"] in usable
    ]
    columns = [*(Column(name.replace("_", " ")) for name in flags), *STUDY_NUMBERS.values()]
    causes = Counter((row["status"], row["cause"]) for row in study.rows if row["status"] != "ok")
    text = full_note.strip()
    if causes:
        reasons = "; ".join(f"{count} {status}: {why}" for (status, why), count in causes.items())
        text = f"Without a result: {reasons}. {text}".strip()
    table = Table(columns, rows).without_empty_columns()
    return ReportItem(f"{study.name}-trials", "All trials", text, table, source=source_of(study.trials))


def mean_lines(trials: Sequence[Trial], position: Callable[[Config], int], metric: Metric) -> Lines:
    """Return the mean of a metric at each position, for each method."""
    values: dict[Method, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        if (value := metric.read(trial)) is not None:
            values[method_of(trial.config)][position(trial.config)].append(value)
    return {method: {at: mean(group) for at, group in sorted(points.items())} for method, points in values.items()}


def has_lines(lines: Lines) -> bool:
    """Return whether a line has more than one point."""
    return any(len(points) > 1 for points in lines.values())


def lines_table(position: str, panels: Mapping[Column, Lines]) -> Table:
    """Return a table with a row for each method and position and a column for each panel."""
    keys = dict.fromkeys((method, at) for lines in panels.values() for method, points in lines.items() for at in points)
    rows: list[list[Value]] = [
        [method.mode, "DoRA" if method.dora else "", at, *(lines.get(method, {}).get(at) for lines in panels.values())]
        for method, at in keys
    ]
    columns = [Column("method"), Column(""), Column(position), *panels]
    return Table(columns, rows).without_empty_columns()


def ranks_item(name: str, trials: Sequence[Trial]) -> ReportItem | str:
    """Return dev score over rank by mode, relative to full fine-tuning if possible (R0, figure 2, left)."""
    adapted = [trial for trial in trials if has_adapters(trial.config)]
    points = mean_lines(adapted, RANK, SCORE)
    if not has_lines(points):
        return "no dev score over rank, which needs adapters of one mode and two ranks"
    full, full_note = reference_of("Full fine-tuning", trials, "full-model")
    frozen, frozen_note = reference_of("Frozen backbone", trials, "last-layer")
    unit = full or 1
    lines = {method: {rank: score / unit for rank, score in scores.items()} for method, scores in points.items()}
    references = {"full fine-tuning": full, "frozen backbone": frozen}
    heights = {title: score / unit for title, score in references.items() if score is not None}
    axis = "dev score relative to full fine-tuning" if full else "dev score"
    text = "LoRA solid, DoRA dashed." + other_differences(adapted, METHOD_OPTIONS) + full_note + frozen_note
    if not full:
        text += " Scores are absolute, because no trial has --lora_mode none --fine_tune_mode full-model."
    table = lines_table("rank", {Column(axis, ".4f"): lines})
    figure = ranks_figure(lines, heights, axis)
    return ReportItem(f"{name}-ranks", "Dev score over rank", text, table, figure, source_of(trials))


def costs_item(name: str, trials: Sequence[Trial]) -> ReportItem | str:
    """Return memory, time and score over rank, relative to LoRA of the lowest rank in each mode (R0, figure 20)."""
    adapted = [trial for trial in trials if has_adapters(trial.config)]
    lora_ranks = [RANK(trial.config) for trial in adapted if not trial.config.lora.dora]
    if not lora_ranks:
        return "no memory and time over rank, which need LoRA"
    lowest = min(lora_ranks)
    panels = {metric: relative_lines(adapted, metric, lowest) for metric in (MEMORY, SECONDS, SCORE)}
    panels = {metric: lines for metric, lines in panels.items() if lines}
    if not any(has_lines(panels.get(metric, {})) for metric in (MEMORY, SECONDS)):
        needs = f"figures of one mode at two ranks, with its LoRA of rank {lowest} among them"
        return f"no memory and time over rank, which need {needs}"
    text = f"Each mode is relative to its LoRA of rank {lowest}." + other_differences(adapted, METHOD_OPTIONS)
    text += missing_modes(adapted, {metric.short_name: lines for metric, lines in panels.items()}, lowest)
    table = lines_table("rank", {Column(f"{metric.name}, relative", ".4f"): lines for metric, lines in panels.items()})
    drawn = {f"{metric.short_name} (relative)": lines for metric, lines in panels.items()}
    figure = costs_figure(drawn)
    return ReportItem(f"{name}-costs", "Memory, time and score over rank", text, table, figure, source_of(trials))


def relative_lines(trials: Sequence[Trial], metric: Metric, lowest: int) -> Lines:
    """Return a metric over rank, relative to LoRA of the lowest rank in the same mode. Other modes are left out."""
    lines = mean_lines(trials, RANK, metric)
    units = {method.mode: points.get(lowest) for method, points in lines.items() if not method.dora}
    return {
        method: {rank: value / unit for rank, value in points.items()}
        for method, points in lines.items()
        if (unit := units.get(method.mode))
    }


def missing_modes(trials: Sequence[Trial], panels: Mapping[str, Lines], lowest: int) -> str:
    """Return sentences on the modes that panels lack, because LoRA of the lowest rank or its figure is missing."""
    modes: dict[str, list[str]] = defaultdict(list)
    for mode in dict.fromkeys(trial.config.lora.lora_mode for trial in trials):
        lacking = [name for name, lines in panels.items() if Method(mode, False) not in lines]
        if len(lacking) == len(panels):
            modes[f"Not shown, because LoRA of rank {lowest} is missing"].append(mode)
        elif lacking:
            modes[f"Not shown in {' and '.join(lacking)}, which LoRA of rank {lowest} lacks"].append(mode)
    return "".join(f" {reason}: {', '.join(names)}." for reason, names in modes.items())


def batches_item(name: str, trials: Sequence[Trial]) -> ReportItem | str:
    """Return peak memory over the batch size by method (R0, figure 2, right)."""
    measured = [trial for trial in trials if trial.memory is not None]
    lines = mean_lines(measured, BATCH_SIZE, MEMORY)
    if not has_lines(lines):
        return "no memory over batch size, which needs one method with two batch sizes"
    shown = (*METHOD_OPTIONS, "batch_size", "fine_tune_mode")
    text = "LoRA solid, DoRA dashed." + other_differences(measured, shown)
    table = lines_table("batch size", {Column(MEMORY.name, MEMORY.format): lines})
    figure = batches_figure(lines, MEMORY.name)
    return ReportItem(f"{name}-batches", "Memory over batch size", text, table, figure, source_of(measured))


def amp_item(name: str, trials: Sequence[Trial]) -> ReportItem | str:
    """Return memory, time and score with and without mixed precision, by method (R0, figures 21 and 22)."""
    groups = [group for group in group_trials(trials, ("amp",)) if len({t.config.compute.amp for t in group}) == 2]
    if not groups:
        return "no comparison of mixed precision, which needs two trials that differ in --amp alone"
    by_method: dict[str, list[tuple[Trial, Trial]]] = defaultdict(list)
    for group in groups:
        fp32, *_, amp = sorted(group, key=lambda trial: trial.config.compute.amp)
        by_method[short_title(fp32.config)].append((fp32, amp))
    panels = {metric: amp_means(by_method, metric) for metric in (MEMORY, SECONDS, SCORE)}
    panels = {metric: means for metric, means in panels.items() if len(means) == len(by_method)}
    columns = [Column("method")]
    rows: list[list[Value]] = [[method] for method in by_method]
    for metric, means in panels.items():
        columns += [Column(f"{metric.name}, fp32", metric.format), Column(f"{metric.name}, AMP", metric.format)]
        columns.append(Column(f"change of {metric.name.split(' (')[0]}", "+.1%"))
        for row, pair in zip(rows, means, strict=True):
            row += [*pair, relative_change(*pair)]
    drawn = {metric.name: means for metric, means in panels.items()}
    figure, source = amp_figure(list(by_method), drawn), source_of([trial for group in groups for trial in group])
    text = f"Means over {len(groups)} pairs of trials. The trials of a pair differ in --amp alone."
    return ReportItem(f"{name}-amp", "With and without mixed precision", text, Table(columns, rows), figure, source)


def amp_means(by_method: Mapping[str, Sequence[tuple[Trial, Trial]]], metric: Metric) -> list[tuple[float, float]]:
    """Return for each method the means of a metric without and with mixed precision, over pairs that have both.

    Methods without such a pair are left out.
    """
    values = [[(metric.read(fp32), metric.read(amp)) for fp32, amp in pairs] for pairs in by_method.values()]
    known = [[(a, b) for a, b in pairs if a is not None and b is not None] for pairs in values]
    return [(mean(a for a, _ in pairs), mean(b for _, b in pairs)) for pairs in known if pairs]


def sort_key(config: Config) -> tuple[bool, bool, bool]:
    """Order configurations: first those without adapters, then LoRA, then DoRA, and each first without AMP."""
    return has_adapters(config), config.lora.dora, config.compute.amp


def seeds_item(name: str, trials: Sequence[Trial]) -> ReportItem | str:
    """Return means and deviations over seeds, and changes against the baseline (R0, section 5.4.3, figure 3)."""
    by_seed = [{trial.config.train.seed: trial for trial in group} for group in group_trials(trials, ("seed",))]
    groups = [list(group.values()) for group in by_seed if len(group) > 1]  # a seed that ran twice counts once
    groups.sort(key=lambda group: sort_key(group[0].config))
    if not groups:
        return "no comparison over seeds, which needs trials that differ in --seed alone"
    by_title = dict(zip(titles_of_groups(groups), groups, strict=True))
    plain = [title for title, group in by_title.items() if not any(sort_key(group[0].config))]
    baseline = plain[0] if len(plain) == 1 else None
    best = sorted(by_title, key=lambda title: -mean(SCORE.values(by_title[title])))[:FIGURE_ROWS]
    shown = {title: group for title, group in by_title.items() if title in best}
    panels = {metric.name: [metric.values(group) for group in shown.values()] for metric in (SCORE, SECONDS, MEMORY)}
    source = source_of([trial for group in groups for trial in group])
    figure = seeds_figure(list(shown), {key: rows for key, rows in panels.items() if any(rows)})
    text = "Deviations are sample standard deviations over the seeds. A configuration is named by the options that "
    text += "distinguish it. All other options are at their default, are the same in all, or change with a named one."
    text += f" The baseline is {baseline}." if baseline else ""
    if len(shown) < len(by_title):
        text += f" The figure shows the {FIGURE_ROWS} best of {len(by_title)} configurations."
    table = seeds_table(by_title, baseline)
    return ReportItem(f"{name}-seeds", "Configurations over seeds", text, table, figure, source)


def seeds_table(groups: Mapping[str, Sequence[Trial]], baseline: str | None) -> Table:
    """Return mean and deviation of each metric by configuration, and changes against the baseline if there is one."""
    compared = (SCORE, *COSTS)
    columns = [Column("configuration"), Column("seeds")]
    rows: list[list[Value]] = [[title, len(group)] for title, group in groups.items()]
    for metric in (*compared, *map(metric_of_task, TASKS.values())):
        columns += [Column(metric.name, metric.format), Column(f"deviation of {metric.name}", metric.format)]
        columns.append(Column(f"{metric.name} against baseline", "+.1%"))
        reference = None
        if baseline is not None and metric in compared:
            reference, _ = mean_and_deviation(metric.values(groups[baseline]))
        for row, (title, group) in zip(rows, groups.items(), strict=True):
            average, deviation = mean_and_deviation(metric.values(group))
            row += [average, deviation, None if title == baseline else relative_change(reference, average)]
    return Table(columns, rows).without_empty_columns()


def bars_item(name: str, trials: Sequence[Trial], title: str, metrics: Sequence[Metric]) -> ReportItem | str:
    """Return bars of some metrics, with a row for each configuration: the mean over its seeds, of which one will do."""
    groups = sorted(group_trials(trials, ("seed",)), key=lambda group: sort_key(group[0].config))
    if len(groups) < 2:
        return f"no bars of {title.lower()}, which need two configurations"
    by_title = dict(zip(titles_of_groups(groups), groups, strict=True))
    means = {metric: [mean_and_deviation(metric.values(group))[0] for group in groups] for metric in metrics}
    means = {metric: values for metric, values in means.items() if any(value is not None for value in values)}
    if not means:
        return f"no bars of {title.lower()}, which were not recorded"
    columns = {Column(metric.name, metric.format): values for metric, values in means.items()}
    rows: list[list[Value]] = [
        [configuration, len(group), *figures]
        for (configuration, group), *figures in zip(by_title.items(), *columns.values(), strict=True)
    ]
    best = sorted(by_title, key=lambda title: -mean(SCORE.values(by_title[title])))[:FIGURE_ROWS]
    drawn = [i for i, configuration in enumerate(by_title) if configuration in best]
    panels = {column: [values[i] for i in drawn] for column, values in columns.items()}
    figure = bars_figure([list(by_title)[i] for i in drawn], panels)
    text = f"The figure shows the {FIGURE_ROWS} best of {len(rows)} configurations." if len(drawn) < len(rows) else ""
    table = Table([Column("configuration"), Column("seeds"), *columns], rows)
    return ReportItem(f"{name}-{title.lower()}", f"{title} by configuration", text, table, figure, source_of(trials))


def scores_bars_item(name: str, trials: Sequence[Trial]) -> ReportItem | str:
    """Return bars of the scores (R2, figure 7)."""
    return bars_item(name, trials, "Scores", (SCORE, *map(metric_of_task, TASKS.values())))


def costs_bars_item(name: str, trials: Sequence[Trial]) -> ReportItem | str:
    """Return bars of what training took (R0, figure 22; R2, figure 8)."""
    return bars_item(name, trials, "Resources", COSTS)


def compare_trials(section: Section, name: str, trials: Sequence[Trial]) -> None:
    """Add all comparisons of trials to a section. `name` begins the names of their files."""
    note = dev_sets_note([trial.dev_examples for trial in trials])
    for item in (ranks_item, costs_item, batches_item, amp_item, seeds_item, scores_bars_item, costs_bars_item):
        made = item(name, trials)
        section.add(replace(made, text=f"{made.text} {note}".strip()) if isinstance(made, ReportItem) else made)
