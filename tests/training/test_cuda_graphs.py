"""--cuda_graphs without a GPU: graphs that do their work again by Python, into memory that stays where it is."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import State, copied, load_batch, make_ready, make_trainer, refusal, step_of
from torch import Tensor

import multitask_classifier
import training.cuda_graphs
from kernels import varlen_attention
from tasks import DEFAULT_TASKS
from training.cuda_graphs import GRAPHS, USES, Captured, CudaGraphRunner, make_cuda_graph_runner
from training.task_sampling import task_batches
from training.trainer import Trainer
from utils.device import Device

FLAGS = ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0, "--arch", "v1", "--sts_loss", "pearson"]


@pytest.fixture(autouse=True)
def attention_by_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attention read where sequences begin from the batch itself, as the kernel on a GPU does."""

    def attend(_: str, query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts: Tensor, *__: Any) -> Tensor:
        outputs = []
        for i in range(len(starts) - 1):
            q = query[starts_q[i] : starts_q[i + 1]].transpose(0, 1)  # [heads, L, width]
            k, v = (rows[starts[i] : starts[i + 1]].transpose(0, 1) for rows in (key, value))
            outputs.append(((q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(dim=2) @ v).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(varlen_attention, "choose_kernel", lambda *_: "flash")
    monkeypatch.setattr(varlen_attention, "attend", attend)


class PythonCapturer:
    """What a CUDA graph does, by Python: nothing happens at its capture, and each replay writes to the same memory.

    That memory is one pool: a replay may write to all that other graphs have there, and here it does.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.model, self.captured, self.pools = trainer.model, 0, 1
        self.pool: list[Tensor] = []

    def renew(self) -> None:
        self.pools += 1
        self.pool = []

    def __call__(self, function: Callable[[], Captured]) -> tuple[Captured, Callable[[], None]]:
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        fixed = function()
        for buffer, before in buffers:
            buffer.copy_(before)
        self.captured += 1
        pool = self.pool
        pool += [fixed[0], fixed[1], *(gradient for _, gradient in fixed[2])]
        for tensor in pool:
            tensor.fill_(torch.nan)  # what is not written again is seen

        def replay() -> None:
            kept = [parameter.grad for parameter in self.model.parameters()]
            self.model.zero_grad(set_to_none=True)
            for tensor in pool:
                tensor.fill_(torch.nan)
            loss, outputs, gradients = function()
            fixed[0].copy_(loss)
            fixed[1].copy_(outputs)
            for (_, into), (_, new) in zip(fixed[2], gradients, strict=True):
                into.copy_(new)
            for parameter, gradient in zip(self.model.parameters(), kept, strict=True):
                parameter.grad = gradient

        return fixed, replay


def capture_all(
    trainer: Trainer, refusals: dict[str, str] | None = None, say: Callable[[str], None] = print
) -> CudaGraphRunner:
    """Let a trainer go by graphs."""
    capturer: Any = PythonCapturer(trainer)
    runner = CudaGraphRunner(trainer.forward_backward, trainer.model, capturer, refusals or {}, say)
    trainer.cuda_graphs, trainer.loader.few_shapes = runner, True
    return runner


def assert_near(found: State, wanted: State) -> None:
    for name, tensor in wanted.items():
        scale = max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize(
    "more",
    [
        ["--arch", "yin-yang", "--routine", "interleave", "--optim", "SGD", "--average", "ema", "--ema_decay", 0.9],
        ["--fine_tune_mode", "iterative", "--epochs", 5, "--optim", "SGD"],  # what trains changes
        ["--routine", "joint", "--optim", "AdamW"],
        ["--arch", "v2", "--routine", "joint", "--pcgrad", "--optim", "AdamW", "--clip", 0.5],
        ["--lora_mode", "all-lin", "--dora", "--optim", "AdamW"],
    ],
    ids=str,
)
def test_replayed_training_is_the_same(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[object]
) -> None:
    """Mixed lengths, several epochs with an evaluation after each, other rates in each step."""
    flags = [*FLAGS, "--fine_tune_mode", "full-model", "--lr_schedule", "linear", "--epochs", 3, "--lr", 1e-4]
    flags += ["--batch_size", 4, *more]
    plain, replayed = (make_trainer(tiny_flags, tmp_path / name, *flags) for name in ("plain", "replayed"))
    capture_all(replayed)
    scores = plain.fit(), replayed.fit()
    assert scores[0]["score"] == pytest.approx(scores[1]["score"], abs=1e-3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--cuda_graphs: ")]
    counts: Counter[str] = Counter()
    for line in lines:
        first, *others = line.removeprefix("--cuda_graphs: ").split(", ")
        counts["replayed"] += int(first.split()[0])
        counts.update({other.partition(" ")[2]: int(other.split()[0]) for other in others})
    assert counts["replayed"] > 5 and counts.total() == replayed.progress.batches
    assert set(counts) == {"replayed", "of a rare shape"} and len(lines) == replayed.config.train.epochs
    assert_near(copied(replayed.model), copied(plain.model))


def test_a_pass_is_captured_at_its_third_use_and_kept_over_evaluations(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_ready(tiny_flags, tmp_path / "run", *FLAGS, "--average", "ema")
    runner = capture_all(trainer)
    for number in range(6):
        (result,) = trainer.train_step(step_of("sst", range(8))).batches
        assert result.outputs.isfinite().all() and len(runner.graphs) == (number + 1 >= USES)
    kept = result.outputs.clone()
    with trainer.evaluation_weights():
        trainer.evaluate(["sst"])
    trainer.train_step(step_of("sst", range(8)))
    assert torch.equal(result.outputs, kept)  # a copy, not the graph's memory
    assert runner.capturer.captured == 1  # type: ignore[attr-defined]
    assert runner.report() == "--cuda_graphs: 5 passes replayed from 1 graphs, 2 of a rare shape"
    assert runner.report() == "--cuda_graphs: 0 passes replayed from 1 graphs"


def test_what_a_graph_holds_for(tiny_flags: list[str], tmp_path: Path) -> None:
    """Tasks, shapes and scales have graphs of their own; all end with a change of what trains, or where it is."""
    trainer = make_ready(tiny_flags, tmp_path / "run", *FLAGS)
    runner = capture_all(trainer)
    batches = [load_batch(trainer, task, range(8)) for task in DEFAULT_TASKS]
    batches += [load_batch(trainer, "sst", range(5))]
    keys = {runner.key(batch, 1.0) for batch in batches} | {runner.key(batches[0], 1 / 3)}
    assert len(keys) == 5
    assert runner.key(load_batch(trainer, "sst", range(7, -1, -1)), 1.0) in keys
    weight = next(trainer.model.parameters())
    for change in (
        lambda: trainer.model.eval(),
        lambda: trainer.model.manage_freezing("freezeall"),
        lambda: setattr(weight, "data", weight.data.clone()),
    ):
        runner.graphs["old"] = None  # type: ignore[assignment]
        change()
        runner.key(batches[0], 1.0)
        assert not runner.graphs


def test_what_cannot_be_captured_runs_without_and_says_so_once(tiny_flags: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    trainer = make_ready(tiny_flags, tmp_path / "run", *FLAGS, "--optim", "SGD")
    runner = capture_all(trainer, {"sts": "with auxiliary losses"}, lines.append)

    class Failing(PythonCapturer):
        def __call__(self, function: Callable[[], Captured]) -> tuple[Captured, Callable[[], None]]:
            function()
            raise RuntimeError("operation not permitted\nmore")

    failing: Any = Failing(trainer)
    runner.capturer = failing
    plain = make_ready(tiny_flags, tmp_path / "plain", *FLAGS, "--optim", "SGD")
    for _ in range(5):
        for task in ("sst", "sts"):
            for one in (trainer, plain):
                one.train_step(step_of(task, range(8)))
    assert lines == ["--cuda_graphs: a pass of sst could not be captured (operation not permitted)"]
    assert runner.report() == (
        "--cuda_graphs: 0 passes replayed from 0 graphs, 2 of a rare shape, 5 with auxiliary losses, "
        "3 that could not be captured"
    )
    assert_near(copied(trainer.model), copied(plain.model))
    assert failing.pools == 3  # another one at the first pass, and after the failure


def test_the_graphs_of_other_tasks_stay_and_the_first_error_is_named(tiny_flags: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    trainer = make_ready(tiny_flags, tmp_path / "run", *FLAGS)
    runner = capture_all(trainer, say=lines.append)
    for _ in range(USES):
        trainer.train_step(step_of("sst", range(8)))
    capture = runner.capturer

    def fails(function: Callable[[], Captured]) -> Any:
        try:
            raise RuntimeError("operation not permitted")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    runner.capturer = fails  # type: ignore[assignment]
    for _ in range(USES):
        trainer.train_step(step_of("sts", range(8)))
    runner.capturer = capture
    trainer.train_step(step_of("sst", range(8)))
    assert lines == ["--cuda_graphs: a pass of sts could not be captured (operation not permitted)"]
    assert runner.counts["replayed"] == 2 and len(runner.graphs) == 1


def test_all_graphs_share_one_set_of_gradients(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_ready(tiny_flags, tmp_path / "run", *FLAGS)
    runner = capture_all(trainer)
    for task in DEFAULT_TASKS:
        for _ in range(USES):
            trainer.train_step(step_of(task, range(8)))
    gradients = [pair for graph in runner.graphs.values() for pair in graph.gradients]
    memory = {gradient.data_ptr() for _, gradient in gradients}
    assert len(runner.graphs) == len(DEFAULT_TASKS) and len(memory) == len({parameter for parameter, _ in gradients})


def test_after_a_lack_of_memory_fewer_graphs_are_kept(tiny_flags: list[str], tmp_path: Path) -> None:
    """Half of the graphs go, and the capture is tried again."""
    trainer = make_ready(tiny_flags, tmp_path / "run", *FLAGS)
    runner, short = capture_all(trainer), [False, False, False, False, True, False]
    capture = runner.capturer

    class Short(PythonCapturer):
        def __call__(self, function: Callable[[], Captured]) -> Any:
            if short.pop(0):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return capture(function)

    runner.capturer = Short(trainer)  # type: ignore[assignment]
    for rows in (8, 7, 6, 5, 4):
        for _ in range(USES):
            trainer.train_step(step_of("sst", range(rows)))
    assert runner.most == 2 and not short and runner.counts == {"of a rare shape": 10, "replayed": 5}
    assert [key[-1] for key in runner.graphs] == [8, 4]  # type: ignore[index]
    short += [True]
    trainer.model.eval()  # all graphs end
    for _ in range(USES):
        trainer.train_step(step_of("sst", range(8)))
    assert runner.counts["for lack of memory"] == 1 and not runner.graphs


def test_not_more_graphs_than_are_kept(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.cuda_graphs, "GRAPHS", 1)
    trainer = make_ready(tiny_flags, tmp_path / "run", *FLAGS)
    runner = capture_all(trainer)
    for size in (8, 6):
        for _ in range(4):
            trainer.train_step(step_of("sst", range(size)))
    assert runner.counts == {"replayed": 2, "of a rare shape": 4, "beyond the 1 graphs that are kept": 2}
    assert GRAPHS > 10


def test_without_cuda_it_is_refused_before_a_run_directory_is_made(tiny_flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*tiny_flags, "--use_gpu", "--amp", "--cuda_graphs", "--run_dir", str(run)]
    message = refusal(multitask_classifier.main, words)
    assert message == "--cuda_graphs: the device is cpu, which has none; drop it" and not run.exists()


def test_which_tasks_are_captured(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--sst_smart", 1, *FLAGS)
    monkeypatch.setattr(training.cuda_graphs, "Capturer", lambda device: None)
    config = replace(trainer.config, train=replace(trainer.config.train, cuda_graphs=True))
    device, widths = Device(torch.device("cuda"), torch.bfloat16), set()
    for kernel, wanted in (
        (True, {"sst": "with auxiliary losses"}),
        (False, dict.fromkeys(DEFAULT_TASKS, "whose attention is padded")),
    ):
        monkeypatch.setattr(
            training.cuda_graphs, "first_working", lambda _, dtype, width, k=kernel: widths.add(width) or k
        )
        runner = make_cuda_graph_runner(config, trainer.model, device, trainer.forward_backward, print)
        assert runner is not None and runner.refusals == wanted
    assert widths == {16}


def test_a_task_has_few_shapes(tiny_flags: list[str], sample: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--data_dir", sample, "--batch_size", 32)
    runner = capture_all(trainer)
    for task in DEFAULT_TASKS:
        rows = [batch.indices for epoch in range(3) for batch in task_batches(trainer.plan, epoch, task)]
        keys = Counter(runner.key(load_batch(trainer, task, each), 1.0) for each in rows if len(each) == 32)
        assert len(keys) <= 6 and keys.total() == 54
