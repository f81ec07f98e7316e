"""The script: its table, its file of results, and its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from helpers import benchmark_options

import benchmark
from benchmarks.workloads import make_workload
from utils.errors import UserError

ROOT = Path(benchmark.__file__).resolve().parent


def test_the_script(tiny_bert: Path, small_data: Path, tmp_path: Path) -> None:
    flags = [
        "--comparisons",
        "full-model",
        "--tasks",
        "para",
        "--modes",
        "train,eval",
        "--steps",
        "2",
        "--warmup",
        "1",
        "--threads",
        "1",
    ]
    flags += ["--batch_size", "8", "--pretrained", tiny_bert, "--data_dir", small_data, "--out", tmp_path / "results"]
    done = subprocess.run([sys.executable, ROOT / "benchmark.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").iterdir()
    content = json.loads(path.read_text())
    assert content["config"]["batch_size"] == 8 and content["config"]["tasks"] == ["para"]
    assert content["versions"]["transformers"] == transformers.__version__
    assert content["device"].startswith("cpu") and "git_commit" in content
    train, evaluation = content["results"]
    assert (train["mode"], evaluation["mode"]) == ("train", "eval")
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("full-model  para")]
    for record, shown in zip((train, evaluation), lines, strict=True):
        assert record["max_difference"] <= 1e-4 and record["matmul_peak"] > 0
        assert list(record["seconds"]) == ["transformers", "minbert"]
        assert all(len(times) == 2 and min(times) > 0 for times in record["seconds"].values())
        for peaks in record["memory"].values():
            assert 50e6 < peaks["built"] <= peaks["eval"] <= peaks["train"]
        peer, ours = (np.array(times) for times in record["seconds"].values())
        assert shown[2] == record["mode"] and float(shown[5]) == pytest.approx(np.median(peer / ours), abs=0.006)
    assert train["batches"] == 1 and train["examples"] == [8, 8]
    assert evaluation["batches"] == 2 and evaluation["examples"] == [12, 12]
    work = make_workload(benchmark_options(tiny_bert, small_data), "para", print)
    assert train["tokens"] == [work.train.batch(indices).num_tokens for indices in work.batches[1:]]
    assert evaluation["tokens"] == [work.dev.lengths.sum()] * 2
    assert str(path) in done.stdout


def test_a_mode_without_a_peer_needs_no_transformers_and_no_data(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    flags = ["--modes", "frozen", "--tasks", "sst", "--batch_size", "2", "--data_dir", "made", "--threads", "1"]
    benchmark.main([*flags, "--pretrained", str(tiny_bert), "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert [record["mode"] for record in content["results"]] == ["frozen"]
    assert content["config"]["data_dir"] == "made" and "transformers" not in content["versions"]
    assert "frozen sst, an epoch of 60 steps of 2 examples: " in capsys.readouterr().out


def test_an_output_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/results: cannot be written"):
        benchmark.main(["--out", str(tmp_path / "file" / "results")])


def test_ranks_that_are_no_numbers() -> None:
    with pytest.raises(UserError, match=r"--ranks 1,0: give numbers of processes, such as 1,2"):
        benchmark.main(["--ranks", "1,0"])


def test_mistakes_and_help_need_no_torch() -> None:
    program = (
        "import sys, benchmark\n"
        "try: benchmark.main(sys.argv[1:])\n"
        "except SystemExit as end: sys.exit(3 if 'torch' in sys.modules else end.code)"
    )
    for flag, code in (("--help", 0), ("--nothing", 2)):
        done = subprocess.run([sys.executable, "-c", program, flag], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
