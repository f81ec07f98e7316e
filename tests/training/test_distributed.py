"""Several processes on gloo: the model is that of one process, every example is seen once, and they fail together."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import launch
from torch import nn

from cli.parser import build_config, parse
from evaluation.predict import predict
from models.checkpoint import load
from models.heads import BatchNorm
from tasks import DEFAULT_TASKS, TASKS
from training import distributed
from training.distributed import ONE, buckets_of, shard
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
# 20 examples in batches of 9, 9 and 2: ragged shards, and in the last one some of three ranks have nothing.
EXACT = ["--batch_size", 9, "--hidden_dropout_prob", 0, "--backbone_dropout_prob", 0, "--fine_tune_mode", "full-model"]
# Adamax makes a step of the learning rate of any gradient, and coupled decay makes one of the rounding errors that are
# the gradient of a bias before BatchNorm or softmax: from 1e-18 it grows a thousandfold a step.
EXACT += [f"--{task}_weight_decay=0" for task in DEFAULT_TASKS]
CASES: dict[str, list[Any]] = {
    "sequential": ["--optim", "AdamW"],
    "interleave": ["--routine", "interleave", "--arch", "r4", "--optim", "AdamW", "--sst_weight_decay", 0.1],
    "joint, PCGrad": ["--routine", "joint", "--pcgrad", "--clip", 0.5],
    "joint": ["--routine", "joint", "--arch", "v2", "--clip", 0.5],
    "embeddings": ["--arch", "duality", "--para_embedding_loss", "contrastive", "--sts_embedding_loss", "ranking"],
    "cosine, Bregman": ["--arch", "v1", "--para_embedding_loss", "cosine", "--sst_bregman", 1, "--sts_bregman", 1],
    "LoRA, PAL": ["--lora_mode", "all-lin", "--dora", "--pal", "low-rank", "--arch", "v2"],
    "SMART": [
        "--sst_smart", 1, "--para_smart", 1, "--sts_smart", 1, "--smart_epsilon", 0.1, "--smart_eta", 0.1,
        "--smart_sigma", 0.05, "--optim", "SGD", "--batch_size", 8, "--lr", 1e-5,
    ],
    "batches of one": ["--batch_size", 19, "--shared_batchnorm_stats", "--optim", "SGD"],
}  # fmt: skip

ON_THREE = ("sequential", "interleave", "joint, PCGrad", "batches of one")  # the others would only take more time


def as_text(flags: list[Any]) -> list[str]:
    return [str(flag) for flag in flags]


# --------------------------------------------------------------------------------------------------- the same model


@pytest.fixture(scope="module")
def one_process(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cases without torchrun, in float64."""
    folder = tmp_path_factory.mktemp("one")
    return ranks.train_cases([*tiny_flags, *as_text(EXACT)], CASES, folder, STEPS, True)


@pytest.fixture(scope="module")
def by_ranks(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, ranks.Ended]:
    """The cases on 2 and 3 ranks, in float64."""
    folder = tmp_path_factory.mktemp("ranks")
    return {
        size: launch(
            size, folder / str(size), ranks.train_cases,
            [*tiny_flags, *as_text(EXACT)], {name: CASES[name] for name in own}, folder / f"runs-{size}", STEPS, True,
        )
        for size, own in ((2, CASES), (3, ON_THREE))
    }  # fmt: skip


@pytest.mark.parametrize(("size", "case"), [*((2, case) for case in CASES), *((3, case) for case in ON_THREE)])
def test_ranks_train_the_model_of_one_process(
    one_process: dict[str, Any], by_ranks: dict[int, ranks.Ended], size: int, case: str
) -> None:
    """Parameters, statistics of BatchNorm, losses and gradient norms, after 20 steps."""
    alone, found = one_process[case], by_ranks[size].result()[case]
    assert list(found["weights"]) == list(alone["weights"])
    assert alone["losses"].isfinite().all() and len(alone["losses"]) == STEPS
    for name in ("losses", "norms"):
        torch.testing.assert_close(found[name], alone[name], rtol=1e-6, atol=1e-6, equal_nan=True)
    for name, own in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], own, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_have_the_same_model(by_ranks: dict[int, ranks.Ended], size: int) -> None:
    """To the bit."""
    first = by_ranks[size].result(0)
    for rank in range(1, size):
        other = by_ranks[size].result(rank)
        for case in first:
            assert torch.equal(first[case]["losses"], other[case]["losses"])
            assert all(torch.equal(own, other[case]["weights"][name]) for name, own in first[case]["weights"].items())


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`ranks.pieces` of one process and of each of three."""
    ended = launch(3, tmp_path_factory.mktemp("pieces") / "3", ranks.pieces)
    return ranks.pieces(), [ended.result(rank) for rank in range(3)]


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("count", [7, 2, 1])
def test_gathered_rows_and_their_gradient(pieces: Any, count: int, texts: int) -> None:
    alone, found = pieces
    whole, gradient, _ = alone[f"gather {count} {texts}"]
    parts = [own[f"gather {count} {texts}"] for own in found]
    assert all(torch.equal(part[0], whole) for part in parts)
    back = in_order([part[2] for part in parts])
    by_text = [torch.cat(chunks)[back] for chunks in zip(*(part[1].chunk(texts) for part in parts), strict=True)]
    assert torch.equal(torch.cat(by_text), gradient)


def in_order(places: list[torch.Tensor]) -> torch.Tensor:
    """Which of the rows of all shards, one shard after the other, is the batch's first, its second and so on."""
    return torch.cat(places).argsort()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 4), (2, 3), (1, 3), (1, 3, 4)])
def test_synchronised_statistics_of_uneven_shards(pieces: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Outputs, all gradients and running statistics; a batch of one value has no variance on any number of ranks."""
    alone, found = pieces[0], [own[f"norm {shape} {dtype}"] for own in pieces[1]]
    y, grad, _, grad_weight, grad_bias, buffers = alone[f"norm {shape} {dtype}"]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.0, "atol": 1e-9}
    back = in_order([own[2] for own in found])
    torch.testing.assert_close(torch.cat([own[0] for own in found])[back], y, **close)
    torch.testing.assert_close(torch.cat([own[1] for own in found])[back], grad, **close)
    torch.testing.assert_close(sum(own[3] for own in found), grad_weight, **close)
    torch.testing.assert_close(sum(own[4] for own in found), grad_bias, **close)
    for name, own in buffers.items():
        torch.testing.assert_close(found[0][5][name], own, **close)
        assert torch.equal(found[0][5][name], found[2][5][name])
    changed = not torch.equal(
        buffers["running_mean_sts"], dict(ranks.known_norm(dtype).named_buffers())["running_mean_sts"]
    )
    assert changed == (shape != (1, 3))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shards_share_examples_and_tokens(count: int, size: int) -> None:
    """Each example once, in the batch's order, counts that differ by one at most, and sums by the longest example."""
    lengths = np.random.default_rng(count).integers(3, 60, count)
    parts = [shard(lengths, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    tokens = [lengths[part].sum() for part in parts]
    assert max(tokens) - min(tokens) <= lengths.max(initial=0)


def test_gradients_of_few_rows(tmp_path: Path) -> None:
    """The sum over three ranks, to the bit the same on all; NaN goes to all of them."""
    ended = launch(3, tmp_path / "rows", ranks.row_sums)
    results = [ended.result(rank) for rank in range(3)]
    for wanted, found in zip(results[0][::2], results[0][1::2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-15, equal_nan=True)
    assert [bool(found.any()) for found in results[0][1::2]] == [True] * 5 + [False]
    for other in results[1:]:
        assert all(a.equal(b) or a.isnan().any() for a, b in zip(results[0][1::2], other[1::2], strict=True))
    assert results[0][9][4].isnan().tolist() == results[2][9][4].isnan().tolist() == [False, False, True]


def test_gradients_of_words_in_the_same_memory_are_summed(tmp_path: Path) -> None:
    """No collective tells that it has written to a tensor: rows of other ranks must not stay for the next batch."""
    ended = launch(2, tmp_path / "words", ranks.summed_words)
    for rank in range(2):
        found, wanted = ended.result(rank)[::2], ended.result(rank)[1::2]
        assert len(found) == 16 and all(own.any() for own in wanted)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_buckets_keep_the_order_and_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 40)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (4, 6, 1, 30, 1, 9, 1)]
    found = buckets_of(parameters)
    assert [[len(own) for own in bucket] for bucket in found] == [[4, 6], [1], [30], [1, 9], [1]]
    assert buckets_of([]) == []


def test_gradients_leave_while_backward_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the top down, as soon as it is known what is reached: in the second pass, also after unfreezing."""
    left: list[int] = []
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 1)
    monkeypatch.setattr(dist, "all_reduce", lambda flat, async_op: left.append(len(flat)) or SimpleNamespace(wait=int))
    monkeypatch.setattr(dist, "broadcast", lambda *given: None)
    low, middle, top = parameters = [nn.Parameter(torch.randn(size)) for size in (2, 3, 4)]
    reducer = distributed.Reducer(parameters)

    def passed(summed: bool = True, upwards: bool = False) -> tuple[list[int], list[int]]:
        """The sizes of what has left when backward ends, and of what leaves after it."""
        left.clear()
        first, last = (top, low) if upwards else (low, top)
        with reducer.summed("task") if summed else nullcontext():
            (last * (middle * first.sum()).sum()).sum().backward()
            during = left.copy()
        for own in parameters:
            own.grad = None
        return during, sorted(left[len(during) :])

    low.requires_grad_(False)
    assert [passed(), passed()] == [([], [3, 4]), ([4, 3], [])]
    low.requires_grad_(True)
    assert [passed(), passed()] == [([4, 3], [2]), ([4, 3, 2], [])]
    assert passed(upwards=True) == ([4, 3, 2], [])  # each waits for those before it
    top.requires_grad_(False)
    assert passed() == ([], [2, 3])
    top.requires_grad_(True)
    assert passed(summed=False) == ([], [])  # gradients that wait for those of another task
    top.requires_grad_(False)
    assert passed() == ([3, 2], [])


def test_the_watch_has_ended_when_the_process_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that still waits for the store when Python ends makes it abort."""
    monkeypatch.setattr(distributed, "POLL", 0.01)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: None)
    watch = distributed.Watch(dist.HashStore())
    watch.failed = lambda: bool(time.sleep(0.5))  # type: ignore[method-assign]
    time.sleep(0.1)
    watch.leave()
    assert not watch.thread.is_alive()


def test_the_failure_of_an_earlier_attempt_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun --max_restarts keeps the store. Of those that fail in one attempt, one is the first."""
    store = dist.HashStore()
    for attempt in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        watch = distributed.Watch(store)
        watch.over.set()  # else its thread would end this process
        watch.thread.join()
        assert not watch.failed()
        assert [watch.first_to_fail() for _ in range(2)] == [True, False]
        assert watch.failed()


def test_a_first_process_that_is_gone_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless all is over, when it may be gone."""

    def check(keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer\nat #0")

    watch = distributed.Watch(dist.HashStore())
    watch.over.set()
    watch.thread.join()
    monkeypatch.setattr(watch, "store", SimpleNamespace(check=check))
    assert watch.failed() and capsys.readouterr().err == ""
    watch.over.clear()
    assert watch.failed()
    assert capsys.readouterr().err == "the first process cannot be reached: Connection reset by peer\n"


def test_processes_of_one_machine_share_its_cores(tmp_path: Path) -> None:
    """Those that they may use, where --threads says nothing."""
    ended = launch(2, tmp_path / "threads", ranks.threads)
    assert [ended.result(rank) for rank in range(2)] == [{"bound to one": 1, "of nine": 4}] * 2


def test_what_processes_agree_on(tmp_path: Path) -> None:
    """The first one fills the caches and gives the run its name; a signal that any of them has had is for all."""
    ended = launch(3, tmp_path / "log", ranks.agreements, tmp_path)
    for rank in range(3):
        wanted = {"found": rank > 0, "largest": [2, 0, 5], "agreed": "the name that 0 has"}
        assert ended.result(rank) == {**wanted, "sums": [[9.0] * 2, [6.0] * 3]}


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    distributed.take_gpu(0), distributed.take_gpu(1)
    with pytest.raises(UserError, match="--use_gpu: process 3 of .* no GPU, there being 2; .* --nproc_per_node 2"):
        distributed.take_gpu(2)
    assert taken == [0, 1]


# ------------------------------------------------------------------------------------------ repeated, and complete


def test_two_runs_on_two_ranks_are_the_same_to_the_bit(tiny_flags: list[str], tmp_path: Path) -> None:
    """With dropout, which draws other numbers on each rank; metrics, best.pt and the weights at the end."""
    ended = launch(2, tmp_path / "log", ranks.fit_twice, [*tiny_flags, "--seed", "7"], tmp_path)
    assert ended.result(0) == 7 != ended.result(1)
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab"]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 2
    for files in (("a.pt", "b.pt"), ("a/best.pt", "b/best.pt")):
        first, second = (load(tmp_path / name)["weights"] for name in files)
        assert all(torch.equal(own, second[name]) for name, own in first.items())
    states = load(tmp_path / "a" / "resume.pt")["generators"]["cpu"]
    assert len(states) == 2 and not torch.equal(states[0], states[1])


def test_every_example_is_seen_once(tiny_flags: list[str], tmp_path: Path) -> None:
    """In training each example of the epoch, in evaluation each of dev, and its outputs are those of one process."""
    flags = [*tiny_flags, "--epochs", "1", "--batch_size", "9"]
    ended = launch(3, tmp_path / "log", ranks.fit_and_tell, flags, tmp_path / "run")
    found = [ended.result(rank) for rank in range(3)]
    for task in DEFAULT_TASKS:
        for split, size in (("train", 20), ("dev", 12)):
            seen = [found[rank][f"{task} {split}"] for rank in range(3)]
            times = 1 if split == "train" else 2  # of dev once by the epoch and once for the outputs
            assert sorted(sum(seen, [])) == sorted([*range(size)] * times)
            assert all(seen)
    trainer = ranks.make_trainer(ONE, flags, tmp_path / "alone")
    trainer.model.load_state_dict(found[0]["weights"])
    for task, data in trainer.dev_data.items():
        alone = predict(trainer.model, data, trainer.device.device, 5)
        for rank in range(3):
            np.testing.assert_allclose(found[rank]["outputs"][task].numpy(), alone, rtol=1e-5, atol=1e-5)


def test_one_process_has_no_collectives(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of torch.distributed is called, and nothing hangs on the parameters."""
    for name in ("all_reduce", "broadcast", "barrier", "init_process_group", "TCPStore"):
        monkeypatch.setattr(dist, name, lambda *a, **k: pytest.fail("a collective"))
    with distributed.joined(build_config({}, TASKS).compute) as world:
        assert world is ONE
        trainer = ranks.make_trainer(world, tiny_flags, tmp_path / "run", "--routine", "joint", "--pcgrad")
        trainer.fit()
    assert all(not own._post_accumulate_grad_hooks for own in trainer.model.parameters())
    assert all(own.shared is None for own in trainer.model.modules() if isinstance(own, BatchNorm))
    rows = torch.randn(3, 2)
    assert ONE.gather(rows) is rows and ONE.seed(5) == 5


# ---------------------------------------------------------------------------------------------------------- failing


def failed(tiny_flags: list[str], folder: Path, how: str, size: int = 2) -> tuple[ranks.Ended, float]:
    """A run of three epochs in the second of which the last rank fails, and the seconds that it took to end."""
    started = time.monotonic()
    flags = [*tiny_flags, "--epochs", "3"]
    ended = launch(size, folder / "log", ranks.fit_and_fail, flags, folder / "run", how, size - 1, 1)
    return ended, time.monotonic() - started


def check_failure(ended: ranks.Ended, seconds: float, how: str) -> None:
    """All have ended in time, the one that failed says why, once, and no other says anything."""
    assert seconds < 60 and all(code not in (0, None) for code in ended.codes)
    text = ended.text()
    if how == "exception":
        assert text.count("ZeroDivisionError: a wrong turn") == 1 and text.count("Traceback") == 1
        assert "in fail" in text  # where it happened
    if how == "mistake":
        assert text.count("error: --data_dir: no such thing\n") == 1 and "Traceback" not in text
        assert ended.codes[-1] == 2
    if how == "SIGKILL":
        assert ended.codes[-1] == -9 and text.count("Traceback") == 1
    run = ended.folder.parent / "run"
    assert load(run / "resume.pt")["epoch"] == 1 and load(run / "best.pt")["epoch"] == 1


def test_an_exception_on_one_rank_ends_all_and_the_run_goes_on_from_there(
    tiny_flags: list[str], tmp_path: Path
) -> None:
    """On as many ranks it ends with the bits of a run without the failure, on others it says what differs."""
    ended, seconds = failed(tiny_flags, tmp_path, "exception")
    check_failure(ended, seconds, "exception")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    flags = [*tiny_flags, "--epochs", "3"]
    jobs = {
        "whole": (2, tmp_path / "whole"),
        "same": (2, tmp_path / "run", "--resume"),
        "other": (3, tmp_path / "other", "--resume"),
    }
    with ThreadPoolExecutor() as pool:
        running = {
            name: pool.submit(launch, size, tmp_path / f"log-{name}", ranks.fit, flags, *more)
            for name, (size, *more) in jobs.items()
        }
        found = {name: job.result() for name, job in running.items()}
    whole, same, other = (found[name].result(1) for name in jobs)
    assert all(torch.equal(own, same[name]) for name, own in whole.items())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert "2 processes began this run and 3 go on with it" in found["other"].text("out")
    assert all(own.isfinite().all() for own in other.values())
    assert len((tmp_path / "other" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.long
@pytest.mark.parametrize("how", ["mistake", "SIGKILL"])
def test_a_rank_that_ends_otherwise_ends_all(tiny_flags: list[str], tmp_path: Path, how: str) -> None:
    check_failure(*failed(tiny_flags, tmp_path, how), how)


@pytest.mark.long
def test_a_signal_to_one_rank_saves_and_ends_all(tiny_flags: list[str], tmp_path: Path) -> None:
    """After the step at hand; the run goes on to the bits that it would have had."""
    ended, seconds = failed(tiny_flags, tmp_path, "SIGTERM")
    assert seconds < 60 and ended.codes == [143, 143] and "Traceback" not in ended.text()
    assert ended.text("out").count("stopped by SIGTERM") == 1
    assert load(tmp_path / "run" / "resume.pt")["step"] == 11
    flags = [*tiny_flags, "--epochs", "3"]
    same = launch(2, tmp_path / "log-same", ranks.fit, flags, tmp_path / "run", "--resume").result(1)
    whole = launch(2, tmp_path / "log-whole", ranks.fit, flags, tmp_path / "whole").result(1)
    assert all(torch.equal(own, same[name]) for name, own in whole.items())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--epochs", "2", "--eval_batch_size", "2"]
    ended = launch(2, tmp_path / "log", ranks.fit_and_stop_in_evaluation, flags, tmp_path / "run")
    assert ended.codes == [143, 143] and "Traceback" not in ended.text()
    state = load(tmp_path / "run" / "resume.pt")
    assert (state["epoch"], state["evaluating"]) == (2, True)
    assert load(tmp_path / "run" / "best.pt")["epoch"] == 1
    same = launch(2, tmp_path / "log-same", ranks.fit, flags, tmp_path / "run", "--resume").result(1)
    whole = launch(2, tmp_path / "log-whole", ranks.fit, flags, tmp_path / "whole").result(1)
    assert all(torch.equal(own, same[name]) for name, own in whole.items())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------------------------------------------------- the script


def small_run(tiny_flags: list[str], run: Path) -> list[str]:
    return [*tiny_flags, "--run_dir", str(run), "--no_tensorboard"]


def check_files(run: Path, text: str, data: Path) -> None:
    """What two processes leave behind and print is what one does."""
    assert sorted(name for name in os.listdir(run) if name != ".lock") == [
        "best.pt", "config.json", "metrics.jsonl", "predictions", "scores.json", "timing.jsonl",
    ]  # fmt: skip
    assert [text.count(f"Epoch {epoch}/2") for epoch in (1, 2)] == [1, 1] and text.count("best checkpoint") == 1
    timing = json.loads((run / "timing.jsonl").read_text().splitlines()[0])
    assert timing["device"].startswith("2 x cpu")
    dev = json.loads((run / "scores.json").read_text())["dev"]
    assert dev == max((json.loads(line)["dev"] for line in (run / "metrics.jsonl").read_text().splitlines()),
                      key=lambda own: own["score"])  # fmt: skip
    for task in DEFAULT_TASKS.values():
        ids = [line.split("\t")[1] for line in (data / task.files["dev"]).read_text().splitlines()[1:]]
        rows = (run / "predictions" / f"{task.name}-dev-output.csv").read_text().splitlines()[1:]
        assert [row.split(" , ")[0] for row in rows] == ids


def test_the_script_on_two_processes(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    flags = small_run(tiny_flags, tmp_path / "run")
    ended = launch(2, tmp_path / "log", ranks.script, *flags)
    assert ended.codes == [0, 0], ended.text()
    assert (tmp_path / "log" / "1.out").read_text() == (tmp_path / "log" / "1.err").read_text() == ""
    check_files(tmp_path / "run", ended.text("out"), small_data)


@pytest.mark.long
def test_torchrun_and_its_ways_to_fail(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    """One line for each mistake, whichever rank finds it; and a checkpoint is evaluated on other numbers of ranks."""

    def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        return subprocess.run([*command, str(ROOT / "multitask_classifier.py"), *words], capture_output=True, text=True)

    run = tmp_path / "run"
    flags = small_run(tiny_flags, run)
    done = torchrun(*flags)
    assert done.returncode == 0, done.stderr
    check_files(run, done.stdout, small_data)
    assert torchrun("--evaluate", str(run / "best.pt"), *tiny_flags[2:4]).returncode == 0
    again = json.loads((run / "best-evaluation" / "scores.json").read_text())["dev"]
    assert again == json.loads((run / "scores.json").read_text())["dev"]
    for words, line in (
        (flags, "error: --run_dir"),
        ([*flags, "--overwrite", "--lr", "x"], "multitask_classifier.py: error: argument --lr"),
        ([*flags, "--overwrite", "--sst_train", "nowhere.csv"], "error: --sst_train nowhere.csv"),
        (["--evaluate", str(run / "best.pt"), "--predict", "-", "--task", "sst"], "error: --predict works in one"),
        ([*flags, "--overwrite", "--cache_frozen"], "error: --cache_frozen"),
    ):
        done = torchrun(*words)
        assert done.returncode != 0 and done.stderr.count(line) == 1, done.stderr
        assert "UserError" not in done.stderr


@pytest.mark.long
def test_the_benchmark_of_scaling(tiny_bert: Path, sample: Path, tmp_path: Path) -> None:
    """Every step of each number of processes; both share the same batches."""
    flags = [
        "--modes",
        "scaling",
        "--ranks",
        "1,2",
        "--tasks",
        "sst",
        "--steps",
        "3",
        "--warmup",
        "1",
        "--threads",
        "1",
    ]
    flags += ["--pretrained", str(tiny_bert), "--data_dir", str(sample), "--out", str(tmp_path), "--batch_size", "16"]
    done = subprocess.run([sys.executable, str(ROOT / "benchmark.py"), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    (record,) = json.loads(path.read_text())["results"]
    assert {ranks: len(seconds) for ranks, seconds in record["seconds"].items()} == {"1": 3, "2": 3}
    assert done.stdout.count("scaling sst, batch 16: ") == 2 and "efficiency 100%" in done.stdout


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_the_rate_can_follow_the_batch(tiny_flags: list[str], tmp_path: Path, scaling: str, factor: float) -> None:
    """256 examples a step, four times R0's 64."""
    more = ["--batch_size", 256, "--lr_scaling", scaling, "--lr_schedule", "constant", "--routine", "joint"]
    trainer = ranks.make_trainer(ONE, tiny_flags, tmp_path / "run", *more)
    groups = {group["tasks"]: group["lr"] for group in trainer.optimizers["joint"].param_groups}
    assert groups[("sst",)] == pytest.approx(1e-3 * 4 * factor)
    assert trainer.set_rates("sst", 0.0) == pytest.approx(1e-3 * 4 * factor)
    assert {group["tasks"]: group["lr"] for group in trainer.optimizers["joint"].param_groups} == groups


@pytest.mark.parametrize("words", [["--evaluate", "a.pt", "--predict", "-", "--task", "sst"], ["--cache_frozen"]])
def test_what_needs_one_process_is_refused(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    flag = next(word for word in words if word in ("--predict", "--cache_frozen"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    parse(words, TASKS, "test", "Test.")  # the variables alone do not make a torchrun
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"{flag} .*torchrun"):
        parse(words, TASKS, "test", "Test.")
