"""--resume compares what is in the files that a run began with, wherever they lie."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import interrupted, make_trainer, metrics, read_json, refusal

import multitask_classifier
from training.trainer import Trainer

ROW = "\t{0}\tA film about {1}.\t{2}\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, small_data: Path, tiny_flags: list[str]) -> Path:
    """A folder with everything that a run may begin with."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny_bert, folder / "bert")
    shutil.copytree(small_data, folder / "data")
    rows = [ROW.format(f"e{number}", "trains" * number, number % 5) for number in range(1, 9)]
    (folder / "extra.csv").write_text("\tid\tsentence\tsentiment\n" + "".join(rows))
    flags = ["--train_sst", "--epochs", 1, "--lora_mode", "attn-only", "--fine_tune_mode", "full-model"]
    make_trainer(tiny_flags, folder / "run", *flags).fit()
    shutil.copy(folder / "run" / "best.pt", folder / "start.pt")
    words = ["--evaluate", folder / "start.pt", "--export_peft", folder / "peft"]
    multitask_classifier.main([str(word) for word in words])
    return folder


def flags_for(folder: Path, start: str = "init_from") -> list[str]:
    """Return the flags of a run that begins with the files in `folder`."""
    words = [f"--pretrained={folder}/bert", f"--data_dir={folder}/data", f"--sst_extra={folder}/extra.csv"]
    more = {"init_from": f"{folder}/start.pt", "init_peft": f"{folder}/peft/sentiment"}
    return ["--train_sst", "--no_tensorboard", *words, f"--{start}={more[start]}"]


def begin(tiny_flags: list[str], run: Path, *words: str) -> Trainer:
    """Begin a run, and stop it after an epoch as if killed."""
    trainer = make_trainer(tiny_flags, run, *words)
    interrupted(trainer, 1)
    return trainer


@pytest.mark.parametrize("start", ["init_from", "init_peft"])
def test_the_same_files_elsewhere_go_on(
    tiny_flags: list[str], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """In another folder, with paths that begin in the working folder, and with the run itself in another place."""
    scratch = shutil.copytree(inputs, tmp_path / "job1")
    make_trainer(tiny_flags, tmp_path / "whole", *flags_for(scratch, start)).fit()
    begin(tiny_flags, tmp_path / "run", *flags_for(scratch, start), f"--sst_dev_out={tmp_path}/job1/dev.csv")
    scratch.rename(tmp_path / "job2")
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    make_trainer(tiny_flags, tmp_path / "moved", *flags_for(Path("job2"), start), "--resume").fit()
    assert metrics(tmp_path / "moved") == metrics(tmp_path / "whole") and len(metrics(tmp_path / "moved")) == 2
    assert read_json(tmp_path / "moved" / "config.json")["data"]["data_dir"] == "job2/data"  # where a report looks
    assert {row["path"].split("/job")[1][0] for row in read_json(tmp_path / "moved" / "inputs.json")} == {"2"}


def edited(path: Path) -> None:
    """Change what a file says, but not how much of it there is."""
    content = path.read_bytes()
    if path.suffix == ".csv":
        content = content.replace(b"film", b"FILM").replace(b"Film", b"FILM").replace(b"movie", b"MOVIE")
        content = content.rstrip(b"\n").rsplit(b"\t", 1)[0] + b"\t0\n"
    elif path.suffix == ".json":
        content = json.dumps({**json.loads(content), "layer_norm_eps": 1e-7, "lora_dropout": 0.0}).encode()
    elif path.suffix == ".txt":
        words = content.splitlines(keepends=True)
        content = b"".join([*words[:5], *words[:4:-1]])
    else:
        content = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(content)


CONTENTS = {
    "data/ids-sst-train.csv": "--sst_train", "data/ids-sst-dev.csv": "--sst_dev", "extra.csv": "--sst_extra",
    "bert/config.json": "--pretrained", "bert/model.safetensors": "--pretrained", "bert/vocab.txt": "--pretrained",
    "peft/sentiment/adapter_config.json": "--init_peft", "peft/sentiment/adapter_model.safetensors": "--init_peft",
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_another_content_is_refused_by_file_and_flag(
    tiny_flags: list[str], inputs: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(inputs, tmp_path / "job")
    flags = flags_for(folder, "init_peft")
    begin(tiny_flags, tmp_path / "run", *flags)
    edited(folder / name)
    message = refusal(make_trainer, tiny_flags, tmp_path / "run", *flags, "--resume")
    assert message == (
        f"--resume {tmp_path}/run: the run began with another content of {CONTENTS[name]} {folder / name}; "
        "put it back, or --overwrite the run"
    )
    shutil.copy(inputs / name, folder / name)
    make_trainer(tiny_flags, tmp_path / "run", *flags, "--resume").fit()


def test_another_start_is_refused(tiny_flags: list[str], inputs: Path, tmp_path: Path) -> None:
    """And one flag more or less."""
    start = shutil.copy(inputs / "start.pt", tmp_path / "start.pt")
    flags = [*flags_for(inputs), f"--init_from={start}"]
    begin(tiny_flags, tmp_path / "run", *flags)
    shutil.copy(begin(tiny_flags, tmp_path / "other", "--seed=7", *flags).checkpointer.run.best, start)
    assert f"--init_from {start}; put it" in refusal(make_trainer, tiny_flags, tmp_path / "run", *flags, "--resume")
    for fewer, words in ((flags[:-2], f"--init_from {start}"), (flags[:-3], f"--sst_extra {inputs}/extra.csv")):
        message = refusal(make_trainer, tiny_flags, tmp_path / "run", *fewer, "--resume")
        assert message == f"--resume {tmp_path}/run: the run began with {words}; repeat its flags"


def test_a_run_of_an_earlier_version_compares_paths(tiny_flags: list[str], inputs: Path, tmp_path: Path) -> None:
    flags = flags_for(inputs)
    begin(tiny_flags, tmp_path / "run", *flags)
    os.unlink(tmp_path / "run" / "inputs.json")
    folder = shutil.copytree(inputs, tmp_path / "job")
    message = refusal(make_trainer, tiny_flags, tmp_path / "run", *flags_for(folder), "--resume")
    assert f"--data_dir {inputs}/data instead of {folder}/data" in message
    make_trainer(tiny_flags, tmp_path / "run", *flags, "--resume").fit()
