"""The loop: what trains and what stays, rates, clipping, evaluation, resuming, checkpoints; a run takes a second."""

import errno
import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_config import FILMS
from torch import Tensor

import multitask_classifier
from cli.parser import parse
from config import Config
from datasets import load_splits, tokenise
from evaluation.predict import predict
from models.checkpoint import copy, load, load_model, load_model_state_dict, model_checkpoint, save
from models.freezing import scheduled_layers
from models.heads import BatchNorm
from models.multitask_bert import MultitaskBERT
from optimizer import Schedule
from tasks import DEFAULT_TASKS, SST, STS, TASKS, Task
from training import trainer as loop
from training.meters import TaskMeter
from training.run_directory import RunDirectory
from training.trainer import Trainer
from utils.device import Device
from utils.errors import UserError
from utils.files import sha256, write_atomically, write_text

CPU = Device(torch.device("cpu"))
State = dict[str, Tensor]


def make_trainer(
    flags: list[str],
    run_dir: Path,
    *more: object,
    say: Callable[[str], None] | None = None,
    device: Device = CPU,
) -> Trainer:
    """A Trainer made from a command line as the script makes it, without TensorBoard."""
    words = [*flags, "--no_tensorboard", "--run_dir", run_dir, *more]
    config = parse([str(word) for word in words], TASKS, "test", "Test.")
    tasks = {name: TASKS[name] for name in config.tasks}
    splits = load_splits(config.data, config.tasks, tasks, ["train", "dev"], print)
    model, tokenizer = multitask_classifier.build_model(config, tasks)
    data = tokenise(splits, tokenizer, str(config.model.pair_encoding), config.data.extra_clean, print)
    run = RunDirectory(run_dir)
    run.prepare(config.run.overwrite, config.run.resume, 0)
    run.begin(config)
    return Trainer(config, model, tokenizer, data["train"], data["dev"], device, run, say or (lambda line: None))


def copied(model: MultitaskBERT) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def states_by_epoch(flags: list[str], run_dir: Path, *more: object) -> tuple[MultitaskBERT, list[State]]:
    """The model's tensors before training and after each epoch."""
    states: list[State] = []

    def after_epoch(text: str) -> None:
        if text.startswith("\nEpoch"):
            states.append(copied(trainer.model))

    trainer = make_trainer(flags, run_dir, *more, say=after_epoch)
    states.append(copied(trainer.model))
    trainer.fit()
    return trainer.model, states


def changed(before: State, after: State) -> set[str]:
    assert list(before) == list(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def digest(state: State, prefix: str) -> str:
    out = hashlib.sha256()
    for name, tensor in state.items():
        if name.startswith(prefix):
            out.update(name.encode() + tensor.numpy().tobytes())
    return out.hexdigest()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------- learning, freezing


@pytest.mark.parametrize("arch", ["yin-yang", "r4"])
def test_the_loss_falls_on_the_sample_data(tiny_flags: list[str], sample: Path, tmp_path: Path, arch: str) -> None:
    more = ["--data_dir", sample, "--arch", arch, "--batch_size", 32, "--epochs", 3, "--fine_tune_mode", "full-model"]
    more += ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0, "--optim", "AdamW", "--lr_schedule", "constant"]
    more += ["--lr", 3e-4]
    make_trainer(tiny_flags, tmp_path / "run", *more).fit()
    lines = metrics(tmp_path / "run")
    for task in DEFAULT_TASKS:
        assert lines[2]["train"][task]["loss"] < lines[0]["train"][task]["loss"] - 0.02, task
        assert lines[0]["train"][task]["steps"] == 19


@pytest.mark.parametrize("arch", ["yin-yang", "v2", "r4"])
def test_last_layer_leaves_the_backbones_as_they_were(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    """Bitwise, over all epochs, in spite of weight decay."""
    model, states = states_by_epoch(tiny_flags, tmp_path / "run", "--fine_tune_mode", "last-layer", "--arch", arch)
    assert digest(states[-1], "backbones.") == digest(states[0], "backbones.")
    if arch != "r4":  # its STS head is a bare cosine
        heads = [f"heads.{task}." for task in DEFAULT_TASKS]
        assert all(digest(states[-1], head) != digest(states[0], head) for head in heads)
    assert all(not parameter.requires_grad for parameter in model.backbones.parameters())


def test_iterative_unfreezing_by_hashes(tiny_flags: list[str], tmp_path: Path) -> None:
    """Two layers: heads; top one in epochs 2 and 3; both in epoch 4; embeddings too in epoch 5."""
    flags = ["--fine_tune_mode", "iterative", "--epochs", 5, "--lr_schedule", "constant"]
    model, states = states_by_epoch(tiny_flags, tmp_path / "run", *flags)
    parts = ["word_embedding", "pos_embedding", "embed_layer_norm", "bert_layers.0", "bert_layers.1", "pooler_dense"]
    moving = [
        set(),
        {"bert_layers.1", "pooler_dense"},
        {"bert_layers.1", "pooler_dense"},
        {"bert_layers.0", "bert_layers.1", "pooler_dense"},
        set(parts),
    ]
    for backbone in ("sentiment", "similarity"):
        for epoch, wanted in enumerate(moving):
            before, after = states[epoch], states[epoch + 1]
            prefix = f"backbones.{backbone}."
            found = {part for part in parts if digest(before, prefix + part) != digest(after, prefix + part)}
            assert found == wanted, f"{backbone}, epoch {epoch + 1}"
            assert digest(before, "heads.") != digest(after, "heads.")
            assert digest(before, "pair_layer.") != digest(after, "pair_layer.")
    told = [line["trains"] for line in metrics(tmp_path / "run")]
    assert told == [
        "the heads train",
        "the heads, the pooler and the top 1 layer train",
        "the heads, the pooler and the top 1 layer train",
        "the heads, the pooler and the top 2 layers train",
        "everything trains",
    ]


def test_full_model_changes_everything_that_a_batch_reaches(tiny_flags: list[str], tmp_path: Path) -> None:
    model, states = states_by_epoch(tiny_flags, tmp_path / "run", "--fine_tune_mode", "full-model", "--epochs", 1)
    names = {name for name, parameter in model.named_parameters()}
    assert changed(states[0], states[1]) >= names
    cross, states = states_by_epoch(
        tiny_flags, tmp_path / "v2", "--fine_tune_mode", "full-model", "--epochs", 1, "--arch", "v2"
    )
    names = {name for name, parameter in cross.named_parameters()}
    assert changed(states[0], states[1]) == names


def test_a_task_without_gradient_is_passed_over(tiny_flags: list[str], tmp_path: Path) -> None:
    """A bare cosine on a frozen backbone has nothing to train; the epoch goes on with the others."""
    _, states = states_by_epoch(
        tiny_flags, tmp_path / "run", "--arch", "v1", "--fine_tune_mode", "last-layer", "--epochs", 1
    )
    assert {name.split(".")[1] for name in changed(states[0], states[1])} == {"sst", "para"}
    assert metrics(tmp_path / "run")[0]["train"]["sts"]["steps"] == 3


# ------------------------------------------------------------------------------------------------- optimizers and rates


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every number in an optimizer's state, copied, parameter by parameter."""
    return [
        torch.as_tensor(value).clone()
        for parameter in optimizer.param_groups[0]["params"]
        for _, value in sorted(optimizer.state.get(parameter, {}).items())
    ]


def one_step(trainer: Trainer, task: str, rows: range = range(8), lr: float = 1e-3) -> Tensor:
    """One optimizer step of a task; returns the gradient's norm before clipping."""
    trainer.optimizers[task].param_groups[0]["lr"] = lr
    return trainer.train_step(loop.Step(task, np.arange(rows.start, rows.stop)), True)[3]


@pytest.mark.parametrize("optim", ["Adamax", "AdamW", "SGD"])
def test_a_step_of_one_task_leaves_the_others_alone(tiny_flags: list[str], tmp_path: Path, optim: str) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--fine_tune_mode", "full-model", "--optim", optim)
    trainer.model.manage_freezing("unfreezeall")
    for task in DEFAULT_TASKS:
        one_step(trainer, task)
    before, weights = {task: tensors_of(trainer.optimizers[task]) for task in DEFAULT_TASKS}, copied(trainer.model)
    assert all(before.values())
    one_step(trainer, "sst")
    after = {task: tensors_of(trainer.optimizers[task]) for task in DEFAULT_TASKS}
    for task in ("para", "sts"):
        assert len(before[task]) == len(after[task])
        assert all(torch.equal(a, b) for a, b in zip(before[task], after[task], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before["sst"], after["sst"], strict=True))
    moved = changed(weights, copied(trainer.model))
    assert all(name.startswith(("backbones.sentiment.", "heads.sst.")) for name in moved)
    assert {f"backbones.sentiment.{name}" for name in ("word_embedding.weight", "pooler_dense.bias")} <= moved


def test_optimizers_have_state_only_for_what_their_task_reaches(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for task, reached in {
        "sst": ("backbones.sentiment.", "heads.sst."),
        "para": ("backbones.similarity.", "pair_layer.", "heads.para."),
        "sts": ("backbones.similarity.", "pair_layer.", "heads.sts."),
    }.items():
        found = {names[id(p)] for p in trainer.optimizers[task].param_groups[0]["params"]}
        assert found == {name for name in names.values() if name.startswith(reached)}
        assert trainer.optimizers[task].param_groups[0]["weight_decay"] == TASKS[task].weight_decay


@pytest.mark.parametrize("clip", [0.05, 1e-3])
def test_clipping_bounds_the_gradients_norm(tiny_flags: list[str], tmp_path: Path, clip: float) -> None:
    """With SGD without momentum's past, the first step is lr times the clipped gradient."""
    flags = ["--optim", "SGD", "--sst_weight_decay", 0, "--fine_tune_mode", "full-model"]
    steps, norms = [], []
    for number, more in enumerate(([], ["--clip", clip])):
        trainer = make_trainer(tiny_flags, tmp_path / str(number), *flags, *more)
        trainer.model.manage_freezing("unfreezeall")
        before = dict(trainer.model.named_parameters())
        old = {name: parameter.detach().clone() for name, parameter in before.items()}
        torch.manual_seed(0)
        norms.append(one_step(trainer, "sst", lr=1.0).item())
        steps.append(torch.cat([(before[name].detach() - old[name]).flatten() for name in old]))
    assert norms[0] == norms[1] > 2 * clip  # the norm before clipping is what is recorded
    ratio = steps[0].norm() / norms[0]  # Nesterov's first step is a multiple of the gradient
    assert steps[1].norm().item() == pytest.approx(ratio.item() * clip, rel=1e-3)
    assert torch.cosine_similarity(steps[0], steps[1], dim=0).item() == pytest.approx(1.0, abs=1e-4)


def test_a_small_gradient_is_not_clipped(tiny_flags: list[str], tmp_path: Path) -> None:
    states = []
    for number, more in enumerate(([], ["--clip", 1e6])):
        _, own = states_by_epoch(tiny_flags, tmp_path / str(number), "--epochs", 1, *more)
        states.append(own[-1])
    assert changed(*states) == set()


@pytest.mark.parametrize("name", ["constant", "lambda", "cosine", "linear"])
def test_each_step_uses_the_schedule_times_the_multiplier(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Rates are read where the optimizer finds them, at its step."""
    flags = ["--lr_schedule", name, "--epochs", 3, "--sts_lr_multiplier", 7]
    flags += {"lambda": ["--lr_lambda", 0.25], "linear": ["--warmup", 0.3]}.get(name, [])
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    used: list[tuple[str, float]] = []
    for task, optimizer in trainer.optimizers.items():

        def watched(task: str = task, optimizer: Any = optimizer, step: Any = optimizer.step) -> None:
            used.append((task, optimizer.param_groups[0]["lr"]))
            step()

        monkeypatch.setattr(optimizer, "step", watched)
    trainer.fit()
    multipliers, floors = {"sst": 4.0, "para": 5.0, "sts": 7.0}, {"sst": 1 / 5, "para": 1 / 4, "sts": 1 / 4}
    wanted = []
    for epoch in range(3):
        for number, task in enumerate(["sst"] * 3 + ["para"] * 3 + ["sts"] * 3):
            done = (epoch + number / 9) / 3
            factor = {
                "constant": 1.0,
                "lambda": 0.25**epoch,
                "cosine": floors[task] + (1 - floors[task]) * (1 + math.cos(math.pi * done)) / 2,
                "linear": done / 0.3 if done <= 0.3 else (1 - done) / 0.7,
            }[name]
            wanted.append((task, pytest.approx(1e-3 * multipliers[task] * factor, rel=1e-9, abs=1e-15)))
    assert used == wanted
    last = {task: rate for task, rate in used[-9:]}
    assert {task: own["lr"] for task, own in metrics(tmp_path / "run")[2]["train"].items()} == last


def test_rounds_and_examples_of_an_epoch(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--num_sst_trains", 2, "--num_quora_trains", 1, "--num_sts_trains", 5, "--epochs", 1]
    make_trainer(tiny_flags, tmp_path / "run", *flags, "--routine", "interleave").fit()
    line = metrics(tmp_path / "run")[0]
    assert {task: own["steps"] for task, own in line["train"].items()} == {"sst": 6, "para": 3, "sts": 15}
    assert line["step"] == 24


def test_a_task_may_have_no_rounds(tiny_flags: list[str], tmp_path: Path) -> None:
    make_trainer(tiny_flags, tmp_path / "run", "--num_sts_trains", 0, "--epochs", 1).fit()
    line = metrics(tmp_path / "run")[0]
    assert list(line["train"]) == ["sst", "para"] and list(line["dev"])[:3] == ["sst", "para", "sts"]


@pytest.mark.parametrize("arch", ["yin-yang", "r4"])
def test_a_last_batch_of_one_trains(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    """BatchNorm has no variance there, Pearson no correlation."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--batch_size", 19, "--arch", arch)
    trainer.fit()
    assert all(len(data) % 19 == 1 for data in trainer.train_data.values())
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    assert metrics(tmp_path / "run")[1]["train"]["sts"]["steps"] == 2


def test_a_batch_size_of_one_trains(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--batch_size", 1, "--epochs", 1, "--max_train_examples", 3)
    trainer.fit()
    assert metrics(tmp_path / "run")[0]["train"]["para"]["steps"] == 3
    assert any(isinstance(module, BatchNorm) for module in trainer.model.modules())


def test_max_train_examples_cuts_training_alone(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--max_train_examples", 5, "--epochs", 1)
    assert {task: len(data) for task, data in trainer.train_data.items()} == dict.fromkeys(DEFAULT_TASKS, 5)
    assert {task: len(data) for task, data in trainer.dev_data.items()} == dict.fromkeys(DEFAULT_TASKS, 12)
    trainer.fit()
    assert {own["steps"] for own in metrics(tmp_path / "run")[0]["train"].values()} == {1}


def test_gradient_norm_is_that_of_the_whole_gradient(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    trainer.model.manage_freezing("unfreezeall")
    trainer.model.eval()  # no dropout, so that the gradient can be had a second time
    step = loop.Step("para", np.arange(8))
    data = trainer.train_data["para"]
    loop.LOSSES["bce"](trainer.model("para", data.batch(step.indices)), data.labels(step.indices)).backward()
    grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    wanted = torch.cat(grads).norm().item()
    trainer.model.zero_grad(set_to_none=True)
    assert trainer.train_step(step, True)[3].item() == pytest.approx(wanted, rel=1e-5)
    assert all(p.grad is None for p in trainer.model.parameters())


# -------------------------------------------------------------------------------------------- the same and not the same


def run_lines(flags: list[str], run_dir: Path, *more: object) -> bytes:
    make_trainer(flags, run_dir, *more).fit()
    return (run_dir / "metrics.jsonl").read_bytes()


def test_one_seed_gives_identical_metrics(tiny_flags: list[str], tmp_path: Path) -> None:
    first = run_lines(tiny_flags, tmp_path / "a", "--seed", 3)
    torch.manual_seed(999)  # what a process did before has no part in it
    assert run_lines(tiny_flags, tmp_path / "b", "--seed", 3) == first
    assert run_lines(tiny_flags, tmp_path / "c", "--seed", 4) != first
    a, b = load(tmp_path / "a" / "best.pt"), load(tmp_path / "b" / "best.pt")
    assert changed(a["weights"], b["weights"]) == set()


class Stopped(Exception):
    """The process ends here, as if it had been killed."""


def whole_and_resumed(
    flags: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str, *more: object
) -> tuple[Trainer, Trainer]:
    """A run of three epochs, and one that is interrupted in its second, at a `moment`, and then resumed.

    Each epoch writes a best.pt. Both end with the same scores, records and best.pt.
    """
    more = (*more, "--epochs", 3, "--fine_tune_mode", "full-model")
    overall = loop.overall
    monkeypatch.setattr(loop, "overall", rising(overall))
    whole = make_trainer(flags, folder / "whole", *more)
    scores = whole.fit()

    monkeypatch.setattr(loop, "overall", rising(overall))
    broken = make_trainer(flags, folder / "broken", *more)
    original = getattr(broken, moment)

    def stop(*arguments: Any) -> Any:
        if broken.epoch == (1 if moment == "train_step" else 2):
            if moment == "save_best":
                original(*arguments)
            raise Stopped
        return original(*arguments)

    monkeypatch.setattr(broken, moment, stop)
    with pytest.raises(Stopped):
        broken.fit()
    assert len(metrics(folder / "broken")) == (2 if moment == "save_resume" else 1)

    monkeypatch.setattr(loop, "overall", rising(overall, done=1))
    torch.manual_seed(77)  # another process
    resumed = make_trainer(flags, folder / "broken", *more, "--resume")
    assert resumed.fit() == scores and scores["score"] == 0.02
    assert (folder / "broken" / "metrics.jsonl").read_bytes() == (folder / "whole" / "metrics.jsonl").read_bytes()
    assert len((folder / "broken" / "timing.jsonl").read_text().splitlines()) == 3
    best = [load(folder / name / "best.pt") for name in ("whole", "broken")]
    assert changed(best[0]["weights"], best[1]["weights"]) == set()
    assert best[0]["epoch"] == best[1]["epoch"] == 3 and best[0]["scores"] == best[1]["scores"]
    return whole, resumed


@pytest.mark.parametrize(
    ("routine", "moment"),
    [
        ("sequential", "train_step"), ("interleave", "train_step"), ("sequential", "evaluate"),
        ("sequential", "save_best"), ("interleave", "save_resume"),
    ],
)  # fmt: skip
def test_resuming_ends_as_if_nothing_had_happened(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, routine: str, moment: str
) -> None:
    """The second of three epochs is interrupted, at the latest after best.pt and metrics.jsonl; dropout is on."""
    whole, resumed = whole_and_resumed(tiny_flags, tmp_path, monkeypatch, moment, "--routine", routine)
    assert changed(copied(whole.model), copied(resumed.model)) == set()
    for task in DEFAULT_TASKS:
        pairs = zip(tensors_of(whole.optimizers[task]), tensors_of(resumed.optimizers[task]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def rising(overall: Callable[..., Any], done: int = 0) -> Callable[..., Any]:
    """`overall` with a score that rises from one evaluation to the next, the first being number `done`."""
    number = iter(range(done, 100))
    return lambda *arguments: {**overall(*arguments), "score": next(number) / 100}


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Let the dev scores of a run be these; everything else of an evaluation is as it is."""
    overall, given = loop.overall, iter(scores)
    monkeypatch.setattr(loop, "overall", lambda *arguments: {**overall(*arguments), "score": next(given)})


def test_the_best_checkpoint_is_that_of_the_best_epoch(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.3, 0.5, 0.5, 0.4])  # a tie does not replace it
    trainer_states: list[State] = []
    filepath = tmp_path / "elsewhere" / "model.pt"
    flags = ["--epochs", 4, "--filepath", filepath, "--fine_tune_mode", "full-model"]

    def after_epoch(text: str) -> None:
        if text.startswith("\nEpoch"):
            trainer_states.append(copied(trainer.model))

    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags, say=after_epoch)
    best = trainer.fit()
    content = load(tmp_path / "run" / "best.pt")
    assert (content["epoch"], content["step"], content["scores"]["score"], best["score"]) == (2, 18, 0.5, 0.5)
    assert changed(content["weights"], trainer_states[1]) == set()
    assert changed(content["weights"], trainer_states[3]) != set()
    assert filepath.read_bytes() == (tmp_path / "run" / "best.pt").read_bytes()
    assert load(tmp_path / "run" / "resume.pt")["epoch"] == 4


def test_early_stopping(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.3, 0.2, 0.4, 0.4, 0.1, 0.9])
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 6, "--patience", 2)
    assert trainer.fit()["score"] == 0.4
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_patience_survives_a_resume(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.3, 0.2, 0.1, 0.9])
    flags = ["--epochs", 4, "--patience", 2]
    broken = make_trainer(tiny_flags, tmp_path / "run", *flags)
    step = broken.train_step
    monkeypatch.setattr(broken, "train_step", lambda *a: step(*a) if broken.epoch < 2 else _stop())
    with pytest.raises(Stopped):
        broken.fit()
    assert make_trainer(tiny_flags, tmp_path / "run", *flags, "--resume").fit()["score"] == 0.3
    assert len(metrics(tmp_path / "run")) == 3


def _stop() -> Any:
    raise Stopped


def test_eval_every_and_the_last_epoch(tiny_flags: list[str], tmp_path: Path) -> None:
    make_trainer(tiny_flags, tmp_path / "run", "--epochs", 5, "--eval_every", 2).fit()
    lines = metrics(tmp_path / "run")
    assert [bool(line["dev"]) for line in lines] == [False, True, False, True, True]
    assert all("accuracy" in line["train"]["sst"] and "pearson" in line["train"]["sts"] for line in lines)


def test_a_task_may_be_evaluated_less_often(tiny_flags: list[str], tmp_path: Path) -> None:
    """The best checkpoint comes from an epoch that scored every task, since only such a score can be compared."""
    lines: list[str] = []
    flags = ["--quora_epoch_eval", 2, "--epochs", 5, "--batch_size", 20]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags, say=lines.append)
    trainer.fit()
    evaluated = [set(line["dev"]) for line in metrics(tmp_path / "run")]
    whole = {"sst", "para", "sts", "score", "score_raw_r"}
    assert evaluated == [{"sst", "sts"}, whole, {"sst", "sts"}, whole, whole]
    assert load(trainer.run.best)["epoch"] in (2, 4, 5)
    tables = [line for line in lines if line.startswith("\nEpoch")]
    assert [table.count("accuracy") for table in tables] == [1, 2, 1, 2, 2]
    assert ["dev score" in table for table in tables] == [False, True, False, True, True]


def test_evaluating_less_often_trains_the_same(tiny_flags: list[str], tmp_path: Path) -> None:
    _, often = states_by_epoch(tiny_flags, tmp_path / "a", "--epochs", 2)
    _, once = states_by_epoch(tiny_flags, tmp_path / "b", "--epochs", 2, "--eval_every", 2, "--eval_batch_size", 3)
    assert changed(often[-1], once[-1]) == set()


def test_dev_scores_are_those_of_the_model_at_hand(tiny_flags: list[str], tmp_path: Path) -> None:
    from evaluation.metrics import score_task

    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 1)
    trainer.fit()
    data = trainer.dev_data["sts"]
    outputs = predict(trainer.model, data, CPU.device, 128)
    assert metrics(tmp_path / "run")[0]["dev"]["sts"] == score_task(STS, outputs, data.examples.labels)


# ------------------------------------------------------------------------------------------------------ broken training


@pytest.mark.parametrize("task", ["sst", "sts"])
def test_a_loss_that_is_not_a_number_names_its_task(tiny_flags: list[str], tmp_path: Path, task: str) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 3)
    original = trainer.save_resume

    def poison() -> None:
        original()
        with torch.no_grad():
            next(trainer.model.heads[task].parameters()).fill_(math.nan)

    trainer.save_resume = poison  # type: ignore[method-assign]
    with pytest.raises(UserError, match=f"^{TASKS[task].title}: a loss is not finite any more.*--lr.*--clip"):
        trainer.fit()
    assert len(metrics(tmp_path / "run")) == 1
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / "run" / "best.pt")["weights"].values())


def test_a_run_in_which_nothing_trains_is_refused(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--train_sts", "--arch", "v1", "--fine_tune_mode", "last-layer"]
    with pytest.raises(
        UserError, match="--fine_tune_mode last-layer freezes the backbones in all --epochs 2, and a bare cosine"
    ):
        make_trainer(tiny_flags, tmp_path / "run", *flags).fit()
    make_trainer(tiny_flags, tmp_path / "run", *flags, "--sts_projection", "--overwrite", "--epochs", 1).fit()


def test_a_huge_learning_rate_ends_in_one_line(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--lr", 1e30, "--fine_tune_mode", "full-model")
    with pytest.raises(UserError, match="is not finite any more"):
        trainer.fit()


def test_weights_that_the_last_step_ruined_are_noticed(tiny_flags: list[str], tmp_path: Path) -> None:
    """One step in all: its loss is finite, and yet the model is not afterwards; it must not become the best one."""
    flags = ["--lr", 1e30, "--fine_tune_mode", "full-model", "--batch_size", 64, "--epochs", 1, "--train_sst"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    with pytest.raises(UserError, match="SST sentiment: .*--lr"):
        trainer.fit()
    assert not (tmp_path / "run" / "best.pt").exists()


def test_a_rate_beyond_float32_ends_in_one_line(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make_trainer(tiny_flags, tmp_path / "run", "--lr", 1e38)
    (line,) = capsys.readouterr().err.splitlines()
    assert "argument --lr: 1e+38 is too large" in line


# ---------------------------------------------------------------------------------------------------------- checkpoints


def plain(value: Any) -> Iterator[type]:
    """The types inside nested containers."""
    if isinstance(value, dict):
        for key, own in value.items():
            yield type(key)
            yield from plain(own)
    elif isinstance(value, list | tuple):
        for own in value:
            yield from plain(own)
    else:
        yield type(value)


def test_a_checkpoint_holds_tensors_and_plain_containers(trained: Trainer) -> None:
    for path in (trained.run.best, trained.run.resume):
        content = torch.load(path, weights_only=True)
        assert set(plain(content)) <= {str, int, float, bool, type(None), Tensor}
    best = torch.load(trained.run.best, weights_only=True)
    assert set(best) == {
        "format", "weights", "config", "bert_config", "tasks", "tokenizer", "tokenizer_sha256", "scores",
        "git_commit", "versions", "seed", "epoch", "step", "base_sha256",
    }  # fmt: skip
    assert best["tasks"] == ["sst", "para", "sts"] and best["seed"] == 11711 and best["epoch"] == 1
    assert best["scores"] == metrics(trained.run.path)[0]["dev"]
    assert Config.from_dict(best["config"]) == trained.config


def test_load_model_gives_the_same_outputs(trained: Trainer) -> None:
    model, tokenizer, config = load_model(trained.run.best)
    assert config == trained.config and tokenizer.sha256 == trained.tokenizer.sha256 and tokenizer.max_length == 64
    for data in trained.dev_data.values():
        ours = predict(trained.model, data, CPU.device, 8)
        assert np.array_equal(ours, predict(model, data, CPU.device, 8))


@pytest.mark.parametrize("arch", ["duality", "v2", "r4"])
def test_a_checkpoint_of_another_arch_is_refused(trained: Trainer, tiny_flags: list[str], arch: str) -> None:
    config = parse([*tiny_flags, "--arch", arch], TASKS, "test", "Test.")
    other, _ = multitask_classifier.build_model(config, DEFAULT_TASKS)
    before = copied(other)
    with pytest.raises(UserError, match="another arch.*; and [0-9]+ more") as error:
        load_model_state_dict(other, load(trained.run.best)["weights"], trained.run.best, set())
    assert "\n" not in str(error.value) and str(trained.run.best) in str(error.value) and len(str(error.value)) < 1200
    assert changed(before, copied(other)) == set()


def test_weights_that_do_not_fit_are_listed(trained: Trainer) -> None:
    weights = dict(load(trained.run.best)["weights"])
    weights["heads.mnli.bias"] = weights.pop("heads.para.2.bias")
    weights["pair_layer.dense.bias"] = torch.zeros(3)
    with pytest.raises(UserError) as error:
        load_model_state_dict(trained.model, weights, Path("own.pt"), set())
    assert str(error.value) == (
        "own.pt: the weights do not fit the model, another arch perhaps: missing heads.para.2.bias; "
        "unknown heads.mnli.bias; pair_layer.dense.bias is (3,) instead of (64,)"
    )


def spoil(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "last bytes cut":
        path.write_bytes(content[:-30])
    elif kind == "first bytes lost":
        path.write_bytes(content[100:])
    elif kind == "text":
        path.write_text("weights\n" * 50, encoding="utf-8")
    elif kind == "stop only":
        path.write_bytes(b".")
    elif kind == "random":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "pickled class":
        path.write_bytes(pickle.dumps(RunDirectory(path)))
    elif kind == "other tensors":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "a folder":
        path.unlink()
        path.mkdir()


KINDS = [
    "missing", "empty", "truncated", "last bytes cut", "first bytes lost", "text", "stop only", "random",
    "pickled class", "other tensors", "a list", "a folder",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_checkpoints_are_refused_in_one_line(trained: Trainer, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.pt"
    shutil.copyfile(trained.run.best, path)
    spoil(path, kind)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "checkpoint" in str(error.value)


def test_no_damage_ends_in_a_traceback(trained: Trainer, tmp_path: Path) -> None:
    """Random bytes in the pickle at the start and in the directory at the end: refused, or the same names as before."""
    content, path, generator = bytearray(trained.run.best.read_bytes()), tmp_path / "bad.pt", np.random.default_rng(0)
    pickled = content.index(b"PK\x01\x02")  # the zip's directory
    names = set(load(trained.run.best)["weights"])
    refused = 0
    for number in range(120):
        damaged = bytearray(content)
        low, high = (60, 4000) if number % 2 else (pickled, len(content))
        for position in generator.integers(low, high, 3):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            model, _, _ = load_model(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert set(model.state_dict()) == names
    assert refused > 30


@pytest.mark.parametrize("key", ["weights", "config", "bert_config", "tasks", "tokenizer"])
@pytest.mark.parametrize("how", ["lacks", "odd"])
def test_checkpoints_with_a_part_missing_or_odd_are_refused(
    trained: Trainer, tmp_path: Path, key: str, how: str
) -> None:
    content = load(trained.run.best)
    if how == "lacks":
        del content[key]
    else:
        content[key] = {"weights": {}, "config": {}, "bert_config": {"hidden_size": 31}, "tasks": ["mnli"]}.get(
            key, "?"
        )
    save(tmp_path / "odd.pt", content)
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "odd.pt")
    assert "odd.pt" in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    torch.save({"format": 1, "weights": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_a_resume_file_that_is_none_is_refused(trained: Trainer, tiny_flags: list[str], tmp_path: Path) -> None:
    """resume.pt replaced by a best.pt: a checkpoint too, but without optimizers."""
    make_trainer(tiny_flags, tmp_path / "run", "--epochs", 1)
    copy(trained.run.best, tmp_path / "run" / "resume.pt")
    with pytest.raises(UserError, match="resume.pt"):
        make_trainer(tiny_flags, tmp_path / "run", "--epochs", 1, "--resume").fit()


def test_sha256_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_checkpoint_content_is_detached(trained: Trainer) -> None:
    content = model_checkpoint(trained.model, trained.tokenizer, trained.config, {"score": 1.0})
    assert all(not tensor.requires_grad for tensor in content["weights"].values())
    assert content["git_commit"] is None or len(content["git_commit"].rstrip("+")) == 40


# ------------------------------------------------------------------------------------------------------- atomic writing


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")

    def fail(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(UserError, match="file: cannot be written"):
        write_atomically(path, fail)
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="x: cannot be written"):
        write_text(tmp_path / "file" / "folder" / "x", "text")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["file"]


def test_a_write_replaces_the_file_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_text(path, "one")
    write_text(path, "two ünï")
    assert path.read_text(encoding="utf-8") == "two ünï" and os.listdir(path.parent) == ["file"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    seen: list[str] = []

    def write(temporary: Path) -> None:
        temporary.write_text("new", encoding="utf-8")
        seen.append(path.read_text(encoding="utf-8"))

    write_atomically(path, write)
    assert seen == ["old"] and path.read_text(encoding="utf-8") == "new"


# ------------------------------------------------------------------------------------------------------ run directories


def test_resume_needs_the_options_of_the_start(tiny_flags: list[str], tmp_path: Path) -> None:
    make_trainer(tiny_flags, tmp_path / "run").fit()
    began = r"began with --lr 0\.001 instead of 0\.5, --para_lr_multiplier 5\.0 instead of 2\.0; repeat"
    with pytest.raises(UserError, match=began):
        make_trainer(tiny_flags, tmp_path / "run", "--resume", "--lr", 0.5, "--quora_lr_multiplier", 2)
    with pytest.raises(UserError, match="began with the tasks sst, para, sts instead of sst; repeat"):
        make_trainer(tiny_flags, tmp_path / "run", "--resume", "--train_sst")
    make_trainer(tiny_flags, tmp_path / "run", "--resume", "--save_every", 50, "--eval_batch_size", 9)


def test_a_run_without_its_configuration_cannot_be_resumed(tiny_flags: list[str], tmp_path: Path) -> None:
    make_trainer(tiny_flags, tmp_path / "run").fit()
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match="config.json"):
        make_trainer(tiny_flags, tmp_path / "run", "--resume")


def test_overwrite_removes_a_runs_own_files_only(tmp_path: Path) -> None:
    run, events = RunDirectory(tmp_path), "events.out.tfevents.1.host"
    own = [
        "best.pt",
        "config.json",
        "predictions/sst-dev-output.csv",
        f"tensorboard/{events}",
        f"tensorboard/a/{events}",
    ]
    theirs = ["notes.txt", "predictions/mine.txt", "tensorboard/b/mine.txt"]
    for name in (*own, *theirs):
        write_text(tmp_path / name, "x")
    run.prepare(overwrite=True, resume=False, needed=0)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {".lock", "predictions", "tensorboard", "tensorboard/b", *theirs}
    for name in theirs:
        (tmp_path / name).unlink()
    run.clear()
    assert not (tmp_path / "predictions").exists()


def test_names_of_runs_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(5):
        names.append(RunDirectory.fresh_name("v2"))
        (tmp_path / "runs" / names[-1]).mkdir(parents=True)
    assert len(set(names)) == 5 and all(name.startswith("v2-") for name in names)
    assert RunDirectory.named(None, "abc").path == Path("runs/abc")
    assert RunDirectory.named("x/y", "abc").path == Path("x/y")


# ----------------------------------------------------------------------------------------------------- a further task


def write_films(folder: Path, stem: str) -> None:
    """Sentences with labels 0 and 1 in files named STEM-train.csv, STEM-dev.csv and STEM-test-student.csv."""
    words = {0: "dreadful and dull", 1: "superb and charming"}
    for split, rows in (("train", 10), ("dev", 6), ("test-student", 4)):
        lines = ["\tid\tsentence\tsentiment" if split != "test-student" else "\tid\tsentence"]
        for i in range(rows):
            label = "" if split == "test-student" else f"\t{i % 2}"
            lines.append(f"{i}\tfilm{i}\tThe film is {words[i % 2]} , number {i} .{label}")
        (folder / f"{stem}-{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("kind", ["classes", "binary", "similarity"])
def test_a_further_task_is_one_row(
    tiny_flags: list[str], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], kind: Any,
) -> None:  # fmt: skip
    """It trains beside the others, is evaluated and predicted, and its checkpoint is loaded: nothing else is told."""
    losses = {"classes": ("ce", "bce"), "binary": ("bce",), "similarity": ("mse", "pearson")}[kind]
    row: Task = replace(FILMS, kind=kind, losses=losses)
    monkeypatch.setitem(TASKS, "films", row)
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    write_films(data, "films")
    run = tmp_path / "run"
    flags = [*tiny_flags, "--data_dir", str(data), "--run_dir", str(run), "--train_sst", "--train_movies"]
    multitask_classifier.main([*flags, "--num_movies_trains", "2"])
    line = metrics(run)[-1]
    assert list(line["train"]) == ["sst", "films"] and line["train"]["films"]["steps"] == 4
    scores = json.loads((run / "scores.json").read_text())["dev"]
    assert set(scores) == {"sst", "films", "score", "score_raw_r"}
    assert set(scores["films"]) == ({"pearson", "spearman"} if kind == "similarity" else {"accuracy", "f1"})
    rows = (run / "predictions" / "films-test-output.csv").read_text().splitlines()
    assert rows[0] == "id \t Predicted_Sentiment " and [row.split(" , ")[0] for row in rows[1:]] == [
        f"film{i}" for i in range(4)
    ]
    multitask_classifier.main(["--evaluate", str(run / "best.pt"), "--data_dir", str(data)])
    again = json.loads((run / "best-evaluation" / "scores.json").read_text())["dev"]
    assert again == scores
    capsys.readouterr()
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("The film is dull .\n", encoding="utf-8")
    multitask_classifier.main(["--evaluate", str(run / "best.pt"), "--predict", str(sentences), "--task", "movies"])
    assert capsys.readouterr().out.rstrip("\n").endswith("The film is dull .")


def test_schedules_know_every_choice_of_the_command_line() -> None:
    """The parser's choices and the loop's tables are written in two places."""
    from config import TrainOptions

    choices = {name: spec.metadata.get("choices") for name, spec in TrainOptions.__dataclass_fields__.items()}
    assert set(choices["optim"]) == set(loop.OPTIMIZERS) and set(choices["routine"]) == set(loop.ROUTINES)
    assert all(Schedule(name, 1.0, 3).at(0.0) >= 0 for name in choices["lr_schedule"])
    assert all(set(task.losses) <= set(loop.LOSSES) for task in TASKS.values()) and SST.losses[0] == "ce"


# ------------------------------------------------------------------------------------------- more of the first report


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        (["--lr_schedule", "cyclic"], [1.0, 8**-0.5, 1.0, 8**-0.5]),
        (["--lr_schedule", "cyclic", "--lr_cycle", "cumulative"], [1.0, 8**-0.5, 8**-1.0, 8**-1.5]),
        (["--lr_schedule", "triangular"], [1.0, 2.0, 1.0, 2.0]),
    ],
)
def test_the_cycles_of_the_learning_rate(
    tiny_flags: list[str], tmp_path: Path, flags: list[str], rates: list[float]
) -> None:
    flags = [*flags, "--epochs", "4", "--lr", "1e-3", "--sst_lr_multiplier", "3"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    found = [trainer.schedules["sst"].at(epoch) for epoch in range(4)]
    assert found == pytest.approx([3e-3 * rate for rate in rates])


def test_part_of_quora_and_late_sts(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--quora_fraction", "0.25", "--sts_from_epoch", "2"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(line["train"]) for line in lines] == [["para", "sst"], ["para", "sst", "sts"]]
    assert [line["train"]["para"]["steps"] for line in lines] == [1, 1]  # 5 of 20 examples in batches of 8
    assert sorted(lines[0]["dev"]) == ["para", "score", "score_raw_r", "sst", "sts"]


def test_a_first_epoch_without_a_task_is_refused(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--train_sst", "--train_sts", "--sst_from_epoch", "2", "--num_sts_trains", "0"]
    with pytest.raises(UserError, match="no task trains in epoch 1"):
        make_trainer(tiny_flags, tmp_path / "run", *flags)


def test_an_epoch_of_one_task_shows_the_scores_of_all(tiny_flags: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    flags = ["--routine", "random-epoch", "--steps_per_epoch", 4, "--epochs", 3]
    make_trainer(tiny_flags, tmp_path / "run", *flags, say=lines.append).fit()
    tables = [line for line in lines if line.startswith("\nEpoch")]
    assert [table.count("accuracy") for table in tables] == [2, 2, 2]
    assert [table.count("   0         -") for table in tables] == [2, 2, 2]
    trained = [list(line["train"]) for line in metrics(tmp_path / "run")]
    assert all(len(tasks) == 1 for tasks in trained)
    assert all(
        line["train"][task]["steps"] == 4 for line, (task,) in zip(metrics(tmp_path / "run"), trained, strict=True)
    )


# ------------------------------------------------------------------------------------------------- joint steps, PCGrad


def test_a_joint_step_moves_by_the_mean_of_the_weighted_losses(tiny_flags: list[str], tmp_path: Path) -> None:
    """SGD without decay moves by the gradient of (w1 L1 + w2 L2 + w3 L3) / 3, by each group's own rate."""
    flags = ["--routine", "joint", "--optim", "SGD", "--fine_tune_mode", "full-model", "--sts_weight", 0.5]
    flags += [f"--{task}_weight_decay=0" for task in DEFAULT_TASKS]
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "r1-baseline", *flags)
    model, indices = trainer.model.eval(), np.arange(8)  # no dropout, so that the gradient can be had a second time
    total = torch.zeros(())
    for task, weight in (("sst", 1.0), ("para", 1.0), ("sts", 0.5)):
        data = trainer.train_data[task]
        loss = loop.LOSSES[trainer.config.tasks[task].loss](model(task, data.batch(indices)), data.labels(indices))
        total = total + weight * loss / 3
    total.backward()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    for number, task in enumerate(DEFAULT_TASKS):
        trainer.set_rates(task, 0.0)
        trainer.train_step(loop.Step(task, indices, 1 / 3, moves=number == 2), False)
        moved = any(not torch.equal(before[name][0], p) for name, p in model.named_parameters() if name in before)
        assert moved == (number == 2)
    multipliers = {"heads.sst.": 4, "heads.para.": 5, "heads.sts.": 3, "backbones.": 4}  # 4 is the mean of all three
    for name, parameter in model.named_parameters():
        if name in before:
            rate = next(1e-3 * own for part, own in multipliers.items() if name.startswith(part))
            start, gradient = before[name]
            nesterov = 1.9  # Nesterov's first step: the gradient and .9 of the momentum, which is the gradient too
            torch.testing.assert_close(parameter.detach(), start - nesterov * rate * gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_joint_step_has_the_rate_of_its_place_among_the_steps(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its batches are one step: the first one of the run is at the very beginning of the schedule."""
    flags = ["--routine", "joint", "--lr_schedule", name, "--arch", "r1-baseline"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    optimizer, used = trainer.optimizers["joint"], []
    step, heads = optimizer.step, {trainer.model.heads[task][-1].weight: task for task in DEFAULT_TASKS}
    groups = {heads[p]: group for group in optimizer.param_groups for p in group["params"] if p in heads}

    def watched() -> None:
        used.append({task: group["lr"] for task, group in groups.items()})
        step()

    monkeypatch.setattr(optimizer, "step", watched)
    trainer.fit()
    wanted = [{task: trainer.schedules[task].at(number / 3) for task in groups} for number in range(6)]
    assert used == [{task: pytest.approx(rate) for task, rate in own.items()} for own in wanted]
    assert {task: own["lr"] for task, own in metrics(tmp_path / "run")[1]["train"].items()} == used[-1]


@pytest.mark.parametrize("arch", ["yin-yang", "r1-baseline"])
def test_pcgrad_without_conflict_is_the_joint_step(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    """All three tasks are one and the same, so nothing conflicts; only the order of additions differs."""
    runs = []
    for name, more in (("plain", []), ("surgery", ["--pcgrad"])):
        flags = ["--routine", "joint", "--arch", arch, "--fine_tune_mode", "full-model", "--train_sts", *more]
        trainer = make_trainer(tiny_flags, tmp_path / name, *flags, "--epochs", 1)
        trainer.fit()
        runs.append(copied(trainer.model))
    for name, own in runs[0].items():
        torch.testing.assert_close(runs[1][name], own, rtol=0, atol=0)


@pytest.mark.parametrize("more", [[], ["--lora_mode", "attn-only"], ["--clip", 0.1, "--average", "ema"]])
def test_pcgrad_trains_and_counts_conflicts(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    """Through every stage of unfreezing; what is frozen keeps no gradient and does not move."""
    flags = ["--routine", "joint", "--pcgrad", "--arch", "v2", "--epochs", 5, *more]
    lines: list[str] = []
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags, say=lines.append)
    start = copied(trainer.model)
    trainer.fit()
    epochs = metrics(tmp_path / "run")
    assert "conflicts" not in epochs[0] or epochs[0]["conflicts"] == 0  # heads alone train: nothing is shared
    assert all(0 <= epoch["conflicts"] <= 1 for epoch in epochs[1:]) and any(epoch["conflicts"] for epoch in epochs[1:])
    assert "of the pairs of tasks in conflict" in lines[-1]
    moved = changed(start, copied(trainer.model))
    assert any(name.startswith("backbones.") for name in moved)
    if "--lora_mode" in more:
        assert not any(name.startswith("backbones.") and "lora_" not in name for name in moved)


def test_what_pcgrad_makes_is_what_is_clipped(tiny_flags: list[str], tmp_path: Path) -> None:
    """To clip the gradient of each task would leave another norm and another direction."""
    flags = ["--routine", "joint", "--pcgrad", "--arch", "v2", "--fine_tune_mode", "full-model"]
    handed: list[Tensor] = []
    for number, more in enumerate(([], ["--clip", 0.05])):
        trainer = make_trainer(tiny_flags, tmp_path / str(number), *flags, *more)
        trainer.model.freeze_for_epoch(trainer.config.train, 0)

        def take(*_: object, model: MultitaskBERT = trainer.model) -> None:
            handed.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

        trainer.optimizers["joint"].step = take  # type: ignore[method-assign]
        torch.manual_seed(0)
        for step in trainer.steps_of(0)[:3]:
            trainer.train_step(step, False)
    plain, clipped = handed
    assert plain.norm() > 1
    torch.testing.assert_close(clipped, plain * (0.05 / plain.norm()))


def test_pcgrad_where_nothing_trains_yet(tiny_flags: list[str], tmp_path: Path) -> None:
    """A bare cosine has nothing of its own, and the backbone waits for the second epoch."""
    flags = ["--train_sts", "--arch", "v1", "--routine", "joint", "--pcgrad"]
    _, states = states_by_epoch(tiny_flags, tmp_path / "run", *flags)
    assert changed(states[0], states[1]) == set() != changed(states[1], states[2])


def interrupted(trainer: Trainer, epochs: int) -> None:
    """Train, and stop as if killed when so many epochs are done."""
    original = trainer.train_epoch

    def stop_in_time() -> Any:
        if trainer.epoch == epochs:
            raise KeyboardInterrupt
        return original()

    trainer.train_epoch = stop_in_time  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def assert_resumes(
    flags: list[str], folder: Path, *more: object, after: int, make: Callable[..., Trainer] = make_trainer
) -> Trainer:
    """A run that is killed after so many epochs ends bit for bit as one that nothing stops, which is returned."""
    whole = make(flags, folder / "whole", *more)
    whole.fit()
    interrupted(make(flags, folder / "part", *more), after)
    resumed = make(flags, folder / "part", *more, "--resume")
    resumed.fit()
    assert changed(copied(whole.model), copied(resumed.model)) == set()
    assert (folder / "whole" / "metrics.jsonl").read_bytes() == (folder / "part" / "metrics.jsonl").read_bytes()
    return whole


def test_joint_steps_resume_bit_for_bit(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--routine", "joint", "--pcgrad", "--epochs", 3, "--fine_tune_mode", "full-model"]
    assert_resumes(tiny_flags, tmp_path, *flags, after=1)


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        (["--lr_schedule", "cyclic"], [0, 0, 1, 1, 2, 2]),
        (["--unfreeze_every", "3"], [0, 0, 0, 1, 1, 1]),
        (["--lr_schedule", "cyclic", "--unfreeze_every", "1"], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_unfreezing_goes_with_the_cycles_of_the_learning_rate(
    tiny_flags: list[str], tmp_path: Path, flags: list[str], stages: list[int]
) -> None:
    """R0, E.2: each deepening begins a cycle of two epochs. Two layers: heads, top one, top one, both, everything."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 6, "--batch_size", 20, *flags)
    trainer.fit()
    counts = [line["trainable_parameters"] for line in metrics(tmp_path / "run")]
    by_stage = {}
    for stage in range(6):
        trainer.model.set_trainable_layers(scheduled_layers("iterative", stage, 2))
        by_stage[stage] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert counts == [by_stage[stage] for stage in stages] and by_stage[0] < by_stage[1] < by_stage[3] < by_stage[4]


def test_a_group_has_the_mean_decay_of_its_tasks(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--routine", "joint", "--arch", "r1-baseline", "--sst_weight_decay", 0.3, "--quora_weight_decay", 0.6]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags, "--sts_weight_decay", 0)
    decays = {group["tasks"]: group["weight_decay"] for group in trainer.optimizers["joint"].param_groups}
    wanted = {("sst", "para", "sts"): 0.3, ("sst",): 0.3, ("para",): 0.6, ("sts",): 0.0}
    assert decays == pytest.approx(wanted)


def test_patience_counts_evaluations(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.3, 0.2, 0.1, 0.9])
    make_trainer(tiny_flags, tmp_path / "run", "--epochs", 8, "--eval_every", 2, "--patience", 2).fit()
    assert len(metrics(tmp_path / "run")) == 6


def test_the_loss_of_an_epoch_is_the_mean_over_its_examples() -> None:
    meter = TaskMeter()
    for number, (loss, size) in enumerate([(1.0, 8), (4.0, 2)]):
        labels = torch.zeros(size, dtype=torch.int64)
        meter.add(number, torch.tensor(loss), torch.zeros(size, 5), labels, size, 1e-3, 0.5, 100 - number)
    found = meter.result(TASKS["sst"])
    assert (found.steps, found.examples, found.loss, found.seconds, found.peak_memory) == (2, 10, 1.6, 1.0, 100)
