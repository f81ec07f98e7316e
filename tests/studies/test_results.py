"""Rows of runs, as --benchmark writes them, and the table that many processes may write."""

import csv
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

import multitask_classifier
from studies.results import BENCHMARK_COLUMNS, COLUMNS, Table, figures
from utils.errors import UserError


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def benchmark(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of two runs, with and without adapters; its folder also has a run that was not measured."""
    folder = tmp_path_factory.mktemp("benchmark")
    base = [*tiny_flags, "--no_tensorboard", "--train_sst", "--train_sts", "--routine", "interleave"]
    measured = [*base, "--benchmark", str(folder / "tables" / "runs.csv")]
    multitask_classifier.main([*measured, "--run_dir", str(folder / "plain")])
    lora = ["--lora_mode", "attn-only", "--lora_rank", "2", "--dora", "--seed", "5"]
    multitask_classifier.main([*measured, "--run_dir", str(folder / "dora"), *lora])
    multitask_classifier.main([*base, "--run_dir", str(folder / "unmeasured")])
    return folder


def test_a_run_adds_its_row(benchmark: Path) -> None:
    plain, dora = read_csv(benchmark / "tables" / "runs.csv")
    assert tuple(plain) == tuple(dora) == BENCHMARK_COLUMNS
    settings = [plain[name] for name in ("trial", "status", "amp", "lora_mode", "dora", "fine_tune_mode", "epochs")]
    assert settings == ["plain", "ok", "0", "none", "0", "iterative", "2"]
    assert [dora[name] for name in ("lora_rank", "lora_mode", "dora", "batch_size", "seed")] == [
        "2", "attn-only", "1", "8", "5",
    ]  # fmt: skip
    scores = json.loads((benchmark / "dora" / "scores.json").read_text())["dev"]
    assert float(dora["score"]) == scores["score"] and float(dora["sst_accuracy"]) == scores["sst"]["accuracy"]
    assert float(dora["sst_f1"]) == scores["sst"]["f1"] and float(dora["sts_spearman"]) == scores["sts"]["spearman"]
    assert int(dora["checkpoint_bytes"]) == (benchmark / "dora" / "best.pt").stat().st_size
    assert int(dora["trainable_parameters"]) < int(plain["trainable_parameters"])
    assert dora["device"].startswith("cpu (") and plain["para_accuracy"] == plain["cause"] == ""


def test_figures_are_means_over_epochs(benchmark: Path) -> None:
    row = read_csv(benchmark / "tables" / "runs.csv")[0]
    timing = read_jsonl(benchmark / "plain" / "timing.jsonl")
    assert len(timing) == 2
    steps = sum(line["seconds_without_evaluation"] for line in timing) / 60
    assert float(row["minutes_without_evaluation"]) == pytest.approx(steps, abs=1e-3) and row["gpu_utilization"] == ""
    assert float(row["minutes"]) == pytest.approx(sum(line["seconds"] for line in timing) / 60, abs=1e-3)
    for task in ("sst", "sts"):
        seconds = [line["train_seconds"][task] for line in timing]
        peaks = [line["train_peak_memory_bytes"][task] for line in timing]
        assert float(row[f"{task}_seconds_per_epoch"]) == pytest.approx(sum(seconds) / 2, abs=1e-3)
        assert float(row[f"{task}_peak_memory_bytes"]) == pytest.approx(sum(peaks) / 2, abs=1)
        assert min(peaks) > 50e6 and max(peaks) <= int(row["peak_memory_bytes"])


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_a_line_that_a_kill_cut_short_is_left_out(benchmark: Path, tmp_path: Path, name: str) -> None:
    run = shutil.copytree(benchmark / "plain", tmp_path / "run")
    whole = figures(run)
    line = (run / name).read_text().splitlines()[-1]
    with (run / name).open("a") as file:
        file.write(line[:100])
    assert len(whole) > 10 and figures(run) == whole


def test_measuring_changes_no_figure_that_the_seed_decides(benchmark: Path) -> None:
    measured, other = ((benchmark / name / "metrics.jsonl").read_text() for name in ("plain", "unmeasured"))
    assert measured == other
    for line in read_jsonl(benchmark / "unmeasured" / "timing.jsonl"):
        assert "train_peak_memory_bytes" not in line and set(line["tokens"]) == {"sst", "sts"}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--benchmark b.csv --evaluate best.pt", "--benchmark would change nothing"),
        ("--profile --evaluate best.pt", "--profile would change nothing"),
        ("--profile --benchmark b.csv", "--profile slows .*the steps that --benchmark measures"),
        ("--benchmark file/b.csv", "--benchmark file: cannot be written"),
        ("--benchmark file", "file: is the table of another grid or program"),
    ],
)
def test_mistakes_are_told_before_training(
    words: str, wanted: str, tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("some,other\ntable,here\n")
    with pytest.raises(UserError, match=wanted):
        multitask_classifier.main([*tiny_flags, "--run_dir", "run", *words.split()])
    assert not Path("run").exists() and Path("file").read_text() == "some,other\ntable,here\n"


def add_rows(path: Path, number: int) -> None:
    """Add rows of one process and one that all processes add."""
    table = Table(path, ["trial", "lr", "cause"])
    for i in range(10):
        row = {"trial": f"{number}-{i}", "lr": i, "cause": 'a "quoted", cause'}
        table.add([row, {"trial": "same"}], key="trial")


def test_processes_add_rows_at_once(tmp_path: Path) -> None:
    context, path = multiprocessing.get_context("fork"), tmp_path / "results.csv"
    writers = [context.Process(target=add_rows, args=(path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert all(None not in row.values() for row in read_csv(path))  # never half a file
    assert [writer.exitcode for writer in writers] == [0] * 4
    rows = {row["trial"]: row for row in read_csv(path)}
    assert len(read_csv(path)) == len(rows) == 41
    assert set(rows) == {f"{n}-{i}" for n in range(4) for i in range(10)} | {"same"}
    assert rows["3-7"]["lr"] == "7" and rows["3-7"]["cause"] == 'a "quoted", cause'


def test_without_a_key_the_same_row_may_be_there_twice(tmp_path: Path) -> None:
    table = Table(tmp_path / "runs.csv", ["trial", "lr"])
    for _ in range(2):
        table.add([{"trial": "a", "lr": 1e-4}])
    assert (tmp_path / "runs.csv").read_text() == "trial,lr\na,0.0001\na,0.0001\n"


def test_a_table_that_is_older_than_a_task_goes_on(tmp_path: Path) -> None:
    older = [name for name in COLUMNS if not name.startswith("cfimdb_")]
    assert len(older) == len(COLUMNS) - 4
    path = tmp_path / "results.csv"
    path.write_text(",".join(["trial", "lr", *older]) + "\na,1,0.5" + "," * (len(older) - 1) + "\n")
    Table(path, ["trial", "lr", *COLUMNS]).add([{"trial": "b", "lr": "2", "cfimdb_accuracy": 0.75}])
    old, new = read_csv(path)
    assert (old["score"], old["cfimdb_accuracy"]) == ("0.5", "") and new["cfimdb_accuracy"] == "0.75"
    with pytest.raises(UserError, match="is the table of another grid"):
        Table(path, ["trial", "dora", *COLUMNS]).rows()


@pytest.mark.parametrize(("torn", "kept"), [("b", ""), ('b,"x', ""), ("b,1,", ""), ("b,1,,2", "b,1,,2\n")])
def test_a_last_line_is_kept_if_it_is_whole(torn: str, kept: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("trial,lr,cause,seed\na,1,,3\n" + torn)
    Table(path, ["trial", "lr", "cause", "seed"]).add([{"trial": "c", "seed": 4}])
    assert path.read_text() == f"trial,lr,cause,seed\na,1,,3\n{kept}c,,,4\n"
