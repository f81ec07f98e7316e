"""Figures and tables of runs show what the runs' files say."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cells_of, check_layout, configure, figure_of, refusal
from matplotlib.colors import to_rgb
from scipy.stats import linregress
from sklearn.metrics import confusion_matrix, mean_squared_error

from config import DataOptions, TaskOptions
from datasets import BadRows, read_examples
from evaluation.metrics import correlation
from evaluation.prediction_files import write_predictions
from reporting.page import ReportItem, Section
from reporting.predictions import DevSets, Predictions, load_predictions, read_prediction_file
from reporting.profiles import memory_item
from reporting.runs import (
    MOST_CURVES,
    confusion_item,
    curves_item,
    errors_item,
    rates_item,
    residuals_item,
    runs_item,
    scatter_item,
    scores_item,
    task_curves_item,
    with_labels,
)
from reporting.sources import Run, read_run
from reporting.trials import compare_trials
from tasks import PARA, SST, STS, TASKS, Task

rng = np.random.default_rng
TRAINED = {name: task for name, task in TASKS.items() if task.by_default}


@pytest.fixture
def run(finished_runs: Path) -> Run:
    """The run of all tasks."""
    return read_run(finished_runs / "yin", "yin", [])


def bare_run(name: str, metrics: list[dict[str, Any]]) -> Run:
    """Return a run of which nothing but metrics.jsonl is known."""
    return Run(Path(name), name, None, metrics, [], None, None, "")


def predictions_of(run: Run, task: Task) -> Predictions:
    found = load_predictions(run, task, DevSets(None, {}, []))
    assert found is not None
    return found


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = rng(0).normal(size=20)
    ids = [f"a , {i}" for i in range(20)]
    write_predictions(tmp_path / "sts.csv", STS, ids, values)
    assert read_prediction_file(tmp_path / "sts.csv", STS) == dict(zip(ids, values.tolist(), strict=True))
    write_predictions(tmp_path / "sst.csv", SST, ids[:5], np.eye(5))
    assert list(read_prediction_file(tmp_path / "sst.csv", SST).values()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "id \t Predicted_Sentiment \n",
        "id \t Predicted_Sentiment \na , 1 \nb , \n",
        "id \t Predicted_Sentiment \na , 1 \nb\n",
        "id \t Predicted_Sentiment \na , 7 \n",
        "id \t Predicted_Sentiment \na , 1 \na , 2 \n",
        "id \t Predicted_Is_Paraphrase \na , 1 \n",
    ],
)
def test_damaged_predictions_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.csv").write_text(content)
    assert "x.csv: is damaged" in refusal(read_prediction_file, tmp_path / "x.csv", SST)


def test_predictions_are_in_the_order_of_the_dev_file(run: Run, small_data: Path) -> None:
    for task in TRAINED.values():
        found = predictions_of(run, task)
        examples = read_examples(small_data / task.files["dev"], task, "dev", BadRows(0, print))
        assert examples.labels is not None and np.array_equal(found.labels, examples.labels)
        written = (run.path / "predictions" / f"{task.name}-dev-output.csv").read_text().splitlines()[1:]
        wanted = {line.split(" , ")[0]: float(line.split(" , ")[1]) for line in written}
        assert found.predicted.tolist() == [wanted[example] for example in examples.ids]


def test_each_dev_file_is_read_once(run: Run) -> None:
    problems: list[str] = []
    dev_sets = DevSets(None, {}, problems)
    assert dev_sets.examples(run.config, SST) is dev_sets.examples(run.config, SST) is not None
    missing = DevSets(DataOptions(data_dir="/nowhere"), {"sst": TaskOptions()}, problems)
    assert missing.examples(None, SST) is None and missing.examples(None, SST) is None and len(problems) == 1


def test_the_confusion_matrix_is_drawn(run: Run) -> None:
    for task in (SST, PARA):
        found = predictions_of(run, task)
        item = confusion_item(run, found)
        (axes,) = figure_of(item).axes
        counts = confusion_matrix(found.labels, found.predicted, labels=range(len(task.label_names)))
        assert np.allclose(axes.images[0].get_array(), counts / counts.sum(axis=1, keepdims=True).clip(min=1))
        assert [text.get_text().split("\n")[1] for text in axes.texts] == [str(count) for count in counts.ravel()]
        assert [row[1:] for row in cells_of(item)[1:]] == [[str(count) for count in row] for row in counts]
        assert [label.get_text() for label in axes.get_yticklabels()] == list(task.label_names)


def test_scatter_and_residuals_are_drawn(run: Run) -> None:
    found = predictions_of(run, STS)
    labels, predicted = found.labels.astype(float), found.predicted
    (axes,) = figure_of(scatter_item(run, found)).axes
    assert np.allclose(axes.collections[0].get_offsets(), np.stack([labels, predicted], axis=1))
    best, ends = linregress(labels, predicted), np.array([labels.min(), labels.max()])
    (line,) = axes.lines
    assert np.allclose(line.get_xdata(), ends) and np.allclose(line.get_ydata(), best.intercept + best.slope * ends)
    (axes,) = figure_of(residuals_item(run, found)).axes
    inverse = linregress(predicted, labels)
    residuals = inverse.intercept + inverse.slope * predicted - labels
    assert np.allclose(axes.collections[0].get_offsets(), np.stack([labels, residuals], axis=1))
    assert axes.get_xlabel() == "true similarity (0 to 5)"


def test_learning_curves_are_those_of_metrics_jsonl(run: Run) -> None:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    above, below = figure_of(curves_item(run)).axes
    metric = {name: task.metric for name, task in TRAINED.items()}
    wanted = [[line[part][name][metric[name]] for line in lines] for part in ("dev", "train") for name in TRAINED]
    curves = [line for line in above.lines if len(line.get_xdata()) == 2 and line.get_linestyle() != ":"]
    assert [list(line.get_ydata()) for line in curves] == wanted
    assert [line.get_linestyle() for line in curves] == ["-"] * 3 + ["--"] * 3
    assert all(list(line.get_xdata()) == [1, 2] for line in curves)
    losses = [list(line.get_ydata()) for line in below.lines if line.get_linestyle() != ":"]
    assert losses == [[line["train"][name]["loss"] for line in lines] for name in TRAINED]
    assert [list(line.get_xdata()) for line in above.lines if line.get_linestyle() == ":"] == [[run.best_epoch] * 2]
    names = (above.get_ylabel(), below.get_ylabel(), below.get_xlabel())
    assert names == ("accuracy or Pearson r", "training loss", "epoch")


def test_a_task_that_is_scored_and_not_trained_has_a_dev_curve() -> None:
    metrics = [{"epoch": epoch, "train": {"sst": {"loss": 1.0, "accuracy": 0.5}}, "dev": {"sts": {"pearson": 0.1}}}
               for epoch in (1, 2)]  # fmt: skip
    above, below = figure_of(curves_item(bare_run("r", metrics))).axes
    assert [list(line.get_ydata()) for line in above.lines] == [[0.1, 0.1], [0.5, 0.5]]
    assert [list(line.get_ydata()) for line in below.lines] == [[1.0, 1.0]]


def test_runs_are_compared(finished_runs: Path) -> None:
    several = with_labels([read_run(finished_runs / name, name, []) for name in ("cross", "sst", "yin")])
    (axes,) = figure_of(scores_item(several)).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2], [1, 2]]  # one epoch is no curve
    assert len({to_rgb(line.get_color()) for line in axes.lines}) == 2
    assert isinstance(scores_item(several[:2]), str)
    rows = cells_of(runs_item(several))
    assert len({row[1] for row in rows[1:]}) == 3 and "v2" in rows[1][1]  # what distinguishes each
    assert [row[0] for row in rows] == ["run", "cross", "sst", "yin"] and rows[2][rows[0].index("para accuracy")] == ""
    saved = json.loads((finished_runs / "yin" / "scores.json").read_text())
    assert rows[3][rows[0].index("sts pearson")] == f"{saved['dev']['sts']['pearson']:.4f}"
    assert rows[3][rows[0].index("best epoch")] == str(saved["epoch"])
    timing = [json.loads(line) for line in (finished_runs / "yin" / "timing.jsonl").read_text().splitlines()]
    assert rows[3][rows[0].index("training time (min)")] == f"{sum(line['seconds'] for line in timing) / 60:,.2f}"
    steps = sum(line["seconds_without_evaluation"] for line in timing) / 60
    assert rows[3][rows[0].index("training time without evaluation (min)")] == f"{steps:,.2f}"
    assert not any("GPU" in name for name in rows[0])  # a CPU has no such column
    trial = replace(several[2], timing=[{**line, "gpu_utilization": 50.0 + n} for n, line in enumerate(timing)]).trial
    assert trial is not None and trial.gpu_utilization == 50.5


def options_of(run: Run, *flags: object, dev: dict[str, int] | None = None) -> Run:
    """Return the run with other options and sizes of dev sets."""
    return replace(run, config=configure(*flags), dev_examples=dev or {"sst": 20})


def test_runs_are_called_by_the_options_in_which_they_differ() -> None:
    plain = [bare_run(name, [{"epoch": e, "train": {}, "dev": {"score": 0.1}} for e in (1, 2)]) for name in "abcd"]
    flags = [["--lr", 1e-5], ["--lr", 2e-5], ["--lr", 2e-5, "--seed", 3], ["--lr", 2e-5, "--seed", 3]]
    trained = [options_of(run, "--train_sst", *more) for run, more in zip(plain, flags, strict=True)]
    titles = [run.title for run in with_labels([*trained, bare_run("ensemble", [])])]
    seed = configure().train.seed
    assert titles == ["lr 1e-05", f"lr 2e-05, seed {seed}", "lr 2e-05, seed 3, c", "lr 2e-05, seed 3, d", "ensemble"]
    legend = figure_of(scores_item(with_labels(trained[:2]))).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["lr 1e-05", "lr 2e-05"]
    assert [run.title for run in with_labels([trained[0], bare_run("ensemble", [])])] == ["a", "ensemble"]


def test_dev_sets_of_different_sizes_are_marked(run: Run) -> None:
    assert run.dev_examples == {name: len(predictions_of(run, task).labels) for name, task in TRAINED.items()}
    large = options_of(run, "--lr", 1e-5, dev={"sst": 1101, "sts": 9})
    small = options_of(replace(run, name="small"), "--lr", 2e-5, dev={"sst": 64, "sts": 9})
    runs = with_labels([large, small, bare_run("e", [])])
    assert [run.title for run in runs] == ["lr 1e-05 (dev: 1,101 sst)", "lr 2e-05 (dev: 64 sst)", "e"]
    item = runs_item(runs)
    assert "64 or 1,101 SST sentiment" in item.text and "1,101 sst" in cells_of(item)[1][1]
    section = Section("Runs")
    compare_trials(section, "runs", [run.trial for run in runs if run.trial is not None])
    assert section.items and all("64 or 1,101 SST sentiment" in item.text for item in section.items)
    (bars,) = (item for item in section.items if item.name == "runs-scores")
    assert [row[0] for row in cells_of(bars)[1:]] == [run.title for run in runs[:2]]
    assert runs_item(with_labels([run, run])).text == ""


def test_curves_of_a_task_have_a_line_for_each_run() -> None:
    """R0, figures 4 to 19: dev metric above, training loss below. A run may have been scored or trained alone."""

    def lines(loss: float | None, accuracy: float | None) -> list[dict[str, Any]]:
        train = {} if loss is None else {"sst": {"loss": loss}}
        dev = {} if accuracy is None else {"sst": {"accuracy": accuracy}}
        return [{"epoch": epoch, "train": train, "dev": dev} for epoch in (1, 2, 4)]

    runs = [bare_run("adam", lines(1.0, 0.5)), bare_run("sgd", lines(2.0, 0.3)), bare_run("other", lines(3.0, None))]
    runs.append(bare_run("untrained", lines(None, 0.2)))
    item = task_curves_item(SST, runs)
    above, below = figure_of(item).axes
    assert [list(line.get_ydata()) for line in above.lines] == [[0.5] * 3, [0.3] * 3, [0.2] * 3]
    assert [list(line.get_ydata()) for line in below.lines] == [[1.0] * 3, [2.0] * 3]
    assert all(list(line.get_xdata()) == [1, 2, 4] for line in (*above.lines, *below.lines))
    colours = [[to_rgb(line.get_color()) for line in axes.lines] for axes in (above, below)]
    assert colours[0][:2] == colours[1] and len(set(colours[0])) == 3
    assert (above.get_ylabel(), below.get_ylabel()) == ("dev accuracy", "training loss")
    assert cells_of(item)[1] == ["adam", "1", "1.0000", "0.5000"] and len(cells_of(item)) == 10
    assert "two runs" in str(task_curves_item(STS, runs))
    check_layout(figure_of(item))


def trace_of(folder: Path, *events: dict[str, Any]) -> Run:
    """Return a run of two profiled steps, of 2 and of 3 ms, with these further events."""
    steps = [
        {"name": f"ProfilerStep#{n}", "cat": "user_annotation", "ts": 1e9 + start, "dur": length}
        for n, start, length in ((3, 0, 2e3), (4, 2e3, 3e3))
    ]
    content = json.dumps({"traceEvents": [*steps, *events]}).encode()
    (folder / "profile.pt.trace.json.gz").write_bytes(gzip.compress(content))
    return Run(folder, "r", None, [], [], None, None, "")


def allocation(time: float, size: float, kind: int) -> dict[str, Any]:
    """Return the event of an allocation, after which a kind of device has `size` bytes."""
    return {"name": "[memory]", "ts": 1e9 + time, "args": {"Device Type": kind, "Total Allocated": size}}


def test_memory_over_the_steps_that_were_profiled(tmp_path: Path) -> None:
    """R2, figure 10: of the GPU, where there is one."""
    on_cpu = [allocation(500, 4e6, 0), allocation(2500, 9e6, 0), allocation(9000, 99e6, 0)]
    item = memory_item(trace_of(tmp_path, *on_cpu))
    (axes,) = figure_of(item).axes
    assert axes.lines[0].get_xydata().tolist() == [[0.5, 4], [2.5, 9]]
    assert [line.get_xdata()[0] for line in axes.lines[1:]] == [0, 2] and "CPU" in item.text
    assert [row[2:] for row in cells_of(item)[1:]] == [["2.0", "4.0"], ["3.0", "9.0"]]
    item = memory_item(trace_of(tmp_path, *on_cpu, allocation(100, 7e9, 1)))
    assert figure_of(item).axes[0].lines[0].get_xydata().tolist() == [[0.1, 7000]] and "CPU" not in item.text
    check_layout(figure_of(item))
    assert isinstance(memory_item(trace_of(tmp_path)), str)
    (tmp_path / "profile.pt.trace.json.gz").write_bytes(gzip.compress(b"{"))
    assert "profile.pt.trace.json.gz: is damaged" in refusal(memory_item, bare_run(str(tmp_path), []))
    (tmp_path / "profile.pt.trace.json.gz").unlink()
    assert memory_item(bare_run(str(tmp_path), [])) is None


def test_of_many_runs_the_best_are_drawn() -> None:
    """Names of runs may be long and may contain what matplotlib takes for a formula."""
    names = [*(f"{'very_long_' * 12}{i:02}" for i in range(19)), r"cost $\wrong$ 3$ or 4$"]
    runs = [
        bare_run(name, [{"epoch": epoch, "train": {}, "dev": {"score": i * epoch / 100}} for epoch in (1, 2)])
        for i, name in enumerate(names)
    ]
    item = scores_item(runs)
    figure = figure_of(item)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(shown) == MOST_CURVES and all(name.endswith(f"{i}") for i, name in enumerate(shown[:-1], start=12))
    assert all(len(line) < 70 for name in shown for line in name.splitlines())
    figure.draw_without_rendering()  # fails if it reads a wrong formula
    assert isinstance(item, ReportItem) and "8 best of 20 runs" in item.text and len(cells_of(item)) == 41


def test_rates_and_errors_have_rows_for_each_run(finished_runs: Path) -> None:
    both = [read_run(finished_runs / name, name, []) for name in ("yin", "cross")]
    binary = {run.name: predictions_of(run, PARA) for run in both}
    rows = cells_of(rates_item(PARA, binary))
    assert [row[0] for row in rows] == ["run", "yin", "cross"]
    (tn, fp), (fn, tp) = confusion_matrix(binary["yin"].labels, binary["yin"].predicted, labels=[0, 1])
    assert rows[1][2:] == [f"{x / y:.3f}" for x, y in ((tp, tp + fn), (fp, fp + tn), (tn, fp + tn), (fn, tp + fn))]
    similar = {run.name: predictions_of(run, STS) for run in both}
    _, *rows = cells_of(errors_item(STS, similar))
    kinds = ("as they are", "fitted to the labels")
    assert [row[:2] for row in rows] == [[name, kind] for name in similar for kind in kinds]
    yin = similar["yin"]
    assert rows[0][4] == f"{mean_squared_error(yin.labels, yin.predicted):.3f}"
    assert rows[1][10] == f"{correlation(yin.predicted, yin.labels) ** 2:.3f}"


def test_nothing_of_the_figures_is_cut_off(run: Run, finished_runs: Path) -> None:
    items = [curves_item(run), scores_item([run, read_run(finished_runs / "cross", "cross", [])])]
    items += [make_item(run, predictions_of(run, STS)) for make_item in (scatter_item, residuals_item)]
    items += [confusion_item(run, predictions_of(run, task)) for task in (SST, PARA)]
    for item in items:
        check_layout(figure_of(item))
        assert isinstance(item, ReportItem) and item.source.startswith("commit ") and not figure_of(item).texts
