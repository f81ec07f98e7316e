"""What trials show beside each other: tables and figures of a study, or of all the run directories of a report."""

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from config import Config
from reporting.figures import Lines, batches_figure, costs_figure, pairs_figure, ranks_figure, seeds_figure
from reporting.measures import mean_and_spread
from reporting.page import Piece, Section
from reporting.sources import Run, Study, Trial
from reporting.tables import Column, Table, Value
from reporting.titles import differing, has_adapters, method_of, settings, title_of, titles_of
from tasks import TASKS

SCORES = tuple(f"{task.name}_{task.metric}" for task in TASKS.values())
ROWS = 12  # configurations that a figure of seeds shows at most


@dataclass(frozen=True)
class Metric:
    """A figure that trials are compared by: its name with its unit, its format, and how to read it off a trial."""

    name: str
    format: str
    of: Callable[[Trial], float | None]


SCORE = Metric("dev score", ".4f", lambda trial: trial.score)
SECONDS = Metric("training time (s per epoch)", ",.1f", lambda trial: trial.seconds)
MEMORY = Metric("peak memory (GB)", ".3f", lambda trial: None if trial.memory is None else trial.memory / 1e9)
METRICS = (MEMORY, SECONDS, SCORE)


# ----------------------------------------------------------------------------------------------------------------------
# What trials have in common, and what tells them apart


def shared_command(commands: Sequence[str]) -> str:
    """What all commands ask for: the flags of the first that every other has too, in its order."""
    if not commands:
        return ""

    def parts(command: str) -> list[tuple[str, ...]]:
        words = shlex.split(command)
        starts = [0, *(i for i, word in enumerate(words) if word.startswith("--")), len(words)]
        return [tuple(words[start:end]) for start, end in zip(starts, starts[1:], strict=False)]

    first, *others = map(parts, dict.fromkeys(commands))
    return shlex.join(word for part in first if all(part in other for other in others) for word in part)


def commits_of(made: Sequence[Trial] | Sequence[Run]) -> str:
    """The commits that trials or runs were made by, shortened; what follows their 40 digits marks a changed tree."""
    commits = dict.fromkeys(own.commit[:12] + own.commit[40:] for own in made if own.commit)
    return f"commit {', '.join(commits) or 'not recorded'}"


def small_print(trials: Sequence[Trial]) -> str:
    """Where figures come from: commit, device, and what the commands have in common."""
    devices = dict.fromkeys(trial.device for trial in trials if trial.device)
    command = shared_command([trial.command for trial in trials])
    return "; ".join([commits_of(trials), *[", ".join(devices)] * bool(devices), command])


def averaged(trials: Sequence[Trial], shown: Collection[str]) -> str:
    """A sentence on what the trials behind a figure differ in, beside what it shows; empty where in nothing."""
    names = differing([trial.config for trial in trials], shown)
    return f" Trials also differ in {', '.join(names)}; where several share a point, it is their mean." if names else ""


def grouped(trials: Sequence[Trial], without: Collection[str]) -> list[list[Trial]]:
    """The trials that have the same settings, apart from those in `without`, together."""
    groups: dict[tuple[tuple[str, str], ...], list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[tuple(settings(trial.config, without).items())].append(trial)
    return list(groups.values())


# ----------------------------------------------------------------------------------------------------------------------
# All trials


def study_piece(study: Study) -> Piece:
    """All trials of a study with their figures; what was not run and why stands in the text."""
    done = [row for row in study.rows if row["status"] == "ok"]
    names = list(study.rows[0])
    flags = [name for name in names[names.index("status") + 1 :] if names.index(name) < names.index("score")]
    full = reference(study.trials, "full-model")
    numbers = {
        "score": Column("score", ".4f"),
        "relative": Column("relative to full-model", ".3f"),
        **{name: Column(name.replace("_", " "), ".4f") for name in SCORES},
        **{f"{name}_seconds_per_epoch": Column(f"{name} time (s per epoch)", ",.1f") for name in TASKS},
        **{f"{name}_peak_memory_bytes": Column(f"{name} peak memory (MB)", ",.1f") for name in TASKS},
        "peak_memory_bytes": Column("peak memory (MB)", ",.1f"),
        "tokens_per_second": Column("tokens per second", ",.0f"),
        "trainable_parameters": Column("trainable parameters", ",.0f"),
        "checkpoint_bytes": Column("checkpoint (MB)", ",.1f"),
    }

    def value(row: Mapping[str, str], name: str) -> Value:
        if name == "relative":
            return float(row["score"]) / full if full else None
        text = row.get(name, "")
        return float(text) / (1e6 if name.endswith("_bytes") else 1) if text else None

    usable = {trial.name for trial in study.trials}
    rows = [
        [*(row.get(name) for name in flags), *(value(row, name) for name in numbers)]
        for row in done
        if row["trial"] in usable
    ]
    columns = [*(Column(name.replace("_", " ")) for name in flags), *numbers.values()]
    causes = Counter((row["status"], row["cause"]) for row in study.rows if row["status"] != "ok")
    not_run = "; ".join(f"{count} {status}: {cause}" for (status, cause), count in causes.items())
    text = small_print(study.trials) + (f". Not there: {not_run}" if not_run else "")
    if several := of_several("Full-model", study.trials, "full-model"):
        text += "." + several
    return Piece(f"{study.name}-trials", "All trials", text, Table(columns, rows).filled())


def reference(trials: Sequence[Trial], mode: str) -> float | None:
    """The mean score of the trials without adapters in a fine-tune mode; None where there are none."""
    own = without_adapters(trials, mode)
    return mean(trial.score for trial in own) if own else None


def without_adapters(trials: Sequence[Trial], mode: str) -> list[Trial]:
    """The trials without adapters in a fine-tune mode."""
    return [trial for trial in trials if method_of(trial.config) == (mode, False)]


def of_several(title: str, trials: Sequence[Trial], mode: str) -> str:
    """A sentence on the trials behind a `reference`, which has this title; empty where it is one trial or none."""
    own = without_adapters(trials, mode)
    names = differing([trial.config for trial in own])
    which = f", which differ in {', '.join(names)}" if names else ""
    return f" {title} is the mean of {len(own)} trials{which}." if len(own) > 1 else ""


# ----------------------------------------------------------------------------------------------------------------------
# Over rank and batch size


def lines_over(trials: Sequence[Trial], position: Callable[[Config], int], metric: Metric) -> Lines:
    """The mean of a metric by position, for each method."""
    values: dict[tuple[str, bool], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        value = metric.of(trial)
        if value is not None:
            values[method_of(trial.config)][position(trial.config)].append(value)
    return {method: {at: mean(own) for at, own in sorted(points.items())} for method, points in values.items()}


def has_lines(lines: Lines) -> bool:
    """Whether there is more to draw than lone points."""
    return any(len(points) > 1 for points in lines.values())


def rank_of(config: Config) -> int:
    """The rank of the adapters."""
    return config.lora.lora_rank


def with_adapters(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have LoRA or DoRA."""
    return [trial for trial in trials if has_adapters(trial.config)]


def lines_table(position: str, panels: Mapping[Column, Lines]) -> Table:
    """The points of lines: a row for each method and position, a column for each of the panels."""
    keys = dict.fromkeys((method, at) for lines in panels.values() for method, points in lines.items() for at in points)
    rows: list[list[Value]] = [
        [mode, "DoRA" if dora else "", at, *(lines.get((mode, dora), {}).get(at) for lines in panels.values())]
        for (mode, dora), at in keys
    ]
    return Table([Column("method"), Column(""), Column(position), *panels], rows).filled()


SHOWN_RANKS = ("lora_mode", "lora_rank", "dora")


def ranks_piece(name: str, trials: Sequence[Trial]) -> Piece | str:
    """Dev score over rank by mode, relative to full fine-tuning where that is there (R0, figure 2, left)."""
    own = with_adapters(trials)
    points = lines_over(own, rank_of, SCORE)
    if not has_lines(points):
        return "no dev score over rank, which needs adapters of one mode and two ranks"
    full, frozen = reference(trials, "full-model"), reference(trials, "last-layer")
    lines = {method: {at: height / (full or 1) for at, height in heights.items()} for method, heights in points.items()}
    scores = {"full fine-tuning": full, "frozen backbone": frozen}
    references = {key: score / (full or 1) for key, score in scores.items() if score is not None}
    axis = "dev score relative to full fine-tuning" if full else "dev score"
    text = "LoRA solid, DoRA dashed." + averaged(own, SHOWN_RANKS)
    text += of_several("Full fine-tuning", trials, "full-model") + of_several("Frozen backbone", trials, "last-layer")
    if not full:
        text += " Without a trial of --lora_mode none --fine_tune_mode full-model, scores are relative to nothing."
    table = lines_table("rank", {Column(axis, ".4f"): lines})
    figure = ranks_figure(lines, references, axis, small_print(trials))
    return Piece(f"{name}-ranks", "Dev score over rank", text, table, figure)


def costs_piece(name: str, trials: Sequence[Trial]) -> Piece | str:
    """Memory, time and score over rank, each mode relative to its own LoRA of the lowest rank (R0, figure 20)."""
    own = with_adapters(trials)
    plain = [rank_of(trial.config) for trial in own if not trial.config.lora.dora]
    if not plain:
        return "no memory and time over rank, which need LoRA"
    lowest = min(plain)
    names = {SCORE: "score", SECONDS: "time", MEMORY: "memory"}
    panels = {}
    for metric in METRICS:
        lines = lines_over(own, rank_of, metric)
        units = {mode: points[lowest] for (mode, dora), points in lines.items() if not dora and lowest in points}
        relative = {
            (mode, dora): {at: height / units[mode] for at, height in points.items()}
            for (mode, dora), points in lines.items()
            if units.get(mode)
        }
        if relative:
            panels[metric] = relative
    if not any(has_lines(panels.get(metric, {})) for metric in (MEMORY, SECONDS)):
        needs = f"figures of one mode at two ranks, with its LoRA of rank {lowest} among them"
        return f"no memory and time over rank, which need {needs}"
    text = f"Each mode relative to its own LoRA of rank {lowest}." + averaged(own, SHOWN_RANKS)
    text += left_out(own, {names[metric]: lines for metric, lines in panels.items()}, lowest)
    table = lines_table("rank", {Column(f"{metric.name}, relative", ".4f"): own for metric, own in panels.items()})
    figure = costs_figure({f"{names[metric]} (relative)": own for metric, own in panels.items()}, small_print(trials))
    return Piece(f"{name}-costs", "Memory, time and score over rank", text, table, figure)


def left_out(trials: Sequence[Trial], panels: Mapping[str, Lines], lowest: int) -> str:
    """Sentences on the modes that panels lack, since they have no LoRA of the lowest rank, or not its figures."""
    modes: dict[str, list[str]] = defaultdict(list)
    for mode in dict.fromkeys(trial.config.lora.lora_mode for trial in trials):
        lacking = [name for name, lines in panels.items() if (mode, False) not in lines]
        if len(lacking) == len(panels):
            modes[f"Left out, without LoRA of rank {lowest}"].append(mode)
        elif lacking:
            modes[f"Left out of {' and '.join(lacking)}, of which LoRA of rank {lowest} has none"].append(mode)
    return "".join(f" {cause}: {', '.join(own)}." for cause, own in modes.items())


def batches_piece(name: str, trials: Sequence[Trial]) -> Piece | str:
    """Peak memory over the batch size by method (R0, figure 2, right)."""
    own = [trial for trial in trials if trial.memory is not None]
    lines = lines_over(own, lambda config: config.train.batch_size, MEMORY)
    if not has_lines(lines):
        return "no memory over batch size, which needs one method with two batch sizes"
    text = "LoRA solid, DoRA dashed." + averaged(own, (*SHOWN_RANKS, "batch_size", "fine_tune_mode"))
    table = lines_table("batch size", {Column(MEMORY.name, MEMORY.format): lines})
    figure = batches_figure(lines, MEMORY.name, small_print(own))
    return Piece(f"{name}-batches", "Memory over batch size", text, table, figure)


# ----------------------------------------------------------------------------------------------------------------------
# With and without mixed precision; over seeds


def amp_piece(name: str, trials: Sequence[Trial]) -> Piece | str:
    """Memory, time and score with and without mixed precision, by method (R0, figures 21 and 22)."""
    groups = [group for group in grouped(trials, ("amp",)) if len({t.config.compute.amp for t in group}) == 2]
    if not groups:
        return "no comparison of mixed precision, which needs two trials that differ in --amp alone"
    pairs = [sorted(group, key=lambda trial: trial.config.compute.amp) for group in groups]
    methods = [title_of(off.config) for off, *_ in pairs]
    panels = {metric: own for metric in METRICS if (own := off_and_on(pairs, metric)).keys() == set(methods)}
    order = list(dict.fromkeys(methods))
    columns = [Column("method")]
    for metric in panels:
        columns += [Column(f"{metric.name}, fp32", metric.format), Column(f"{metric.name}, AMP", metric.format)]
        columns.append(Column(f"change of {metric.name.split(' (')[0]}", "+.1%"))
    rows: list[list[Value]] = [
        [method, *(cell for own in panels.values() for cell in (*own[method], change(*own[method])))]
        for method in order
    ]
    used = [trial for group in groups for trial in group]
    figure = pairs_figure(
        order, {metric.name: [own[method] for method in order] for metric, own in panels.items()}, small_print(used)
    )
    text = f"Means over {len(pairs)} pairs of trials, each of which differs in --amp alone."
    return Piece(f"{name}-amp", "With and without mixed precision", text, Table(columns, rows), figure)


def off_and_on(pairs: Sequence[Sequence[Trial]], metric: Metric) -> dict[str, tuple[float, float]]:
    """By method, the means of a metric without and with mixed precision, over the pairs in which both are known."""
    by_method: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        off, on = metric.of(pair[0]), metric.of(pair[-1])
        if off is not None and on is not None:
            by_method[title_of(pair[0].config)].append((off, on))
    return {method: (mean(off for off, _ in own), mean(on for _, on in own)) for method, own in by_method.items()}


def place(config: Config) -> tuple[bool, bool, bool]:
    """The order of configurations: without adapters, LoRA, DoRA; of each first those without mixed precision."""
    return has_adapters(config), config.lora.dora, config.compute.amp


def seeds_piece(name: str, trials: Sequence[Trial]) -> Piece | str:
    """Configurations over their seeds: means, deviations, and changes against the baseline (R0, 5.4.3, figure 3)."""
    by_seed = [{trial.config.train.seed: trial for trial in group} for group in grouped(trials, ("seed",))]
    groups = [list(own.values()) for own in by_seed if len(own) > 1]  # a seed that ran twice counts once
    if not groups:
        return "no comparison over seeds, which needs trials that differ in --seed alone"
    groups.sort(key=lambda group: place(group[0].config))
    by_title = dict(zip(titles_of([group[0].config for group in groups]), groups, strict=True))
    plain = [title for title, own in by_title.items() if place(own[0].config) == (False, False, False)]
    baseline = plain[0] if len(plain) == 1 else None
    best = sorted(by_title, key=lambda title: -mean(trial.score for trial in by_title[title]))[:ROWS]
    shown = {title: own for title, own in by_title.items() if title in best}
    panels = {metric.name: [values_of(own, metric) for own in shown.values()] for metric in METRICS[::-1]}
    note = small_print([trial for own in by_title.values() for trial in own])
    figure = seeds_figure(list(shown), {key: own for key, own in panels.items() if any(own)}, note)
    text = "Deviations are sample standard deviations over the seeds. A configuration is named by what sets it apart: "
    text += "options that its name leaves out are at their default, the same in all, or change with one that is named."
    text += f" The baseline is {baseline}." if baseline else ""
    if len(shown) < len(by_title):
        text += f" The figure has the {ROWS} best of {len(by_title)} configurations."
    return Piece(f"{name}-seeds", "Configurations over seeds", text, seeds_table(by_title, baseline), figure)


def seeds_table(groups: Mapping[str, Sequence[Trial]], baseline: str | None) -> Table:
    """Mean and deviation of each metric by configuration, and the change against the baseline, if there is one."""
    of_tasks = [Metric(f"{task.name} {task.metric}", ".4f", of_task(task.name)) for task in TASKS.values()]
    columns = [Column("configuration"), Column("seeds")]
    rows: list[list[Value]] = [[title, len(group)] for title, group in groups.items()]
    for metric in (*METRICS[::-1], *of_tasks):
        found = {title: mean_and_spread(values_of(group, metric)) for title, group in groups.items()}
        columns += [Column(metric.name, metric.format), Column(f"deviation of {metric.name}", metric.format)]
        columns.append(Column(f"{metric.name} against baseline", "+.1%"))
        for row, (title, (average, spread)) in zip(rows, found.items(), strict=True):
            compared = metric in METRICS and baseline is not None and title != baseline
            row += [average, spread, change(found[baseline][0], average) if compared and baseline else None]
    return Table(columns, rows).filled()


def values_of(trials: Sequence[Trial], metric: Metric) -> list[float]:
    """A metric of those trials that have it."""
    return [value for trial in trials if (value := metric.of(trial)) is not None]


def change(before: float | None, after: float | None) -> float | None:
    """The relative change of a figure; None where one of the two is not known."""
    return after / before - 1 if before and after is not None else None


def of_task(name: str) -> Callable[[Trial], float | None]:
    """How to read a task's own metric off a trial."""
    return lambda trial: trial.by_task.get(name)


def compare_trials(section: Section, name: str, trials: Sequence[Trial]) -> None:
    """Add all that trials show beside each other to a section."""
    for piece in (ranks_piece, costs_piece, batches_piece, amp_piece, seeds_piece):
        section.add(piece(name, trials))
