"""sweep.py: a study of real training runs, and mistakes on the command line."""

import csv
import json
import os
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import refusal
from optuna.trial import TrialState, create_trial

import sweep
from studies.results import COLUMNS
from studies.shared_study import SharedStudy
from studies.trials import grid_name
from utils.console import run_script

HUGE = "10000000000000"  # a rank whose matrices no machine can hold
GOOD, REFUSED = "lora_mode=attn-only,lora_rank=2", "lora_mode=none,lora_rank=2"
TOO_BIG = f"lora_mode=attn-only,lora_rank={HUGE}"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A sweep listens to signals; pytest does not want to."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def read_table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def flags(tiny_flags: list[str]) -> list[str]:
    """A trial of a second on two of the tasks, on one shared backbone."""
    arch = ["--backbones", "shared", "--pair_layer", "none", "--clf", "linear", "--fine_tune_mode", "full-model"]
    return [*tiny_flags, "--train_sst", "--train_sts", "--no_tensorboard", *arch]


def study_words(folder: Path, flags: list[str]) -> list[str]:
    words = ["--out", str(folder), "--jobs", "2", *flags, "--grid", "lora_mode=none,attn-only", "lora_rank=2"]
    return [*words, "--grid", "lora-mode=attn-only", f"lora-rank={HUGE}", "--grid", f"sts_dev={folder}/missing.csv"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Path:
    """A study with a trial of each kind: one that ends well, is refused, is too large, and lacks its data."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.raises(SystemExit) as stop:
        sweep.main(study_words(folder, flags))
    assert stop.value.code == 1  # a trial has failed
    return folder


def row_of(study: Path, name: str) -> dict[str, str]:
    return next(row for row in read_table(study) if row["trial"] == name)


def test_every_trial_has_one_row(study: Path) -> None:
    failed = grid_name({"sts_dev": f"{study}/missing.csv"})
    rows = read_table(study)
    assert sorted(row["trial"] for row in rows) == sorted([GOOD, REFUSED, TOO_BIG, failed])
    assert list(rows[0]) == ["trial", "status", "lora_mode", "lora_rank", "sts_dev", *COLUMNS]
    assert {path.name for path in (study / "trials").iterdir()} == {GOOD, TOO_BIG, failed}
    assert list(study.rglob("scores.json")) and not list(study.rglob("*.pt"))


def test_a_row_holds_what_the_run_wrote(study: Path, flags: list[str]) -> None:
    row, folder = row_of(study, GOOD), study / "trials" / GOOD
    dev = json.loads((folder / "scores.json").read_text())["dev"]
    timing = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    assert (row["status"], row["cause"], row["lora_mode"], row["lora_rank"]) == ("ok", "", "attn-only", "2")
    scores = [float(row[name]) for name in ("score", "score_raw_r", "sst_accuracy", "sts_pearson")]
    assert scores == [dev["score"], dev["score_raw_r"], dev["sst"]["accuracy"], dev["sts"]["pearson"]]
    assert float(row["sst_seconds_per_epoch"]) > 0 and int(row["sst_peak_memory_bytes"]) > 50e6
    tokens = sum(sum(line["tokens"].values()) for line in timing)
    seconds = sum(sum(line["train_seconds"].values()) for line in timing)
    assert float(row["tokens_per_second"]) == pytest.approx(tokens / seconds, rel=1e-3) != 0
    # rank 2 beside three matrices of 32 x 32 in two layers; heads on u, and on u, v, |u-v|, u*v, cos
    assert int(row["trainable_parameters"]) == 2 * 3 * 2 * (32 + 32) + 5 * (32 + 1) + (4 * 32 + 1 + 1)
    assert 1000 < int(row["checkpoint_bytes"]) < 200_000
    assert row["para_accuracy"] == row["para_seconds_per_epoch"] == row["sts_dev"] == ""
    assert row["device"].startswith("cpu (") and row["device"].endswith(", 1 threads)")
    assert row["seed"] == "11711" and re.fullmatch(r"([0-9a-f]{40}\+?)?", row["commit"])
    assert not list(folder.glob("predictions/*test*")) and list(folder.glob("predictions/*dev*"))
    words = ["python", "multitask_classifier.py", *flags, "--lora_mode=attn-only", "--lora_rank=2"]
    assert shlex.split(row["command"]) == words


def test_what_did_not_end_well_is_a_row_with_its_cause(study: Path) -> None:
    refused, big = row_of(study, REFUSED), row_of(study, TOO_BIG)
    assert refused["status"] == "refused" and "--lora_rank needs adapters" in refused["cause"]
    assert big["status"] == "out of memory" and "allocate memory" in big["cause"] and big["score"] == ""
    failed = next(row for row in read_table(study) if row["status"] == "failed")
    assert failed["cause"].startswith("error: --sts_dev") and "missing.csv: there is no such file" in failed["cause"]
    assert failed["sts_dev"] == str(study / "missing.csv") and failed["score"] == ""
    assert [path.name for path in (study / "trials" / failed["trial"]).iterdir()] == ["log.txt"]


def test_a_finished_study_has_nothing_to_do(study: Path, flags: list[str], capsys: Any) -> None:
    before = (study / "results.csv").read_bytes()
    with pytest.raises(SystemExit):  # the failed row is still there
        sweep.main(study_words(study, flags))
    assert f"1 ok, 1 refused, 1 out of memory, 1 failed: {study / 'results.csv'}" in capsys.readouterr().out
    assert (study / "results.csv").read_bytes() == before


def test_other_flags_or_another_grid_are_refused(study: Path, flags: list[str]) -> None:
    line = refusal(sweep.main, study_words(study, [*flags, "--lr", "1"]))
    assert line.startswith(f"--out {study}: there {REFUSED} is the run of ") and line.endswith("another folder")
    line = refusal(sweep.main, ["--out", str(study), *flags, "--grid", "lora_rank=1"])
    assert "results.csv: is the table of another grid or program; choose another" in line


def test_a_trial_that_is_pruned_saves_its_state_and_ends(flags: list[str], tmp_path: Path) -> None:
    """Five trials of another sweep, perfect from the first epoch on, are in the storage."""
    best = dict.fromkeys(range(1, 501), 1.0)
    with_scores = create_trial(state=TrialState.COMPLETE, value=1.0, intermediate_values=best)
    for _ in range(5):
        SharedStudy(str(tmp_path / "journal"), "study", {}, tmp_path).study.add_trial(with_scores)
    out, words = tmp_path / "study", ["--storage", str(tmp_path / "journal"), "--epochs", "500", "--pruner", "median"]
    sweep.main(["--out", str(out), *flags, *words, "--grid", "seed=1"])
    (row,) = read_table(out)
    epochs = len((out / "trials" / "seed=1" / "metrics.jsonl").read_text().splitlines())
    assert row["status"] == "pruned" and 1 <= epochs < 500
    assert re.fullmatch(r"its best dev score up to epoch \d+ is below the median of the other trials", row["cause"])
    assert "SIGTERM: stopping after this step" in (out / "trials" / "seed=1" / "log.txt").read_text()
    assert not list(out.rglob("*.pt"))


def test_a_dry_run_lists_and_makes_nothing(tmp_path: Path, capsys: Any) -> None:
    grid = ["--grid", "lora_mode=none,attn", "lora_rank=1,5", "--run_dir", "of/a/recipe"]
    sweep.main(["--out", str(tmp_path / "study"), *grid, "--dry_run"])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "lora_mode=none,lora_rank=1"
    assert out[1].startswith("refused lora_mode=none,lora_rank=5: --lora_rank needs adapters")
    assert out[-1] == "3 trials, 1 refused" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--grid lora_rang=1,2", "--grid lora_rang=1: multitask_classifier.py has no flag --lora_rang"),
        ("--grid lr=1e-4 --learning_rate 3", "unrecognized arguments: --learning_rate 3"),
        ("--grid", "argument --grid: expected at least one argument"),
        ("", "--grid or --search: give "),
        ("--grid lr", "--grid lr: has no values"),
        ("--grid =1", "has no flag --;"),
        ("--grid lr=1e-4,fast", "argument --lr: 'fast' is not a number"),
        ("--grid dora=0,2", "--grid dora=2: is a switch; write it as dora=0,1"),
        ("--grid lr=1e-4 lr=1e-3", "--grid lr=1e-3: lr is there twice"),
        ("--grid lr=1e-4 --resume", "--resume: a sweep sets it for each trial; leave it out"),
        ("--grid run_dir=a,b", "--run_dir: a sweep sets it for each trial; leave it out"),
        ("--grid lr=1e-4 --jobs 0", "argument --jobs: 0 is too small"),
        ("--grid lr=1e-4 --out setup.cfg/x", "--out setup.cfg/x: cannot be written"),
        ("--search 3", "--grid or --search: give "),
        ("--search 3 --range lr=1..2 --grid seed=1", "--grid or --search: give "),
        ("--range lr=1..2 --grid seed=1", "--grid or --search: give "),
        ("--out= --grid seed=1", "--out: name the folder of the study"),
        ("--search 3 --range lr=2..1", "--range lr=2..1: "),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").write_text("")
    with pytest.raises(SystemExit) as stop:
        run_script(sweep.main, ["--out", "study", *words.split()])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert wanted in err
    assert os.listdir(tmp_path) == ["setup.cfg"]


def test_a_table_that_is_none_is_not_overwritten(flags: list[str], tmp_path: Path) -> None:
    for content in (b"some,other\ntable,here\n", b"\xff\xfe\x00\x01"):
        (tmp_path / "results.csv").write_bytes(content)
        line = refusal(sweep.main, ["--out", str(tmp_path), *flags, "--grid", "lr=1e-4"])
        assert (
            "results.csv: " in line
            and "choose another file" in line
            and (tmp_path / "results.csv").read_bytes() == content
        )
