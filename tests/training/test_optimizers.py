"""Which optimizer moves what, at which rate and decay, after which clipping, and the scaler of fp16."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import changed, copied, make_ready, make_trainer, metrics, step_of, steps_of, tensors_of
from torch import Tensor

from config import TrainOptions
from models.checkpoint import load
from optimizer import OPTIMIZERS, Schedule
from tasks import DEFAULT_TASKS, TASKS
from training.losses import LOSSES
from training.optimizers import Scaler
from training.task_sampling import ROUTINES
from training.trainer import Trainer
from utils.device import Device
from utils.errors import UserError

CPU = torch.device("cpu")
FP16 = Device(CPU, torch.float16, scaled=True)


def test_the_command_lines_choices_are_those_of_the_tables() -> None:
    choices = {name: spec.metadata.get("choices") for name, spec in TrainOptions.__dataclass_fields__.items()}
    assert set(choices["optim"]) == set(OPTIMIZERS) and set(choices["routine"]) == set(ROUTINES)
    assert all(Schedule(name, 1.0, 3).at(0.0) >= 0 for name in choices["lr_schedule"])
    assert {name for task in TASKS.values() for name in task.losses} == set(LOSSES)


def test_a_step_of_one_task_leaves_the_others_alone(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_ready(tiny_flags, tmp_path / "run", "--optim", "AdamW")
    optimizers = trainer.optimizers.by_name
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for task, reached in {
        "sst": ("backbones.sentiment.", "heads.sst."),
        "para": ("backbones.similarity.", "pair_layer.", "heads.para."),
        "sts": ("backbones.similarity.", "pair_layer.", "heads.sts."),
    }.items():
        (group,) = optimizers[task].param_groups
        assert {names[p] for p in group["params"]} == {name for name in names.values() if name.startswith(reached)}
        assert group["weight_decay"] == TASKS[task].weight_decay
        trainer.train_step(step_of(task, range(8)))
    before, weights = {task: tensors_of(optimizers[task]) for task in DEFAULT_TASKS}, copied(trainer.model)
    trainer.train_step(step_of("sst", range(8)))
    same = {
        task: all(torch.equal(a, b) for a, b in zip(before[task], tensors_of(optimizers[task]), strict=True))
        for task in DEFAULT_TASKS
    }
    assert same == {"sst": False, "para": True, "sts": True}
    moved = changed(weights, copied(trainer.model))
    assert all(name.startswith(("backbones.sentiment.", "heads.sst.")) for name in moved)
    assert {f"backbones.sentiment.{name}" for name in ("word_embedding.weight", "pooler_dense.bias")} <= moved


@pytest.mark.parametrize("routine", ["sequential", "joint"])
def test_layers_have_falling_rates(tiny_flags: list[str], tmp_path: Path, routine: str) -> None:
    """The embeddings' rate is d^L of the whole rate; the groups hold the same parameters as without."""
    flags = ["--optim", "SGD", "--routine", routine, "--lr_schedule", "constant"]
    plain = make_ready(tiny_flags, tmp_path / "plain", *flags).optimizers
    trainer = make_ready(tiny_flags, tmp_path / "run", *flags, "--layer_lr_decay", 0.5)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    top = trainer.model.bert_config.num_hidden_layers
    for key, optimizer in trainer.optimizers.by_name.items():
        trainer.optimizers.set_rates(optimizer, 0.0)
        plain.set_rates(plain.by_name[key], 0.0)
        whole = [(round(group["lr"], 9), p.shape) for group in plain.by_name[key].param_groups for p in group["params"]]
        found = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                layer = int(name.split(".")[3]) + 1 if ".bert_layers." in name else 0 if "embed" in name else top
                found.append((round(group["lr"] / 0.5 ** (top - layer), 9), parameter.shape))
        assert sorted(found) == sorted(whole)
    assert top > 1


def test_a_group_has_the_mean_decay_of_its_tasks(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--routine", "joint", "--arch", "r1-baseline", "--sst_weight_decay", 0.3, "--quora_weight_decay", 0.6]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags, "--sts_weight_decay", 0)
    decays = {group["tasks"]: group["weight_decay"] for group in trainer.optimizers.by_name["joint"].param_groups}
    wanted = {("sst", "para", "sts"): 0.3, ("sst",): 0.3, ("para",): 0.6, ("sts",): 0.0}
    assert decays == pytest.approx(wanted)


@pytest.mark.parametrize("clip", [1e6, 1e-3])
def test_clipping_bounds_the_gradients_norm(tiny_flags: list[str], tmp_path: Path, clip: float) -> None:
    """A step of SGD without decay is a multiple of the clipped gradient."""
    steps, norms = [], []
    for name, more in (("plain", []), ("clipped", ["--clip", clip])):
        trainer = make_ready(tiny_flags, tmp_path / name, "--optim", "SGD", "--sst_weight_decay", 0, *more)
        before = copied(trainer.model)
        trainer.optimizers.by_name["sst"].param_groups[0]["lr"] = 1.0  # a small one would leave few digits of a step
        torch.manual_seed(0)
        norms.append(trainer.train_step(step_of("sst", range(8)), measure_norm=True).norm)
        moved = dict(trainer.model.named_parameters())
        steps.append(torch.cat([(moved[name].detach() - before[name]).flatten() for name in moved]))
    assert norms[0] == norms[1] > 1  # the norm before clipping is what is recorded
    if clip > 1:
        assert torch.equal(*steps)
        return
    assert steps[1].norm().item() == pytest.approx((steps[0].norm() / norms[0]).item() * clip, rel=1e-3)
    assert torch.cosine_similarity(steps[0], steps[1], dim=0).item() == pytest.approx(1.0, abs=1e-4)


def watch_rates(trainer: Trainer) -> list[dict[str, float]]:
    """Return a list that gets, at each optimizer step to come, the rate of each task alone."""
    used: list[dict[str, float]] = []
    for optimizer in trainer.optimizers.by_name.values():
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: used.append(
                {group["tasks"][0]: group["lr"] for group in optimizer.param_groups if len(group["tasks"]) == 1}
            )
        )
    return used


@pytest.mark.parametrize("name", ["lambda", "cosine", "linear", "cyclic", "cumulative"])
def test_each_step_uses_the_schedule_times_the_multiplier(tiny_flags: list[str], tmp_path: Path, name: str) -> None:
    """Rates are read where the optimizer finds them, at its step."""
    flags = ["--lr_schedule", name.replace("cumulative", "cyclic"), "--epochs", 3, "--sts_lr_multiplier", 7]
    more = {"lambda": ["--lr_lambda", 0.25], "linear": ["--warmup", 0.3], "cumulative": ["--lr_cycle", "cumulative"]}
    flags += more.get(name, [])
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    used = watch_rates(trainer)
    trainer.fit()
    multipliers, floors = {"sst": 4.0, "para": 5.0, "sts": 7.0}, {"sst": 1 / 5, "para": 1 / 4, "sts": 1 / 4}
    wanted = []
    for epoch in range(3):
        for number, task in enumerate(["sst"] * 3 + ["para"] * 3 + ["sts"] * 3):
            done = (epoch + number / 9) / 3
            factor = {
                "lambda": 0.25**epoch,
                "cosine": floors[task] + (1 - floors[task]) * (1 + math.cos(math.pi * done)) / 2,
                "linear": done / 0.3 if done <= 0.3 else (1 - done) / 0.7,
                "cyclic": 8 ** -(3 * done % 2 / 2),
                "cumulative": 8 ** -(3 * done / 2),
            }[name]
            wanted.append({task: pytest.approx(1e-3 * multipliers[task] * factor, rel=1e-9, abs=1e-15)})
    assert used == wanted
    last = {task: rate for rates in used[-9:] for task, rate in rates.items()}
    assert {task: done["lr"] for task, done in metrics(tmp_path / "run")[2]["train"].items()} == last


def test_a_joint_step_has_the_rate_of_its_place_among_the_steps(tiny_flags: list[str], tmp_path: Path) -> None:
    """Its batches are one step: the first one of the run is at the very beginning of the schedule."""
    flags = ["--routine", "joint", "--lr_schedule", "linear", "--arch", "r1-baseline"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    used = watch_rates(trainer)
    trainer.fit()
    schedules = trainer.optimizers.schedules
    assert used == [
        {task: pytest.approx(schedule.at(number / 3)) for task, schedule in schedules.items()} for number in range(6)
    ]
    assert {task: done["lr"] for task, done in metrics(tmp_path / "run")[1]["train"].items()} == used[-1]


def scale_to(trainer: Trainer, scale: float) -> None:
    """Set the scale of the losses."""
    scaler = trainer.optimizers.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": scale})


@pytest.mark.parametrize(
    "more",
    [
        ["--clip", 0.1],
        ["--optim", "AdamW", "--average", "ema", "--ema_warmup"],
        ["--optim", "RAdam", "--sts_bregman", 1],
        ["--routine", "joint"],
        ["--routine", "joint", "--pcgrad", "--clip", 0.1, "--arch", "r1-baseline"],
    ],
    ids=str,
)
def test_an_overflowing_step_is_skipped(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    """Weights, moments, step counts and averages stay to the bit, the scale is halved, and the next step is made."""
    trainer = make_ready(tiny_flags, tmp_path / "run", *more, device=FP16)
    scaler, huge = trainer.optimizers.scaler, 2.0**40  # by which every gradient overflows fp16
    averages = [average for average in (trainer.average, trainer.objective.momentum_model) if average is not None]

    def step(number: int, scale: float) -> dict[str, Tensor]:
        """Make a step; return all that it may change but the statistics of BatchNorm, whose pass was all right."""
        scale_to(trainer, scale)
        trainer.train_step(steps_of(trainer)[number], measure_norm=number == 1)
        state = {name: tensor for name, tensor in copied(trainer.model).items() if "running_" not in name}
        for name, optimizer in trainer.optimizers.by_name.items():
            state |= {f"{name} {i}": tensor for i, tensor in enumerate(tensors_of(optimizer))}
        for i, average in enumerate(averages):
            averaged = average.averages.items()
            state |= {f"average {i} {name}": tensor.clone() for name, tensor in averaged if "running_" not in name}
            state[f"updates {i}"] = torch.tensor(average.updates)
        return state

    first = step(0, 128.0)
    assert scaler.skipped == 0
    assert changed(first, step(1, huge)) == set()
    assert scaler.get_scale() == huge / 2 and scaler.skipped == 1
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    moved = changed(first, step(2, 128.0))
    assert any(name.startswith("heads.") for name in moved)
    assert {f"updates {i}" for i in range(len(averages))} <= moved
    assert scaler.take_skipped() == 1 and scaler.take_skipped() == 0


def test_pcgrad_of_scaled_gradients_is_that_of_the_gradients(tiny_flags: list[str], tmp_path: Path) -> None:
    """Projections are the same whatever the scale; it is taken out before the gradient is clipped."""
    found = []
    for scale in (1.0, 1024.0):
        flags = ["--routine", "joint", "--pcgrad", "--clip", 0.05, "--optim", "SGD", "--arch", "r1-baseline"]
        device = Device(CPU, None, True)  # fp32 with a scaler, so that nothing is rounded
        trainer = make_ready(tiny_flags, tmp_path / str(scale), *flags, device=device)
        trainer.optimizers.scaler = Scaler("cpu", init_scale=scale)
        torch.manual_seed(0)
        trainer.train_step(steps_of(trainer)[0])
        found.append(copied(trainer.model))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("routine", ["sequential", "joint"])
def test_skipped_steps_are_counted_and_shown(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], routine: str
) -> None:
    """In the epoch's record, the table and TensorBoard; the schedule of the rates does not advance by them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--lr_schedule", "linear", "--tensorboard", "--average", "ema", "--routine", routine]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags, device=FP16)
    scale_to(trainer, 128.0)
    for parameter in trainer.model.heads.parameters():
        parameter.register_hook(lambda gradient: gradient * (math.inf if trainer.progress.steps < 2 else 1.0))
    rates: list[dict[str, float]] = []
    set_rates = trainer.optimizers.set_rates

    def watched(optimizer: Any, position: float) -> dict[str, float]:
        rates.append(set_rates(optimizer, position))
        return rates[-1]

    trainer.optimizers.set_rates = watched  # type: ignore[method-assign]
    trainer.fit()
    steps = 3 if routine == "joint" else 9
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [2, 0]
    assert "2 steps skipped, whose gradients overflowed fp16" in capsys.readouterr().out
    assert trainer.average is not None and trainer.average.updates == 2 * steps - 2
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [point.value for point in events.Scalars("optim/skipped_steps")] == [2, 0]
    schedule = trainer.optimizers.schedules["sst"]
    positions = [0, 0, *(number / steps for number in range(steps - 2))]
    assert [found["sst"] for found in rates[:steps]] == pytest.approx([schedule.at(at) for at in positions])


def test_the_count_goes_on_after_resuming() -> None:
    scaler, other, plain = Scaler("cpu"), Scaler("cpu"), Scaler("cpu", enabled=False)
    scaler.skipped = 3
    scaler.load_state_dict({**scaler.state_dict(), "scale": 64.0})
    other.load_state_dict(scaler.state_dict())
    assert (other.skipped, other.get_scale()) == (3, 64.0)
    other.load_state_dict(plain.state_dict())  # of a run without scaling
    assert other.get_scale() == 64.0 and plain.take_skipped() is None


def test_gradients_that_overflow_at_any_scale_stop_the_run(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 30, device=FP16)
    for parameter in trainer.model.heads.parameters():
        parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match="overflows fp16 even when scaled by .*; lower --lr or set --clip"):
        trainer.fit()
    best = load(tmp_path / "run" / "best.pt")["weights"]
    assert all(tensor.isfinite().all() for tensor in best.values())
