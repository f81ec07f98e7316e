"""The precision of a run, and how much memory is free, in containers and batch jobs too."""

from pathlib import Path

import pytest
import torch
from helpers import refusal

from config import ComputeOptions
from utils import device as device_module
from utils.device import (
    choose_device,
    device_of,
    free_memory,
    processor_name,
    random_state,
    seed_generator,
    set_random_state,
)


@pytest.mark.parametrize(
    ("gpu", "bf16", "dtype", "wanted"),
    [
        (True, True, "auto", torch.bfloat16),
        (True, False, "auto", torch.float16),
        (True, True, "fp16", torch.float16),
        (True, False, "bf16", "this cuda has no fast bf16"),
        (False, True, "auto", torch.bfloat16),
        (False, True, "bf16", torch.bfloat16),
        (False, False, "auto", None),
        (False, False, "bf16", "this cpu has no fast bf16"),
        (False, True, "fp16", "this cpu has no fast fp16"),
    ],
)
def test_the_type_of_mixed_precision(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, bf16: bool, dtype: str, wanted: torch.dtype | str | None
) -> None:
    """What a device lacks is refused if it was named, and replaced if it was not; only fp16 has a scaler."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device_module, "has_bf16", lambda kind: bf16)
    if isinstance(wanted, str):
        assert wanted in refusal(choose_device, gpu, True, None, print, dtype)
        return
    found = choose_device(gpu, True, None, print, dtype)
    assert (found.amp, found.scaled) == (wanted, wanted is torch.float16)


def test_tf32_is_for_gpus_that_have_it_and_off_by_default(tf32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    products, lines = torch.backends.cuda.matmul, []  # type: ignore[var-annotated]
    device_of(ComputeOptions(), lines.append)
    assert not products.allow_tf32 and not lines
    device_of(ComputeOptions(tf32=True), lines.append)
    assert not products.allow_tf32 and lines.pop() == "--tf32: this cpu has no TF32; products of fp32 stay exact"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    device_of(ComputeOptions(use_gpu=True, tf32=True), lines.append)
    assert products.allow_tf32 and not lines


def test_the_generator_of_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one of its own, with which dropout draws there; the CPU's is left alone."""
    device, generator = torch.device("mps"), torch.Generator()
    monkeypatch.setattr(torch.mps, "get_rng_state", generator.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", generator.set_state)
    monkeypatch.setattr(torch.mps, "manual_seed", generator.manual_seed)
    before = torch.get_rng_state()
    seed_generator(device, 7)
    state, first = random_state(device), torch.rand(3, generator=generator)
    set_random_state(device, state)
    assert torch.equal(torch.rand(3, generator=generator), first) and torch.equal(torch.get_rng_state(), before)


def test_a_type_of_mixed_precision_needs_it() -> None:
    assert "--amp; add" in refusal(choose_device, False, False, None, print, "bf16")


@pytest.mark.parametrize(
    ("gpu", "use_gpu", "cuda", "wanted"),
    [
        (True, False, "13.0", "using the CPU, although this machine has a GPU; --use_gpu uses it"),
        (False, True, None, "is a build for CPUs"),
        (False, True, "13.0", "is a build for GPUs, so see whether nvidia-smi lists one"),
        (True, True, "13.0", ""),
        (False, False, None, ""),
    ],
)
def test_an_unused_gpu_and_a_missing_one_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, use_gpu: bool, cuda: str | None, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    lines: list[str] = []
    assert choose_device(use_gpu, False, None, lines.append).device.type == ("cuda" if gpu and use_gpu else "cpu")
    assert len(lines) == bool(wanted) and all(wanted in line and "\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("groups", "limits", "wanted"),
    [
        ("0::/job/step", {}, 8_000_000 * 1024),
        ("0::/job/step", {"job/memory.max": "3000000000", "job/step/memory.max": "max"}, 3_000_000_000),
        ("0::/", {"memory.max": "5000000000"}, 5_000_000_000),
        ("4:memory:/job\n3:cpuset:/", {"memory/job/memory.limit_in_bytes": "4000000000"}, 4_000_000_000),
        ("4:memory:/job", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 8_000_000 * 1024),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "1000"}, 0),
    ],
)
def test_free_memory(tmp_path: Path, groups: str, limits: dict[str, str], wanted: int) -> None:
    files = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n", "proc/self/cgroup": groups + "\n"}
    for name, text in {**files, **{f"sys/fs/cgroup/{name}": text + "\n" for name, text in limits.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = free_memory(tmp_path)
    assert found == wanted or 0 < wanted - found < 3_000_000_000  # less what this process has taken


def test_free_memory_of_this_machine(tmp_path: Path) -> None:
    assert 1 << 20 < free_memory() < 1 << 50
    assert 1 << 20 < free_memory(tmp_path) < 1 << 50  # no /proc


def test_the_processor_is_named(tmp_path: Path) -> None:
    """By its model, or by its architecture where the system tells no model."""
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9454 48-Core\nmodel name\t: other\n")
    assert processor_name(file) == "AMD EPYC 9454 48-Core"
    file.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert processor_name(file) == processor_name(tmp_path / "none") != ""
