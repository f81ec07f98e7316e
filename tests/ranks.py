"""What runs in the processes of tests that start several of them, as torchrun starts them or by torchrun itself."""

import faulthandler
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401  DistributedDataParallel needs it; imported once here, and not in every fork
from helpers import ROOT, first_steps, make_trainer
from processes import Child
from torch import Tensor

import multitask_classifier
from config import ComputeOptions
from models.heads import BatchNorm
from training import distributed, smart
from training.distributed import DistributedContext, joined, sum_over_ranks
from training.trainer import Trainer
from utils.console import run_script
from utils.errors import UserError

LIMIT = 900  # seconds


class Ended:
    """Exit codes of processes, what each has printed, and what its function has returned."""

    def __init__(self, codes: list[int], folder: Path) -> None:
        self.codes, self.folder = codes, folder

    def text(self, *ranks: int) -> str:
        """Return what these processes have written, or all."""
        return "".join((self.folder / f"{rank}.log").read_text() for rank in ranks or range(len(self.codes)))

    def result(self, rank: int = 0) -> Any:
        """Return what the function returned in one process."""
        assert self.codes[rank] == 0, f"exit codes {self.codes}: {self.text()}"
        return torch.load(self.folder / f"{rank}.pt", weights_only=True)

    def results(self) -> list[Any]:
        """Return what the function returned in each process."""
        return [self.result(rank) for rank in range(len(self.codes))]


def start(size: int, folder: Path, function: Callable[[], object]) -> Ended:
    """Run a function in `size` processes, which can join each other."""
    folder.mkdir(parents=True)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]

    def work(rank: int) -> None:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in {**address, "RANK": rank, "LOCAL_RANK": rank}.items()})
        faulthandler.dump_traceback_later(LIMIT, exit=True)  # if it hangs, its log says where
        run_script(lambda argv: torch.save(function(), folder / f"{rank}.pt"), [])

    children = [Child(partial(work, rank), folder / f"{rank}.log") for rank in range(size)]
    return Ended([child.wait(LIMIT + 10) for child in children], folder)


def launch(size: int, folder: Path, function: Callable[..., object], *arguments: Any) -> Ended:
    """Run a function of a DistributedContext and of `arguments` in `size` processes that are joined."""

    def joined_function() -> object:
        with joined(ComputeOptions(threads=1)) as context:
            return function(context, *arguments)

    return start(size, folder, joined_function)


@dataclass
class Torchrun:
    """How a command under torchrun ended: exit code, standard output, and standard error before torchrun's summary."""

    code: int
    out: str
    errors: str
    summary: str


def torchrun(*words: object, script: Path = ROOT / "multitask_classifier.py") -> Torchrun:
    """Run a script in two processes by the real torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)
    errors, *summary = re.split(r"^(?=[WE]\d{4} )", done.stderr, maxsplit=1, flags=re.MULTILINE)
    return Torchrun(done.returncode, done.stdout, errors, "".join(summary))


@contextmanager
def exact() -> Iterator[None]:
    """Compute losses in float64 inside, too, and let SMART start from noise that follows from the token.

    As a rule it follows from the token's place in the shard, which one process does not have.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        noise = lambda hidden, options, number: options.smart_sigma * torch.sin(1e4 * hidden)  # noqa: E731
        patch.setattr(smart, "first_noise", noise)
        yield


def train_cases(
    context: DistributedContext, flags: list[str], cases: dict[str, list[Any]], folder: Path, steps: int
) -> dict[str, Any]:
    """Return weights, losses, gradient norms and averages after some steps of each case, in float64."""
    found = {}
    with exact():
        for name, more in cases.items():
            trainer = make_trainer(flags, folder / name, *more, context=context, double=True)
            results = [result for _, result in first_steps(trainer, steps)]
            found[name] = {
                "weights": trainer.model.state_dict(),
                "average": {} if trainer.average is None else trainer.average.averages,
                "losses": torch.stack([batch.loss for result in results for batch in result.batches]),
                "norms": torch.stack([result.norm for result in results if result.norm is not None]),
            }
    return found


def gradients_of_tasks(context: DistributedContext, flags: list[str], run_dir: Path) -> list[list[Tensor | None]]:
    """Return the gradient of each batch of the first joint step, as gradient surgery gets them."""
    found: list[list[Tensor | None]] = []
    with exact():
        trainer = make_trainer(flags, run_dir, "--routine", "joint", "--pcgrad", context=context, double=True)
        trainer.project = lambda gradients: found.extend(  # type: ignore[method-assign]
            [part if use else None for part, use in zip(gradients.parts(row), reached, strict=True)]
            for row, reached in enumerate(gradients.reached)
        )
        list(first_steps(trainer, 1))
    return found


def fit(context: DistributedContext, flags: list[str], run_dir: Path, *more: object) -> dict[str, Any]:
    """Train with all files; return the weights at the end."""
    trainer = make_trainer(flags, run_dir, *more, context=context)
    trainer.fit()
    return trainer.model.state_dict()


def fit_twice(context: DistributedContext, flags: list[str], folder: Path) -> tuple[int, Any, Any]:
    """Train twice; return the seed of this rank's generator, and the weights at the end of both runs."""
    first, second = (fit(context, flags, folder / name) for name in ("a", "b"))
    return torch.initial_seed(), first, second


def fit_and_note(context: DistributedContext, flags: list[str], run_dir: Path) -> dict[str, Any]:
    """Train; return the examples that this rank has trained on and evaluated, the dev outputs, and the weights."""
    trainer = make_trainer(flags, run_dir, context=context)
    noted: dict[str, Any] = {}
    for split, by_task in (("train", trainer.loader.train), ("dev", trainer.loader.dev)):
        for task, data in by_task.items():
            data.batch = noting(noted.setdefault(f"{task} {split}", []), data.batch)  # type: ignore[method-assign]
    trainer.fit()
    outputs = {
        task: torch.from_numpy(context.predict(trainer.model, data, trainer.device, 5))
        for task, data in trainer.loader.dev.items()
    }
    return {**noted, "outputs": outputs, "weights": trainer.model.state_dict()}


def noting(noted: list[int], batch: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    """Return `batch` with a record of the indices that it gets."""

    def with_record(indices: np.ndarray) -> Any:
        noted.extend(indices.tolist())
        return batch(indices)

    return with_record


def fail(how: str) -> None:
    """Fail in one of the ways that a process can."""
    if how == "exception":
        raise ZeroDivisionError("a wrong turn")
    if how == "mistake":
        raise UserError("--data_dir: no such thing")
    os.kill(os.getpid(), signal.Signals[how])


def fail_in_second_epoch(how: str) -> None:
    """Let the last rank fail at the second step of the second epoch of whatever run is to come."""
    train_step = Trainer.train_step

    def failing(trainer: Trainer, *arguments: Any) -> Any:
        context, progress = trainer.context, trainer.progress
        if context.rank == context.size - 1 and (progress.epoch, progress.step) == (1, 1):
            fail(how)
        return train_step(trainer, *arguments)

    Trainer.train_step = failing  # type: ignore[method-assign]


def fit_and_fail(context: DistributedContext, flags: list[str], run_dir: Path, how: str) -> None:
    """Train; the last rank fails in the second epoch."""
    fail_in_second_epoch(how)
    fit(context, flags, run_dir)


def fit_and_stop_in_evaluation(context: DistributedContext, flags: list[str], run_dir: Path) -> None:
    """Train; the last rank gets SIGTERM with its first batch of the second epoch's evaluation."""
    distributed.BATCHES_BETWEEN_SIGNALS = 1
    trainer = make_trainer(flags, run_dir, context=context)

    def before_batch(module: Any, batch: Any) -> None:
        if context.rank == context.size - 1 and trainer.progress.evaluating and trainer.progress.epoch == 2:
            fail("SIGTERM")

    trainer.model.register_forward_pre_hook(before_batch)
    trainer.fit()


def threads() -> dict[str, int]:
    """Return the cores of a process that is bound to one, and the threads that it takes if there are nine."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    bound = distributed.cores()
    distributed.cores = lambda: 9
    with joined(ComputeOptions()):
        return {"bound to one": bound, "of nine": torch.get_num_threads()}


def agreements(context: DistributedContext, folder: Path) -> dict[str, Any]:
    """Return whether this rank found a cache that the first one has to fill, and what all take from one of them."""
    with context.main_process_first():
        found = (folder / "filled").exists()
        time.sleep(0.5 if context.is_main_process else 0)
        (folder / "filled").touch()
    largest = context.all_reduce_max(context.rank, 0, 5 - context.rank)
    return {"found": found, "largest": largest, "name": context.broadcast_object(f"the name that {context.rank} has")}


def batch_norms(context: DistributedContext) -> dict[str, Any]:
    """Return what BatchNorm makes of rows that every process knows, with this rank's gradients."""
    found: dict[str, Any] = {}
    for shape, dtype in product(SHAPES, (torch.float32, torch.float64)):
        x = 1 + 2 * known(*shape, seed=1).to(dtype)
        norm = known_norm(dtype)
        norm.sum_over_ranks = sum_over_ranks if context.size > 1 else None
        indices = np.arange(len(x))  # all of them in one process
        if context.size > 1:
            indices, _ = context.shard(indices, uneven(len(x)))
        rows = x[indices].requires_grad_()
        y = norm(rows, "sts")
        (y * known(*shape, seed=2).to(dtype)[indices]).sum().backward()
        parts = [norm.weight.grad, norm.bias.grad, dict(norm.named_buffers())]
        found[f"{shape} {dtype}"] = [y.detach(), rows.grad, indices.tolist(), *parts]
    return found


SHAPES: list[tuple[int, ...]] = [(7, 3), (7, 3, 4), (2, 3), (1, 3), (1, 3, 4)]  # of what BatchNorm gets


def uneven(count: int) -> np.ndarray:
    """Return lengths by which no shard is a run of neighbours."""
    return np.arange(count) * 5 % 7


def known(*shape: int, seed: int) -> Tensor:
    """Return the same random numbers in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known_norm(dtype: torch.dtype) -> BatchNorm:
    """Return a BatchNorm of three channels whose scales, biases and statistics are not those of a fresh one."""
    norm = BatchNorm(3, ("para", "sts")).to(dtype)
    with torch.no_grad():
        for i, tensor in enumerate([*norm.parameters(), *norm.buffers()]):
            tensor.copy_(known(3, seed=10 + i).abs() + 0.5)
    return norm


if __name__ == "__main__":  # in a process of torchrun: how to fail, and the words of the script
    fail_in_second_epoch(sys.argv[1])
    run_script(multitask_classifier.main, sys.argv[2:])
