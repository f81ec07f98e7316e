"""Sweeps as processes that are killed, share a study, search and prune; a script stands in for the training."""

import csv
import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, refusal
from processes import Child, wait_until

import sweep
from studies import runner
from studies.runner import verdict
from studies.shared_study import SharedStudy, lock_log

# Writes what a training run writes. The score is best at a learning rate of 1e-3 and rises with the epochs.
SCRIPT = f"""
import json, math, os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from cli.parser import parse
from tasks import TASKS
config = parse(sys.argv[1:], TASKS, "multitask_classifier.py", "")
folder, epochs, score = Path(config.run.run_dir), config.train.epochs, 0.0
metrics = folder / "metrics.jsonl"
if not config.run.resume:
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
print("begins after epoch", done, flush=True)
if config.train.lr > 1:
    sys.exit("error: the learning rate is too high")
for epoch in range(done + 1, epochs + 1):
    time.sleep(float(os.environ.get("SECONDS", "0")))
    score = epoch / epochs / (1 + abs(math.log10(config.train.lr) + 3))
    with metrics.open("a") as file:
        line = {{"epoch": epoch, "train": {{}}, "dev": {{"score": score}}, "trainable_parameters": 1}}
        file.write(json.dumps(line) + "\\n")
    (folder / "resume.pt").touch()
if config.train.init_from and not Path(config.train.init_from).exists():
    sys.exit("error: --init_from has no file")
(folder / "best.pt").write_text("weights")
(folder / "scores.json").write_text(json.dumps({{"dev": {{"score": score, "score_raw_r": score}}}}))
"""

ENSEMBLE = """
import json, sys
from pathlib import Path
print("begins")
members = [Path(word) for word in sys.argv[1:] if word.endswith("best.pt")]
assert all(path.read_text() == "weights" for path in members)
folder = Path(sys.argv[sys.argv.index("--run_dir") + 1])
(folder / "scores.json").write_text(json.dumps({"dev": {"score": len(members) / 10, "score_raw_r": 0}}))
"""


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let sweeps start the scripts above and look often. They listen to signals, which pytest does not want to."""
    (tmp_path / "multitask_classifier.py").write_text(SCRIPT)
    (tmp_path / "ensemble.py").write_text(ENSEMBLE)
    monkeypatch.setattr(runner, "SCRIPTS", tmp_path)
    monkeypatch.setattr(runner, "POLL", 0.02)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def read_table(folder: Path) -> list[dict[str, str]]:
    path = folder / "results.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def by_trial(folder: Path) -> dict[str, dict[str, str]]:
    rows = {row["trial"]: row for row in read_table(folder)}
    assert len(rows) == len(read_table(folder))
    return rows


def run(folder: Path, *words: object) -> None:
    sweep.main(["--out", str(folder), "--epochs", "2", *map(str, words)])


def start(folder: Path, *words: object, host: str = platform.node()) -> Child:
    """A sweep in a process, and a process group, of its own."""

    def work() -> None:
        os.setsid()
        platform.node = lambda: host
        run(folder, *words)

    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".log").touch()
    return Child(work, folder.with_suffix(".log"))


def log_of(folder: Path, name: str) -> str:
    path = folder / "trials" / name / "log.txt"
    return path.read_text() if path.exists() else ""


def trials_running(folder: Path) -> int:
    return [lock_log(path) for path in folder.glob("trials/*/log.txt")].count(None)


def wait_for_rows(count: int, folder: Path, child: Child, jobs: int) -> None:
    """Wait until a study has rows and all its jobs train, since a kill in the midst of a claim costs half a minute."""

    def training() -> int:
        begun = {path.parent.name for path in folder.glob("trials/*/log.txt") if "begins" in path.read_text()}
        return len(begun - {row["trial"] for row in read_table(folder)})

    wait_until(lambda: len(read_table(folder)) >= count and training() == jobs, child, 240)


def kill_all(child: Child) -> None:
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def test_a_sweep_killed_twice_has_each_trial_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 trials, one of which fails: killed with all its trials, then alone, then left in peace as two at once."""
    monkeypatch.setenv("SECONDS", "0.1")
    words = ["--jobs", 2, "--grid", f"seed={','.join(map(str, range(23)))}", "--grid", "lr=2"]
    folder = tmp_path / "study"
    first = start(folder, *words)
    wait_for_rows(4, folder, first, jobs=2)
    kill_all(first)
    second = start(folder, *words)
    wait_for_rows(10, folder, second, jobs=2)
    second.send(signal.SIGKILL)
    second.wait()
    sweeps = [start(folder, *words) for _ in range(2)]
    assert [child.wait(180) for child in sweeps] == [1, 1]  # a trial has failed
    rows = by_trial(folder)
    assert len(rows) == 24 and rows.pop("lr=2")["cause"] == "error: the learning rate is too high"
    for name, row in rows.items():
        metrics = (folder / "trials" / name / "metrics.jsonl").read_text().splitlines()
        assert row["status"] == "ok" and [json.loads(line)["epoch"] for line in metrics] == [1, 2]
        assert log_of(folder, name).count("begins after epoch 0") <= 1
    records = SharedStudy(str(folder / "study.journal"), "study", {}, folder).records()
    assert sum("row" in record.user_attrs for record in records) == 24


def test_a_trial_cut_short_goes_on_and_keeps_its_checkpoints_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, words = tmp_path / "study", ["--grid", "seed=5", "--epochs=3", "--keep_checkpoints"]
    monkeypatch.setenv("SECONDS", "60")
    trial = folder / "trials" / "seed=5"
    killed = start(folder, *words)
    wait_until(lambda: "begins" in log_of(folder, "seed=5"), killed)
    kill_all(killed)
    (trial / "metrics.jsonl").write_text('{"epoch": 1, "train": {}, "dev": {"score": 0.1}}\n')
    (trial / "resume.pt").touch()
    monkeypatch.setenv("SECONDS", "0")
    run(folder, *words)
    assert log_of(folder, "seed=5") == "begins after epoch 0\nbegins after epoch 1\n"
    assert "seed=5: ok, score 0.5000" in capsys.readouterr().out and (trial / "best.pt").exists()
    before = read_table(folder)
    for lr, begins, score in (("1e-4", 2, before[0]["score"]), ("1e-3", 1, "1.0")):
        for name in ("results.csv", "study.journal"):
            (folder / name).unlink()
        run(folder, *words, "--lr", lr)  # the run itself is still there, and the second time it has other flags
        assert log_of(folder, "seed=5").count("begins") == begins and read_table(folder)[0]["score"] == score


def test_jobs_share_the_cores_that_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler may give a process a part of the machine's."""
    monkeypatch.setattr(runner, "cores", lambda: 6)
    run(tmp_path / "study", "--jobs", 2, "--grid", "seed=1")
    config = json.loads((tmp_path / "study" / "trials" / "seed=1" / "config.json").read_text())
    assert config["compute"]["threads"] == 3


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_trials_and_leaves_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    """SIGHUP is what a dropped ssh sends."""
    monkeypatch.setenv("SECONDS", "60")
    child = start(tmp_path / "study", "--grid", "seed=1")
    wait_until(lambda: "begins" in log_of(tmp_path / "study", "seed=1"), child)
    child.send(signum)
    assert child.wait(20) != 0
    ends = time.monotonic() + 10
    while trials_running(tmp_path / "study"):
        assert time.monotonic() < ends
    assert not read_table(tmp_path / "study")
    monkeypatch.setenv("SECONDS", "0")
    run(tmp_path / "study", "--grid", "seed=1")
    assert len(read_table(tmp_path / "study")) == 1


def test_a_sweep_that_goes_on_removes_what_a_kill_has_left(tmp_path: Path) -> None:
    """Between the row of a trial and the end of its states, or in the middle of a file."""
    folder, trial = tmp_path / "study", tmp_path / "study" / "trials" / "seed=1"
    run(folder, "--grid", "seed=1")
    for name in ("resume.pt", ".resume.pt.1.tmp", ".notes.1.tmp"):
        (trial / name).touch()
    run(folder, "--grid", "seed=1,2")
    assert not (trial / "resume.pt").exists() and not (trial / ".resume.pt.1.tmp").exists()
    assert (trial / ".notes.1.tmp").exists() and log_of(folder, "seed=1").count("begins") == 1


def test_two_machines_share_a_study_and_both_tables_have_all_rows(tmp_path: Path) -> None:
    words = ["--storage", tmp_path / "disk" / "journal", "--grid", "seed=1,2,3,4,5,6,7,8"]
    folders = [tmp_path / host / "seeds" for host in ("one", "two")]
    sweeps = [start(folder, *words, host=folder.parent.name) for folder in folders]
    assert [child.wait(180) for child in sweeps] == [0, 0]
    trained = [[path.parent.name for path in folder.glob("trials/*/scores.json")] for folder in folders]
    assert trained[0] and trained[1] and sorted(trained[0] + trained[1]) == [f"seed={i}" for i in range(1, 9)]
    assert by_trial(folders[0]) == by_trial(folders[1]) and len(by_trial(folders[0])) == 8
    assert "there seed=1 is the run of " in refusal(run, tmp_path / "three" / "seeds", *words, "--lr", "1")


@pytest.mark.parametrize(("place", "lives"), [("{}/journal", 0), ("sqlite:///{}/study.db", 0), ("{}/journal", 1)])
def test_a_trial_of_a_machine_that_is_said_to_be_dead_runs_again(
    place: str, lives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--storage", place.format(tmp_path), "--grid", "seed=1,2"]
    monkeypatch.setenv("SECONDS", "2" if lives else "60")
    dead = start(tmp_path / "dead" / "seeds", *words, host="node7")
    wait_until(lambda: "begins" in log_of(tmp_path / "dead" / "seeds", "seed=1"), dead)
    if not lives:
        kill_all(dead)
    monkeypatch.setenv("SECONDS", "0")
    folder = tmp_path / "live" / "seeds"
    waiting, said = start(folder, *words), folder.with_suffix(".log")
    wait_until(lambda: "waiting for 1 trials that other processes run on node7" in said.read_text(), waiting)
    assert list(by_trial(folder)) == ["seed=2"]
    run(folder, *words, "--retry", "node7")
    assert waiting.wait(180) == 0
    assert {name: row["status"] for name, row in by_trial(folder).items()} == {"seed=1": "ok", "seed=2": "ok"}
    if lives:
        assert dead.wait(180) == 0 and by_trial(tmp_path / "dead" / "seeds") == by_trial(folder)


def test_a_grid_may_grow(tmp_path: Path) -> None:
    run(tmp_path / "study", "--grid", "seed=1,2")
    before = by_trial(tmp_path / "study")
    run(tmp_path / "study", "--grid", "seed=0,1,2,3", "--jobs", 2)
    rows = by_trial(tmp_path / "study")
    assert set(rows) == {f"seed={i}" for i in range(4)} and {name: rows[name] for name in before} == before


SEARCH = ["--search", 12, "--range", "lr=1e-5..1:log", "--range", "lora_rank=1..4", "lora_mode=none,attn"]


def flags_of(folder: Path) -> list[tuple[str, ...]]:
    return [tuple(row[flag] for flag in ("trial", "lr", "lora_rank", "lora_mode")) for row in read_table(folder)]


def test_a_search_samples_its_ranges_and_can_be_repeated_killed_and_enlarged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", *SEARCH)
    rows = by_trial(tmp_path / "whole")
    assert list(rows) == [f"search-{i:03d}" for i in range(1, 13)]
    for row in rows.values():
        assert 1e-5 <= float(row["lr"]) <= 1 and row["lora_rank"] in "1234" and row["lora_mode"] in ("none", "attn")
        impossible = row["lora_mode"] == "none" and row["lora_rank"] != "1"
        assert row["status"] == ("refused" if impossible else "ok") and bool(row["score"]) == (not impossible)
        assert impossible == ("needs adapters" in row["cause"])
    assert len({row["lr"] for row in rows.values()}) == 12 and len({row["lora_rank"] for row in rows.values()}) > 2

    monkeypatch.setenv("SECONDS", "0.2")
    killed = start(tmp_path / "killed", *SEARCH)
    wait_for_rows(3, tmp_path / "killed", killed, jobs=1)
    kill_all(killed)
    monkeypatch.setenv("SECONDS", "0")
    run(tmp_path / "killed", *SEARCH)
    assert flags_of(tmp_path / "killed") == flags_of(tmp_path / "whole")
    run(tmp_path / "other", *SEARCH, "--search", 2, "--search_seed", 1)
    assert flags_of(tmp_path / "other") != flags_of(tmp_path / "whole")[:2]
    run(tmp_path / "whole", *SEARCH, "--search", 13)
    assert len(by_trial(tmp_path / "whole")) == 13
    others = ["--search", 14, "--range", "lr=1e-5..2:log", "lora_rank=1..4", "lora_mode=none,attn"]
    assert "whole searches other ranges; repeat them" in refusal(run, tmp_path / "whole", *others)


def test_sweeps_that_share_a_search_run_its_number_of_trials(tmp_path: Path) -> None:
    sweeps = [start(tmp_path / "study", *SEARCH, "--jobs", 2) for _ in range(2)]
    assert [child.wait(180) for child in sweeps] == [0, 0]
    assert len(by_trial(tmp_path / "study")) == 12 and len(set(flags_of(tmp_path / "study"))) == 12


def test_bad_trials_are_pruned_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ["--grid", "lr=1e-3,2e-3,4e-3,8e-3,1.6e-2", "--epochs=3"]
    run(tmp_path / "study", *words)
    monkeypatch.setenv("SECONDS", "0.3")
    words[1] += ",1e-9,1.1e-3"
    run(tmp_path / "study", *words, "--pruner", "median")
    rows = by_trial(tmp_path / "study")
    assert rows["lr=1.1e-3"]["status"] == "ok"
    pruned = rows["lr=1e-9"]
    assert (pruned["status"], pruned["score"]) == ("pruned", "")
    assert pruned["cause"] == "its best dev score up to epoch 1 is below the median of the other trials"
    assert not (tmp_path / "study" / "trials" / "lr=1e-9" / "resume.pt").exists()
    assert "6 ok, 1 pruned: " in capsys.readouterr().out
    run(tmp_path / "study", *words)
    assert by_trial(tmp_path / "study") == rows


# ------------------------------------------------------------------------------------------------ tables of a report

TABLE = ["--tables", ROOT / "tests" / "r9" / "tables.toml", "--table", "1"]


def checkpoints(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("trials/*/best.pt")}


def test_a_table_that_is_killed_goes_on_and_each_checkpoint_stays_as_long_as_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with the stage done and while the rest trains, then finished by two sweeps at once."""
    monkeypatch.chdir(ROOT)
    folder, words = tmp_path / "study", [*TABLE, "--seeds", "1,2"]
    monkeypatch.setenv("SECONDS", "0.4")
    first = start(folder, *words, "--jobs", 2)
    wait_for_rows(4, folder, first, jobs=2)
    kill_all(first)
    begun = {f"{name},seed={seed}" for name in ("row=base", "recipe=stage") for seed in (1, 2)}
    assert begun <= set(by_trial(folder)) and begun <= checkpoints(folder)
    sweeps = [start(folder, *words) for _ in range(2)]
    assert [child.wait(180) for child in sweeps] == [0, 0]
    rows = by_trial(folder)
    assert len(rows) == 10 and {row["status"] for row in rows.values()} == {"ok"} and not checkpoints(folder)
    assert [rows[f"row=both,seed={seed}"]["score"] for seed in (1, 2)] == ["0.3", "0.3"]
    assert all(log_of(folder, name).count("begins after epoch 0") <= 1 for name in rows)
    table = json.loads((folder / "table.json").read_text())
    assert table["rows"][1]["trials"] == ["row=staged,seed=1", "row=staged,seed=2"]
    run(folder, *TABLE, "--seeds", "3", "--keep_checkpoints")
    table = json.loads((folder / "table.json").read_text())
    assert table["rows"][5]["trials"] == [] and len(table["rows"][4]["trials"]) == 3
    assert checkpoints(folder) == {f"{name},seed=3" for name in ("row=base", "recipe=stage", "row=staged", "row=again")}


def test_what_needs_a_trial_that_fails_is_refused_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for path in (ROOT / "tests" / "r9").iterdir():
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8").replace("--no_train_sst", "--lr 2"))
    folder = tmp_path / "study"
    with pytest.raises(SystemExit):
        run(folder, "--tables", tmp_path / "tables.toml", "--table", "1")
    rows = by_trial(folder)
    cause = "needs recipe=stage, which is failed: error: the learning rate is too high"
    assert {name: row["status"] for name, row in rows.items()} == {
        "row=base": "ok", "recipe=stage": "failed", "row=staged": "refused", "row=again": "refused",
        "row=both": "refused",
    }  # fmt: skip
    assert rows["row=staged"]["cause"] == rows["row=again"]["cause"] == cause
    assert rows["row=both"]["cause"] == f"needs row=staged, which is refused: {cause}"
    assert not checkpoints(folder) and "ensemble.py" in rows["row=both"]["command"]


def test_a_checkpoint_that_is_gone_or_another_table_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "study"
    run(folder, *TABLE)
    results = (folder / "results.csv").read_text().splitlines()
    (folder / "results.csv").write_text("\n".join(line for line in results if not line.startswith("row=both")) + "\n")
    (folder / "study.journal").unlink()
    line = refusal(run, folder, *TABLE)
    assert "other trials need the checkpoints of row=base, row=staged, which are gone; to train them again" in line
    assert "holds Table 1 of R9; choose another folder" in refusal(run, folder, *TABLE[:-1], "figure-2")
    (folder / "table.json").write_text("{}")
    assert "table.json: cannot be read (it lacks report); delete it" in refusal(run, folder, *TABLE[:-1], "figure-2")


@pytest.mark.parametrize("storage", ["text", "text/journal", "nosuch://host/study", "sqlite:////nosuch/study.db"])
def test_a_storage_that_cannot_be_used_is_one_line(storage: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("no journal\nat all\n")
    line = refusal(run, tmp_path / "study", "--storage", storage, "--grid", "seed=1")
    assert line.startswith(f"--storage {storage}: cannot be used (") and "; name another file or database" in line


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_journal_is_one_line_and_can_be_deleted(damage: str, tmp_path: Path) -> None:
    run(tmp_path / "study", "--grid", "seed=1")
    before, journal = by_trial(tmp_path / "study"), tmp_path / "study" / "study.journal"
    content = journal.read_bytes()
    journal.write_bytes(content[:-20] if damage == "cut" else content[:99] + b"\0" * 50 + content[149:])
    line = refusal(run, tmp_path / "study", "--grid", "seed=1,2")
    assert f"{journal}: cannot be used (" in line and "; a damaged file can be deleted" in line
    journal.unlink()
    run(tmp_path / "study", "--grid", "seed=1,2")
    assert by_trial(tmp_path / "study")["seed=1"] == before["seed=1"]


TRACE = "Traceback (most recent call last):\n  File x.py, line 3, in f\n"
ALLOCATOR = "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    ("code", "log", "wanted"),
    [
        (0, "error: told, but survived", ("ok", "")),
        (1, TRACE + "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n", ("out of memory", "Tried 2 GiB")),
        (1, TRACE + ALLOCATOR + ": you tried 9 bytes.\nframe #0: c10 + 0x1\n", ("out of memory", "you tried 9 bytes.")),
        (-6, "terminate called after throwing 'std::bad_alloc'\n  what(): x\n", ("out of memory", "'std::bad_alloc'")),
        (-9, "epoch 1/2:  50%|", ("out of memory", "killed by SIGKILL, as the system does when memory runs out")),
        (-35, "epoch 1/2:  50%|", ("failed", "killed by signal 35")),
        (2, "epoch 1/2: 50%\repoch 1/2: 90%\nerror: SST: a loss is no number\n", ("failed", "a loss is no number")),
        (3, "", ("failed", "exit code 3")),
    ],
)
def test_verdicts(code: int, log: str, wanted: tuple[str, str]) -> None:
    status, cause = verdict(code, log)
    assert status == wanted[0] and cause.endswith(wanted[1]) and "\n" not in cause
