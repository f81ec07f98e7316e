"""A lack of memory: which errors say so, one line of it, and an evaluation that goes on in halves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ask_the_allocator, make_trainer
from torch import Tensor, nn

from evaluation.predict import predict
from utils.console import run_script
from utils.errors import UserError, is_out_of_memory


def ask_cuda() -> None:
    """Raise the error of a GPU's allocator."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ...")


def test_errors_of_allocators_are_known() -> None:
    for ask in (ask_the_allocator, ask_cuda, lambda: np.empty(1 << 55), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            ask()
        assert is_out_of_memory(error.value)
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), UserError("out of memory"), OSError(12)):
        assert not is_out_of_memory(other)


def test_a_lack_of_memory_anywhere_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run_script(lambda argv: ask_the_allocator(), [])
    shown = capsys.readouterr().err
    assert exit.value.code == 2 and shown.startswith("error: out of memory (") and shown.count("\n") == 1
    assert "--eval_batch_size" in shown
    with pytest.raises(RuntimeError, match="inconsistent"):
        run_script(lambda argv: torch.ones(2) @ torch.ones(3), [])


def test_evaluation_goes_on_in_halves(tiny_flags: list[str], tmp_path: Path) -> None:
    """Down to one example; then the error of the allocator is passed on."""
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    data = trainer.loader.dev["para"]
    whole = predict(trainer.model, data, torch.device("cpu"), 12)
    sizes: list[int] = []
    most = 3

    def hook(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        sizes.append(given[1].num_sequences // 2)
        if sizes[-1] > most:
            ask_the_allocator()

    trainer.model.backbone("para").bert_layers[0].register_forward_hook(hook)
    np.testing.assert_allclose(predict(trainer.model, data, torch.device("cpu"), 12), whole, atol=1e-6)
    assert sizes == [12, 6, 3, 3, 6, 3, 3]
    most = 0
    with pytest.raises(RuntimeError, match="allocate"):
        predict(trainer.model, data, torch.device("cpu"), 12)
