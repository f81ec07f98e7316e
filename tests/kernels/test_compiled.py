"""--compile: the compiled rest of a layer against the plain one. Compiling takes seconds, so there are few tests."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_resumes, load_batch, make_ready, make_trainer, steps_of
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from bert import BertModel

STILL = ["--arch", "v1", "--backbone_dropout_prob", 0, "--hidden_dropout_prob", 0, "--train_sst"]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Forget what other tests have compiled, and start no further processes."""
    torch._dynamo.reset()
    counters.clear()
    with inductor.patch(compile_threads=1):
        yield


@pytest.mark.long
def test_a_compiled_layer_equals_the_plain_one_for_any_number_of_tokens(tiny_flags: list[str], tmp_path: Path) -> None:
    found: dict[str, list[list[Tensor]]] = {}
    for more in ([], ["--compile"]):
        trainer = make_ready(tiny_flags, tmp_path / f"run{len(more)}", *STILL, *more)
        for rows in (range(5), range(3, 16)):
            loss, outputs = trainer.forward_backward(load_batch(trainer, "sst", rows), 1.0)
            gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            found.setdefault(str(rows), []).append([loss, outputs, *gradients])
            trainer.model.zero_grad(set_to_none=True)
    for plain, compiled in found.values():
        for wanted, tensor in zip(plain, compiled, strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "more",
    [
        ["--lora_mode", "all-lin-only", "--dora", "--lora_rank", 2],
        ["--lora_mode", "all-lin", "--lora_rank", 2, "--sst_smart", 1],
        ["--pal", "low-rank", "--pal_residual", "attention", "--sst_bregman", 1],
        ["--pal", "shared-v", "--pal_size", 8, "--pal_heads", 2, "--micro_batch_size", 2],
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_methods_with_compiled_layers(
    tiny_flags: list[str], tmp_path: Path, more: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the generated code: torch's own operators do the work of the compiled functions."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    losses = []
    for i, flags in enumerate([[], ["--compile"]]):
        trainer = make_ready(tiny_flags, tmp_path / str(i), *STILL, *more, *flags)
        trainer.loader.begin_epoch(steps_of(trainer), 0, 0)
        losses.append([result.loss for step in steps_of(trainer) for result in trainer.train_step(step).batches])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"]


@pytest.mark.long
def test_resuming(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resumed run compiles for another first batch, as another process does."""
    compile_layers = BertModel.compile_layers
    monkeypatch.setattr(BertModel, "compile_layers", lambda model: (torch._dynamo.reset(), compile_layers(model)))
    more = ["--arch", "v1", "--train_sst", "--fine_tune_mode", "full-model", "--compile"]
    with inductor.patch(force_disable_caches=True):
        assert_resumes(tiny_flags, tmp_path, *more, after=1)


def test_a_failing_compiler_is_told_and_training_goes_on(
    tiny_flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        assert make_trainer(tiny_flags, tmp_path / "run", "--train_sst", "--compile").fit()["score"] > 0
    (line,) = [record.message for record in caplog.records if record.name == "minbert.compile"]
    assert line.startswith("--compile: torch cannot compile here (") and "no-such-compiler" in line
