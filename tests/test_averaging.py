"""Averages of the weights: equal to torch's, seen by evaluation and checkpoints, never noticed by training."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_multitask_bert import make_model
from test_training import Stopped, changed, copied, make_trainer, metrics, rising, whole_and_resumed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import multitask_classifier
from config import TrainOptions
from models.checkpoint import load
from models.heads import BatchNorm
from models.multitask_bert import MultitaskBERT
from tasks import DEFAULT_TASKS
from text.packing import PackedBatch
from training import trainer as loop
from training.averaging import AVERAGES, EMA, REFRESH_BATCHES, RunningAverage, averaged_tensors
from training.dry_run import average_bytes, checkpoint_bytes, memory_bytes
from training.task_sampling import task_batches
from training.trainer import Trainer

State = dict[str, Tensor]
EVERY = {
    "step": ["--average", "ema"],
    "epoch": ["--average", "ema", "--ema_every", "epoch"],
    "swa": ["--average", "swa"],
}


def make_average(model: MultitaskBERT, **given: Any) -> RunningAverage:
    """An average of all of a model, whose BatchNorm is not refreshed."""
    options = TrainOptions(**{"fine_tune_mode": "full-model", **given})
    average = AVERAGES[options.average](model, options, lambda: None)
    assert isinstance(average, RunningAverage)
    return average


def walk(model: MultitaskBERT) -> None:
    """A random step of every float tensor, running statistics too."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
            if "running_var" in name:
                tensor.abs_()


def averaged_state(average: RunningAverage) -> State:
    """The whole state of the model with the average in it, before BatchNorm is refreshed."""
    average.swap()
    state = copied(average.model)
    average.swap()
    return state


def average_of(trainer: Trainer) -> RunningAverage:
    assert isinstance(trainer.average, RunningAverage)
    return trainer.average


# ----------------------------------------------------------------------------------------------------- torch's averages


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 0.999])
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_ema_is_that_of_torch_to_the_bit(decay: float, every: str) -> None:
    model = make_model(arch="yin-yang")
    average = make_average(model, average="ema", ema_decay=decay, ema_every=every)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    reference.update_parameters(model)  # the start weights
    for number in range(1, 61):
        walk(model)
        average.after_step()
        if number % 3 == 0:
            average.after_epoch(number // 3)
        if every == "step" or number % 3 == 0:
            reference.update_parameters(model)
    before = copied(model)
    with average.applied():
        found = copied(model)
    assert average.updates == (60 if every == "step" else 20)
    assert changed(reference.module.state_dict(), found) == set()
    assert changed(before, copied(model)) == set()
    assert (changed(before, found) == set()) == (decay == 0)


@pytest.mark.parametrize("first", [1, 4])
def test_swa_is_that_of_torch_and_the_mean(first: int) -> None:
    model = make_model(arch="yin-yang").double()
    average = make_average(model, average="swa", swa_from_epoch=first, epochs=40)
    reference, ends = AveragedModel(model, use_buffers=True), []
    for epoch in range(1, 41):
        walk(model)
        average.after_step()
        average.after_epoch(epoch)
        if epoch >= first:
            reference.update_parameters(model)
            ends.append(copied(model))
    with average.applied():
        found = copied(model)
    for name, tensor in reference.module.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
        mean = torch.stack([end[name] for end in ends]).mean(0)
        torch.testing.assert_close(found[name], mean, rtol=1e-12, atol=1e-12)


def test_swa_has_the_plain_weights_before_its_first_epoch() -> None:
    model = make_model(arch="yin-yang")
    average = make_average(model, average="swa", swa_from_epoch=3)
    for epoch in (1, 2, 3, 4):
        walk(model)
        average.after_epoch(epoch)
        plain = copied(model)
        with average.applied():
            assert (changed(plain, copied(model)) == set()) == (epoch <= 3)  # at 3, the mean of one


def test_warmup_begins_low_and_ends_at_the_decay() -> None:
    average = make_average(make_model(), average="ema", ema_decay=0.9, ema_warmup=True)
    assert isinstance(average, EMA)
    found = [average.decay(number) for number in (1, 2, 3, 10, 79, 80, 81, 1000)]
    assert found == pytest.approx([2 / 11, 3 / 12, 4 / 13, 11 / 20, 80 / 89, 0.9, 0.9, 0.9], rel=1e-15)


def test_warmup_is_used() -> None:
    model = make_model()
    average = make_average(model, average="ema", ema_decay=0.5, ema_warmup=True)

    def mean(old: Tensor, new: Tensor, count: Tensor | int) -> Tensor:  # the start weights are torch's first
        decay = min(0.5, (1 + int(count)) / (10 + int(count)))
        return decay * old + (1 - decay) * new

    reference = AveragedModel(model, avg_fn=mean, use_buffers=True)
    reference.update_parameters(model)
    for _ in range(20):
        walk(model)
        average.after_step()
        reference.update_parameters(model)
    for name, tensor in averaged_state(average).items():
        torch.testing.assert_close(tensor, reference.module.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_decay_for_steps_keeps_the_start_when_used_per_epoch() -> None:
    """R0's .999 per epoch: 99.3% of the start weights are left after 7 epochs."""
    model = make_model()
    average = make_average(model, average="ema", ema_every="epoch")
    with torch.no_grad():
        for tensor in average.averages.values():
            tensor.fill_(1.0)
        for parameter in model.parameters():
            parameter.fill_(0.0)
    for epoch in range(1, 8):
        average.after_epoch(epoch)
    share = averaged_state(average)["pair_layer.dense.bias"][0].item()
    assert share == pytest.approx(0.999**7, rel=1e-5) and round(share, 3) == 0.993


def test_integer_buffers_are_the_models_own() -> None:
    model = make_model()
    model.register_buffer("count", torch.tensor([3, 4]))
    average = make_average(model, average="ema")
    assert "count" not in average.averages
    model.get_buffer("count").add_(5)
    average.after_step()
    with average.applied():
        assert model.get_buffer("count").tolist() == [8, 9]


def test_a_tensor_with_two_names_is_averaged_once() -> None:
    model = make_model(arch="v2")
    head = model.heads["sst"]
    assert isinstance(head, nn.Sequential)
    head.append(nn.Linear(5, 5)).append(nn.ReLU()).append(head[-2])
    average = make_average(model, average="ema", ema_decay=0.5)
    start = copied(model)
    walk(model)
    average.after_step()
    plain = copied(model)
    with average.applied():
        for name, tensor in copied(model).items():
            torch.testing.assert_close(tensor, (start[name] + plain[name]) / 2)
    assert changed(plain, copied(model)) == set()


# ------------------------------------------------------------------------------------------------ what needs an average


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        (["--fine_tune_mode", "full-model"], {"embed", "layers", "pooler"}),
        (["--fine_tune_mode", "last-layer"], set()),
        (["--fine_tune_mode", "iterative", "--epochs", 2], {"layers.1", "pooler"}),
        (["--fine_tune_mode", "iterative", "--epochs", 5], {"embed", "layers", "pooler"}),
        (["--lora_mode", "attn-only", "--dora"], {"lora_A", "lora_B", "magnitude"}),
        (["--lora_mode", "all-lin", "--fine_tune_mode", "last-layer"], {"lora_A", "lora_B"}),
    ],
)
def test_only_what_trains_is_averaged(
    tiny_flags: list[str], tmp_path: Path, flags: list[Any], trained: set[str]
) -> None:
    """Under each freezing and adapter policy: what the average leaves out never changes, all the rest is in it."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--average", "ema", *flags)
    start = copied(trainer.model)
    averaged = set(average_of(trainer).averages)
    backbones = {name for name in averaged if name.startswith("backbones.")}
    assert all(any(part in name for part in trained) for name in backbones)
    assert all(any(part in name for name in backbones) for part in trained)
    assert averaged >= {name for name in start if not name.startswith("backbones.")}
    assert not averaged & trainer.model.frozen_parameter_names(trainer.config.train.fine_tune_mode)
    trainer.fit()
    assert changed(start, copied(trainer.model)) <= averaged


def test_the_plan_counts_the_average(tiny_flags: list[str], tmp_path: Path) -> None:
    plain = make_trainer(tiny_flags, tmp_path / "plain", "--fine_tune_mode", "full-model")
    for method in ("ema", "swa"):
        flags = ["--average", method, "--fine_tune_mode", "full-model"]
        trainer = make_trainer(tiny_flags, tmp_path / method, *flags)
        size = 4 * sum(tensor.numel() for tensor in trainer.model.state_dict().values())
        assert average_bytes(plain.model, plain.config) == 0
        assert average_bytes(trainer.model, trainer.config) == size
        disk = [checkpoint_bytes(own.model, own.config) for own in (plain, trainer)]
        assert disk[1] - disk[0] == pytest.approx(3.15 * size, abs=2)  # in three states
        memory = [memory_bytes(own.model, own.config, own.train_data) for own in (plain, trainer)]
        assert memory[1] - memory[0] == size
        trainer.fit()
        assert sum(path.stat().st_size for path in (tmp_path / method).glob("*.pt")) < disk[1]


def test_methods_are_those_of_the_command_line() -> None:
    assert set(AVERAGES) == set(TrainOptions.__dataclass_fields__["average"].metadata["choices"])


# ------------------------------------------------------------------------------------------------------------ BatchNorm


class OneTask(nn.BatchNorm1d):
    """torch's BatchNorm with the weights of ours, called as ours is."""

    def __init__(self, ours: BatchNorm) -> None:
        super().__init__(len(ours.weight))
        self.weight, self.bias = ours.weight, ours.bias

    def forward(self, x: Tensor, stats: str = "all") -> Tensor:
        return super().forward(x)


class Plain(nn.Module):
    """A copy of a model with torch's BatchNorm and no dropout; an input is a task and its batch."""

    def __init__(self, model: MultitaskBERT) -> None:
        super().__init__()
        options = replace(model.options, hidden_dropout_prob=0.0)
        shape = replace(model.bert_config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.model = MultitaskBERT(options, shape, model.tasks)
        self.model.load_state_dict(model.state_dict())
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, BatchNorm):
                    setattr(module, name, OneTask(child))

    def forward(self, work: tuple[str, PackedBatch]) -> Tensor:
        return self.model(*work)


def trained_a_little(tiny_flags: list[str], run_dir: Path, *more: object) -> Trainer:
    """A trainer after its first epoch, its average not that of the weights; 20 examples in batches of 8, 8 and 4."""
    flags = ["--average", "ema", "--ema_decay", 0.8, "--fine_tune_mode", "full-model", *more]
    trainer = make_trainer(tiny_flags, run_dir, *flags)
    torch.manual_seed(1)
    trainer.model.train()
    for task in DEFAULT_TASKS:
        for step in task_batches(trainer.plan, 0, task):
            trainer.train_step(step, False)
    trainer.epoch = 1
    return trainer


@pytest.mark.parametrize("shared", [False, True])
def test_statistics_are_those_of_update_bn(tiny_flags: list[str], tmp_path: Path, shared: bool) -> None:
    """Per task, without dropout; with shared statistics, over the batches of both tasks that share them."""
    trainer = trained_a_little(tiny_flags, tmp_path / "run", *["--shared_batchnorm_stats"][: int(shared)])
    work = {
        task: [((task, trainer.train_data[task].batch(step.indices)),) for step in task_batches(trainer.plan, 0, task)]
        for task in DEFAULT_TASKS
    }
    with trainer.average.applied():
        found = copied(trainer.model)
        references = [Plain(trainer.model) for _ in DEFAULT_TASKS]
    loaders = [work["sst"], work["para"] + work["sts"]] if shared else list(work.values())
    compared = set()
    for loader, reference in zip(loaders, references, strict=False):
        update_bn(loader, reference)
        served = {own[0][0] for own in loader}
        for name, module in reference.model.named_modules():
            in_pair_layer = name.startswith("pair_layer.") and served <= {"para", "sts"}
            if isinstance(module, OneTask) and (in_pair_layer or name.split(".")[1] in served):
                stats = "all" if shared or not in_pair_layer else min(served)
                for kind in ("mean", "var"):
                    key = f"{name}.running_{kind}_{stats}"
                    torch.testing.assert_close(found[key], module.get_buffer(f"running_{kind}"), rtol=1e-6, atol=1e-7)
                    compared.add(key)
    assert compared == {name for name in found if "running_" in name}


def test_statistics_belong_to_the_averaged_weights(tiny_flags: list[str], tmp_path: Path) -> None:
    """The mean and variance of what the first BatchNorm of the SST head sees in evaluation, computed by hand."""
    trainer = trained_a_little(tiny_flags, tmp_path / "run")
    head = trainer.model.heads["sst"]
    assert isinstance(head, nn.Sequential)
    place = next(i for i, module in enumerate(head) if isinstance(module, BatchNorm))
    inputs: list[Tensor] = []
    with trainer.average.applied(), torch.no_grad():
        trainer.model.eval()
        found = {kind: head[place].get_buffer(f"running_{kind}_all").clone() for kind in ("mean", "var")}
        for step in task_batches(trainer.plan, 0, "sst"):
            batch = trainer.train_data["sst"].batch(step.indices)
            embedding = trainer.model.backbone("sst").sentence_embedding(batch, "cls")
            inputs.append(head[:place](embedding).transpose(1, 2).flatten(0, 1))  # [B * L, C]
    assert [len(own) // len(inputs[2]) for own in inputs] == [2, 2, 1]
    torch.testing.assert_close(found["mean"], torch.stack([own.mean(0) for own in inputs]).mean(0))
    torch.testing.assert_close(found["var"], torch.stack([own.var(0) for own in inputs]).mean(0))


def test_evaluation_leaves_average_weights_and_generators_alone(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = trained_a_little(tiny_flags, tmp_path / "run")
    average = average_of(trainer)
    plain, averages = copied(trainer.model), averaged_state(average)
    places = [tensor.data_ptr() for tensor in trainer.model.state_dict().values()]
    trainer.model.train()
    numbers = torch.get_rng_state()
    for _ in range(2):
        with average.applied():
            inside = copied(trainer.model)
            refreshed = changed(averages, inside)
        assert refreshed == {name for name in plain if "running_" in name}
    with pytest.raises(Stopped), average.applied():
        raise Stopped
    assert torch.equal(torch.get_rng_state(), numbers)
    assert changed(plain, copied(trainer.model)) == set()
    assert [tensor.data_ptr() for tensor in trainer.model.state_dict().values()] == places
    assert changed(averages, averaged_state(average)) == set()
    assert trainer.model.training
    assert all(module.batches is None for module in trainer.model.modules() if isinstance(module, BatchNorm))


def test_batches_of_one_keep_the_statistics_finite(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = trained_a_little(tiny_flags, tmp_path / "run", "--batch_size", 1, "--max_train_examples", 3)
    with trainer.average.applied():
        state = copied(trainer.model)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert torch.equal(state["pair_layer.norm.running_var_sts"], torch.ones(64))  # no batch had a variance


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--arch", "yin-yang"], ["sst", "sst", "para", "para"]),
        (["--arch", "yin-yang", "--sst_epoch_eval", 2], ["sst", "sst", "para", "para"]),
        (["--arch", "yin-yang", "--eval_every", 2], []),
        (["--arch", "r4"], []),
    ],
)
def test_batches_are_bounded_and_passed_for_batchnorm_alone(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[Any], wanted: list[str]
) -> None:
    """STS does not train, so nothing is known of it; where no evaluation is due there is nothing to prepare."""
    monkeypatch.setattr(loop, "REFRESH_BATCHES", 2)
    assert REFRESH_BATCHES >= 19  # what the running statistics of a plain run are worth
    trainer = trained_a_little(tiny_flags, tmp_path / "run", "--num_sts_trains", 0, *flags)
    seen: list[str] = []
    trainer.model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments[0]))
    with trainer.average.applied():
        pass
    assert seen == wanted


# ----------------------------------------------------------------------------------------------------------------- runs


def everything(trainer: Trainer) -> State:
    """All tensors that training goes on from, by name: weights, optimizers, generators."""
    content = load(trainer.run.resume)
    out = {f"weights.{name}": tensor for name, tensor in content["weights"].items()}
    for task, own in content["optimizers"].items():
        for index, values in own["state"].items():
            out |= {f"{task}.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    return out | {f"generator.{name}": tensor for name, tensor in content["generators"].items()}


@pytest.mark.parametrize(
    "flags",
    [
        ["--fine_tune_mode", "full-model"],
        ["--lora_mode", "attn", "--dora", "--lora_dropout", 0.1],
    ],
)
def test_training_does_not_notice(tiny_flags: list[str], tmp_path: Path, flags: list[Any]) -> None:
    plain = make_trainer(tiny_flags, tmp_path / "plain", *flags)
    plain.fit()
    wanted = everything(plain)
    for name, more in EVERY.items():
        trainer = make_trainer(tiny_flags, tmp_path / name, *flags, *more)
        trainer.fit()
        assert changed(wanted, everything(trainer)) == set()
        lines = [metrics(tmp_path / run) for run in ("plain", name)]
        for before, after in zip(*lines, strict=True):
            assert before["train"] == after["train"]
        assert changed(load(plain.run.best)["weights"], load(trainer.run.best)["weights"]) != set()


@pytest.mark.parametrize(
    ("unit", "flags"),
    [
        ("step", ["--fine_tune_mode", "full-model", "--epochs", 3]),
        ("epoch", ["--fine_tune_mode", "iterative", "--epochs", 5]),
        ("step", ["--lora_mode", "all-lin-only", "--dora", "--fine_tune_mode", "full-model"]),
    ],
)
def test_a_run_saves_the_average_of_torch(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str, flags: list[Any]
) -> None:
    """After every step of every task, or epoch; best.pt, here of the last epoch, holds its weights to the bit."""
    monkeypatch.setattr(loop, "overall", rising(loop.overall))
    more = ["--average", "ema", "--ema_decay", 0.7, "--ema_every", unit, "--lr", 1e-2, *flags]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *more)
    average = average_of(trainer)
    reference = AveragedModel(trainer.model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    reference.update_parameters(trainer.model)
    original = getattr(average, f"after_{unit}")

    def both(*arguments: Any) -> None:
        original(*arguments)
        reference.update_parameters(trainer.model)

    monkeypatch.setattr(average, f"after_{unit}", both)
    trainer.fit()
    epochs = trainer.config.train.epochs
    assert average.updates == (epochs if unit == "epoch" else 9 * epochs)
    wanted = reference.module.state_dict()
    assert changed(wanted, averaged_state(average)) == set()
    content = load(trainer.run.best)
    assert content["epoch"] == epochs
    saved = content["weights"]
    differ = {name for name in saved if not torch.equal(saved[name], wanted[name])}
    assert differ == {name for name in saved if "running_" in name}
    assert set(wanted) - set(saved) == trainer.model.frozen_parameter_names(trainer.config.train.fine_tune_mode)


def test_a_step_is_in_the_averages_at_once(tiny_flags: list[str], tmp_path: Path) -> None:
    """They take the weights after the optimizer's step: all of them with a decay of 0, the teacher a hundredth."""
    flags = ["--average", "ema", "--ema_decay", 0, "--sst_bregman", 1, "--fine_tune_mode", "full-model"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    trainer.model.freeze_for_epoch(trainer.config.train, 0)
    start = copied(trainer.model)
    trainer.train_step(loop.Step("sst", np.arange(8)), False)
    moved = copied(trainer.model)
    assert changed(start, moved)
    with trainer.average.swapped():
        assert changed(moved, copied(trainer.model)) == set()
    with trainer.teacher.swapped():
        for name, slow in copied(trainer.model).items():
            torch.testing.assert_close(slow, start[name] + 0.01 * (moved[name] - start[name]), rtol=1e-5, atol=1e-8)


def test_dev_scores_are_those_of_plain_weights_until_swa_begins(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--epochs", 4, "--arch", "r4", "--fine_tune_mode", "full-model", "--lr", 1e-2]  # r4: no BatchNorm
    make_trainer(tiny_flags, tmp_path / "plain", *flags).fit()
    make_trainer(tiny_flags, tmp_path / "swa", *flags, "--average", "swa", "--swa_from_epoch", 2).fit()
    plain, swa = ([line["dev"] for line in metrics(tmp_path / name)] for name in ("plain", "swa"))
    assert plain[:2] == swa[:2] and plain[2] != swa[2] and plain[3] != swa[3]


@pytest.mark.parametrize(("moment", "method"), [("train_step", "step"), ("save_best", "swa")])
def test_resuming_ends_as_if_nothing_had_happened(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, method: str
) -> None:
    """The second of three epochs is interrupted, with the average in the model too."""
    more = ["--ema_decay", 0.9, "--ema_warmup"] if method == "step" else ["--swa_from_epoch", 2]
    whole, resumed = whole_and_resumed(tiny_flags, tmp_path, monkeypatch, moment, *EVERY[method], *more)
    assert changed(everything(whole), everything(resumed)) == set()
    assert average_of(resumed).updates == average_of(whole).updates == {"step": 27, "swa": 2}[method]
    assert changed(averaged_state(average_of(whole)), averaged_state(average_of(resumed))) == set()


def test_patience_looks_at_the_averaged_weights(tiny_flags: list[str], tmp_path: Path) -> None:
    """An average that hardly moves gives the same predictions for ever: the run ends after --patience epochs more."""
    flags = ["--average", "ema", "--ema_decay", 0.999999, "--ema_every", "epoch", "--arch", "r4", "--patience", 2]
    make_trainer(tiny_flags, tmp_path / "run", *flags, "--epochs", 9, "--lr", 1e-5).fit()
    assert len(metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--average", "ema", "--ema_decay", "0.9", "--ema_warmup", "--patience", "1"],
        ["--average", "ema", "--ema_every", "epoch", "--ema_decay", "0.5", "--lora_mode", "attn-only", "--dora"],
        ["--average", "swa", "--swa_from_epoch", "2", "--shared_batchnorm_stats", "--routine", "interleave"],
    ],
)
def test_the_command_line_on_the_sample_data(
    tiny_flags: list[str], sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """Train, then --evaluate: the checkpoint alone gives the dev scores that were found with the average swapped in."""
    run = tmp_path / "run"
    words = ["--data_dir", str(sample), "--batch_size", "32", "--max_train_examples", "96", "--lr", "1e-3"]
    multitask_classifier.main([*tiny_flags, *words, *flags, "--no_tensorboard", "--run_dir", str(run)])
    lines = metrics(run)
    best = max(lines, key=lambda line: line["dev"]["score"])
    assert all(math.isfinite(line["dev"]["score"]) for line in lines)
    assert json.loads((run / "scores.json").read_text())["dev"] == best["dev"]
    multitask_classifier.main(["--evaluate", str(run / "best.pt"), "--data_dir", str(sample)])
    again = json.loads((run / "best-evaluation" / "scores.json").read_text())["dev"]
    assert again == best["dev"]
    assert "error" not in capsys.readouterr().err


def test_the_tensors_are_the_models_own(tiny_flags: list[str], tmp_path: Path) -> None:
    """Resuming copies into them and optimizers step them: copies would be averaged in vain."""
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    state = trainer.model.state_dict(keep_vars=True)
    found = averaged_tensors(trainer.model, trainer.config.train)
    assert found and all(tensor is state[name] for name, tensor in found.items())


def test_epochs_before_the_average_begins_are_refreshed_too(tiny_flags: list[str], tmp_path: Path) -> None:
    """--refresh_batchnorm asks for it at each evaluation: all compete for the best checkpoint alike."""
    flags = ["--epochs", 4, "--average", "swa", "--swa_from_epoch", 3]
    for more, wanted in (([], [0, 0, 1, 2]), (["--refresh_batchnorm"], [1, 2, 3, 4])):
        trainer = make_trainer(tiny_flags, tmp_path / str(len(more)), *flags, *more)
        passes, refreshed = trainer.average.pass_batches, []
        counts = {"passes": 0}

        def counted(passes: Callable[[], None] = passes, counts: dict[str, int] = counts) -> None:
            counts["passes"] += 1
            passes()

        trainer.average.pass_batches = counted
        evaluate = trainer.evaluate

        def evaluated(due: list[str], evaluate: Any = evaluate, counts: Any = counts, seen: Any = refreshed) -> Any:
            seen.append(counts["passes"])
            return evaluate(due)

        trainer.evaluate = evaluated  # type: ignore[method-assign]
        trainer.fit()
        assert refreshed == wanted


def test_statistics_can_be_measured_anew_without_an_average(tiny_flags: list[str], tmp_path: Path) -> None:
    """Training is the same to the bit; what is evaluated and saved has the weights that train and new statistics."""
    runs = {}
    for name, more in (("plain", []), ("anew", ["--refresh_batchnorm"])):
        trainer = make_trainer(tiny_flags, tmp_path / name, "--fine_tune_mode", "full-model", "--epochs", 1, *more)
        trainer.fit()
        runs[name] = copied(trainer.model), load(trainer.run.best)["weights"]
    plain, anew = runs["plain"], runs["anew"]
    assert changed(plain[0], anew[0]) == set() and changed(plain[0], plain[1]) == set()
    different = changed(anew[0], anew[1])
    assert different == {name for name in anew[0] if "running_" in name}
