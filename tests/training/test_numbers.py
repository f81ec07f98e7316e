"""Numbers that went wrong: overflowing fp16 gradients, losses and weights that are not finite."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory import state_of, trainer_of
from test_training import copied, make_trainer, metrics, tensors_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training.health import refuse_bad_losses, refuse_ruined

from datasets import TaskData
from models.checkpoint import load
from tasks import TASKS
from training import trainer as loop
from training.meters import TaskMeter
from training.trainer import LOG_EVERY, Trainer
from utils.device import Device
from utils.errors import UserError
from utils.files import sha256

CPU = torch.device("cpu")
HUGE = 2.0**40  # as a scale, it makes every gradient overflow fp16


def in_half(trainer: Trainer, precision: torch.dtype = torch.float16) -> Trainer:
    """The same trainer in mixed precision, fp16 with a scaler."""
    data = trainer.train_data, trainer.dev_data
    assert all(isinstance(own, TaskData) for split in data for own in split.values())
    return Trainer(
        trainer.config, trainer.model, trainer.tokenizer, *data,  # type: ignore[arg-type]
        Device(CPU, precision, precision is torch.float16), trainer.run, trainer.say,
    )  # fmt: skip


def scale_to(trainer: Trainer, scale: float) -> None:
    """Set the scale of the losses."""
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": scale})


# ---------------------------------------------------------------------------------------------------------------- fp16


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--clip", 0.1],
        ["--optim", "AdamW", "--average", "ema"],
        ["--optim", "SGD", "--average", "ema", "--ema_warmup"],
        ["--optim", "RAdam", "--sts_bregman", 1],
        ["--routine", "joint"],
        ["--routine", "joint", "--clip", 0.1, "--optim", "Adam"],
        ["--routine", "joint", "--pcgrad"],
        ["--routine", "joint", "--pcgrad", "--clip", 0.1, "--arch", "r1-baseline"],
        ["--lora_mode", "all-lin", "--dora"],
    ],
    ids=str,
)
@pytest.mark.parametrize("measured", [False, True])
def test_an_overflowing_step_is_skipped(
    tiny_flags: list[str], tmp_path: Path, more: list[object], measured: bool
) -> None:
    """Weights, moments, step counts and averages stay to the bit, the scale is halved, and the next step is made."""
    trainer = in_half(trainer_of(tiny_flags, tmp_path / "run", *more))
    trainer.model.manage_freezing("unfreezeall")
    steps = trainer.steps_of(0)

    def step(number: int, to: float) -> dict[str, Any]:
        """One step that moves, with all batches that belong to it."""
        scale_to(trainer, to)
        batch = steps[number]
        while not batch.moves:
            trainer.train_step(batch, measured)
            number += 1
            batch = steps[number]
        trainer.train_step(batch, measured)
        averages = [dict(own.averages) for own in (trainer.average, trainer.teacher) if hasattr(own, "averages")]
        updates = [own.updates for own in (trainer.average, trainer.teacher) if hasattr(own, "updates")]
        state = {name: own for name, own in state_of(trainer).items() if "running_" not in name and name != "generator"}
        state |= {f"average {i} {name}": own.clone() for i, own in enumerate(averages) for name, own in own.items()}
        return {**state, "updates": torch.tensor(updates)}

    first = step(0, 128.0)
    assert trainer.scaler.skipped == 0 and any(len(tensors_of(own)) for own in trainer.optimizers.values())
    skipped = step(3, HUGE)
    statistics = ("running_mean", "running_var")  # of BatchNorm, from a pass forward that was all right
    for name, own in first.items():
        if not any(word in name for word in statistics):
            assert torch.equal(skipped[name], own), name
    assert trainer.scaler.get_scale() == HUGE / 2
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    moved = step(6, 128.0)
    assert any(not torch.equal(moved[name], own) for name, own in first.items() if name.startswith("heads."))
    assert trainer.scaler.skipped_steps() == 1 and trainer.scaler.skipped_steps() == 0
    if len(first["updates"]):
        assert (moved["updates"] == first["updates"] + 1).all()


def test_pcgrad_of_scaled_gradients_is_that_of_the_gradients(tiny_flags: list[str], tmp_path: Path) -> None:
    """Projections are the same whatever the scale; it is taken out before the gradient is clipped."""
    found = []
    for scale in (1.0, 1024.0):
        flags = ["--routine", "joint", "--pcgrad", "--clip", 0.05, "--optim", "SGD", "--arch", "r1-baseline"]
        trainer = trainer_of(tiny_flags, tmp_path / str(scale), *flags)
        trainer.device = Device(CPU, None, True)  # fp32 with a scaler, so that nothing is rounded
        trainer.scaler = loop.Scaler("cpu", init_scale=scale)
        torch.manual_seed(0)
        for step in trainer.steps_of(0)[:3]:
            trainer.train_step(step, False)
        found.append(copied(trainer.model))
    for name, own in found[0].items():
        torch.testing.assert_close(found[1][name], own, rtol=1e-5, atol=1e-7, msg=name)


def test_skipped_steps_are_counted_and_shown(tiny_flags: list[str], tmp_path: Path) -> None:
    """In the epoch's record, the table and TensorBoard; the schedule of the rates does not advance by them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    flags = ["--lr_schedule", "linear", "--tensorboard", "--average", "ema"]
    trainer = in_half(make_trainer(tiny_flags, tmp_path / "run", *flags, say=said.append))
    scale_to(trainer, 2.0**24)
    trainer.fit()
    lines = metrics(tmp_path / "run")
    counts = [line["skipped_steps"] for line in lines]
    assert counts[0] > 0 and sum(counts) < 18
    assert f"{counts[0]} steps skipped, whose gradients overflowed fp16" in "".join(said)
    assert trainer.average.updates == 18 - sum(counts)  # type: ignore[attr-defined]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [point.value for point in events.Scalars("gradients/skipped_steps")] == counts
    for epoch, line in enumerate(lines):
        steps = trainer.steps_of(epoch)
        for task, own in line["train"].items():
            last = max(number for number, step in enumerate(steps) if step.task == task)
            before = min(last, counts[epoch])  # in the first epoch the first ones, until the scale has fallen
            rates = [trainer.schedules[task].at(epoch + (last - skipped) / len(steps)) for skipped in range(before + 1)]
            assert own["lr"] in (rates if epoch else rates[-1:])
    make_trainer(tiny_flags, tmp_path / "plain").fit()
    assert all("skipped_steps" not in line for line in metrics(tmp_path / "plain"))


def test_the_count_goes_on_after_resuming(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = in_half(make_trainer(tiny_flags, tmp_path / "run"))
    trainer.scaler.skipped = 3
    scale_to(trainer, 64.0)
    state = trainer.scaler.state_dict()
    other = in_half(make_trainer(tiny_flags, tmp_path / "other"))
    other.scaler.load_state_dict(state)
    assert (other.scaler.skipped, other.scaler.get_scale()) == (3, 64.0)
    plain = make_trainer(tiny_flags, tmp_path / "plain")
    other.scaler.load_state_dict(plain.scaler.state_dict())  # of a run without scaling
    assert other.scaler.get_scale() == 64.0 and plain.scaler.skipped_steps() is None


def test_gradients_that_overflow_at_any_scale_stop_the_run(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = in_half(make_trainer(tiny_flags, tmp_path / "run", "--epochs", 30))
    for parameter in trainer.model.heads.parameters():
        parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match="overflows fp16 even when scaled by .*; lower --lr or set --clip"):
        trainer.fit()
    assert trainer.scaler.get_scale() < 1e-4
    best = load(tmp_path / "run" / "best.pt")["weights"]
    assert all(own.isfinite().all() for own in best.values())


# --------------------------------------------------------------------------------------------------------------- losses


def poison(trainer: Trainer, task: str, value: float) -> int:
    """Make one word of the task's backbone no number; returns the number of the epoch's first batch that has it."""
    steps, data = trainer.steps_of(trainer.epoch), trainer.train_data[task]
    assert isinstance(data, TaskData)
    words = [{int(id) for id in data.batch(step.indices).input_ids} if step.task == task else set() for step in steps]
    rare = {word: [i for i, own in enumerate(words) if word in own] for word in set.union(*words)}
    word, places = min(rare.items(), key=lambda item: (len(item[1]), -item[1][0]))
    with torch.no_grad():
        trainer.model.backbone(task).word_embedding.weight[word] = value
    return places[0]


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize(("task", "value"), [("sst", math.nan), ("sts", math.inf), ("para", -math.inf)])
@pytest.mark.parametrize("routine", ["sequential", "interleave"])
def test_the_first_bad_batch_is_named(
    tiny_flags: list[str], tmp_path: Path, precision: torch.dtype | None, task: str, value: float, routine: str
) -> None:
    """It is found whenever the losses are looked at, and best.pt and resume.pt stay as they were."""
    run = tmp_path / "run"
    files: dict[str, str] = {}
    wanted: list[int] = []

    flags = ["--fine_tune_mode", "full-model", "--batch_size", 1, "--routine", routine, "--epochs", 3]
    trainer = make_trainer(tiny_flags, run, *flags)
    if precision is not None:
        trainer = in_half(trainer, precision)
    original = trainer.train_epoch

    def second_epoch() -> Any:
        if trainer.epoch == 1:
            wanted.append(poison(trainer, task, value))
            files.update({name: sha256(run / name) for name in ("best.pt", "resume.pt")})
        return original()

    trainer.train_epoch = second_epoch  # type: ignore[method-assign]
    with pytest.raises(UserError) as error:
        trainer.fit()
    step, epoch = trainer.steps_of(1)[wanted[0]], 2
    known = json.loads((run / "bad_batch.json").read_text())
    ids = trainer.train_data[step.task].examples.ids
    assert (known["epoch"], known["batch"], known["task"]) == (epoch, wanted[0] + 1, task)
    assert known["ids"] == [ids[i] for i in step.indices] and known["loss"] in ("nan", "inf")
    if wanted[0]:
        before = trainer.steps_of(1)[wanted[0] - 1]
        rows = trainer.train_data[before.task].examples.ids
        assert known["batch_before"] == {"task": before.task, "ids": [rows[i] for i in before.indices]}
    message = str(error.value)
    assert message.startswith(f"{TASKS[task].title}: a loss is not finite any more, at first {known['loss']} in batch ")
    assert str(run / "bad_batch.json") in message and "--lr" in message and "\n" not in message
    assert {name: sha256(run / name) for name in files} == files and len(files) == 2
    assert len(metrics(run)) == 1
    assert trainer.step - 60 <= wanted[0] + 3 * LOG_EVERY  # seen at the next look


class _Waits(TorchDispatchMode):
    """Counts how often a number is asked back from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [[], ["--routine", "joint", "--pcgrad", "--clip", 1.0]], ids=str)
def test_losses_are_asked_for_now_and_then(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    """A step without a look asks for nothing, though its loss is watched."""
    trainer = trainer_of(tiny_flags, tmp_path / "run", *more)
    for step in trainer.steps_of(0):
        trainer.train_step(step, False)
    with _Waits() as waits:
        for step in trainer.steps_of(0):
            trainer.train_step(step, False)
    assert waits.count == 0
    trainer = make_trainer(tiny_flags, tmp_path / "whole", *more, "--batch_size", 1, "--epochs", 1)
    trainer.telemetry = loop.Telemetry(trainer.run, trainer.config, trainer.tasks)
    with _Waits() as waits:
        trainer.run_steps(trainer.steps_of(0))
    looks = 3 * 20 // LOG_EVERY
    assert looks <= waits.count <= 6 * looks + 3


# -------------------------------------------------------------------------------------------------------------- weights


def ruin(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.view(-1)[-1] = math.nan


@pytest.mark.parametrize("more", [[], ["--eval_every", 2], ["--average", "ema"], ["--average", "swa"]], ids=str)
def test_ruined_weights_are_never_saved(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    """The last step of an epoch ruins a weight that no dev sentence needs: no loss and no output shows it."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 3, *more)
    original = trainer.run_steps

    def last_step(steps: Any) -> None:
        original(steps)
        if trainer.epoch == 1:
            ruin(trainer.model.backbone("sst").pos_embedding.weight)  # the last position: no sentence is as long

    trainer.run_steps = last_step  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^backbones\.sentiment\.pos_embedding\.weight is not finite any more and was"):
        trainer.fit()
    assert len(metrics(tmp_path / "run")) == 1
    assert load(tmp_path / "run" / "resume.pt")["epoch"] == 1
    for name in ("best.pt", "resume.pt"):
        if (tmp_path / "run" / name).exists():
            assert all(own.isfinite().all() for own in load(tmp_path / "run" / name)["weights"].values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ruined_numbers_are_told_from_large_ones(dtype: torch.dtype) -> None:
    """Whose sum overflows, or whose infinities have both signs; whole numbers and nothing at all are well."""
    large, counts = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype), torch.arange(3)
    refuse_ruined([])
    refuse_ruined({"large": large, "none": large[:0], "counts": counts, "step": 3}.items())
    for value in (math.nan, math.inf, -math.inf):
        odd = torch.zeros(5, dtype=dtype)
        odd[1], odd[3] = value, -value
        with pytest.raises(UserError, match="^odd is not finite any more and was not saved"):
            refuse_ruined({"counts": counts, "large": large, "odd": odd, "also": odd}.items())


def test_each_file_has_its_own_gate(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 1, "--fine_tune_mode", "full-model")
    trainer.fit()
    before = {name: sha256(tmp_path / "run" / name) for name in ("best.pt", "resume.pt")}
    state = next(iter(trainer.optimizers["sst"].state.values()))
    ruin(state["exp_avg"])
    with pytest.raises(UserError, match="^exp_avg of the optimizer of sst is not finite any more"):
        trainer.save_resume()
    state["exp_avg"].zero_()
    ruin(trainer.model.heads["sts"].get_parameter("2.bias"))
    for write in (trainer.save_resume, lambda: trainer.save_best({})):
        with pytest.raises(UserError, match=r"^heads\.sts\.2\.bias is not finite any more and was not saved"):
            write()
    assert {name: sha256(tmp_path / "run" / name) for name in before} == before


def test_a_ruined_checkpoint_predicts_nothing(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    import multitask_classifier
    from models.checkpoint import save

    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 1)
    trainer.fit()
    content = load(tmp_path / "run" / "best.pt")
    content["weights"]["backbones.sentiment.pooler_dense.bias"][0] = math.nan
    save(tmp_path / "bad.pt", content)
    (tmp_path / "x.txt").write_text("A film .\n")
    for flags in (["--data_dir", str(small_data)], ["--predict", str(tmp_path / "x.txt"), "--task", "sst"]):
        with pytest.raises(UserError, match="^SST sentiment: an output on .* is not finite any more"):
            multitask_classifier.main(["--evaluate", str(tmp_path / "bad.pt"), *flags])
    assert not (tmp_path / "bad-evaluation" / "scores.json").exists()


def test_a_new_run_forgets_the_bad_batch_of_the_old(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    trainer.run.write_json("bad_batch.json", {})
    make_trainer(tiny_flags, tmp_path / "run", "--overwrite")
    assert not (tmp_path / "run" / "bad_batch.json").exists()


def test_a_skipped_joint_step_gives_all_its_batches_back(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = in_half(make_trainer(tiny_flags, tmp_path / "run", "--routine", "joint", "--lr_schedule", "linear"))
    trainer.scaler.skipped = 1
    positions: list[float] = []
    original = trainer.set_rates
    trainer.set_rates = lambda task, at: (positions.append(at), original(task, at))[1]  # type: ignore[method-assign]
    trainer.telemetry = loop.Telemetry(trainer.run, trainer.config, trainer.tasks)
    trainer.done = 3  # the batches of the step that was skipped
    trainer.model.freeze_for_epoch(trainer.config.train, 0)
    trainer.scaler.moves = lambda optimizer: True  # type: ignore[method-assign]
    trainer.run_steps(trainer.steps_of(0))
    assert positions == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 1 / 3])  # of three steps of three batches


def test_every_state_of_every_optimizer_has_its_gate(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 1, "--fine_tune_mode", "full-model")
    trainer.fit()
    for task, optimizer in trainer.optimizers.items():
        state = list(optimizer.state.values())[-1]
        ruin(state["exp_avg"])
        with pytest.raises(UserError, match=f"^exp_avg of the optimizer of {task} is not finite any more"):
            trainer.save_resume()
        state["exp_avg"].zero_()


def test_of_several_bad_losses_of_a_task_the_first_is_named(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    steps = trainer.steps_of(0)
    numbers = [i for i, step in enumerate(steps) if step.task == "para"]
    meter = TaskMeter()
    meter.numbers, meter.losses = numbers, [torch.tensor(own) for own in (1.0, float("nan"), float("inf"))]
    with pytest.raises(UserError, match=f"at first nan in batch {numbers[1] + 1} of epoch 1"):
        refuse_bad_losses({"para": meter}, steps, 1, trainer.train_data, trainer.run)
