"""R0's members and ensembles as recipes: their values are the report's, all of them run, and make goes on."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Child, kill_myself
from test_config import DUALITY, ENSEMBLES, ROOT, YIN_YANG, configure, unwrapped

import multitask_classifier
from cli.parser import expand_arguments
from config import Config
from training.trainer import Trainer

RECIPES = ROOT / "recipes"
# Which of the report's commands trains which of its checkpoints.
COMMANDS = {
    "duality-of-robust-men": "Duality of Robust Men",
    "duality-of-fast-man": "Duality of Faster Men",
    "duality-of-slow-man": "Duality of Slow Men",
    "duality-of-man-nonlinear": "Duality of Nonlinear Men",
    "duality-of-long-distance-runners-20": "Mega Duality",
    "g6-yin-yang": "Yin Yang",
    "g6-yang-yin": "Yang Yin",
    "g6-yin-yang-fast": "Fast",
    "g6-yin-yang-steady-hand": "Steady Hand",
    "g6-yang-yin-the-parabola": "The Parabola",
    "g6-yin-yang-2": "Yin Yang 2",
    **{f"g6-yin-yang-steady-hand-{number}": f"Steady Hand {number}" for number in range(2, 7)},
    "g6-run-it-back": "Run it Back",
    "g6-interleaver": "Interleaver",
    "g6-interleaver-more-para": "Interleaver more para",
    "g6-interleaver-fast": "Interleaver fast",
    "g6-interleaver-steady-hand": "Interleaver steady hand",
    "g6-interleaver-the-parabola": "Interleaver the parabola",
    "g6-interleaver-2": "Interleaver 2",
}
MEMBERS = [*COMMANDS, "g6-duality-of-man"]
LISTS = {
    "duality": "H.2",
    "yue-the-moon-spirit": "I.7",
    "interleaver": "K",
    "menage-a-onze": "L.1",
    "oligarchy-v1": "Oligarchy v1",
    "oligarchy-v2": "Oligarchy v2",
    "lisan-al-gaib": "Lisan al Gaib",
    "the-sage": "The Sage",
}


def added(member: str) -> list[str]:
    """What a recipe has beyond the printed flags."""
    out = ["--run_dir", f"runs/r0/{member}", "--filepath", f"runs/r0/{member}.pt"]
    if "duality" in member:
        out += ["--arch", "duality"]
    return out + (["--routine", "interleave"] if "interleaver" in member else [])


def recipe(member: str) -> Config:
    return configure(f"@{RECIPES / member}.args")


def test_every_command_and_ensemble_of_r0_has_its_file() -> None:
    assert sorted(COMMANDS.values()) == sorted([*DUALITY, *YIN_YANG])
    assert sorted(LISTS.values()) == sorted(set(ENSEMBLES) - {"minimal"})
    own = {path.stem for path in RECIPES.glob("*.args") if (recipe(path.stem).run.run_dir or "").startswith("runs/r0/")}
    assert own == set(MEMBERS)
    assert {path.stem for path in (RECIPES / "ensembles").iterdir()} == set(LISTS)


@pytest.mark.parametrize("member", COMMANDS)
def test_a_recipe_is_the_printed_command(member: str) -> None:
    printed = unwrapped({**DUALITY, **YIN_YANG}[COMMANDS[member]])
    assert recipe(member) == configure(*printed, *added(member))
    # flag by flag: a default that happens to agree must be in the file only where it is printed
    assert sorted(expand_arguments([f"@{RECIPES / member}.args"])) == sorted(
        [*expand_arguments(printed), *added(member)]
    )


def test_duality_of_man_is_inferred_from_robust_men() -> None:
    undone = ["--optim", "Adamax", "--epochs", 7, "--sst_lr_multiplier", 10, "--para_weight_decay", 1e-5]
    printed = unwrapped(DUALITY["Duality of Robust Men"])
    assert recipe("g6-duality-of-man") == configure(*printed, *undone, *added("g6-duality-of-man"))


@pytest.mark.parametrize("name", LISTS)
def test_an_ensemble_is_the_printed_list(name: str) -> None:
    words = expand_arguments([f"@{RECIPES / 'ensembles' / name}.args"])
    printed = [word for word in shlex.split(ENSEMBLES[LISTS[name]][0]) if word.endswith(".pt")]
    assert words[: words.index("--filepaths")] == ["--use_gpu", "--run_dir", f"runs/r0/{name}"]
    assert words[words.index("--filepaths") + 1 :] == [f"runs/r0/{checkpoint}" for checkpoint in printed]
    assert {Path(checkpoint).stem for checkpoint in printed} <= set(MEMBERS)


@pytest.mark.parametrize("member", MEMBERS)
def test_every_recipe_trains(member: str, tiny_flags: list[str], tmp_path: Path) -> None:
    few = ["--epochs", "1", "--max_train_examples", "8", "--no_tensorboard"]
    place = ["--run_dir", str(tmp_path / "run"), "--filepath", str(tmp_path / "member.pt")]
    multitask_classifier.main([f"@{RECIPES / member}.args", *tiny_flags, *few, *place])
    assert (tmp_path / "member.pt").read_bytes() == (tmp_path / "run" / "best.pt").read_bytes()
    epoch = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8"))
    steps = {name: own["steps"] for name, own in epoch["train"].items()}
    assert steps == {name: own.num_trains for name, own in recipe(member).tasks.items()}  # a batch a round


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """A copy of the repository's face with an ensemble of two, whose first member has two votes."""
    for script in ("multitask_classifier.py", "ensemble.py", "Makefile", "requirements.txt"):
        (tmp_path / script).symlink_to(ROOT / script)
    ensembles = tmp_path / "recipes" / "ensembles"
    ensembles.mkdir(parents=True)
    (ensembles / "two.args").write_text(
        "# Two.\n--run_dir runs/r0/two --filepaths\nruns/r0/a.pt\nruns/r0/b.pt\nruns/r0/a.pt\n", encoding="utf-8"
    )
    for name in ("a", "b"):
        flags = f"--run_dir runs/r0/{name} --filepath runs/r0/{name}.pt --no_tensorboard\n"
        (tmp_path / "recipes" / f"{name}.args").write_text(flags, encoding="utf-8")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "run.done").touch()
    return tmp_path


def make(folder: Path, *words: str) -> str:
    """What make prints in `folder`, with this Python in place of a venv."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    command = ["make", f"BIN={folder / 'bin'}", f"VENV={folder / 'venv'}", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_goes_on_where_it_stopped(
    workshop: Path, tiny_flags: list[str], small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"DATA={small_data}"
    flags = [*tiny_flags, "--max_train_examples", "8"]
    target = ("ensemble-two", data, f"FLAGS={shlex.join(flags)}")

    plan = make(workshop, "-n", *target).splitlines()
    assert [line.split()[2] for line in plan if "multitask_classifier.py" in line] == [
        "@recipes/a.args",
        "@recipes/b.args",
    ]

    # a is killed after its first epoch, with its checkpoint written; b before the end of its first
    save_resume = Trainer.save_resume

    def killed(trainer: Trainer) -> None:
        save_resume(trainer)
        kill_myself()

    with monkeypatch.context() as patch:
        patch.chdir(workshop)
        patch.setattr(Trainer, "save_resume", killed)
        words = ["@recipes/a.args", "--data_dir", str(small_data), *flags]
        assert Child(lambda: multitask_classifier.main(words), workshop / "killed").wait() == -signal.SIGKILL
    runs = workshop / "runs" / "r0"
    first_epoch = (runs / "a" / "metrics.jsonl").read_bytes()
    assert (runs / "a.pt").exists() and not (runs / "a" / "scores.json").exists()
    (runs / "b").mkdir()
    shutil.copy(runs / "a" / "config.json", runs / "b")

    make(workshop, *target)
    both = (runs / "a" / "metrics.jsonl").read_bytes()
    assert both.startswith(first_epoch) and both.count(b"\n") == 2
    assert json.loads((runs / "a" / "config.json").read_text(encoding="utf-8"))["run"]["overwrite"] is False
    assert json.loads((runs / "b" / "config.json").read_text(encoding="utf-8"))["run"]["overwrite"] is True
    scores = json.loads((runs / "two" / "scores.json").read_text(encoding="utf-8"))
    assert scores["votes"] == {"runs/r0/a.pt": 2, "runs/r0/b.pt": 1}

    plan = make(workshop, "-n", *target)
    assert "multitask_classifier.py" not in plan and "ensemble.py @recipes/ensembles/two.args" in plan
    shutil.rmtree(runs / "b")
    plan = make(workshop, "-n", *target)
    assert "@recipes/b.args" in plan and "@recipes/a.args" not in plan
