"""Several processes (ranks) that train one model, started by torchrun: the same model as one process trains.

Each rank passes its shard of the global batch through the model. The outputs of all ranks are gathered, and every rank
computes the loss of the whole batch from them, which sends its gradient into the rank's own rows alone. So the sum of
the ranks' parameter gradients is the gradient of one process, to rounding, for every loss and for shards that differ in
size: Pearson's correlation and in-batch negatives see the whole batch, and nothing has to be weighted. Statistics of
BatchNorm are sums over all ranks in the same way. A rank whose shard is empty passes an empty batch and so takes part
in all of this.
"""

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from config import ComputeOptions
from datasets import Batches
from evaluation.predict import predict
from models.checkpoint import load_model_state_dict
from models.heads import BatchNorm
from models.multitask_bert import MultitaskBERT
from text.packing import to_device
from training import signals
from training.run_directory import RunDirectory
from utils.console import GRACE, processes
from utils.device import Device
from utils.errors import UserError, first_line

BUCKET_BYTES = 25 << 20  # of gradients that travel together; the size that torch's DistributedDataParallel has
GPU_PACE = 10  # steps of GPUs from one agreement to the next: each makes the processes wait for one another
ROUND = 32  # batches of an evaluation, over all ranks, from one look for signals to the next
POLL = 1.0  # seconds between looks whether another rank has failed


class World:
    """The processes of a run: here, this one alone."""

    rank, size, local_rank = 0, 1, 0
    pace = 1  # steps from one agreement of all processes to the next

    @property
    def leads(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0

    def named(self, device: str) -> str:
        """The name of all devices of the run, each being a `device`."""
        return device

    def seed(self, seed: int) -> int:
        """What this rank seeds a generator with whose numbers must differ between ranks; `seed` itself on rank 0."""
        return (seed + self.rank * 0x9E3779B97F4A7C15) % 2**63

    def largest(self, *numbers: int) -> Sequence[int]:
        """For each of the numbers the largest that a process has."""
        return numbers

    def agreed(self, text: str) -> str:
        """The first process's `text`, for all."""
        return text

    def one_first(self) -> AbstractContextManager[None]:
        """Inside, one process of each machine goes first, so that the others find the caches that it filled."""
        return nullcontext()

    def attach(self, model: MultitaskBERT) -> None:
        """Make `model` the same on all ranks and ready to train."""

    def shard(self, indices: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """This rank's part of the global batch `indices` [B], now the batch at hand.

        `lengths` [N] are the tokens of all examples of its split.
        """
        return indices

    def gather(self, rows: Tensor, texts: int = 1) -> Tensor:
        """The rows [B, ...] of the batch at hand from those of this rank's shard, with gradient.

        Of `texts` texts an example, all rows of first texts come before all rows of second ones.
        """
        return rows

    def each(self, own: Tensor) -> Tensor:
        """[ranks, ...], a tensor of one shape that every rank has."""
        return own[None]

    def summed(self, task: str, now: bool) -> AbstractContextManager[None]:
        """Inside, backward of a batch of `task` runs; after it, if `now`, gradients are sums over all ranks."""
        return nullcontext()

    def predict(self, model: nn.Module, data: Batches, device: Device, batch_size: int) -> np.ndarray:
        """`evaluation.predict`, each rank doing a part of it and knowing all of it afterwards."""
        return predict(model, data, device.device, batch_size, device.amp)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all these gradients together."""
        return torch.nn.utils.get_total_norm(gradients)

    # What files hold is the same for any number of ranks. All of them have to ask for it, and rank 0 gets it.

    def weights(self, model: MultitaskBERT) -> Mapping[str, Tensor]:
        """The weights and buffers of `model` by their names."""
        return model.state_dict()

    def states(self, optimizer: Optimizer) -> dict[str, Any]:
        """What an optimizer's `state_dict` returns where one process has all of it."""
        return optimizer.state_dict()

    def load(self, model: MultitaskBERT, weights: Mapping[str, Tensor], source: Path, left_out: Set[str]) -> None:
        """`load_model_state_dict` on all ranks, of the weights that rank 0 has."""
        load_model_state_dict(model, weights, source, left_out)

    def load_states(self, optimizer: Optimizer, content: Mapping[str, Any]) -> None:
        """Give an optimizer what `states` returned, which here all ranks have read."""
        optimizer.load_state_dict(dict(content))


ONE = World()


def shard(lengths: np.ndarray, rank: int, size: int) -> np.ndarray:
    """The places in a batch, ascending, that belong to a rank: as many as any other has, to one, and about the tokens.

    The step is as slow as its slowest rank: examples are dealt by their `lengths` [B], longest first, there and back.
    """
    turn = np.arange(len(lengths)) % (2 * size)
    return np.sort(np.argsort(-lengths, kind="stable")[np.minimum(turn, 2 * size - 1 - turn) == rank])


class _Gather(torch.autograd.Function):
    """The rows of all ranks. Each rank computes the same loss from them, so that no gradient has to travel back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, own: Tensor, count: int) -> Tensor:
        ctx.own = own
        whole = rows.new_zeros(count, *rows.shape[1:])
        whole[own] = rows
        dist.all_reduce(whole)  # each row is a sum with zeros, and so exact
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.own], None, None


class _Sum(torch.autograd.Function):
    """The sum over ranks of what each has. All of them use it, so that its gradient is a sum over ranks as well."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return summed_over_ranks(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return summed_over_ranks(grad)


def summed_over_ranks(own: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    total = own.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class Ranks(World):
    """The processes that torchrun started, of which this is one."""

    def __init__(self, rank: int, size: int, local_rank: int, pace: int) -> None:
        self.rank, self.size, self.local_rank, self.pace = rank, size, local_rank, pace
        self.examples = 0  # in the global batch at hand
        self.own = torch.empty(0, dtype=torch.int64)  # the places in it of this rank's shard

    def named(self, device: str) -> str:
        return f"{self.size} x {device}"

    def largest(self, *numbers: int) -> Sequence[int]:
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return list(largest.tolist())

    def agreed(self, text: str) -> str:
        texts = [text]
        dist.broadcast_object_list(texts, 0)
        return texts[0]

    @contextmanager
    def one_first(self) -> Iterator[None]:
        if self.local_rank > 0:
            dist.barrier()
        yield
        if self.local_rank == 0:
            dist.barrier()

    def attach(self, model: MultitaskBERT) -> None:
        self.broadcast(model)
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.shared = self
        self.reducer = Reducer(list(model.parameters()))

    def broadcast(self, model: nn.Module) -> None:
        """Give all ranks the weights and buffers that `model` has on rank 0."""
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)

    def shard(self, indices: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        own = shard(lengths[indices], self.rank, self.size)
        self.examples, self.own = len(indices), torch.from_numpy(own)
        return indices[own]

    def gather(self, rows: Tensor, texts: int = 1) -> Tensor:
        own = to_device(self.own, rows.device)
        wholes = [_Gather.apply(part, own, self.examples) for part in rows.chunk(texts)]
        return wholes[0] if texts == 1 else torch.cat(wholes)

    def each(self, own: Tensor) -> Tensor:
        every = own.new_zeros(self.size, *own.shape)
        every[self.rank] = own
        dist.all_reduce(every)  # sums with zeros
        return every

    def summed(self, task: str, now: bool) -> AbstractContextManager[None]:
        return self.reducer.summed(task) if now else nullcontext()

    def count(self, x: Tensor) -> int:
        """Values for each channel that all ranks together have of the batch of which `x` [b, C] or [b, C, L] is one."""
        return self.examples * x.shape[2:].numel()

    def batch_norm(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, momentum: float,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """F.batch_norm in training with the statistics of the global batch, of which `x` [b, C] or [b, C, L] is a part.

        In float64, where the mean of squares less the square of the mean loses nothing that fp32 had.
        """
        count, dims, wide = self.count(x), [0, *range(2, x.dim())], x.double()
        mean, square = _Sum.apply(torch.stack([wide.sum(dims), wide.square().sum(dims)]) / count)  # [C] each
        var = square - mean.square()
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
        shape = (-1, *[1] * (x.dim() - 2))  # of a channel's values beside x
        scale = weight * (var + eps).rsqrt()
        return (wide * scale.view(shape) + (bias - mean * scale).view(shape)).to(x.dtype)

    def predict(self, model: nn.Module, data: Batches, device: Device, batch_size: int) -> np.ndarray:
        task = data.examples.task
        outputs = torch.zeros(len(data), task.num_outputs) if task.kind == "classes" else torch.zeros(len(data))
        for rows in np.split(np.arange(len(data)), range(ROUND * batch_size, len(data), ROUND * batch_size)):
            own = rows[shard(data.lengths[rows], self.rank, self.size)]
            if len(own):
                found = predict(model, data, device.device, batch_size, device.amp, own)
                outputs[torch.from_numpy(own)] = torch.from_numpy(found)
            signals.stop(*self.largest(signals.received()))  # on all ranks at one place, or none would be left to save
        dist.all_reduce(outputs)  # sums with zeros
        return outputs.numpy()

    def load(self, model: MultitaskBERT, weights: Mapping[str, Tensor], source: Path, left_out: Set[str]) -> None:
        if self.leads:
            load_model_state_dict(model, weights, source, left_out)
        self.broadcast(model)


class Unwritten(RunDirectory):
    """The run directory of a rank that does not lead: its paths can be read, and nothing is written."""

    def write_json(self, name: str, content: Any) -> None:
        """Rank 0 does."""

    def append_json(self, name: str, content: Any) -> None:
        """Rank 0 does."""


# ----------------------------------------------------------------------------------------------------------------------
# Gradients

Bucket = list[nn.Parameter]


def buckets_of(parameters: Sequence[nn.Parameter]) -> list[Bucket]:
    """`parameters` in their order, in runs of at most BUCKET_BYTES, or of one that is larger."""
    out: list[Bucket] = []
    filled = 0
    for parameter in parameters:
        filled += parameter.nbytes
        if not out or filled > BUCKET_BYTES:
            out.append([])
            filled = parameter.nbytes
        out[-1].append(parameter)
    return out


def may_have_few_rows(grads: Sequence[Tensor]) -> bool:
    """Whether the gradients of a bucket are a large one alone, as an embedding has it: a batch reaches few of its rows.

    Not on a GPU, which the host would have to wait for to know the rows, and whose links are fast.
    """
    first = grads[0]
    return len(grads) == 1 and first.dim() == 2 and first.nbytes > BUCKET_BYTES and first.device.type == "cpu"


def sum_rows(grad: Tensor) -> None:
    """Sum a gradient [V, H] over ranks, of which only those rows travel that are not zero, where they are few."""
    own = grad.any(dim=1).nonzero().flatten()
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(own)))
    if sum(counts) > len(grad) / 2:
        dist.all_reduce(grad)
        increment_version(grad)
        return
    most = int(max(counts))
    places, rows = own.new_zeros(most), grad.new_zeros(most, grad.shape[1])  # the rest adds zeros to row 0
    places[: len(own)], rows[: len(own)] = own, grad[own]
    all_places, all_rows = [[torch.empty_like(part) for _ in counts] for part in (places, rows)]
    dist.all_gather(all_places, places)
    dist.all_gather(all_rows, rows)
    grad[own] = 0.0
    for where, what in zip(all_places, all_rows, strict=True):  # in one order on all ranks
        grad.index_add_(0, where, what)


class Reducer:
    """Sums gradients over ranks. A bucket is on its way while backward goes on with the layers below.

    Which parameters a batch of a task reaches, and in which order, is learned from its first backward, whose gradients
    travel when it is over, and again whenever it has changed, as by unfreezing. Buckets leave in one order on all
    ranks, so that sums are made in one order, too: two runs with as many ranks are the same to the bit.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.plans: dict[str, list[Bucket]] = {}  # by task
        self.hooked: set[nn.Parameter] = set()
        self.backward: Backward | None = None

    @contextmanager
    def summed(self, task: str) -> Iterator[None]:
        """Inside, a batch of `task` runs backward; after it, all gradients there are have been summed over ranks."""
        self.hook()
        plan = self.plans.get(task, [])
        self.backward = own = Backward(plan)
        yield
        self.backward = None
        having = [parameter for parameter in self.parameters if parameter.grad is not None]
        planned = {parameter for bucket in plan for parameter in bucket}
        late = [parameter for bucket in plan[own.sent :] for parameter in bucket if parameter.grad is not None]
        own.send(buckets_of([*late, *(parameter for parameter in having if parameter not in planned)]))
        own.receive()
        if set(having) != planned:
            order = dict.fromkeys([*own.made, *having])
            self.plans[task] = buckets_of(self.agreed(list(order)))

    def hook(self) -> None:
        """Hear of the gradients of all that trains now."""
        for parameter in self.parameters:
            if parameter.requires_grad and parameter not in self.hooked:
                self.hooked.add(parameter)
                parameter.register_post_accumulate_grad_hook(self.made)

    def made(self, parameter: Tensor) -> None:
        """Take note that backward has made a gradient."""
        if self.backward is not None:
            self.backward.made_gradient(parameter)

    def agreed(self, order: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """The order that rank 0 has for these parameters."""
        number = {parameter: i for i, parameter in enumerate(self.parameters)}
        numbers = torch.tensor([number[parameter] for parameter in order])
        dist.broadcast(numbers, 0)
        return [self.parameters[i] for i in numbers.tolist()]


class Backward:
    """The gradients of one backward pass on their way."""

    def __init__(self, plan: list[Bucket]) -> None:
        self.plan, self.sent = plan, 0  # buckets
        self.missing = [len(bucket) for bucket in plan]
        self.bucket_of = {parameter: i for i, bucket in enumerate(plan) for parameter in bucket}
        self.made: list[Any] = []  # parameters, in order
        self.travelling: list[tuple[Bucket, Tensor, Any]] = []

    def made_gradient(self, parameter: Any) -> None:
        """Send the buckets that are complete now; one waits for those before it."""
        self.made.append(parameter)
        if parameter in self.bucket_of:
            self.missing[self.bucket_of[parameter]] -= 1
        while self.sent < len(self.plan) and not self.missing[self.sent]:
            self.send([self.plan[self.sent]])
            self.sent += 1

    def send(self, buckets: Sequence[Bucket]) -> None:
        """Begin to sum the gradients in these buckets over ranks."""
        for bucket in buckets:
            grads = [parameter.grad for parameter in bucket if parameter.grad is not None]
            if may_have_few_rows(grads):
                self.travelling.append((bucket, grads[0], None))
                continue
            flat = torch.cat([grad.flatten() for grad in grads]) if len(grads) > 1 else grads[0].flatten()
            self.travelling.append((bucket, flat, dist.all_reduce(flat, async_op=True)))

    def receive(self) -> None:
        """Wait for the sums and give them to the parameters."""
        for bucket, flat, work in self.travelling:
            if work is None:
                sum_rows(flat)
                continue
            work.wait()
            increment_version(flat)  # the collective has written to what may be a gradient itself, unnoticed
            parts = flat.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)


# ----------------------------------------------------------------------------------------------------------------------
# Beginning and end


@contextmanager
def joined(options: ComputeOptions, kind: type[Ranks] = Ranks) -> Iterator[World]:
    """The processes that torchrun started together with this one; without torchrun, or with one process, this alone.

    Several are of the given kind.

    An error in one of them ends all: the first one to fail goes on to say why, and the others go without a word.
    Raises UserError where this machine has fewer GPUs than processes.
    """
    if processes() == 1:
        yield ONE
        return
    rank, size, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    torch.set_num_threads(options.threads or max(1, cores() // local_size))
    gpus = options.use_gpu and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    watch = Watch(dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False))
    try:
        if gpus:
            take_gpu(local_rank)
        yield kind(rank, size, local_rank, GPU_PACE if gpus else 1)
        watch.leave()
    except SystemExit:  # of all, by a signal that one of them has had
        watch.leave()
        raise
    except BaseException:
        if not watch.first_to_fail():
            watch.thread.join()  # ends this process
        raise
    dist.destroy_process_group()


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def take_gpu(local_rank: int) -> None:
    """Let each process of this machine have a GPU of its own. Raises UserError where there are too few."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"--use_gpu: process {local_rank + 1} of this machine has no GPU, there being {count}; "
            f"start torchrun with --nproc_per_node {count}"
        )
    torch.cuda.set_device(local_rank)


class Watch:
    """Ends this process when another one has failed, whatever it may be waiting for."""

    def __init__(self, store: dist.Store) -> None:
        """`store` must be a connection of its own, since one that waits for an answer blocks all that share it."""
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an earlier one's failure is no failure of this
        self.store, self.over = dist.PrefixStore(f"minbert/{attempt}", store), threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self) -> None:
        """Look for a failure until all is over; give who failed the time to say so."""
        while not self.over.wait(POLL):
            if self.failed() and not self.over.wait(GRACE):
                os._exit(1)

    def leave(self) -> None:
        """End the watch when all have come to their end: rank 0 may have a file to write, or hold the store."""
        dist.barrier()
        self.over.set()
        self.thread.join(GRACE)  # Python aborts where it ends while a thread waits for the store

    def failed(self) -> bool:
        """Whether a rank has failed, or rank 0, which holds the store, is gone."""
        try:
            return self.store.check(["failures"])
        except RuntimeError as error:
            if not self.over.is_set():  # else it has ended, as all do
                print(f"the first process cannot be reached: {first_line(error)}", file=sys.stderr, flush=True)
            return True

    def first_to_fail(self) -> bool:
        """Tell the others that this rank has failed; whether it is the first one."""
        try:
            return self.store.add("failures", 1) == 1
        except RuntimeError:
            return True
