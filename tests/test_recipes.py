"""R0's commands run as printed, its members and ensembles are recipes, and make goes on where it stopped."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, configure, read_json
from processes import Child, kill_myself

import ensemble
import multitask_classifier
from cli.parser import expand_arguments
from config import Config
from evaluation import combine
from training.trainer import Trainer

RECIPES = ROOT / "recipes"
R0 = RECIPES / "r0"
PRINTED = dict(re.findall(r"^== (.*)\n([^=]*)", (ROOT / "tests" / "r0_commands.txt").read_text(), re.MULTILINE))

# Recipe, the printed command, and its values. Of a Duality: mode, optimizer, lr, head, epochs.
DUALITY = {
    "duality-of-robust-men": ("Duality of Robust Men", "iterative", "RAdam", 1e-4, "conv", 10),
    "duality-of-fast-man": ("Duality of Faster Men", "iterative", "Adamax", 2.1e-4, "conv", 7),
    "duality-of-slow-man": ("Duality of Slow Men", "full-model", "Adamax", 5e-5, "conv", 7),
    "duality-of-man-nonlinear": ("Duality of Nonlinear Men", "iterative", "Adamax", 1e-4, "nonlinear", 7),
    "duality-of-long-distance-runners-20": ("Mega Duality", "iterative", "Adamax", 1e-4, "conv", 20),
}
# lr, weight decay of SST and STS, lambda, multipliers of SST, Quora and STS, passes over SST, Quora and STS
YIN_YANG = {
    "g6-yin-yang": ("Yin Yang", 1e-4, 8e-3, 9e-3, 0.55, (7, 1, 3), (1, 1, 1)),
    "g6-yang-yin": ("Yang Yin", 1e-4, 8e-3, 9e-3, 0.55, (3, 4, 1), (1, 1, 1)),
    "g6-yin-yang-fast": ("Fast", 1.5e-4, 8e-3, 9e-3, 0.55, (5, 5, 2), (1, 1, 1)),
    "g6-yin-yang-steady-hand": ("Steady Hand", 1e-4, 9e-3, 1e-2, 0.5, (4, 5, 3), (1, 1, 1)),
    "g6-yang-yin-the-parabola": ("The Parabola", 1e-4, 9e-3, 1e-2, 0.5, (3, 8, 1), (1, 1, 1)),
    "g6-yin-yang-2": ("Yin Yang 2", 1e-4, 9e-3, 1e-2, 0.5, (4, 1, 3), (1, 1, 1)),
    "g6-yin-yang-steady-hand-2": ("Steady Hand 2", 1e-4, 9e-3, 1e-2, 0.5, (3, 4, 2), (1, 1, 1)),
    "g6-yin-yang-steady-hand-3": ("Steady Hand 3", 1e-4, 9e-3, 1e-2, 0.55, (4, 5, 3), (1, 1, 1)),
    "g6-yin-yang-steady-hand-4": ("Steady Hand 4", 1e-4, 9e-3, 1e-2, 0.6, (2, 3, 2), (1, 1, 1)),
    "g6-yin-yang-steady-hand-5": ("Steady Hand 5", 1e-4, 9e-3, 1e-2, 0.5, (5, 6, 4), (1, 1, 1)),
    "g6-yin-yang-steady-hand-6": ("Steady Hand 6", 1e-4, 9e-3, 1e-2, 0.5, (6, 7, 5), (1, 1, 1)),
    "g6-run-it-back": ("Run it Back", 1e-4, 9e-3, 1e-2, 0.55, (4, 1, 3), (2, 1, 5)),
    "g6-interleaver": ("Interleaver", 1e-4, 8e-3, 9e-3, 0.55, (4, 1, 3), (5, 1, 5)),
    "g6-interleaver-more-para": ("Interleaver more para", 1e-4, 8e-3, 9e-3, 0.55, (3, 4, 2), (4, 1, 4)),
    "g6-interleaver-fast": ("Interleaver fast", 1.5e-4, 8e-3, 9e-3, 0.55, (5, 5, 2), (3, 1, 3)),
    "g6-interleaver-steady-hand": ("Interleaver steady hand", 1e-4, 9e-3, 1e-2, 0.5, (4, 5, 3), (5, 1, 5)),
    "g6-interleaver-the-parabola": ("Interleaver the parabola", 1e-4, 9e-3, 1e-2, 0.5, (3, 8, 2), (2, 2, 2)),
    "g6-interleaver-2": ("Interleaver 2", 1e-4, 9e-3, 1e-2, 0.5, (4, 2, 4), (10, 1, 10)),
}
# The defaults of R0's early program that no printed command has; beside them 10 epochs (appendix G).
EARLY_DEFAULTS = "--para_lr_multiplier 1 --sts_lr_multiplier 3 --sst_weight_decay 1e-5 --sts_weight_decay 5e-3"
COMMANDS = {recipe: values[0] for recipe, values in {**DUALITY, **YIN_YANG}.items()}
MEMBERS = [*COMMANDS, "g6-duality-of-man"]
# Recipe, the printed list, and its number of members.
ENSEMBLES = {
    "duality": ("ensemble H.2", 6),
    "yue-the-moon-spirit": ("ensemble I.7", 6),
    "interleaver": ("ensemble K", 6),
    "menage-a-onze": ("ensemble L.1", 12),
    "oligarchy-v1": ("ensemble Oligarchy v1", 14),
    "oligarchy-v2": ("ensemble Oligarchy v2", 18),
    "lisan-al-gaib": ("ensemble Lisan al Gaib", 23),
    "the-sage": ("ensemble The Sage", 16),
}


def printed(name: str) -> list[str]:
    """Return the words of a printed command. The pages also break lines after `--` and within 1e-5."""
    return shlex.split(re.sub(r"(?<= --)\n\s*|(?<= 1)\n\s*(?=e-)", "", PRINTED[name]))


def added(member: str) -> list[str]:
    """Return what a recipe has beyond the printed flags."""
    out = ["--run_dir", f"runs/r0/{member}", "--filepath", f"runs/r0/{member}.pt"]
    if "duality" in member:
        out += ["--arch", "duality", *shlex.split(EARLY_DEFAULTS)]
        out += [] if "--epochs" in expand_arguments(printed(COMMANDS[member])) else ["--epochs", "10"]
    if member == "duality-of-slow-man":  # the only one without iterative unfreezing
        out += ["--lr_schedule", "cosine"]
    return out + (["--routine", "interleave"] if "interleaver" in member else [])


def recipe(member: str) -> Config:
    return configure(f"@{R0 / member}.args")


def test_every_command_and_ensemble_of_r0_has_its_file() -> None:
    lists = {name for name, _ in ENSEMBLES.values()}
    assert set(PRINTED) == {*COMMANDS.values(), *lists, "ensemble minimal"} and len(PRINTED) == 23 + 9
    ours = {path.stem for path in R0.glob("*.args") if (recipe(path.stem).run.run_dir or "").startswith("runs/r0/")}
    assert ours == set(MEMBERS)
    assert {path.stem for path in (R0 / "ensembles").iterdir()} == set(ENSEMBLES)


@pytest.mark.parametrize("member", COMMANDS)
def test_printed_commands_mean_what_they_say_and_are_recipes(member: str) -> None:
    words = printed(COMMANDS[member])
    config = configure(*words)
    train, (sst, para, sts) = config.train, config.tasks.values()
    assert (config.compute.use_gpu, config.compute.amp, train.batch_size) == (True, True, 64)
    assert list(config.tasks) == ["sst", "para", "sts"] and (sst.loss, para.loss, sts.loss) == ("ce", "bce", "pearson")
    if member in DUALITY:
        assert DUALITY[member][1:] == (train.fine_tune_mode, train.optim, train.lr, config.model.clf, train.epochs)
        multipliers, decays = (5, 5, 3), (9e-3, 1e-4, 1e-2)  # of which two and two are not printed but our defaults
    else:
        _, lr, sst_decay, sts_decay, lr_lambda, multipliers, passes = YIN_YANG[member]
        assert (train.lr, train.lr_lambda, train.epochs) == (lr, lr_lambda, 7)
        assert (train.fine_tune_mode, train.optim, config.model.clf) == ("iterative", "Adamax", "conv")
        assert (sst.num_trains, para.num_trains, sts.num_trains) == passes
        decays = (sst_decay, 1e-5, sts_decay)
    assert (sst.lr_multiplier, para.lr_multiplier, sts.lr_multiplier) == multipliers
    assert (sst.weight_decay, para.weight_decay, sts.weight_decay) == decays
    # Flag by flag, since a default that happens to agree must be in the file only if it is printed.
    words = [*expand_arguments(words), *added(member)]
    assert sorted(expand_arguments([f"@{R0 / member}.args"])) == sorted(words)
    assert recipe(member) == configure(*words)


@pytest.mark.parametrize("member", COMMANDS)
def test_printed_commands_run_with_dry_run(
    member: str, tiny_bert: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--pretrained", str(tiny_bert), "--data_dir", str(small_data), "--max_length", "64", "--dry_run"]
    multitask_classifier.main([*printed(COMMANDS[member]), *place])
    assert f"{configure(*printed(COMMANDS[member])).train.epochs} epochs of " in capsys.readouterr().out


def test_duality_of_man_is_inferred_from_robust_men() -> None:
    undone = ["--optim", "Adamax", "--sst_lr_multiplier", 10, "--para_weight_decay", 1e-3]
    place = ["--run_dir", "runs/r0/g6-duality-of-man", "--filepath", "runs/r0/g6-duality-of-man.pt"]
    words = [*printed("Duality of Robust Men"), *added("duality-of-robust-men"), *undone, *place]
    assert recipe("g6-duality-of-man") == configure(*words)


@pytest.mark.parametrize("name", [*ENSEMBLES, "minimal"])
def test_an_ensemble_is_the_printed_list(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, count = ENSEMBLES.get(name, ("ensemble minimal", 2))
    checkpoints = [word for word in printed(listed) if word.endswith(".pt")]
    taken: list[list[str]] = []
    monkeypatch.setattr(combine, "run_ensemble", lambda names, *options: taken.append(list(names)))
    ensemble.main(printed(listed))
    assert taken == [checkpoints] and len(checkpoints) == count
    if name in ENSEMBLES:
        words = expand_arguments([f"@{R0 / 'ensembles' / name}.args"])
        assert words[: words.index("--filepaths")] == [
            *("--use_gpu", "--average", "logits", "--run_dir", f"runs/r0/{name}")
        ]
        assert words[words.index("--filepaths") + 1 :] == [f"runs/r0/{checkpoint}" for checkpoint in checkpoints]
        assert {Path(checkpoint).stem for checkpoint in checkpoints} <= set(MEMBERS)


@pytest.mark.parametrize("member", MEMBERS)
def test_every_recipe_trains(member: str, tiny_flags: list[str], tmp_path: Path) -> None:
    few = ["--epochs", "1", "--max_train_examples", "8", "--no_tensorboard"]
    place = ["--run_dir", str(tmp_path / "run"), "--filepath", str(tmp_path / "member.pt")]
    multitask_classifier.main([f"@{R0 / member}.args", *tiny_flags, *few, *place])
    assert (tmp_path / "member.pt").read_bytes() == (tmp_path / "run" / "best.pt").read_bytes()
    epoch = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8"))
    steps = {name: task["steps"] for name, task in epoch["train"].items()}
    assert steps == {name: options.num_trains for name, options in recipe(member).tasks.items()}  # a batch a pass


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.args")), ids=lambda path: path.name)
def test_recipes_are_still_found_where_they_once_were(path: Path) -> None:
    assert list(configure(f"@{path}").tasks) == ["sst", "para", "sts"]
    assert path.is_symlink() or path.stem == "mlm"


def test_every_moved_recipe_has_a_link() -> None:
    links = {path.name: path.resolve() for path in RECIPES.iterdir() if path.is_symlink()}
    small = [RECIPES / "small" / f"{name}.args" for name in ("demo-cross", "demo-siamese", "minilm-cpu", "minilm-lora")]
    moved = [*(R0 / f"{member}.args" for member in MEMBERS), *small, R0 / "ensembles"]
    assert links == {path.name: path for path in moved}


def test_the_dictionary_of_adapters_runs(tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train_sst", "--lora_dict", '{"mode": "attn-only", "r": 1, "dora": 1}', "--epochs", "7", "--dry_run"]
    multitask_classifier.main([*tiny_flags, *flags])
    # A, B of rank 1 and the magnitudes: three vectors for each of query, key and value in two layers, 32 wide
    count, text = 2 * 3 * 3 * 32, capsys.readouterr().out
    assert re.search(rf"^adapters sentiment +{count} +{count} +100\.0%$", text, re.MULTILINE)
    assert re.search(r"^backbone sentiment +[\d,]+ +0 +0\.0%$", text, re.MULTILINE)


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """A folder with links to the scripts, and an ensemble of two members, the first of which has two votes."""
    for script in ("multitask_classifier.py", "ensemble.py", "Makefile", "requirements.txt"):
        (tmp_path / script).symlink_to(ROOT / script)
    ensembles = tmp_path / "recipes" / "r0" / "ensembles"
    ensembles.mkdir(parents=True)
    (ensembles / "two.args").write_text(
        "# Two.\n--run_dir runs/r0/two --filepaths\nruns/r0/a.pt\nruns/r0/b.pt\nruns/r0/a.pt\n", encoding="utf-8"
    )
    for name in ("a", "b"):
        flags = f"--run_dir runs/r0/{name} --filepath runs/r0/{name}.pt --no_tensorboard\n"
        (tmp_path / "recipes" / "r0" / f"{name}.args").write_text(flags, encoding="utf-8")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "run.done").touch()
    return tmp_path


def make(folder: Path, *words: str) -> str:
    """Return what make prints in `folder`, with this Python instead of a venv."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    command = ["make", f"BIN={folder / 'bin'}", f"VENV={folder / 'venv'}", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_goes_on_where_it_stopped(
    workshop: Path, tiny_flags: list[str], small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*tiny_flags, "--max_train_examples", "8"]
    target = ("ensemble-two", f"DATA={small_data}", f"FLAGS={shlex.join(flags)}")
    plan = make(workshop, "-n", *target).splitlines()
    trained = [line.split()[2] for line in plan if "multitask_classifier.py" in line]
    assert trained == ["@recipes/r0/a.args", "@recipes/r0/b.args"]

    # a is killed after its first epoch, when its checkpoint is written, and b before the end of its first epoch
    save_state = Trainer.save_state

    def killed(trainer: Trainer) -> None:
        save_state(trainer)
        kill_myself()

    with monkeypatch.context() as patch:
        patch.chdir(workshop)
        patch.setattr(Trainer, "save_state", killed)
        words = ["@recipes/r0/a.args", "--data_dir", str(small_data), *flags]
        assert Child(lambda: multitask_classifier.main(words), workshop / "killed").wait() == -signal.SIGKILL
    runs = workshop / "runs" / "r0"
    first_epoch = (runs / "a" / "metrics.jsonl").read_bytes()
    assert (runs / "a.pt").exists() and not (runs / "a" / "scores.json").exists()
    (runs / "b").mkdir()
    shutil.copy(runs / "a" / "config.json", runs / "b")

    make(workshop, *target)
    both = (runs / "a" / "metrics.jsonl").read_bytes()
    assert both.startswith(first_epoch) and both.count(b"\n") == 2
    assert read_json(runs / "a" / "config.json")["run"]["overwrite"] is False
    assert read_json(runs / "b" / "config.json")["run"]["overwrite"] is True
    assert read_json(runs / "two" / "scores.json")["votes"] == {"runs/r0/a.pt": 2, "runs/r0/b.pt": 1}

    plan = make(workshop, "-n", *target)
    assert "multitask_classifier.py" not in plan and "ensemble.py @recipes/r0/ensembles/two.args" in plan
    shutil.rmtree(runs / "b")
    plan = make(workshop, "-n", *target)
    assert "@recipes/r0/b.args" in plan and "@recipes/r0/a.args" not in plan
