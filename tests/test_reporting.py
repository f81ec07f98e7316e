"""Reports on run directories: numbers against scikit-learn and scipy, figures' data, and runs that are not whole."""

import contextlib
import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from scipy.stats import binomtest, linregress
from sklearn.metrics import (
    confusion_matrix,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
    root_mean_squared_error,
)
from test_config import configure
from test_report import cells, drawn, page_of

import multitask_classifier
import report
from config import DataOptions, TaskOptions
from datasets import BadRows, read_examples
from evaluation.metrics import confusion, correlation, linear_fit
from evaluation.prediction_files import write_predictions
from reporting.figures import seeds_figure
from reporting.measures import (
    RESAMPLES,
    errors,
    errors_and_deviations,
    fitted,
    mcnemar,
    mean_and_spread,
    paired_bootstrap,
    rates,
)
from reporting.page import Piece, Report, Section, write
from reporting.runs import (
    CURVES,
    DevSets,
    Outcome,
    confusion_piece,
    curves_piece,
    outcome_of,
    rates_piece,
    read_predictions,
    residuals_piece,
    runs_piece,
    scatter_piece,
    scores_piece,
)
from reporting.sources import Run, collect, read_run, short_names, trial_of_run
from reporting.tables import Column, Table
from studies.results import figures as row_of
from tasks import PARA, SST, STS, TASKS, Task
from training import logger as telemetry
from training.run_directory import RunDirectory
from utils.errors import UserError

rng = np.random.default_rng
TRAINED = {name: task for name, task in TASKS.items() if task.by_default}


# ------------------------------------------------------------------------------------------------------------ measures


def test_confusion_matrices_equal_scikit_learn() -> None:
    labels, decided = rng(0).integers(0, 5, 300), rng(1).integers(0, 4, 300)  # the fifth class is never predicted
    assert np.array_equal(confusion(SST, decided, labels), confusion_matrix(labels, decided, labels=range(5)))
    labels, decided = rng(0).integers(0, 2, 9), np.zeros(9, np.int64)
    assert np.array_equal(confusion(PARA, decided, labels), confusion_matrix(labels, decided, labels=[0, 1]))


def test_the_best_line_equals_scipy() -> None:
    x, y = rng(0).normal(size=50) + 1e3, rng(1).normal(size=50)
    wanted = linregress(x, y)
    assert linear_fit(x, y) == pytest.approx((wanted.slope, wanted.intercept), rel=1e-9)
    assert fitted(x, y) == pytest.approx(wanted.slope * x + wanted.intercept, rel=1e-9)
    assert linear_fit(np.full(4, 2.0), np.arange(4.0)) == (0.0, 1.5)


def test_errors_equal_scikit_learn() -> None:
    labels = np.round(rng(0).random(80) * 5, 1).astype(np.float32)
    values = (labels + rng(1).normal(size=80)).astype(np.float32)
    assert errors(values, labels) == pytest.approx(
        {
            "MSE": mean_squared_error(labels, values),
            "RMSE": root_mean_squared_error(labels, values),
            "MAE": mean_absolute_error(labels, values),
            "R2": r2_score(labels, values),
        },
        abs=1e-6,
    )
    assert errors(fitted(values, labels), labels)["R2"] == pytest.approx(correlation(values, labels) ** 2)
    assert errors(values, np.ones(80, np.float32))["R2"] == 0.0


def test_bootstrap_deviations_are_those_of_repeated_experiments() -> None:
    """Of independent normal errors, the deviation of the mean square is sqrt(2 / n) and of the mean absolute .603."""
    count = 400
    labels = rng(0).random(count) * 5
    values = labels + rng(1).normal(size=count)
    found = errors_and_deviations(values, labels, fit=False)
    assert [value for value, _ in found.values()] == list(errors(values, labels).values())
    assert found["MSE"][1] == pytest.approx((2 / count) ** 0.5, rel=0.2)
    assert found["MAE"][1] == pytest.approx(((1 - 2 / np.pi) / count) ** 0.5, rel=0.2)
    assert errors_and_deviations(values, labels, fit=False) == found  # the same samples every time
    scaled = errors_and_deviations(-3 * values + 7, labels, fit=True)
    unscaled = errors_and_deviations(values, labels, fit=True)
    assert [pair for own in scaled.values() for pair in own] == pytest.approx(
        [pair for own in unscaled.values() for pair in own]
    )


def test_rates_by_hand() -> None:
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    decided = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    assert rates(PARA, decided, labels) == pytest.approx(
        {"true positive": 3 / 4, "false positive": 2 / 6, "true negative": 4 / 6, "false negative": 1 / 4}
    )
    assert rates(PARA, decided[:4], labels[:4])["false positive"] == 0  # without any negative


def test_mean_and_spread() -> None:
    values = [0.2, 0.5, 0.9]
    assert mean_and_spread(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert mean_and_spread([0.3]) == (0.3, None) and mean_and_spread([]) == (None, None)


def test_mcnemar_equals_the_binomial_test_of_discordant_pairs() -> None:
    a, b = rng(0).random(100) < 0.7, rng(1).random(100) < 0.5
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    assert mcnemar(a, b) == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)
    assert mcnemar(a, b) == pytest.approx(mcnemar(b, a)) and mcnemar(a, a) == 1.0
    eight = np.arange(20) < 8
    assert mcnemar(eight, np.zeros(20, bool)) == pytest.approx(2 / 2**8)


def test_the_paired_bootstrap_sees_what_pairing_reveals() -> None:
    """Two models with large common errors: their difference is sure although each score is not."""
    labels = rng(0).random(300) * 5
    common = rng(1).normal(size=300) * 2
    good, bad = labels + common, labels + common + 3 * rng(2).normal(size=300)
    low, high, p = paired_bootstrap(correlation, bad, good, labels)
    assert 0 < low < correlation(good, labels) - correlation(bad, labels) < high < 0.5 and p < 0.01
    flipped = paired_bootstrap(correlation, good, bad, labels)
    assert flipped == pytest.approx((-high, -low, p))
    assert paired_bootstrap(correlation, good, good, labels) == (0.0, 0.0, 1.0)
    noise = [labels + rng(seed).normal(size=300) for seed in (3, 4)]
    assert paired_bootstrap(correlation, *noise, labels)[2] > 0.05
    assert paired_bootstrap(correlation, bad, labels, labels)[2] == pytest.approx(2 / (RESAMPLES + 1))


# -------------------------------------------------------------------------------------------------------------- tables


def test_a_table_in_three_spellings() -> None:
    table = Table(
        [Column("text | it"), Column("share", ".1%"), Column("nothing"), Column("count", ",d")],
        [["a | b\nc <d>", 0.12345, None, 1234], ["", None, "", 5]],
    ).filled()
    assert table.markdown().splitlines() == [
        "| text \\| it | share | count |",
        "| - | - | - |",
        "| a \\| b c <d> | 12.3% | 1,234 |",
        "|  |  | 5 |",
    ]
    rows = list(csv.reader(table.csv().splitlines(keepends=True)))
    assert rows == [["text | it", "share", "count"], ["a | b\nc <d>", "0.12345", "1234"], ["", "", "5"]]
    assert "<td>a | b\nc &lt;d&gt;</td><td>12.3%</td><td>1,234</td>" in table.html()


def test_names_of_files_never_collide_and_texts_are_escaped(tmp_path: Path) -> None:
    table = Table([Column("x")], [["1"]])
    pieces = [Piece(name, "<b>Title</b> & co", "a < b", table) for name in ("a/b", "a b", "a-b", "../a")]
    write(Report("R", "made <so>", [Section("S", pieces, ["left <out>"])], ["not <read>"]), tmp_path, "report")
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == ["a-b-1.csv", "a-b-2.csv", "a-b.csv", "a.csv"]
    page = page_of(tmp_path)
    for text in ("<b>Title</b> & co", "a < b", "made <so>", "left <out>", "not <read>"):
        assert text in page.text


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """A folder with finished runs `yin` (all tasks), `cross` (another arch), `sst` (one task, one epoch)."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*tiny_flags, "--no_tensorboard", "--no_test_predictions"]
    kinds = {"yin": [], "cross": ["--arch", "v2", "--seed", "5"], "sst": ["--train_sst", "--epochs", "1"]}
    for name, more in kinds.items():
        multitask_classifier.main([*flags, *more, "--run_dir", str(folder / name)])
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    """The same, for a test to damage."""
    return shutil.copytree(runs, tmp_path / "runs")


def run_of(path: Path) -> Run:
    """A run that is read without a problem."""
    problems: list[str] = []
    run = read_run(path, path.name, problems)
    assert problems == []
    return run


def dev_sets(problems: list[str] | None = None) -> DevSets:
    return DevSets(None, {}, [] if problems is None else problems)


def outcome(run: Run, task: Any) -> Outcome:
    found = outcome_of(run, task, dev_sets())
    assert isinstance(found, Outcome), found
    return found


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = rng(0).normal(size=20)
    ids = [f"a , {i}" for i in range(20)]
    write_predictions(tmp_path / "sts.csv", STS, ids, values)
    assert read_predictions(tmp_path / "sts.csv", STS) == dict(zip(ids, values.tolist(), strict=True))
    write_predictions(tmp_path / "sst.csv", SST, ids[:5], np.eye(5))
    assert list(read_predictions(tmp_path / "sst.csv", SST).values()) == [0, 1, 2, 3, 4]


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
    with pytest.raises(UserError, match="x.csv: is damaged"):
        read_predictions(tmp_path / "x.csv", SST)


def test_a_run_is_a_trial_with_the_figures_that_its_row_would_have(runs: Path) -> None:
    for name in ("yin", "sst"):
        trial, row = trial_of_run(run_of(runs / name)), row_of(runs / name)
        assert trial is not None
        assert (trial.score, trial.memory, trial.device) == (row["score"], row["peak_memory_bytes"], row["device"])
        assert trial.seconds == pytest.approx(
            sum(row.get(f"{task}_seconds_per_epoch", 0) for task in TRAINED), abs=2e-3
        )
        assert trial.by_task == {task.name: row[f"{task.name}_{task.metric}"] for task in TRAINED.values()
                                 if f"{task.name}_{task.metric}" in row}  # fmt: skip
        assert len(trial.commit.rstrip("+")) == 40 and "--epochs" in trial.command


def test_figures_of_predictions_are_those_of_the_dev_file(runs: Path, small_data: Path) -> None:
    run = run_of(runs / "yin")
    for task in TRAINED.values():
        found = outcome(run, task)
        examples = read_examples(small_data / task.files["dev"], task, "dev", BadRows(0, print))
        assert examples.labels is not None and np.array_equal(found.labels, examples.labels)
        written = (run.path / "predictions" / f"{task.name}-dev-output.csv").read_text().splitlines()[1:]
        wanted = {line.split(" , ")[0]: float(line.split(" , ")[1]) for line in written}
        assert found.decided.tolist() == [wanted[example] for example in examples.ids]


def test_the_confusion_matrix_is_drawn(runs: Path) -> None:
    run = run_of(runs / "yin")
    for task in (SST, PARA):
        found = outcome(run, task)
        piece = confusion_piece(run, found)
        (axes,) = drawn(piece).axes
        counts = confusion_matrix(found.labels, found.decided, labels=range(len(task.label_names)))
        shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
        assert np.allclose(axes.images[0].get_array(), shares)
        assert [text.get_text().split("\n")[1] for text in axes.texts] == [str(count) for count in counts.ravel()]
        assert [row[1:] for row in cells(piece)[1:]] == [[str(count) for count in row] for row in counts]
        assert [label.get_text() for label in axes.get_yticklabels()] == list(task.label_names)


def test_scatter_and_residuals_are_drawn(runs: Path) -> None:
    run = run_of(runs / "yin")
    found = outcome(run, STS)
    (axes,) = drawn(scatter_piece(run, found)).axes
    assert np.allclose(axes.collections[0].get_offsets(), np.stack([found.labels, found.decided], axis=1))
    best = linregress(found.labels.astype(float), found.decided)
    ends = np.array([found.labels.min(), found.labels.max()])
    (line,) = axes.lines
    assert np.allclose(line.get_xdata(), ends) and np.allclose(line.get_ydata(), best.intercept + best.slope * ends)
    (axes,) = drawn(residuals_piece(run, found)).axes
    offsets = np.asarray(axes.collections[0].get_offsets())
    inverse = linregress(found.decided, found.labels.astype(float))
    assert np.allclose(offsets[:, 1], inverse.intercept + inverse.slope * found.decided - found.labels)
    assert np.allclose(offsets[:, 0], found.labels) and abs(offsets[:, 1].mean()) < 1e-6
    assert axes.get_xlabel() == "true similarity (0 to 5)"


def test_learning_curves_are_those_of_metrics_jsonl(runs: Path) -> None:
    run = run_of(runs / "yin")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    above, below = drawn(curves_piece(run)).axes
    metric = {name: task.metric for name, task in TRAINED.items()}
    wanted = [[line["dev"][name][metric[name]] for line in lines] for name in TRAINED]
    wanted += [[line["train"][name][metric[name]] for line in lines] for name in TRAINED]
    curves = [line for line in above.lines if len(line.get_xdata()) == 2 and line.get_linestyle() != ":"]
    assert [list(line.get_ydata()) for line in curves] == wanted
    assert [line.get_linestyle() for line in curves] == ["-"] * 3 + ["--"] * 3
    assert all(list(line.get_xdata()) == [1, 2] for line in curves)
    losses = [list(line.get_ydata()) for line in below.lines if line.get_linestyle() != ":"]
    assert losses == [[line["train"][name]["loss"] for line in lines] for name in TRAINED]
    assert [list(line.get_xdata()) for line in above.lines if line.get_linestyle() == ":"] == [[run.best_epoch] * 2]
    assert (above.get_ylabel(), below.get_ylabel(), below.get_xlabel()) == (
        "accuracy or Pearson r", "training loss", "epoch")  # fmt: skip
    assert curves_piece(run_of(runs / "sst")) == "no learning curves, which need two epochs"


def test_a_task_that_is_scored_and_not_trained_has_a_dev_curve() -> None:
    metrics = [{"epoch": epoch, "train": {"sst": {"loss": 1.0, "accuracy": 0.5}}, "dev": {"sts": {"pearson": 0.1}}}
               for epoch in (1, 2)]  # fmt: skip
    above, below = drawn(curves_piece(Run(Path("r"), "r", None, metrics, [], None, None, ""))).axes
    assert [list(line.get_ydata()) for line in above.lines] == [[0.1, 0.1], [0.5, 0.5]]
    assert [list(line.get_ydata()) for line in below.lines] == [[1.0, 1.0]]


def test_runs_beside_each_other(runs: Path) -> None:
    several = [run_of(runs / name) for name in ("cross", "sst", "yin")]
    (axes,) = drawn(scores_piece(several)).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2], [1, 2]]  # one epoch is no curve
    assert len({to_rgb(line.get_color()) for line in axes.lines}) == 2
    assert isinstance(scores_piece(several[:2]), str)
    rows = cells(runs_piece(several))
    assert len({row[1] for row in rows[1:]}) == 3 and "v2" in rows[1][1]  # what sets each apart
    assert [row[0] for row in rows] == ["run", "cross", "sst", "yin"] and rows[2][rows[0].index("para accuracy")] == ""
    saved = json.loads((runs / "yin" / "scores.json").read_text())
    assert rows[3][rows[0].index("sts pearson")] == f"{saved['dev']['sts']['pearson']:.4f}"
    assert rows[3][rows[0].index("epoch kept")] == str(saved["epoch"])


def test_of_many_runs_the_best_are_drawn() -> None:
    def run(name: str, score: float) -> Run:
        metrics = [{"epoch": epoch, "train": {}, "dev": {"score": score * epoch}} for epoch in (1, 2)]
        return Run(Path(name), name, None, metrics, [], None, None, "")

    piece = scores_piece([run(f"run{i}", i / 100) for i in range(20)])
    (legend,) = drawn(piece).legends
    assert [text.get_text() for text in legend.get_texts()] == [f"run{i}" for i in range(20 - CURVES, 20)]
    assert isinstance(piece, Piece) and "8 best of 20 runs" in piece.text and len(cells(piece)) == 41


def test_names_of_runs_stay_apart_and_are_no_formulas() -> None:
    """Runs of a sweep are named by their flags and differ at the end; a folder may have any name."""
    long = [f"{'very_long_' * 12}{i}" for i in range(3)]
    metrics = [{"epoch": epoch, "train": {}, "dev": {"score": 0.1 * epoch}} for epoch in (1, 2)]
    runs = [Run(Path(name), name, None, metrics, [], None, None, "") for name in [*long, r"cost $\wrong$ 3$ or 4$"]]
    figure = drawn(scores_piece(runs))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:3] == [f"{name[:29]}\N{HORIZONTAL ELLIPSIS}{name[-29:]}" for name in long]
    figure.draw_without_rendering()  # which fails where it reads a wrong formula
    seeds_figure([r"a $\wrong$"], {r"a $\wrong$": [[1.0]]}, r"python x.py --name $\wrong$").draw_without_rendering()


def test_rates_have_a_row_for_each_run(runs: Path) -> None:
    own = {name: outcome(run_of(runs / name), PARA) for name in ("yin", "cross")}
    rows = cells(rates_piece(PARA, own))
    assert [row[0] for row in rows] == ["run", "yin", "cross"]
    (tn, fp), (fn, tp) = confusion_matrix(own["yin"].labels, own["yin"].decided, labels=[0, 1])
    assert rows[1][2:] == [f"{x / y:.3f}" for x, y in ((tp, tp + fn), (fp, fp + tn), (tn, fp + tn), (fn, tp + fn))]


def test_nothing_of_the_figures_is_cut_off(runs: Path) -> None:
    run = run_of(runs / "yin")
    made: list[Any] = [curves_piece(run), scores_piece([run, run_of(runs / "cross")])]
    made += [make(run, outcome(run, STS)) for make in (scatter_piece, residuals_piece)]
    made += [confusion_piece(run, outcome(run, task)) for task in (SST, PARA)]
    for piece in made:
        figure = drawn(piece)
        figure.draw_without_rendering()
        whole, (note,) = figure.bbox, figure.texts
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        for box in [*boxes, note.get_window_extent(), *(legend.get_window_extent() for legend in figure.legends)]:
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
        assert note.get_window_extent().y1 <= min(box.y0 for box in boxes)
        assert figure.get_figwidth() == 3.3 and note.get_text().startswith("commit ")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_titles_in_tensorboard_are_whole(task: Task) -> None:
    low, high = task.label_range
    labels = rng(0).integers(int(low), int(high) + 1, size=40)
    values = np.eye(int(high) + 1)[labels] if task.kind == "classes" else labels.astype(np.float64)
    draw = telemetry.residual_figure if task.kind == "similarity" else telemetry.confusion_figure
    figure = draw(task, values, labels)
    figure.draw_without_rendering()
    title = figure.axes[0].title.get_window_extent()
    assert figure.bbox.x0 <= title.x0 and title.x1 <= figure.bbox.x1 and title.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    ("epochs", "eval_every", "drawn_after"),
    [
        (7, 1, [1, 2, 3, 4, 5, 6, 7]),
        (20, 3, [3, 6, 9, 12, 15, 18, 20]),
        (45, 1, [*range(3, 46, 3)]),
        (200, 1, [*range(10, 201, 10)]),
        (200, 7, [*range(14, 200, 14), 200]),
    ],
)
def test_a_long_run_draws_few_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, eval_every: int, drawn_after: list[int]
) -> None:
    """Drawing them takes as long as a short epoch; curves have every epoch."""
    monkeypatch.setattr(telemetry, "confusion_figure", lambda *_: None)
    config = configure("--train_sst", "--epochs", epochs, "--eval_every", eval_every, "--tensorboard")
    own = telemetry.Telemetry(RunDirectory(tmp_path), config, {"sst": SST})
    assert own.writer is not None
    figures, scalars = [], []
    monkeypatch.setattr(own.writer, "add_figure", lambda tag, figure, step: figures.append(step))
    monkeypatch.setattr(own.writer, "add_scalar", lambda tag, value, step: scalars.append((tag, step)))
    for number in range(1, epochs + 1):
        due = number % eval_every == 0 or number == epochs
        dev = {"sst": (np.eye(5), np.arange(5))} if due else {}
        scores = {"sst": {"accuracy": 1.0}} if due else {}
        own.epoch(telemetry.Epoch(number, "all", number, {}, scores), dev)
    assert figures == drawn_after
    assert [step for tag, step in scalars if tag.startswith("speed/")] == [*range(1, epochs + 1)]


# ---------------------------------------------------------------------------------------------------------- the script


def say(capsys: Any, *words: object) -> str:
    """What report.py prints."""
    capsys.readouterr()
    report.main([str(word) for word in words])
    return str(capsys.readouterr().out)


def test_a_folder_of_runs(runs: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    said = say(capsys, runs, "--out", out)
    page = page_of(out)
    wanted = {f"{run}-{kind}" for run in ("yin", "cross") for kind in (
        "curves", "sst-confusion", "para-confusion", "sts-scatter", "sts-residuals")}  # fmt: skip
    assert {path.stem for path in out.glob("*.png")} == {*wanted, "sst-sst-confusion", "scores"}
    tables = {path.stem for path in out.glob("*.csv")}
    assert {"runs", "scores", "sts-errors", "para-rates", "yin-curves"} <= tables
    assert [title for title in ("Runs", "Learning curves", "Left out") if title not in page.text] == []
    assert "sst: no learning curves, which need two epochs" in said and "Not read" not in page.text
    rows = list(csv.DictReader((out / "sts-errors.csv").open()))
    assert [(row["run"], row["predictions"]) for row in rows] == [
        (run, kind) for run in ("cross", "yin") for kind in ("as they are", "after the best line")
    ]
    own = outcome(run_of(runs / "cross"), STS)
    assert float(rows[0]["MSE"]) == pytest.approx(mean_squared_error(own.labels, own.decided))
    assert float(rows[1]["R2"]) == pytest.approx(correlation(own.decided, own.labels) ** 2)


def damage(name: str, change: Callable[[str], str | None]) -> Callable[[Path], None]:
    """Rewrite a run's file, or delete it where `change` gives None."""

    def apply(run: Path) -> None:
        text = change((run / name).read_text())
        (run / name).unlink()
        if text is not None:
            (run / name).write_text(text)

    return apply


def other_first_label(text: str) -> str:
    """Predictions of a binary task with another label for the first example."""
    header, first, *others = text.splitlines(keepends=True)
    label = first.split(" , ")[1].strip()
    return "".join([header, first.replace(f" , {label} ", f" , {1 - int(label)} "), *others])


DAMAGES: dict[str, tuple[Callable[[Path], object], str, set[str]]] = {
    "truncated metrics": (
        damage("metrics.jsonl", lambda text: text[:-40]),
        "metrics.jsonl: line 2 is damaged; it and all after it are left out",
        {"curves"},
    ),
    "foreign metrics": (
        damage("metrics.jsonl", lambda text: '{"epoch": 1}\n' + text),
        "metrics.jsonl: line 1 is damaged; it and all after it are left out",
        {"curves"},
    ),
    "unfinished": (
        damage("scores.json", lambda text: None),
        ": is not finished (no scores.json); it counts in no comparison",
        {"sst-confusion", "para-confusion", "sts-scatter", "sts-residuals"},
    ),
    "broken scores": (
        damage("scores.json", lambda text: text[:50]),
        "scores.json: is damaged (",
        {"sst-confusion", "para-confusion", "sts-scatter", "sts-residuals"},
    ),
    "scores of another program": (
        damage("scores.json", lambda text: '{"dev": {"sst": 3, "score": 0.5}}'),
        "scores.json: is damaged (",
        {"sst-confusion", "para-confusion", "sts-scatter", "sts-residuals"},
    ),
    "scores nested without end": (
        damage("scores.json", lambda text: "[" * 100_000),
        "scores.json: is damaged (nested too deeply)",
        {"sst-confusion", "para-confusion", "sts-scatter", "sts-residuals"},
    ),
    "options nested without end": (
        damage("config.json", lambda text: "[" * 100_000),
        "config.json: cannot be read (nested too deeply)",
        {"sst-confusion", "para-confusion", "sts-scatter", "sts-residuals"},
    ),
    "metrics nested without end": (
        damage("metrics.jsonl", lambda text: "[" * 100_000),
        "metrics.jsonl: line 1 is damaged",
        {"curves"},
    ),
    "broken options": (
        damage("config.json", lambda text: text.replace('"seed"', '"sead"')),
        "config.json: cannot be read (",
        {"sst-confusion", "para-confusion", "sts-scatter", "sts-residuals"},  # nobody says where the dev files are
    ),
    "figures that are none": (
        damage("metrics.jsonl", lambda text: re.sub(r'"train": \{', '"train": null, "was": {', text, count=1)),
        "metrics.jsonl: line 1 is damaged",
        {"curves"},
    ),
    "words for a loss": (
        damage("metrics.jsonl", lambda text: re.sub(r'"loss": [\d.]+', '"loss": "low"', text, count=1)),
        "metrics.jsonl: line 1 is damaged",
        {"curves"},
    ),
    "a number for a task": (
        damage("metrics.jsonl", lambda text: re.sub(r'"dev": \{"sst": \{.*?\}', '"dev": {"sst": 3', text, count=1)),
        "metrics.jsonl: line 1 is damaged",
        {"curves"},
    ),
    "no seconds": (
        damage(
            "timing.jsonl",
            lambda text: re.sub(r'"train_seconds": \{"sst": [\d.]+', '"train_seconds": {"sst": null', text),
        ),
        "timing.jsonl: line 1 is damaged",
        set(),
    ),
    "a device without name": (
        damage("timing.jsonl", lambda text: re.sub(r'"device": ".*?"', '"device": {}', text)),
        "timing.jsonl: line 1 is damaged",
        set(),
    ),
    "an epoch that is none": (
        damage("scores.json", lambda text: re.sub(r'"epoch": \d+', '"epoch": []', text)),
        "scores.json: is damaged (",
        {"sst-confusion", "para-confusion", "sts-scatter", "sts-residuals"},
    ),
    "unknown task": (
        damage("config.json", lambda text: text.replace('"sst": {', '"headlines": {')),
        "config.json: cannot be read (task headlines is unknown here)",
        {"sst-confusion", "para-confusion", "sts-scatter", "sts-residuals"},
    ),
    "broken predictions": (
        damage("predictions/sst-dev-output.csv", lambda text: text[:100]),
        "sst-dev-output.csv: is damaged",
        {"sst-confusion"},
    ),
    "missing predictions": (
        damage("predictions/sts-dev-output.csv", lambda text: None),
        ": no predictions of STS similarity, since sts-dev-output.csv is missing",
        {"sts-scatter", "sts-residuals"},
    ),
    "predictions of fewer rows": (
        damage("predictions/sts-dev-output.csv", lambda text: "\n".join(text.splitlines()[:-1])),
        "is not the dev file of STS similarity that it predicted; name it with --data_dir",
        {"sts-scatter", "sts-residuals"},
    ),
    "predictions of another run": (
        damage("predictions/para-dev-output.csv", other_first_label),
        "has accuracy",
        {"para-confusion"},
    ),
    "broken checkpoint": (
        lambda run: (run / "best.pt").write_bytes(b"PK half a file"),
        "best.pt: not a readable checkpoint",
        set(),
    ),
}


@pytest.fixture(scope="module")
def damaged(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The report on a run damaged in every way, a copy for each, and on one that is whole; and what was printed."""
    folder, out = tmp_path_factory.mktemp("damaged"), tmp_path_factory.mktemp("out")
    for what, (apply, _, _) in DAMAGES.items():
        apply(shutil.copytree(runs / "yin", folder / what.replace(" ", "-")))
    shutil.copytree(runs / "cross", folder / "cross")
    said = io.StringIO()
    with contextlib.chdir(out), contextlib.redirect_stdout(said):
        report.main([str(folder), "--out", str(out)])
    return out, said.getvalue().splitlines()


KINDS = {"curves", "sst-confusion", "para-confusion", "sts-scatter", "sts-residuals"}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_run_that_is_not_whole_is_said_so(damaged: tuple[Path, list[str]], what: str) -> None:
    out, lines = damaged
    _, message, lost = DAMAGES[what]
    name = what.replace(" ", "-")
    assert sum(message in line and name in line for line in lines) == 1, lines
    assert {path.stem.removeprefix(f"{name}-") for path in out.glob(f"{name}-*.png")} == KINDS - lost


def test_the_rest_is_reported(damaged: tuple[Path, list[str]]) -> None:
    out, lines = damaged
    assert {path.stem.removeprefix("cross-") for path in out.glob("cross-*.png")} == KINDS
    page = page_of(out)
    assert all(line in page.text for line in lines[:-2])
    finished = {"cross", *(what.replace(" ", "-") for what in DAMAGES)} - {
        "unfinished", "broken-scores", "scores-of-another-program", "scores-nested-without-end",
        "an-epoch-that-is-none"}  # fmt: skip
    assert {row["run"] for row in csv.DictReader((out / "runs.csv").open())} == finished


def test_further_pre_training_has_losses_alone(tiny_flags: list[str], tmp_path: Path, capsys: Any) -> None:
    multitask_classifier.main([*tiny_flags, "--mlm", "--no_tensorboard", "--run_dir", str(tmp_path / "run")])
    said = say(capsys, tmp_path / "run", "--out", tmp_path / "out")
    assert "run: was pre-trained alone and has no scores; it counts in no comparison" in said
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"run-curves"}
    (axes,) = drawn(curves_piece(read_run(tmp_path / "run", "run", []))).axes
    assert len([line for line in axes.lines if line.get_linestyle() == "--"]) == 3


def test_folders_that_hold_no_run(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "exported" / "model.safetensors").touch()
    with pytest.raises(UserError, match="exported: holds neither a run directory nor a study's results.csv"):
        say(capsys, tmp_path / "exported", "--out", tmp_path / "out")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="nothing to report: .*begun: is not finished"):
        say(capsys, tmp_path / "begun", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_come_from_where_the_flags_say(copied: Path, small_data: Path, tmp_path: Path, capsys: Any) -> None:
    moved = shutil.copytree(small_data, tmp_path / "moved")
    config = copied / "yin" / "config.json"
    config.write_text(config.read_text().replace(str(small_data), "/nowhere"))
    out = tmp_path / "out"
    said = say(capsys, copied / "yin", "--out", out)
    assert said.count("/nowhere/ids-sst-dev.csv: there is no dev file of SST sentiment") == 1
    assert (
        said.count("no figures of predictions of SST sentiment, for want of labels") == 1
        and not (out / "yin-sst-confusion.png").exists()
    )
    say(capsys, copied / "yin", "--out", out, "--data_dir", moved)
    assert (out / "yin-sst-confusion.png").exists()
    (out / "yin-sst-confusion.png").unlink()
    (moved / "ids-sst-dev.csv").rename(moved / "other.csv")
    say(capsys, copied / "yin", "--out", out, "--data_dir", moved, "--sst_dev", moved / "other.csv")
    assert (out / "yin-sst-confusion.png").exists()


def test_each_dev_file_is_read_once(runs: Path) -> None:
    problems: list[str] = []
    own = dev_sets(problems)
    first = [own.of(run_of(runs / name).config, SST) for name in ("yin", "cross")]
    assert first[0] is first[1] is not None
    missing = DevSets(DataOptions(data_dir="/nowhere"), {"sst": TaskOptions()}, problems)
    assert missing.of(None, SST) is None and missing.of(None, SST) is None and len(problems) == 1


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/seed1", "b/seed1", "b/seed2", "study/results.csv")]
    assert list(short_names(paths).values()) == ["a/seed1", "b/seed1", "seed2", "study"]
    tables = [tmp_path / name for name in ("x/methods.csv", "x/costs.csv", "x/costs/results.csv", "y/lr=1.csv")]
    assert list(short_names(tables).values()) == ["methods", "costs.csv", "costs", "lr=1"]


def test_the_table_of_benchmark_is_a_study(tiny_flags: list[str], tmp_path: Path, capsys: Any) -> None:
    flags = [*tiny_flags, "--train_sst", "--no_tensorboard", "--no_test_predictions", "--epochs", "1"]
    for seed in (1, 2):
        more = ["--seed", seed, "--benchmark", tmp_path / "costs.csv", "--run_dir", tmp_path / f"seed{seed}"]
        multitask_classifier.main([str(word) for word in [*flags, *more]])
    say(capsys, tmp_path / "costs.csv", "--out", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "costs-seeds.csv").open()))
    assert [row["seeds"] for row in rows] == ["2"] and float(rows[0]["peak memory (GB)"]) > 0


def test_a_folder_named_twice_is_reported_once(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(runs / "yin")
    found = collect([runs, runs / "yin", tmp_path / "link"])
    assert sorted(run.name for run in found.runs) == ["cross", "sst", "yin"] and found.problems == []


def test_links_do_not_lead_in_circles(copied: Path) -> None:
    (copied / "again").symlink_to(copied)
    (copied / "best").symlink_to(copied / "yin")
    assert len(collect([copied]).runs) == 3


def test_an_ensemble_is_reported_by_its_predictions(runs: Path, small_data: Path, tmp_path: Path, capsys: Any) -> None:
    import ensemble

    folder, out = tmp_path / "ensemble", tmp_path / "out"
    members = [str(runs / name / "best.pt") for name in ("yin", "cross")]
    more = ["--data_dir", small_data, "--threads", 1, "--run_dir", folder, "--cache", tmp_path / "cache"]
    ensemble.main([str(word) for word in (*members, *more)])
    say(capsys, folder, "--out", out, "--data_dir", small_data)
    assert {path.stem for path in out.glob("*.png")} == {
        f"ensemble-{kind}" for kind in ("sst-confusion", "para-confusion", "sts-scatter", "sts-residuals")
    }
