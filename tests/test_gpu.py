"""What only a GPU can show; run by make gpu-check. Numbers are compared with the CPU's."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    changed,
    copied,
    interrupted,
    load_batch,
    make_bert,
    make_ready,
    make_trainer,
    metrics,
    packed,
    ragged_ids,
    step_of,
    steps_of,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import multitask_classifier
from bert import BertLayer, attention
from kernels import adamax, varlen_attention
from optimizer import OPTIMIZERS
from tasks import DEFAULT_TASKS
from text.packing import pad_to_bucket
from training.cuda_graphs import Capturer, CudaGraphRunner
from training.meters import SyncedStepTimer
from training.optimizers import Scaler
from training.task_sampling import Step, interleave
from training.trainer import Trainer
from utils.device import Device

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
FP32, BF16 = Device(GPU), Device(GPU, torch.bfloat16)
FP16 = Device(GPU, torch.float16, scaled=True)
STILL = ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0]


@pytest.fixture(autouse=True)
def exact() -> None:
    """fp32 products in fp32, and a failure where there is no GPU: a skipped check would pass for a passed one."""
    assert torch.cuda.is_available(), "make gpu-check needs a CUDA device"
    torch.backends.cuda.matmul.allow_tf32 = False


def run_steps(trainer: Trainer, steps: list[Step]) -> list[Tensor]:
    """Make steps in a row as the loop does; return their losses."""
    trainer.loader.begin_epoch(steps, 0, trainer.progress.batches)
    losses = []
    for number, step in enumerate(steps):
        trainer.optimizers.set_rates(trainer.optimizers.for_step(step), number / len(steps))
        losses += [batch.loss for batch in trainer.train_step(step).batches]
        trainer.progress.batches += len(step.batches)
    return losses


def run_without_waiting(trainer: Trainer, steps: list[Step]) -> None:
    """Make steps twice; the second time each wait for the device is an error."""
    run_steps(trainer, steps)  # allocations and handles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_steps(trainer, steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("arch", ["yin-yang", "v2", "cosine", "r4"])
def test_outputs_and_gradients_are_the_cpus(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    """Whole batches and, on the GPU, parts of them too."""
    found: dict[str, list[Tensor]] = {}
    still = [*STILL, "--output_dropout_prob", 0] if arch in ("v2", "r4") else STILL
    for name, more, device in (("cpu", [], None), ("gpu", [], FP32), ("parts", ["--micro_batch_size", 5], FP32)):
        trainer = make_ready(tiny_flags, tmp_path / name, "--arch", arch, *still, *more, device=device)
        for task in DEFAULT_TASKS:
            loss, _ = trainer.forward_backward(load_batch(trainer, task, range(13)), 1.0)
            gradients = [p.grad.cpu().flatten() for p in trainer.model.parameters() if p.grad is not None]
            found.setdefault(task, []).append(torch.cat([loss.cpu()[None], *gradients]))
            trainer.model.zero_grad(set_to_none=True)
    for task, (cpu, gpu, parts) in found.items():
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-5, msg=task)
        torch.testing.assert_close(parts, cpu, rtol=1e-3, atol=1e-4, msg=task)


@pytest.mark.parametrize("arch", ["v1", "v2"])
def test_padded_tensors_on_the_gpu(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    """The course's interface, for pairs that are compared and pairs that are joined."""
    model = make_trainer(tiny_flags, tmp_path / "run", "--arch", arch).model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7], [2]])).long()
    found = []
    for device in (torch.device("cpu"), GPU):
        model.to(device)
        first = ids.to(device), mask.to(device)
        second = first[0].flip(0), first[1].flip(0)
        with torch.no_grad():
            outputs = [model.predict_sentiment(*first), model.predict_paraphrase(*first, *second)]
        assert all(output.device.type == device.type for output in outputs)
        found.append(torch.cat([output.flatten().cpu() for output in outputs]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--routine", "joint", "--pcgrad"],
        ["--sst_smart", 1, "--sts_bregman", 1, "--micro_batch_size", 3],
        ["--lora_mode", "all-lin", "--dora", "--lora_dropout", 0.1],
        ["--pal", "pal", "--average", "ema"],
        ["--fine_tune_mode", "last-layer", "--cache_frozen"],
        ["--mlm"],
    ],
)
@pytest.mark.parametrize("device", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_every_method_trains(tiny_flags: list[str], tmp_path: Path, more: list[object], device: Device) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "v2", *more, device=device)
    before = copied(trainer.model)
    scores = trainer.fit()
    assert "--mlm" in more or 0 < scores["score"] < 1
    assert changed(before, copied(trainer.model))
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize("compiled", [[], ["--compile"]], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "more",
    [
        ["--lora_mode", "attn", "--lora_rank", 2, "--lora_alpha", 8],
        ["--lora_mode", "all-lin-only", "--lora_rank", 3, "--dora"],
        ["--lora_mode", "attn-only", "--lora_targets", "query,value"],
        ["--lora_mode", "attn-only", "--dora", "--dora_norm", "column"],
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_adapters_in_half_precision(
    tiny_flags: list[str], tmp_path: Path, more: list[object], compiled: list[object]
) -> None:
    """Gradients of whole batches point where those in fp32 do."""
    found = []
    for name, device, flags in (("fp32", FP32, []), ("bf16", BF16, compiled)):
        trainer = make_ready(tiny_flags, tmp_path / name, "--arch", "v1", *STILL, *more, *flags, device=device)
        for key, parameter in trainer.model.named_parameters():
            if key.endswith("lora_B"):
                nn.init.constant_(parameter, 0.02)
        trainer.forward_backward(load_batch(trainer, "sts", range(13)), 1.0)
        found.append({key: p.grad for key, p in trainer.model.named_parameters() if p.grad is not None})
    exact, half = found
    assert exact.keys() == half.keys()
    scale = max(gradient.abs().max() for gradient in exact.values())
    for key, gradient in exact.items():
        assert (half[key] - gradient).abs().max() < 0.02 * scale, key


@pytest.mark.parametrize(
    "more",
    [
        ["--arch", "yin-yang"],
        ["--optim", "AdamW", "--clip", 1, "--average", "ema"],
        ["--arch", "v2", "--routine", "joint", "--pcgrad"],
        ["--arch", "v1", "--lora_mode", "all-lin", "--dora", "--lora_dropout", 0.1],
        ["--arch", "v1", "--pal", "pal", "--pal_size", 24, "--pal_heads", 2],
        ["--arch", "v1", "--sst_smart", 1, "--sts_bregman", 1],
        ["--arch", "v1", "--sst_loss", "ordinal", "--sts_loss", "mixed", "--sts_embedding_loss", "ranking"],
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_a_step_waits_for_nothing(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    """Between two looks at the loss no step may wait for the device."""
    trainer = make_ready(tiny_flags, tmp_path / "run", *more, device=BF16)
    run_without_waiting(trainer, steps_of(trainer))


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the device, as an Apple GPU does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        wide = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.dtype == torch.float64]
        assert all(x.device.type == "cpu" for x in wide), f"{func} makes float64"
        return out


def test_a_run_without_float64_on_the_device(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--sst_smart", 1, "--clip", 1, device=FP32)
    with NoFloat64():
        assert trainer.fit()["score"] > 0


def test_resuming_on_the_gpu(tiny_flags: list[str], tmp_path: Path) -> None:
    """Dropout's generator on the device goes on as well; sums in another order are allowed for."""
    flags = ["--fine_tune_mode", "full-model", "--epochs", 2]
    whole = make_trainer(tiny_flags, tmp_path / "whole", *flags, device=FP32)
    whole.fit()
    interrupted(make_trainer(tiny_flags, tmp_path / "part", *flags, device=FP32), 1)
    resumed = make_trainer(tiny_flags, tmp_path / "part", *flags, "--resume", device=FP32)
    resumed.fit()
    for name, tensor in copied(whole.model).items():
        torch.testing.assert_close(copied(resumed.model)[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_the_script_on_the_gpu(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    multitask_classifier.main([*tiny_flags, "--use_gpu", "--amp", "--run_dir", str(run)])
    multitask_classifier.main(["--evaluate", str(run / "best.pt"), "--data_dir", str(small_data), "--use_gpu"])
    assert sorted(os.listdir(run / "best-evaluation")) == ["predictions", "scores.json"]


def test_each_measured_step_waits_and_has_its_own_peak() -> None:
    timer, found = SyncedStepTimer(FP32), []
    for size in (1000, 12_000, 1000):
        timer.start()
        square = torch.ones(size, size, device=GPU)
        for _ in range(10):
            square = square @ square
        found.append(timer.stop())
        del square
    assert found[1][0] > found[2][0] and found[1][1] - found[2][1] > 4 * (12_000**2 - 1000**2)


def test_a_profile_counts_the_gpus_time(tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [*tiny_flags, "--use_gpu", "--profile", "--no_tensorboard", "--run_dir", str(tmp_path / "run")]
    multitask_classifier.main(words)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("aten::")]
    shares = [float(words[-1][:-1]) for words in lines if words[-1].endswith("%")]
    assert (tmp_path / "run" / "profile.pt.trace.json.gz").exists() and 0 < shares[0] <= 100


TYPES = {"flash": [torch.bfloat16, torch.float16], "memory-efficient": [torch.bfloat16, torch.float16, torch.float32]}


@pytest.mark.parametrize("kernel", TYPES)
def test_the_kernels_of_attention_work_here(kernel: str) -> None:
    """With the widths of BERT-base and MiniLM; their own trial compares numbers and dropout with the formula."""
    for dtype in TYPES[kernel]:
        for width in (32, 64):
            assert varlen_attention.works(kernel, GPU, dtype, width)


@pytest.mark.parametrize("kernel", TYPES)
@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_the_kernels_give_the_numbers_of_padded_groups(
    cls_only: bool, tail: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    batch = packed(ragged_ids(rng.integers(1, 90, 64).tolist(), rng))
    batch = (pad_to_bucket(batch) if tail else batch).to(GPU)
    drawn = torch.randn(3, batch.num_tokens, 768, device=GPU, dtype=torch.bfloat16)
    found = []
    for use in (kernel, None):
        monkeypatch.setattr(varlen_attention, "choose_kernel", lambda *_, use=use: use)
        query, key, value = (tensor.clone().requires_grad_() for tensor in drawn)
        asked = query.index_select(0, batch.cu_seqlens[:-1]) if cls_only else query
        out = attention(asked, key, value, batch, 12, 0.0, cls_only)
        out.float().square().sum().backward()
        found.append([out.detach(), query.grad, key.grad, value.grad])
    for tensor, wanted in zip(*found, strict=True):  # single numbers differ by several roundings of bf16
        assert float((tensor - wanted).double().norm() / wanted.double().norm()) < 0.01
        torch.testing.assert_close(tensor, wanted, rtol=0.1, atol=0.2)


def test_varlen_attention_drops_the_share_that_it_should() -> None:
    """The mean over many draws is what comes out without dropout, and the spread is that of Bernoulli numbers."""
    batch = packed(ragged_ids([64] * 32, np.random.default_rng(1))).to(GPU)
    query, key = torch.zeros(2, batch.num_tokens, 768, device=GPU, dtype=torch.bfloat16)  # every key counts alike
    value = torch.ones_like(query)
    for dropout in (0.1, 0.3):
        drawn = torch.stack([attention(query, key, value, batch, 12, dropout, False) for _ in range(50)]).double()
        assert drawn.mean().item() == pytest.approx(1.0, abs=0.01)
        wanted = (dropout / (1 - dropout) / 64) ** 0.5
        assert drawn[..., ::64].std().item() == pytest.approx(wanted, rel=0.05)


def test_more_tokens_than_the_small_kernel_of_embeddings_takes(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_ready(tiny_flags, tmp_path / "run", device=BF16)
    step = step_of("para", np.arange(400) % 20)
    assert load_batch(trainer, "para", step.batches[0].indices).inputs.num_tokens > 3072  # type: ignore[union-attr]
    run_without_waiting(trainer, [step])


def test_a_shard_without_examples(tiny_flags: list[str], tmp_path: Path) -> None:
    bert = make_bert(tmp_path / "bert", hidden_size=64)
    trainer = make_ready(tiny_flags, tmp_path / "run", "--arch", "v1", "--pretrained", bert, device=BF16)
    for task in DEFAULT_TASKS:
        inputs = trainer.loader.train[task].batch(np.arange(0)).to(GPU)
        with torch.autocast("cuda", torch.bfloat16):
            embedding = trainer.model.embed(task, inputs)
        assert len(embedding) == 0
        embedding.float().sum().backward()


Maker = Callable[..., Trainer]


@pytest.fixture
def make(tiny_flags: list[str], tmp_path: Path) -> Maker:
    """Makes trainers whose heads have a width that the kernel takes; with graphs if `graphs`."""
    bert, runs = make_bert(tmp_path / "bert", hidden_size=64), iter(range(9))

    def make_one(*more: object, graphs: bool = False, device: Device = BF16) -> Trainer:
        flags = ["--pretrained", bert, *["--use_gpu", "--amp", "--cuda_graphs"][: 3 * graphs], *more]
        return make_ready(tiny_flags, tmp_path / str(next(runs)), *flags, device=device)

    return make_one


def test_one_product_for_query_key_and_value_gives_their_numbers(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it, all parameters of a layer are cast at once."""
    trainer, found = make(*STILL, "--arch", "v1"), []
    for _ in range(2):
        loss, outputs = trainer.forward_backward(load_batch(trainer, "para", range(8)), 1.0)
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        found.append((outputs, torch.cat(gradients)))
        trainer.model.zero_grad(set_to_none=True)
        monkeypatch.setattr(BertLayer, "half_parameters", lambda *_: [None] * 4)
    (outputs, gradient), (wanted, wanted_gradient) = found
    torch.testing.assert_close(outputs, wanted, rtol=0.02, atol=0.02)
    assert float((gradient - wanted_gradient).norm() / wanted_gradient.norm()) < 0.02


def graphs_of(trainer: Trainer) -> CudaGraphRunner:
    assert trainer.cuda_graphs is not None
    return trainer.cuda_graphs


@pytest.mark.parametrize(
    "more",
    [
        ["--arch", "yin-yang", "--optim", "SGD"],
        ["--arch", "v1", "--optim", "AdamW"],
        ["--arch", "v1", "--optim", "SGD", "--lora_mode", "all-lin", "--dora"],
        ["--arch", "v2", "--optim", "SGD", "--average", "ema", "--clip", 1],
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_replayed_steps_are_the_eager_ones(make: Maker, sample: Path, more: list[object]) -> None:
    """200 steps of mixed lengths with changing rates and evaluations in between; as near as two eager runs are.

    The second eager run has the graphs' padded batches, since padding alone changes the rounding.
    """
    flags, runs = ["--data_dir", sample, "--lr", 1e-4, "--lr_schedule", "linear", *STILL, *more], []
    for padded, graphs in ((False, False), (True, False), (True, True)):
        trainer = make(*flags, graphs=padded)
        if not graphs:
            trainer.cuda_graphs = None
        start = copied(trainer.model)
        steps = [step for epoch in range(2) for step in interleave(trainer.plan, epoch)][:200]
        losses = []
        for i in range(0, len(steps), 50):
            losses += run_steps(trainer, steps[i : i + 50])
            with trainer.evaluation_weights():
                trainer.evaluate(["sst"])
        moved = torch.cat([(tensor - start[name]).flatten().double() for name, tensor in copied(trainer.model).items()])
        runs.append((torch.stack(losses), moved))
    assert graphs_of(trainer).counts["replayed"] > 150, graphs_of(trainer).counts
    (first, moved), (second, again), (replayed, by_graphs) = runs
    torch.testing.assert_close(replayed, second, rtol=0, atol=5 * float((first - second).abs().max()) + 0.02)
    noise = float((moved - again).norm() / moved.norm())
    assert float((again - by_graphs).norm() / moved.norm()) < 3 * noise + 0.02


def test_replays_draw_other_dropout_masks(make: Maker) -> None:
    trainer, found = make("--arch", "v1", graphs=True), set()
    for _ in range(8):
        _, outputs = trainer.run_batch(load_batch(trainer, "sst", range(8)), 1, last=True)
        found.add(tuple(outputs.flatten().tolist()))
        trainer.model.zero_grad(set_to_none=True)
    assert graphs_of(trainer).counts == {"of a rare shape": 2, "replayed": 6} and len(found) == 8


def test_training_by_graphs_to_the_end(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    """Iterative unfreezing included; lines say how many passes were replayed."""
    trainer = make("--fine_tune_mode", "iterative", "--epochs", 5, "--batch_size", 4, graphs=True)
    trainer.fit()
    assert capsys.readouterr().out.count(" passes replayed from ") == 5


def test_graphs_of_a_joint_step(make: Maker) -> None:
    for more in ([], ["--pcgrad"]):
        # at a rate that does not multiply the rounding errors of half precision
        flags = [*STILL, "--arch", "v1", "--routine", "joint", "--optim", "SGD", "--lr", 3e-4, *more]
        eager, replayed = make(*flags), make(*flags, graphs=True)
        losses = [torch.stack(run_steps(trainer, steps_of(eager) * 6)) for trainer in (eager, replayed)]
        torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)
        assert graphs_of(replayed).counts["replayed"] > 10


def test_graphs_of_losses_that_are_scaled(make: Maker) -> None:
    """In fp16 a graph reads the scale as it is at each replay."""
    found = []
    for graphs in (False, True):
        trainer = make(*STILL, "--arch", "v1", "--optim", "SGD", "--clip", 0.1, graphs=graphs, device=FP16)
        trainer.optimizers.scaler = scaler = Scaler("cuda", init_scale=8.0, growth_interval=6)
        start = copied(trainer.model)
        losses = torch.stack(run_steps(trainer, [step_of("sst", range(8)), step_of("sts", range(8))] * 15))
        moved = [(tensor - start[name]).flatten().double() for name, tensor in copied(trainer.model).items()]
        found.append((losses, torch.cat(moved)))
        assert scaler.get_scale() == 8 * 2**5 and scaler.skipped == 0
    assert graphs_of(trainer).counts["replayed"] == 26
    (eager, moved), (replayed, by_graphs) = found
    torch.testing.assert_close(replayed, eager, rtol=0.02, atol=0.02)
    assert float((moved - by_graphs).norm() / moved.norm()) < 0.05


def test_gradients_that_wait_are_not_written_over(make: Maker) -> None:
    """Graphs share memory, and are replayed here in the opposite order."""
    found = []
    for graphs in (False, True):
        trainer = make(*STILL, "--arch", "v1", "--routine", "joint", "--optim", "SGD", graphs=graphs)
        batches = {task: load_batch(trainer, task, range(8)) for task in DEFAULT_TASKS}
        for batch in batches.values():
            for _ in range(4):
                trainer.model.zero_grad(set_to_none=True)
                trainer.run_batch(batch, 3, last=False)
        trainer.model.zero_grad(set_to_none=True)
        for task in reversed(list(batches)):
            trainer.run_batch(batches[task], 3, last=task == "sst")
        found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert graphs_of(trainer).counts["replayed"] == 3 * len(DEFAULT_TASKS)  # two and one each
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.05


def test_a_capture_that_fails_leaves_the_stream_as_it_was() -> None:
    capturer, stream = Capturer(GPU), torch.cuda.current_stream()
    number = torch.zeros(3, device=GPU)

    def fails() -> Any:
        return number.sum().item()

    with pytest.raises(RuntimeError):
        capturer(fails)
    assert torch.cuda.current_stream() == stream
    torch.nn.functional.dropout(number, 0.5)  # the generator too
    capturer.renew()
    out, replay = capturer(lambda: number + 1)  # type: ignore[arg-type,return-value]
    number.fill_(5)
    replay()
    assert torch.as_tensor(out).tolist() == [6, 6, 6]


def test_steps_after_a_failed_capture_leak_nothing(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    """CUDA makes a capture invalid that waits; the first cause is named."""
    trainer = make("--arch", "v1", graphs=True)
    runner, compute, taken = graphs_of(trainer), trainer.forward_backward, []

    def waits(*args: Any) -> Any:
        loss, outputs = compute(*args)
        loss.item()
        return loss, outputs

    runner.compute = waits
    steps = [step_of("sst", range(8))] * 3
    for _ in range(4):
        run_steps(trainer, steps)
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_allocated())
    assert runner.counts == {"of a rare shape": 2, "that could not be captured": 10}
    assert "previous error" not in capsys.readouterr().out and taken[1] == taken[2] == taken[3]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SparseAdam"])
def test_optimizers_move_as_on_the_cpu(name: str) -> None:
    weights = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)

        def draw(size: int, device: str = device, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(device)

        parameters = [nn.Parameter(draw(size)) for size in (7, 300)]
        optimizer = OPTIMIZERS[name](parameters, lr=1e-2, weight_decay=0.1)
        for _ in range(20):
            for parameter in parameters:
                parameter.grad = draw(len(parameter))
            optimizer.step()
        weights.append(torch.cat([parameter.detach().cpu() for parameter in parameters]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_the_optimizer_is_one_kernel_whatever_the_rate(name: str) -> None:
    class Kernels(TorchDispatchMode):
        seen: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen[func.__name__] += 1
            return func(*args, **(kwargs or {}))

    parameter = nn.Parameter(torch.randn(1000, device=GPU))
    optimizer = OPTIMIZERS[name]([parameter], lr=1e-3, weight_decay=0.1)
    with Kernels() as kernels:
        for rate in (1e-3, 5e-4, 2e-4):
            optimizer.param_groups[0]["lr"] = rate
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    fused = {"AdamW": "_fused_adamw_.default", "Adam": "_fused_adam_.default"}[name]
    assert kernels.seen[fused] == 3 and not any("foreach" in kernel for kernel in kernels.seen)


def test_adamax_is_one_kernel_and_moves_as_on_the_cpu() -> None:
    pytest.importorskip("triton")
    assert adamax.works(GPU)
    found = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(size, generator=generator).to(device)) for size in (7, 300_000)]
        optimizer = OPTIMIZERS["Adamax"](parameters, lr=1e-2, weight_decay=0.1)
        for _ in range(20):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
        found.append(torch.cat([parameter.detach().cpu() for parameter in parameters]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
