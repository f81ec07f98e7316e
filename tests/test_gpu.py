"""What only a GPU can show; run by make gpu-check. Numbers are compared with the CPU's."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import changed, copied, interrupted, make_trainer, metrics
from torch import nn

import multitask_classifier
from optimizer import OPTIMIZERS
from tasks import DEFAULT_TASKS
from training.device import Device
from training.efficiency import StepGauge
from training.loop import Trainer
from training.losses import LOSSES
from training.routines import task_batches

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact() -> None:
    """fp32 products in fp32, and a failure where there is no GPU: a skipped check would pass for a passed one."""
    assert torch.cuda.is_available(), "make gpu-check needs a CUDA device"
    torch.backends.cuda.matmul.allow_tf32 = False


def on_gpu(trainer: Trainer, amp: torch.dtype | None = None, scaled: bool = False) -> Trainer:
    """The same trainer, computing on the GPU."""
    return Trainer(
        trainer.config, trainer.model, trainer.tokenizer, trainer.train_data, trainer.dev_data,
        Device(GPU, amp, scaled), trainer.run, trainer.say,
    )  # fmt: skip


@pytest.mark.parametrize("arch", ["yin-yang", "v2", "cosine", "r4"])
def test_outputs_and_gradients_are_the_cpus(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", arch)
    model = trainer.model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    found: dict[str, list[torch.Tensor]] = {}
    for device in (torch.device("cpu"), GPU):
        model.to(device)
        for task in DEFAULT_TASKS:
            data, rows = trainer.train_data[task], np.arange(13)
            loss = LOSSES[trainer.config.tasks[task].loss](
                model(task, data.batch(rows).to(device)), data.labels(rows).to(device)
            )
            model.zero_grad(set_to_none=True)
            loss.backward()
            grads = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
            found.setdefault(task, []).append(torch.cat([loss.detach().cpu()[None], *(g.flatten() for g in grads)]))
    for task, (cpu, gpu) in found.items():
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-5, msg=task)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SparseAdam"])
def test_optimizers_move_as_on_the_cpu(name: str) -> None:
    weights = {}
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64).to(device)) for size in (7, 300)
        ]
        opt = OPTIMIZERS[name](params, lr=1e-2, weight_decay=0.1)
        for _ in range(20):
            for own in params:
                own.grad = torch.randn(own.shape, generator=generator, dtype=torch.float64).to(device)
            opt.step()
        weights[device] = torch.cat([own.detach().cpu() for own in params])
    torch.testing.assert_close(weights["cuda"], weights["cpu"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--routine", "joint", "--pcgrad"],
        ["--sst_smart", 1, "--sts_bregman", 1],
        ["--lora_mode", "all-lin", "--dora", "--lora_dropout", 0.1],
        ["--pal", "pal", "--average", "ema"],
        ["--fine_tune_mode", "last-layer", "--cache_frozen"],
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_method_trains(tiny_flags: list[str], tmp_path: Path, more: list[object], precision: str) -> None:
    amp = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    trainer = on_gpu(make_trainer(tiny_flags, tmp_path / "run", "--arch", "v2", *more), amp, precision == "fp16")
    before = copied(trainer.model)
    scores = trainer.fit()
    assert 0 < scores["score"] < 1
    assert changed(before, copied(trainer.model))
    assert len(metrics(tmp_path / "run")) == 2


def test_a_step_waits_for_nothing(tiny_flags: list[str], tmp_path: Path) -> None:
    """Between two looks at the loss no step may wait for the device: each such wait is an error here."""
    trainer = on_gpu(make_trainer(tiny_flags, tmp_path / "run", "--fine_tune_mode", "full-model"), torch.bfloat16)
    trainer.model.train()
    steps = [step for task in DEFAULT_TASKS for step in task_batches(trainer.plan, 0, task)]
    for step in steps:
        trainer.train_step(step, False)  # allocations and handles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            trainer.train_step(step, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_script_on_the_gpu(tiny_flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*tiny_flags, "--use_gpu", "--amp", "--run_dir", str(run)]
    multitask_classifier.main(flags)
    multitask_classifier.main(
        ["--evaluate", str(run / "best.pt"), "--data_dir", tiny_flags[tiny_flags.index("--data_dir") + 1], "--use_gpu"]
    )
    assert sorted(os.listdir(run / "best-evaluation")) == ["predictions", "scores.json"]


def test_resuming_on_the_gpu(tiny_flags: list[str], tmp_path: Path) -> None:
    """Dropout's generator on the device goes on as well; sums in another order are allowed for."""
    flags = ["--fine_tune_mode", "full-model", "--epochs", 2]
    whole = on_gpu(make_trainer(tiny_flags, tmp_path / "whole", *flags))
    whole.fit()
    interrupted(on_gpu(make_trainer(tiny_flags, tmp_path / "part", *flags)), 1)
    resumed = on_gpu(make_trainer(tiny_flags, tmp_path / "part", *flags, "--resume"))
    resumed.fit()
    for name, own in copied(whole.model).items():
        torch.testing.assert_close(copied(resumed.model)[name], own, rtol=1e-3, atol=1e-5, msg=name)


def test_each_measured_step_waits_and_has_a_peak_of_its_own() -> None:
    gauge, found = StepGauge(Device(GPU)), []
    for size in (1000, 12_000, 1000):
        gauge.start()
        square = torch.ones(size, size, device=GPU)
        for _ in range(10):
            square = square @ square
        found.append(gauge.stop())
        del square
    assert found[1][0] > found[2][0] and found[1][1] - found[2][1] > 4 * (12_000**2 - 1000**2)


def test_a_profile_counts_the_gpus_time(tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [*tiny_flags, "--use_gpu", "--profile", "--no_tensorboard", "--run_dir", str(tmp_path / "run")]
    multitask_classifier.main(words)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("aten::")]
    shares = [float(words[-1][:-1]) for words in lines if words[-1].endswith("%")]
    assert (tmp_path / "run" / "profile.pt.trace.json.gz").exists() and 0 < shares[0] <= 100
