"""What runs in the processes of test_distributed.py and test_sharding.py, which start as torchrun starts them."""

import functools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, count, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

import multitask_classifier
from bert import Linear
from cli.parser import parse
from config import ComputeOptions
from datasets import TaskData, load_splits, tokenise
from kernels.embedding import WordEmbedding
from models.checkpoint import save
from models.heads import BatchNorm
from models.multitask_bert import MultitaskBERT
from optimizer import local
from tasks import TASKS
from training import distributed, smart
from training.distributed import Ranks, Reducer, World, joined, sum_rows
from training.sharding import Shards, gathered, parameters_of
from training.trainer import Trainer
from utils.console import run_script
from utils.device import Device
from utils.errors import UserError

# Forked from a process that has imported what takes long, and never run anything.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.fsdp", "tokenizers", "sklearn.metrics", "scipy.stats", "tqdm"]
)


@dataclass
class Ended:
    """How the processes ended: exit codes, what each has printed, and where their results are."""

    codes: list[int | None]
    folder: Path

    def text(self, stream: str = "err") -> str:
        """What all processes wrote to standard error (`err`) or output (`out`)."""
        return "".join((self.folder / f"{rank}.{stream}").read_text() for rank in range(len(self.codes)))

    def result(self, rank: int = 0) -> Any:
        """What the function returned in one process."""
        assert self.codes[rank] == 0, f"exit codes {self.codes}: {self.text()}"
        return torch.load(self.folder / f"{rank}.pt", weights_only=True)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def launch(size: int, folder: Path, function: Callable[..., Any], *arguments: Any, seconds: float = 300.0) -> Ended:
    """Run a function in `size` processes that wait for each other; those that are not done in time are killed."""
    folder.mkdir(parents=True)
    port = free_port()
    children = [
        CONTEXT.Process(target=_rank, args=(rank, size, port, folder, function, arguments)) for rank in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(seconds)
        if child.is_alive():
            child.kill()
            child.join()
    return Ended([child.exitcode for child in children], folder)


def _rank(rank: int, size: int, port: int, folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in {**address, "RANK": rank, "LOCAL_RANK": rank}.items()})
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    torch.set_num_threads(1)
    distributed.BUCKET_BYTES = 10_000  # so that small models have several, and one that an embedding fills alone
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run_script(functools.partial(_keep, folder / f"{rank}.pt", function), list(arguments))


def _keep(path: Path, function: Callable[..., Any], arguments: list[Any]) -> None:
    result = function(*arguments)
    if result is not None:
        torch.save(result, path)


# ----------------------------------------------------------------------------------------------------------------------


def make_trainer(
    world: World, flags: list[str], run_dir: Path, *more: object, double: bool = False, amp: torch.dtype | None = None
) -> Trainer:
    """A Trainer made from a command line as the script makes it, without TensorBoard; in float64 if `double`."""
    words = [*flags, "--no_tensorboard", "--run_dir", run_dir, *more]
    config = parse([str(word) for word in words], TASKS, "test", "Test.")
    tasks = {name: TASKS[name] for name in config.tasks}
    splits = load_splits(config.data, config.tasks, tasks, ["train", "dev"], print)
    model, tokenizer = multitask_classifier.build_model(config, tasks)
    data = tokenise(splits, tokenizer, str(config.model.pair_encoding), False, print)
    run = multitask_classifier.prepare_run(config, model, world)
    device = Device(torch.device("cpu"), amp)
    model = model.double() if double else model
    return Trainer(config, model, tokenizer, data["train"], data["dev"], device, run, multitask_classifier.say, world)


def joined_ranks(flags: list[str] | None = None) -> Any:
    """The processes that `launch` has started, of the kind that a run with these flags has, or this one alone."""
    return joined(ComputeOptions(threads=1), Shards if "--fsdp" in (flags or ()) else Ranks)


def some_steps(trainer: Trainer, number: int, freezing: str = "unfreezeall") -> dict[str, Any]:
    """Weights, losses and gradient norms of the first steps of a run."""
    trainer.model.manage_freezing(freezing)
    trainer.model.train()
    losses, norms = [], []
    epochs = (trainer.steps_of(epoch) for epoch in count())
    for step in islice(chain.from_iterable(epochs), number):
        trainer.set_rates(step.task, 0.0)
        loss, outputs, labels, norm = trainer.train_step(step, True)
        assert len(outputs) == len(labels) == len(step.indices)
        losses.append(loss.detach())
        norms.append(norm)
        trainer.step += 1
    weights = {name: own.clone() for name, own in trainer.world.weights(trainer.model).items()}
    return {"weights": weights, "losses": torch.stack(losses), "norms": torch.stack(norms)}


def train_cases(
    flags: list[str], cases: dict[str, list[Any]], folder: Path, steps: int, double: bool
) -> dict[str, Any]:
    """`some_steps` of each case, with the given further flags.

    SMART starts from noise that follows from the token and not from its place in the shard, which one process lacks.
    """
    drawn = smart.first_noise
    smart.first_noise = lambda hidden, options, step: options.smart_sigma * torch.sin(1e4 * hidden)
    try:
        with joined_ranks(flags) as world:
            return {
                name: some_steps(make_trainer(world, flags, folder / name, *more, double=double), steps)
                for name, more in cases.items()
            }
    finally:
        smart.first_noise = drawn


def summed_words() -> list[torch.Tensor]:
    """Summed gradients of word embeddings, batch after batch, and what they should be.

    Batches reach few words or most of them; the embedding fills a bucket alone, which is larger than most or is not.
    """
    out = []
    with joined_ranks() as world:
        for size, words in product((1, 10_000), (6, 80)):
            distributed.BUCKET_BYTES = size
            own, torchs = WordEmbedding(40, 3).double(), torch.nn.Embedding(40, 3).double()
            reducer = Reducer([own.weight])
            for step in range(4):
                ids = torch.randint(0, 40, (words,), generator=torch.Generator().manual_seed(10 * step + world.rank))
                for table, summing in ((own, reducer.summed("task")), (torchs, nullcontext())):
                    table.zero_grad(set_to_none=True)
                    with summing:
                        (table(ids) * known(words, 3, seed=step)).sum().backward()
                assert own.weight.grad is not None and torchs.weight.grad is not None
                out += [own.weight.grad.clone(), world.each(torchs.weight.grad).sum(0)]
    return out


def fit_twice(flags: list[str], folder: Path) -> int:
    """Two runs with all their files, one after the other; returns what this rank has seeded its generator with."""
    with joined_ranks(flags) as world:
        for name in ("a", "b"):
            trainer = make_trainer(world, flags, folder / name)
            trainer.fit()
            weights = dict(world.weights(trainer.model))
            if world.leads:
                save(folder / f"{name}.pt", {"format": 1, "weights": weights})
    return torch.initial_seed()


def fit(flags: list[str], run_dir: Path, *more: object, double: bool = False) -> dict[str, Any]:
    """A run with all its files; returns the weights at its end, with --fsdp on rank 0 only."""
    with joined_ranks(flags) as world:
        trainer = make_trainer(world, flags, run_dir, *more, double=double)
        trainer.fit()
        return dict(world.weights(trainer.model))


def sharded(model: MultitaskBERT) -> int:
    """How many tensors of the backbones are shards at present."""
    return sum(isinstance(own, DTensor) for own in model.backbones.parameters())


def held(flags: list[str], run_dir: Path, steps: int) -> dict[str, Any]:
    """How many numbers this rank holds after some steps, and how many there are; whether all is whole in `gathered`.

    And what is sharded when heads compute, before and after that; and what it holds of states that were loaded.
    """
    out: dict[str, Any] = {}
    with joined_ranks(flags) as world:
        trainer = make_trainer(world, flags, run_dir)
        backbones = list(trainer.model.backbones.parameters())
        noted: list[int] = []
        move = trainer.move

        def noting(*arguments: Any) -> Any:
            noted.append(sum(local(own.grad).numel() for own in backbones if own.grad is not None))
            return move(*arguments)

        trainer.move = noting  # type: ignore[method-assign]
        out["between"] = []
        for head in trainer.model.heads.values():
            head.register_forward_hook(lambda *given: out["between"].append(sharded(trainer.model)))
        some_steps(trainer, steps)
        out["weights"] = sum(local(own).untyped_storage().nbytes() // 4 for own in trainer.model.backbones.parameters())
        out["all"] = sum(own.numel() for own in backbones)
        out["gradients"] = noted[-1]
        (optimizer,) = trainer.optimizers.values()
        for name in ("exp_avg", "exp_inf"):
            out[name] = sum(optimizer.state[own][name].numel() for own in backbones)
        with gathered(trainer.model):
            out["gathered"] = sum(local(own).numel() for own in trainer.model.backbones.parameters())
        out["sharded"] = sharded(trainer.model)
        some_steps(trainer, 1)
        content, numbered = optimizer.state_dict(), parameters_of(optimizer)
        for number, own in content["state"].items():
            own["exp_avg"] = torch.ones(numbered[number].shape)  # as the file has it
        world.load_states(optimizer, content)
        out["loaded"] = sum(optimizer.state[own]["exp_avg"].untyped_storage().nbytes() // 4 for own in backbones)
    return out


def steps_in_half(flags: list[str], folder: Path, steps: int) -> dict[str, Any]:
    """Losses and norms of some steps under autocast with a frozen layer, and the casts of its weights that are kept."""
    out: dict[str, Any] = {}
    with joined_ranks([*flags, "--fsdp"]) as world:
        for kind in (Ranks, Shards):
            own = kind(world.rank, world.size, world.local_rank, world.pace)
            trainer = make_trainer(own, flags, folder / kind.__name__, amp=torch.bfloat16)
            found = some_steps(trainer, steps, "unfreezetop1")
            linears = [module for module in trainer.model.modules() if isinstance(module, Linear)]
            out[kind.__name__] = [found["losses"], found["norms"]]
            out[f"{kind.__name__} casts"] = sum(module.cast is not None for module in linears)
    return out


def fit_and_predict(flags: list[str], run_dir: Path, counts: tuple[int, ...]) -> dict[str, Any]:
    """A run; returns the outputs of the model at its end for the first of the dev examples, in batches of five."""
    with joined_ranks(flags) as world:
        trainer = make_trainer(world, flags, run_dir)
        trainer.fit()
        out = {}
        for (task, data), count in product(trainer.dev_data.items(), counts):
            first = data.examples.at(np.arange(count))
            few = TaskData(first, trainer.tokenizer, str(trainer.model.options.pair_encoding))
            out[f"{task} {count}"] = torch.from_numpy(world.predict(trainer.model, few, trainer.device, 5))
        return out


def fit_in_double(flags: list[str], run_dir: Path, *more: object) -> dict[str, Any]:
    """`fit` in float64."""
    return fit(flags, run_dir, *more, double=True)


def fit_and_fail(flags: list[str], run_dir: Path, how: str, rank: int, epoch: int) -> None:
    """A run in whose given epoch one rank fails at the second step."""
    with joined_ranks(flags) as world:
        trainer = make_trainer(world, flags, run_dir)
        step = trainer.train_step
        done = []

        def failing(*arguments: Any) -> Any:
            done.append(trainer.epoch == epoch)
            if world.rank == rank and sum(done) == 2:
                fail(how)
            return step(*arguments)

        trainer.train_step = failing  # type: ignore[method-assign]
        trainer.fit()


def fit_and_stop_in_evaluation(flags: list[str], run_dir: Path) -> None:
    """Train; the last rank gets SIGTERM with its first batch of the second epoch's evaluation."""
    distributed.ROUND = 1
    with joined_ranks(flags) as world:
        trainer = make_trainer(world, flags, run_dir)

        def before_batch(module: Any, batch: Any) -> None:
            if world.rank == world.size - 1 and trainer.evaluating and trainer.epoch == 2:
                fail("SIGTERM")

        trainer.model.register_forward_pre_hook(before_batch)
        trainer.fit()


def fail(how: str) -> None:
    """Fail in one of the ways that a process can."""
    if how == "exception":
        raise ZeroDivisionError("a wrong turn")
    if how == "mistake":
        raise UserError("--data_dir: no such thing")
    os.kill(os.getpid(), signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)


def fit_and_tell(flags: list[str], run_dir: Path) -> dict[str, Any]:
    """Which examples of which task this rank has trained on and evaluated, in one epoch; and the dev outputs."""
    with joined_ranks() as world:
        trainer = make_trainer(world, flags, run_dir)
        told: dict[str, list[int]] = {}
        for split in ("train", "dev"):
            for task, data in getattr(trainer, f"{split}_data").items():
                data.batch = _noted(told.setdefault(f"{task} {split}", []), data.batch)
        trainer.fit()
        outputs = {
            task: torch.from_numpy(world.predict(trainer.model, data, trainer.device, 5))
            for task, data in trainer.dev_data.items()
        }
        return {**told, "outputs": outputs, "weights": trainer.model.state_dict()}


def _noted(noted: list[int], batch: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    def noting(indices: np.ndarray) -> Any:
        noted.extend(indices.tolist())
        return batch(indices)

    return noting


def script(*words: str) -> None:
    """multitask_classifier.py."""
    multitask_classifier.main(words)


def threads() -> dict[str, int]:
    """The cores of a process that is bound to one, and the threads that it takes where there are nine."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    bound = distributed.cores()
    distributed.cores = lambda: 9
    with joined(ComputeOptions()):
        return {"bound to one": bound, "of nine": torch.get_num_threads()}


def agreements(folder: Path) -> dict[str, Any]:
    """Whether this rank found a cache filled that the first one has to fill, and what all take from one of them.

    And sums of gradients that are made in another order on the first rank.
    """
    with joined_ranks() as world:
        with world.one_first():
            found = (folder / "filled").exists()
            time.sleep(0.5 if world.leads else 0)
            (folder / "filled").touch()
        largest = world.largest(world.rank, 0, 5 - world.rank)
        agreed = world.agreed(f"the name that {world.rank} has")
        pair = [torch.nn.Parameter(torch.ones(size)) for size in (2, 3)]
        reducer, (inner, outer) = Reducer(pair), pair[:: 1 if world.leads else -1]
        for _ in range(2):
            inner.grad = outer.grad = None
            with reducer.summed("task"):
                (outer * inner.sum()).sum().backward()
        sums = [own.grad.tolist() for own in pair if own.grad is not None]
        return {"found": found, "largest": largest, "agreed": agreed, "sums": sums}


def pieces() -> dict[str, Any]:
    """What `gather` and BatchNorm make of rows that every process knows, and this rank's part of the gradients."""
    out: dict[str, Any] = {}
    with joined_ranks() as world:
        for count in (7, 2, 1):
            for texts in (1, 2):
                rows = known(count * texts, 3, seed=count)
                places = world.shard(np.arange(count), uneven(count))
                own = torch.cat([part[places] for part in rows.chunk(texts)]).requires_grad_()
                whole = world.gather(own, texts)
                whole.pow(3).sum(dim=1).logsumexp(dim=0).backward()  # all rows in each gradient
                out[f"gather {count} {texts}"] = [whole.detach(), own.grad, torch.from_numpy(places)]
        for shape in ((7, 3), (7, 3, 4), (2, 3), (1, 3), (1, 3, 4)):
            for dtype in (torch.float32, torch.float64):
                x = 1 + 2 * known(*shape, seed=1).to(dtype)
                norm = known_norm(dtype)
                norm.shared = world if world.size > 1 else None
                places = world.shard(np.arange(len(x)), uneven(len(x)))
                own = x[places].requires_grad_()
                y = norm(own, "sts")
                (y * known(*shape, seed=2).to(dtype)[places]).sum().backward()
                buffers = {name: own.clone() for name, own in norm.named_buffers()}
                rows = torch.from_numpy(places)
                out[f"norm {shape} {dtype}"] = [y.detach(), own.grad, rows, norm.weight.grad, norm.bias.grad, buffers]
    return out


def uneven(count: int) -> np.ndarray:
    """Lengths by which no shard is a run of neighbours."""
    return np.arange(count) * 5 % 7


def row_sums() -> list[torch.Tensor]:
    """What sum_rows makes of gradients: few rows, the same or others on each rank, none on some, all, NaN, zeros."""
    with joined_ranks() as world:
        out = []
        for case in range(6):
            grad = torch.zeros(40, 3, dtype=torch.float64)
            rows = ([0, 7, 39], [5 * world.rank, 7, 2], [] if world.rank else [3], range(40), [4], [])[case]
            grad[list(rows)] = known(len(rows), 3, seed=10 * case + world.rank)
            if case == 4 and world.rank == 1:
                grad[4, 2] = torch.nan
            before = grad.clone()
            sum_rows(grad)
            out += [world.each(before).sum(0), grad]
        return out


def known(*shape: int, seed: int) -> torch.Tensor:
    """The same random numbers in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known_norm(dtype: torch.dtype) -> BatchNorm:
    """A BatchNorm over three channels with scales, biases and statistics that are not those of a fresh one."""
    norm = BatchNorm(3, ("para", "sts")).to(dtype)
    with torch.no_grad():
        for i, own in enumerate([*norm.parameters(), *norm.buffers()]):
            own.copy_(known(3, seed=10 + i).abs() + 0.5)
    return norm
