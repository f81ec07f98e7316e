"""Batches on their way to the device: while a GPU computes, the next one is made and copied beside it."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from datasets import Batches
from text.packing import Batch, PackedBatch, pad_to_bucket, to_device
from training.distributed import ONE, World
from training.task_sampling import Step


class Feed:
    """Hands out the batches of steps on the device that computes.

    A GPU works through what it was given while the host goes on: `expect` makes and copies the batch of the coming
    step in that time, on a stream of its own, so that the copy waits for none of the work at hand. A CPU has nothing to
    do it beside, and makes a batch when it is taken.
    """

    def __init__(
        self, data: Mapping[str, Batches], device: torch.device, tails: bool = False, world: World = ONE
    ) -> None:
        """With `tails`, packed batches get one (see packing.pad_to_bucket); a process of several gets its shard."""
        self.data, self.device, self.tails, self.world = data, device, tails, world
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead = self.stream is not None
        self.ready: tuple[Step, Batch, Tensor] | None = None

    def expect(self, step: Step) -> None:
        """Make the batch of `step`, which is taken next."""
        if self.ahead:
            self.ready = step, *self.make(step)

    def take(self, step: Step) -> tuple[Batch, Tensor]:
        """The batch and the labels [B] of `step` on the device; of a shard, the labels of the whole batch."""
        ready, self.ready = self.ready, None
        batch, labels = ready[1:] if ready is not None and ready[0] is step else self.make(step)
        if self.stream is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.stream)
            for tensor in (*batch.tensors().values(), labels):
                tensor.record_stream(computing)  # its memory was taken on the other stream
        return batch, labels

    def make(self, step: Step) -> tuple[Batch, Tensor]:
        """The same, on their way."""
        data = self.data[step.task]
        own = self.world.shard(step.indices, data.lengths)
        batch, labels = data.batch(own), data.labels(step.indices)
        if self.tails and isinstance(batch, PackedBatch):
            batch = pad_to_bucket(batch)
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            return batch.to(self.device), to_device(labels, self.device)
