"""What a step and an epoch cost and give: timers, tokens, meters, and the trace and tables of --profile."""

import gzip
import json
import re
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import make_trainer

import multitask_classifier
from cli.parser import parse
from datasets import load_splits, tokenise
from models.checkpoint import load_model
from tasks import SST, TASKS
from training.distributed import DistributedContext
from training.logger import epoch_table
from training.meters import BatchResult, StepTimer, SyncedStepTimer, TaskMeter
from utils.device import Device

CPU = torch.device("cpu")


class Late(Device):
    """A device that needs a twentieth of a second to catch up."""

    def synchronize(self) -> None:
        time.sleep(0.05)


def test_a_measured_step_ends_when_the_device_has_done_it() -> None:
    plain, synced = StepTimer(Late(CPU)), SyncedStepTimer(Late(CPU))
    plain.start()
    assert plain.stop()[0] < 0.05
    synced.start()
    assert 0.05 <= synced.stop()[0] < 1.0


def test_each_measured_step_has_its_own_peak_of_memory() -> None:
    timer, peaks = SyncedStepTimer(Device(CPU)), []
    for size in (1, 300, 1):
        timer.start()
        torch.ones(size, 250_000)  # a million bytes for each
        peaks.append(timer.stop()[1])
    assert peaks[1] - peaks[0] > 280e6 and peaks[1] - peaks[2] > 280e6


class Busy(Device):
    """A device that is at work in more and more of the time."""

    def utilization(self) -> int:
        Busy.samples.append(10 * len(Busy.samples) + 10)
        return Busy.samples[-1]

    samples: ClassVar[list[int]] = []


def test_an_epoch_has_the_mean_utilization_and_peak_memory_of_the_busiest_rank(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the seconds with and without evaluation."""
    Busy.samples.clear()
    trainer = make_trainer(tiny_flags, tmp_path / "run", device=Busy(CPU))
    monkeypatch.setattr(DistributedContext, "all_reduce_max", lambda self, *numbers: [2 * n for n in numbers])
    records = [trainer.train_epoch(), trainer.train_epoch()]
    assert Busy.samples == [10, 20]  # one for each epoch of less than --log_every steps
    lines = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    assert [line["gpu_utilization"] for line in lines] == [2 * 10, 2 * 20]
    for line, record in zip(lines, records, strict=True):
        assert line["peak_memory_bytes"] == record.peak_memory > 1.9 * Device(CPU).peak_memory()
        assert line["seconds_without_evaluation"] == pytest.approx(sum(line["train_seconds"].values()), abs=2e-3)
        assert line["seconds_without_evaluation"] < line["seconds"]
        assert "GPU at work" in epoch_table(trainer.model.tasks, record, 2)


def test_without_a_gpu_or_its_package_nothing_is_known_of_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert Device(CPU).utilization() is None and Device(torch.device("cuda", 0)).utilization() is None
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 54)
    assert Device(CPU).utilization() is None and Device(torch.device("cuda", 0)).utilization() == 54


def test_the_loss_of_an_epoch_is_the_mean_over_its_examples() -> None:
    meter = TaskMeter(scored=True)
    for number, (loss, size) in enumerate([(1.0, 8), (4.0, 2)]):
        labels = torch.zeros(size, dtype=torch.int64)
        result = BatchResult(torch.tensor(loss), torch.zeros(size, 5), labels)
        meter.add(number, result, size, 1e-3, 0.5, 100 - number)
    again = TaskMeter.from_state(meter.state_dict(), True, torch.device("cpu"))
    for found in (meter.epoch_figures(SST), again.epoch_figures(SST)):
        assert (found.steps, found.examples, found.loss, found.seconds, found.peak_memory) == (2, 10, 1.6, 1.0, 100)
        assert found.train["accuracy"] == 1


def test_tokens_are_those_that_the_batches_hold(tiny_flags: list[str], tmp_path: Path) -> None:
    words = [*tiny_flags, "--train_sst", "--train_sts", "--num_sts_trains", "2", "--no_tensorboard"]
    multitask_classifier.main([*words, "--run_dir", str(tmp_path / "run")])
    config = parse(words, TASKS, "test", "Test.")
    model, tokenizer, _ = load_model(tmp_path / "run" / "best.pt")
    tasks = {name: TASKS[name] for name in config.tasks}
    splits = load_splits(config.data, config.tasks, tasks, ["train"], print)
    data = tokenise(splits, tokenizer, model.pair_encodings(), False, print)
    counts = {name: int(data["train"][name].lengths.sum()) for name in config.tasks}
    counts["sts"] *= 2
    lines = (tmp_path / "run" / "timing.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [counts] * 2


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
