"""What others wrote, in a terminal and in reports: no escape sequences, no lines of its own, no tags, no tracebacks."""

import csv
import json
import platform
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_json, refusal

import multitask_classifier
import report
import sample_topics
import sweep
from base_bert import read_tensors
from models.checkpoint import load, save
from studies.shared_study import SharedStudy
from training.trainer import Trainer
from utils.errors import UserError

ATTACK = "\x1b[2J\x1b]0;x\x07<script>alert(1)</script>\nerror: all is well\r\u202e" + 100_000 * "A"
URL = "postgresql://me:geheim@host/db"


def assert_harmless(text: str, most: int = 5000) -> None:
    """Check that nothing of ATTACK would do anything to a terminal, and that no line is long."""
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text), re.search("[\x00-\x08\x0b-\x1f]", text)
    assert not re.search("^error: all is well", text, re.MULTILINE) and max(map(len, text.split("\n"))) < most


def test_a_report_shows_what_others_wrote_as_text(
    finished_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values of config.json, results.csv, timing.jsonl and best.pt, and names of folders."""
    run = shutil.copytree(finished_runs / "yin", tmp_path / "runs" / f"a\x1b[2J<script>\n{'b' * 180}")
    shutil.copytree(finished_runs / "cross", tmp_path / "runs" / "b")
    save(run / "best.pt", {**load(run / "best.pt"), "git_commit": ATTACK})
    config = read_json(run / "config.json")
    config["model"]["pretrained"] = ATTACK[:9000]
    (run / "config.json").write_text(json.dumps(config))
    timing = [json.dumps({**json.loads(line), "device": ATTACK}) for line in (run / "timing.jsonl").open()]
    (run / "timing.jsonl").write_text("\n".join(timing))
    command = f"python multitask_classifier.py --arch v2 --data_dir '{ATTACK[:9000]}' --pretrained {URL}"
    with (tmp_path / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "status", "score", "cause", "command", "commit", "device", ATTACK])
        for number in range(3):
            writer.writerow([f"{number}{ATTACK}", "ok", 0.5, "", command, ATTACK, ATTACK, ATTACK])
            writer.writerow([f"{number}x{ATTACK}", "failed", "", ATTACK, "--" + ATTACK, ATTACK, "", ATTACK])
        writer.writerow([f"y{ATTACK}", "ok", "9" * 5000, "", command, ATTACK, "", ""])
        writer.writerow([f"z{ATTACK}", "ok", 0.5, "", f"python x --{ATTACK}", ATTACK, "", ""])
    report.main([str(tmp_path / "runs"), str(tmp_path / "results.csv"), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert_harmless(captured.out + captured.err)
    for path in (tmp_path / "out").iterdir():
        if path.suffix != ".png":
            text = path.read_text()
            assert_harmless(re.sub(r"data:image/png;base64,[\w+/=]+", "", text), 100_000)
            assert "geheim" not in text and (path.suffix == ".csv" or "<script" not in re.sub("`.*?`", "", text)), path


def test_names_of_topics_and_files_are_shown_as_text(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topics, labels = tmp_path / "topics\x1b[2J\n.txt", tmp_path / "labels.jsonl"
    rows = [line.split("\t") for line in (small_data / "quora-train.csv").read_text().splitlines()[1:]]
    name = ATTACK.split("\n")[0]
    results = [{"sequence": row[2], "labels": [name], "scores": [1.0]} for row in rows]
    labels.write_text("\n".join(map(json.dumps, results)))
    flags = [*map(str, ("--data_dir", small_data, "--topics", topics, "--labels", labels, "--out", tmp_path / "o.csv"))]
    topics.write_text(f"{name}: 1: a\n")
    sample_topics.main(flags)
    assert_harmless(capsys.readouterr().out)
    for text in (f"{ATTACK}: 1: a", f"x: {'9' * 5000}: a", f"{name}: 999: a", f"{name}: 1: a\n{name}: 1: b"):
        topics.write_text(text)
        assert_harmless(refusal(sample_topics.main, flags), 2001)


def told(run: Callable[[list[str]], object], words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return all that a script prints, with the line in which it ends."""
    capsys.readouterr()
    end = ""
    try:
        run(words)
    except UserError as error:
        end = str(error)
    except SystemExit as stop:
        assert stop.code == 2
    captured = capsys.readouterr()
    return captured.out + captured.err + end


def test_long_values_of_flags_are_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value in {
        "--epochs": "9" * 5000, "--lr": "9" * 5000, "--arch": ATTACK, "--batch_size": "9" * 400, "--seed": "9" * 4000,
        "--save_every": "9" * 5000, "--task": ATTACK, "--lora_dict": '{"r": ' + 4000 * "9" + "}",
    }.items():  # fmt: skip
        message = told(multitask_classifier.main, [flag, value], capsys)
        assert_harmless(message, 2001)
        assert len(message.splitlines()) == 1 and flag in message and "..." in message


def test_the_password_of_a_storage_is_never_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--out", str(tmp_path / "study"), "--grid", "lora_rank=1,2", "--train_sst", "--lora_mode", "attn"]
    for more in (
        ["--storage", URL], ["--storage", URL, "--dry_run"], [f"--storge={URL}"], ["--storage", URL + "\x1b"],
        ["--storage", f"nosuch{URL}"], ["--storage", "mysql://me:geheim@[x/db"],
    ):  # fmt: skip
        message = told(sweep.main, [*flags, *more], capsys)
        assert message and "geheim" not in message and "\x1b" not in message
    assert "geheim" not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("attributes", [{"row": "plain text"}, {"row": {"trial": 5}}, {"worker": "x"}, {"trial": [1]}])
def test_a_record_of_a_study_that_no_sweep_wrote_ends_in_a_line(attributes: dict[str, Any], tmp_path: Path) -> None:
    study = SharedStudy(str(tmp_path / "journal"), "study", {}, tmp_path / "study" / "trials").study
    trial = study.ask()
    for name, value in {"trial": "lora_rank=1", "flags": {}, **attributes}.items():
        trial.set_user_attr(name, value)
    flags = [
        "--out",
        tmp_path / "study",
        "--storage",
        tmp_path / "journal",
        "--grid",
        "lora_rank=1",
        "--lora_mode=attn",
    ]
    message = refusal(sweep.main, [*map(str, flags)])
    assert "--storage" in message and f"trial {trial.number} of study" in message


def test_a_log_that_a_record_names_is_not_made(tmp_path: Path) -> None:
    study = SharedStudy(str(tmp_path / "journal"), "study", {}, tmp_path / "trials")
    trial = study.study.ask()
    for name, value in {"trial": "a", "worker": {"host": platform.node(), "log": str(tmp_path / "new" / "x")}}.items():
        trial.set_user_attr(name, value)
    study.free_dead()
    assert not (tmp_path / "new").exists() and study.records()[0].state.is_finished()


def test_torch_gives_no_advice_to_load_what_is_foreign(trained: Trainer, tmp_path: Path) -> None:
    script, storage = tmp_path / "script.bin", tmp_path / "storage.bin"
    torch.save({"x": torch.zeros(2)}, script)
    with zipfile.ZipFile(script, "a") as archive:  # so that torch takes it for a program
        archive.writestr(zipfile.ZipInfo("script/constants.pkl"), b"")
    torch.save({"x": torch.zeros(2)}, storage, _use_new_zipfile_serialization=False)
    content = storage.read_bytes()
    storage.write_bytes(content.replace(b"FloatStorage", b"EvilsStorage"))
    torch.save({"x": 10**400}, tmp_path / "number.bin")
    for path in (script, storage, tmp_path / "number.bin"):
        for read in (load, read_tensors):
            message = refusal(read, path)
            assert not re.search("weights_only|unsafe|trust|PyTorch 2|\x1b", message), message
            assert read is load or "it holds" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"git_commit": torch.ones(3)}, {"format": torch.ones(3)}, {"scores": {"score": "high"}}, {"epoch": [ATTACK]},
        {"scores": {"sst": 5}}, {"config": {ATTACK: 5}}, {"tasks": ATTACK}, {"similarity_lines": {"sts": [1.0]}},
        {"weights": [1]}, {"seed": None},
    ],
)  # fmt: skip
def test_values_of_a_checkpoint_are_checked_as_it_is_read(
    changes: dict[str, Any], trained: Trainer, tmp_path: Path
) -> None:
    save(tmp_path / "x.pt", {**load(trained.checkpointer.run.best), **changes})
    assert "x.pt: " in refusal(load, tmp_path / "x.pt")
