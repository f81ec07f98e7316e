"""Numbers that went wrong: losses, weights and optimizer states that are not finite, found early and never saved."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_ready, make_trainer, metrics, refusal, steps_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import multitask_classifier
from models.checkpoint import load, save
from tasks import TASKS
from training.meters import BatchResult, TaskMeter, check_losses_finite
from training.resume import check_finite
from training.trainer import Trainer
from utils.device import Device
from utils.errors import UserError
from utils.files import sha256


def in_epoch(trainer: Trainer, epoch: int, do: Any, after_steps: bool = False) -> None:
    """Let a run `do` something before the steps of an epoch, counted from 0, or after them."""
    run_steps = trainer.run_steps

    def changed(steps: Any) -> None:
        now = trainer.progress.epoch == epoch
        if now and not after_steps:
            do()
        run_steps(steps)
        if now and after_steps:
            do()

    trainer.run_steps = changed  # type: ignore[method-assign]


def poison(trainer: Trainer, task: str, value: float) -> int:
    """Make one word of the task's backbone no number; return the first batch of the second epoch that has it."""
    data = trainer.loader.train[task]
    batches = [batch for step in steps_of(trainer, 1) for batch in step.batches]
    words = [{int(i) for i in data.batch(b.indices).input_ids} if b.task == task else set() for b in batches]  # type: ignore[union-attr]
    places = {word: [i for i, found in enumerate(words) if word in found] for word in set.union(*words)}
    word, numbers = min(places.items(), key=lambda item: (len(item[1]), -item[1][0]))
    with torch.no_grad():
        trainer.model.backbone(task).word_embedding.weight[word] = value
    return numbers[0]


@pytest.mark.parametrize(
    ("task", "value", "routine", "precision"),
    [
        ("sst", math.nan, "sequential", None),
        ("sts", math.inf, "interleave", torch.bfloat16),
        ("para", -math.inf, "joint", None),
    ],
)
def test_the_first_bad_batch_is_named(
    tiny_flags: list[str], tmp_path: Path, task: str, value: float, routine: str, precision: torch.dtype | None
) -> None:
    """It is found whenever the losses are looked at, and best.pt and resume.pt stay as they were."""
    run, files, wanted = tmp_path / "run", {}, []
    flags = ["--fine_tune_mode", "full-model", "--batch_size", 1, "--routine", routine, "--epochs", 3]
    trainer = make_trainer(tiny_flags, run, *flags, device=Device(torch.device("cpu"), precision))

    def spoil() -> None:
        wanted.append(poison(trainer, task, value))
        files.update({name: sha256(run / name) for name in ("best.pt", "resume.pt")})

    in_epoch(trainer, 1, spoil)
    message = refusal(trainer.fit)
    batches = [batch for step in steps_of(trainer, 1) for batch in step.batches]
    batch, before = batches[wanted[0]], batches[wanted[0] - 1]
    known, train = json.loads((run / "bad_batch.json").read_text()), trainer.loader.train
    assert (known["epoch"], known["batch"], known["task"]) == (2, wanted[0] + 1, task)
    assert known["ids"] == [train[task].examples.ids[i] for i in batch.indices] and known["loss"] in ("nan", "inf")
    rows = train[before.task].examples.ids
    assert known["batch_before"] == {"task": before.task, "ids": [rows[i] for i in before.indices]}
    assert message.startswith(f"{TASKS[task].title}: a loss is not finite any more, at first {known['loss']} in batch ")
    assert str(run / "bad_batch.json") in message and "--lr" in message and "--clip" in message
    assert {name: sha256(run / name) for name in files} == files and len(files) == 2
    assert len(metrics(run)) == 1
    assert trainer.progress.batches - 60 <= wanted[0] + 3 * trainer.config.run.log_every  # seen at the next look
    make_trainer(tiny_flags, run, "--overwrite")
    assert not (run / "bad_batch.json").exists()


def test_of_several_bad_losses_the_first_is_named(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    batches = [batch for step in steps_of(trainer) for batch in step.batches]
    meters = {}
    for task, losses in (("sts", (1.0, 1.0, math.nan)), ("para", (1.0, math.nan, math.inf))):
        meters[task] = TaskMeter(scored=True)
        numbers = [i for i, batch in enumerate(batches) if batch.task == task]
        for number, loss in zip(numbers, losses, strict=True):
            meters[task].add(number, BatchResult(torch.tensor(loss), torch.zeros(8), torch.zeros(8)), 8, 1e-3, 0.5, 0)
    with pytest.raises(UserError, match="^Quora paraphrase: .* at first nan in batch 5 of epoch 1"):
        check_losses_finite(meters, batches, 1, trainer.loader.train, trainer.checkpointer.run)


class Waits(TorchDispatchMode):
    """Counts how often a number is asked back from the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [[], ["--routine", "joint", "--pcgrad", "--clip", 1.0]], ids=str)
def test_losses_are_asked_for_now_and_then(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    """A step without a look asks for nothing, though its loss is watched."""
    trainer = make_ready(tiny_flags, tmp_path / "run", *more)
    steps = steps_of(trainer)
    for step in steps:  # code and states are there afterwards
        trainer.train_step(step)
    with Waits() as waits:
        for step in steps:
            trainer.train_step(step)
    assert waits.count == 0
    trainer = make_ready(tiny_flags, tmp_path / "whole", *more, "--batch_size", 1)
    with Waits() as waits:
        trainer.run_steps(steps_of(trainer))
    looks = len(steps_of(trainer)) // trainer.config.run.log_every
    assert looks <= waits.count <= 6 * looks + 3


def ruin(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.view(-1)[-1] = math.nan


@pytest.mark.parametrize("more", [[], ["--eval_every", 2], ["--average", "ema"], ["--average", "swa"]], ids=str)
def test_ruined_weights_are_never_saved(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    """The last step of an epoch ruins a weight that no dev sentence needs: no loss and no output shows it."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 3, *more)
    positions = trainer.model.backbone("sst").pos_embedding.weight  # no sentence reaches the last one
    in_epoch(trainer, 1, lambda: ruin(positions), after_steps=True)
    message = refusal(trainer.fit)
    assert message.startswith("backbones.sentiment.pos_embedding.weight is not finite any more and was")
    assert len(metrics(tmp_path / "run")) == 1
    assert load(tmp_path / "run" / "resume.pt")["progress"]["epoch"] == 1
    for path in (tmp_path / "run").glob("*.pt"):
        assert all(tensor.isfinite().all() for tensor in load(path)["weights"].values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_ruined_numbers_are_told_from_large_ones(dtype: torch.dtype) -> None:
    """Whose sum overflows, or whose infinities have both signs; whole numbers and nothing at all are well."""
    large, counts = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype), torch.arange(3)
    check_finite([])
    check_finite({"large": large, "none": large[:0], "counts": counts, "step": 3}.items())
    for value in (math.nan, math.inf, -math.inf):
        odd = torch.zeros(5, dtype=dtype)
        odd[1], odd[3] = value, -value
        tensors = {"counts": counts, "large": large, "odd": odd, "also": odd}.items()
        assert refusal(check_finite, tensors).startswith("odd is not finite any more and was not saved")


def test_each_file_has_its_own_gate(tiny_flags: list[str], tmp_path: Path) -> None:
    """Every state of every optimizer, and the weights."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 1, "--fine_tune_mode", "full-model")
    trainer.fit()
    before = {name: sha256(tmp_path / "run" / name) for name in ("best.pt", "resume.pt")}
    for task, optimizer in trainer.optimizers.by_name.items():
        state = list(optimizer.state.values())[-1]
        ruin(state["exp_avg"])
        message = refusal(trainer.save_state)
        assert message.startswith(f"exp_avg of the optimizer of {task} is not finite any more")
        state["exp_avg"].zero_()
    ruin(trainer.model.heads["sts"].get_parameter("2.bias"))
    for write in (trainer.save_state, lambda: trainer.checkpointer.save_best({}, 1, 9)):
        assert refusal(write).startswith("heads.sts.2.bias is not finite any more and was not saved")
    assert {name: sha256(tmp_path / "run" / name) for name in before} == before


def test_a_ruined_checkpoint_predicts_nothing(trained: Trainer, small_data: Path, tmp_path: Path) -> None:
    content = load(trained.checkpointer.run.best)
    content["weights"]["backbones.sentiment.pooler_dense.bias"][0] = math.nan
    save(tmp_path / "bad.pt", content)
    (tmp_path / "x.txt").write_text("A film .\n")
    for flags in (["--data_dir", str(small_data)], ["--predict", str(tmp_path / "x.txt"), "--task", "sst"]):
        message = refusal(multitask_classifier.main, ["--evaluate", str(tmp_path / "bad.pt"), *flags])
        assert message.startswith("SST sentiment: an output on ") and "is not finite any more" in message
    assert not (tmp_path / "bad-evaluation" / "scores.json").exists()
