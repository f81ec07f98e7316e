"""--distill: what the teachers say of the training texts, the loss on it, and what --resume compares."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_resumes, copied, interrupted, load_batch, make_ready, make_trainer, refusal

from datasets import Examples, TaskData
from models.checkpoint import load_model
from training.trainer import Trainer

ROWS = np.array([3, 0, 7, 5, 11, 2, 14])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are kept in runs/ensemble-cache of the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def teachers(finished_runs: Path) -> list[Path]:
    """Two teachers of all tasks, with compared and with joined pairs, and one of SST alone."""
    return [finished_runs / name / "best.pt" for name in ("yin", "cross", "sst")]


def named(paths: list[Path]) -> str:
    return ",".join(map(str, paths))


def say(path: Path, trainer: Trainer, task: str) -> torch.Tensor:
    """Return what the model in a checkpoint says of the training examples ROWS, as raw outputs."""
    model, tokenizer, _ = load_model(path)
    columns = [[column[i] for i in ROWS] for column in trainer.loader.examples[task].examples.texts]
    with torch.no_grad():
        model.eval()
        each = []
        for texts in zip(*columns, strict=True):  # one by one
            examples = Examples(model.tasks[task], "train", path, ["0"], tuple([text] for text in texts), None)
            data = TaskData(examples, tokenizer, model.pair_encodings()[task])
            each.append(model(task, data.batch(np.array([0]))))
    return torch.cat(each)


@pytest.mark.parametrize("task", ["sst", "para", "sts"])
def test_teachers_and_labels_share_the_loss(
    tiny_flags: list[str], tmp_path: Path, teachers: list[Path], task: str
) -> None:
    voting = [*teachers, teachers[0]]  # as in an ensemble, one that is named twice has two votes
    flags = ["--distill", named(voting), "--distill_weight", 0.3, "--arch", "v2", "--sts_loss", "mse"]
    trainer = make_ready(tiny_flags, tmp_path / "run", *flags, f"--{task}_weight", 2)
    batch = load_batch(trainer, task, ROWS)
    outputs = [say(path, trainer, task) for path in voting if task == "sst" or path != teachers[2]]
    assert batch.teacher_labels is not None
    torch.manual_seed(3)
    loss = trainer.objective(batch)[0]
    torch.manual_seed(3)  # the same dropout masks
    logits = trainer.model(task, batch.inputs)
    if task == "sts":
        every = trainer.loader.examples[task].teacher_labels
        assert every is not None
        labels = trainer.loader.examples[task].examples.labels
        assert np.corrcoef(every, labels)[0, 1] > 0 and every.mean() == pytest.approx(np.mean(labels), abs=1e-4)
        taught, plain = F.mse_loss(logits, batch.teacher_labels), F.mse_loss(logits, batch.labels)
    elif task == "para":
        mean = torch.stack(outputs).sigmoid().mean(dim=0)
        torch.testing.assert_close(batch.teacher_labels, mean, rtol=1e-4, atol=1e-5)
        taught = -(mean * F.logsigmoid(logits) + (1 - mean) * F.logsigmoid(-logits)).mean()
        plain = F.binary_cross_entropy_with_logits(logits, batch.labels.float())
    else:
        mean = torch.stack(outputs).softmax(dim=2).mean(dim=0)
        torch.testing.assert_close(batch.teacher_labels, mean, rtol=1e-4, atol=1e-5)
        taught, plain = -(mean * logits.log_softmax(dim=1)).sum(dim=1).mean(), F.cross_entropy(logits, batch.labels)
    assert loss.item() == pytest.approx(2 * (0.7 * plain + 0.3 * taught).item(), rel=1e-5)


def test_a_student_comes_to_agree_with_its_teacher(tiny_flags: list[str], tmp_path: Path, teachers: list[Path]) -> None:
    flags = ["--train_sst", "--distill", teachers[0], "--distill_weight", 1, "--optim", "AdamW", "--lr", 2e-3]
    flags += ["--fine_tune_mode", "full-model", "--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0]
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 30, "--eval_every", 30, *flags)
    data = trainer.loader.examples["sst"]
    wanted = torch.from_numpy(data.teacher_labels)

    @torch.no_grad()
    def distance() -> float:
        logits = trainer.model.eval()("sst", data.batch(np.arange(len(data))))
        return F.kl_div(logits.log_softmax(dim=1), wanted, reduction="batchmean").item()

    before = distance()
    trainer.fit()
    assert distance() < 0.5 * before


def test_a_run_with_teachers_resumes_to_the_bit(tiny_flags: list[str], tmp_path: Path, teachers: list[Path]) -> None:
    assert_resumes(tiny_flags, tmp_path, "--distill", named(teachers), after=1)


def test_resume_compares_what_the_teachers_are_not_where(
    tiny_flags: list[str], tmp_path: Path, teachers: list[Path]
) -> None:
    moved = tmp_path / "moved.pt"
    moved.write_bytes(teachers[0].read_bytes())
    interrupted(make_trainer(tiny_flags, tmp_path / "run", "--distill", teachers[0]), 1)
    whole = copied(make_trainer(tiny_flags, tmp_path / "run", "--distill", moved, "--resume").model)
    assert whole
    message = refusal(make_trainer, tiny_flags, tmp_path / "run", "--distill", teachers[1], "--resume")
    assert "--distill" in message and str(teachers[1]) in message
    message = refusal(make_trainer, tiny_flags, tmp_path / "run", "--resume")
    assert "--distill" in message


def test_teachers_that_cannot_teach_are_refused(tiny_flags: list[str], tmp_path: Path, teachers: list[Path]) -> None:
    for words, parts in (
        (["--distill", "none.pt"], ("--distill none.pt", "check the path")),
        (["--train_sts", "--distill", teachers[2]], ("--distill", str(teachers[2]), "knows no task of this run")),
        (["--distill_weight", 0.5], ("--distill_weight needs --distill",)),
        (["--distill", teachers[0], "--mlm"], ("--distill", "--mlm", "drop")),
    ):
        message = refusal(make_trainer, tiny_flags, tmp_path / "run", *words)
        assert all(part in message for part in parts) and "\n" not in message, message
    assert not (tmp_path / "run").exists()


def test_tasks_that_no_teacher_knows_have_their_labels_alone(
    tiny_flags: list[str], tmp_path: Path, teachers: list[Path]
) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--distill", teachers[2], "--epochs", 1)
    assert load_batch(trainer, "sst", ROWS).teacher_labels is not None
    assert load_batch(trainer, "sts", ROWS).teacher_labels is None
    trainer.fit()
