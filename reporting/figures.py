"""Figures as wide as a column of a two-column page: they draw the data they are given and decide nothing about it.

Colours are Okabe and Ito's, which colour-blind people tell apart; markers, dashes and hatches do so in black and white.
Every figure has a small print at its foot: where its data come from.
"""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from training.logger import draw_confusion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLUMN_WIDTH = 3.3  # inches
DPI = 300
LABEL, TICK, LEGEND, PRINT = 7.5, 6.5, 6.0, 5.0  # points
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
METHODS = {  # adapters by their mode; without any, what of the backbones trains
    "attn": ("#0072B2", "o"),
    "attn-only": ("#56B4E9", "s"),
    "all-lin": ("#D55E00", "^"),
    "all-lin-only": ("#E69F00", "D"),
    "full-model": ("#000000", "X"),
    "last-layer": ("#999999", "v"),
    "iterative": ("#009E73", "P"),
}
ROW_WIDTH, ROW_LINES = 26, 4  # characters of a row's label beside the axes, and lines
OFF, ON = "#999999", "#0072B2"  # without and with

Lines = Mapping[tuple[str, bool], Mapping[int, float]]  # (method, DoRA) -> position -> height


def plain(text: str) -> str:
    """A text that is drawn as it is written: matplotlib takes what stands between two dollar signs for a formula."""
    return text.replace("$", r"\$")


def shortened(name: str, most: int) -> str:
    """A name of at most `most` characters. It is the middle that is left out, since many names differ at their ends."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def frame(note: str, height: float, panels: int = 1) -> "tuple[Figure, list[Axes]]":
    """An empty figure of `height` inches with `panels` one below the other, and `note` as the small print below."""
    from matplotlib.figure import Figure

    together = re.sub(r"(--\w+) (?!-)", "\\1\N{NO-BREAK SPACE}", note)  # a flag stands in one line with its value
    small = textwrap.wrap(together, 88, break_on_hyphens=False)
    margin = 0.095 * len(small)  # inches
    whole = height + margin
    figure = Figure(figsize=(COLUMN_WIDTH, whole), dpi=DPI)
    top = 0.03  # inches
    figure.set_layout_engine("constrained", rect=(0, margin / whole, 1, (height - top) / whole))
    figure.text(
        0.01, 0.02 / whole, plain("\n".join(small)), fontsize=PRINT, color="0.35", linespacing=1.25, va="bottom"
    )
    axes = list(figure.subplots(panels, squeeze=False)[:, 0])
    for own in axes:
        own.tick_params(labelsize=TICK, length=2)
        own.spines[["top", "right"]].set_visible(False)
        own.set_axisbelow(True)
    return figure, axes


def label(axes: "Axes", x: str, y: str, grid: Any = "y") -> None:
    """Name the axes, and draw lines across from the ticks of `grid`."""
    axes.set_xlabel(plain(x), fontsize=LABEL)
    axes.set_ylabel(plain(y), fontsize=LABEL)
    axes.grid(axis=grid, color="0.9", linewidth=0.6)


def legend(figure: "Figure", handles: Sequence[Any], columns: int) -> None:
    """One legend above all panels."""
    style: dict[str, Any] = {"fontsize": LEGEND, "frameon": False, "columnspacing": 1.2, "handlelength": 2.4}
    figure.legend(handles=handles, ncols=columns, loc="outside upper center", **style)


def key(**style: Any) -> "Line2D":
    """An entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


# ----------------------------------------------------------------------------------------------------------------------
# Lines by method


def line_style(dashed: bool, colour: str) -> dict[str, Any]:
    """A solid line with full markers, or a dashed one with hollow markers."""
    kind = {"linestyle": "--", "markerfacecolor": "white"} if dashed else {"linestyle": "-", "markerfacecolor": colour}
    return {"color": colour, "markersize": 3.2, "linewidth": 1.1, **kind}


def method_keys(methods: Iterable[tuple[str, bool]]) -> "list[Line2D]":
    """A key for each method's colour and marker, then for LoRA and DoRA where both are there or one needs a name."""
    methods = list(methods)
    keys = [
        key(marker=marker, label=name, **line_style(False, colour))
        for name, (colour, marker) in METHODS.items()
        if any(name == own for own, _ in methods)
    ]
    kinds = sorted({dora for name, dora in methods if name in ("attn", "attn-only", "all-lin", "all-lin-only")})
    names = {False: "LoRA", True: "DoRA"}
    return keys + [key(marker="o", label=names[dora], **line_style(dora, "0.3")) for dora in kinds]


def draw_lines(axes: "Axes", lines: Lines) -> None:
    """A line for each method: LoRA solid with full markers, DoRA dashed with hollow ones."""
    for (method, dora), points in lines.items():
        colour, marker = METHODS[method]
        axes.plot(list(points), list(points.values()), marker=marker, **line_style(dora, colour))


def tick_labels(positions: Sequence[int]) -> list[str]:
    """Labels of the ticks; one that is too near to its left neighbour stands a line lower."""
    labels: list[str] = []
    for left, position in zip([0, *positions], positions, strict=False):
        near = bool(labels) and position < 1.35 * left and not labels[-1].startswith("\n")
        labels.append("\n" * near + str(position))
    return labels


def set_doubling(axes: "Axes", all_lines: Iterable[Lines]) -> None:
    """An axis of powers of two with a tick at every position that a line has."""
    positions = sorted({position for lines in all_lines for points in lines.values() for position in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(positions, tick_labels(positions))
    axes.minorticks_off()


def ranks_figure(lines: Lines, references: Mapping[str, float], axis: str, note: str) -> "Figure":
    """Dev score over rank by mode; `references` are heights of what the adapters are compared with, at most two."""
    figure, (axes,) = frame(note, 3.0)
    draw_lines(axes, lines)
    keys = method_keys(lines)
    for (name, height), style in zip(references.items(), ("-", ":"), strict=False):
        keys.append(axes.axhline(height, color="black", linewidth=0.9, linestyle=style, label=name))
    set_doubling(axes, [lines])
    label(axes, "rank", axis)
    legend(figure, keys, 4)
    return figure


def batches_figure(lines: Lines, axis: str, note: str) -> "Figure":
    """A figure of cost over the batch size by method."""
    figure, (axes,) = frame(note, 2.7)
    draw_lines(axes, lines)
    set_doubling(axes, [lines])
    axes.set_ylim(0, 1.08 * max(height for points in lines.values() for height in points.values()))
    label(axes, "batch size (examples)", axis)
    legend(figure, method_keys(lines), 4)
    return figure


def costs_figure(panels: Mapping[str, Lines], note: str) -> "Figure":
    """Several figures over rank, one below the other, each relative to 1."""
    figure, all_axes = frame(note, 0.75 + 0.95 * len(panels), len(panels))
    for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
        axes.axhline(1, color="0.6", linewidth=0.7)
        draw_lines(axes, lines)
        set_doubling(axes, panels.values())
        axes.tick_params(labelbottom=axes is all_axes[-1])
        label(axes, "rank" if axes is all_axes[-1] else "", name)
    legend(figure, method_keys([method for lines in panels.values() for method in lines]), 4)
    figure.align_ylabels()
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Rows by method


def in_lines(name: str) -> str:
    """A row's label in lines that leave room for the axes; of one that is too long, its middle is left out."""
    lines = textwrap.wrap(name, ROW_WIDTH, break_on_hyphens=False)
    if len(lines) > ROW_LINES:
        lines = [*lines[: ROW_LINES - 2], "\N{HORIZONTAL ELLIPSIS}", lines[-1]]
    return "\n".join(lines)


def rows_height(names: Sequence[str], least: float) -> float:
    """Inches that rows with these labels need, of which each has at least `least`."""
    return len(names) * max(least, 0.06 + 0.11 * max(1 + in_lines(name).count("\n") for name in names))


def draw_rows(axes: "Axes", names: Sequence[str], x: str) -> None:
    """Label rows from the top down."""
    axes.set_yticks(range(len(names)), [plain(in_lines(name)) for name in names], fontsize=TICK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)
    label(axes, x, "", "x")


def pairs_figure(names: Sequence[str], panels: Mapping[str, Sequence[tuple[float, float]]], note: str) -> "Figure":
    """Two bars a row in each panel: without and with mixed precision."""
    from matplotlib.patches import Patch

    figure, all_axes = frame(note, 0.35 + len(panels) * (0.4 + rows_height(names, 0.24)), len(panels))
    rows = np.arange(len(names))
    styles: list[dict[str, Any]] = [{"color": OFF}, {"facecolor": "white", "edgecolor": ON, "hatch": "//////"}]
    for axes, (name, pairs) in zip(all_axes, panels.items(), strict=True):
        for which, style in enumerate(styles):
            axes.barh(rows - 0.2 + 0.4 * which, [pair[which] for pair in pairs], 0.36, linewidth=0.7, **style)
        draw_rows(axes, names, name)
    legend(figure, [Patch(label="fp32", **styles[0]), Patch(label="mixed precision (AMP)", **styles[1])], 2)
    return figure


def seeds_figure(names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]], note: str) -> "Figure":
    """A dot for each seed and a black bar at their mean, a row for each configuration in each panel."""
    figure, all_axes = frame(note, 0.35 + len(panels) * (0.42 + rows_height(names, 0.19)), len(panels))
    for axes, (name, rows) in zip(all_axes, panels.items(), strict=True):
        for i, values in enumerate(rows):
            style: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKERS[i % len(MARKERS)],
                "alpha": 0.8,
            }
            axes.plot(values, [i] * len(values), linestyle="none", markersize=4, markeredgewidth=0, **style)
            if len(values):
                axes.plot([float(np.mean(values))], [i], color="black", marker="|", markersize=9, markeredgewidth=1.4)
        draw_rows(axes, names, name)
    one = key(marker="o", linestyle="none", color="0.5", markersize=4, markeredgewidth=0, label="a seed")
    mean = key(marker="|", linestyle="none", color="black", markersize=8, markeredgewidth=1.4, label="mean")
    legend(figure, [one, mean], 2)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Curves over epochs


def set_epochs(axes: "Axes", name: str) -> None:
    """An axis of whole epochs."""
    axes.locator_params(axis="x", integer=True)
    label(axes, name, "")


def curves_figure(
    train: Mapping[str, Mapping[int, float]],
    dev: Mapping[str, Mapping[int, float]],
    losses: Mapping[str, Mapping[int, float]],
    axis: str,
    best: int | None,
    note: str,
) -> "Figure":
    """A run's training losses of each task over epochs, and above them its training (dashed) and dev (solid) metrics.

    Further pre-training has losses alone.
    """
    scored = bool(train or dev)
    figure, panels = frame(note, 3.7 if scored else 2.4, 1 + scored)
    names = dict.fromkeys([*losses, *dev])  # a task may be scored without being trained
    style = {name: (COLOURS[i], MARKERS[i]) for i, name in enumerate(names)}
    keys = [key(marker=marker, label=name, **line_style(False, colour)) for name, (colour, marker) in style.items()]
    parts = [(panels[0], dev, False), (panels[0], train, True), (panels[-1], losses, True)]
    for axes, lines, dashed in parts:
        for name, points in lines.items():
            colour, marker = style[name]
            axes.plot(list(points), list(points.values()), marker=marker, **line_style(dashed, colour))
    for axes in panels:
        set_epochs(axes, "epoch" if axes is panels[-1] else "")
        if best is not None:
            axes.axvline(best, color="0.6", linewidth=0.8, linestyle=":")
    panels[0].set_ylabel(axis, fontsize=LABEL)
    panels[-1].set_ylabel("training loss", fontsize=LABEL)
    panels[-1].set_ylim(bottom=0)
    if scored:
        keys += [key(label="dev", **line_style(False, "0.3")), key(label="training", **line_style(True, "0.3"))]
    if best is not None:
        keys.append(key(color="0.6", linewidth=0.8, linestyle=":", label="epoch kept"))
    legend(figure, keys, 3)
    figure.align_ylabels()
    return figure


def scores_figure(runs: Mapping[str, Mapping[int, float]], note: str) -> "Figure":
    """Dev score over epochs, a line for each of at most eight runs."""
    figure, (axes,) = frame(note, 2.4 + 0.1 * len(runs))
    keys = []
    for (name, points), colour, marker in zip(runs.items(), COLOURS, MARKERS, strict=False):
        axes.plot(list(points), list(points.values()), marker=marker, **line_style(False, colour))
        keys.append(key(marker=marker, label=plain(shortened(name, 60)), **line_style(False, colour)))
    set_epochs(axes, "epoch")
    axes.set_ylabel("dev score", fontsize=LABEL)
    legend(figure, keys, 1 if max(map(len, runs)) > 24 else 2)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


def confusion_figure(
    counts: np.ndarray, names: Sequence[str], note: str, x: str = "predicted", y: str = "true"
) -> "Figure":
    """A confusion matrix [K, K]; each row in percent of its sum, and in numbers."""
    figure, (axes,) = frame(note, 1.3 + 0.34 * len(names))
    draw_confusion(axes, counts, names, 6)
    axes.spines[["top", "right"]].set_visible(True)
    axes.set_xlabel(plain(x), fontsize=LABEL)
    axes.set_ylabel(plain(y), fontsize=LABEL)
    return figure


def dots(axes: "Axes", x: np.ndarray, y: np.ndarray) -> None:
    """Dots that remain countable where they lie on each other."""
    axes.scatter(x, y, s=7, alpha=min(0.6, max(0.15, 120 / len(x))), color=COLOURS[0], edgecolors="none")


def residuals_figure(labels: np.ndarray, residuals: np.ndarray, name: str, note: str) -> "Figure":
    """Residuals over true similarities, whose axis is called `name`."""
    figure, (axes,) = frame(note, 2.4)
    axes.axhline(0, color="0.4", linewidth=0.8)
    dots(axes, labels, residuals)
    label(axes, name, "fitted prediction - true", "both")
    return figure


def scatter_figure(
    x: np.ndarray, y: np.ndarray, line: tuple[float, float], names: tuple[str, str], note: str
) -> "Figure":
    """Dots with their best line, of slope and intercept `line`; `names` are those of the axes."""
    figure, (axes,) = frame(note, 2.8)
    dots(axes, x, y)
    ends = np.array([x.min(), x.max()], dtype=np.float64)
    style: dict[str, Any] = {"color": COLOURS[1], "linewidth": 1.3}
    axes.plot(ends, line[0] * ends + line[1], **style)
    label(axes, *names, grid="both")
    legend(
        figure, [key(label=f"best line: {line[0]:.2f} x {'-' if line[1] < 0 else '+'} {abs(line[1]):.2f}", **style)], 1
    )
    return figure
