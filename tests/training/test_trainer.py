"""The loop: what trains and what stays, the steps of an epoch, evaluation and the best checkpoint."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ask_the_allocator,
    changed,
    copied,
    digest,
    load_batch,
    make_ready,
    make_trainer,
    metrics,
    set_dev_scores,
    states_by_epoch,
    step_of,
    steps_of,
)
from torch import Tensor

from evaluation.metrics import score_task
from evaluation.predict import predict
from models.checkpoint import load
from models.freezing import scheduled_layers
from tasks import DEFAULT_TASKS, STS
from training.losses import LOSSES
from training.task_sampling import Step, TaskBatch
from utils.errors import UserError


@pytest.mark.parametrize("arch", ["yin-yang", "r4"])
def test_the_loss_falls_on_the_sample_data(tiny_flags: list[str], sample: Path, tmp_path: Path, arch: str) -> None:
    more = ["--data_dir", sample, "--arch", arch, "--batch_size", 32, "--epochs", 3, "--fine_tune_mode", "full-model"]
    more += ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0, "--optim", "AdamW", "--lr_schedule", "constant"]
    make_trainer(tiny_flags, tmp_path / "run", *more, "--lr", 3e-4).fit()
    lines = metrics(tmp_path / "run")
    for task in DEFAULT_TASKS:
        assert lines[2]["train"][task]["loss"] < lines[0]["train"][task]["loss"] - 0.02, task
        assert lines[0]["train"][task]["steps"] == 19


def test_iterative_unfreezing_by_hashes(tiny_flags: list[str], tmp_path: Path) -> None:
    """Two layers: heads; top one in epochs 2 and 3; both in epoch 4; embeddings too in epoch 5.

    To the bit, in spite of weight decay.
    """
    flags = ["--fine_tune_mode", "iterative", "--epochs", 5, "--lr_schedule", "constant"]
    _, states = states_by_epoch(tiny_flags, tmp_path / "run", *flags)
    parts = ["word_embedding", "pos_embedding", "embed_layer_norm", "bert_layers.0", "bert_layers.1", "pooler_dense"]
    top = {"bert_layers.1", "pooler_dense"}
    moving = [set(), top, top, {"bert_layers.0", *top}, set(parts)]
    for backbone in ("sentiment", "similarity"):
        for epoch, wanted in enumerate(moving):
            before, after = states[epoch], states[epoch + 1]
            prefix = f"backbones.{backbone}."
            found = {part for part in parts if digest(before, prefix + part) != digest(after, prefix + part)}
            assert found == wanted, f"{backbone}, epoch {epoch + 1}"
            assert all(digest(before, part) != digest(after, part) for part in ("heads.", "pair_layer."))
    assert [line["trains"] for line in metrics(tmp_path / "run")] == [
        "the heads train",
        "the heads, the pooler and the top 1 layer train",
        "the heads, the pooler and the top 1 layer train",
        "the heads, the pooler and the top 2 layers train",
        "everything trains",
    ]


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
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 6, *flags)
    layers = [scheduled_layers("iterative", stage, 2) for stage in stages]
    assert [trainer.model.freeze_for_epoch(trainer.config.train, epoch) for epoch in range(6)] == layers


def test_a_task_without_gradient_is_passed_over(tiny_flags: list[str], tmp_path: Path) -> None:
    """A bare cosine on a frozen backbone has nothing to train; the epoch goes on with the others."""
    flags = ["--arch", "v1", "--fine_tune_mode", "last-layer", "--epochs", 1]
    _, states = states_by_epoch(tiny_flags, tmp_path / "run", *flags)
    assert {name.split(".")[1] for name in changed(states[0], states[1])} == {"sst", "para"}
    assert metrics(tmp_path / "run")[0]["train"]["sts"]["steps"] == 3


def test_a_run_in_which_nothing_trains_is_refused(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--train_sts", "--arch", "v1", "--fine_tune_mode", "last-layer"]
    message = "--fine_tune_mode last-layer freezes the backbones in all --epochs 2, and a bare cosine"
    with pytest.raises(UserError, match=message):
        make_trainer(tiny_flags, tmp_path / "run", *flags).fit()
    make_trainer(tiny_flags, tmp_path / "run", *flags, "--sts_projection", "--overwrite", "--epochs", 1).fit()


def test_gradient_norm_is_that_of_the_whole_gradient(tiny_flags: list[str], tmp_path: Path) -> None:
    still = ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0]
    trainer = make_ready(tiny_flags, tmp_path / "run", *still)
    batch = load_batch(trainer, "para", range(8))
    LOSSES["bce"](trainer.model("para", batch.inputs), batch.labels).backward()
    wanted = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]).norm().item()
    trainer.model.zero_grad(set_to_none=True)
    result = trainer.train_step(step_of("para", range(8)), measure_norm=True)
    assert result.norm is not None and result.norm.item() == pytest.approx(wanted, rel=1e-5)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_rounds_parts_and_late_tasks(tiny_flags: list[str], tmp_path: Path) -> None:
    """20 examples in batches of 8; a task that does not train is evaluated all the same."""
    flags = ["--num_sst_trains", 2, "--quora_fraction", 0.25, "--sts_from_epoch", 2, "--routine", "interleave"]
    make_trainer(tiny_flags, tmp_path / "run", *flags).fit()
    lines = metrics(tmp_path / "run")
    assert [{task: done["steps"] for task, done in line["train"].items()} for line in lines] == [
        {"sst": 6, "para": 1},
        {"sst": 6, "para": 1, "sts": 3},
    ]
    assert [line["step"] for line in lines] == [7, 17]
    assert list(lines[0]["dev"]) == ["sst", "para", "sts", "score", "score_raw_r"]


@pytest.mark.parametrize("arch", ["yin-yang", "r4"])
def test_a_last_batch_of_one_trains(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    """BatchNorm has no variance there, Pearson no correlation."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--batch_size", 19, "--arch", arch)
    trainer.fit()
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    assert metrics(tmp_path / "run")[1]["train"]["sts"]["steps"] == 2


@pytest.mark.parametrize("routine", ["sequential", "annealed", "joint"])
def test_a_task_without_passes_is_scored_with_an_untrained_head(
    tiny_flags: list[str], tmp_path: Path, routine: str
) -> None:
    """As in the reports' rows for one training task, which print the scores of all three."""
    flags = [*tiny_flags, "--routine", routine, "--num_para_trains", "0", "--num_sts_trains", "0"]
    trainer = make_trainer(flags, tmp_path / "run", "--fine_tune_mode", "full-model", "--epochs", 1)
    before = copied(trainer.model)
    trained = {batch.task for step in steps_of(trainer) for batch in step.batches}
    assert trained == {"sst"}
    trainer.fit()
    moved = changed(before, copied(trainer.model))
    assert moved and all(name.startswith(("backbones.sentiment.", "heads.sst.")) for name in moved)
    assert metrics(tmp_path / "run")[-1]["dev"].keys() == {"sst", "para", "sts", "score", "score_raw_r"}


def test_one_seed_gives_identical_metrics(tiny_flags: list[str], tmp_path: Path) -> None:
    lines = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(lines))  # what a process did before has no part in it
        make_trainer(tiny_flags, tmp_path / name, "--seed", seed).fit()
        lines.append((tmp_path / name / "metrics.jsonl").read_bytes())
    assert lines[0] == lines[1] != lines[2]
    a, b = load(tmp_path / "a" / "best.pt"), load(tmp_path / "b" / "best.pt")
    assert changed(a["weights"], b["weights"]) == set()


def test_the_best_checkpoint_is_that_of_the_best_epoch(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_dev_scores(monkeypatch, [0.3, 0.5, 0.5, 0.4])  # a tie does not replace it
    filepath = tmp_path / "elsewhere" / "model.pt"
    flags = ["--epochs", 4, "--filepath", filepath, "--fine_tune_mode", "full-model"]
    _, states = states_by_epoch(tiny_flags, tmp_path / "run", *flags)
    content = load(tmp_path / "run" / "best.pt")
    assert (content["epoch"], content["step"], content["scores"]["score"]) == (2, 18, 0.5)
    assert changed(content["weights"], states[2]) == set() != changed(content["weights"], states[4])
    assert filepath.read_bytes() == (tmp_path / "run" / "best.pt").read_bytes()
    assert load(tmp_path / "run" / "resume.pt")["progress"]["epoch"] == 4


@pytest.mark.parametrize(("eval_every", "scores", "epochs"), [(1, [3, 2, 4, 4, 1, 9], 5), (2, [4, 2, 1, 9], 6)])
def test_patience_counts_evaluations(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eval_every: int, scores: list[float],
    epochs: int,
) -> None:  # fmt: skip
    set_dev_scores(monkeypatch, scores)
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 8, "--patience", 2, "--eval_every", eval_every)
    assert trainer.fit()["score"] == 4
    assert len(metrics(tmp_path / "run")) == epochs


def test_evaluating_less_often_trains_the_same(tiny_flags: list[str], tmp_path: Path) -> None:
    _, often = states_by_epoch(tiny_flags, tmp_path / "a", "--epochs", 5)
    _, rare = states_by_epoch(tiny_flags, tmp_path / "b", "--epochs", 5, "--eval_every", 2, "--eval_batch_size", 3)
    assert changed(often[-1], rare[-1]) == set()
    lines = metrics(tmp_path / "b")
    assert [bool(line["dev"]) for line in lines] == [False, True, False, True, True]
    assert all("accuracy" in line["train"]["sst"] and "pearson" in line["train"]["sts"] for line in lines)


def test_a_task_may_be_evaluated_less_often(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best checkpoint comes from an epoch that scored every task, since only such a score can be compared."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--quora_epoch_eval", 2, "--epochs", 5, "--batch_size", 20)
    trainer.fit()
    whole = {"sst", "para", "sts", "score", "score_raw_r"}
    evaluated = [set(line["dev"]) for line in metrics(tmp_path / "run")]
    assert evaluated == [{"sst", "sts"}, whole, {"sst", "sts"}, whole, whole]
    assert load(tmp_path / "run" / "best.pt")["epoch"] in (2, 4, 5)
    tables = capsys.readouterr().out.split("\nEpoch ")[1:]
    assert [table.count("accuracy") for table in tables] == [1, 2, 1, 2, 2]
    assert ["dev score" in table for table in tables] == [False, True, False, True, True]


def test_dev_scores_are_those_of_the_model_at_hand(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--epochs", 1)
    trainer.fit()
    data = trainer.loader.dev["sts"]
    outputs = predict(trainer.model, data, torch.device("cpu"), 128)
    assert metrics(tmp_path / "run")[0]["dev"]["sts"] == score_task(STS, outputs, data.examples.labels)


def test_a_joint_step_moves_by_the_mean_of_the_weighted_losses(tiny_flags: list[str], tmp_path: Path) -> None:
    """SGD without decay moves by the gradient of (w1 L1 + w2 L2 + w3 L3) / 3, by each group's own rate."""
    flags = ["--routine", "joint", "--optim", "SGD", "--arch", "r1-baseline", "--sts_weight", 0.5]
    flags += ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0]
    flags += [f"--{task}_weight_decay=0" for task in DEFAULT_TASKS]
    trainer = make_ready(tiny_flags, tmp_path / "run", *flags)
    model, total = trainer.model, torch.zeros(())
    for task, weight in (("sst", 1.0), ("para", 1.0), ("sts", 0.5)):
        batch = load_batch(trainer, task, range(8))
        loss = LOSSES[trainer.config.tasks[task].loss](model(task, batch.inputs), batch.labels)
        total = total + weight * loss / 3
    total.backward()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    step = Step(tuple(TaskBatch(task, np.arange(8)) for task in DEFAULT_TASKS))
    trainer.optimizers.set_rates(trainer.optimizers.for_step(step), 0.0)
    trainer.train_step(step)
    multipliers = {"heads.sst.": 4, "heads.para.": 5, "heads.sts.": 3, "backbones.": 4}  # 4 is the mean of all three
    for name, parameter in model.named_parameters():
        if name in before:
            rate = next(1e-3 * factor for part, factor in multipliers.items() if name.startswith(part))
            start, gradient = before[name]
            nesterov = 1.9  # Nesterov's first step: the gradient and .9 of the momentum, which is the gradient too
            torch.testing.assert_close(parameter.detach(), start - nesterov * rate * gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("more", [["--lora_mode", "attn-only"], ["--clip", 0.1, "--average", "ema"]])
def test_pcgrad_trains_and_counts_conflicts(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[object]
) -> None:
    """Through every stage of unfreezing; what is frozen keeps no gradient and does not move."""
    flags = ["--routine", "joint", "--pcgrad", "--arch", "v2", "--epochs", 5, *more]
    _, states = states_by_epoch(tiny_flags, tmp_path / "run", *flags)
    epochs = metrics(tmp_path / "run")
    assert epochs[0].get("conflicts", 0) == 0  # heads alone train: nothing is shared
    assert all(0 <= epoch["conflicts"] <= 1 for epoch in epochs[1:]) and any(epoch["conflicts"] for epoch in epochs[1:])
    moved = changed(states[0], states[-1])
    assert any(name.startswith("backbones.") for name in moved)
    if "--lora_mode" in more:
        assert not any(name.startswith("backbones.") and "lora_" not in name for name in moved)


def test_what_pcgrad_makes_is_what_is_clipped(tiny_flags: list[str], tmp_path: Path) -> None:
    """To clip the gradient of each task would leave another norm and another direction."""
    handed: list[Tensor] = []
    for number, more in enumerate(([], ["--clip", 0.05])):
        trainer = make_ready(
            tiny_flags, tmp_path / str(number), "--routine", "joint", "--pcgrad", "--arch", "v2", *more
        )
        step = steps_of(trainer)[0]
        parameters = list(trainer.model.parameters())
        trainer.optimizers.for_step(step).register_step_pre_hook(
            lambda *_, parameters=parameters: handed.append(
                torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            )
        )
        torch.manual_seed(0)
        trainer.train_step(step)
    plain, clipped = handed
    assert plain.norm() > 1
    torch.testing.assert_close(clipped, plain * (0.05 / plain.norm()))


def test_pcgrad_where_nothing_trains_yet(tiny_flags: list[str], tmp_path: Path) -> None:
    """A bare cosine has no weights, and the backbone waits for the second epoch."""
    flags = ["--train_sts", "--arch", "v1", "--routine", "joint", "--pcgrad"]
    _, states = states_by_epoch(tiny_flags, tmp_path / "run", *flags)
    assert changed(states[0], states[1]) == set() != changed(states[1], states[2])


def raises(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises an error."""

    def fail(*_: object) -> Any:
        raise error

    return fail


def test_what_ends_a_run_says_how_to_go_on(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    trainer.train_step = raises(KeyboardInterrupt())  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert "stopped at once; nothing of the run is saved yet, --overwrite starts it again" in capsys.readouterr().out
    trainer.train_step = raises(OSError(errno.ENOSPC, "No space left"))  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space left"):  # the scripts make a line of it
        trainer.fit()
    trainer.checkpointer.load_state = ask_the_allocator  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="allocate"):  # not taken for a damaged state
        trainer.restore()
