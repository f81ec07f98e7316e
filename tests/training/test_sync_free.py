"""No training step makes the host wait for a GPU. Without one: on torch's meta device, whose tensors have no numbers.

There whatever depends on numbers raises: `.item()`, `bool(tensor)`, indices by a mask, `nonzero`. As on a GPU, the code
takes none of its shortcuts for CPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_ready, step_of, steps_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import training.smart
from tasks import DEFAULT_TASKS
from training.losses import LOSSES
from utils.device import Device

DEVICE = torch.device("meta")


class Copies(TorchDispatchMode):
    """Raises where an operation has tensors of two devices: such a copy, not from pinned memory, waits for its end."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor) and leaf.numel() > 1]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) < 2, f"{func} copies between {' and '.join(sorted(devices))}"
        return out


@contextmanager
def watched() -> Iterator[None]:
    """Inside, waiting for the device raises."""
    make = torch.tensor

    def on_host(*args: Any, device: Any = None, **options: Any) -> Tensor:
        assert device is None, "numbers of Python are copied to a device"
        return make(*args, **options)

    torch.tensor = on_host
    try:
        with Copies():
            yield
    finally:
        torch.tensor = make


@pytest.fixture
def without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the meta device lacks, and what of it never waits: autocast, generators and streams."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(training.smart, "first_noise", lambda hidden, options, step: torch.zeros_like(hidden))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)


METHODS = [
    ["--arch", "yin-yang", "--optim", "AdamW", "--clip", 1, "--average", "ema"],
    ["--arch", "r4", "--optim", "RAdam"],
    ["--arch", "cosine", "--optim", "SGD"],
    ["--arch", "v2", "--routine", "joint", "--pcgrad", "--optim", "Adam"],
    ["--arch", "v2", "--sst_smart", 1, "--para_smart", 1, "--sts_bregman", 1],
    ["--arch", "v1", "--lora_mode", "all-lin", "--lora_rank", 2, "--dora"],
    ["--arch", "v1", "--lora_mode", "all-lin", "--dora", "--dora_norm", "column", "--lora_dropout", 0.1],
    ["--arch", "v1", "--pal", "mixed", "--pal_size", 24, "--pal_heads", 2],
    ["--arch", "v1", "--sts_embedding_loss", "ranking", "--para_embedding_loss", "contrastive"],
    ["--arch", "v1", "--sts_embedding_loss", "cosine", "--sst_embedding_loss", "simcse"],
]


@pytest.mark.parametrize("more", METHODS, ids=lambda more: " ".join(map(str, more)))
def test_no_step_waits(tiny_flags: list[str], tmp_path: Path, without_numbers: None, more: list[object]) -> None:
    """A step of each task, everything trainable, with the gradient's norm."""
    trainer = make_ready(tiny_flags, tmp_path / "run", *more, device=Device(DEVICE))
    trainer.loader.stream = object()  # type: ignore[assignment]
    joint = trainer.config.train.routine == "joint"
    steps = steps_of(trainer)[:1] if joint else [step_of(task, range(7)) for task in DEFAULT_TASKS]
    for step in steps:
        batches = [trainer.loader.load(batch, number) for number, batch in enumerate(step.batches)]
        for batch in batches:
            _ = batch.inputs.grouping  # type: ignore[union-attr]  made with the batch on a GPU
        with pytest.MonkeyPatch.context() as patch:  # copies to the device have a stream of their own
            patch.setattr(trainer.loader, "load", lambda batch, number, batches=batches: batches[number])
            with watched():
                result = trainer.train_step(step, measure_norm=True)
        for done in result.batches:
            assert {tensor.device for tensor in (done.loss, done.outputs, done.labels)} == {DEVICE}
        assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_no_loss_waits(loss: str) -> None:
    labels = torch.empty(6, dtype=torch.int64, device=DEVICE)
    shapes = {"ce": [(6, 5)], "kl": [(6, 5)], "ordinal": [(6, 5)], "bce": [(6,), (6, 5)], "mixed": [(6,), (6, 5)]}
    for shape in shapes.get(loss, [(6,)]):
        outputs = torch.empty(shape, device=DEVICE, requires_grad=True)
        with watched():
            LOSSES[loss](outputs, labels).backward()


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "list": lambda x: x.tolist(),
    "numbers from the host": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "lengths of the host": lambda x: x + torch.ones(5).to(x.device),
}


@pytest.mark.parametrize("wait", WAITS)
def test_what_waits_is_found(wait: str) -> None:
    x = torch.empty(5, device=DEVICE)
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), watched():
        WAITS[wait](x)
