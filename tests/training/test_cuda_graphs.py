"""--cuda_graphs without a GPU: recordings that do their work again by Python, into memory that stays where it is."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_flash import by_formula
from test_training import State, copied, make_trainer
from torch import Tensor

import multitask_classifier
import training.cuda_graphs
from kernels import flash_attention as flash
from tasks import DEFAULT_TASKS
from text.packing import Batch
from training.cuda_graphs import GRAPHS, USES, GraphedPasses, Recorded, passes_of
from training.loader import Feed
from training.task_sampling import Step, task_batches
from training.trainer import Trainer
from utils.device import Device
from utils.errors import UserError

FLAGS = ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0]


@pytest.fixture(autouse=True)
def by_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that reads where sequences begin from the batch itself, as the kernel on a GPU does."""
    monkeypatch.setattr(flash, "usable", lambda query, key, value, heads: True)
    monkeypatch.setattr(
        flash, "attend", lambda q, k, v, starts_q, starts, longest, dropout: by_formula(q, k, v, starts_q, starts, 0.0)
    )


class PythonRecorder:
    """What a CUDA graph does, by Python: nothing happens at recording, and each replay writes to the same memory.

    That memory is one pool: a replay may write to all that other recordings have there, and here it does.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.model, self.recorded, self.pools = trainer.model, 0, 1
        self.pool: list[Tensor] = []

    def renew(self) -> None:
        self.pools += 1
        self.pool = []

    def __call__(self, function: Callable[[], Recorded]) -> tuple[Recorded, Callable[[], None]]:
        buffers = [(own, own.clone()) for own in self.model.buffers()]
        fixed = function()
        for own, before in buffers:
            own.copy_(before)
        self.recorded += 1
        mine = [fixed[0], fixed[1], *(gradient for _, gradient in fixed[2])]
        pool = self.pool
        pool += mine
        for own in mine:
            own.fill_(torch.nan)  # what is not written again is seen

        def replay() -> None:
            kept = [parameter.grad for parameter in self.model.parameters()]
            self.model.zero_grad(set_to_none=True)
            loss, outputs, gradients = function()
            for own in pool:
                own.fill_(torch.nan)
            fixed[0].copy_(loss)
            fixed[1].copy_(outputs)
            for (_, into), (_, new) in zip(fixed[2], gradients, strict=True):
                into.copy_(new)
            for parameter, gradient in zip(self.model.parameters(), kept, strict=True):
                parameter.grad = gradient

        return fixed, replay


def graphed(trainer: Trainer, refusals: dict[str, str] | None = None) -> GraphedPasses:
    """Let a trainer go by recordings."""
    passes = GraphedPasses(
        trainer.forward_backward, trainer.model, PythonRecorder(trainer), refusals or {}, trainer.say
    )
    trainer.passes = passes
    trainer.feed = Feed(trainer.train_data, torch.device("cpu"), tails=True)
    return passes


@pytest.mark.parametrize(
    "more",
    [
        ["--arch", "yin-yang", "--routine", "interleave", "--optim", "SGD"],
        ["--arch", "v1", "--fine_tune_mode", "iterative", "--epochs", 5, "--optim", "SGD"],  # what trains changes
        ["--arch", "v1", "--routine", "joint", "--optim", "AdamW"],
        ["--arch", "v2", "--routine", "joint", "--pcgrad", "--optim", "AdamW", "--clip", 0.5],
        ["--arch", "v1", "--average", "ema", "--ema_decay", 0.9, "--optim", "SGD"],
        ["--arch", "v1", "--lora_mode", "all-lin", "--dora", "--optim", "AdamW"],
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_replayed_training_is_the_same(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    """Mixed lengths, several epochs with an evaluation after each, other rates in each step."""
    flags = [*FLAGS, "--fine_tune_mode", "full-model", "--lr_schedule", "linear", "--epochs", 3, "--lr", 1e-4]
    flags += ["--batch_size", 4, *more]
    plain, replayed = (make_trainer(tiny_flags, tmp_path / name, *flags) for name in ("plain", "replayed"))
    passes = graphed(replayed)
    counts: Counter[str] = Counter()
    report = passes.report

    def counted() -> str | None:
        counts.update(passes.counts)
        return report()

    passes.report = counted  # type: ignore[method-assign]
    scores = plain.fit(), replayed.fit()
    assert scores[0]["score"] == pytest.approx(scores[1]["score"], abs=1e-3)
    assert counts["replayed"] > 5
    assert sum(counts.values()) == replayed.step
    assert set(counts) == {"replayed", "of a rare shape"}
    assert_near(copied(replayed.model), copied(plain.model))


def assert_near(found: State, wanted: State) -> None:
    for name, own in wanted.items():
        torch.testing.assert_close(found[name], own, rtol=0, atol=2e-5 * max(1.0, float(own.abs().max())), msg=name)


def test_a_pass_is_recorded_at_its_third_use(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", *FLAGS, "--arch", "v1")
    passes = graphed(trainer)
    trainer.model.train()
    for number in range(6):
        loss, outputs, _, _ = trainer.train_step(Step("sst", np.arange(8)), False)
        assert outputs.isfinite().all()
        assert len(passes.recordings) == (number + 1 >= USES)
    kept = outputs.clone()
    trainer.train_step(Step("sst", np.arange(8)), False)
    assert torch.equal(outputs, kept)  # a copy, not the recording's memory
    assert passes.report() == "--cuda_graphs: 5 passes replayed from 1 graphs, 2 of a rare shape"
    assert passes.report() == "--cuda_graphs: 0 passes replayed from 1 graphs"


def key_of(trainer: Trainer, step: Step) -> object:
    batch, labels = trainer.feed.take(step)
    assert isinstance(trainer.passes, GraphedPasses)
    return trainer.passes.key(step, batch, labels)  # type: ignore[arg-type]


def test_what_a_recording_holds_for(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", *FLAGS)
    passes = graphed(trainer)
    trainer.model.train()
    rows = np.arange(8)
    steps = [Step(task, rows) for task in DEFAULT_TASKS] + [Step("sst", rows, 1 / 3), Step("sst", rows[:5])]
    assert len({key_of(trainer, step) for step in steps}) == len(steps)
    assert key_of(trainer, Step("sst", rows)) == key_of(trainer, Step("sst", rows[::-1].copy()))
    for change in (
        lambda: trainer.model.eval(),
        lambda: trainer.model.manage_freezing("freezeall"),
        lambda: setattr(next(trainer.model.parameters()), "data", next(trainer.model.parameters()).data.clone()),
    ):
        passes.recordings["old"] = None  # type: ignore[assignment]
        change()
        key_of(trainer, Step("sst", rows))
        assert not passes.recordings


def test_an_evaluation_in_between_forgets_nothing(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", *FLAGS, "--average", "ema")
    passes = graphed(trainer)
    trainer.model.train()
    for _ in range(USES):
        trainer.train_step(Step("sst", np.arange(8)), False)
    with trainer.average.applied():
        trainer.evaluate(["sst"])
    trainer.train_step(Step("sst", np.arange(8)), False)
    assert passes.counts["replayed"] == 2 and isinstance(passes.recorder, PythonRecorder)
    assert passes.recorder.recorded == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("operation not permitted when stream is capturing\nmore", "operation not permitted when stream is capturing"),
        ("", "RuntimeError"),
    ],
)
def test_what_cannot_be_recorded_runs_without_and_says_so_once(
    tiny_flags: list[str], tmp_path: Path, text: str, reason: str
) -> None:
    lines: list[str] = []
    trainer = make_trainer(tiny_flags, tmp_path / "run", *FLAGS, "--arch", "v1", say=lines.append)
    passes = graphed(trainer, {"sts": "with further losses"})

    class Failing(PythonRecorder):
        def __call__(self, function: Callable[[], Recorded]) -> tuple[Recorded, Callable[[], None]]:
            function()
            raise RuntimeError(text)

    passes.recorder = failing = Failing(trainer)
    trainer.model.train()
    plain = make_trainer(tiny_flags, tmp_path / "plain", *FLAGS, "--arch", "v1")
    plain.model.train()
    for _ in range(5):
        for task in ("sst", "sts"):
            for own in (trainer, plain):
                own.train_step(Step(task, np.arange(8)), False)
    assert lines == [f"--cuda_graphs: sst cannot be recorded and runs without ({reason})"]
    assert passes.report() == (
        "--cuda_graphs: 0 passes replayed from 0 graphs, 2 of a rare shape, 5 with further losses, "
        "3 that could not be recorded"
    )
    assert_near(copied(trainer.model), copied(plain.model))
    assert failing.pools == 3  # another one at the first pass, and after the failure


def test_recordings_make_room_before_a_batch_is_cut(tiny_flags: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    trainer = make_trainer(tiny_flags, tmp_path / "run", *FLAGS, "--arch", "v1", say=lines.append)
    passes = graphed(trainer)
    trainer.model.train()
    for rows in (8, 7):
        for _ in range(USES):
            trainer.train_step(Step("sst", np.arange(rows)), False)
    assert len(passes.recordings) == 2
    compute, short = passes.compute, [True]

    def computed(step: Step, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        if short and short.pop():
            raise RuntimeError("CUDA out of memory")
        return compute(step, batch, labels)

    passes.compute = computed
    trainer.train_step(Step("sst", np.arange(6)), False)
    assert not passes.recordings and passes.most == 1 and not trainer.memory.sizes and not lines
    short.append(True)
    trainer.train_step(Step("sst", np.arange(6)), False)  # now there is nothing left to free
    assert trainer.memory.sizes == {"sst": 3} and len(lines) == 1
    passes.counts.clear()
    for _ in range(USES):
        trainer.train_step(Step("sst", np.arange(6)), False)
    assert passes.counts == {"whose batches go in parts": USES} and not passes.recordings


def test_not_more_graphs_than_are_kept(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.cuda_graphs, "GRAPHS", 1)
    trainer = make_trainer(tiny_flags, tmp_path / "run", *FLAGS, "--arch", "v1")
    passes = graphed(trainer)
    trainer.model.train()
    for size in (8, 6):
        for _ in range(4):
            trainer.train_step(Step("sst", np.arange(size)), False)
    assert passes.counts == {"replayed": 2, "of a rare shape": 4, "beyond the 1 graphs that are kept": 2}
    assert GRAPHS > 10


def test_without_cuda_it_is_refused(tiny_flags: list[str], tmp_path: Path) -> None:
    """Before a run directory is made, and by the trainer too."""
    flags, run = ["--use_gpu", "--amp", "--cuda_graphs"], tmp_path / "run"
    message = "--cuda_graphs: the device is cpu, which has none; drop it"
    with pytest.raises(UserError, match=message):
        multitask_classifier.main([*tiny_flags, *flags, "--run_dir", str(run)])
    assert not run.exists()
    with pytest.raises(UserError, match=message):
        make_trainer(tiny_flags, run, *flags)


def test_which_tasks_are_recorded(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--sst_smart", 1, "--arch", "v1")
    trainer.config.train.cuda_graphs = True
    monkeypatch.setattr(training.cuda_graphs, "Recorder", lambda device: None)
    widths: list[int] = []
    for kernel, wanted in (
        (True, {"sst": "with further losses"}),
        (False, dict.fromkeys(DEFAULT_TASKS, "whose attention is padded")),
    ):
        monkeypatch.setattr(
            training.cuda_graphs, "works", lambda device, dtype, width, k=kernel: widths.append(width) or k
        )
        device = Device(torch.device("cuda"), torch.bfloat16)
        passes = passes_of(trainer.config, trainer.model, device, trainer.terms, trainer.forward_backward, trainer.say)
        assert isinstance(passes, GraphedPasses) and passes.refusals == wanted
    assert set(widths) == {16}


def test_a_task_has_few_shapes(tiny_flags: list[str], sample: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--data_dir", sample, "--batch_size", 32)
    graphed(trainer)
    for task in DEFAULT_TASKS:
        steps = [step for epoch in range(3) for step in task_batches(trainer.plan, epoch, task)]
        keys = Counter(key_of(trainer, step) for step in steps if len(step.indices) == 32)
        assert len(keys) <= 6 and keys.total() == 54
