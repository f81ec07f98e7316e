"""The command line: spellings, files of flags, each option as one flag, values, help, and a further task."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
from helpers import FILMS, ROOT, configure, refusal, shell

import multitask_classifier
from cli.parser import build_parser, expand_arguments
from cli.suggestions import FLAGS_ELSEWHERE
from config import GROUPS, ComputeOptions, Config, EnsembleOptions, FileOptions, TaskOptions
from tasks import SST, TASKS, Task

OPTIONS = ROOT / "tests" / "options.txt"


def exit_line(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return the line that is printed for a command line that argparse refuses."""
    with pytest.raises(SystemExit) as stop:
        configure(*words)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    return printed.err


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size", "-batch_size", "-batch-size"])
def test_one_flag_has_many_spellings(flag: str) -> None:
    assert configure(flag, 5).train.batch_size == configure(f"{flag}=5").train.batch_size == 5


@pytest.mark.parametrize(
    "words", ["-lr 3e-5", "--lr 3e-5", "--lr=3e-5", "-lr=3e-5", "--lr 0.00003", "--lr 1 --lr 3e-5"]
)
def test_values_keep_their_dashes(words: str) -> None:
    assert configure(*words.split()).train.lr == 3e-5


def test_a_value_that_begins_with_a_dash_needs_an_equals_sign(capsys: pytest.CaptureFixture[str]) -> None:
    assert configure("--name=--x").run.name == "--x" and configure("--name", "-3").run.name == "-3"
    for words in (["--name", "--x"], ["--name", "-x"], ["--name", "--epochs", "3"], ["--name", "--"], ["--", "--x"]):
        message = exit_line(capsys, *words)
        assert "--name: expected one argument" in message or "unrecognized arguments: -- --x" in message


def test_only_flags_are_respelled() -> None:
    words = ["-clf", "conv", "--name", "a-b-c", "--run_dir=x-y/z", "-h", "-", "-1", "1e-5", "--predict", "-"]
    assert expand_arguments(words) == ["--clf", *words[1:]]


def test_quora_answers_to_both_names() -> None:
    for name in ("para", "quora"):
        config = configure(
            f"--train_{name}", f"--{name}_lr_multiplier", 7, f"-{name}-weight-decay", 0.5, f"--num-{name}-trains", 3,
            f"--{name}_train", "a-b.csv", f"--{name}_dev=c-d.csv", f"--{name}-test", "e.csv", f"--{name}_loss", "bce",
        )  # fmt: skip
        assert config.tasks == {"para": TaskOptions(True, 7.0, 0.5, 3, "bce", "a-b.csv", "c-d.csv", "e.csv")}


def test_a_switch_can_be_turned_off_again() -> None:
    assert configure("--use_gpu", "--no_use_gpu").compute.use_gpu is False
    assert configure("--no_tensorboard").run.tensorboard is False
    assert configure("--no-head-batchnorm").model.head_batchnorm is False
    assert configure("--head_batchnorm", "--arch", "baseline").model.head_batchnorm is True


def test_files_hold_flags_over_many_lines_with_comments_and_files(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner.args", tmp_path / "outer.args"
    inner.write_text("# don't mind the apostrophe\n-lr 3e-4 --batch-size 5  # and this --lr 7\n\n--name 'two words'\n")
    outer.write_text(f"--epochs 3\n@{inner}\n--batch_size\n9\n", encoding="utf-8")
    config = configure("--epochs", 1, f"@{outer}", "--clip", 0.5)
    train = config.train
    assert (train.epochs, train.lr, train.batch_size, train.clip) == (3, 3e-4, 9, 0.5)
    assert config.run.name == "two words"
    assert configure(f"@{outer}", "--lr", 1).train.lr == 1.0  # the last one holds
    assert configure(f"@{inner}", f"@{inner}").train.batch_size == 5  # which is no circle


def test_a_hash_within_a_word_or_quotes_is_no_comment(tmp_path: Path) -> None:
    recipe = tmp_path / "hash.args"
    recipe.write_text("--run_dir runs/yin#2 --epochs 3 # the 'second\n--lr 2 # one's\n--filepath '# a'\n--seed 5")
    config = configure(f"@{recipe}")
    assert (config.run.run_dir, config.run.filepath) == ("runs/yin#2", "# a")
    assert (config.train.epochs, config.train.lr, config.train.seed) == (3, 2, 5)
    recipe.write_text('--name "run #1"')
    assert configure(f"@{recipe}").run.name == "run #1"


def test_a_file_that_includes_itself_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.args", tmp_path / "two.args"
    one.write_text(f"--epochs 3 @{two}", encoding="utf-8")
    two.write_text(f"@{one}", encoding="utf-8")
    message = refusal(configure, f"@{one}")
    assert "one.args" in message and "includes itself" in message


def test_names_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nul.args").write_bytes(b"--run_dir a\0b")
    assert "has a NUL byte" in refusal(configure, f"@{tmp_path / 'nul.args'}")
    assert "is not UTF-8" in refusal(configure, "--run_dir", "a\udcffb")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot read flags from this file" in refusal(configure, f"@{tmp_path / 'loop'}")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"--name 'never closed"])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    recipe = tmp_path / "bad.args"
    if content is not None:
        recipe.write_bytes(content)
    message = refusal(configure, "--epochs", 3, f"@{recipe}")
    assert str(recipe) in message and "cannot read flags" in message


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--bach_size 3", "did you mean --batch_size"),
        ("--learning_rate=3e-5 --output_dir x", "--learning_rate is --lr here; --output_dir is --run_dir here"),
        ("--num_train_epochs 3", "--epochs"),
        ("--per_device_train_batch_size 3", "--batch_size"),
        ("--fp16", "--amp --amp_dtype fp16"),
        ("-bf16", "--amp --amp_dtype bf16"),
        ("--do_train", "what happens without --evaluate"),
        ("recipes/small/minilm-cpu.args", "@recipes/small/minilm-cpu.args"),
        ("minilm-cpu", "@recipes/small/minilm-cpu.args"),
    ],
)
def test_unknown_words_say_what_is_meant(
    words: str, meant: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert meant in exit_line(capsys, *words.split())


def test_flags_of_other_trainers_lead_to_flags_of_ours() -> None:
    known = {flag for action in actions(build_parser("x", "", TASKS)) for flag in action.option_strings}
    for elsewhere, here in FLAGS_ELSEWHERE.items():
        assert f"--{elsewhere}" not in known and set(re.findall(r"--\w+", here)) <= known, elsewhere


def test_a_misspelt_file_of_flags_names_close_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    message = refusal(configure, "@recipes/small/minilm-cpuu.args")
    assert "did you mean @recipes/small/minilm-cpu.args" in message
    assert refusal(configure, f"@{tmp_path}/zzzzzz.args").endswith("name a file of flags")


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    yield from (action for action in parser._actions if action.dest != "help")


def dests(tasks: dict[str, Task]) -> set[str]:
    """Return every option of the dataclasses, as "group.option"."""
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
    on = {action.dest for action in actions(parser) if isinstance(action, argparse._StoreTrueAction)}
    off = {action.dest for action in actions(parser) if isinstance(action, argparse._StoreFalseAction)}
    assert on == off and "compute.use_gpu" in on and "tasks.sst.enabled" in on


def test_flags_of_an_ensemble_are_a_part_of_the_same_ones() -> None:
    groups = {"data": FileOptions, "compute": ComputeOptions, "ensemble": EnsembleOptions}
    parser = build_parser("ensemble.py", "Test.", TASKS, groups, ("dev", "test"))
    wanted = {f"{name}.{field.name}" for name, group in groups.items() for field in fields(group)}
    wanted |= {f"tasks.{name}.{split}" for name in TASKS for split in ("dev", "test")}
    assert {action.dest for action in actions(parser)} == wanted


def test_without_flags_the_defaults_of_the_dataclasses_hold() -> None:
    config = configure()
    for name, group in GROUPS.items():
        assert getattr(config, name) == (group().resolved() if name == "model" else group())


def test_tasks_that_train() -> None:
    assert list(configure().tasks) == ["sst", "para", "sts"]
    assert all(task.enabled for task in configure().tasks.values())
    assert list(configure("--train_sts", "--train_sst").tasks) == ["sst", "sts"]  # in the order of the table
    assert list(configure("--train_quora").tasks) == ["para"]
    assert list(configure("--no_train_sts").tasks) == ["sst", "para"]
    assert list(configure("--sst_lr_multiplier", 2).tasks) == ["sst", "para", "sts"]


def test_a_further_row_creates_its_flags() -> None:
    table = {**TASKS, "films": FILMS}
    parser = build_parser("prog", "Test.", table)
    assert {action.dest for action in actions(parser)} == dests(table)
    config = configure("--train_movies", "--films_lr_multiplier", 9, "--num_movies_trains", 2, tasks=table)
    assert config.tasks == {"films": TaskOptions(True, 9.0, 1e-3, 2, "ce")}
    assert list(configure(tasks=table).tasks) == ["sst", "para", "sts"]  # it trains only when it is named
    assert configure("--evaluate", "a.pt", "--films_dev", "x.csv", tasks=table).tasks["films"].dev == "x.csv"
    both = configure("--train_sst", "--train_films", "--films_dev", "x.csv", tasks=table).tasks
    assert list(both) == ["sst", "films"] and both["films"].dev == "x.csv"
    by_default = replace(FILMS, by_default=True)
    assert list(configure(tasks={"sst": SST, "films": by_default}).tasks) == ["sst", "films"]
    assert "--{sst,para,sts,cfimdb,films}_loss" in parser.format_help()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", "0"), ("--epochs", "1.5"), ("--epochs", "many"), ("--batch_size", "-3"), ("--lr", "0"),
        ("--lr", "fast"), ("--lr_lambda", "1.01"), ("--warmup", "-0.1"), ("--seed", "18446744073709551616"),
        ("--max_length", "3"), ("--max_bad_rows", "-1"), ("--head_layers", "65"), ("--output_dropout_prob", "1"),
        ("--sst_lr_multiplier", "0"), ("--quora_weight_decay", "-1"), ("--num_sts_trains", "-1"),
        ("--arch", "transformer"), ("--optim", "adam"), ("--optim", "SparseAdam"), ("--pair_features", "u,w"),
        ("--sst_loss", "mse"), ("--sts_loss", "ce"),
        # what would overflow, or fill the memory
        ("--sst_weight_decay", "1e300"), ("--sts_weight", "1e31"), ("--head_width", "9" * 23), ("--pal_size", "9" * 23),
        ("--lora_rank", "9" * 23), ("--threads", "1000000000000"), ("--num_sst_trains", "1000000000"),
        ("--steps_per_epoch", "1000000000"),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused(capsys: pytest.CaptureFixture[str], flag: str, value: str) -> None:
    line = exit_line(capsys, f"{flag}={value}")
    assert flag in line and (value in line or value.split(",")[-1] in line)


def test_bounds_are_inclusive() -> None:
    words = "--lr_lambda 1 --max_length 4 --max_bad_rows 0 --head_layers 64 --sst_weight_decay 0 --seed 0 --epochs 1"
    config = configure(*words.split())
    assert (config.train.lr_lambda, config.data.max_length, config.data.max_bad_rows) == (1.0, 4, 0)
    assert (config.model.head_layers, config.tasks["sst"].weight_decay, config.train.seed) == (64, 0.0, 0)
    for value in (0, 1):
        assert configure("--lr_schedule", "linear", "--warmup", value).train.warmup == value


def test_lists_are_separated_by_commas_or_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    assert configure("--pair_features", "u,abs,cos").model.pair_features == ("u", "abs", "cos")
    assert configure("--pair_features", "u abs  cos,").model.pair_features == ("u", "abs", "cos")
    assert configure("--pal", "pal", "--pal_tasks", "quora,sst,para").pal.pal_tasks == ("para", "sst")
    for value in ("", ", "):  # as a shell variable that is not set would give it
        assert f"--pal_tasks: {value!r} names nothing" in exit_line(capsys, f"--pal_tasks={value}")


def test_a_flag_of_two_words(capsys: pytest.CaptureFixture[str]) -> None:
    config = configure("--evaluate", "a.pt", "--export-task", "sst", "out dir")
    assert config.run.export_task == ("sst", "out dir") and Config.from_dict(config.to_dict()) == config
    assert "--export_task: expected 2 arguments" in exit_line(capsys, "--export_task", "sst")


def test_unknown_words_and_values_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--learning_rate" in exit_line(capsys, "--learning-rate", 3)
    assert "surplus" in exit_line(capsys, "surplus")
    assert "--epochs" in exit_line(capsys, "--epochs")
    assert "--train_imdb" in exit_line(capsys, "--train_imdb")
    assert "--batch 5" in exit_line(capsys, "--batch", 5)  # no abbreviations
    for value in ("nan", "inf", "-inf"):
        assert f"--lr: {value} is not a finite number" in exit_line(capsys, f"--lr={value}")


def test_no_option_appears_or_vanishes_unseen() -> None:
    """A new option is a decision: add its line to tests/options.txt together with it."""
    found = []
    for script in ("multitask_classifier.py", "ensemble.py"):
        done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
        flags = re.findall(r"^  (-.+?)(?=  |$)", done.stdout, re.MULTILINE)
        found.append("\n".join([script, *sorted(f"    {flag}" for flag in flags)]) + "\n")
    assert "\n".join(found) == OPTIONS.read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["multitask_classifier.py", "ensemble.py"])
def test_help_does_not_wait_for_torch(script: str) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = [{script!r}, '--help']\n"
        f"try:\n    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("[]\n") and script in done.stdout
    heads = {"Data", "Machine", "Each task"}
    heads |= {"Model", "Training", "Run"} if script == "multitask_classifier.py" else {"Ensemble"}
    for head in heads:
        assert re.search(rf"^{head}\b.*:$", done.stdout, re.MULTILINE), head


def test_help_names_every_visible_flag_and_default() -> None:
    parser = build_parser("prog", "Test.", TASKS)
    text = " ".join("".join([parser.format_help(), *(page() for page in parser.pages.values())]).split())
    for action in actions(parser):
        assert action.help
        if action.help != argparse.SUPPRESS or action.dest.startswith("tasks."):
            flags = [flag for flag in action.option_strings if not flag.startswith("--no_")]
            assert all(re.search(rf"{flag}\b", text) for flag in flags)
    assert "default: 0.0001" in text and "default: 0.009" in text  # --lr and --sst_weight_decay
    for flag, default in {"lora_rank": "1", "lora_dropout": "0.0", "num_sts_trains": "1", "sts_smart": "0.0"}.items():
        assert re.search(rf"--{flag} . ((?!--).)*\(default: {default}\)", text), flag  # though 1 == True, 0.0 == False


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what --help with these words prints."""
    with pytest.raises(SystemExit) as stop:
        multitask_classifier.main(["--help", *words])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_has_one_block_for_all_tasks_and_ends_with_examples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys)
    words = " ".join(text.split())
    assert text.count("{sst,para,sts,cfimdb}_weight_decay") == 1 and "--sst_weight_decay" not in text
    assert "(default: sst 0.009, para 1e-05, sts 0.01, cfimdb 0.009)" in words and "sst ce, bce, kl" in words
    assert "--NAME_train FILE names its training file" in words and "--train_NAME without a file" in words
    examples = text.rstrip().splitlines()[-5:]
    assert all("python" in line or line.startswith("torchrun") for line in examples)
    assert not any(len(line) > 80 for line in text.splitlines() if not line.lstrip().startswith("--"))


def test_help_of_other_scripts_has_their_own_words() -> None:
    for script, words in {"report.py": ["RUNS", "--compare", "cfimdb}_dev"], "ensemble.py": ["--filepaths"]}.items():
        done = shell(script, "--help")
        assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith(f"usage: {script} ")
        assert all(word in done.stdout for word in words)


def test_help_of_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "lora")
    assert "--lora_rank" in text and "--epochs" not in text and "_loss" not in text
    assert "--quora_loss" in help_of(capsys, "quora") and "--{sst,para,sts,cfimdb}_loss" in help_of(capsys, "tasks")
    assert "--help adapters: there is no such group of flags; choose from data, model" in exit_line(
        capsys, "--help", "adapters"
    )
