"""Run directories: what a run may go on from, what --overwrite removes, and names that never collide."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from helpers import interrupted, make_trainer, refusal

import multitask_classifier
from models.checkpoint import load
from training.resume import lengths
from training.run_directory import RunDirectory
from training.trainer import Trainer
from utils.files import write_text


def test_resume_needs_the_options_of_the_start(tiny_flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "there is no resume.pt to go on from" in refusal(make_trainer, tiny_flags, run, "--resume")
    make_trainer(tiny_flags, run).fit()
    message = refusal(make_trainer, tiny_flags, run, "--resume", "--lr", 0.5, "--quora_lr_multiplier", 2)
    assert message.endswith(
        "began with --lr 0.001 instead of 0.5, --para_lr_multiplier 5.0 instead of 2.0; repeat its flags"
    )
    message = refusal(make_trainer, tiny_flags, run, "--resume", "--train_sst")
    assert "began with the tasks sst, para, sts instead of sst; repeat" in message
    make_trainer(tiny_flags, run, "--resume", "--save_every", 50, "--eval_batch_size", 9)
    (run / "config.json").unlink()
    assert "config.json" in refusal(make_trainer, tiny_flags, run, "--resume")


def test_overwrite_removes_a_runs_files_only(tmp_path: Path) -> None:
    run, events = RunDirectory(tmp_path), "events.out.tfevents.1.host"
    files = ["best.pt", "config.json", "bad_batch.json", "predictions/sst-dev-output.csv"]
    files += [events, f"tensorboard/{events}", f"tensorboard/a/{events}", ".best.pt.9.tmp"]  # the last by a kill
    theirs = ["notes.txt", "predictions/mine.txt", "tensorboard/b/mine.txt"]
    for name in (*files, *theirs):
        write_text(tmp_path / name, "x")
    run.prepare(overwrite=True, resume=False, needed=0)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {".lock", "predictions", "tensorboard", "tensorboard/b", *theirs}
    for name in theirs:
        (tmp_path / name).unlink()
    run.clear()
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "timing.jsonl", "best.pt", "events.out.tfevents.1.x"])
def test_a_link_or_a_pipe_where_a_run_writes_is_refused(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs.txt"
    theirs.write_text("theirs")
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    for make in (lambda path: path.symlink_to(theirs), os.mkfifo, Path.mkdir):
        make(run.path / name)
        for overwrite in (False, True):
            assert str(run.path / name) in refusal(run.prepare, overwrite, not overwrite, 0)
        (run.path / name).rmdir() if (run.path / name).is_dir() else (run.path / name).unlink()
    assert theirs.read_text() == "theirs"


def test_a_folder_with_a_model_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for overwrite in (False, True):
        assert "holds a model (model.safetensors)" in refusal(RunDirectory(tmp_path).prepare, overwrite, False, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_that_was_deleted_is_not_made_again(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    interrupted(trainer, 1)
    shutil.rmtree(tmp_path / "run")
    for save in (trainer.save_state, lambda: trainer.checkpointer.save_best({}, 1, 1)):
        assert "was deleted while the run went on" in refusal(save)
    assert not (tmp_path / "run").exists()


def test_what_a_run_has_lost_is_said_and_it_goes_on(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*tiny_flags, "--no_tensorboard", "--epochs", "3"]
    for name, change, words in (
        ("metrics.jsonl", lambda path: path.write_text(""), "bytes are lost"),
        ("metrics.jsonl", Path.unlink, "bytes are lost"),
        ("metrics.jsonl", lambda path: path.write_text(path.read_text().replace("1", "2")), "was changed"),
        ("best.pt", Path.unlink, "is lost or damaged; the best model from here on"),
        ("best.pt", lambda path: path.write_bytes(path.read_bytes()[:-99]), "is lost or damaged"),
    ):
        run = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        interrupted(make_trainer(flags, run), 2)
        change(run / name)
        make_trainer(flags, run, "--resume").fit()
        assert words in capsys.readouterr().out and load(run / "best.pt")["scores"]


def test_files_that_cannot_be_cut_back_are_one_line(trained: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = lengths(trained.checkpointer.run)
    monkeypatch.setattr(os, "truncate", fail)
    message = refusal(trained.checkpointer.cut_back, {**before, "metrics.jsonl": 0})
    assert message.startswith(f"--run_dir {trained.checkpointer.run.path}: cannot be written (")


@pytest.mark.parametrize("folder", ["", "tensorboard/"])
def test_curves_are_cut_back_where_they_are(trained: Trainer, folder: str) -> None:
    """Earlier versions wrote them into a folder of their own. Other files stay as they are."""
    run = trained.checkpointer.run
    for name in (first := f"{folder}events.out.tfevents.1.host", "notes.txt"):
        write_text(run.path / name, "saved")
    before = lengths(run)
    write_text(run.path / first, "saved, and a point of a later step")
    for name in (later := f"{folder}events.out.tfevents.2.host", "more.txt"):
        write_text(run.path / name, "later")
    trained.checkpointer.cut_back(before)
    assert (run.path / first).read_text() == "saved" and not (run.path / later).exists()
    assert (run.path / "more.txt").read_text() == "later"


def test_names_of_runs_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(5):
        names.append(RunDirectory.fresh_name("v2"))
        (tmp_path / "runs" / names[-1]).mkdir(parents=True)
    assert len(set(names)) == 5 and all(name.startswith("v2-") for name in names)
    assert RunDirectory.named(None, "abc").path == Path("runs/abc")
    assert RunDirectory.named("x/y", "abc").path == Path("x/y")


def test_a_best_model_that_is_lost_after_the_last_epoch_is_the_last_one(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed before its report: no epoch is left whose model could take the place."""
    make_trainer(tiny_flags, tmp_path / "run", "--no_tensorboard").fit()
    (tmp_path / "run" / "best.pt").unlink()
    words = [*tiny_flags, "--no_tensorboard", "--run_dir", str(tmp_path / "run"), "--resume"]
    multitask_classifier.main(words)
    assert "is lost or damaged" in capsys.readouterr().out
    assert load(tmp_path / "run" / "best.pt")["epoch"] == 2 and (tmp_path / "run" / "scores.json").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
