"""Several processes (ranks), started by torchrun, train the model that one process trains.

Each rank passes its shard of the global batch through the model. The outputs of all ranks are gathered, so that every
rank computes the loss of the whole batch; its gradient flows into the rank's own rows only. The sum of the ranks'
gradients is therefore the gradient of one process, for every loss and for shards of different sizes. torch's
DistributedDataParallel averages gradients over ranks, so the loss is multiplied by their number.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import ComputeOptions
from datasets import Batches
from evaluation.predict import predict
from models.heads import BatchNorm
from models.multitask_bert import MultitaskBERT
from text.packing import to_device
from training import signals
from training.task_sampling import Step, TaskBatch
from utils.console import processes
from utils.device import Device
from utils.errors import UserError

STEPS_BETWEEN_SYNCS = 10  # on GPUs: asking all ranks for signals makes their hosts wait for one another
BATCHES_BETWEEN_SIGNALS = 32  # of an evaluation, over all ranks


@dataclass(frozen=True)
class Shard:
    """The part of a global batch that one rank has."""

    places: Tensor  # [b] int64, the places of the rank's examples in the global batch
    batch_size: int  # B, examples of the global batch


@dataclass(frozen=True)
class DistributedContext:
    """The processes of a run, and which of them this one is. By default there is only this one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    steps_between_syncs: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def device_names(self, device: str) -> str:
        """Return the name of all devices of the run, each of which is a `device`."""
        return device if self.size == 1 else f"{self.size} x {device}"

    def rank_seed(self, seed: int) -> int:
        """Return a seed for numbers that must differ between ranks; rank 0 gets `seed` itself."""
        return (seed + self.rank * 0x9E3779B97F4A7C15) % 2**63

    def all_reduce_max(self, *numbers: int) -> Sequence[int]:
        """Return, for each of the numbers, the largest that any rank has."""
        if self.size == 1:
            return numbers
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return list(largest.tolist())

    def broadcast_object(self, text: str) -> str:
        """Return the main process's `text` on all ranks."""
        texts = [text]
        if self.size > 1:
            dist.broadcast_object_list(texts, 0)
        return texts[0]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, which must have one shape, as one tensor [ranks, ...]."""
        stacked = tensor.new_zeros(self.size, *tensor.shape)
        stacked[self.rank] = tensor
        if self.size > 1:
            dist.all_reduce(stacked)  # the other ranks add zeros
        return stacked

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let one process of each machine go first inside. The others then find the caches that it has filled."""
        if self.size > 1 and self.local_rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.local_rank == 0:
            dist.barrier()

    def prepare(self, model: MultitaskBERT) -> None:
        """Give all ranks the main process's weights, and let batch normalisation see the batches of all ranks."""
        if self.size == 1:
            return
        self.broadcast_weights(model)
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.sum_over_ranks = sum_over_ranks

    def broadcast_weights(self, model: nn.Module) -> None:
        """Give all ranks the weights and buffers that `model` has in the main process."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def shard(self, indices: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, Shard]:
        """Return the examples [b] of the global batch `indices` [B] that this rank passes through the model.

        `lengths` [N] counts the tokens of all examples of the split.
        """
        places = shard_places(lengths[indices], self.rank, self.size)
        return indices[places], Shard(torch.from_numpy(places), len(indices))

    def gather_rows(self, rows: Tensor, shard: Shard | None, texts: int = 1) -> Tensor:
        """Return the rows [texts * B, ...] of the global batch from those [texts * b, ...] of this rank's shard.

        Gradients flow back into the rank's own rows. If an example has several `texts`, the rows of all first texts
        stand before those of all second ones.
        """
        if shard is None:
            return rows
        places = to_device(shard.places, rows.device)
        return torch.cat([_GatherRows.apply(part, places, shard.batch_size) for part in rows.chunk(texts)])

    def predict(self, model: nn.Module, data: Batches, device: Device, batch_size: int) -> np.ndarray:
        """Return what `evaluation.predict.predict` returns; each rank computes a part, and all ranks get the whole.

        Every example is predicted once. A signal ends all ranks at the same place.
        """
        if self.size == 1:
            return predict(model, data, device.device, batch_size, device.amp)
        task = data.examples.task
        outputs = torch.zeros(len(data), task.num_outputs) if task.kind == "classes" else torch.zeros(len(data))
        block = BATCHES_BETWEEN_SIGNALS * batch_size
        for rows in np.split(np.arange(len(data)), range(block, len(data), block)):
            rows_here = rows[shard_places(data.lengths[rows], self.rank, self.size)]
            if len(rows_here):
                found = predict(model, data, device.device, batch_size, device.amp, rows_here)
                outputs[torch.from_numpy(rows_here)] = torch.from_numpy(found)
            signals.stop(*self.all_reduce_max(signals.received()))
        dist.all_reduce(outputs)  # every row is zero on all ranks but one
        return outputs.numpy()


SINGLE_PROCESS = DistributedContext()


def shard_places(lengths: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Return the places in a batch, ascending, that belong to a rank.

    The slowest rank decides how long a step takes. Examples are therefore dealt by their `lengths` [B], the longest
    first, to the ranks in turn and back again: all ranks get almost the same number of examples and of tokens.
    """
    turn = np.arange(len(lengths)) % (2 * size)
    return np.sort(np.argsort(-lengths, kind="stable")[np.minimum(turn, 2 * size - 1 - turn) == rank])


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks. Every rank computes the same loss from them, so no gradient has to travel back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, batch_size: int) -> Tensor:
        ctx.places = places
        gathered = rows.new_zeros(batch_size, *rows.shape[1:])
        gathered[places] = rows
        dist.all_reduce(gathered)  # exact: every row is zero on all ranks but one
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.places], None, None


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks. All ranks use it, so its gradient is a sum over ranks too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _all_reduced(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all_reduced(grad)


def _all_reduced(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, with gradient."""
    return _SumOverRanks.apply(tensor)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients

Loss = Callable[..., tuple[Tensor, Tensor]]  # of a batch: loss and outputs


class LossModule(nn.Module):
    """A loss as a module over the parameters that it reaches: the form that DistributedDataParallel needs."""

    def __init__(self, loss: Loss, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.loss, self.reached = loss, nn.ParameterList(parameters)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the loss and the outputs of a batch."""
        return self.loss(batch)


class DataParallelLoss:
    """A loss whose gradients are averaged over ranks as backward computes them."""

    def __init__(self, loss: Loss, model: MultitaskBERT, one_wrapper: bool) -> None:
        """Wrap the loss once for each backbone or, with `one_wrapper`, once for all tasks.

        A wrapper sends the gradients of all its parameters, and has memory for them, whether a batch reaches them or
        not. Wrappers for each backbone therefore send and hold no backbone's gradients twice. But only a wrapper for
        all tasks can add up the gradients of several tasks before it sends the sum.
        """
        self.loss, self.model, self.one_wrapper = loss, model, one_wrapper
        self.wrappers: dict[str, Any] = {}

    def rebuild(self) -> None:
        """Wrap what trains now. This is needed at the start and whenever freezing has changed.

        A task that reaches nothing that trains has the loss itself, since its batches have no gradient.
        """
        reached = {name: self.model.task_parameters(name) for name in self.model.tasks}
        self.wrappers = dict.fromkeys(reached, self.loss)
        groups: dict[str, list[str]] = {}
        for name, parameters in reached.items():
            if any(parameter.requires_grad for parameter in parameters):
                groups.setdefault("" if self.one_wrapper else self.model.backbone_of[name], []).append(name)
        for names in groups.values():
            everything = dict.fromkeys(parameter for name in names for parameter in reached[name])
            wrapper = DistributedDataParallel(
                LossModule(self.loss, everything),
                gradient_as_bucket_view=True,
                find_unused_parameters=len(names) > 1,  # a batch of one task does not reach the heads of the others
            )
            self.wrappers |= dict.fromkeys(names, wrapper)

    def last_trained(self, step: Step) -> TaskBatch | None:
        """Return the last batch of a step that has a gradient; None if no batch has one."""
        return next((batch for batch in reversed(step.batches) if self.wrappers[batch.task] is not self.loss), None)

    def __call__(self, task: str, batch: Any, reduce: bool) -> tuple[Tensor, Tensor]:
        """Return the loss and the outputs of a batch; without `reduce`, gradients wait for those of later batches."""
        wrapper = self.wrappers[task]
        waits = isinstance(wrapper, DistributedDataParallel) and not reduce
        with wrapper.no_sync() if waits else nullcontext():
            return wrapper(batch)


# ----------------------------------------------------------------------------------------------------------------------
# Beginning and end


@contextmanager
def joined(options: ComputeOptions) -> Iterator[DistributedContext]:
    """Join the processes that torchrun started together with this one; without torchrun, there is this one alone.

    If one process fails, torchrun ends the others. Raises UserError if this machine has fewer GPUs than processes.
    """
    if processes() == 1:
        yield SINGLE_PROCESS
        return
    rank, size, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    torch.set_num_threads(options.threads or max(1, cores() // local_size))
    gpus = options.use_gpu and torch.cuda.is_available()
    if gpus:
        choose_gpu(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    yield DistributedContext(rank, size, local_rank, STEPS_BETWEEN_SYNCS if gpus else 1)
    dist.barrier()  # the main process may still have a file to write
    # No DistributedDataParallel of the caller may be left: as the last owner of the processes' group, it would hold the
    # GIL while it waits for a thread of the group that may wait for the GIL.
    dist.destroy_process_group()


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_gpu(local_rank: int) -> None:
    """Give each process of this machine a GPU of its own. Raises UserError if there are too few."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"--use_gpu: process {local_rank + 1} of this machine has no GPU, since there are {count}; "
            f"start torchrun with --nproc_per_node {count}"
        )
    torch.cuda.set_device(local_rank)
