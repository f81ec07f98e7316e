"""Figures that fit a column of a two-column page. They draw the data that they are given.

The colours are those of Okabe and Ito, which colour-blind people can distinguish. Markers, dashes and hatches
distinguish in black and white.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lora import MODES
from reporting.tables import Column
from reporting.titles import Method
from training.logger import draw_confusion
from utils.untrusted import shown

COLUMN_WIDTH = 3.3  # inches
DPI = 300
LABEL_SIZE, TICK_SIZE, LEGEND_SIZE, NUMBER_SIZE = 7.5, 6.5, 6.0, 5.0  # points
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
METHOD_STYLES = {
    "attn": ("#0072B2", "o"),
    "attn-only": ("#56B4E9", "s"),
    "all-lin": ("#D55E00", "^"),
    "all-lin-only": ("#E69F00", "D"),
    "full-model": ("#000000", "X"),
    "last-layer": ("#999999", "v"),
    "iterative": ("#009E73", "P"),
}
ROW_WIDTH, LEGEND_WIDTH, MOST_LINES = 26, 58, 4  # the most characters in a line of a label, and the most lines
FP32_COLOUR, AMP_COLOUR = "#999999", "#0072B2"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"

Lines = Mapping[Method, Mapping[int, float]]  # method -> position -> height
Curves = Mapping[str, Mapping[int, float]]  # name -> epoch -> height


def escape_dollars(text: str) -> str:
    """Return a text that matplotlib draws as it is written. It takes text between two dollar signs for a formula."""
    return text.replace("$", r"\$")


def new_figure(height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of `height` inches with `panels` one below the other."""
    figure = Figure(figsize=(COLUMN_WIDTH, height), dpi=DPI, layout="constrained")
    all_axes = list(figure.subplots(panels, squeeze=False)[:, 0])
    for axes in all_axes:
        axes.tick_params(labelsize=TICK_SIZE, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return figure, all_axes


def label_axes(axes: Axes, x: str, y: str, grid: Any = "y") -> None:
    """Name the axes, and draw grid lines at the ticks of `grid`."""
    axes.set_xlabel(escape_dollars(x), fontsize=LABEL_SIZE)
    axes.set_ylabel(escape_dollars(y), fontsize=LABEL_SIZE)
    axes.grid(axis=grid, color="0.9", linewidth=0.6)


def label_epochs(axes: Axes, x: str, y: str) -> None:
    """Name the axes, and give the x axis whole numbers."""
    axes.locator_params(axis="x", integer=True)
    label_axes(axes, x, y)


def add_legend(figure: Figure, entries: Sequence[Artist], columns: int) -> None:
    """Add one legend above all panels."""
    style: dict[str, Any] = {"fontsize": LEGEND_SIZE, "frameon": False, "columnspacing": 1.2, "handlelength": 2.4}
    figure.legend(handles=entries, ncols=columns, loc="outside upper center", **style)


def line_style(dashed: bool, colour: str) -> dict[str, Any]:
    """Return the style of a solid line with full markers, or of a dashed line with hollow markers."""
    kind = {"linestyle": "--", "markerfacecolor": "white"} if dashed else {"linestyle": "-", "markerfacecolor": colour}
    return {"color": colour, "markersize": 3.2, "linewidth": 1.1, **kind}


def tick_labels(positions: Sequence[int]) -> list[str]:
    """Return the labels of ticks. A label that is too close to its left neighbour is moved one line down."""
    labels: list[str] = []
    for left, position in zip([0, *positions], positions, strict=False):
        close = bool(labels) and position < 1.35 * left and not labels[-1].startswith("\n")
        labels.append(f"\n{position}" if close else str(position))
    return labels


def draw_lines(all_axes: Sequence[Axes], panels: Mapping[str, Lines], x: str) -> list[Line2D]:
    """Draw a line for each method in each panel, over a logarithmic axis. Return the entries of the legend.

    DoRA is dashed with hollow markers.
    """
    positions = sorted({position for lines in panels.values() for points in lines.values() for position in points})
    for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
        for method, points in lines.items():
            colour, marker = METHOD_STYLES[method.mode]
            axes.plot(list(points), list(points.values()), marker=marker, **line_style(method.dora, colour))
        axes.set_xscale("log", base=2)
        axes.set_xticks(positions, tick_labels(positions))
        axes.minorticks_off()
        axes.tick_params(labelbottom=axes is all_axes[-1])
        label_axes(axes, x if axes is all_axes[-1] else "", name)
    methods = {method for lines in panels.values() for method in lines}
    entries = [
        Line2D([], [], marker=marker, label=mode, **line_style(False, colour))
        for mode, (colour, marker) in METHOD_STYLES.items()
        if mode in {method.mode for method in methods}
    ]
    for dora in sorted({method.dora for method in methods if method.mode in MODES}):
        entries.append(Line2D([], [], marker="o", label="DoRA" if dora else "LoRA", **line_style(dora, "0.3")))
    return entries


def ranks_figure(lines: Lines, references: Mapping[str, float], axis: str) -> Figure:
    """Draw dev scores over rank, and horizontal lines at the scores of at most two `references`."""
    figure, (axes,) = new_figure(3.0)
    entries = draw_lines([axes], {axis: lines}, "rank")
    for (name, height), style in zip(references.items(), ("-", ":"), strict=False):
        entries.append(axes.axhline(height, color="black", linewidth=0.9, linestyle=style, label=name))
    add_legend(figure, entries, 4)
    return figure


def batches_figure(lines: Lines, axis: str) -> Figure:
    """Draw a cost over the batch size."""
    figure, (axes,) = new_figure(2.7)
    add_legend(figure, draw_lines([axes], {axis: lines}, "batch size (examples)"), 4)
    axes.set_ylim(0, 1.08 * max(height for points in lines.values() for height in points.values()))
    return figure


def costs_figure(panels: Mapping[str, Lines]) -> Figure:
    """Draw several relative figures over rank, one panel for each."""
    figure, all_axes = new_figure(0.75 + 0.95 * len(panels), len(panels))
    for axes in all_axes:
        axes.axhline(1, color="0.6", linewidth=0.7)
    add_legend(figure, draw_lines(all_axes, panels, "rank"), 4)
    figure.align_ylabels()
    return figure


def wrap_label(name: str, width: int = ROW_WIDTH) -> str:
    """Return a label in lines of at most `width` characters. A label with too many lines loses its middle."""
    lines = textwrap.wrap(shown(name), width, break_on_hyphens=False)
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 2], ELLIPSIS, lines[-1]]
    return "\n".join(lines)


def rows_height(names: Sequence[str], minimum: float) -> float:
    """Return the inches that rows with these labels need, at least `minimum` for each."""
    return len(names) * max(minimum, 0.06 + 0.11 * max(1 + wrap_label(name).count("\n") for name in names))


def label_rows(axes: Axes, names: Sequence[str], x: str) -> None:
    """Label rows from top to bottom, and the x axis."""
    axes.set_yticks(range(len(names)), [escape_dollars(wrap_label(name)) for name in names], fontsize=TICK_SIZE)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)
    label_axes(axes, x, "", "x")


def amp_figure(names: Sequence[str], panels: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Draw two bars in each row of each panel: without and with mixed precision."""
    figure, all_axes = new_figure(0.35 + len(panels) * (0.4 + rows_height(names, 0.24)), len(panels))
    rows = np.arange(len(names))
    fp32: dict[str, Any] = {"color": FP32_COLOUR}
    amp: dict[str, Any] = {"facecolor": "white", "edgecolor": AMP_COLOUR, "hatch": "//////"}
    for axes, (name, pairs) in zip(all_axes, panels.items(), strict=True):
        axes.barh(rows - 0.2, [without for without, _ in pairs], 0.36, linewidth=0.7, **fp32)
        axes.barh(rows + 0.2, [with_amp for _, with_amp in pairs], 0.36, linewidth=0.7, **amp)
        label_rows(axes, names, name)
    add_legend(figure, [Patch(label="fp32", **fp32), Patch(label="mixed precision (AMP)", **amp)], 2)
    return figure


def seeds_figure(names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Draw a dot for each seed and a black bar at their mean. Each configuration has a row in each panel."""
    figure, all_axes = new_figure(0.35 + len(panels) * (0.42 + rows_height(names, 0.19)), len(panels))
    for axes, (name, rows) in zip(all_axes, panels.items(), strict=True):
        for i, values in enumerate(rows):
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(values, [i] * len(values), ls="none", markersize=4, markeredgewidth=0, alpha=0.8, **style)
            if values:
                axes.plot([float(np.mean(values))], [i], color="black", marker="|", markersize=9, markeredgewidth=1.4)
        label_rows(axes, names, name)
    dot = Line2D([], [], marker="o", ls="none", color="0.5", markersize=4, markeredgewidth=0, label="a seed")
    bar = Line2D([], [], marker="|", ls="none", color="black", markersize=8, markeredgewidth=1.4, label="mean")
    add_legend(figure, [dot, bar], 2)
    return figure


def bars_figure(names: Sequence[str], panels: Mapping[Column, Sequence[float | None]]) -> Figure:
    """Draw a bar, with its number, in each row of each panel. An unknown figure has no bar."""
    figure, all_axes = new_figure(0.1 + len(panels) * (0.42 + rows_height(names, 0.19)), len(panels))
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    for axes, (column, values) in zip(all_axes, panels.items(), strict=True):
        bars = axes.barh(range(len(names)), [value or 0.0 for value in values], 0.7, color=colours)
        axes.bar_label(bars, [column.text(value) for value in values], fontsize=NUMBER_SIZE, padding=2)
        axes.margins(x=0.25 if any((value or 0.0) < 0 for value in values) else 0.14)  # room for the numbers
        label_rows(axes, names, column.name)
    return figure


def report_figure(names: Sequence[str], panels: Mapping[str, Sequence[tuple[float | None, Sequence[float]]]]) -> Figure:
    """Draw a hollow diamond for the figure that a report prints, a dot for each of our seeds and a bar at their mean.

    Each row of the report's table has a row in each panel.
    """
    figure, all_axes = new_figure(0.35 + len(panels) * (0.42 + rows_height(names, 0.19)), len(panels))
    dot: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "ls": "none", "markersize": 4, "markeredgewidth": 0}
    bar: dict[str, Any] = {"color": "black", "marker": "|", "ls": "none", "markersize": 9, "markeredgewidth": 1.4}
    diamond: dict[str, Any] = {"color": COLOURS[1], "marker": "D", "ls": "none", "markersize": 5, "fillstyle": "none"}
    for axes, (name, rows) in zip(all_axes, panels.items(), strict=True):
        for i, (reported, ours) in enumerate(rows):
            if reported is not None:
                axes.plot([reported], [i], **diamond)
            if ours:
                axes.plot(ours, [i] * len(ours), alpha=0.8, **dot)
                axes.plot([float(np.mean(ours))], [i], **bar)
        label_rows(axes, names, name)
    kinds = {"reported": diamond, "ours, a seed": dot, "ours, mean": bar}
    add_legend(figure, [Line2D([], [], label=label, **style) for label, style in kinds.items()], 3)
    return figure


def curves_figure(train: Curves, dev: Curves, losses: Curves, axis: str, best: int | None) -> Figure:
    """Draw a run's training losses by task, and above them its training (dashed) and dev (solid) metrics.

    Further pre-training has only losses. `best` is the epoch of best.pt.
    """
    scored = bool(train or dev)
    figure, panels = new_figure(3.7 if scored else 2.4, 1 + scored)
    names = dict.fromkeys([*losses, *dev])  # a task can be scored without being trained
    styles = {name: (COLOURS[i], MARKERS[i]) for i, name in enumerate(names)}
    entries = [
        Line2D([], [], marker=marker, label=name, **line_style(False, colour))
        for name, (colour, marker) in styles.items()
    ]
    for axes, curves, dashed in ((panels[0], dev, False), (panels[0], train, True), (panels[-1], losses, True)):
        for name, points in curves.items():
            colour, marker = styles[name]
            axes.plot(list(points), list(points.values()), marker=marker, **line_style(dashed, colour))
    label_epochs(panels[0], "", axis)
    label_epochs(panels[-1], "epoch", "training loss")
    panels[-1].set_ylim(bottom=0)
    if scored:
        entries.append(Line2D([], [], label="dev", **line_style(False, "0.3")))
        entries.append(Line2D([], [], label="training", **line_style(True, "0.3")))
    if best is not None:
        kept = [axes.axvline(best, color="0.6", linewidth=0.8, linestyle=":", label="best epoch") for axes in panels]
        entries.append(kept[0])
    add_legend(figure, entries, 3)
    figure.align_ylabels()
    return figure


def runs_figure(panels: Mapping[str, Curves]) -> Figure:
    """Draw curves over epochs: a panel for each axis, and in it a line for each of at most eight runs."""
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    labels = {name: wrap_label(name, LEGEND_WIDTH) for name in names}
    rows = sum(1 + label.count("\n") for label in labels.values())
    figure, all_axes = new_figure(0.7 + 1.7 * len(panels) + 0.1 * rows, len(panels))
    styles = dict(zip(names, zip(COLOURS, MARKERS, strict=True), strict=False))
    for axes, (axis, curves) in zip(all_axes, panels.items(), strict=True):
        for name, points in curves.items():
            colour, marker = styles[name]
            axes.plot(list(points), list(points.values()), marker=marker, **line_style(False, colour))
        label_epochs(axes, "epoch" if axes is all_axes[-1] else "", axis)
    entries = []
    for name, (colour, marker) in styles.items():
        label = escape_dollars(labels[name])
        entries.append(Line2D([], [], marker=marker, label=label, **line_style(False, colour)))
    add_legend(figure, entries, 1 if max(map(len, names)) > 24 else 2)
    figure.align_ylabels()
    return figure


def timeline_figure(points: Sequence[tuple[float, float]], marks: Sequence[float], x: str, y: str) -> Figure:
    """Draw a height that holds from each of `points` (place, height) to the next, and dotted lines at `marks`."""
    figure, (axes,) = new_figure(2.0)
    places, heights = zip(*points, strict=True)
    axes.step(places, heights, where="post", color=COLOURS[0], linewidth=0.7)
    for mark in marks:
        axes.axvline(mark, color="0.6", linewidth=0.7, linestyle=":")
    axes.set_ylim(bottom=0)
    label_axes(axes, x, y)
    return figure


def confusion_figure(counts: np.ndarray, names: Sequence[str], x: str = "predicted", y: str = "true") -> Figure:
    """Draw a confusion matrix [K, K]: the numbers, and each as a percentage of its row."""
    figure, (axes,) = new_figure(1.3 + 0.34 * len(names))
    draw_confusion(axes, counts, names, 6)
    axes.spines[["top", "right"]].set_visible(True)
    axes.set_xlabel(escape_dollars(x), fontsize=LABEL_SIZE)
    axes.set_ylabel(escape_dollars(y), fontsize=LABEL_SIZE)
    return figure


def scatter_figure(
    x: np.ndarray, y: np.ndarray, names: tuple[str, str], line: tuple[float, float] | None = None
) -> Figure:
    """Draw dots, and a line with this slope and intercept, or else one at zero. `names` are those of the axes."""
    figure, (axes,) = new_figure(2.8 if line else 2.4)
    alpha = min(0.6, max(0.15, 120 / len(x)))  # many dots are more transparent, so that dense regions look darker
    axes.scatter(x, y, s=7, alpha=alpha, color=COLOURS[0], edgecolors="none")
    label_axes(axes, *names, grid="both")
    if line is None:
        axes.axhline(0, color="0.4", linewidth=0.8)
        return figure
    slope, intercept = line
    ends = np.array([x.min(), x.max()], dtype=np.float64)
    label = f"fitted line: {slope:.2f} x {'-' if intercept < 0 else '+'} {abs(intercept):.2f}"
    add_legend(figure, axes.plot(ends, slope * ends + intercept, color=COLOURS[1], linewidth=1.3, label=label), 1)
    return figure
