"""Several processes on gloo: the model is that of one process, every example is seen once, and they fail together."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from helpers import make_trainer, metrics, refusal
from processes import differences
from ranks import launch, torchrun

import multitask_classifier
from cli.parser import build_config
from evaluation.predict import predict
from models.checkpoint import load
from models.heads import BatchNorm
from tasks import DEFAULT_TASKS, TASKS
from training import distributed
from training.distributed import SINGLE_PROCESS, shard_places

STEPS = 20
LONG = pytest.mark.long
# 20 examples in batches of 9, 9 and 2: ragged shards, and in the last one some of three ranks have nothing.
EXACT = ["--batch_size", 9, "--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0, "--fine_tune_mode", "full-model"]
# Adamax makes a step of the learning rate of any gradient, and coupled decay makes one of the rounding errors that are
# the gradient of a bias before BatchNorm or softmax: from 1e-18 it grows a thousandfold a step. A step on two examples,
# whose correlation is always 1 or -1, has such a gradient too.
EXACT += [f"--{task}_weight_decay=0" for task in DEFAULT_TASKS]
SMART = ["--sst_smart", 1, "--para_smart", 1, "--sts_smart", 1, "--smart_epsilon", 0.1, "--smart_eta", 0.1]
SMART += ["--smart_sigma", 0.05, "--optim", "SGD", "--batch_size", 8, "--lr", 1e-5]
UNFREEZING = ["--fine_tune_mode", "iterative", "--epochs", 5, "--optim", "SGD"]
ONE_RATE = [f"--{task}_{name}" for task in DEFAULT_TASKS for name in ("lr_multiplier=2", "weight_decay=0.1")]
CASES: dict[str, list[Any]] = {
    "sequential": ["--optim", "AdamW"],
    "interleave": ["--routine", "interleave", "--arch", "r4", "--optim", "AdamW", "--sst_weight_decay", 0.1],
    "baseline": ["--arch", "baseline", "--optim", "AdamW", "--average", "ema", "--ema_decay", 0.8],
    "r1-baseline": ["--arch", "r1-baseline", "--routine", "annealed", "--optim", "RAdam", "--micro_batch_size", 2],
    "joint, PCGrad": ["--routine", "joint", "--pcgrad", "--clip", 0.5, "--sts_loss", "mse", "--lr", 1e-4],
    "joint": ["--routine", "joint", "--arch", "v2", "--clip", 0.5],
    "joint, micro-batches": [
        "--routine",
        "joint",
        "--optim",
        "SGD",
        "--micro_batch_size",
        3,
        "--sts_embedding_loss",
        "cosine",
    ],
    "unfreezing": [*UNFREEZING, "--average", "ema"],
    "joint, unfreezing": [*UNFREEZING, "--routine", "joint", "--arch", "cosine"],
    "joint, nothing to train last": ["--routine", "joint", "--fine_tune_mode", "last-layer", "--arch", "r4"],
    "embeddings": ["--arch", "duality", "--para_embedding_loss", "contrastive", "--sts_embedding_loss", "ranking"],
    "cosine, Bregman": ["--arch", "v1", "--para_embedding_loss", "cosine", "--sst_bregman", 1, "--sts_bregman", 1],
    "LoRA, PAL": ["--lora_mode", "all-lin", "--dora", "--pal", "low-rank", "--arch", "v2"],
    "adapters alone": [
        "--optim",
        "SGD",
        "--lora_mode",
        "attn-only",
        "--pal",
        "mixed",
        "--pal_tasks",
        "sst",
        "--pooling",
        "mean",
    ],
    "SMART": SMART,
    "SMART, micro-batches": [*SMART, "--routine", "joint", "--pcgrad", "--micro_batch_size", 8],
    "one optimizer": ["--arch", "baseline", "--optimizers", "one", "--optim", "AdamW", *ONE_RATE],
    "batches of one": ["--batch_size", 19, "--shared_batchnorm_stats", "--optim", "SGD"],
}

# The others would only take more time.
ON_THREE = ("sequential", "interleave", "joint, PCGrad", "joint, micro-batches", "batches of one")


@pytest.fixture(scope="module")
def exact_flags(tiny_flags: list[str]) -> list[str]:
    return [*tiny_flags, *map(str, EXACT)]


@pytest.fixture(scope="module")
def one_process(exact_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cases without torchrun, in float64."""
    return ranks.train_cases(SINGLE_PROCESS, exact_flags, CASES, tmp_path_factory.mktemp("one"), STEPS)


@pytest.fixture(scope="module")
def by_ranks(exact_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """The cases on 2 and 3 ranks, in float64: what each rank has."""
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    for size, names in ((2, CASES), (3, ON_THREE)):
        cases = {name: CASES[name] for name in names}
        ended = launch(size, folder / str(size), ranks.train_cases, exact_flags, cases, folder / f"runs-{size}", STEPS)
        found[size] = ended.results()
    return found


@pytest.mark.parametrize(("size", "case"), [*((2, case) for case in CASES), *((3, case) for case in ON_THREE)])
def test_ranks_train_the_model_of_one_process(
    one_process: dict[str, Any], by_ranks: dict[int, list[Any]], size: int, case: str
) -> None:
    """Parameters, statistics of BatchNorm, averages, losses and gradient norms after 20 steps."""
    alone, found = one_process[case], by_ranks[size][0][case]
    assert alone["losses"].isfinite().all() and len(alone["losses"]) >= STEPS
    for name in ("losses", "norms"):
        torch.testing.assert_close(found[name], alone[name], rtol=1e-6, atol=1e-6)
    for part in ("weights", "average"):
        assert list(found[part]) == list(alone[part])
        for name, tensor in alone[part].items():
            torch.testing.assert_close(found[part][name], tensor, rtol=0, atol=1e-6, msg=name)
    assert all(differences(found, other[case]) == [] for other in by_ranks[size][1:])


def test_gradient_surgery_gets_the_gradients_of_one_process(exact_flags: list[str], tmp_path: Path) -> None:
    """Each task's, before any is projected; the next backward pass has not overwritten it."""
    found = launch(2, tmp_path / "log", ranks.gradients_of_tasks, exact_flags, tmp_path / "two").result()
    for gradient, alone in zip(
        found, ranks.gradients_of_tasks(SINGLE_PROCESS, exact_flags, tmp_path / "one"), strict=True
    ):
        assert any(part is not None and part.any() for part in alone)
        for part, wanted in zip(gradient, alone, strict=True):
            torch.testing.assert_close(part, wanted, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def batch_norms(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`ranks.batch_norms` of one process and of each of three."""
    return ranks.batch_norms(SINGLE_PROCESS), launch(
        3, tmp_path_factory.mktemp("norms") / "3", ranks.batch_norms
    ).results()


def in_order(parts: list[torch.Tensor], indices: list[list[int]]) -> torch.Tensor:
    """Return the rows of all shards in the batch's order."""
    return torch.cat(parts)[np.argsort(np.concatenate(indices))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", ranks.SHAPES)
def test_synchronised_statistics_of_uneven_shards(batch_norms: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Outputs, all gradients and running statistics; a batch of one value has no variance on any number of ranks."""
    y, grad, _, grad_weight, grad_bias, buffers = batch_norms[0][f"{shape} {dtype}"]
    found = [part[f"{shape} {dtype}"] for part in batch_norms[1]]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.0, "atol": 1e-9}
    outputs, grads, indices, weights, biases, all_buffers = zip(*found, strict=True)
    torch.testing.assert_close(in_order(outputs, indices), y, **close)
    torch.testing.assert_close(in_order(grads, indices), grad, **close)
    torch.testing.assert_close(sum(weights), grad_weight, **close)
    torch.testing.assert_close(sum(biases), grad_bias, **close)
    for name, buffer in buffers.items():
        torch.testing.assert_close(all_buffers[0][name], buffer, **close)
        assert torch.equal(all_buffers[0][name], all_buffers[2][name])
    before = ranks.known_norm(dtype).get_buffer("running_mean_sts")
    assert torch.equal(buffers["running_mean_sts"], before) == (shape == (1, 3))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shards_share_examples_and_tokens(count: int, size: int) -> None:
    """Each example once, in the batch's order, counts that differ by one at most, and sums by the longest example."""
    lengths = np.random.default_rng(count).integers(3, 60, count)
    parts = [shard_places(lengths, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    tokens = [lengths[part].sum() for part in parts]
    assert max(tokens) - min(tokens) <= lengths.max(initial=0)


def test_processes_of_one_machine_share_its_cores(tmp_path: Path) -> None:
    """Those that they may use, if --threads is not given."""
    assert ranks.start(2, tmp_path / "threads", ranks.threads).results() == [{"bound to one": 1, "of nine": 4}] * 2


def test_what_processes_agree_on(tmp_path: Path) -> None:
    """The first one fills the caches and gives the run its name; a signal that any of them has had is for all."""
    for rank, found in enumerate(launch(3, tmp_path / "log", ranks.agreements, tmp_path).results()):
        assert found == {"found": rank > 0, "largest": [2, 0, 5], "name": "the name that 0 has"}


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    distributed.choose_gpu(0), distributed.choose_gpu(1)
    message = refusal(distributed.choose_gpu, 2)
    assert "--use_gpu: process 3 of this machine has no GPU" in message and "--nproc_per_node 2" in message
    assert taken == [0, 1]


def test_two_runs_on_two_ranks_are_the_same_to_the_bit(tiny_flags: list[str], tmp_path: Path) -> None:
    """With dropout, which draws other numbers on each rank; metrics, best.pt and the weights at the end."""
    found = launch(
        2, tmp_path / "log", ranks.fit_twice, [*tiny_flags, "--seed", "7", "--sst_embedding_loss", "simcse"], tmp_path
    ).results()
    assert found[0][0] == 7 != found[1][0]
    assert differences(found[0][1], found[0][2]) == differences(found[0][1], found[1][2]) == []
    assert differences(*(load(tmp_path / name / "best.pt")["weights"] for name in ("a", "b"))) == []
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    assert len(metrics(tmp_path / "a")) == 2
    states = load(tmp_path / "a" / "resume.pt")["generators"]["cpu"]
    assert len(states) == 2 and not torch.equal(states[0], states[1])


def test_every_example_is_seen_once(tiny_flags: list[str], tmp_path: Path) -> None:
    """In training each example of the epoch, in evaluation each of dev, and its outputs are those of one process."""
    flags = [*tiny_flags, "--epochs", "1", "--batch_size", "9"]
    found = launch(3, tmp_path / "log", ranks.fit_and_note, flags, tmp_path / "run").results()
    for task in DEFAULT_TASKS:
        for split, size, times in (("train", 20, 1), ("dev", 12, 2)):  # the epoch and the outputs need dev
            seen = [found[rank][f"{task} {split}"] for rank in range(3)]
            assert sorted(sum(seen, [])) == sorted([*range(size)] * times)
            assert all(seen)
    trainer = make_trainer(flags, tmp_path / "alone")
    trainer.model.load_state_dict(found[0]["weights"])
    for task, data in trainer.loader.dev.items():
        alone = predict(trainer.model, data, trainer.device.device, 5)
        for rank in range(3):
            np.testing.assert_allclose(found[rank]["outputs"][task].numpy(), alone, rtol=1e-5, atol=1e-5)


def test_one_process_has_no_collectives(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_reduce", "broadcast", "barrier", "init_process_group", "broadcast_object_list"):
        monkeypatch.setattr(dist, name, lambda *a, **k: pytest.fail("a collective"))
    with distributed.joined(build_config({}, TASKS).compute) as context:
        assert context is SINGLE_PROCESS
        trainer = make_trainer(tiny_flags, tmp_path / "run", "--routine", "joint", "--pcgrad", context=context)
        trainer.fit()
    assert trainer.data_parallel is None
    assert all(module.sum_over_ranks is None for module in trainer.model.modules() if isinstance(module, BatchNorm))
    rows = torch.randn(3, 2)
    assert context.gather_rows(rows, None) is rows and context.rank_seed(5) == 5


def goes_on_to_the_same_end(flags: list[str], folder: Path) -> None:
    """Check that the run in `folder` / run goes on to the bits of a run that nothing has stopped."""
    same = launch(2, folder / "log-same", ranks.fit, flags, folder / "run", "--resume").result(1)
    whole = launch(2, folder / "log-whole", ranks.fit, flags, folder / "whole").result(1)
    assert differences(same, whole) == []
    assert len(metrics(folder / "run")) == len(metrics(folder / "whole"))


@pytest.mark.parametrize(
    "how", ["exception", "SIGTERM", *(pytest.param(n, marks=LONG) for n in ("mistake", "SIGKILL"))]
)
def test_a_rank_that_fails_under_torchrun_ends_all(tiny_flags: list[str], tmp_path: Path, how: str) -> None:
    """Within a minute, with its cause told once and a state to go on from."""
    flags, run = [*tiny_flags, "--no_tensorboard", "--epochs", "3"], tmp_path / "run"
    done = torchrun(how, *flags, "--run_dir", run, script=ranks.ROOT / "tests" / "ranks.py")
    assert time.time() - (run / "resume.pt").stat().st_mtime < 60 and done.code == 1
    told, causes = {"out": done.out, "errors": done.errors}, {
        "exception": ("errors", "ZeroDivisionError: a wrong turn"),
        "mistake": ("errors", "error: --data_dir: no such thing"),
        "SIGTERM": ("out", "stopped by SIGTERM"),
        "SIGKILL": ("errors", "error: another process has ended; its own message says why"),
    }  # fmt: skip
    stream, cause = causes[how]
    assert told[stream].count(cause) == 1, done
    assert done.errors.count("Traceback") == (how == "exception")
    progress = load(run / "resume.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == ((1, 2) if how == "SIGTERM" else (1, 0))
    assert load(run / "best.pt")["epoch"] == 1
    goes_on_to_the_same_end(flags, tmp_path)
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_another_number_of_ranks_says_what_differs(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--epochs", "3"]
    ended = launch(2, tmp_path / "log", ranks.fit_and_fail, flags, tmp_path / "run", "SIGTERM")
    assert ended.codes == [143, 143] and "Traceback" not in ended.text()
    assert ended.text().count("stopped by SIGTERM") == 1
    other = launch(3, tmp_path / "log-other", ranks.fit, flags, tmp_path / "run", "--resume")
    assert all(tensor.isfinite().all() for tensor in other.result(1).values())
    assert "2 processes began this run and 3 go on with it" in other.text(0)
    assert len(metrics(tmp_path / "run")) == 3


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--epochs", "2", "--eval_batch_size", "2"]
    ended = launch(2, tmp_path / "log", ranks.fit_and_stop_in_evaluation, flags, tmp_path / "run")
    assert ended.codes == [143, 143] and "Traceback" not in ended.text()
    progress = load(tmp_path / "run" / "resume.pt")["progress"]
    assert (progress["epoch"], progress["evaluating"]) == (2, True)
    assert load(tmp_path / "run" / "best.pt")["epoch"] == 1
    goes_on_to_the_same_end(flags, tmp_path)


def small_run(tiny_flags: list[str], run: Path) -> list[str]:
    return [*tiny_flags, "--run_dir", str(run), "--no_tensorboard"]


def check_files(run: Path, text: str, data: Path) -> None:
    """Check that two processes leave behind and print what one does."""
    assert sorted(name for name in os.listdir(run) if name != ".lock") == [
        "best.pt", "config.json", "inputs.json", "metrics.jsonl", "predictions", "scores.json", "timing.jsonl",
    ]  # fmt: skip
    assert [text.count(f"Epoch {epoch}/2") for epoch in (1, 2)] == [1, 1] and text.count("best checkpoint") == 1
    timing = json.loads((run / "timing.jsonl").read_text().splitlines()[0])
    assert timing["device"].startswith("2 x cpu")
    dev = json.loads((run / "scores.json").read_text())["dev"]
    assert dev == max((line["dev"] for line in metrics(run)), key=lambda scores: scores["score"])
    for task in DEFAULT_TASKS.values():
        ids = [line.split("\t")[1] for line in (data / task.files["dev"]).read_text().splitlines()[1:]]
        rows = (run / "predictions" / f"{task.name}-dev-output.csv").read_text().splitlines()[1:]
        assert [row.split(" , ")[0] for row in rows] == ids


def test_the_script_on_two_processes(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    words = small_run(tiny_flags, tmp_path / "run")
    ended = ranks.start(2, tmp_path / "log", lambda: multitask_classifier.main(words))
    assert ended.codes == [0, 0], ended.text()
    assert ended.text(1) == ""
    check_files(tmp_path / "run", ended.text(0), small_data)


@pytest.mark.long
def test_the_script_under_torchrun(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    """A checkpoint is evaluated on another number of processes."""
    run = tmp_path / "run"
    done = torchrun(*small_run(tiny_flags, run))
    assert done.code == 0, done.errors
    check_files(run, done.out, small_data)
    assert torchrun("--evaluate", run / "best.pt", *tiny_flags[2:4]).code == 0
    again = json.loads((run / "best-evaluation" / "scores.json").read_text())["dev"]
    assert again == json.loads((run / "scores.json").read_text())["dev"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--sst_train nowhere.csv", "error: --sst_train nowhere.csv"),
        pytest.param("--lr x", "multitask_classifier.py: error: argument --lr", marks=LONG),
        pytest.param("--run_dir FINISHED", "error: --run_dir", marks=LONG),
        pytest.param("--cache_frozen", "error: --cache_frozen", marks=LONG),
    ],
)
def test_the_first_process_alone_tells_a_mistake(
    tiny_flags: list[str], finished_runs: Path, tmp_path: Path, words: str, line: str
) -> None:
    more = words.replace("FINISHED", str(finished_runs / "sst")).split()
    done = torchrun(*small_run(tiny_flags, tmp_path / "run"), *more)
    assert done.code == 1 and done.errors.count(line) == done.errors.count("error:") == 1, done
    assert "Traceback" not in done.errors and "UserError" not in done.summary and "exitcode  : 2" in done.summary
