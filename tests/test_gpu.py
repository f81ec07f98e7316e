"""What only a GPU can show; run by make gpu-check. Numbers are compared with the CPU's."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_bert
from test_packing import packed, ragged_ids
from test_training import changed, copied, interrupted, make_trainer, metrics
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training.health import Scaler

import multitask_classifier
from bert import attention
from kernels import flash_attention as flash
from optimizer import OPTIMIZERS
from tasks import DEFAULT_TASKS
from text.packing import pad_to_bucket
from training.cuda_graphs import GraphedPasses, Recorder
from training.losses import LOSSES
from training.meters import StepGauge
from training.task_sampling import Step, interleave, task_batches
from training.trainer import Trainer
from utils.device import Device

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact() -> None:
    """fp32 products in fp32, and a failure where there is no GPU: a skipped check would pass for a passed one."""
    assert torch.cuda.is_available(), "make gpu-check needs a CUDA device"
    torch.backends.cuda.matmul.allow_tf32 = False


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


@pytest.mark.parametrize("arch", ["v1", "v2"])
def test_padded_tensors_on_the_gpu(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    """The course's interface, for pairs that are compared and pairs that are joined."""
    model = make_trainer(tiny_flags, tmp_path / "run", "--arch", arch).model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7], [2]])).long()
    text, other = (ids, mask), (ids.flip(0), mask.flip(0))
    found = []
    for device in (torch.device("cpu"), GPU):
        model.to(device)
        first, second = ([own.to(device) for own in part] for part in (text, other))
        with torch.no_grad():
            outs = [model.predict_sentiment(*first), model.predict_paraphrase(*first, *second)]
        assert all(own.device.type == device.type for own in outs)
        found.append(torch.cat([own.flatten().cpu() for own in outs]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["yin-yang", "v2"])
def test_a_batch_in_parts_has_the_whole_ones_gradient(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    still = ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0, "--fine_tune_mode", "full-model"]
    still += ["--output_dropout_prob", 0] if arch == "v2" else []
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", arch, *still, device=Device(GPU))
    trainer.model.freeze_for_epoch(trainer.config.train, 0)
    trainer.model.train()
    step, found = Step("para", np.arange(8)), []
    for most in (None, 3):
        trainer.memory.clear_gradients()
        trainer.memory.sizes = {} if most is None else {"para": most}
        loss = trainer.memory.run(step, lambda: trainer.passed(step))[0]
        grads = [own.grad.flatten() for own in trainer.model.parameters() if own.grad is not None]
        found.append(torch.cat([loss.detach()[None], *grads]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-4


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
    device = Device(GPU, amp, scaled=precision == "fp16")
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "v2", *more, device=device)
    before = copied(trainer.model)
    scores = trainer.fit()
    assert 0 < scores["score"] < 1
    assert changed(before, copied(trainer.model))
    assert len(metrics(tmp_path / "run")) == 2


METHODS = [
    ["--optim", "AdamW", "--clip", 1, "--average", "ema"],
    ["--arch", "v2", "--routine", "joint", "--pcgrad"],
    ["--arch", "v1", "--lora_mode", "all-lin", "--dora", "--lora_dropout", 0.1],
    ["--arch", "v1", "--pal", "pal", "--pal_size", 24, "--pal_heads", 2],
    ["--arch", "v1", "--sst_smart", 1, "--sts_bregman", 1],
    ["--arch", "v1", "--sst_loss", "ordinal", "--sts_loss", "mixed", "--sts_embedding_loss", "ranking"],
]


@pytest.mark.parametrize("more", [["--arch", "yin-yang"], *METHODS], ids=lambda more: " ".join(map(str, more)))
def test_a_step_waits_for_nothing(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    """Between two looks at the loss no step may wait for the device: each such wait is an error here."""
    trainer = made_on_gpu(tiny_flags, tmp_path, "--fine_tune_mode", "full-model", *more)
    steps = [step for task in DEFAULT_TASKS for step in task_batches(trainer.plan, 0, task)]
    if trainer.config.train.routine == "joint":
        steps = trainer.steps_of(0)
    run_all(trainer, steps)  # allocations and handles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(trainer, steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


BF16, FP16 = Device(GPU, torch.bfloat16), Device(GPU, torch.float16, scaled=True)


def made_on_gpu(flags: list[str], folder: Path, *more: object, device: Device = BF16) -> Trainer:
    """A trainer in half precision on the GPU, ready for steps."""
    run = folder / f"run-{len(list(folder.iterdir()))}"
    trainer = make_trainer(flags, run, *more, device=device)
    trainer.model.freeze_for_epoch(trainer.config.train, 0)
    trainer.model.train()
    return trainer


def run_all(trainer: Trainer, steps: list[Step]) -> list[torch.Tensor]:
    """Steps in a row as the loop does them; their losses."""
    losses = []
    for number, step in enumerate(steps):
        trainer.set_rates(step.task, number / len(steps))
        losses.append(trainer.train_step(step, False)[0])
        if number + 1 < len(steps):
            trainer.feed.expect(steps[number + 1])
    return losses


# ------------------------------------------------------------------------------------------------------------ attention


def test_flash_attention_works_here() -> None:
    """With the widths of BERT-base and MiniLM; its own trial compares numbers and dropout with the formula."""
    for dtype in (torch.bfloat16, torch.float16):
        for width in (32, 64):
            assert flash.works(GPU, dtype, width)


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_flash_attention_gives_the_numbers_of_padded_groups(
    cls_only: bool, tail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    batch = packed(ragged_ids(rng.integers(1, 90, 64).tolist(), rng))
    batch = (pad_to_bucket(batch) if tail else batch).to(GPU)
    drawn = torch.randn(3, batch.num_tokens, 768, device=GPU, dtype=torch.bfloat16)
    found = []
    for use in (True, False):
        if not use:
            monkeypatch.setattr(flash, "usable", lambda *_: False)
        query, key, value = (own.clone().requires_grad_() for own in drawn)
        asked = query.index_select(0, batch.cu_seqlens[:-1]) if cls_only else query
        out = attention(asked, key, value, batch, 12, 0.0, cls_only)
        out.float().square().sum().backward()
        found.append([out.detach(), query.grad, key.grad, value.grad])
    for own, wanted in zip(*found, strict=True):  # single numbers differ by several roundings of bf16
        assert float((own - wanted).double().norm() / wanted.double().norm()) < 0.01
        torch.testing.assert_close(own, wanted, rtol=0.1, atol=0.2)


def test_flash_attention_drops_the_share_that_it_should() -> None:
    """The mean over many draws is what comes out without dropout, and the spread is that of Bernoulli numbers."""
    rng = np.random.default_rng(1)
    batch = packed(ragged_ids([64] * 32, rng)).to(GPU)
    query, key = torch.zeros(2, batch.num_tokens, 768, device=GPU, dtype=torch.bfloat16)  # every key counts alike
    value = torch.ones_like(query)
    for dropout in (0.1, 0.3):
        drawn = torch.stack([attention(query, key, value, batch, 12, dropout, False) for _ in range(50)]).double()
        assert drawn.mean().item() == pytest.approx(1.0, abs=0.01)
        wanted = (dropout / (1 - dropout) / 64) ** 0.5
        assert drawn[..., ::64].std().item() == pytest.approx(wanted, rel=0.05)


def test_more_tokens_than_the_small_kernel_of_embeddings_takes(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = made_on_gpu(tiny_flags, tmp_path, "--fine_tune_mode", "full-model")
    step = Step("para", np.arange(400) % 20)
    assert trainer.train_data["para"].batch(step.indices).num_tokens > 3072  # type: ignore[union-attr]
    run_all(trainer, [step])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(trainer, [step])
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------------------------------------------- graphs

STILL = ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0, "--fine_tune_mode", "full-model"]
GRAPHS = ["--use_gpu", "--amp", "--cuda_graphs"]


def graphed(trainer: Trainer) -> GraphedPasses:
    assert isinstance(trainer.passes, GraphedPasses)
    return trainer.passes


@pytest.fixture
def tiny_flags_for_graphs(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same with heads of a width that the kernel takes."""
    flags = list(tiny_flags)
    flags[flags.index("--pretrained") + 1] = str(make_bert(tmp_path_factory.mktemp("bert"), hidden_size=64))
    return flags


def make_graphed(flags: list[str], folder: Path, *more: object, device: Device = BF16) -> Trainer:
    """A trainer that replays, ready for steps."""
    return made_on_gpu(flags, folder, *GRAPHS, *more, device=device)


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
def test_replayed_steps_are_the_eager_ones(
    tiny_flags_for_graphs: list[str], sample: Path, tmp_path: Path, more: list[object]
) -> None:
    """200 steps of mixed lengths with changing rates and evaluations in between; as near as two eager runs are."""
    flags = [*tiny_flags_for_graphs, "--data_dir", sample, "--lr", 1e-4, "--lr_schedule", "linear", *STILL, *more]
    runs = []
    for make in (made_on_gpu, made_on_gpu, make_graphed):
        trainer = make([str(flag) for flag in flags], tmp_path)
        start = copied(trainer.model)
        steps = [step for epoch in range(2) for step in interleave(trainer.plan, epoch)][:200]
        losses = []
        for i in range(0, len(steps), 50):
            losses += run_all(trainer, steps[i : i + 50])
            with trainer.average.applied():
                trainer.evaluate(["sst"])
        moved = torch.cat([(own - start[name]).flatten().double() for name, own in copied(trainer.model).items()])
        runs.append((torch.stack(losses), moved))
    passes = graphed(trainer)
    assert passes.counts["replayed"] > 150, passes.counts
    (first, moved), (second, again), (replayed, by_graphs) = runs
    torch.testing.assert_close(replayed, first, rtol=0, atol=5 * float((first - second).abs().max()) + 0.02)
    noise = float((moved - again).norm() / moved.norm())
    assert float((moved - by_graphs).norm() / moved.norm()) < 3 * noise + 0.02


def test_replays_draw_other_dropout_masks(tiny_flags_for_graphs: list[str], tmp_path: Path) -> None:
    trainer = make_graphed(tiny_flags_for_graphs, tmp_path, "--arch", "v1", "--fine_tune_mode", "full-model")
    step, passes = Step("sst", np.arange(8)), graphed(trainer)
    found = []
    for _ in range(8):
        batch, labels = trainer.feed.take(step)
        found.append(trainer.passes(step, batch, labels)[1])
        trainer.model.zero_grad(set_to_none=True)
    assert passes.counts == {"of a rare shape": 2, "replayed": 6}
    assert len({tuple(own.flatten().tolist()) for own in found}) == 8


def test_training_by_graphs_to_the_end(tiny_flags_for_graphs: list[str], tmp_path: Path) -> None:
    """Through the script, iterative unfreezing included; lines say how many passes were replayed."""
    run = tmp_path / "run"
    flags = [*tiny_flags_for_graphs, *map(str, GRAPHS), "--epochs", "5", "--run_dir", str(run), "--batch_size", "4"]
    multitask_classifier.main(flags)
    assert (run / "scores.json").is_file()


def test_graphs_of_a_joint_step(tiny_flags_for_graphs: list[str], tmp_path: Path) -> None:
    for more in ([], ["--pcgrad"]):
        flags = [*STILL, "--arch", "v1", "--routine", "joint", "--optim", "SGD", *more]
        eager = made_on_gpu(tiny_flags_for_graphs, tmp_path, *flags)
        replayed = make_graphed(tiny_flags_for_graphs, tmp_path, *flags)
        steps = eager.steps_of(0) * 6
        torch.testing.assert_close(
            torch.stack(run_all(replayed, steps)), torch.stack(run_all(eager, steps)), rtol=0.02, atol=0.02
        )
        assert graphed(replayed).counts["replayed"] > 10


def test_graphs_of_losses_that_are_scaled(tiny_flags_for_graphs: list[str], tmp_path: Path) -> None:
    """In fp16 a recording reads the scale as it is at each replay."""
    flags, found = [*STILL, "--arch", "v1", "--optim", "SGD", "--clip", 0.1], []
    for make in (made_on_gpu, make_graphed):
        trainer = make(tiny_flags_for_graphs, tmp_path, *flags, device=FP16)
        trainer.scaler = Scaler("cuda", init_scale=8.0, growth_interval=6)
        start, steps = copied(trainer.model), [Step("sst", np.arange(8)), Step("sts", np.arange(8))] * 15
        losses = torch.stack(run_all(trainer, steps))
        moved = [(own - start[name]).flatten().double() for name, own in copied(trainer.model).items()]
        found.append((losses, torch.cat(moved)))
        assert trainer.scaler.get_scale() == 8 * 2**5 and trainer.scaler.skipped == 0
    assert graphed(trainer).counts["replayed"] == 26
    (eager, moved), (replayed, by_graphs) = found
    torch.testing.assert_close(replayed, eager, rtol=0.02, atol=0.02)
    assert float((moved - by_graphs).norm() / moved.norm()) < 0.05


def test_gradients_that_wait_are_not_written_over(tiny_flags_for_graphs: list[str], tmp_path: Path) -> None:
    """Recordings share memory, and are replayed here in the opposite order."""
    flags, found = [*STILL, "--arch", "v1", "--routine", "joint", "--optim", "SGD"], []
    for make in (made_on_gpu, make_graphed):
        trainer = make(tiny_flags_for_graphs, tmp_path, *flags)

        def add_gradient(step: Step, trainer: Trainer = trainer) -> None:
            trainer.memory.run(step, lambda: trainer.passed(step))

        for task in DEFAULT_TASKS:
            for _ in range(4):
                trainer.memory.clear_gradients()
                add_gradient(Step(task, np.arange(8)))
        trainer.memory.clear_gradients()
        for task in reversed(list(DEFAULT_TASKS)):
            add_gradient(Step(task, np.arange(8), moves=task == "sst"))
        found.append(torch.cat([own.grad.flatten() for own in trainer.model.parameters() if own.grad is not None]))
    assert graphed(trainer).counts["replayed"] == 3 * len(DEFAULT_TASKS)  # two and one each
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.05


def test_a_capture_that_fails_leaves_the_stream_as_it_was() -> None:
    recorder, stream = Recorder(GPU), torch.cuda.current_stream()
    number = torch.zeros(3, device=GPU)

    def fails() -> Any:
        return number.sum().item()

    with pytest.raises(RuntimeError):
        recorder(fails)
    assert torch.cuda.current_stream() == stream
    torch.nn.functional.dropout(number, 0.5)  # the generator too
    recorder.renew()
    out, replay = recorder(lambda: number + 1)  # type: ignore[arg-type,return-value]
    number.fill_(5)
    replay()
    assert torch.as_tensor(out).tolist() == [6, 6, 6]


def test_a_shard_without_examples(tiny_flags_for_graphs: list[str], tmp_path: Path) -> None:
    trainer = made_on_gpu(tiny_flags_for_graphs, tmp_path, "--arch", "v1", "--fine_tune_mode", "full-model")
    for task in DEFAULT_TASKS:
        batch = trainer.train_data[task].batch(np.arange(0)).to(GPU)
        with torch.autocast("cuda", torch.bfloat16):
            embedding = trainer.model.embed(task, batch)
        assert len(embedding) == 0
        embedding.float().sum().backward()


# ------------------------------------------------------------------------------------------------------------ optimizer


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
    assert kernels.seen[fused] == 3 and not any("foreach" in own for own in kernels.seen)


def test_the_script_on_the_gpu(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*tiny_flags, "--use_gpu", "--amp", "--run_dir", str(run)]
    multitask_classifier.main(flags)
    multitask_classifier.main(["--evaluate", str(run / "best.pt"), "--data_dir", str(small_data), "--use_gpu"])
    assert sorted(os.listdir(run / "best-evaluation")) == ["predictions", "scores.json"]


def test_resuming_on_the_gpu(tiny_flags: list[str], tmp_path: Path) -> None:
    """Dropout's generator on the device goes on as well; sums in another order are allowed for."""
    flags = ["--fine_tune_mode", "full-model", "--epochs", 2]
    whole = make_trainer(tiny_flags, tmp_path / "whole", *flags, device=Device(GPU))
    whole.fit()
    interrupted(make_trainer(tiny_flags, tmp_path / "part", *flags, device=Device(GPU)), 1)
    resumed = make_trainer(tiny_flags, tmp_path / "part", *flags, "--resume", device=Device(GPU))
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
