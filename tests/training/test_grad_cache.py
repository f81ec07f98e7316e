"""Out of memory: a batch that does not fit is computed in parts, with the gradient of the whole batch and no trace."""

import json
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_bert
from test_training import changed, copied, interrupted, make_trainer, metrics, tensors_of
from torch import Tensor, nn

import training.grad_cache
from evaluation.predict import predict
from text.packing import EncodedBatch
from training import trainer as loop
from training.grad_cache import packed_of, parts_of
from training.task_sampling import Step, task_batches
from training.trainer import Trainer
from utils.console import run_script
from utils.errors import UserError, is_out_of_memory

ROOT = Path(__file__).resolve().parent.parent
ROWS = np.array([4, 1, 9, 2, 16])
STILL = ["--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0]


def trainer_of(flags: list[str], folder: Path, *more: object, say: Callable[[str], None] | None = None) -> Trainer:
    """A trainer in which everything trains."""
    trainer = make_trainer(flags, folder, "--fine_tune_mode", "full-model", *more, say=say)
    trainer.model.manage_freezing("unfreezeall")
    trainer.model.train()
    return trainer


def gradients(trainer: Trainer, task: str, rows: np.ndarray = ROWS) -> dict[str, Tensor]:
    """Loss, gradients, running statistics and generator after one pass of a batch."""
    model, start = trainer.model, copied(trainer.model)
    torch.manual_seed(3)
    step = loop.Step(task, rows)
    loss, outputs, _ = trainer.memory.run(step, lambda: trainer.passed(step))
    out = {"loss": loss.detach(), "outputs": outputs.detach(), "generator": torch.get_rng_state()}
    out |= {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}
    out |= {name: own.clone() for name, own in model.named_buffers() if "running_" in name}
    model.zero_grad(set_to_none=True)
    model.load_state_dict(start)
    return out


# -------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("arch", ["yin-yang", "v2", "cosine"])
def test_parts_hold_every_sequence_once_and_embed_the_same(tiny_flags: list[str], tmp_path: Path, arch: str) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", arch)
    model = trainer.model.eval()
    for task in trainer.tasks:
        batch = trainer.train_data[task].batch(ROWS)
        hidden = model.backbone(task).embed(batch)
        with torch.no_grad():
            whole = model.embed(task, batch)
            for count in range(1, batch.num_sequences + 1):
                for own in (batch, EncodedBatch(hidden, 0, batch)):
                    parts, places = parts_of(own, batch, count)
                    assert len(parts) == count
                    held = [packed for part in parts if (packed := packed_of(part)) is not None]
                    sizes, lengths = ([getattr(own, f"num_{what}") for own in held] for what in ("sequences", "tokens"))
                    assert sum(sizes) == batch.num_sequences and max(sizes) - min(sizes) <= 1
                    assert sum(lengths) == batch.num_tokens and max(lengths) - min(lengths) <= batch.max_seqlen
                    made = torch.cat([model.embed(task, part) for part in parts])[places]
                    torch.testing.assert_close(made, whole, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------- gradients

LOSSES: list[list[object]] = [
    [],  # Pearson, which sees the whole batch, and BatchNorm in the pair layer and the heads
    ["--arch", "r4", "--sts_loss", "mixed"],
    ["--arch", "v2", "--sts_loss", "mse", "--pal", "pal"],
    ["--arch", "cosine", "--lora_mode", "all-lin", "--dora"],
    ["--para_embedding_loss", "contrastive", "--sts_embedding_loss", "ranking"],
    ["--arch", "duality", "--sts_embedding_loss", "cosine"],
]


@pytest.mark.parametrize("more", LOSSES, ids=str)
def test_the_gradient_is_that_of_the_whole_batch(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    """In float64, since in float32 rounding alone is as much as 1e-5 of the gradient of a correlation of five."""
    trainer = trainer_of(tiny_flags, tmp_path / "run", *STILL, *more)
    trainer.model.double()
    for task in trainer.tasks:
        trainer.memory.sizes = {}
        whole = gradients(trainer, task)
        for size in (4, 1):
            trainer.memory.sizes = {task: size}
            found = gradients(trainer, task)
            assert list(found) == list(whole)
            trained = [name for name, _ in trainer.model.named_parameters() if name in whole]
            gradient = torch.cat([whole[name].flatten() for name in trained])
            difference = torch.cat([(found[name] - whole[name]).flatten() for name in trained])
            assert difference.norm() < 1e-6 * gradient.norm() and len(trained) > 10, task
            for name, own in whole.items():
                torch.testing.assert_close(found[name], own, atol=1e-5, rtol=1e-5, msg=f"{task} {name}")


@pytest.mark.parametrize(
    "more",
    [
        ["--sts_embedding_loss", "simcse", "--sst_embedding_loss", "simcse"],
        ["--arch", "v2", "--sst_bregman", 1, "--para_bregman", 1],
        ["--arch", "v2", "--lora_mode", "attn", "--lora_dropout", 0.2],
        ["--arch", "r1-baseline", "--pal", "pal"],
    ],
    ids=str,
)
def test_a_part_that_is_computed_again_has_the_same_dropout_masks(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[object]
) -> None:
    """Against parts whose graph is kept: there nothing is computed again. Dropout is on everywhere."""
    trainer = trainer_of(tiny_flags, tmp_path / "run", *more)
    trainer.memory.sizes = dict.fromkeys(trainer.tasks, 3)
    again = {task: gradients(trainer, task) for task in trainer.tasks}
    monkeypatch.setattr(training.grad_cache, "checkpoint", lambda run, *given, use_reentrant: run(*given))
    for task in trainer.tasks:
        kept = gradients(trainer, task)
        assert list(kept) == list(again[task])
        for name, own in kept.items():
            torch.testing.assert_close(again[task][name], own, atol=1e-6, rtol=1e-5, msg=f"{task} {name}")


def test_parts_keep_less_for_the_gradient(tiny_flags: list[str], tmp_path: Path) -> None:
    """Bytes that wait for the backward pass, counted where autograd saves them."""
    trainer = trainer_of(tiny_flags, tmp_path / "run", "--arch", "v2", *STILL)
    rows = np.arange(20)
    batch, labels = trainer.train_data["para"].batch(rows), trainer.train_data["para"].labels(rows)
    kept = []
    for sizes in ({}, {"para": 5}):
        trainer.memory.sizes = dict(sizes)
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                saved.append(tensor.numel() * tensor.element_size())
            return tensor

        with trainer.memory.in_parts("para"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = nn.functional.mse_loss(trainer.model("para", batch), labels.float())
        kept.append(sum(saved))
        assert loss.requires_grad
    assert kept[1] < kept[0] / 10


# ------------------------------------------------------------------------------------------------------- out of memory


class _FailsBackward(torch.autograd.Function):
    """The identity, whose gradient needs more memory than there is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty(1 << 60)


def ask_the_allocator() -> None:
    """The CPU allocator's own error."""
    torch.empty(1 << 60)


def ask_cuda() -> None:
    """The error of a GPU's allocator."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ...")


def ask_numpy() -> None:
    """The error of numpy, which makes the parts."""
    np.empty(1 << 55)


FORWARD = {"cpu": ask_the_allocator, "cuda": ask_cuda, "numpy": ask_numpy}


def limit(trainer: Trainer, task: str, most: int, how: str) -> list[int]:
    """Let a layer of the task's backbone run out of memory at more than so many sequences; returns those it refused.

    `how` is what fails: the pass forward with one of the errors above, or the pass back, when the gradients of the
    layers above have been added already.
    """
    failed: list[int] = []
    layer = trainer.model.backbone(task).bert_layers[0]

    def hook(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor | None:
        if given[1].num_sequences <= most or not module.training:
            return None
        failed.append(given[1].num_sequences)
        if how == "backward":
            return _FailsBackward.apply(out)
        return FORWARD[how]()

    layer.register_forward_hook(hook)
    return failed


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that a step changes."""
    optimizers = {f"{name} {i}": own for name, optimizer in trainer.optimizers.items()
                  for i, own in enumerate(tensors_of(optimizer))}  # fmt: skip
    return {**copied(trainer.model), **optimizers, "generator": torch.get_rng_state()}


@pytest.mark.parametrize("how", ["cpu", "cuda", "backward"])
@pytest.mark.parametrize(
    "more", [[], ["--routine", "joint"], ["--routine", "joint", "--pcgrad", "--arch", "r1-baseline", "--clip", 0.1]],
    ids=["sequential", "joint", "pcgrad"],
)  # fmt: skip
def test_a_failed_attempt_leaves_no_trace(tiny_flags: list[str], tmp_path: Path, how: str, more: list[object]) -> None:
    """After the step all is as if the size that fits had been known; gradients of other tasks that wait are kept."""
    said: list[str] = []
    states, sizes = [], {}
    for name in ("found", "known"):
        trainer = trainer_of(tiny_flags, tmp_path / name, *more, "--epochs", 1, say=said.append)
        trainer.memory.sizes = dict(sizes)
        if name == "found":
            failed = limit(trainer, "para", 4, how)
        torch.manual_seed(5)
        for step in trainer.steps_of(0)[:6] if more else task_batches(trainer.plan, 0, "para"):
            trainer.train_step(step, True)
        states.append(state_of(trainer))
        sizes = trainer.memory.sizes
    assert failed and set(sizes.values()) == {4} and "para" in sizes  # other tasks of the same backbone fail as well
    for name, own in states[0].items():
        assert torch.equal(states[1][name], own), name
    told = [line for line in said if "did not fit" in line]
    assert len(told) == len(set(told)) <= 4  # later steps fail no more
    assert all(word in "".join(told) for word in ("Quora paraphrase", "at most", "dropout masks", "--batch_size"))


def test_what_can_be_done_without_goes_first(tiny_flags: list[str], tmp_path: Path) -> None:
    """A batch is cut where it does not fit even then."""
    trainer = trainer_of(tiny_flags, tmp_path / "run")
    spare = [False, True]
    trainer.memory.release = spare.pop
    failed = limit(trainer, "sst", 4, "cpu")
    trainer.train_step(Step("sst", ROWS), True)
    assert failed == [5, 5] and trainer.memory.sizes == {"sst": 3} and not spare


def test_a_small_batch_is_cut_at_once(tiny_flags: list[str], tmp_path: Path) -> None:
    """Parts of at most four would be no smaller than it is."""
    trainer = trainer_of(tiny_flags, tmp_path / "run")
    trainer.memory.sizes = {"sst": 4}
    failed = limit(trainer, "sst", 1, "numpy")
    trainer.train_step(Step("sst", ROWS[:2]), True)
    assert failed == [2] and trainer.memory.sizes == {"sst": 1}


def sizes_in(trainer: Trainer, task: str) -> list[int]:
    """The sequences of each pass through the lowest layer of a task's backbone from now on."""
    sizes: list[int] = []
    layer = trainer.model.backbone(task).bert_layers[0]
    layer.register_forward_hook(lambda module, given, out: sizes.append(given[1].num_sequences))
    return sizes


def test_only_a_batch_that_does_not_fit_is_computed_twice(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = trainer_of(tiny_flags, tmp_path / "run")
    sizes, trainer.memory.sizes = sizes_in(trainer, "sst"), {"sst": 4}
    for rows in (ROWS[:4], ROWS):
        trainer.train_step(Step("sst", rows), True)
    assert sizes[:3] == [4, 3, 2] and sorted(sizes[3:]) == [2, 3]


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_failed_pass_back_keeps_nothing(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """torch keeps what was ready when a pass failed, and the layers below it, until some pass has gone back whole."""
    trainer = trainer_of(tiny_flags, tmp_path / "run")
    low, high = trainer.model.backbone("sst").bert_layers[:2]
    projection, outputs, alive = getattr(high.self_attention, name), [], []
    low.register_forward_hook(lambda module, given, out: outputs.append(weakref.ref(out)))
    failing = projection.register_forward_hook(lambda module, given, out: _FailsBackward.apply(out))
    halve = trainer.memory.halve

    def noting(step: Step) -> None:
        alive.extend(own() is not None for own in outputs)
        failing.remove()
        halve(step)

    monkeypatch.setattr(trainer.memory, "halve", noting)
    trainer.train_step(Step("sst", ROWS), True)
    assert alive == [False]


def test_a_run_goes_on_in_parts_and_resumes_bit_for_bit(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--fine_tune_mode", "full-model", "--epochs", 2, "--train_sst", "--train_sts"]
    said: list[str] = []
    whole = make_trainer(tiny_flags, tmp_path / "whole", *flags, say=said.append)
    failed = limit(whole, "sts", 5, "cpu")
    whole.fit()
    assert failed == [16, 8] and len([line for line in said if "did not fit" in line]) == 2
    part = make_trainer(tiny_flags, tmp_path / "part", *flags)
    limit(part, "sts", 5, "cpu")
    interrupted(part, 1)
    resumed = make_trainer(tiny_flags, tmp_path / "part", *flags, "--resume")
    failed = limit(resumed, "sts", 5, "cpu")
    resumed.fit()
    assert resumed.memory.sizes == whole.memory.sizes == {"sts": 4}
    assert not failed  # the size came with the state
    assert changed(copied(whole.model), copied(resumed.model)) == set()
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")


def test_frozen_layers_from_the_cache_are_cut_as_well(tiny_flags: list[str], tmp_path: Path) -> None:
    """Hidden states in place of tokens; what they train is what they train whole, as dropout is off."""
    states = []
    for number, sizes in enumerate(({}, {"para": 3, "sst": 2, "sts": 1})):
        flags = [*STILL, "--optim", "SGD", "--cache_frozen", "--epochs", 2, "--fine_tune_mode", "iterative"]
        trainer = make_trainer(tiny_flags, tmp_path / str(number), *flags)
        trainer.memory.sizes = dict(sizes)
        trainer.fit()
        states.append(copied(trainer.model))
    for name, own in states[0].items():
        torch.testing.assert_close(states[1][name], own, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_kept_where_a_part_is_computed_again(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: torch.dtype
) -> None:
    from utils.device import Device

    trainer = trainer_of(tiny_flags, tmp_path / "run", "--arch", "v2")
    trainer.device = Device(torch.device("cpu"), precision)
    trainer.memory.sizes = {"sst": 3}
    again = gradients(trainer, "sst")
    monkeypatch.setattr(training.grad_cache, "checkpoint", lambda run, *given, use_reentrant: run(*given))
    for name, own in gradients(trainer, "sst").items():
        torch.testing.assert_close(again[name], own, atol=1e-3, rtol=1e-2, msg=name)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], ["SST sentiment: out of memory", "a single sequence of up to ", "--max_length", "--lora_mode"]),
        (["--sst_smart", 1], ["--sst_smart needs whole", "--batch_size"]),
    ],
)
def test_what_cannot_be_cut_is_one_line(
    tiny_flags: list[str], tmp_path: Path, more: list[object], words: list[str]
) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", *more)
    failed = limit(trainer, "sst", 0, "cuda")
    with pytest.raises(UserError) as error:
        trainer.fit()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert len(failed) == (1 if more else 4)  # 8 sequences, 4, 2, 1
    assert not (tmp_path / "run" / "best.pt").exists()


def test_a_head_that_does_not_fit_is_one_line(tiny_flags: list[str], tmp_path: Path) -> None:
    """With everything below frozen and kept there is nothing to cut."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--cache_frozen", "--fine_tune_mode", "last-layer")
    trainer.model.heads["sst"].register_forward_hook(lambda *given: ask_the_allocator())
    with pytest.raises(UserError, match="SST sentiment: out of memory in the head; lower --batch_size"):
        trainer.fit()


def test_one_process_of_several_only_fails(tiny_flags: list[str], tmp_path: Path) -> None:
    """A second attempt of it alone would wait for ever for the gathered rows of the others."""
    trainer = trainer_of(tiny_flags, tmp_path / "run")
    trainer.memory.alone = False
    failed = limit(trainer, "sst", 4, "cpu")
    with pytest.raises(RuntimeError, match="allocate"):
        trainer.train_step(Step("sst", ROWS), True)
    assert failed == [5] and trainer.memory.sizes == {}


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    layer = trainer.model.backbone("sst").bert_layers[0]
    layer.register_forward_hook(lambda *given: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trainer.fit()
    assert trainer.memory.sizes == {}


def test_after_an_error_in_parts_the_model_is_whole(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = trainer_of(tiny_flags, tmp_path / "run")
    sizes, trainer.memory.sizes = sizes_in(trainer, "sst"), {"sst": 3}
    trainer.model.heads["sst"].register_forward_hook(lambda *given: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trainer.train_step(Step("sst", ROWS), True)
    trainer.model.embed("sst", trainer.train_data["sst"].batch(ROWS))
    assert sizes == [3, 2, 5]


def test_errors_of_allocators_are_known() -> None:
    found = []
    for ask in (*FORWARD.values(), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            ask()
        found.append(is_out_of_memory(error.value))
    assert found == [True] * 4
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(UserError("SST sentiment: out of memory")) and not is_out_of_memory(OSError(12, "x"))


def test_a_lack_of_memory_anywhere_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run_script(lambda argv: ask_the_allocator(), [])
    shown = capsys.readouterr().err
    assert exit.value.code == 2 and shown.startswith("error: out of memory (") and shown.count("\n") == 1
    assert "--eval_batch_size" in shown
    with pytest.raises(RuntimeError, match="inconsistent"):
        run_script(lambda argv: torch.ones(2) @ torch.ones(3), [])


# ------------------------------------------------------------------------------------------- an allocator that says no

LIMITED = r"""
import json, re, resource, sys
sys.path.insert(0, sys.argv[1])
import scipy.stats, sklearn.metrics
import multitask_classifier
from pathlib import Path
from training.trainer import Trainer
run_steps = Trainer.run_steps

def limited(trainer, steps):
    step = steps[0]
    trainer.train_step(type(step)(step.task, step.indices[:1]), True)  # code, states and buffers are there now
    taken = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[2]), resource.RLIM_INFINITY))
    run_steps(trainer, steps)
    print(json.dumps({"sizes": trainer.memory.sizes, "losses": [own.item() for own in trainer.meters["sst"].losses]}))
    raise SystemExit(0)

Trainer.run_steps = limited
multitask_classifier.main(json.loads(sys.argv[3]))
"""


def test_a_process_with_too_little_memory_trains_in_parts(
    tiny_flags: list[str], small_data: Path, tmp_path: Path
) -> None:
    """The limit is the system's own (RLIMIT_AS) and the error that of torch's allocator."""
    bert = make_bert(tmp_path / "bert", hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    data = shutil.copytree(small_data, tmp_path / "data")
    header, *rows = (data / "ids-sst-train.csv").read_text().splitlines()
    at, long = header.split("\t").index("sentence"), []
    for number in range(80):
        row = rows[number % len(rows)].split("\t")
        long.append("\t".join([row[0], f"id{number}", *row[2:at], " ".join([row[at]] * 20), *row[at + 1 :]]))
    (data / "ids-sst-train.csv").write_text("\n".join([header, *long]) + "\n")
    flags = [
        *tiny_flags,
        "--data_dir",
        str(data),
        "--pretrained",
        str(bert),
        "--train_sst",
        "--arch",
        "v2",
        "--epochs",
        "1",
    ]
    flags += [
        "--fine_tune_mode",
        "full-model",
        "--batch_size",
        "80",
        "--no_tensorboard",
        "--run_dir",
        str(tmp_path / "run"),
    ]
    words = [sys.executable, "-c", LIMITED, str(ROOT), str(240 << 20), json.dumps(flags)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"a batch of 80 sequences did not fit into memory; from now on the backbone takes at most \d+ ", done.stdout
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert 1 <= found["sizes"]["sst"] < 80 and np.isfinite(found["losses"]).all() and len(found["losses"]) == 1


def test_evaluation_goes_on_in_halves(tiny_flags: list[str], tmp_path: Path) -> None:
    """Down to one example; then the error of the allocator is passed on."""
    trainer = make_trainer(tiny_flags, tmp_path / "run")
    data = trainer.dev_data["para"]
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
