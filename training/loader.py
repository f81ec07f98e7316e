"""Batches on their way to the device: shards, masked words, and the next batch while a GPU computes."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
import torch
from torch import Tensor

from datasets import Batches, TaskData
from models.mlm import Masking
from text.packing import Batch, PackedBatch, pad_to_bucket, to_device
from training.distributed import DistributedContext, Shard
from training.feature_cache import FeatureCache
from training.task_sampling import Step, TaskBatch


@dataclass(frozen=True)
class LoadedBatch:
    """A batch of one task on the device that computes.

    With several processes, `inputs` holds this one's `shard`, and `labels` has the labels of the whole batch. `number`
    counts the batches of the run before this one; it seeds masks and noise. A batch for masked-LM has the packed rows
    of its masked words in `masked_rows` [M], and the words themselves in `labels` [M].
    """

    task: str
    inputs: Batch
    labels: Tensor  # [B]
    number: int
    shard: Shard | None = None
    masked_rows: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the batch."""
        rows = [] if self.masked_rows is None else [self.masked_rows]
        return [*self.inputs.tensors().values(), self.labels, *rows]


class Loader:
    """Makes batches and copies them to the device.

    While a GPU computes, `prefetch` makes the next batch on the host and copies it on a stream of its own. A CPU has
    nothing to overlap, so a batch is made when it is needed.
    """

    def __init__(
        self,
        train: Mapping[str, TaskData],
        dev: Mapping[str, TaskData],
        device: torch.device,
        seed: int,
        context: DistributedContext,
        few_shapes: bool = False,
        masking: Masking | None = None,
        feature_cache: FeatureCache | None = None,
    ) -> None:
        """With `few_shapes`, packed batches are padded to one of a few sizes; with `masking`, words are masked."""
        self.examples = train
        self.train: Mapping[str, Batches] = train if feature_cache is None else feature_cache.train
        self.dev: Mapping[str, Batches] = dev if feature_cache is None else feature_cache.dev
        self.device, self.seed, self.context = device, seed, context
        self.few_shapes, self.masking, self.feature_cache = few_shapes, masking, feature_cache
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.upcoming: deque[tuple[TaskBatch, int]] = deque()
        self.ready: tuple[TaskBatch, LoadedBatch] | None = None

    def begin_epoch(self, steps: Sequence[Step], done: int, number: int) -> None:
        """Queue the batches of an epoch's `steps`, except the first `done` steps.

        `number` counts the batches of the run before them.
        """
        if self.feature_cache is not None:
            self.feature_cache.begin_epoch(steps)
        remaining = (batch for step in steps[done:] for batch in step.batches)
        self.upcoming, self.ready = deque(zip(remaining, count(number))), None  # noqa: B905  count has no end

    def next(self, batch: TaskBatch, number: int) -> LoadedBatch:
        """Return a batch on the device; `number` counts the batches of the run before it."""
        ready, self.ready = self.ready, None
        if ready is not None and ready[0] is batch:
            loaded = ready[1]
        else:
            if self.upcoming and self.upcoming[0][0] is batch:
                self.upcoming.popleft()
            loaded = self.load(batch, number)
        if self.stream is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.stream)
            for tensor in loaded.tensors():
                tensor.record_stream(computing)  # its memory was allocated on the other stream
        return loaded

    def prefetch(self) -> None:
        """Make the next batch of the epoch while a GPU computes; a CPU does nothing."""
        if self.stream is not None and self.upcoming:
            batch, number = self.upcoming.popleft()
            self.ready = batch, self.load(batch, number)

    def load(self, batch: TaskBatch, number: int) -> LoadedBatch:
        """Return a batch whose copy to the device has begun."""
        data, (indices, shard) = self.train[batch.task], self.shard(batch)
        inputs, labels, rows = data.batch(indices), data.labels(batch.indices), None
        if self.masking is not None:
            assert isinstance(inputs, PackedBatch)
            generator = np.random.default_rng([self.seed, *b"mlm", number])  # so that a resumed run masks alike
            inputs, rows, labels = self.masking(inputs, generator)
        if self.few_shapes and isinstance(inputs, PackedBatch):
            inputs = pad_to_bucket(inputs)
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            rows = None if rows is None else to_device(rows, self.device)
            return LoadedBatch(batch.task, inputs.to(self.device), to_device(labels, self.device), number, shard, rows)

    def rank_batches(self, batches: Iterable[TaskBatch]) -> Iterator[tuple[str, Batch]]:
        """Yield the task and the inputs of this rank's shard of each batch, on the device."""
        for batch in batches:
            indices, _ = self.shard(batch)
            yield batch.task, self.train[batch.task].batch(indices).to(self.device)

    def shard(self, batch: TaskBatch) -> tuple[np.ndarray, Shard | None]:
        """Return the examples of a batch that this process passes through the model, and their places in it."""
        if self.context.size == 1:
            return batch.indices, None
        return self.context.shard(batch.indices, self.train[batch.task].lengths)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Hash of the training examples of each task in their order."""
        return {name: data.sha256() for name, data in self.examples.items()}
