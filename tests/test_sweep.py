"""sweep.py: real trials in processes of their own, killed, failing and shared by sweeps; each has one row."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from processes import Child, kill_myself

import config
import multitask_classifier
import sweep
from cli.parser import expand_arguments
from sweep import make_trials, verdict
from tasks import TASKS
from training import distributed
from training.trainer import Trainer
from utils.console import run_script
from utils.errors import UserError

HUGE = "10000000000000"  # a rank whose matrices no machine can hold
ONE, TWO = "lora_mode=attn-only,lora_rank=1", "lora_mode=attn-only,lora_rank=2"
PLAIN, REFUSED = "lora_mode=none,lora_rank=1", "lora_mode=none,lora_rank=2"
TOO_BIG = f"lora_mode=attn-only,lora_rank={HUGE}"


def start(words: list[str], **more: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, ROOT / "sweep.py", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def wait_for(condition: Callable[[], Any], sweeping: "subprocess.Popen[str]") -> None:
    """Wait while a sweep runs; a sweep that ends before is a failure."""
    ends = time.monotonic() + 600
    while not condition():
        assert sweeping.poll() is None and time.monotonic() < ends, sweeping.communicate()
        time.sleep(0.02)


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def by_trial(folder: Path) -> dict[str, dict[str, str]]:
    rows = read_table(folder)
    assert len({row["trial"] for row in rows}) == len(rows)
    return {row["trial"]: row for row in rows}


@pytest.fixture(scope="module")
def flags(tiny_flags: list[str]) -> list[str]:
    """A trial of a second on two of the tasks, on one shared backbone."""
    arch = ["--backbones", "shared", "--pair_layer", "none", "--clf", "linear", "--fine_tune_mode", "full-model"]
    return [*tiny_flags, "--train_sst", "--train_sts", "--no_tensorboard", *arch]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Path:
    """A study with a trial of each kind: one that ends well, is refused, is too large, and lacks its data.

    In the folder of the last one stands a run of other flags.
    """
    folder = tmp_path_factory.mktemp("study")
    missing = folder / "trials" / sweep.Trial({"sts_dev": f"{folder}/missing.csv"}, [], None).name
    missing.mkdir(parents=True)
    (missing / "config.json").write_text(json.dumps({"train": {"lr": 7}}))
    (missing / "scores.json").write_text(json.dumps({"dev": {"score": 2.0, "score_raw_r": 2.0}}))
    (missing / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as stop:
        sweep.main(study_words(folder, flags))
    assert stop.value.code == 1  # a trial has failed
    return folder


def study_words(folder: Path, flags: list[str]) -> list[str]:
    words = ["--out", str(folder), "--jobs", "2", *flags, "--grid", "lora_mode=none,attn-only", "lora_rank=2"]
    return [*words, "--grid", "lora-mode=attn-only", f"lora-rank={HUGE}", "--grid", f"sts_dev={folder}/missing.csv"]


# ----------------------------------------------------------------------------------------------------- a study's rows


def test_every_trial_has_one_row(study: Path) -> None:
    rows = by_trial(study)
    failed = next(name for name, row in rows.items() if row["status"] == "failed")
    assert set(rows) == {TWO, REFUSED, TOO_BIG, failed} and failed.startswith("sts_dev=")
    assert rows[TWO]["status"] == "ok" and rows[TWO]["cause"] == ""
    assert {path.name for path in (study / "trials").iterdir()} == set(rows) - {REFUSED}


def test_a_row_holds_what_the_run_wrote(study: Path) -> None:
    row, folder = by_trial(study)[TWO], study / "trials" / TWO
    dev = json.loads((folder / "scores.json").read_text())["dev"]
    timing = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    assert float(row["score"]) == dev["score"] and float(row["score_raw_r"]) == dev["score_raw_r"]
    assert float(row["sst_accuracy"]) == dev["sst"]["accuracy"]
    assert float(row["sts_pearson"]) == dev["sts"]["pearson"]
    for task in ("sst", "sts"):
        seconds = [line["train_seconds"][task] for line in timing]
        assert float(row[f"{task}_seconds_per_epoch"]) == pytest.approx(sum(seconds) / 2, abs=1e-3) != 0
        peaks = [line["train_peak_memory_bytes"][task] for line in timing]
        assert int(row[f"{task}_peak_memory_bytes"]) == pytest.approx(sum(peaks) / 2, abs=1)
        assert min(peaks) > 50e6 and max(peaks) <= int(row["peak_memory_bytes"])
    tokens = sum(sum(line["tokens"].values()) for line in timing)
    seconds = sum(sum(line["train_seconds"].values()) for line in timing)
    assert float(row["tokens_per_second"]) == pytest.approx(tokens / seconds, rel=1e-3) != 0
    assert int(row["peak_memory_bytes"]) == max(line["peak_memory_bytes"] for line in timing) > 50e6
    # rank 2 beside three matrices of 32 x 32 in two layers; heads on u, and on u, v, |u-v|, u*v, cos
    assert int(row["trainable_parameters"]) == 2 * 3 * 2 * (32 + 32) + 5 * (32 + 1) + (4 * 32 + 1 + 1)
    assert 1000 < int(row["checkpoint_bytes"]) < 200_000
    assert row["para_accuracy"] == row["para_seconds_per_epoch"] == ""
    assert row["device"].startswith("cpu (") and row["device"].endswith(", 1 threads)")
    assert row["seed"] == "11711" and re.fullmatch(r"([0-9a-f]{40}\+?)?", row["commit"])
    assert not list(folder.glob("predictions/*test*")) and list(folder.glob("predictions/*dev*"))


def test_jobs_share_the_cores_that_the_process_may_use(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler may give a process a part of the machine's."""
    monkeypatch.setattr(distributed, "cores", lambda: 6)
    own = flags.index("--threads")
    sweep.main(["--out", str(tmp_path), "--jobs", "2", *flags[:own], *flags[own + 2 :], "--grid", "epochs=1"])
    assert read_table(tmp_path)[0]["device"].endswith(", 3 threads)")


def test_the_grids_flags_are_columns(study: Path) -> None:
    assert list(read_table(study)[0]) == ["trial", "status", "lora_mode", "lora_rank", "sts_dev", *sweep.COLUMNS]
    row = by_trial(study)[TWO]
    assert (row["lora_mode"], row["lora_rank"], row["sts_dev"]) == ("attn-only", "2", "")


def test_the_command_of_a_row_trains_it(study: Path, flags: list[str]) -> None:
    command = by_trial(study)[TWO]["command"]
    assert command.split()[:2] == ["python", "multitask_classifier.py"]
    assert command.split()[2:] == [*flags, "--lora_mode=attn-only", "--lora_rank=2"]


def test_refused_combinations_have_their_reason_and_are_not_run(study: Path) -> None:
    row = by_trial(study)[REFUSED]
    assert row["status"] == "refused" and "--lora_rank needs adapters" in row["cause"]
    assert not (study / "trials" / REFUSED).exists()


def test_out_of_memory_is_a_row_with_its_cause(study: Path) -> None:
    row = by_trial(study)[TOO_BIG]
    assert row["status"] == "out of memory" and "allocate memory" in row["cause"] and row["score"] == ""


def test_a_failure_is_a_row_with_its_cause(study: Path) -> None:
    row = next(row for row in read_table(study) if row["status"] == "failed")
    assert row["cause"].startswith("error: --sts_dev") and "missing.csv: there is no such file" in row["cause"]
    assert row["sts_dev"] == str(study / "missing.csv")
    assert row["score"] == ""
    assert [path.name for path in (study / "trials" / row["trial"]).iterdir()] == ["log.txt"]


def test_checkpoints_are_gone(study: Path) -> None:
    assert list(study.rglob("scores.json")) and not list(study.rglob("*.pt"))


def test_a_finished_study_has_nothing_to_do(study: Path, flags: list[str], capsys: Any) -> None:
    before = (study / "results.csv").read_bytes()
    with pytest.raises(SystemExit):  # the failed row still stands
        sweep.main(study_words(study, flags))
    assert f"1 ok, 1 refused, 1 out of memory, 1 failed: {study / 'results.csv'}" in capsys.readouterr().out
    assert (study / "results.csv").read_bytes() == before


# ------------------------------------------------------------------------------------------------- going on, or not


@pytest.mark.long
def test_a_killed_sweep_goes_on_as_two_at_once(tmp_path: Path, flags: list[str]) -> None:
    """Killed within its second trial, which then runs on by itself."""
    words = ["--out", str(tmp_path), *flags, "--grid", "lora_mode=none,attn-only", "lora_rank=1,2"]
    killed = start(words)
    wait_for((tmp_path / "trials" / ONE / "config.json").exists, killed)
    killed.kill()
    killed.communicate()
    before = by_trial(tmp_path)
    assert before[PLAIN]["status"] == "ok" and ONE not in before
    first = (tmp_path / "trials" / PLAIN / "scores.json").stat().st_mtime_ns
    sweeps = [start(words), start(words)]
    for own, (out, err) in [(own, own.communicate(timeout=120)) for own in sweeps]:
        assert own.returncode == 0, err
        assert f"3 ok, 1 refused: {tmp_path / 'results.csv'}" in out
    rows = by_trial(tmp_path)
    assert set(rows) == {PLAIN, REFUSED, ONE, TWO} and rows[PLAIN] == before[PLAIN]
    assert (tmp_path / "trials" / PLAIN / "scores.json").stat().st_mtime_ns == first
    for name in (PLAIN, ONE, TWO):
        log = (tmp_path / "trials" / name / "log.txt").read_text()
        assert log.count("Epoch 1/2") == 1 and log.count("best checkpoint") == 1
        assert rows[name]["status"] == "ok" and float(rows[name]["score"]) > 0


@pytest.mark.long
def test_a_sweep_killed_twice_has_each_trial_once(tmp_path: Path, tiny_bert: Path, sample: Path) -> None:
    """24 trials, one of them too large: killed with all its processes, then alone, then left in peace."""
    model = ["--pretrained", tiny_bert, "--max_length", 64, "--backbones", "shared", "--pair_layer", "none"]
    model += ["--clf", "linear", "--fine_tune_mode", "full-model"]
    train = ["--data_dir", sample, "--train_sst", "--train_sts", "--epochs", 2, "--threads", 1, "--no_tensorboard"]
    grids = ["--grid", f"seed={','.join(map(str, range(23)))}", "--grid", "lora_mode=attn-only", f"lora_rank={HUGE}"]
    words = [str(word) for word in ["--out", tmp_path, "--jobs", 2, *model, *train, *grids]]
    with_all = start(words, start_new_session=True)
    wait_for(lambda: rows_of(tmp_path) >= 5, with_all)
    os.killpg(with_all.pid, signal.SIGKILL)
    with_all.communicate()
    ends = time.monotonic() + 20
    while trials_running(tmp_path):
        assert time.monotonic() < ends
        time.sleep(0.1)
    alone = start(words)
    wait_for(lambda: rows_of(tmp_path) >= 12, alone)
    alone.kill()
    alone.communicate()
    last = start(words)
    out, err = last.communicate(timeout=900)
    assert last.returncode == 0, out + err
    assert f"23 ok, 1 out of memory: {tmp_path / 'results.csv'}" in out
    rows = by_trial(tmp_path)
    assert len(read_table(tmp_path)) == len(rows) == 24
    assert rows.pop(TOO_BIG)["status"] == "out of memory"
    for name, row in rows.items():
        metrics = (tmp_path / "trials" / name / "metrics.jsonl").read_text().splitlines()
        assert row["status"] == "ok" and [json.loads(line)["epoch"] for line in metrics] == [1, 2]


def rows_of(folder: Path) -> int:
    """How many rows a study has by now."""
    return len(read_table(folder)) if (folder / "results.csv").exists() else 0


def trials_running(folder: Path) -> bool:
    """Whether a process has a trial of the study, and so its log."""
    claims = [sweep.claim(log) for log in folder.glob("trials/*/log.txt")]
    for own in claims:
        if own is not None:
            own.close()
    return None in claims


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A sweep listens to SIGTERM; pytest does not want to."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(folder: Path, flags: list[str], *grid: str) -> None:
    sweep.main(["--out", str(folder), *flags, "--grid", *grid])


def test_a_trial_cut_short_goes_on_and_keeps_its_checkpoints_if_asked(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "trials" / "seed=5"

    def die(trainer: Trainer) -> None:
        save(trainer)
        kill_myself()

    save = Trainer.save_resume
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_resume", die)
        words = [*flags, "--seed=5", "--run_dir", str(folder)]
        assert Child(lambda: multitask_classifier.main(words), tmp_path / "killed").wait() == -signal.SIGKILL
    run(tmp_path, [*flags, "--keep_checkpoints"], "seed=5")
    log = (folder / "log.txt").read_text()
    assert "Epoch 1/2" not in log and log.count("Epoch 2/2") == 1
    (row,) = read_table(tmp_path)
    assert row["status"] == "ok" and row["seed"] == "5"
    assert int(row["checkpoint_bytes"]) == (folder / "best.pt").stat().st_size
    assert "seed=5: ok, score 0." in capsys.readouterr().out
    (tmp_path / "results.csv").unlink()  # as if the sweep had been killed just before it wrote the row
    run(tmp_path, flags, "seed=5")
    assert read_table(tmp_path) == [row] and (folder / "log.txt").read_text() == log


@pytest.mark.long
def test_sigterm_ends_the_trials_and_leaves_no_row(flags: list[str], tmp_path: Path) -> None:
    sweeping = start(["--out", str(tmp_path), *flags, "--epochs", "1000", "--grid", "seed=1"])
    log = tmp_path / "trials" / "seed=1" / "log.txt"
    wait_for(lambda: log.exists() and "Epoch 2/1000" in log.read_text(), sweeping)
    sweeping.terminate()
    out, err = sweeping.communicate(timeout=20)
    assert sweeping.returncode == 130 and err.endswith("stopped\n")
    claimed = sweep.claim(log)  # no process holds the trial any more
    assert claimed is not None
    claimed.close()
    assert not (tmp_path / "results.csv").exists() and (log.parent / "resume.pt").exists()


def test_other_flags_for_a_trial_that_has_its_row_are_refused(study: Path, flags: list[str]) -> None:
    with pytest.raises(UserError, match=f"--out {study}: there {REFUSED} is the run of .*repeat the flags"):
        sweep.main(study_words(study, [*flags, "--lr", "1"]))


def test_a_grid_of_other_flags_is_refused(study: Path, flags: list[str]) -> None:
    with pytest.raises(UserError, match=r"results.csv: is the table of another grid or program; choose another"):
        run(study, flags, "lora_rank=1")


# ----------------------------------------------------------------------------------------------------------- verdicts

TRACE = "Traceback (most recent call last):\n  File x.py, line 3, in f\n"
ALLOCATOR = "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    ("code", "log", "wanted"),
    [
        (0, "error: told, but survived", ("ok", "")),
        (1, TRACE + "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n", ("out of memory", "Tried 2 GiB")),
        (1, TRACE + ALLOCATOR + ": you tried 9 bytes.\nframe #0: c10 + 0x1\n", ("out of memory", "you tried 9 bytes.")),
        (1, TRACE + "MemoryError\n", ("out of memory", "MemoryError")),
        (-6, "terminate called after throwing 'std::bad_alloc'\n  what(): x\n", ("out of memory", "'std::bad_alloc'")),
        (-9, "epoch 1/2:  50%|", ("out of memory", "killed by SIGKILL, as the system does when memory runs out")),
        (-11, "epoch 1/2:  50%|", ("failed", "killed by SIGSEGV")),
        (-35, "epoch 1/2:  50%|", ("failed", "killed by signal 35")),
        (1, TRACE + "ValueError: a, b\nepoch 1/2: 50%|#|", ("failed", "ValueError: a, b")),
        (2, "epoch 1/2: 50%\repoch 1/2: 90%\nerror: SST: a loss is no number\n", ("failed", "a loss is no number")),
        (3, "", ("failed", "exit code 3")),
    ],
)
def test_verdicts(code: int, log: str, wanted: tuple[str, str]) -> None:
    status, cause = verdict(code, log)
    assert status == wanted[0] and cause.endswith(wanted[1]) and "\n" not in cause


# -------------------------------------------------------------------------------------------------- grids and trials


def names(*grids: dict[str, list[str]], base: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    return [(trial.name, trial.refusal) for trial in make_trials(grids, base)]


def test_switches_are_given_and_taken_back() -> None:
    off, on = make_trials([{"dora": ["0", "1"]}], ["--dora", "--lora_mode=attn"])
    assert off.config is not None and not off.config.lora.dora
    assert on.config is not None and on.config.lora.dora


def test_a_trial_that_the_processes_of_the_sweep_rule_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    off, on = make_trials([{"cache_frozen": ["0", "1"]}], [])
    assert off.refusal == "" and "drop it or torchrun" in on.refusal and on.config is None


def test_lists_within_a_grid_are_written_with_spaces() -> None:
    grid = sweep.read_grid(["lora_targets=query value,key"])
    two, one = make_trials([grid], ["--lora_mode=attn"])
    assert two.config is not None and two.config.lora.lora_targets == ("query", "value")
    assert one.config is not None and one.config.lora.lora_targets == ("key",)
    assert two.name.startswith("lora_targets=query-value-") and len({two.name, one.name}) == 2


def test_names_are_short_and_unique_and_know_no_order() -> None:
    deep = "/".join(["folder"] * 40)
    grid = {"pretrained": [f"{deep}/a", f"{deep}/b", "a/b", "a b"], "lr": ["1e-4"]}
    found = [name for name, _ in names(grid)]
    assert len(set(found)) == 4 and all(re.fullmatch(r"[\w.,=+-]{1,100}", name) for name in found)
    assert names({"lr": ["1"], "seed": ["2"]}) == names({"seed": ["2"], "lr": ["1"]}) == [("lr=1,seed=2", "")]


def test_the_same_run_twice_is_refused_and_the_same_trial_twice_is_one() -> None:
    grid = {"lr": ["0.001", "1e-3"], "lora_rank": ["1"]}
    found = names(grid, {"lora_rank": ["1"], "lr": ["0.001"]}, {"lr": ["0.001"]})
    assert found[0] == ("lora_rank=1,lr=0.001", "")
    same = "is the same run as lora_rank=1,lr=0.001"
    assert found[1:] == [("lora_rank=1,lr=1e-3", same), ("lr=0.001", same)]


STUDIES = ROOT / "recipes" / "studies"


def read_study(name: str) -> list[sweep.Trial]:
    """The trials of a file of recipes/studies, as sweep.main makes them."""
    _, grids, base = sweep.read_command([f"@recipes/studies/{name}.args"])
    return make_trials(grids, base)


def configurations(trials: list[sweep.Trial]) -> set[str]:
    return {json.dumps(trial.config.to_dict()) for trial in trials if trial.config is not None}


@pytest.mark.parametrize(
    ("name", "count"),
    [("lora-ranks", 26), ("r0-grid", 416), ("r0-ranks", 64), ("r0-ablation", 12), ("r0-final", 9)],
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
    assert f"python report.py runs/{name}/results.csv --out runs/{name}/report" in head[2]


def test_r0s_grid_has_960_combinations_of_which_416_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """R0 M.1: the checks refuse 160; R0 also leaves out adapters beside --fine_tune_mode last-layer, 384."""
    monkeypatch.chdir(ROOT)
    grid = {
        "lr": ["1e-4", "5e-5", "1e-5", "5e-6"],
        "batch_size": ["64", "128", "256", "384"],
        "lora_rank": ["1", "5", "10"],
        "lora_mode": ["none", "all-lin", "attn", "all-lin-only", "attn-only"],
        "dora": ["0", "1"],
        "fine_tune_mode": ["full-model", "last-layer"],
    }
    base = expand_arguments([f"@{STUDIES / 'r0-base.args'}", "--amp", "--epochs", "3"])
    trials = make_trials([grid], base)
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
    trials = read_study("r0-final")
    steady = expand_arguments(["@recipes/g6-yin-yang-steady-hand.args"])
    kinds: dict[tuple[str, bool, bool], set[int]] = {}
    for trial in trials:
        assert trial.config is not None
        lora, compute, seed = trial.config.lora, trial.config.compute, trial.config.train.seed
        kinds.setdefault((lora.lora_mode, lora.dora, compute.amp), set()).add(seed)
        if lora.lora_mode == "none":
            words = [*steady, "--no_amp", f"--seed={seed}", "--no_tensorboard"]
            same = config.parse(words, TASKS, "multitask_classifier.py", "").to_dict()
            assert {**trial.config.to_dict(), "run": 0} == {**same, "run": 0}
    seeds = {11711, 11712, 11713}
    assert kinds == dict.fromkeys([("none", False, False), ("all-lin", False, True), ("all-lin", True, True)], seeds)


def test_a_dry_run_lists_and_makes_nothing(tmp_path: Path, capsys: Any) -> None:
    grid = ["--grid", "lora_mode=none,attn", "lora_rank=1,5", "--run_dir", "of/a/recipe"]
    sweep.main(["--out", str(tmp_path / "study"), *grid, "--dry_run"])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == PLAIN and out[1].startswith("refused lora_mode=none,lora_rank=5: --lora_rank needs adapters")
    assert out[-1] == "3 trials, 1 refused" and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ mistakes


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
            run(tmp_path, flags, "lr=1e-4")
        assert (tmp_path / "results.csv").read_bytes() == content
