"""Averages of the weights: equal to torch's, seen by evaluation and checkpoints, never noticed by training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import State, changed, copied, make_ready, make_trainer, metrics, set_dev_scores, step_of
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import multitask_classifier
from config import BertConfig, ModelOptions, TrainOptions
from models.checkpoint import load
from models.heads import BatchNorm
from models.multitask_bert import MultitaskBERT
from tasks import DEFAULT_TASKS
from text.packing import PackedBatch
from training import averaging
from training import trainer as trainer_module
from training.averaging import RunningAverage
from training.task_sampling import task_batches
from training.trainer import Trainer

EVERY = {
    "step": ["--average", "ema"],
    "epoch": ["--average", "ema", "--ema_every", "epoch"],
    "swa": ["--average", "swa"],
}


def make_model(arch: str = "yin-yang") -> MultitaskBERT:
    """A small model with random weights."""
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=48,
    )  # fmt: skip
    return MultitaskBERT(ModelOptions(arch=arch).resolved(), shape, DEFAULT_TASKS)


def make_average(model: MultitaskBERT, **given: Any) -> RunningAverage:
    """An average of all of a model."""
    average = averaging.make_average(model, TrainOptions(**{"fine_tune_mode": "full-model", **given}))
    assert average is not None
    return average


def walk(model: MultitaskBERT) -> None:
    """Make a random step of every float tensor, running statistics too."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
            if "running_var" in name:
                tensor.abs_()


def averaged_state(model: MultitaskBERT, average: RunningAverage | None) -> State:
    """The state of the model with the average in it, before BatchNorm is refreshed."""
    assert average is not None
    with average.averaged_weights():
        return copied(model)


@pytest.mark.parametrize("decay", [0.0, 0.99])
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_ema_is_that_of_torch_to_the_bit(decay: float, every: str) -> None:
    model = make_model()
    average = make_average(model, average="ema", ema_decay=decay, ema_every=every)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    reference.update_parameters(model)  # the start weights
    for number in range(1, 31):
        walk(model)
        average.after_step()
        if number % 3 == 0:
            average.after_epoch(number // 3)
        if every == "step" or number % 3 == 0:
            reference.update_parameters(model)
    before, found = copied(model), averaged_state(model, average)
    assert average.updates == (30 if every == "step" else 10)
    assert changed(reference.module.state_dict(), found) == set()
    assert changed(before, copied(model)) == set()
    assert (changed(before, found) == set()) == (decay == 0)


def test_warmup_begins_low_and_ends_at_the_decay() -> None:
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
    for name, tensor in averaged_state(model, average).items():
        torch.testing.assert_close(tensor, reference.module.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [1, 4])
def test_swa_is_that_of_torch_and_the_mean(first: int) -> None:
    model = make_model().double()
    average = make_average(model, average="swa", swa_from_epoch=first, epochs=40)
    reference, ends = AveragedModel(model, use_buffers=True), []
    for epoch in range(1, 21):
        walk(model)
        average.after_step()
        average.after_epoch(epoch)
        if epoch >= first:
            reference.update_parameters(model)
            ends.append(copied(model))
    found = averaged_state(model, average)
    for name, tensor in reference.module.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
        mean = torch.stack([end[name] for end in ends]).mean(0)
        torch.testing.assert_close(found[name], mean, rtol=1e-12, atol=1e-12)


def test_integer_buffers_are_the_models_and_a_tensor_with_two_names_is_averaged_once() -> None:
    model = make_model("v2")
    model.register_buffer("count", torch.tensor([3, 4]))
    head = model.heads["sst"]
    assert isinstance(head, nn.Sequential)
    head.append(nn.Linear(5, 5)).append(nn.ReLU()).append(head[-2])
    average = make_average(model, average="ema", ema_decay=0.5)
    start = copied(model)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor))
    model.get_buffer("count").add_(5)
    average.after_step()
    plain = copied(model)
    for name, tensor in averaged_state(model, average).items():
        wanted = torch.tensor([8, 9]) if name == "count" else (start[name] + plain[name]) / 2
        torch.testing.assert_close(tensor, wanted)
    assert changed(plain, copied(model)) == set()


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
    """A trainer after the steps of its first epoch, its average not that of the weights; batches of 8, 8 and 4."""
    trainer = make_ready(tiny_flags, run_dir, "--average", "ema", "--ema_decay", 0.8, *more)
    torch.manual_seed(1)
    for task in DEFAULT_TASKS:
        for batch in task_batches(trainer.plan, 0, task):
            trainer.train_step(step_of(task, batch.indices))
    trainer.progress.epoch = 1
    return trainer


@pytest.mark.parametrize("shared", [False, True])
def test_statistics_are_those_of_update_bn(tiny_flags: list[str], tmp_path: Path, shared: bool) -> None:
    """Of the averaged weights, per task, without dropout; shared ones, over the batches of both tasks that share."""
    trainer = trained_a_little(tiny_flags, tmp_path / "run", *["--shared_batchnorm_stats"][: int(shared)])
    train, work = trainer.loader.train, {}
    for task in DEFAULT_TASKS:
        work[task] = [((task, train[task].batch(batch.indices)),) for batch in task_batches(trainer.plan, 0, task)]
    with trainer.evaluation_weights():
        found = copied(trainer.model)
        references = [Plain(trainer.model) for _ in DEFAULT_TASKS]
    compared = set()
    for batches, reference in zip(
        [work["sst"], work["para"] + work["sts"]] if shared else list(work.values()), references, strict=False
    ):
        update_bn(batches, reference)
        served = {batch[0][0] for batch in batches}
        for name, module in reference.model.named_modules():
            in_pair_layer = name.startswith("pair_layer.") and served <= {"para", "sts"}
            if isinstance(module, OneTask) and (in_pair_layer or name.split(".")[1] in served):
                stats = "all" if shared or not in_pair_layer else min(served)
                for kind in ("mean", "var"):
                    key = f"{name}.running_{kind}_{stats}"
                    torch.testing.assert_close(found[key], module.get_buffer(f"running_{kind}"), rtol=1e-6, atol=1e-7)
                    compared.add(key)
    assert compared == {name for name in found if "running_" in name}


def test_evaluation_leaves_average_weights_and_generators_alone(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = trained_a_little(tiny_flags, tmp_path / "run")
    plain, averages = copied(trainer.model), averaged_state(trainer.model, trainer.average)
    places = [tensor.data_ptr() for tensor in trainer.model.state_dict().values()]
    numbers = torch.get_rng_state()
    for _ in range(2):
        with trainer.evaluation_weights():
            inside = copied(trainer.model)
        assert changed(averages, inside) == {name for name in plain if "running_" in name}
    with pytest.raises(ZeroDivisionError), trainer.evaluation_weights():
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), numbers)
    assert changed(plain, copied(trainer.model)) == set()
    assert [tensor.data_ptr() for tensor in trainer.model.state_dict().values()] == places
    assert changed(averages, averaged_state(trainer.model, trainer.average)) == set()
    assert trainer.model.training
    assert all(module.batches is None for module in trainer.model.modules() if isinstance(module, BatchNorm))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--arch", "yin-yang"], ["sst", "sst", "para", "para"]),
        (["--arch", "yin-yang", "--eval_every", 2], []),
        (["--arch", "r4"], []),
    ],
)
def test_batches_are_bounded_and_passed_for_batchnorm_alone(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[Any], wanted: list[str]
) -> None:
    """STS does not train, so nothing is known of it; where no evaluation is due there is nothing to prepare."""
    monkeypatch.setattr(trainer_module, "REFRESH_BATCHES", 2)
    assert averaging.REFRESH_BATCHES >= 19  # what the running statistics of a plain run are worth
    trainer = trained_a_little(tiny_flags, tmp_path / "run", "--num_sts_trains", 0, *flags)
    seen: list[str] = []
    trainer.model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments[0]))
    with trainer.evaluation_weights():
        pass
    assert seen == wanted


def test_epochs_before_the_average_begins_are_refreshed_too(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--refresh_batchnorm asks for it at each evaluation: all compete for the best checkpoint alike."""
    refresh, epochs = averaging.refresh_statistics, []
    for more, wanted in (([], [3, 4]), (["--refresh_batchnorm"], [1, 2, 3, 4])):
        flags = ["--epochs", 4, "--average", "swa", "--swa_from_epoch", 3, *more]
        trainer = make_trainer(tiny_flags, tmp_path / str(len(more)), *flags)

        def noted(*arguments: Any, trainer: Trainer = trainer) -> None:
            epochs.append(trainer.progress.epoch)
            refresh(*arguments)

        monkeypatch.setattr(averaging, "refresh_statistics", noted)
        trainer.fit()
        assert epochs == wanted
        epochs.clear()


def test_statistics_can_be_measured_anew_without_an_average(tiny_flags: list[str], tmp_path: Path) -> None:
    """Training is the same to the bit; what is evaluated and saved has the weights that train and new statistics."""
    runs = []
    for name, more in (("plain", []), ("anew", ["--refresh_batchnorm"])):
        trainer = make_trainer(tiny_flags, tmp_path / name, "--fine_tune_mode", "full-model", "--epochs", 1, *more)
        trainer.fit()
        runs.append((copied(trainer.model), load(trainer.checkpointer.run.best)["weights"]))
    (plain, plain_best), (anew, anew_best) = runs
    assert changed(plain, anew) == set() == changed(plain, plain_best)
    assert changed(anew, anew_best) == {name for name in anew if "running_" in name}


def test_training_does_not_notice(tiny_flags: list[str], tmp_path: Path) -> None:
    """Weights, optimizers and generators are those of a run without an average."""

    def run(name: str, *more: object) -> tuple[dict[str, Any], list[Any], State]:
        flags = ["--lora_mode", "attn", "--dora", "--lora_dropout", 0.1, *more]
        trainer = make_trainer(tiny_flags, tmp_path / name, *flags)
        trainer.fit()
        state = {**copied(trainer.model), "generator": torch.get_rng_state()}
        for task, optimizer in trainer.optimizers.by_name.items():
            for index, values in optimizer.state_dict()["state"].items():
                state |= {f"{task} {index} {key}": torch.as_tensor(value) for key, value in values.items()}
        best = load(tmp_path / name / "best.pt")["weights"]
        return state, [line["train"] for line in metrics(tmp_path / name)], best

    state, lines, best = run("plain")
    for name, more in EVERY.items():
        found = run(name, *more)
        assert changed(state, found[0]) == set() and lines == found[1] and changed(best, found[2])


@pytest.mark.parametrize(
    ("unit", "flags"),
    [
        ("epoch", ["--fine_tune_mode", "iterative", "--epochs", 5]),
        ("step", ["--lora_mode", "all-lin-only", "--dora", "--fine_tune_mode", "full-model"]),
    ],
)
def test_a_run_saves_the_average_of_torch(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str, flags: list[Any]
) -> None:
    """After every step of every task, or epoch; best.pt, here of the last epoch, holds its weights to the bit."""
    set_dev_scores(monkeypatch, list(range(9)))
    more = ["--average", "ema", "--ema_decay", 0.7, "--ema_every", unit, "--lr", 1e-2, *flags]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *more)
    average = trainer.average
    assert average is not None
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
    assert changed(wanted, averaged_state(trainer.model, average)) == set()
    content = load(tmp_path / "run" / "best.pt")
    saved = content["weights"]
    assert content["epoch"] == epochs
    differ = {name for name in saved if not torch.equal(saved[name], wanted[name])}
    assert differ == {name for name in saved if "running_" in name}


def test_a_step_is_in_the_averages_at_once(tiny_flags: list[str], tmp_path: Path) -> None:
    """All of it with a decay of 0; a hundredth of it in the momentum model."""
    flags = ["--average", "ema", "--ema_decay", 0, "--sst_bregman", 1]
    trainer = make_ready(tiny_flags, tmp_path / "run", *flags)
    start = copied(trainer.model)
    trainer.train_step(step_of("sst", range(8)))
    moved = copied(trainer.model)
    assert changed(start, moved)
    assert changed(moved, averaged_state(trainer.model, trainer.average)) == set()
    for name, slow in averaged_state(trainer.model, trainer.objective.momentum_model).items():
        torch.testing.assert_close(slow, start[name] + 0.01 * (moved[name] - start[name]), rtol=1e-5, atol=1e-8)


def test_dev_scores_are_those_of_plain_weights_until_swa_begins(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--epochs", 4, "--arch", "r4", "--fine_tune_mode", "full-model", "--lr", 1e-2]  # r4: no BatchNorm
    make_trainer(tiny_flags, tmp_path / "plain", *flags).fit()
    make_trainer(tiny_flags, tmp_path / "swa", *flags, "--average", "swa", "--swa_from_epoch", 2).fit()
    plain, swa = ([line["dev"] for line in metrics(tmp_path / name)] for name in ("plain", "swa"))
    assert plain[:2] == swa[:2] and plain[2] != swa[2] and plain[3] != swa[3]


def test_a_checkpoint_alone_gives_the_dev_scores_of_the_average(
    tiny_flags: list[str], sample: Path, tmp_path: Path
) -> None:
    run, flags = tmp_path / "run", ["--average", "ema", "--ema_decay", "0.5", "--lora_mode", "attn-only", "--dora"]
    words = ["--data_dir", str(sample), "--batch_size", "32", "--max_train_examples", "96", "--no_tensorboard"]
    multitask_classifier.main([*tiny_flags, *words, *flags, "--run_dir", str(run)])
    best = max(metrics(run), key=lambda line: line["dev"]["score"])
    assert json.loads((run / "scores.json").read_text())["dev"] == best["dev"]
    multitask_classifier.main(["--evaluate", str(run / "best.pt"), "--data_dir", str(sample)])
    assert json.loads((run / "best-evaluation" / "scores.json").read_text())["dev"] == best["dev"]
