"""report.py on studies: figures and tables show what the study's table says."""

import csv
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from helpers import cells_of, check_layout, figure_of, read_page, refusal, shell
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import report
from reporting.figures import METHOD_STYLES, seeds_figure, tick_labels
from reporting.page import ReportItem
from reporting.sources import Study, read_study
from reporting.trials import (
    amp_item,
    batches_item,
    costs_bars_item,
    costs_item,
    ranks_item,
    scores_bars_item,
    seeds_item,
    source_of,
    trials_item,
)
from studies.results import COLUMNS

FLAGS = ["lora_mode", "lora_rank", "dora", "fine_tune_mode", "batch_size", "amp", "seed"]
BASE = "--train_sst --train_sts --lr 1e-4 --fine_tune_mode full-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LORA = {"lora_mode": "attn", "lora_rank": 2, "dora": 0}
DORA = {**LORA, "dora": 1}
METHODS = {
    "sequential": "--routine sequential",
    "annealed, pal": "--routine annealed --pal pal",
    "joint, pcgrad": "--routine joint --pcgrad",
}


def row(score: float | str, status: str = "ok", cause: str = "", more: Any = (), **flags: Any) -> dict[str, Any]:
    """Return a row as sweep.py writes it. `flags` are the grid's, `more` are other columns."""
    words = [(f"--{flag}" if value else f"--no_{flag}") if flag in ("dora", "amp") else f"--{flag}={value}"
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
    """Return the columns of memory and of time, half of it for each task."""
    half = seconds / 2
    return {"sst_seconds_per_epoch": half, "sts_seconds_per_epoch": half, "peak_memory_bytes": gigabytes * 1e9}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a study's table."""
    columns = ["trial", "status", *FLAGS, *(column for column in COLUMNS if column not in FLAGS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def study(tmp_path: Path, rows: list[dict[str, Any]]) -> Study:
    """Return the study with these rows."""
    problems: list[str] = []
    found = read_study(write(tmp_path / "study" / "results.csv", rows), "study", problems)
    assert found is not None and problems == []
    return found


def text_of(item: ReportItem | str) -> str:
    assert isinstance(item, ReportItem)
    return item.text


def lines_of(axes: Any) -> list[Any]:
    """Return colour, dash and data of each line."""
    return [(to_rgb(line.get_color()), line.get_linestyle(), *map(list, line.get_data())) for line in axes.lines]


def colour(method: str) -> Any:
    return to_rgb(METHOD_STYLES[method][0])


def test_dev_score_over_rank(tmp_path: Path) -> None:
    item = ranks_item("study", study(tmp_path, ROWS).trials)
    figure = figure_of(item)
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
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["attn", "all-lin-only", "LoRA", "DoRA", "full fine-tuning", "frozen backbone"]
    assert cells_of(item) == [
        ["method", "", "rank", "dev score relative to full fine-tuning"],
        ["attn", "", "2", "0.6500"],
        ["attn", "", "10", "0.7500"],
        ["attn", "DoRA", "2", "0.6875"],
        ["all-lin-only", "DoRA", "1", "0.5000"],
    ]
    assert "differ in seed" in text_of(item) and "is the mean of 2" not in text_of(item)
    item = ranks_item("study", study(tmp_path, ROWS[:5]).trials)  # without full fine-tuning
    (axes,) = figure_of(item).axes
    assert axes.get_ylabel() == "dev score" and list(axes.lines[0].get_ydata()) == pytest.approx([0.52, 0.6])
    assert "Scores are absolute" in text_of(item)


def test_the_text_says_what_a_reference_is_a_mean_of(tmp_path: Path) -> None:
    more = [row(0.6, lora_mode="none", batch_size=128), row(0.2, lora_mode="none", fine_tune_mode="last-layer", seed=9)]
    several = study(tmp_path, ROWS + more)
    full = "is the mean of 2 trials, which differ in batch_size."
    frozen = "is the mean of 2 trials, which differ in seed."
    wanted = f" Full fine-tuning {full} Frozen backbone {frozen}"
    assert text_of(ranks_item("study", several.trials)).endswith(wanted)
    assert trials_item(several).text.endswith(f". Full-model {full}")


def test_costs_over_rank_are_relative_to_lora_of_the_lowest_rank_in_the_mode(tmp_path: Path) -> None:
    rows = [
        row(0.5, more=cost(10, 2), lora_mode="attn", lora_rank=1, dora=0),
        row(0.6, more=cost(15, 3), lora_mode="attn", lora_rank=4, dora=0),
        row(0.4, more=cost(30, 5), lora_mode="attn", lora_rank=4, dora=1),
        row(0.8, more=cost(40, 8), lora_mode="all-lin", lora_rank=1, dora=0),
        row(0.4, more=cost(20, 4), lora_mode="all-lin", lora_rank=2, dora=0),
        row(0.4, more=cost(20, 4), lora_mode="attn-only", lora_rank=2, dora=0),  # has no LoRA of rank 1
    ]
    item = costs_item("study", study(tmp_path, rows).trials)
    figure = figure_of(item)
    assert text_of(item).endswith(" Not shown, because LoRA of rank 1 is missing: attn-only.")
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


def test_costs_that_were_not_recorded_are_not_drawn(tmp_path: Path) -> None:
    none = {"sst_seconds_per_epoch": "", "sts_seconds_per_epoch": "", "peak_memory_bytes": ""}
    trials = study(tmp_path, [row(0.5, more=none, **{**LORA, "lora_rank": rank}) for rank in (1, 2)]).trials
    reason = costs_item("study", trials)
    assert isinstance(reason, str) and reason.endswith("one mode at two ranks, with its LoRA of rank 1 among them")
    assert isinstance(batches_item("study", trials), str)
    rows = [row(0.5, lora_mode=mode, lora_rank=rank, dora=0) for mode in ("attn", "all-lin") for rank in (1, 2)]
    assert "Not shown" not in text_of(costs_item("study", study(tmp_path, rows).trials))
    rows[2] |= {"sst_seconds_per_epoch": "", "sts_seconds_per_epoch": ""}
    item = costs_item("study", study(tmp_path, rows).trials)
    assert text_of(item).endswith(" Not shown in time, which LoRA of rank 1 lacks: all-lin.")


def test_labels_of_close_ranks_are_staggered() -> None:
    assert tick_labels([1, 2, 80, 100, 110, 200]) == ["1", "2", "80", "\n100", "110", "200"]


def test_memory_over_batch_size(tmp_path: Path) -> None:
    rows = [
        row(0.5, more=cost(1, 2), lora_mode="none", batch_size=8),
        row(0.5, more=cost(1, 4), lora_mode="none", batch_size=16),
        row(0.5, more=cost(1, 1), batch_size=8, **LORA),
        row(0.5, more=cost(1, 3), batch_size=8, **{**LORA, "lora_rank": 9}),
        row(0.5, more=cost(1, 2.5), batch_size=32, **DORA),
    ]
    (axes,) = figure_of(batches_item("study", study(tmp_path, rows).trials)).axes
    assert lines_of(axes) == [
        (colour("full-model"), "-", [8, 16], [2, 4]),
        (colour("attn"), "-", [8], [2]),
        (colour("attn"), "--", [32], [2.5]),
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch size (examples)", "peak memory (GB)")
    assert axes.get_ylim()[0] == 0


def test_mixed_precision_compares_trials_that_differ_in_nothing_else(tmp_path: Path) -> None:
    rows = [
        row(0.50, more=cost(10, 2), lora_mode="none", amp=0, seed=1),
        row(0.54, more=cost(20, 2), lora_mode="none", amp=0, seed=2),
        row(0.60, more=cost(5, 1), lora_mode="none", amp=1, seed=1),
        row(0.62, more=cost(7, 1), lora_mode="none", amp=1, seed=2),
        row(0.99, more=cost(9, 9), lora_mode="none", amp=1, seed=3),  # no trial of this seed without
        row(0.40, more=cost(8, 1), amp=0, **LORA),
        row(0.44, more=cost(4, 0.5), amp=1, **LORA),
        row(0.99, more=cost(99, 9), amp=1, **DORA),  # no such trial without
    ]
    item = amp_item("study", study(tmp_path, rows).trials)
    figure = figure_of(item)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "peak memory (GB)", "training time (s per epoch)", "dev score"]  # fmt: skip
    widths = [[round(bar.get_width(), 6) for bar in axes.patches] for axes in figure.axes]
    assert widths == [[2, 1, 1, 0.5], [15, 8, 6, 4], [0.52, 0.4, 0.61, 0.44]]  # the first two without, then with
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["full-model", "LoRA attn r2"]
    assert cells_of(item)[1] == ["full-model", "2.000", "1.000", "-50.0%", "15.0", "6.0", "-60.0%", "0.5200", "0.6100",
                                 "+17.3%"]  # fmt: skip


def test_other_data_is_another_configuration_and_a_seed_counts_once(tmp_path: Path) -> None:
    runs = [("a/small", 1, 0.2), ("a/small", 2, 0.3), ("b/sample", 1, 0.6), ("b/sample", 2, 0.8), ("c/small", 2, 0.3)]
    rows = [row(score, data_dir=folder, seed=seed) for folder, seed, score in runs]
    for flags in rows:
        del flags["data_dir"]  # only the commands have it
    item = seeds_item("study", study(tmp_path, rows).trials)
    found = {line[0]: line[1:3] for line in cells_of(item)[1:]}
    assert found == {"data_dir small": ["2", "0.2500"], "data_dir sample": ["2", "0.7000"]}


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
        for kind in ("dora", "lora", "base")  # in another order than they are shown
        for i, score in enumerate(scores[kind])
    ]
    item = seeds_item("study", study(tmp_path, [*rows, row(0.9, lora_mode="none", amp=1)]).trials)
    titles = ["full-model", "LoRA attn r2 + AMP", "DoRA attn r2 + AMP"]
    assert isinstance(item, ReportItem) and item.table is not None
    assert [cells[0] for cells in item.table.rows] == titles
    names = [column.name for column in item.table.columns]
    for cells, values, first in zip(item.table.rows, scores.values(), seconds.values(), strict=True):
        found = dict(zip(names, cells, strict=True))
        assert found["seeds"] == 3 and found["dev score"] == pytest.approx(mean(values))
        assert found["deviation of dev score"] == pytest.approx(stdev(values))
        change = found["training time (s per epoch) against baseline"]
        assert change == (None if first == 30 else pytest.approx((first + 1) / 31 - 1))
        assert found["sst accuracy"] == pytest.approx(0.4321) and found["deviation of sst accuracy"] == 0
    figure = figure_of(item)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "dev score", "training time (s per epoch)", "peak memory (GB)"]  # fmt: skip
    dots, average = figure.axes[0].lines[2:4]  # of the second configuration
    assert list(dots.get_xdata()) == list(scores["lora"]) and list(dots.get_ydata()) == [1, 1, 1]
    assert list(average.get_xdata()) == pytest.approx([0.73])
    assert [text.get_text() for text in figure.axes[2].get_yticklabels()] == titles


def test_configurations_with_one_seed_have_bars(tmp_path: Path) -> None:
    """R0, figure 22, and R2, figures 7 and 8: a row for each, with its number; what a row lacks has no bar."""
    more = {**cost(3, 1.5), "gpu_utilization": 54.0}
    rows = [row(0.5, more=more, lora_mode="none"), row(0.4, more={"sts_pearson": -0.1, **more}, **LORA)]
    trials = study(tmp_path, [*rows, row(0.6, more={"gpu_utilization": ""}, **DORA, seed=3)]).trials
    names = ["full-model", "LoRA attn r2", "DoRA attn r2"]
    scores, sst, sts = figure_of(scores_bars_item("study", trials)).axes
    assert [label.get_text() for label in scores.get_yticklabels()] == names
    assert [bar.get_width() for bar in scores.patches] == [0.5, 0.4, 0.6]
    assert [text.get_text() for text in sts.texts] == ["0.8000", "-0.1000", "0.8000"]
    assert [axes.get_xlabel() for axes in (scores, sst, sts)] == ["dev score", "sst accuracy", "sts pearson"]
    seconds, memory, utilization = figure_of(costs_bars_item("study", trials)).axes
    assert [bar.get_width() for bar in memory.patches] == [1.5] * 3
    assert [text.get_text() for text in utilization.texts] == ["54.0", "54.0", ""]
    assert cells_of(costs_bars_item("study", trials))[0][:2] == ["configuration", "seeds"]
    assert isinstance(scores_bars_item("study", trials[:1]), str)
    for item in (scores_bars_item("study", trials), costs_bars_item("study", trials)):
        check_layout(figure_of(item))


def test_methods_over_seeds_are_named_by_what_distinguishes_them(tmp_path: Path) -> None:
    rows = [row(0.5 + seed / 100, seed=seed) for seed in (1, 2) for _ in METHODS]
    for trial, flags in zip(rows, [*METHODS.values()] * 2, strict=True):
        trial["command"] += f" {flags}"
    item = seeds_item("study", study(tmp_path, rows).trials)
    check_layout(figure_of(item))
    for axes in figure_of(item).axes:
        assert [text.get_text() for text in axes.get_yticklabels()] == list(METHODS)
    assert [line[0] for line in cells_of(item)[1:]] == list(METHODS)


@pytest.mark.parametrize(
    ("make_item", "wanted"),
    [
        (ranks_item, "one mode and two ranks"),
        (costs_item, "one mode at two ranks"),
        (batches_item, "one method with two batch sizes"),
        (amp_item, "differ in --amp alone"),
        (seeds_item, "differ in --seed alone"),
    ],
)
def test_the_report_says_what_data_a_figure_needs(tmp_path: Path, make_item: Any, wanted: str) -> None:
    rows = [row(0.5, lora_mode="none"), row(0.5, **LORA), row(0.5, batch_size=8, **{**DORA, "lora_rank": 9})]
    reason = make_item("study", study(tmp_path, rows).trials)
    assert isinstance(reason, str) and wanted in reason and "\n" not in reason


@pytest.mark.parametrize("name", ["an option and its value, " * 4, "W" * 70, "/a/long/path" * 30, r"a $\wrong$ 3$"])
@pytest.mark.parametrize("count", [1, 12])
def test_long_labels_are_wrapped_and_cut(name: str, count: int) -> None:
    names = [f"{name} {i}" for i in range(count)]
    figure = seeds_figure(names, {"score": [[0.1, 0.2]] * count, "time": [[1.0]] * count})
    check_layout(figure)
    labels = figure.axes[0].get_yticklabels()
    assert all(label.get_text().endswith((f" {i}", f"\n{i}")) for i, label in enumerate(labels))
    boxes = [label.get_window_extent() for label in labels]
    assert all(upper.y0 >= lower.y1 for upper, lower in zip(boxes, boxes[1:], strict=False))


def test_nothing_is_cut_off_or_overlaps(tmp_path: Path) -> None:
    ranks = [1, 2, 5, 10, 20, 50, 80, 100]
    modes = ["attn", "attn-only", "all-lin", "all-lin-only"]
    many = [row(0.5 + rank / 1000, lora_mode=mode, lora_rank=rank, dora=dora, batch_size=8 * rank)
            for mode in modes for dora in (0, 1) for rank in ranks]  # fmt: skip
    many += [row(0.5, lora_mode=mode, lora_rank=1, dora=dora, amp=amp, seed=seed)
             for mode in modes for dora in (0, 1) for amp in (0, 1) for seed in (1, 2)]  # fmt: skip
    trials = study(tmp_path, [*many, *ROWS]).trials
    assert "12 best of 17 configurations" in text_of(seeds_item("study", trials))
    for make_item in (ranks_item, costs_item, batches_item, amp_item, seeds_item):
        figure = figure_of(make_item("study", trials))
        check_layout(figure)
        for axes in figure.axes:
            for lower in (False, True):  # labels that are one line lower are compared with each other
                ticks = [text.get_window_extent() for text in axes.get_xticklabels()
                         if text.get_text() and text.get_text().startswith("\n") == lower]  # fmt: skip
                assert not any(a.overlaps(b) for i, a in enumerate(ticks) for b in ticks[i + 1 :])


def test_the_table_of_all_trials(tmp_path: Path) -> None:
    item = trials_item(study(tmp_path, ROWS))
    found = cells_of(item)
    assert found[0] == [
        "lora mode", "lora rank", "dora", "fine tune mode", "seed", "score", "relative to full-model",
        "sst accuracy", "sts pearson", "sst time (s per epoch)", "sts time (s per epoch)", "peak memory (MB)",
        "trainable parameters", "checkpoint (MB)",
    ]  # fmt: skip
    assert found[2] == ["attn", "2", "0", "", "1", "0.5000", "0.625", "0.4321", "0.8000", "12.5", "7.5", "1,500.0",
                        "1,234,567", "90.4"]  # fmt: skip
    assert len(found) == 8
    assert "1 out of memory: no | room; 2 refused: makes no sense" in item.text
    assert "relative to full-model" not in cells_of(trials_item(study(tmp_path, ROWS[:5])))[0]


def test_costs_of_a_gpu_stand_in_the_tables(tmp_path: Path) -> None:
    """R2, tables 7 and 8."""
    more = {"gpu_utilization": 53.91, "minutes_without_evaluation": 110.04}
    trials = study(tmp_path, [row(0.5, more=more, lora_mode="none", seed=seed) for seed in (1, 2)])
    for item in (trials_item(trials), seeds_item("study", trials.trials)):
        header, first, *_ = cells_of(item)
        assert first[header.index("GPU utilization (%)")] == "53.9"
        assert first[header.index("training time without evaluation (min)")] == "110.04"


def test_the_source_has_commits_device_and_shared_flags(tmp_path: Path) -> None:
    trials = study(tmp_path, ROWS).trials
    assert source_of(trials) == f"commit 0123456789ab; cpu (x86_64, 1 threads); python multitask_classifier.py {BASE}"
    changed = [{**ROWS[0], "commit": f"{COMMIT}+"}, {**ROWS[0], "commit": "", "device": ""}, ROWS[0]]
    assert source_of(study(tmp_path, changed).trials).startswith("commit 0123456789ab+, 0123456789ab; cpu")
    assert source_of(study(tmp_path, changed[1:2]).trials).startswith("commit not recorded; python")


def test_the_script(tmp_path: Path) -> None:
    table, out = write(tmp_path / "ranks" / "results.csv", ROWS), tmp_path / "new" / "report"
    done = shell("report.py", table, "--out", out, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    *left_out, page, text = done.stdout.splitlines()
    assert [page, text] == [str(out / "report.html"), str(out / "report.md")]
    assert [line.split(",")[0] for line in left_out] == [
        "Study ranks: no memory over batch size",
        "Study ranks: no comparison of mixed precision",
    ]
    figures = [f"ranks-{kind}" for kind in ("ranks", "costs", "seeds", "scores", "resources")]
    names = {
        "ranks-trials.csv",
        "report.html",
        "report.md",
        *(f"{n}.{ending}" for n in figures for ending in ("csv", "png")),
    }
    assert {path.name for path in out.iterdir()} == names
    assert imread(out / "ranks-ranks.png").shape[1] == 3.3 * 300
    found = read_page(out)
    assert all(line in found.text for line in left_out) and "Made by python report.py" in found.text
    markdown = (out / "report.md").read_text()
    assert "![Dev score over rank](ranks-ranks.png)" in markdown and "no | room" in markdown
    rows = list(csv.DictReader((out / "ranks-trials.csv").open()))
    assert len(rows) == 7 and rows[0]["score"] == "0.6" and float(rows[0]["peak memory (MB)"]) == 1500


def test_studies_are_found_in_a_folder_and_reported_once(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "a" / "results.csv", ROWS[:5])
    write(tmp_path / "runs" / "b" / "results.csv", ROWS)
    (tmp_path / "runs" / "a" / "trials" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "trials" / "one" / "config.json").write_text("{}")
    tables = [tmp_path / "runs" / "a" / "results.csv", write(tmp_path / "methods.csv", ROWS[1:3])]
    report.main([str(word) for word in (tmp_path / "runs", *tables, "--out", tmp_path / "out")])
    assert "Not read" not in read_page(tmp_path / "out").text
    names = sorted(path.name for path in (tmp_path / "out").glob("*-trials.csv"))
    assert names == ["a-trials.csv", "b-trials.csv", "methods-trials.csv"]
    assert "## Study methods\n" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "has no column cause, command, commit, score, status, trial"),
        (b"trial,status,score,cause,command,commit\na,failed,,b,c,d\n", "no trial has finished yet"),
        (
            b"trial,status,score,cause,command,commit\na,ok,nan,b,python x,d\n",
            "row 2 (a) is left out: score is no finite number",
        ),
        (b"trial,status,score,cause,command,commit\na,ok,.5,b,python x --odd,d\n", "unrecognized arguments: --odd"),
        (b"trial,status,score,cause,command,commit\na,ok\n", "row 2 (a) is left out"),
        (
            b"trial,status,score,minutes,cause,command,commit\na,ok,.5,0." + b"1" * 5000 + b",b,python x,d\n",
            "row 2 (a) is left out: minutes has 5002 characters",
        ),
    ],
)
def test_a_file_that_is_not_the_table_of_a_study_is_refused(tmp_path: Path, content: bytes | None, wanted: str) -> None:
    if content is not None:
        (tmp_path / "results.csv").write_bytes(content)
    words = [str(tmp_path / "results.csv"), "--out", str(tmp_path / "report")]
    message = refusal(report.main, words)
    assert message.startswith("nothing to report: ") and wanted in message
    assert not (tmp_path / "report").exists()


def test_damaged_rows_and_tables_leave_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS[:4], row("half a numb", **LORA), row(0.6, more={"checkpoint_bytes": "421x27"}, seed=2)]
    bad = write(tmp_path / "bad" / "results.csv", rows)
    report.main([str(path) for path in (bad, tmp_path / "none.csv", "--out", tmp_path / "out")])
    printed = capsys.readouterr().out
    assert f"{bad}: row 6 (dora=0,lora_mode=attn,lora_rank=2) is left out: could not convert" in printed
    assert f"{bad}: row 7 (seed=2) is left out" in printed and "421x27" in printed
    assert f"{tmp_path / 'none.csv'}: cannot be read" in printed
    assert "Not read" in read_page(tmp_path / "out").text and (tmp_path / "out" / "bad-ranks.png").exists()


def test_nothing_to_report_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words in ([], ["empty"], ["empty", "--compare", "a.pt", "b.pt"]):
        done = shell("report.py", *words, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")
