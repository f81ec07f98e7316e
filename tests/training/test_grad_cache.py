"""--micro_batch_size: parts of a batch give the gradient of the whole one, with masks that repeat, in less memory."""

from pathlib import Path

import pytest
import torch
from helpers import (
    State,
    ask_the_allocator,
    assert_resumes,
    changed,
    copied,
    forward_result,
    load_batch,
    make_ready,
    make_trainer,
    states_by_epoch,
    step_of,
)
from torch import Tensor, nn

from tasks import DEFAULT_TASKS
from text.packing import PackedBatch
from training import grad_cache
from training.grad_cache import GradCache
from training.smart import bregman_loss, smart_loss
from training.trainer import Trainer
from utils.device import Device
from utils.errors import UserError

ROWS = [4, 1, 9, 2, 16]
STILL = ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0]


def pass_back(trainer: Trainer, task: str, size: int | None) -> State:
    """Return loss, outputs, gradients and running statistics of a batch, of which at most `size` pass at a time."""
    model, start = trainer.model, copied(trainer.model)
    cache = None if size is None else GradCache(model, size, 1, torch.device("cpu"))
    trainer.objective.grad_cache = cache
    torch.manual_seed(3)
    loss, outputs = trainer.forward_backward(load_batch(trainer, task, ROWS, number=5), 1.0)
    found = {"loss": loss, "outputs": outputs, "generator": torch.get_rng_state()}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers() if "running_" in name}
    model.zero_grad(set_to_none=True)
    model.load_state_dict(start)
    return found


@pytest.mark.parametrize(
    "more",
    [
        [],  # Pearson, which sees the whole batch, and BatchNorm in the pair layer and the heads
        ["--arch", "r4", "--sts_loss", "mixed", "--sst_loss", "ordinal"],
        ["--arch", "v2", "--sts_loss", "mse", "--sst_loss", "kl", "--pal", "pal"],
        ["--arch", "v1", "--sts_loss", "log-cosh", "--sst_loss", "bce", "--pal", "low-rank", "--pal_low_rank_size", 4],
        ["--arch", "cosine", "--lora_mode", "all-lin", "--dora", "--sst_loss", "mixed"],
        ["--para_embedding_loss", "contrastive", "--sts_embedding_loss", "ranking"],
        ["--arch", "duality", "--sts_embedding_loss", "cosine"],
        ["--arch", "v2", "--sst_smart", 1, "--para_smart", 1, "--sts_smart", 1, "--smart_steps", 2],
        ["--arch", "v1", "--para_smart", 1, "--sst_bregman", 1, "--sts_bregman", 1, "--lora_mode", "attn"],
        ["--arch", "v2", "--mlm"],
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_whole_batch(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    """In float64, since in float32 rounding alone is as much as 1e-5 of the gradient of a correlation of five."""
    trainer = make_ready(tiny_flags, tmp_path / "run", *STILL, *more, double=True)
    with torch.no_grad():  # or a slow average would have nothing to compare
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    for task in DEFAULT_TASKS:
        whole = pass_back(trainer, task, None)
        trained = [name for name, _ in trainer.model.named_parameters() if name in whole]
        gradient = torch.cat([whole[name].flatten() for name in trained])
        assert len(trained) > 10 and gradient.norm() > 0
        for size in (4, 1, 10):  # the last is the whole batch
            found = pass_back(trainer, task, size)
            assert list(found) == list(whole)
            difference = torch.cat([(found[name] - whole[name]).flatten() for name in trained])
            assert difference.norm() < 1e-6 * gradient.norm(), (task, size, difference.norm() / gradient.norm())
            for name in set(whole) - set(trained):
                torch.testing.assert_close(found[name], whole[name], atol=1e-7, rtol=1e-6, msg=f"{task} {name}")


@pytest.mark.parametrize(
    "more",
    [
        ["--routine", "joint", "--pcgrad", "--arch", "r1-baseline", "--clip", 0.1, "--epochs", 1],
        ["--routine", "joint", "--pcgrad", "--mlm", "--epochs", 1],
        ["--cache_frozen", "--fine_tune_mode", "iterative", "--epochs", 3],
    ],
    ids=str,
)
def test_runs_are_those_of_whole_batches(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    flags = [*STILL, "--optim", "SGD", "--fine_tune_mode", "full-model", *more]
    _, (start, *_, whole) = states_by_epoch(tiny_flags, tmp_path / "whole", *flags)
    _, (*_, parts) = states_by_epoch(tiny_flags, tmp_path / "parts", *flags, "--micro_batch_size", 3)
    assert changed(start, whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "more",
    [
        ["--sts_embedding_loss", "simcse", "--sst_embedding_loss", "simcse"],
        ["--sst_rdrop", 1, "--para_rdrop", 2, "--sts_rdrop", 1],
        ["--arch", "v2", "--sst_bregman", 1, "--para_smart", 1, "--lora_mode", "attn", "--lora_dropout", 0.2],
        ["--arch", "r1-baseline", "--pal", "pal"],
        ["--arch", "v2", "--mlm"],
    ],
    ids=str,
)
def test_a_part_that_is_computed_again_has_the_same_masks_and_precision(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[object], precision: torch.dtype
) -> None:
    """Against parts whose graph is kept: there nothing is computed again. Dropout is on everywhere."""
    device = Device(torch.device("cpu"), precision)
    trainer = make_ready(tiny_flags, tmp_path / "run", *more, device=device)
    again = {task: pass_back(trainer, task, 3) for task in DEFAULT_TASKS}
    monkeypatch.setattr(grad_cache, "recomputed", lambda run, *arguments: run(*arguments))
    near = {"atol": 1e-6, "rtol": 1e-5} if precision is None else {"atol": 1e-3, "rtol": 2e-2}
    for task in DEFAULT_TASKS:
        for name, tensor in pass_back(trainer, task, 3).items():
            torch.testing.assert_close(again[task][name], tensor, **near, msg=f"{task} {name}")


@pytest.mark.parametrize("arch", ["yin-yang", "v2"])
def test_masks_repeat_so_that_equal_passes_have_no_divergence(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    """Of SMART at zero noise and of the Bregman loss at equal weights; other views and batches have other masks."""
    flags = ["--arch", arch, "--sst_bregman", 1, "--sst_smart", 1, "--micro_batch_size", 2]
    flags += ["--smart_sigma", 0, "--smart_epsilon", 1e-30]
    trainer = make_ready(tiny_flags, tmp_path / "run", *flags)
    for task in DEFAULT_TASKS:
        result = forward_result(trainer, task, ROWS)
        assert smart_loss(trainer.config.train)(result).item() == 0
        assert bregman_loss(result).item() == 0
        embed, inputs = result.objective.embed, result.batch.inputs
        assert torch.equal(embed(result.batch, inputs), result.embedding)
        assert not torch.equal(embed(result.batch, inputs, view=1), result.embedding)
        other = load_batch(trainer, task, ROWS, number=8)
        assert not torch.equal(embed(other, other.inputs), result.embedding)


def test_a_run_in_parts_resumes_bit_for_bit(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--micro_batch_size", 3, "--sst_smart", 1, "--para_embedding_loss", "contrastive", "--routine", "joint"]
    assert_resumes(tiny_flags, tmp_path, *flags, "--fine_tune_mode", "full-model", after=1)


def test_parts_are_no_larger_than_the_limit_and_of_even_lengths(tiny_flags: list[str], tmp_path: Path) -> None:
    """A pair of texts counts two sequences; a batch that fits is passed whole and once."""
    trainer = make_ready(tiny_flags, tmp_path / "run", "--micro_batch_size", 4)
    for task, rows, wanted in (("sst", ROWS, [3, 2]), ("sst", ROWS[:4], [4]), ("para", ROWS, [4, 3, 3])):
        passed: list[PackedBatch] = []
        layer = trainer.model.backbone(task).bert_layers[0]
        hook = layer.register_forward_hook(lambda module, inputs, out, passed=passed: passed.append(inputs[1]))
        trainer.train_step(step_of(task, rows))
        hook.remove()
        forward = passed[: len(wanted)]
        assert [part.num_sequences for part in forward] == wanted
        tokens = [part.num_tokens for part in forward]
        assert max(tokens) - min(tokens) <= max(part.max_seqlen for part in forward)
        assert len(passed) == (1 if len(wanted) == 1 else 2 * len(wanted))


def test_parts_keep_less_for_the_gradient(tiny_flags: list[str], tmp_path: Path) -> None:
    """Bytes that wait for the backward pass, counted where autograd saves them."""
    kept = []
    for number, more in enumerate(([], ["--micro_batch_size", 5])):
        trainer = make_ready(tiny_flags, tmp_path / str(number), "--arch", "v2", *STILL, *more)
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = trainer.objective(load_batch(trainer, "para", range(20)))
        assert loss.requires_grad
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 10


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], ["in a step of 16 sequences, at most 16 at a time", "--micro_batch_size 8 needs less memory"]),
        (["--micro_batch_size", 5], ["at most 5 at a time", "--micro_batch_size 2 needs"]),
        (["--micro_batch_size", 1], ["at most 1 at a time", "lower --max_length", "--lora_mode"]),
    ],
    ids=str,
)
def test_out_of_memory_names_the_flag_and_a_value(
    tiny_flags: list[str], tmp_path: Path, more: list[object], words: list[str]
) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--train_sts", *more)
    layer = trainer.model.backbone("sts").bert_layers[0]
    layer.register_forward_hook(lambda *_: ask_the_allocator())
    with pytest.raises(UserError) as error:
        trainer.fit()
    message = str(error.value)
    assert message.startswith("out of memory ") and all(word in message for word in words) and "\n" not in message


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    layer = trainer.model.backbone("sst").bert_layers[0]
    layer.register_forward_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trainer.fit()
