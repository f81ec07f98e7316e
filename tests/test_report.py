"""report.py on studies: what is drawn and written is what the study's table says, and nothing else is."""

import csv
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from conftest import ROOT
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from test_config import configure

import report
from config import Config
from reporting.figures import METHODS, seeds_figure, tick_labels
from reporting.page import Piece, png
from reporting.sources import Study, command_of, config_of, flags_of, read_study
from reporting.titles import settings, titles_of
from reporting.trials import (
    SCORE,
    amp_piece,
    batches_piece,
    costs_piece,
    lines_over,
    rank_of,
    ranks_piece,
    reference,
    seeds_piece,
    shared_command,
    small_print,
    study_piece,
    with_adapters,
)
from studies.results import COLUMNS
from utils.errors import UserError

FLAGS = ["lora_mode", "lora_rank", "dora", "fine_tune_mode", "batch_size", "amp", "seed"]
BASE = "--train_sst --train_sts --lr 1e-4 --fine_tune_mode full-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECIPES = sorted((ROOT / "recipes").glob("*.args")) + sorted((ROOT / "recipes").glob("r[1-4]/*.args"))
LORA = {"lora_mode": "attn", "lora_rank": 2, "dora": 0}
DORA = {**LORA, "dora": 1}


def row(score: float | str, status: str = "ok", cause: str = "", more: Any = (), **flags: Any) -> dict[str, Any]:
    """A row as sweep.py writes it; the flags are the grid's, `more` are other columns."""
    switches = ("dora", "amp")
    words = [(f"--{flag}" if value else f"--no_{flag}") if flag in switches else f"--{flag}={value}"
             for flag, value in flags.items()]  # fmt: skip
    figures = {"sst_accuracy": 0.4321, "sts_pearson": 0.8, "sst_seconds_per_epoch": 12.5, "sts_seconds_per_epoch": 7.5,
               "peak_memory_bytes": 1.5e9, "trainable_parameters": 1234567, "checkpoint_bytes": 90_400_000}  # fmt: skip
    return {
        "trial": ",".join(f"{flag}={value}" for flag, value in sorted(flags.items())), "status": status, "score": score,
        "cause": cause, "command": f"python multitask_classifier.py {BASE} {' '.join(words)}",
        "commit": COMMIT, "device": "cpu (x86_64, 1 threads)", **(figures if status == "ok" else {}), **dict(more),
        **flags,
    }  # fmt: skip


ROWS = [
    row(0.60, lora_mode="attn", lora_rank=10, dora=0),
    row(0.50, lora_mode="attn", lora_rank=2, dora=0, seed=1),
    row(0.54, lora_mode="attn", lora_rank=2, dora=0, seed=2),
    row(0.55, lora_mode="attn", lora_rank=2, dora=1),
    row(0.40, lora_mode="all-lin-only", lora_rank=1, dora=1),
    row("", "out of memory", "no | room", lora_mode="attn", lora_rank=80, dora=1),
    row("", "refused", "makes no sense", lora_mode="none", lora_rank=2, dora=0),
    row("", "refused", "makes no sense", lora_mode="none", lora_rank=5, dora=0),
    row(0.80, lora_mode="none"),
    row(0.30, lora_mode="none", fine_tune_mode="last-layer"),
]


def cost(seconds: float, gigabytes: float) -> dict[str, float]:
    """The columns of time, half of it each task's, and memory."""
    half = seconds / 2
    return {"sst_seconds_per_epoch": half, "sts_seconds_per_epoch": half, "peak_memory_bytes": gigabytes * 1e9}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A study's table."""
    columns = ["trial", "status", *FLAGS, *(column for column in COLUMNS if column not in FLAGS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def study(tmp_path: Path, rows: list[dict[str, Any]]) -> Study:
    """The study with these rows."""
    problems: list[str] = []
    found = read_study(write(tmp_path / "study" / "results.csv", rows), "study", problems)
    assert found is not None and problems == []
    return found


def drawn(piece: Piece | str) -> Any:
    """A piece's figure; the text of a piece that could not be made would fail here."""
    assert isinstance(piece, Piece) and piece.figure is not None, piece
    return piece.figure


def cells(piece: Piece | str) -> list[list[str]]:
    """A piece's table as text."""
    assert isinstance(piece, Piece) and piece.table is not None
    return piece.table.cells()


def lines_of(axes: Any) -> list[Any]:
    """Colour, dash and data of each line."""
    return [(to_rgb(line.get_color()), line.get_linestyle(), *map(list, line.get_data())) for line in axes.lines]


def colour(method: str) -> Any:
    return to_rgb(METHODS[method][0])


# ----------------------------------------------------------------------------------------------------------- rank


def test_lines_are_means_by_mode_dora_and_rank(tmp_path: Path) -> None:
    trials = study(tmp_path, ROWS).trials
    assert len(trials) == 7
    lines = {key: [(rank, pytest.approx(score)) for rank, score in own.items()]
             for key, own in lines_over(with_adapters(trials), rank_of, SCORE).items()}  # fmt: skip
    assert lines == {
        ("attn", False): [(2, 0.52), (10, 0.60)],
        ("attn", True): [(2, 0.55)],
        ("all-lin-only", True): [(1, 0.40)],
    }
    assert reference(trials, "full-model") == 0.8 and reference(trials, "last-layer") == 0.3
    assert reference(trials[:3], "full-model") is None
    assert (trials[0].seconds, trials[0].memory) == (20.0, 1.5e9)


def test_dev_score_over_rank(tmp_path: Path) -> None:
    piece = ranks_piece("study", study(tmp_path, ROWS).trials)
    figure = drawn(piece)
    (axes,) = figure.axes
    assert lines_of(axes) == [
        (colour("attn"), "-", [2, 10], pytest.approx([0.65, 0.75])),
        (colour("attn"), "--", [2], pytest.approx([0.6875])),
        (colour("all-lin-only"), "--", [1], pytest.approx([0.5])),
        ((0, 0, 0), "-", [0, 1], [1, 1]),
        ((0, 0, 0), ":", [0, 1], pytest.approx([0.375, 0.375])),
    ]
    assert axes.get_xlabel() == "rank" and axes.get_ylabel() == "dev score relative to full fine-tuning"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "10"]
    assert list(axes.get_xticks()) == [1, 2, 10] and axes.get_xscale() == "log"
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["attn", "all-lin-only", "LoRA", "DoRA", "full fine-tuning", "frozen backbone"]
    assert figure.texts[0].get_text().replace("\n", " ").startswith("commit 0123456789ab; cpu (x86_64, 1 threads); ")
    assert cells(piece) == [
        ["method", "", "rank", "dev score relative to full fine-tuning"],
        ["attn", "", "2", "0.6500"],
        ["attn", "", "10", "0.7500"],
        ["attn", "DoRA", "2", "0.6875"],
        ["all-lin-only", "DoRA", "1", "0.5000"],
    ]
    assert isinstance(piece, Piece) and "differ in seed" in piece.text


def test_a_reference_that_is_a_mean_is_said_to_be(tmp_path: Path) -> None:
    more = [row(0.6, lora_mode="none", batch_size=128), row(0.2, lora_mode="none", fine_tune_mode="last-layer", seed=9)]
    full, frozen = (
        "is the mean of 2 trials, which differ in batch_size.",
        "is the mean of 2 trials, which differ in seed.",
    )
    told = study(tmp_path, ROWS + more)
    ranks, table = ranks_piece("study", told.trials), study_piece(told)
    assert isinstance(ranks, Piece) and ranks.text.endswith(f" Full fine-tuning {full} Frozen backbone {frozen}")
    assert table.text.endswith(f". Full-model {full}")
    plain = study(tmp_path, ROWS)
    ranks, table = ranks_piece("study", plain.trials), study_piece(plain)
    assert isinstance(ranks, Piece) and "is the mean of" not in ranks.text + table.text


def test_without_a_baseline_scores_stand_for_themselves(tmp_path: Path) -> None:
    piece = ranks_piece("study", study(tmp_path, ROWS[:5]).trials)
    (axes,) = drawn(piece).axes
    assert axes.get_ylabel() == "dev score" and list(axes.lines[0].get_ydata()) == pytest.approx([0.52, 0.6])
    assert isinstance(piece, Piece) and "relative to nothing" in piece.text


def test_costs_over_rank_are_relative_to_the_mode_s_own_lora_of_the_lowest_rank(tmp_path: Path) -> None:
    rows = [
        row(0.5, more=cost(10, 2), lora_mode="attn", lora_rank=1, dora=0),
        row(0.6, more=cost(15, 3), lora_mode="attn", lora_rank=4, dora=0),
        row(0.4, more=cost(30, 5), lora_mode="attn", lora_rank=4, dora=1),
        row(0.8, more=cost(40, 8), lora_mode="all-lin", lora_rank=1, dora=0),
        row(0.4, more=cost(20, 4), lora_mode="all-lin", lora_rank=2, dora=0),
        row(0.4, more=cost(20, 4), lora_mode="attn-only", lora_rank=2, dora=0),  # has no LoRA of rank 1
    ]
    piece = costs_piece("study", study(tmp_path, rows).trials)
    figure = drawn(piece)
    assert isinstance(piece, Piece) and piece.text.endswith(" Left out, without LoRA of rank 1: attn-only.")
    wanted = {
        "memory": ([1, 1.5], [2.5], [1, 0.5]),
        "time": ([1, 1.5], [3.0], [1, 0.5]),
        "score": ([1, 1.2], [0.8], [1, 0.5]),
    }
    assert [axes.get_ylabel() for axes in figure.axes] == [f"{name} (relative)" for name in wanted]
    for axes, (lora, dora, other) in zip(figure.axes, wanted.values(), strict=True):
        assert lines_of(axes)[1:] == [
            (colour("attn"), "-", [1, 4], pytest.approx(lora)),
            (colour("attn"), "--", [4], pytest.approx(dora)),
            (colour("all-lin"), "-", [1, 2], pytest.approx(other)),
        ]


def test_labels_of_near_ranks_are_staggered() -> None:
    assert tick_labels([1, 2, 80, 100, 110, 200]) == ["1", "2", "80", "\n100", "110", "200"]


# --------------------------------------------------------------------------------------- batch size, precision, seeds


def test_memory_over_batch_size(tmp_path: Path) -> None:
    rows = [
        row(0.5, more=cost(1, 2), lora_mode="none", batch_size=8),
        row(0.5, more=cost(1, 4), lora_mode="none", batch_size=16),
        row(0.5, more=cost(1, 1), batch_size=8, **LORA),
        row(0.5, more=cost(1, 3), batch_size=8, **{**LORA, "lora_rank": 9}),
        row(0.5, more=cost(1, 2.5), batch_size=32, **DORA),
    ]
    figure = drawn(batches_piece("study", study(tmp_path, rows).trials))
    (axes,) = figure.axes
    assert lines_of(axes) == [
        (colour("full-model"), "-", [8, 16], [2, 4]),
        (colour("attn"), "-", [8], [2]),
        (colour("attn"), "--", [32], [2.5]),
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch size (examples)", "peak memory (GB)")
    assert axes.get_ylim()[0] == 0


def test_mixed_precision_compares_only_what_differs_in_nothing_else(tmp_path: Path) -> None:
    rows = [
        row(0.50, more=cost(10, 2), lora_mode="none", amp=0, seed=1),
        row(0.54, more=cost(20, 2), lora_mode="none", amp=0, seed=2),
        row(0.60, more=cost(5, 1), lora_mode="none", amp=1, seed=1),
        row(0.62, more=cost(7, 1), lora_mode="none", amp=1, seed=2),
        row(0.99, more=cost(9, 9), lora_mode="none", amp=1, seed=3),  # of another seed than any without
        row(0.40, more=cost(8, 1), amp=0, **LORA),
        row(0.44, more=cost(4, 0.5), amp=1, **LORA),
        row(0.99, more=cost(99, 9), amp=1, **DORA),  # has no twin without
    ]
    piece = amp_piece("study", study(tmp_path, rows).trials)
    figure = drawn(piece)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "peak memory (GB)", "training time (s per epoch)", "dev score"]  # fmt: skip
    widths = [[round(bar.get_width(), 6) for bar in axes.patches] for axes in figure.axes]
    assert widths == [[2, 1, 1, 0.5], [15, 8, 6, 4], [0.52, 0.4, 0.61, 0.44]]  # the first two without, then with
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["full-model", "LoRA attn r2"]
    assert cells(piece)[1] == ["full-model", "2.000", "1.000", "-50.0%", "15.0", "6.0", "-60.0%", "0.5200", "0.6100",
                               "+17.3%"]  # fmt: skip


def test_other_data_is_another_configuration_and_a_seed_counts_once(tmp_path: Path) -> None:
    runs = [("a/small", 1, 0.2), ("a/small", 2, 0.3), ("b/sample", 1, 0.6), ("b/sample", 2, 0.8), ("c/small", 2, 0.3)]
    rows = [row(score, data_dir=folder, seed=seed) for folder, seed, score in runs]
    for own in rows:
        del own["data_dir"]  # from the table's columns, not from the commands
    piece = seeds_piece("study", study(tmp_path, rows).trials)
    assert isinstance(piece, Piece)
    found = {line[0].split("/")[-1]: line[1:3] for line in cells(piece)[1:]}
    assert found == {"small": ["2", "0.2500"], "sample": ["2", "0.7000"]}


@pytest.mark.parametrize("column", ["trainable_parameters", "checkpoint_bytes", "tokens_per_second"])
def test_a_row_with_a_figure_that_is_none_is_left_out(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "study" / "results.csv", [row(0.5, seed=1), row(0.6, more={column: "421x27"}, seed=2)])
    problems: list[str] = []
    study = read_study(path, "study", problems)
    assert study is not None and len(study.trials) == 1 and isinstance(study_piece(study), Piece)
    assert len(problems) == 1 and "row 3" in problems[0] and "421x27" in problems[0]


def test_seeds_have_means_deviations_and_changes_against_the_baseline(tmp_path: Path) -> None:
    """R0's comparison: baseline, LoRA with AMP, DoRA with AMP, over three seeds."""
    scores = {"base": (0.70, 0.72, 0.74), "lora": (0.73, 0.71, 0.75), "dora": (0.70, 0.69, 0.71)}
    kinds: dict[str, dict[str, Any]] = {
        "base": {"lora_mode": "none", "amp": 0},
        "lora": {**LORA, "amp": 1},
        "dora": {**DORA, "amp": 1},
    }
    seconds = {"base": 30, "lora": 20, "dora": 24}
    rows = [
        row(score, more=cost(seconds[kind] + i, 2), seed=i, **kinds[kind])
        for kind, own in reversed(scores.items())
        for i, score in enumerate(own)
    ]  # in another order than they are shown
    piece = seeds_piece("study", study(tmp_path, [*rows, row(0.9, lora_mode="none", amp=1)]).trials)
    titles = ["full-model", "LoRA attn r2 + AMP", "DoRA attn r2 + AMP"]
    table = piece.table if isinstance(piece, Piece) else None
    assert table is not None and [own[0] for own in table.rows] == titles
    names = [column.name for column in table.columns]
    for own, values, first in zip(table.rows, scores.values(), seconds.values(), strict=True):
        found = dict(zip(names, own, strict=True))
        assert found["seeds"] == 3 and found["dev score"] == pytest.approx(mean(values))
        assert found["deviation of dev score"] == pytest.approx(stdev(values))
        time = found["training time (s per epoch) against baseline"]
        assert time == (None if first == 30 else pytest.approx((first + 1) / 31 - 1))
        assert found["sst accuracy"] == pytest.approx(0.4321) and found["deviation of sst accuracy"] == 0
    figure = drawn(piece)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "dev score", "training time (s per epoch)", "peak memory (GB)"]  # fmt: skip
    dots, average = figure.axes[0].lines[2:4]  # of the second configuration
    assert list(dots.get_xdata()) == list(scores["lora"]) and list(dots.get_ydata()) == [1, 1, 1]
    assert list(average.get_xdata()) == pytest.approx([0.73])
    assert [text.get_text() for text in figure.axes[2].get_yticklabels()] == titles


def test_configurations_of_one_title_are_told_apart(tmp_path: Path) -> None:
    rows = [row(0.5, lora_mode="none", batch_size=8), row(0.5, lora_mode="none", batch_size=9), row(0.5, **LORA)]
    configs = [trial.config for trial in study(tmp_path, rows).trials]
    assert titles_of(configs) == ["full-model, batch_size 8", "full-model, batch_size 9", "LoRA attn r2"]


SMART = "--sst_smart 1e-2 --sts_smart 1e-2"
METHOD_FLAGS = {
    "sequential": "--routine sequential",
    "annealed": "--routine annealed",
    "annealed, pal": "--routine annealed --pal pal",
    "annealed, smart 0.01": f"--routine annealed {SMART} --smart_epsilon 1e-2 --smart_sigma 1e-2",
    "joint, pcgrad": "--routine joint --pcgrad",
    "annealed, cross": "--routine annealed --pair_encoding cross",
}


def labels_of(*flags: str) -> list[str]:
    """The labels of the configurations that these flags ask for beside what all have."""
    return titles_of([configure(*f"{BASE} --amp {own}".split()) for own in flags])


def test_a_label_names_what_sets_a_configuration_apart() -> None:
    assert labels_of(*METHOD_FLAGS.values()) == list(METHOD_FLAGS)  # distinct, and shorter than 40 characters
    assert labels_of("--routine joint") == ["full-model + AMP"]  # there is nothing to set it apart from


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ((SMART, f"{SMART} --smart_epsilon 1e-3"), ["smart_epsilon 1e-05", "smart_epsilon 0.001"]),
        (("", "--sst_smart 1e-2", SMART), ["smart 0.0", "sst_smart 0.01", "smart 0.01"]),
        (("", "--sst_smart 1 --sts_smart 2"), ["smart 0.0", "sst_smart 1.0, sts_smart 2.0"]),
        (("", "--clf linear", "--no_head_batchnorm"), ["conv", "clf linear", "no head_batchnorm"]),
        (("--lr_schedule linear", "--lr_schedule cosine"), ["lr_schedule linear", "lr_schedule cosine"]),
        (("--pair_features abs,mul", "--pair_features abs"), ["pair_features abs,mul", "pair_features abs"]),
        (("", "--train_para"), ["no train_para", "train_para"]),
        (("", "--head_width 8"), ["no head_width", "head_width 8"]),
        (("--arch duality --clf mlp", "--clf mlp", "--arch v1"), ["duality, mlp", "mlp", "v1"]),
        (("--sst_embedding_loss simcse", "--sts_embedding_loss simcse"),
         ["sst_embedding_loss simcse", "sts_embedding_loss simcse"]),
    ],
)  # fmt: skip
def test_labels_of_small_studies(flags: tuple[str, ...], wanted: list[str]) -> None:
    assert labels_of(*flags) == wanted


def test_labels_of_all_recipes_are_distinct() -> None:
    configs = [configure(f"@{path}") for path in RECIPES]
    kept = [config for i, config in enumerate(configs) if settings(config, ("seed",)) not in
            [settings(other, ("seed",)) for other in configs[:i]]]  # fmt: skip
    labels = titles_of(kept)
    assert len(kept) > 30 and len(set(labels)) == len(labels) and all(labels)


def check_layout(figure: Any) -> None:
    """The figure is laid out without a warning, all of its text is inside, and the small print is below all axes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png(figure)
    whole = figure.bbox
    (small,) = figure.texts
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    print_box = small.get_window_extent()
    for box in (*boxes, print_box):
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    assert all(box.y0 >= print_box.y1 for box in boxes)
    assert all(axes.get_position().width > 0.2 for axes in figure.axes)
    assert all(upper.y0 >= lower.y1 for upper, lower in zip(boxes, boxes[1:], strict=False))


def test_the_figure_of_many_methods_over_seeds_is_whole(tmp_path: Path) -> None:
    rows = [row(0.5 + seed / 100, seed=seed) for seed in (1, 2) for _ in METHOD_FLAGS]
    for own, flags in zip(rows, [*METHOD_FLAGS.values()] * 2, strict=True):
        own["command"] += f" {flags}"
    piece = seeds_piece("study", study(tmp_path, rows).trials)
    figure = drawn(piece)
    check_layout(figure)
    for axes in figure.axes:
        assert [text.get_text() for text in axes.get_yticklabels()] == list(METHOD_FLAGS)
    assert [line[0] for line in cells(piece)[1:]] == list(METHOD_FLAGS)


@pytest.mark.parametrize("name", ["an option and its value, " * 4, "W" * 70, "/a/long/path" * 30])
@pytest.mark.parametrize("count", [1, 12])
def test_long_labels_are_wrapped_and_cut_before_a_figure_collapses(name: str, count: int) -> None:
    names = [f"{name} {i}" for i in range(count)]
    note = "commit 0123456789ab; python multitask_classifier.py" + " --option_of_a_run and_its_value" * 20
    figure = seeds_figure(names, {"score": [[0.1, 0.2]] * count, "time": [[1.0]] * count}, note)
    check_layout(figure)
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert all(text.endswith(f" {i}") or text.endswith(f"\n{i}") for i, text in enumerate(shown))
    boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (ranks_piece, "one mode and two ranks"),
        (costs_piece, "one mode at two ranks"),
        (batches_piece, "one method with two batch sizes"),
        (amp_piece, "differ in --amp alone"),
        (seeds_piece, "differ in --seed alone"),
    ],
)
def test_what_there_are_no_data_for_is_said(tmp_path: Path, make: Any, wanted: str) -> None:
    rows = [row(0.5, lora_mode="none"), row(0.5, **LORA), row(0.5, batch_size=8, **{**DORA, "lora_rank": 9})]
    said = make("study", study(tmp_path, rows).trials)
    assert isinstance(said, str) and wanted in said and "\n" not in said


def test_costs_that_were_not_recorded_are_not_drawn(tmp_path: Path) -> None:
    none = {"sst_seconds_per_epoch": "", "sts_seconds_per_epoch": "", "peak_memory_bytes": ""}
    trials = study(tmp_path, [row(0.5, more=none, **{**LORA, "lora_rank": rank}) for rank in (1, 2)]).trials
    said = costs_piece("study", trials)
    assert isinstance(said, str) and "need figures" in said
    assert isinstance(batches_piece("study", trials), str)


def test_a_mode_that_lacks_some_costs_at_the_lowest_rank_is_left_out_of_those_alone(tmp_path: Path) -> None:
    untimed = {"sst_seconds_per_epoch": "", "sts_seconds_per_epoch": ""}
    rows = [row(0.5, lora_mode=mode, lora_rank=rank, dora=0) for mode in ("attn", "all-lin") for rank in (1, 2)]
    piece = costs_piece("study", study(tmp_path, rows).trials)
    assert isinstance(piece, Piece) and "Left out" not in piece.text
    rows[2] = row(0.5, more=untimed, lora_mode="all-lin", lora_rank=1, dora=0)
    piece = costs_piece("study", study(tmp_path, rows).trials)
    assert isinstance(piece, Piece) and piece.text.endswith(
        " Left out of time, of which LoRA of rank 1 has none: all-lin."
    )


def test_costs_without_any_at_the_lowest_rank_say_that_it_is_needed(tmp_path: Path) -> None:
    rows = [row(0.5, **{**LORA, "lora_rank": 1}), *(row(0.5, lora_mode="all-lin", lora_rank=n, dora=0) for n in (2, 4))]
    said = costs_piece("study", study(tmp_path, rows).trials)
    assert isinstance(said, str) and said.endswith("one mode at two ranks, with its LoRA of rank 1 among them")


# ----------------------------------------------------------------------------------------------------------- looks


def test_nothing_is_cut_off_or_overlaps(tmp_path: Path) -> None:
    ranks = [1, 2, 5, 10, 20, 50, 80, 100]
    modes = ["attn", "attn-only", "all-lin", "all-lin-only"]
    many = [row(0.5 + rank / 1000, lora_mode=mode, lora_rank=rank, dora=dora, batch_size=8 * rank)
            for mode in modes for dora in (0, 1) for rank in ranks]  # fmt: skip
    many += [row(0.5, lora_mode=mode, lora_rank=1, dora=dora, amp=amp, seed=seed)
             for mode in modes for dora in (0, 1) for amp in (0, 1) for seed in (1, 2)]  # fmt: skip
    trials = study(tmp_path, [*many, *ROWS]).trials
    for make in (ranks_piece, costs_piece, batches_piece, amp_piece, seeds_piece):
        figure = drawn(make("study", trials))
        figure.draw_without_rendering()
        whole = figure.bbox
        (legend,), (note,) = figure.legends, figure.texts
        parts = [legend.get_window_extent(), note.get_window_extent()]
        panels = [axes.get_tightbbox() for axes in figure.axes]
        for box in [*parts, *panels]:
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, make
        ordered = [parts[0], *panels, parts[1]]
        assert all(lower.y1 <= upper.y0 for upper, lower in zip(ordered, ordered[1:], strict=False)), make
        assert figure.get_figwidth() == 3.3
        for axes in figure.axes:
            for lower in (False, True):  # those that stand a line lower are compared with each other
                ticks = [text.get_window_extent() for text in axes.get_xticklabels()
                         if text.get_text() and text.get_text().startswith("\n") == lower]  # fmt: skip
                assert not any(a.overlaps(b) for i, a in enumerate(ticks) for b in ticks[i + 1 :]), make


# ----------------------------------------------------------------------------------------------------------- tables


def test_the_table_of_all_trials(tmp_path: Path) -> None:
    piece = study_piece(study(tmp_path, ROWS))
    found = cells(piece)
    assert found[0] == [
        "lora mode", "lora rank", "dora", "fine tune mode", "seed", "score", "relative to full-model",
        "sst accuracy", "sts pearson", "sst time (s per epoch)", "sts time (s per epoch)", "peak memory (MB)",
        "trainable parameters", "checkpoint (MB)",
    ]  # fmt: skip
    assert found[2] == ["attn", "2", "0", "", "1", "0.5000", "0.625", "0.4321", "0.8000", "12.5", "7.5", "1,500.0",
                        "1,234,567", "90.4"]  # fmt: skip
    assert len(found) == 8
    assert "1 out of memory: no | room; 2 refused: makes no sense" in piece.text
    assert "relative to full-model" not in cells(study_piece(study(tmp_path, ROWS[:5])))[0]


def test_the_small_print_says_commit_device_and_what_the_commands_share(tmp_path: Path) -> None:
    trials = study(tmp_path, ROWS).trials
    assert small_print(trials) == f"commit 0123456789ab; cpu (x86_64, 1 threads); python multitask_classifier.py {BASE}"
    changed = [{**ROWS[0], "commit": f"{COMMIT}+"}, {**ROWS[0], "commit": ""}, ROWS[0]]
    assert small_print(study(tmp_path, changed).trials).startswith("commit 0123456789ab+, 0123456789ab; ")
    unknown = study(tmp_path, [{**ROWS[0], "commit": ""}]).trials
    assert small_print(unknown).startswith("commit not recorded; ")


def test_shared_flags_are_those_of_all_commands() -> None:
    commands = ["python x.py --a 1 --b 'c d' --e", "python x.py --e --a 1 --b c", "python x.py --a 1 --f --e"]
    assert shared_command(commands) == "python x.py --a 1 --e"
    assert shared_command(commands[:1]) == commands[0] and shared_command([]) == ""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_command_made_of_a_configuration_asks_for_it(recipe: Path) -> None:
    wanted = configure(f"@{recipe}")
    found = config_of(command_of(wanted))
    assert flags_of(found) == flags_of(wanted) and list(found.tasks) == list(wanted.tasks)
    assert Config.from_dict(wanted.to_dict()).to_dict() == wanted.to_dict()


@pytest.mark.parametrize(("size", "words"), [("1", "--fsdp"), ("2", "--cache_frozen"), ("2", "--mlm")])
def test_a_command_is_read_whatever_the_processes_of_the_reader(
    monkeypatch: pytest.MonkeyPatch, size: str, words: str
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, size)
    assert config_of(f"python multitask_classifier.py --train_sst {words}").tasks.keys() == {"sst"}


# ----------------------------------------------------------------------------------------------------------- the script


class Page(HTMLParser):
    """What a page holds, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        own = dict(attrs)
        if tag == "img":
            self.images.append(own)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        self.links += [own["href"]] if "href" in own else []
        self.ids += [own["id"]] if "id" in own else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(out: Path, stem: str = "report") -> Page:
    """The page in `out`: closed elements, links into itself alone, images that are the files beside it."""
    import base64

    text = (out / f"{stem}.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    images = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.images]
    assert sorted(images) == sorted(path.read_bytes() for path in out.glob("*.png"))
    assert all(image["alt"] for image in page.images)
    return page


def test_the_script(tmp_path: Path) -> None:
    table, out = write(tmp_path / "ranks" / "results.csv", ROWS), tmp_path / "new" / "report"
    done = subprocess.run(
        [sys.executable, ROOT / "report.py", table, "--out", out], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stderr == ""
    *left_out, page, text = done.stdout.splitlines()
    assert [page, text] == [str(out / "report.html"), str(out / "report.md")]
    assert left_out == [
        "Study ranks: no memory over batch size, which needs one method with two batch sizes",
        "Study ranks: no comparison of mixed precision, which needs two trials that differ in --amp alone",
    ]
    names = ["ranks-trials.csv", "ranks-ranks.csv", "ranks-ranks.png", "ranks-costs.csv", "ranks-costs.png",
             "ranks-seeds.csv", "ranks-seeds.png", "report.html", "report.md"]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert imread(out / "ranks-ranks.png").shape[1] == 3.3 * 300
    found = page_of(out)
    assert all(line in found.text for line in left_out) and "Made by python report.py" in found.text
    markdown = (out / "report.md").read_text()
    assert "![Dev score over rank](ranks-ranks.png)" in markdown and "no | room" in markdown
    rows = list(csv.DictReader((out / "ranks-trials.csv").open()))
    assert len(rows) == 7 and rows[0]["score"] == "0.6" and float(rows[0]["peak memory (MB)"]) == 1500


def test_a_table_of_another_name_names_its_study_without_the_ending(tmp_path: Path, capsys: Any) -> None:
    table = write(tmp_path / "methods.csv", [row(0.5, seed=1), row(0.6, seed=2)])
    report.main([str(table), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "methods-seeds.png").exists()
    assert "## Study methods\n" in (tmp_path / "out" / "report.md").read_text()


def test_a_study_is_found_in_a_folder_and_its_trials_are_not_reported_twice(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "runs" / "a" / "results.csv", ROWS[:5])
    write(tmp_path / "runs" / "b" / "results.csv", ROWS)
    (tmp_path / "runs" / "a" / "trials" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "trials" / "one" / "config.json").write_text("{}")
    table = str(tmp_path / "runs" / "a" / "results.csv")
    report.main([str(tmp_path / "runs"), table, "--out", str(tmp_path / "out")])
    assert "Not read" not in page_of(tmp_path / "out").text
    assert sorted(path.name for path in (tmp_path / "out").glob("*-trials.csv")) == ["a-trials.csv", "b-trials.csv"]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "has no column cause, command, commit, score, status, trial"),
        (b"trial,status,score,cause,commit\n", "has no column command"),
        (b"trial,status,score,cause,command,commit\na,failed,,b,c,d\n", "no trial has ended well yet"),
        (b"trial,status,score,cause,command,commit\na,ok,nan,b,python x,d\n", "row 2 .a. is left out: nan is not a f"),
        (b"trial,status,score,cause,command,commit\na,ok,.5,b,python x --odd,d\n", "unrecognized arguments: --odd"),
        (b"trial,status,score,cause,command,commit\na,ok\n", "row 2 .a. is left out"),
    ],
)
def test_what_is_no_table_of_a_study_is_refused(tmp_path: Path, content: bytes | None, wanted: str) -> None:
    if content is not None:
        (tmp_path / "results.csv").write_bytes(content)
    with pytest.raises(UserError, match=wanted) as error:
        report.main([str(tmp_path / "results.csv"), "--out", str(tmp_path / "report")])
    assert "\n" not in str(error.value) and str(error.value).startswith("nothing to report: ")
    assert not (tmp_path / "report").exists()


def test_a_broken_table_leaves_the_others(tmp_path: Path, capsys: Any) -> None:
    good = write(tmp_path / "good" / "results.csv", ROWS)
    bad = write(tmp_path / "bad" / "results.csv", [*ROWS[:4], row("half a numb", **LORA)])
    report.main([str(path) for path in (good, bad, tmp_path / "none.csv", "--out", tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"{bad}: row 6 (dora=0,lora_mode=attn,lora_rank=2) is left out: could not convert" in said
    assert f"{tmp_path / 'none.csv'}: cannot be read" in said
    assert "Not read" in page_of(tmp_path / "out").text and (tmp_path / "out" / "bad-ranks.png").exists()


def test_nothing_to_report_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words in ([], ["empty"], ["empty", "--compare", "a.pt", "b.pt"]):
        done = subprocess.run(
            [sys.executable, ROOT / "report.py", *words], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")
