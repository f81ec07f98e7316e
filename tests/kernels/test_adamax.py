"""Adamax by one kernel against the foreach form. Triton's interpreter runs the kernel on a CPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import adamax
from kernels.adamax import CHUNK, chunk_table, plain_adamax
from optimizer import Adamax

ROOT = Path(adamax.__file__).resolve().parent.parent
SHAPES = [(3,), (CHUNK + 5,), (2, CHUNK // 2), (), (7, 11)]
DECAYS = [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}]


def train(steps: int = 5, **options: Any) -> list[Tensor]:
    """Return all parameters in one vector, and so both states, after steps on gradients with zeros in them."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = Adamax(parameters, lr=1e-2, **options)
    for _ in range(steps):
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient * (torch.rand(parameter.shape, generator=generator) < 0.7)
        optimizer.step()
    columns = [parameters, *([optimizer.state[p][name] for p in parameters] for name in Adamax.states)]
    return [torch.cat([tensor.detach().flatten() for tensor in column]) for column in columns]


def assert_as_by_foreach_operations(found: list[Tensor], **options: Any) -> None:
    for ours, wanted in zip(found, train(**options), strict=True):
        assert float((ours - wanted).double().norm() / wanted.double().norm()) < 1e-7


def by_the_formula(p: list[Tensor], g: list[Tensor], m: list[Tensor], u: list[Tensor], **options: float) -> None:
    for row in zip(p, g, m, u, strict=True):
        plain_adamax(*row, **options)


@pytest.mark.parametrize("options", DECAYS)
def test_the_plain_form_is_the_foreach_form(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(adamax, "works", lambda device: True)
        patch.setattr(adamax, "one_pass_adamax", by_the_formula)
        found = train(**options)
    assert_as_by_foreach_operations(found, **options)


def test_chunks_cover_every_element_once() -> None:
    columns = [[torch.zeros(size) for size in (5, 3 * CHUNK, 1, 2 * CHUNK + 7)] for _ in range(4)]
    table = chunk_table(columns)
    assert table.shape == (1 + 3 + 1 + 3, 5) and table[:, 4].max() == CHUNK
    for i, column in enumerate(columns):
        covered = {(tensor.data_ptr() + 4 * j) for tensor in column for j in range(tensor.numel())}
        found = [address + 4 * j for address, count in table[:, [i, 4]].tolist() for j in range(count)]
        assert len(found) == len(covered) and set(found) == covered


def test_the_kernel_in_the_interpreter() -> None:
    """In a process of its own, since Triton reads the variable as it is imported."""
    pytest.importorskip("triton")
    program = "import test_adamax; test_adamax.run_kernel()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_kernel() -> None:
    """Check the kernel by its own trial and against the foreach form, and that it keeps NaN."""
    adamax.check_kernel(torch.device("cpu"))
    foreach, adamax.works = adamax.works, lambda device: True  # type: ignore[assignment]
    found = [train(**options) for options in DECAYS]
    adamax.works = foreach
    for tensors, options in zip(found, DECAYS, strict=True):
        assert_as_by_foreach_operations(tensors, **options)
    p, m, u = torch.zeros(3, 2)
    numbers = dict.fromkeys(("step_size", "gain", "beta2", "eps", "keep", "decay"), 0.5)
    adamax.one_pass_adamax([p], [torch.tensor([torch.nan, 1.0])], [m], [u], **numbers)
    assert p.isnan().tolist() == m.isnan().tolist() == u.isnan().tolist() == [True, False]
