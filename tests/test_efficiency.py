"""--benchmark and --profile: what a run costs, measured, in a table that many processes may write."""

import csv
import gzip
import json
import multiprocessing
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import make_trainer

import multitask_classifier
from studies.results import BENCHMARK_COLUMNS, COLUMNS, Table, figures
from text.packing import PackedBatch
from training.meters import StepClock, StepGauge
from utils.device import Device
from utils.errors import UserError

CPU = torch.device("cpu")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------- benchmark


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
    assert int(dora["checkpoint_bytes"]) == (benchmark / "dora" / "best.pt").stat().st_size
    assert int(dora["trainable_parameters"]) < int(plain["trainable_parameters"])
    assert dora["device"].startswith("cpu (") and plain["para_accuracy"] == plain["cause"] == ""


def test_figures_are_means_over_epochs(benchmark: Path) -> None:
    row = read_csv(benchmark / "tables" / "runs.csv")[0]
    timing = read_jsonl(benchmark / "plain" / "timing.jsonl")
    assert len(timing) == 2
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


def test_only_benchmark_measures_memory_by_task(benchmark: Path) -> None:
    for line in read_jsonl(benchmark / "unmeasured" / "timing.jsonl"):
        assert "train_peak_memory_bytes" not in line and set(line["tokens"]) == {"sst", "sts"}


def test_measuring_changes_no_figure_that_the_seed_decides(benchmark: Path) -> None:
    measured, other = ((benchmark / name / "metrics.jsonl").read_text() for name in ("plain", "unmeasured"))
    assert measured == other


def test_tokens_are_those_that_the_batches_hold(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--sst_fraction", 0.5, "--num_sts_trains", 2)
    counts = dict.fromkeys(trainer.tasks, 0)
    for step in trainer.steps_of(0):
        batch = trainer.train_data[step.task].batch(step.indices)
        assert isinstance(batch, PackedBatch)
        counts[step.task] += len(batch.input_ids)
    trainer.fit()
    timing = read_jsonl(tmp_path / "run" / "timing.jsonl")
    assert timing[0]["tokens"] == counts and timing[1]["tokens"]["sts"] == counts["sts"]


class Late(Device):
    """A device that needs a twentieth of a second to catch up."""

    def synchronize(self) -> None:
        time.sleep(0.05)


def test_a_measured_step_ends_when_the_device_has_done_it() -> None:
    clock, gauge = StepClock(Late(CPU)), StepGauge(Late(CPU))
    clock.start()
    assert clock.stop()[0] < 0.05
    gauge.start()
    assert 0.05 <= gauge.stop()[0] < 1.0


def test_each_measured_step_has_a_peak_of_its_own() -> None:
    gauge, peaks = StepGauge(Device(CPU)), []
    for size in (1, 300, 1):
        gauge.start()
        torch.ones(size, 250_000)  # a million bytes for each
        peaks.append(gauge.stop()[1])
    assert peaks[1] - peaks[0] > 280e6 and peaks[1] - peaks[2] > 280e6


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--benchmark b.csv --evaluate best.pt", "--benchmark would change nothing"),
        ("--profile --evaluate best.pt", "--profile would change nothing"),
        ("--profile --benchmark b.csv", "--profile slows the steps that --benchmark measures"),
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


# -------------------------------------------------------------------------------------------------------------- table


def add_rows(path: Path, number: int) -> None:
    """Rows of its own and one that all processes add."""
    table = Table(path, ["trial", "lr", "cause"])
    for i in range(20):
        own = {"trial": f"{number}-{i}", "lr": i, "cause": 'a "quoted", cause'}
        table.add([own, {"trial": "same"}], key="trial")


def test_processes_add_rows_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add_rows, args=(tmp_path / "results.csv", number)) for number in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / "results.csv").exists():
            assert all(None not in row.values() for row in read_csv(tmp_path / "results.csv"))  # never half a file
    assert [writer.exitcode for writer in writers] == [0] * 4
    rows = {row["trial"]: row for row in read_csv(tmp_path / "results.csv")}
    assert len(read_csv(tmp_path / "results.csv")) == len(rows) == 81
    assert set(rows) == {f"{n}-{i}" for n in range(4) for i in range(20)} | {"same"}
    assert rows["3-7"]["lr"] == "7" and rows["3-7"]["cause"] == 'a "quoted", cause'


def test_without_a_key_the_same_row_may_be_there_twice(tmp_path: Path) -> None:
    table = Table(tmp_path / "runs.csv", ["trial", "lr"])
    for _ in range(2):
        table.add([{"trial": "a", "lr": 1e-4}])
    assert (tmp_path / "runs.csv").read_text() == "trial,lr\na,0.0001\na,0.0001\n"


def test_a_table_that_is_older_than_a_task_goes_on(tmp_path: Path) -> None:
    older = [name for name in COLUMNS if not name.startswith("cfimdb_")]
    assert len(older) == len(COLUMNS) - 3
    path = tmp_path / "results.csv"
    path.write_text(",".join(["trial", "lr", *older]) + "\na,1,0.5" + "," * (len(older) - 1) + "\n")
    table = Table(path, ["trial", "lr", *COLUMNS])
    table.add([{"trial": "b", "lr": "2", "cfimdb_accuracy": 0.75}])
    old, new = read_csv(path)
    assert (old["score"], old["cfimdb_accuracy"]) == ("0.5", "") and new["cfimdb_accuracy"] == "0.75"
    with pytest.raises(UserError, match="is the table of another grid"):
        Table(path, ["trial", "dora", *COLUMNS]).rows()


@pytest.mark.parametrize("torn", ["b", 'b,"x', "b,1,"])
def test_a_line_cut_short_does_not_spoil_the_next_row(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("trial,lr,cause,seed\na,1,,3\n" + torn)
    Table(path, ["trial", "lr", "cause", "seed"]).add([{"trial": "c", "seed": 4}])
    assert path.read_text() == "trial,lr,cause,seed\na,1,,3\nc,,,4\n"


def test_a_last_line_without_its_end_is_kept_if_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("trial,lr\na,1")  # as some editors leave it
    Table(path, ["trial", "lr"]).add([{"trial": "b", "lr": 2}])
    assert path.read_text() == "trial,lr\na,1\nb,2\n"


# ------------------------------------------------------------------------------------------------------------ profile


def test_a_profile_is_a_trace_and_two_tables(tiny_flags: list[str], tmp_path: Path, capsys: Any) -> None:
    flags = [*tiny_flags, "--no_tensorboard"]
    multitask_classifier.main([*flags, "--run_dir", str(tmp_path / "without")])
    assert "perfetto" not in capsys.readouterr().out
    multitask_classifier.main([*flags, "--run_dir", str(tmp_path / "with"), "--profile"])
    out = capsys.readouterr().out
    trace = tmp_path / "with" / "profile.pt.trace.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert len({event["name"] for event in events if event["name"].startswith("ProfilerStep#")}) == 5
    assert any(event["name"] == "aten::addmm" for event in events)
    assert f"trace, for ui.perfetto.dev or TensorBoard: {trace}" in out
    times, memory = (part.splitlines()[2:10] for part in out.split("\n\n") if part.startswith(("time ", "memory ")))
    for row in [*times, *memory]:
        name = re.split("  +", row)[0]
        assert name in {event["name"] for event in events} or name == "Python and other code"
    shares = [float(row.split()[-1].removesuffix("%")) for row in times]
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.5
    assert all(row.endswith(" MB") for row in memory)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("with", "without")]
    assert metrics[0] == metrics[1]
    assert not (tmp_path / "without" / trace.name).exists()


def test_an_epoch_too_short_for_a_profile_is_told(tiny_flags: list[str], tmp_path: Path, capsys: Any) -> None:
    few = ["--train_sst", "--no_tensorboard", "--run_dir", str(tmp_path / "run"), "--epochs", "1"]
    multitask_classifier.main([*tiny_flags, *few, "--profile"])
    assert "--profile: an epoch of at least 4 steps is needed" in capsys.readouterr().out
