"""sweep.py: studies of real training runs, the studies of recipes/, and mistakes on the command line."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from optuna.trial import TrialState, create_trial

import sweep
from cli.parser import expand_arguments, parse
from studies.results import COLUMNS
from studies.shared_study import SharedStudy
from studies.trials import Trial, grid_name, plan_grid
from tasks import TASKS
from utils.console import run_script
from utils.errors import UserError

HUGE = "10000000000000"  # a rank whose matrices no machine can hold
GOOD, REFUSED = "lora_mode=attn-only,lora_rank=2", "lora_mode=none,lora_rank=2"
TOO_BIG = f"lora_mode=attn-only,lora_rank={HUGE}"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A sweep listens to SIGTERM; pytest does not want to."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


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


# ----------------------------------------------------------------------------------------------------- a study's rows


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
    assert float(row["score"]) == dev["score"] and float(row["score_raw_r"]) == dev["score_raw_r"]
    assert float(row["sst_accuracy"]) == dev["sst"]["accuracy"]
    assert float(row["sts_pearson"]) == dev["sts"]["pearson"]
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
    with pytest.raises(UserError, match=f"--out {study}: there {REFUSED} is the run of .*repeat the flags"):
        sweep.main(study_words(study, [*flags, "--lr", "1"]))
    with pytest.raises(UserError, match=r"results.csv: is the table of another grid or program; choose another"):
        sweep.main(["--out", str(study), *flags, "--grid", "lora_rank=1"])


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


# ------------------------------------------------------------------------------------------------- studies of recipes/

STUDIES = ROOT / "recipes" / "studies"


def read_study(name: str) -> list[Trial]:
    """The trials of a file of recipes/studies, as sweep.main makes them."""
    return list(sweep.read_command([f"@recipes/studies/{name}.args"])[1].trials.values())


def configurations(trials: list[Trial]) -> set[str]:
    return {json.dumps(trial.config.to_dict()) for trial in trials if trial.config is not None}


@pytest.mark.parametrize(
    ("name", "count"),
    [("lora-ranks", 26), ("r0-grid", 416), ("r0-ranks", 64), ("r0-ablation", 12), ("r0-final", 9), ("methods", 12)],
)
def test_studies_have_their_trials_and_say_how_to_run_and_draw_them(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(ROOT)
    sweep.main([f"@recipes/studies/{name}.args", "--dry_run"])
    *listed, last = capsys.readouterr().out.splitlines()
    assert last == f"{count} trials, 0 refused" and len(set(listed)) == count
    head = (STUDIES / f"{name}.args").read_text(encoding="utf-8").splitlines()[:3]
    assert f"{count} trials" in head[0]
    assert f"python sweep.py @recipes/studies/{name}.args --data_dir data" in head[1]
    if name != "methods":
        assert f"python report.py runs/{name}/results.csv --out runs/{name}/report" in head[2]


def test_r0s_grid_has_960_combinations_of_which_416_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """R0 M.1: the checks refuse 160; R0 also leaves out adapters beside --fine_tune_mode last-layer, 384."""
    monkeypatch.chdir(ROOT)
    grid = [
        "lr=1e-4,5e-5,1e-5,5e-6", "batch_size=64,128,256,384", "lora_rank=1,5,10", "dora=0,1",
        "lora_mode=none,all-lin,attn,all-lin-only,attn-only", "fine_tune_mode=full-model,last-layer",
    ]  # fmt: skip
    base = expand_arguments([f"@{STUDIES / 'r0-base.args'}", "--amp", "--epochs", "3"])
    trials = list(plan_grid([grid], base).trials.values())
    refused = [trial for trial in trials if trial.config is None]
    assert len(trials) == 960 and len(refused) == 160 and all("needs adapters" in trial.refusal for trial in refused)
    left = [
        trial
        for trial in trials
        if trial.flags["fine_tune_mode"] == "full-model" or trial.flags["lora_mode"] == "none"
        if trial.config is not None
    ]
    assert len(left) == 416 and configurations(read_study("r0-grid")) == configurations(left)


def test_r0s_final_study_is_steady_hand_with_and_without_its_efficiency_methods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Table 7; its baseline with AMP is the recipe of I.4 with another seed."""
    monkeypatch.chdir(ROOT)
    steady = expand_arguments(["@recipes/g6-yin-yang-steady-hand.args"])
    kinds: dict[tuple[str, bool, bool], set[int]] = {}
    for trial in read_study("r0-final"):
        assert trial.config is not None
        lora, compute, seed = trial.config.lora, trial.config.compute, trial.config.train.seed
        kinds.setdefault((lora.lora_mode, lora.dora, compute.amp), set()).add(seed)
        if lora.lora_mode == "none":
            words = [*steady, "--no_amp", f"--seed={seed}", "--no_tensorboard"]
            same = parse(words, TASKS, "multitask_classifier.py", "").to_dict()
            assert {**trial.config.to_dict(), "run": 0} == {**same, "run": 0}
    seeds = {11711, 11712, 11713}
    assert kinds == dict.fromkeys([("none", False, False), ("all-lin", False, True), ("all-lin", True, True)], seeds)


# ------------------------------------------------------------------------------------------------------------ mistakes


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
        ("", "--grid: name flags and their values"),
        ("--grid lr=", "--grid lr=: has no values"),
        ("--grid lr", "--grid lr: has no values"),
        ("--grid =1", "has no flag --;"),
        ("--grid lr=1e-4,fast", "argument --lr: 'fast' is not a number"),
        ("--grid lora_mode=attn,every", "argument --lora_mode: invalid choice: 'every'"),
        ("--grid dora=0,2", "--grid dora=2: is a switch; write it as dora=0,1"),
        ("--grid no_dora=0", "--grid no_dora=0: is a switch; write it as dora=0,1"),
        ("--grid lr=1e-4 lr=1e-3", "--grid lr=1e-3: lr is there twice"),
        ("--grid lr=1e-4 --resume", "--resume: a sweep gives each trial its own; leave it out"),
        ("--grid run_dir=a,b", "--run_dir: a sweep gives each trial its own; leave it out"),
        ("--grid lr=1e-4 --jobs 0", "argument --jobs: 0 is too small"),
        ("--grid lr=1e-4 --out setup.cfg/x", "--out setup.cfg/x: cannot be written"),
        ("--search 3", "--search goes with --range and without --grid"),
        ("--search 3 --range lr=1..2 --grid seed=1", "--search goes with --range and without --grid"),
        ("--range lr=1..2 --grid seed=1", "--search goes with --range and without --grid"),
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


def test_a_mistake_as_a_process(tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "sweep.py", "--out", "study", "--grid", "lora_rang=1,2"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: --grid lora_rang=1: ") and done.stderr.count("\n") == 1


def test_a_study_needs_a_folder() -> None:
    with pytest.raises(UserError, match="--out: name the folder of the study"):
        sweep.main(["--grid", "lr=1e-4"])


def test_a_table_that_is_none_is_not_overwritten(flags: list[str], tmp_path: Path) -> None:
    for content in (b"some,other\ntable,here\n", b"\xff\xfe\x00\x01"):
        (tmp_path / "results.csv").write_bytes(content)
        with pytest.raises(UserError, match=r"results.csv: .*choose another file"):
            sweep.main(["--out", str(tmp_path), *flags, "--grid", "lr=1e-4"])
        assert (tmp_path / "results.csv").read_bytes() == content
