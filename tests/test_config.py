"""The command line: every command that R0 prints, recipes, every flag once, bounds, contradictions and round trips."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import ensemble
from cli.parser import build_parser, expand_arguments, parse
from config import ARCHS, GROUPS, ComputeOptions, Config, EnsembleOptions, FileOptions, TaskOptions
from evaluation import combine
from tasks import SST, TASKS, Task
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ROOT / "tests" / "options.txt"
FILMS = Task(
    name="films",
    title="Film reviews",
    kind="classes",
    label_column="sentiment",
    label_range=(0, 1),
    text_columns=("sentence",),
    files={"train": "films-train.csv", "dev": "films-dev.csv", "test": "films-test-student.csv"},
    prediction_column="Predicted_Sentiment",
    backbone="sentiment",
    losses=("ce",),
    lr_multiplier=2.0,
    weight_decay=1e-3,
    lr_floor=1 / 4,
    aliases=("movies",),
    by_default=False,
)


def configure(*words: object, tasks: dict[str, Task] = TASKS) -> Config:
    return parse([str(word) for word in words], tasks, "multitask_classifier.py", "Test.")


def refusal(*words: object) -> str:
    """The one line of the UserError that a command line ends in."""
    with pytest.raises(UserError) as error:
        configure(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def exit_line(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What is printed of a command line that argparse refuses: one line, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        configure(*words)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    return printed.err


# ---------------------------------------------------------------------------------------------- the commands of R0

# As printed; the line breaks are those of the page.
DUALITY = {
    "Duality of Robust Men": """-fine-tune-mode iterative -optim RAdam
-sst_lr_multiplier 5 -para_weight_decay 1e-4 -lr 1e-4 -use_gpu -amp
-batch_size 64 -train_sst -train_quora -train_sts -clf conv -epochs 10""",
    "Duality of Faster Men": """-fine-tune-mode iterative
-sst_lr_multiplier 5 -para_weight_decay 1e-4 -lr 2.1e-4 -use_gpu -amp
-batch_size 64 -train_sst -train_quora -train_sts -clf conv""",
    "Duality of Slow Men": """-fine-tune-mode full-model
-sst_lr_multiplier 5 -para_weight_decay 1e-4 -lr 5e-5 -use_gpu -amp
-batch_size 64 -train_sst -train_quora -train_sts -clf conv""",
    "Duality of Nonlinear Men": """-fine-tune-mode iterative
-sst_lr_multiplier 5 -para_weight_decay 1e-4 -lr 1e-4 -use_gpu -amp
-batch_size 64 -train_sst -train_quora -train_sts -clf nonlinear""",
    "Mega Duality": """-fine-tune-mode iterative
-sst_lr_multiplier 5 -para_weight_decay 1e-4 -lr 1e-4 -use_gpu -amp
-batch_size 64 -train_sst -train_quora -train_sts -clf conv -epochs 20""",
}
# name: mode, optimizer, lr, head, epochs
DUALITY_VALUES = {
    "Duality of Robust Men": ("iterative", "RAdam", 1e-4, "conv", 10),
    "Duality of Faster Men": ("iterative", "Adamax", 2.1e-4, "conv", 7),
    "Duality of Slow Men": ("full-model", "Adamax", 5e-5, "conv", 7),
    "Duality of Nonlinear Men": ("iterative", "Adamax", 1e-4, "nonlinear", 7),
    "Mega Duality": ("iterative", "Adamax", 1e-4, "conv", 20),
}
YIN_YANG = {
    "Yin Yang": """-fine-tune-mode iterative -lr 1e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 8e-3 -para_weight_decay 1e-5 -sts_weight_decay 9e-3
-lr_lambda 0.55 -optim Adamax -sst_lr_multiplier 7 -para_lr_multiplier 1.0
-sts_lr_multiplier 3 -epochs 7""",
    "Yang Yin": """-fine-tune-mode iterative -lr 1e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 8e-3 -para_weight_decay 1e-5 -sts_weight_decay 9e-3
-lr_lambda 0.55 -optim Adamax -sst_lr_multiplier 3 -para_lr_multiplier 4
-sts_lr_multiplier 1 -epochs 7""",
    "Fast": """-fine-tune-mode iterative -lr 1.5e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 8e-3 -para_weight_decay 1e-5 -sts_weight_decay 9e-3
-lr_lambda 0.55 -optim Adamax -sst_lr_multiplier 5 -para_lr_multiplier 5
-sts_lr_multiplier 2 -epochs 7""",
    "Steady Hand": """-fine-tune-mode iterative -lr 1e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 9e-3 -para_weight_decay 1e-5 -sts_weight_decay 1e-2
-lr_lambda 0.5 -optim Adamax -sst_lr_multiplier 4 -para_lr_multiplier 5
-sts_lr_multiplier 3 -epochs 7""",
    "The Parabola": """-fine-tune-mode iterative -lr 1e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 9e-3 -para_weight_decay 1e-5 -sts_weight_decay 1e-2
-lr_lambda 0.5 -optim Adamax -sst_lr_multiplier 3 -para_lr_multiplier 8
-sts_lr_multiplier 1 -epochs 7""",
    "Yin Yang 2": """-fine-tune-mode iterative -lr 1e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 9e-3 -para_weight_decay 1e-5 -sts_weight_decay 1e-2
-lr_lambda 0.5 -optim Adamax -sst_lr_multiplier 4 -para_lr_multiplier 1.0
-sts_lr_multiplier 3 -epochs 7""",
    "Steady Hand 2": """-fine-tune-mode iterative -lr 1e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 9e-3 -para_weight_decay 1e-5 -sts_weight_decay 1e-2
-lr_lambda 0.5 -optim Adamax -sst_lr_multiplier 3 -para_lr_multiplier 4
-sts_lr_multiplier 2 -epochs 7""",
    "Steady Hand 3": """-fine-tune-mode iterative -lr 1e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 9e-3 -para_weight_decay 1e-5 -sts_weight_decay 1e-2
-lr_lambda 0.55 -optim Adamax -sst_lr_multiplier 4 -para_lr_multiplier 5
-sts_lr_multiplier 3 -epochs 7""",
    "Steady Hand 4": """-fine-tune-mode iterative -lr 1e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 9e-3 -para_weight_decay 1e-5 -sts_weight_decay 1e-2
-lr_lambda 0.6 -optim Adamax -sst_lr_multiplier 2 -para_lr_multiplier 3
-sts_lr_multiplier 2 -epochs 7""",
    "Steady Hand 5": """-fine-tune-mode iterative -lr 1e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 9e-3 -para_weight_decay 1e-5 -sts_weight_decay 1e-2
-lr_lambda 0.5 -optim Adamax -sst_lr_multiplier 5 -para_lr_multiplier 6
-sts_lr_multiplier 4 -epochs 7""",
    "Steady Hand 6": """-fine-tune-mode iterative -lr 1e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 9e-3 -para_weight_decay 1e-5 -sts_weight_decay 1e-2
-lr_lambda 0.5 -optim Adamax -sst_lr_multiplier 6 -para_lr_multiplier 7
-sts_lr_multiplier 5 -epochs 7""",
    "Run it Back": """-fine-tune-mode iterative -lr 1e-4
-use_gpu -amp -batch_size 64 -train_sst -train_quora -train_sts -clf conv
-sst_weight_decay 9e-3 -para_weight_decay 1e-5 -sts_weight_decay 1e-2
-lr_lambda 0.55 -optim Adamax -sst_lr_multiplier 4 -para_lr_multiplier
1.0 -sts_lr_multiplier 3 -epochs 7 -num_sst_trains 2 -num_quora_trains 1
-num_sts_trains 5""",
    "Interleaver": """--fine-tune-mode iterative --lr 1e-4
  --use_gpu --amp --batch_size 64 --train_sst --train_quora --
  train_sts --clf conv --sst_weight_decay 8e-3 --para_weight_decay 1
  e-5 --sts_weight_decay 9e-3 --lr_lambda 0.55 --optim Adamax --
  sst_lr_multiplier 4 --para_lr_multiplier 1.0 --sts_lr_multiplier 3
  --epochs 7 --num_sst_trains 5 --num_quora_trains 1 --
  num_sts_trains 5""",
    "Interleaver more para": """--fine-tune-mode iterative --lr 1e-4
  --use_gpu --amp --batch_size 64 --train_sst --train_quora --
  train_sts --clf conv --sst_weight_decay 8e-3 --para_weight_decay 1
  e-5 --sts_weight_decay 9e-3 --lr_lambda 0.55 --optim Adamax --
  sst_lr_multiplier 3 --para_lr_multiplier 4 --sts_lr_multiplier 2
  --epochs 7 --num_sst_trains 4 --num_quora_trains 1 --
  num_sts_trains 4""",
    "Interleaver fast": """--fine-tune-mode iterative --lr 1.5e-4
  --use_gpu --amp --batch_size 64 --train_sst --train_quora --
  train_sts --clf conv --sst_weight_decay 8e-3 --para_weight_decay 1
  e-5 --sts_weight_decay 9e-3 --lr_lambda 0.55 --optim Adamax --
  sst_lr_multiplier 5 --para_lr_multiplier 5 --sts_lr_multiplier 2
  --epochs 7 --num_sst_trains 3 --num_quora_trains 1 --
  num_sts_trains 3""",
    "Interleaver steady hand": """--fine-tune-mode iterative --lr 1e-4
  --use_gpu --amp --batch_size 64 --train_sst --train_quora --
  train_sts --clf conv --sst_weight_decay 9e-3 --para_weight_decay 1
  e-5 --sts_weight_decay 1e-2 --lr_lambda 0.5 --optim Adamax --
  sst_lr_multiplier 4 --para_lr_multiplier 5 --sts_lr_multiplier 3
  --epochs 7 --num_sst_trains 5 --num_quora_trains 1 --
  num_sts_trains 5""",
    "Interleaver the parabola": """--fine-tune-mode iterative --lr 1e-4
  --use_gpu --amp --batch_size 64 --train_sst --train_quora --
  train_sts --clf conv --sst_weight_decay 9e-3 --para_weight_decay 1
  e-5 --sts_weight_decay 1e-2 --lr_lambda 0.5 --optim Adamax --
  sst_lr_multiplier 3 --para_lr_multiplier 8 --sts_lr_multiplier 2
  --epochs 7 --num_sst_trains 2 --num_quora_trains 2 --
  num_sts_trains 2""",
    "Interleaver 2": """--fine-tune-mode iterative --lr 1e-4
  --use_gpu --amp --batch_size 64 --train_sst --train_quora --
  train_sts --clf conv --sst_weight_decay 9e-3 --para_weight_decay 1
  e-5 --sts_weight_decay 1e-2 --lr_lambda 0.5 --optim Adamax --
  sst_lr_multiplier 4 --para_lr_multiplier 2.0 --sts_lr_multiplier 4
  --epochs 7 --num_sst_trains 10 --num_quora_trains 1 --
  num_sts_trains 10""",
}
# name: lr, decay of SST and STS, lambda, multipliers of SST, Quora and STS, rounds of SST, Quora and STS
YIN_YANG_VALUES = {
    "Yin Yang": (1e-4, 8e-3, 9e-3, 0.55, (7, 1, 3), (1, 1, 1)),
    "Yang Yin": (1e-4, 8e-3, 9e-3, 0.55, (3, 4, 1), (1, 1, 1)),
    "Fast": (1.5e-4, 8e-3, 9e-3, 0.55, (5, 5, 2), (1, 1, 1)),
    "Steady Hand": (1e-4, 9e-3, 1e-2, 0.5, (4, 5, 3), (1, 1, 1)),
    "The Parabola": (1e-4, 9e-3, 1e-2, 0.5, (3, 8, 1), (1, 1, 1)),
    "Yin Yang 2": (1e-4, 9e-3, 1e-2, 0.5, (4, 1, 3), (1, 1, 1)),
    "Steady Hand 2": (1e-4, 9e-3, 1e-2, 0.5, (3, 4, 2), (1, 1, 1)),
    "Steady Hand 3": (1e-4, 9e-3, 1e-2, 0.55, (4, 5, 3), (1, 1, 1)),
    "Steady Hand 4": (1e-4, 9e-3, 1e-2, 0.6, (2, 3, 2), (1, 1, 1)),
    "Steady Hand 5": (1e-4, 9e-3, 1e-2, 0.5, (5, 6, 4), (1, 1, 1)),
    "Steady Hand 6": (1e-4, 9e-3, 1e-2, 0.5, (6, 7, 5), (1, 1, 1)),
    "Run it Back": (1e-4, 9e-3, 1e-2, 0.55, (4, 1, 3), (2, 1, 5)),
    "Interleaver": (1e-4, 8e-3, 9e-3, 0.55, (4, 1, 3), (5, 1, 5)),
    "Interleaver more para": (1e-4, 8e-3, 9e-3, 0.55, (3, 4, 2), (4, 1, 4)),
    "Interleaver fast": (1.5e-4, 8e-3, 9e-3, 0.55, (5, 5, 2), (3, 1, 3)),
    "Interleaver steady hand": (1e-4, 9e-3, 1e-2, 0.5, (4, 5, 3), (5, 1, 5)),
    "Interleaver the parabola": (1e-4, 9e-3, 1e-2, 0.5, (3, 8, 2), (2, 2, 2)),
    "Interleaver 2": (1e-4, 9e-3, 1e-2, 0.5, (4, 2, 4), (10, 1, 10)),
}
MEMBERS = {  # every file in the ensembles of R0
    "duality": "g6-duality-of-man.pt duality-of-fast-man.pt duality-of-long-distance-runners-20.pt "
    "duality-of-man-nonlinear.pt duality-of-slow-man.pt duality-of-robust-men.pt",
    "yin yang": "g6-yin-yang.pt g6-yang-yin.pt g6-yin-yang-fast.pt g6-yin-yang-steady-hand.pt "
    "g6-yang-yin-the-parabola.pt g6-yin-yang-2.pt",
    "interleaver": "g6-interleaver.pt g6-interleaver-more-para.pt g6-interleaver-fast.pt "
    "g6-interleaver-steady-hand.pt g6-interleaver-the-parabola.pt g6-interleaver-2.pt",
}
ENSEMBLES = {
    "minimal": ("model1.pt model2.pt", 2),
    "H.2": (f"-filepaths {MEMBERS['duality']}", 6),
    "I.7": (f"-filepaths {MEMBERS['yin yang']}", 6),
    "K": (f"--filepaths {MEMBERS['interleaver']}", 6),
    "L.1": (f"-filepaths {MEMBERS['yin yang']} {MEMBERS['duality']}", 12),
    "Oligarchy v1": (
        f"-filepaths {MEMBERS['yin yang']} {MEMBERS['duality']} g6-yin-yang-steady-hand.pt g6-yin-yang-steady-hand.pt",
        14,
    ),
    "Oligarchy v2": (
        f"-filepaths {MEMBERS['yin yang']} {MEMBERS['duality']} g6-yin-yang-steady-hand.pt g6-yin-yang-steady-hand.pt "
        "g6-yin-yang.pt g6-yang-yin.pt g6-yang-yin-the-parabola.pt duality-of-robust-men.pt",
        18,
    ),
    "Lisan al Gaib": (
        f"-filepaths {MEMBERS['yin yang']} {MEMBERS['duality']} {MEMBERS['interleaver']} g6-yin-yang-steady-hand-2.pt "
        "g6-yin-yang-steady-hand-3.pt g6-yin-yang-steady-hand-4.pt g6-yin-yang-steady-hand-5.pt "
        "g6-yin-yang-steady-hand-6.pt",
        23,
    ),
    "The Sage": (
        f"-filepaths {MEMBERS['yin yang']} g6-duality-of-man.pt duality-of-man-nonlinear.pt duality-of-slow-man.pt "
        "duality-of-robust-men.pt g6-interleaver-steady-hand.pt g6-yin-yang-steady-hand-2.pt "
        "g6-yin-yang-steady-hand-3.pt g6-yin-yang-steady-hand-4.pt g6-yin-yang-steady-hand-5.pt "
        "g6-yin-yang-steady-hand-6.pt",
        16,
    ),
}


def unwrapped(printed: str) -> list[str]:
    """The words of a printed command: the page also breaks lines after `--` and within 1e-5."""
    return shlex.split(re.sub(r"(?<= --)\n\s*|(?<= 1)\n\s*(?=e-)", "", printed))


def machine(config: Config) -> tuple[bool, bool, int, list[str]]:
    return config.compute.use_gpu, config.compute.amp, config.train.batch_size, list(config.tasks)


@pytest.mark.parametrize("name", DUALITY)
def test_duality_commands_of_r0(name: str) -> None:
    config = configure(*unwrapped(DUALITY[name]))
    train = config.train
    found = (train.fine_tune_mode, train.optim, train.lr, config.model.clf, train.epochs)
    assert found == DUALITY_VALUES[name]
    assert machine(config) == (True, True, 64, ["sst", "para", "sts"])
    assert config.tasks["sst"].lr_multiplier == 5.0 and config.tasks["para"].weight_decay == 1e-4
    assert config.tasks["sst"].weight_decay == 9e-3 and config.tasks["para"].lr_multiplier == 5.0  # not given
    assert config.tasks["sts"] == replace(TaskOptions(True, 3.0, 1e-2), loss="pearson")


@pytest.mark.parametrize("name", YIN_YANG)
def test_yin_yang_and_interleaver_commands_of_r0(name: str) -> None:
    config = configure(*unwrapped(YIN_YANG[name]))
    tasks = list(config.tasks.values())
    assert (
        config.train.lr,
        tasks[0].weight_decay,
        tasks[2].weight_decay,
        config.train.lr_lambda,
        tuple(task.lr_multiplier for task in tasks),
        tuple(task.num_trains for task in tasks),
    ) == YIN_YANG_VALUES[name]
    assert machine(config) == (True, True, 64, ["sst", "para", "sts"])
    assert (config.train.fine_tune_mode, config.train.optim, config.train.epochs) == ("iterative", "Adamax", 7)
    assert config.model.clf == "conv" and tasks[1].weight_decay == 1e-5


def test_the_listings_are_complete() -> None:
    assert set(DUALITY) == set(DUALITY_VALUES) and set(YIN_YANG) == set(YIN_YANG_VALUES)
    assert len(DUALITY) + len(YIN_YANG) == 23 and len(ENSEMBLES) == 9


@pytest.mark.parametrize("name", ENSEMBLES)
def test_ensemble_commands_of_r0(name: str, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser is that of the script's main; only what comes after it is replaced."""
    taken: list[list[str]] = []
    monkeypatch.setattr(combine, "run_ensemble", lambda names, *options: taken.append(list(names)))
    command, members = ENSEMBLES[name]
    ensemble.main([*shlex.split(command), "--data_dir", str(small_data)])
    assert taken == [[word for word in command.split() if word.endswith(".pt")]]
    assert len(taken[0]) == members


# --------------------------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size", "-batch_size", "-batch-size"])
def test_one_flag_has_many_spellings(flag: str) -> None:
    assert configure(flag, 5).train.batch_size == 5
    assert configure(f"{flag}=5").train.batch_size == 5


@pytest.mark.parametrize(
    "words", ["-lr 3e-5", "--lr 3e-5", "--lr=3e-5", "-lr=3e-5", "--lr 0.00003", "--lr 1 --lr 3e-5"]
)
def test_values_keep_their_dashes(words: str) -> None:
    assert configure(*words.split()).train.lr == 3e-5


def test_quora_answers_to_both_names() -> None:
    for name in ("para", "quora"):
        config = configure(
            f"--train_{name}", f"--{name}_lr_multiplier", 7, f"-{name}-weight-decay", 0.5, f"--num-{name}-trains", 3,
            f"--{name}_train", "a-b.csv", f"--{name}_dev=c-d.csv", f"--{name}-test", "e.csv", f"--{name}_loss", "bce",
        )  # fmt: skip
        assert config.tasks == {"para": TaskOptions(True, 7.0, 0.5, 3, "bce", "a-b.csv", "c-d.csv", "e.csv")}


def test_only_flags_are_respelled() -> None:
    words = ["-clf", "conv", "--name", "a-b-c", "--run_dir=x-y/z", "-h", "-", "-1", "1e-5", "--predict", "-"]
    wanted = ["--clf", "conv", "--name", "a-b-c", "--run_dir=x-y/z", "-h", "-", "-1", "1e-5", "--predict", "-"]
    assert expand_arguments(words) == wanted


def test_abbreviations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch 5" in exit_line(capsys, "--batch", 5)


def test_a_switch_can_be_turned_off_again() -> None:
    assert configure("--use_gpu", "--no_use_gpu").compute.use_gpu is False
    assert configure("--no_tensorboard").run.tensorboard is False
    assert configure("--no-head-batchnorm").model.head_batchnorm is False
    assert configure("--head_batchnorm", "--arch", "baseline").model.head_batchnorm is True


# ----------------------------------------------------------------------------------------------------------- recipes


def test_recipes_hold_flags_over_many_lines_with_comments_and_recipes(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner.args", tmp_path / "outer.args"
    inner.write_text("# don't mind the apostrophe\n-lr 3e-4 --batch-size 5  # and this --lr 7\n\n--name 'two words'\n")
    outer.write_text(f"--epochs 3\n@{inner}\n--batch_size\n9\n", encoding="utf-8")
    config = configure("--epochs", 1, f"@{outer}", "--clip", 0.5)
    train = config.train
    assert (train.epochs, train.lr, train.batch_size, train.clip) == (3, 3e-4, 9, 0.5)
    assert config.run.name == "two words"
    assert configure(f"@{outer}", "--lr", 1).train.lr == 1.0  # the last one holds


def test_a_hash_within_a_word_is_no_comment(tmp_path: Path) -> None:
    """As in a shell: only a # at the start of a word begins a comment."""
    recipe = tmp_path / "hash.args"
    recipe.write_text("--run_dir runs/yin#2 --epochs 3 # the second\n", encoding="utf-8")
    config = configure(f"@{recipe}")
    assert (config.run.run_dir, config.train.epochs) == ("runs/yin#2", 3)


def test_a_hash_within_quotes_is_no_comment(tmp_path: Path) -> None:
    recipe = tmp_path / "hash.args"
    recipe.write_text("--name \"run #1\" --epochs 3 # the 'second\n--lr 2 # one's\n--filepath '# a'\n--seed 5")
    config = configure(f"@{recipe}")
    assert (config.run.name, config.run.filepath) == ("run #1", "# a")
    assert (config.train.epochs, config.train.lr, config.train.seed) == (3, 2, 5)


def test_the_same_recipe_twice_is_no_circle(tmp_path: Path) -> None:
    recipe = tmp_path / "a.args"
    recipe.write_text("--epochs 3", encoding="utf-8")
    assert configure(f"@{recipe}", f"@{recipe}").train.epochs == 3


def test_a_recipe_that_includes_itself_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.args", tmp_path / "two.args"
    one.write_text(f"--epochs 3 @{two}", encoding="utf-8")
    two.write_text(f"@{one}", encoding="utf-8")
    message = refusal(f"@{one}")
    assert "one.args" in message and "includes itself" in message


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"--name 'never closed"])
def test_unreadable_recipes_are_named(tmp_path: Path, content: bytes | None) -> None:
    recipe = tmp_path / "bad.args"
    if content is not None:
        recipe.write_bytes(content)
    message = refusal("--epochs", 3, f"@{recipe}")
    assert str(recipe) in message and "cannot read flags" in message


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.args")), ids=lambda path: path.name)
def test_our_own_recipes_are_valid(recipe: Path) -> None:
    assert list(configure(f"@{recipe}").tasks) == ["sst", "para", "sts"]


# ------------------------------------------------------------------------------------------- each option is one flag


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    yield from (action for action in parser._actions if action.dest != "help")


def dests(tasks: dict[str, Task]) -> set[str]:
    """Every option of the dataclasses, as "group.option"."""
    groups = {f"{name}.{field.name}" for name, group in GROUPS.items() for field in fields(group)}
    return groups | {f"tasks.{name}.{field.name}" for name in tasks for field in fields(TaskOptions)}


def test_each_field_is_one_flag_and_each_flag_one_field() -> None:
    parser = build_parser("prog", "Test.", TASKS)
    found = [action for action in actions(parser) if not isinstance(action, argparse._StoreFalseAction)]
    assert sorted(action.dest for action in found) == sorted(dests(TASKS))
    for action in found:
        group, *task, option = action.dest.split(".")
        flags = [flag.removeprefix("--") for flag in action.option_strings]
        if group != "tasks":
            assert flags == [option]
            continue
        template = TaskOptions.__dataclass_fields__[option].metadata["template"]
        assert flags == [template.format(task=name) for name in (*task, *TASKS[task[0]].aliases)]


def test_every_field_has_help_and_every_switch_its_opposite() -> None:
    parser = build_parser("prog", "Test.", TASKS)
    assert all(action.help for action in actions(parser))
    on = {action.dest for action in actions(parser) if isinstance(action, argparse._StoreTrueAction)}
    off = {action.dest for action in actions(parser) if isinstance(action, argparse._StoreFalseAction)}
    assert on == off and "compute.use_gpu" in on and "tasks.sst.enabled" in on


def test_without_flags_the_dataclasses_defaults_hold() -> None:
    config = configure()
    for name, group in GROUPS.items():
        if name != "model":
            assert getattr(config, name) == group()
    assert config.model == GROUPS["model"]().resolved()


def test_flags_of_an_ensemble_are_a_part_of_the_same_ones() -> None:
    groups = {"data": FileOptions, "compute": ComputeOptions, "ensemble": EnsembleOptions}
    parser = build_parser("ensemble.py", "Test.", TASKS, groups, ("dev", "test"))
    found = {action.dest for action in actions(parser)}
    wanted = {f"{name}.{field.name}" for name, group in groups.items() for field in fields(group)}
    assert found == wanted | {f"tasks.{name}.{split}" for name in TASKS for split in ("dev", "test")}


def script_options(script: str) -> str:
    """Every option of a script with its metavar, from its own --help and so from its main; hidden ones left out."""
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    flags = re.findall(r"^  (-.+?)(?=  |$)", done.stdout, re.MULTILINE)
    return "\n".join([script, *sorted(f"    {flag}" for flag in flags)]) + "\n"


def test_no_option_appears_or_vanishes_unseen() -> None:
    """A new option is a decision: put its line into tests/options.txt together with it."""
    found = script_options("multitask_classifier.py") + "\n" + script_options("ensemble.py")
    assert found == OPTIONS.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- how scripts end


def ended(work: str, stdout: Any) -> tuple[int, str]:
    """Exit code and standard error of a script whose main is `work`."""
    imports = "import sys; from utils.console import run_script, say; from utils.errors import UserError; "
    code = imports + f"run_script(lambda words: ({work}))"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # what waits to be written is half of the matter
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "work",
    ["say('x')", "print('x')", "print('x' * 100_000)", "(print('x'), sys.exit())", "[say('x') for _ in range(9)]"],
)
def test_standard_output_on_a_full_disk_is_one_line(work: str) -> None:
    with open("/dev/full", "w") as full:
        assert ended(work, full) == (2, "error: [Errno 28] No space left on device\n")


def test_a_mistake_told_beside_a_full_disk_is_one_line() -> None:
    """The interpreter has nothing to complain about at its end."""
    with open("/dev/full", "w") as full:
        code, told = ended("print('x'), (_ for _ in ()).throw(UserError('a mistake'))", full)
        assert code == 2 and told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize("work", ["say('x')", "print('x')", "print('x' * 100_000)"])
def test_a_reader_who_has_gone_is_told_nothing(work: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert ended(work, writer) == (1, "")
    finally:
        os.close(writer)


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    """What was printed before stands."""
    with (tmp_path / "out").open("w") as out:
        code, told = ended("print('x'), open('/nowhere/\\n')", out)
    assert (code, told) == (2, "error: [Errno 2] No such file or directory: '/nowhere/\\n'\n")
    assert (tmp_path / "out").read_text() == "x\n"


# ------------------------------------------------------------------------------------------------ bounds and choices


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", "0"), ("--epochs", "1.5"), ("--epochs", "many"), ("--batch_size", "-3"), ("--batch_size", "0"),
        ("--lr", "0"), ("--lr", "-1e-4"), ("--lr", "nan"), ("--lr", "fast"), ("--lr", "inf"), ("--lr_lambda", "0"),
        ("--lr_lambda", "1.01"), ("--warmup", "1.5"), ("--warmup", "-0.1"), ("--clip", "0"), ("--patience", "0"),
        ("--eval_every", "0"), ("--seed", "-1"), ("--seed", "18446744073709551616"), ("--max_length", "3"),
        ("--max_bad_rows", "-1"), ("--max_train_examples", "0"), ("--head_layers", "-1"), ("--head_layers", "65"),
        ("--head_width", "0"), ("--output_dropout_prob", "1"),
        ("--hidden_dropout_prob", "1"), ("--backbone_dropout_prob", "-0.5"), ("--threads", "0"),
        ("--eval_batch_size", "0"), ("--sst_lr_multiplier", "0"), ("--para_weight_decay", "-1"),
        ("--quora_weight_decay", "-1"), ("--num_sts_trains", "-1"), ("--arch", "transformer"), ("--optim", "adam"),
        ("--lr_schedule", "steps"), ("--fine_tune_mode", "some"), ("--routine", "chaos"), ("--backbones", "many"),
        ("--pair_encoding", "both"), ("--pooling", "max"), ("--pair_layer", "deep"), ("--clf", "tree"),
        ("--head_activation", "tanh"), ("--sts_head", "none"), ("--pair_features", "u,w"), ("--sst_loss", "mse"),
        ("--sts_loss", "ce"), ("--quora_loss", "ce"),
        # what would end in an overflow, or in lists that fill the memory
        ("--sst_weight_decay", "1e300"), ("--sts_weight", "1e31"), ("--head_width", "9" * 23), ("--pal_size", "9" * 23),
        ("--lora_rank", "9" * 23),
        ("--threads", "1000000000000"), ("--num_sst_trains", "1000000000"), ("--steps_per_epoch", "1000000000"),
    ],
)  # fmt: skip
def test_bounds_and_choices(capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    line = exit_line(capsys, f"{flag}={value}")
    assert flag in line and (value in line or value.split(",")[-1] in line)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (("--lr_lambda", 1), "train.lr_lambda=1.0"), (("--max_length", 4), "data.max_length=4"),
        (("--lr_schedule", "linear", "--warmup", 0), "train.warmup=0.0"),
        (("--lr_schedule", "linear", "--warmup", 1), "train.warmup=1.0"),
        (("--max_bad_rows", 0), "data.max_bad_rows=0"), (("--head_layers", 0), "model.head_layers=0"),
        (("--head_layers", 64), "model.head_layers=64"), (("--sst_weight_decay", 0), "tasks.sst.weight_decay=0.0"),
        (("--seed", 0), "train.seed=0"), (("--epochs", 1), "train.epochs=1"), (("--clip", 1e-9), "train.clip=1e-09"),
    ],
)  # fmt: skip
def test_bounds_are_inclusive(words: tuple[Any, ...], value: str) -> None:
    path, wanted = value.split("=")
    found: Any = configure(*words).to_dict()
    for name in path.split("."):
        found = found[name]
    assert repr(found) == wanted


@pytest.mark.parametrize("flag", ["--pair_features", "--lora_targets", "--pal_tasks", "--sst_extra"])
def test_a_list_of_nothing_is_no_value(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    """As a variable that is not set would give it; it changed nothing, without a word."""
    for value in ("", ", "):
        assert f"{flag}: {value!r} names nothing" in exit_line(capsys, f"{flag}={value}")


def test_what_is_no_number_is_not_called_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("nan", "inf", "-inf"):
        assert f"--lr: {value} is not a finite number" in exit_line(capsys, f"--lr={value}")


def test_a_learning_rate_beyond_any_float_is_refused() -> None:
    line = refusal("--lr", 1e20, "--sts_lr_multiplier", 1e20)
    assert "--lr 1e+20 times --sts_lr_multiplier 1e+20" in line and "--sst_lr_multiplier" not in line


def test_unknown_flags_and_words_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--learning_rate" in exit_line(capsys, "--learning-rate", 3)
    assert "surplus" in exit_line(capsys, "surplus")
    assert "--epochs" in exit_line(capsys, "--epochs")
    assert "--train_imdb" in exit_line(capsys, "--train_imdb")


def test_pair_features_are_separated_by_commas_or_spaces() -> None:
    assert configure("--pair_features", "u,abs,cos").model.pair_features == ("u", "abs", "cos")
    assert configure("--pair_features", "u abs  cos,").model.pair_features == ("u", "abs", "cos")


# ---------------------------------------------------------------------------------------------------- combinations


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--pair_encoding cross --pair_features u,v", ("--pair_features", "--pair_encoding")),
        ("--pair_encoding cross --sts_head cosine", ("--sts_head", "--pair_encoding")),
        ("--arch v2 --sts_head cosine", ("--sts_head", "--pair_encoding")),
        ("--arch v2 --pair_encoding siamese", ("--pair_encoding", "--pair_features")),
        ("--sts_projection", ("--sts_projection", "--sts_head")),
        ("--arch cosine --pair_encoding cross --sts_projection", ("--sts_projection", "--pair_encoding")),
        ("--clf linear --head_layers 2", ("--head_layers", "--clf")),
        ("--clf linear --head_width 5", ("--head_width", "--clf")),
        ("--clf mlp --head_layers 0 --head_width 5", ("--head_width", "--head_layers")),
        ("--clf conv --output_dropout_prob .1", ("--output_dropout_prob", "--clf mlp")),
        ("--clf mlp --head_layers 0 --output_dropout_prob .1", ("--output_dropout_prob", "--head_layers")),
        ("--clf mlp --head_batchnorm", ("--head_batchnorm", "--clf")),
        ("--pair_features cos --pair_layer none", ("--pair_features cos", "--clf conv")),
        ("--pair_layer none --shared_batchnorm_stats", ("--shared_batchnorm_stats", "--pair_layer")),
        ("--predict x.txt --task sst", ("--predict", "--evaluate")),
        ("--predict x.txt --evaluate a.pt", ("--predict", "--task")),
        ("--predict x.txt --evaluate a.pt --task mnli", ("--task mnli", "sst")),
        ("--overwrite --resume --run_dir x", ("--overwrite", "--resume")),
        ("--resume", ("--resume", "--run_dir")),
        ("--optim SparseAdam", ("--optim SparseAdam", "Adam")),
        ("--decoupled --optim AdamW", ("--decoupled", "--optim")),
        ("--cache_frozen --fine_tune_mode full-model", ("--cache_frozen", "--fine_tune_mode full-model")),
        ("--cache_frozen --fine_tune_mode last-layer --lora_mode attn", ("--cache_frozen", "--lora_mode")),
        ("--cache_frozen --fine_tune_mode last-layer --init_peft x", ("--cache_frozen", "last-layer")),
        ("--cache_frozen --sst_embedding_loss simcse", ("--cache_frozen", "--sst_embedding_loss simcse")),
        ("--lr_cycle cumulative --lr_schedule cosine", ("--lr_cycle", "--lr_schedule")),
        ("--warmup .3", ("--warmup", "--lr_schedule linear")),
        ("--lr_lambda .9 --lr_schedule cosine", ("--lr_lambda", "--lr_schedule lambda")),
        ("--use_gpu --amp --cuda_graphs --benchmark a.csv", ("--cuda_graphs", "--benchmark")),
        ("--run_dir a --name b", ("--name", "--run_dir")),
        ("--sst_weight 0 --quora_weight 0 --sts_weight 0", ("--NAME_weight", "0")),
        ("--train_sst --sst_weight 0", ("--NAME_weight", "0")),
        ("--routine random --num_sts_trains 2", ("--num_sts_trains", "--routine")),
        ("--unfreeze_every 2 --fine_tune_mode full-model", ("--unfreeze_every", "--fine_tune_mode")),
        ("--smart_steps 2", ("--smart_steps", "--NAME_smart")),
        ("--sst_smart 1 --cache_frozen", ("--sst_smart", "--cache_frozen")),
        ("--pcgrad --routine interleave", ("--pcgrad", "--routine")),
        ("--routine joint --num_sst_trains 3", ("--num_sst_trains", "--routine")),
        ("--routine joint --steps_per_epoch 3", ("--steps_per_epoch", "joint")),
        ("--steps_per_epoch 10", ("--steps_per_epoch", "--routine")),
        ("--anneal_factor 0.5 --routine random", ("--anneal_factor", "--routine annealed")),
        ("--cache_frozen --sts_embedding_loss ranking", ("--cache_frozen", "--sts_embedding_loss ranking")),
        ("--sst_embedding_loss ranking", ("--sst_embedding_loss ranking", "pair task")),
        ("--sts_embedding_weight 2", ("--sts_embedding_weight", "--sts_embedding_loss")),
        ("--sst_embedding_loss contrastive", ("--sst_embedding_loss contrastive", "pair task")),
        ("--arch v2 --para_embedding_loss contrastive", ("--para_embedding_loss contrastive", "--pair_encoding")),
        ("--sst_embedding_loss simcse --backbone_dropout_prob 0", ("--sst_embedding_loss", "--backbone_dropout_prob")),
        ("--cuda_graphs --amp", ("--cuda_graphs", "--use_gpu")),
        ("--cuda_graphs --use_gpu", ("--cuda_graphs", "--amp")),
        ("--cuda_graphs --use_gpu --amp --cache_frozen", ("--cuda_graphs", "--cache_frozen")),
        ("--cuda_graphs --use_gpu --amp --mlm", ("--cuda_graphs", "--mlm")),
        ("--ema_decay .9", ("--ema_decay", "--average ema")),
        ("--ema_every epoch --average swa", ("--ema_every", "--average ema")),
        ("--ema_warmup", ("--ema_warmup", "--average ema")),
        ("--swa_from_epoch 2 --average ema", ("--swa_from_epoch", "--average swa")),
        ("--swa_from_epoch 8 --average swa", ("--swa_from_epoch", "--epochs")),
        ("--quora_from_epoch 8", ("--para_from_epoch 8", "--epochs 7")),
        ("--evaluate a.pt --train_para", ("--evaluate", "--train_para")),
        ("--evaluate a.pt --lr 1e-4 --quora_weight 2", ("--evaluate", "--lr, --para_weight")),
        ("--evaluate a.pt --predict x.txt --task sst --data_dir d", ("--predict", "--data_dir")),
        ("--evaluate a.pt --export d --sst_dev x.csv", ("--export", "--sst_dev")),
        ("--evaluate a.pt --export_peft d --run_dir r", ("--export_peft", "--run_dir")),
        ("--task sst", ("--task", "--predict")),
        ("--train_sst --num_sst_trains 0", ("--num_NAME_trains", "0")),
        ("--no_train_sst --no_train_para --no_train_sts", ("--train_NAME", "task")),
    ],
)
def test_contradictions_name_both_flags(words: str, named: tuple[str, str]) -> None:
    message = refusal(*words.split())
    assert named[0] in message and named[1] in message


def test_flags_that_evaluation_looks_at() -> None:
    """All others are refused, even where they repeat a default: they would change nothing."""
    run = "--data_dir d --max_bad_rows 1 --run_dir r --no_test_predictions --quora_dev x --sst_test y"
    machine = "--use_gpu --amp --threads 1 --eval_batch_size 8"
    configure("--evaluate", "a.pt", *run.split(), *machine.split())
    configure("--evaluate", "a.pt", "--predict", "x", "--task", "sst", "--pretrained", "b", *machine.split())
    configure("--evaluate", "a.pt", "--export", "x", "--export_peft", "y", *machine.split())
    assert "--epochs would" in refusal("--evaluate", "a.pt", "--epochs", 7)


def test_every_problem_is_reported_at_once() -> None:
    message = refusal("--overwrite", "--resume", "--optim", "SparseAdam", "--predict", "x.txt")
    for flag in ("--overwrite", "--run_dir", "SparseAdam", "--evaluate", "--task"):
        assert flag in message


def test_problems_of_the_model_are_reported_with_the_others() -> None:
    message = refusal("--pair_encoding", "cross", "--sts_head", "cosine", "--optim", "SparseAdam")
    assert "--sts_head" in message and "SparseAdam" in message


def test_tasks_that_train() -> None:
    assert list(configure().tasks) == ["sst", "para", "sts"]
    assert all(task.enabled for task in configure().tasks.values())
    assert list(configure("--train_sts", "--train_sst").tasks) == ["sst", "sts"]  # in the table's order
    assert list(configure("--train_quora").tasks) == ["para"]
    assert list(configure("--no_train_sts").tasks) == ["sst", "para"]
    assert list(configure("--sst_lr_multiplier", 2).tasks) == ["sst", "para", "sts"]


@pytest.mark.parametrize("arch", list(ARCHS))
def test_an_arch_decides_what_is_left_out(arch: str) -> None:
    config, choices = configure("--arch", arch), ARCHS[arch]
    unused = {"linear": {"head_layers"}, "nonlinear": {"head_layers"}}.get(choices.clf, set())
    for field in fields(choices):
        if field.name != "similarity_loss":
            wanted = None if field.name in unused else getattr(choices, field.name)
            assert getattr(config.model, field.name) == wanted
    assert config.tasks["sts"].loss == choices.similarity_loss
    assert configure("--arch", arch, "--sts_loss", "mse").tasks["sts"].loss == "mse"
    assert configure("--arch", arch, "--clf", "linear", "--no_head_batchnorm").model.clf == "linear"


# -------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("words", [(), ("--arch", "v2", "--clip", 1, "--train_sst"), ("--pair_features", "u,v,cos")])
def test_config_round_trip(words: tuple[Any, ...]) -> None:
    config = configure(*words)
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--arch", "v2", "--clip", 1, "--train_sst"),
        ("--pair_features", "u,v,cos"),
        ("--pal", "pal", "--pal_tasks", "sst"),
        ("--sst_extra", "a.csv,b.csv"),
    ],
)
def test_config_round_trip_through_json(words: tuple[Any, ...]) -> None:
    config = configure(*words)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_options_younger_than_a_saved_configuration_have_their_defaults() -> None:
    saved = configure("--epochs", 3).to_dict()
    del saved["pal"], saved["train"]["anneal_factor"]
    assert Config.from_dict(saved) == configure("--epochs", 3)


def test_an_unknown_option_in_a_saved_configuration_is_refused() -> None:
    saved = configure().to_dict()
    saved["train"]["momentum"] = 0.9
    with pytest.raises(TypeError, match="momentum"):
        Config.from_dict(saved)


# ---------------------------------------------------------------------------------------------------- help, a new task


@pytest.mark.parametrize("script", ["multitask_classifier.py", "ensemble.py"])
def test_help_is_quick_and_complete(script: str) -> None:
    """Help and a wrong flag must not wait for torch."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = [{script!r}, '--help']\n"
        f"try:\n    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        times.append(time.perf_counter() - started)
        assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("False False\n")
    assert min(times) < 1.0
    heads = {"Data", "Machine", *(task.title for task in TASKS.values())}
    heads |= {"Model", "Training", "Run"} if script == "multitask_classifier.py" else {"Ensemble"}
    for head in heads:
        assert re.search(rf"^{head}\b.*:$", done.stdout, re.MULTILINE), head
    assert script in done.stdout


def test_help_names_every_visible_flag() -> None:
    text = " ".join(build_parser("prog", "Test.", TASKS).format_help().split())
    for action in actions(build_parser("prog", "Test.", TASKS)):
        if action.help != argparse.SUPPRESS:
            assert all(re.search(rf"{flag}\b", text) for flag in action.option_strings)
    assert "default: 0.0001" in text and "default: 0.009" in text  # --lr and --sst_weight_decay
    for flag, default in {"lora_rank": "1", "lora_dropout": "0.0", "num_sts_trains": "1", "sts_smart": "0.0"}.items():
        assert re.search(rf"--{flag} . ((?!--).)*\(default: {default}\)", text), flag  # though 1 == True, 0.0 == False


def test_a_further_row_creates_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    table = {**TASKS, "films": FILMS}
    parser = build_parser("prog", "Test.", table)
    assert {action.dest for action in actions(parser)} == dests(table)
    config = configure("--train_movies", "--films_lr_multiplier", 9, "--num_movies_trains", 2, tasks=table)
    assert config.tasks == {"films": TaskOptions(True, 9.0, 1e-3, 2, "ce")}
    assert list(configure(tasks=table).tasks) == ["sst", "para", "sts"]  # it trains only when it is asked for
    assert configure("--evaluate", "a.pt", "--films_dev", "x.csv", tasks=table).tasks["films"].dev == "x.csv"
    both = configure("--train_sst", "--train_films", "--films_dev", "x.csv", tasks=table).tasks
    assert list(both) == ["sst", "films"] and both["films"].dev == "x.csv"
    by_default = replace(FILMS, by_default=True)
    assert list(configure(tasks={"sst": SST, "films": by_default}).tasks) == ["sst", "films"]
    assert parser.format_help().count("Film reviews") > 1


@pytest.mark.parametrize("lr", [0.0, 1e300])
def test_a_saved_value_at_an_open_bound_or_beyond_is_refused(lr: float) -> None:
    saved = configure().to_dict()
    saved["train"]["lr"] = lr
    with pytest.raises(TypeError, match=re.escape(f"lr {lr}")):
        Config.from_dict(saved)


@pytest.mark.parametrize(("group", "name"), [("model", "pair_features"), ("pal", "pal_tasks"), ("tasks", "extra")])
@pytest.mark.parametrize("value", ["uv", 5])
def test_a_saved_value_that_is_no_list_where_one_belongs_is_refused(group: str, name: str, value: Any) -> None:
    saved = configure().to_dict()
    (saved["tasks"]["sst"] if group == "tasks" else saved[group])[name] = value
    with pytest.raises(TypeError, match=f"^{name} {value!r}$"):
        Config.from_dict(saved)
