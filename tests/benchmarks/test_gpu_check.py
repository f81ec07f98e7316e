"""The parts of the check on a GPU: limits, results at once, and the lines that are printed."""

import time
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import PARTS, Size, describe_steps, run_parts, write_json


def hang(size: Size, path: Path) -> None:
    print("first result")
    write_json(path, {"seconds": [1.5]})
    time.sleep(600)


def fail(size: Size, path: Path) -> None:
    raise RuntimeError("no such kernel")


def work(size: Size, path: Path) -> None:
    print(f"{size.block} steps")


def test_it_can_be_run_twice_in_a_quarter_of_an_hour() -> None:
    assert sum(limit for limit, _ in PARTS.values()) <= 240


def test_a_part_that_hangs_or_fails_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "PARTS", {"hang": (4, hang), "fail": (60, fail), "work": (60, work)})
    assert not run_parts(["hang", "fail", "work"], Size(), tmp_path)
    printed = capfd.readouterr().out
    assert "hang: took too long" in printed and "first result" in printed
    assert (tmp_path / "hang.json").read_text() == '{\n  "seconds": [\n    1.5\n  ]\n}\n'
    assert "fail: exit code 1" in printed and "no such kernel" in printed
    assert "work: ok" in printed and "10 steps" in printed
    assert run_parts(["work"], Size(), tmp_path)


def test_steps_are_shown_beside_both_peers() -> None:
    seconds = {
        "transformers": [0.06] * 3,
        "transformers, varlen": [0.02] * 3,
        "eager": [0.012] * 3,
        "graphs": [0.01] * 3,
    }
    record = {"batch_size": 64, "seconds": seconds, "attention": 0.0625, "errors": {}}
    lines = describe_steps(record).splitlines()
    assert lines[4].split() == ["eager", "12.00", "5.00", "1.67"]
    assert lines[6:] == [
        "attention takes 6% of the GPU's time in an eager step",
        "met     times transformers at batch 64: 6.00, at least 5",
    ]
    record |= {"batch_size": 256, "attention": None, "flops": 2e12, "peak": {"square_peak": 1e15}}
    assert describe_steps(record).splitlines()[6:] == [
        "met     times transformers at batch 256: 6.00, at least 2.5",
        "MISSED  share of the device's peak at batch 256: 0.200, at least 0.35",
    ]
    del seconds["transformers"], seconds["eager"], seconds["graphs"]
    assert len(describe_steps(record).splitlines()) == 3
