"""The feature cache (--cache_frozen): the frozen lower layers of a backbone see every example once.

Cached features must be constant, so dropout is off in these layers. As unfreezing goes on, fewer layers are frozen; the
features that later epochs will start from are cached in the same pass. Features are dropped as soon as a layer below
them begins to train, so that they are never out of date.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bert import BertModel
from config import Config
from datasets import TaskData
from evaluation.predict import halving
from lora import merged
from models.multitask_bert import MultitaskBERT
from text.packing import Batch, EncodedBatch, PackedBatch, ragged_rows
from training import signals
from training.task_sampling import Step
from utils.console import progress
from utils.device import Device, free_memory

SHARE = 0.5  # of the memory that is free before training


@dataclass(eq=False)
class CachedFeatures:
    """The output of one layer for a split: hidden states [tokens, H], or embeddings [C, N, H] of the last.

    C counts the sequences of an example. `filled` [N] says which examples have been computed.
    """

    values: Tensor
    filled: np.ndarray


class CachedData:
    """A split of a task whose batches come out of the frozen layers; like the TaskData that it is made of otherwise."""

    def __init__(self, data: TaskData, backbone: BertModel, pooling: str, device: Device, batch_size: int) -> None:
        """`batch_size` examples of similar length go through the frozen layers together."""
        self.data, self.examples, self.lengths = data, data.examples, data.lengths
        self.backbone, self.pooling, self.device, self.batch_size = backbone, pooling, device, batch_size
        self.depth = len(backbone.bert_layers)
        self.layers = 0  # how many are frozen
        self.due = np.arange(0)  # examples that this epoch will ask for
        self.kept: dict[int, CachedFeatures] = {}  # by number of layers

    def __len__(self) -> int:
        return len(self.data)

    @property
    def title(self) -> str:
        """Return the split's name for people."""
        return f"{self.examples.task.title} {self.examples.split}"

    def labels(self, indices: np.ndarray) -> Tensor:
        """Return the examples' labels [B]."""
        return self.data.labels(indices)

    def begin_epoch(self, due: np.ndarray) -> None:
        """Find what is frozen, drop features that are no longer constant, and expect batches of the examples `due`."""
        self.layers, self.due = self.backbone.frozen_layers(), due
        self.kept = {layers: kept for layers, kept in self.kept.items() if layers <= self.layers}

    def shape(self, layers: int) -> tuple[int, ...]:
        """Return the shape of the features after so many layers."""
        width = self.backbone.config.hidden_size
        if layers == self.depth:
            return len(self.data.tokens), len(self), width
        return int(self.lengths.sum()), width

    def bytes(self, layers: int) -> int:
        """Return the bytes that these features take."""
        return int(np.prod(self.shape(layers))) * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the features: that of autocast if it is on, which halves the memory."""
        return self.device.amp or torch.float32

    def keep(self, layers: int) -> None:
        """Cache the features after so many layers from now on. The system hands out the memory as it is filled."""
        self.kept[layers] = CachedFeatures(
            torch.empty(self.shape(layers), dtype=self.dtype), np.zeros(len(self), dtype=bool)
        )

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the examples [B] as they come out of the frozen layers, or the TaskData's batch if none is frozen."""
        if not self.layers:
            return self.data.batch(indices)
        kept = self.kept.get(self.layers)
        if kept is None:
            encoded = self.compute(indices, [self.layers])[self.layers]
            return replace(encoded, hidden=encoded.hidden.to(self.dtype).float())
        if not kept.filled[indices].all():
            self.fill(np.union1d(self.due, indices))
        if self.layers == self.depth:
            chosen = kept.values.index_select(1, torch.from_numpy(indices))  # [C, B, H]
            return EncodedBatch(chosen.flatten(0, 1).float(), self.layers, None)
        packed = self.data.batch(indices)
        rows = self.rows(indices, packed)
        return EncodedBatch(kept.values.index_select(0, rows).float(), self.layers, packed)

    def rows(self, indices: np.ndarray, packed: PackedBatch) -> Tensor:
        """Return the number in the split of the token in each row of a packed batch [T]."""
        starts = self.data.first_tokens(indices)[packed.order.cpu().numpy()]
        return torch.from_numpy(ragged_rows(starts, packed.lengths.cpu().numpy()))

    def fill(self, indices: np.ndarray) -> None:
        """Compute the cached features of those of these examples that lack them."""
        missing = indices[~self.kept[self.layers].filled[indices]]
        by_length = missing[np.argsort(-self.lengths[missing], kind="stable")]
        blocks = [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        for block in progress(blocks, f"{self.title}: frozen layers", "batch", leave=False):
            signals.check()  # of a large split this takes minutes, and nothing that is saved depends on it
            halving(self.fill_block, block)

    def fill_block(self, block: np.ndarray) -> None:
        """Compute the cached features of these examples in one pass."""
        for layers, encoded in self.compute(block, self.kept).items():
            values = encoded.hidden.to("cpu", self.dtype)
            if encoded.packed is None:
                values = values.unflatten(0, (-1, len(block)))  # [C * B, H] -> [C, B, H]
                self.kept[layers].values.index_copy_(1, torch.from_numpy(block), values)
            else:
                self.kept[layers].values.index_copy_(0, self.rows(block, encoded.packed), values)
            self.kept[layers].filled[block] = True

    @torch.no_grad()
    def compute(self, indices: np.ndarray, wanted: Iterable[int]) -> dict[int, EncodedBatch]:
        """Return the examples after each number of layers in `wanted`, by one pass without dropout."""
        packed = self.data.batch(indices).to(self.device.device)
        out: dict[int, EncodedBatch] = {}
        training = self.backbone.training
        self.backbone.eval()
        try:
            with merged(self.backbone), self.device.autocast():
                hidden, done = self.backbone.embed(packed), 0
                for layers in sorted(wanted):
                    if layers == self.depth:
                        embedding = self.backbone.sentence_embedding(EncodedBatch(hidden, done, packed), self.pooling)
                        out[layers] = EncodedBatch(embedding, layers, None)
                        break
                    for layer in self.backbone.bert_layers[done:layers]:
                        hidden = layer(hidden, packed)
                    out[layers] = EncodedBatch(hidden, layers, packed)
                    done = layers
        finally:
            self.backbone.train(training)
        return out


class FeatureCache:
    """The cached features of all splits of a run, and the memory that they share."""

    def __init__(
        self,
        config: Config,
        model: MultitaskBERT,
        train: Mapping[str, TaskData],
        dev: Mapping[str, TaskData],
        device: Device,
        say: Callable[[str], None],
    ) -> None:
        size = config.compute.eval_batch_size
        self.train, self.dev = (
            {
                name: CachedData(data, model.backbone(name), model.pooling(name), device, size)
                for name, data in split.items()
            }
            for split in (train, dev)
        )
        self.all = [*self.train.values(), *self.dev.values()]
        self.say = say
        depth, epochs = model.bert_config.num_hidden_layers, range(config.train.epochs)
        self.stages = {max(0, depth - model.trainable_layers(config.train, epoch)) for epoch in epochs}
        self.budget = int(SHARE * free_memory())

    def begin_epoch(self, steps: Sequence[Step]) -> None:
        """Prepare for an epoch of these `steps`, after freezing."""
        before = [data.layers for data in self.all]
        for name, data in self.train.items():
            drawn = [batch.indices for step in steps for batch in step.batches if batch.task == name]
            data.begin_epoch(np.unique(np.concatenate(drawn)) if drawn else np.arange(0))
        for data in self.dev.values():
            data.begin_epoch(np.arange(len(data)))
        for layers in sorted({*self.stages, *(data.layers for data in self.all)}, reverse=True):
            for data in self.all:
                wanted = 0 < layers <= data.layers and layers not in data.kept
                if wanted and self.taken() + data.bytes(layers) <= self.budget:
                    data.keep(layers)
        if [data.layers for data in self.all] != before:
            self.say(self.describe())

    def taken(self) -> int:
        """Return the bytes of all cached features."""
        return sum(data.bytes(layers) for data in self.all for layers in data.kept)

    def describe(self) -> str:
        """Say for people what is frozen and what of it is cached."""
        most = max(data.layers for data in self.all)
        if not most:
            return "--cache_frozen: nothing is frozen any more; dropout is on in all layers from here on"
        lines = [
            f"--cache_frozen: the embeddings and the lowest {most} of {self.all[0].depth} layers are frozen; dropout "
            f"is off in them, and what they put out is computed once and kept ({self.taken() / 1e9:.2f} GB)"
        ]
        lines += [
            f"--cache_frozen: {data.title} would take {data.bytes(data.layers) / 1e9:.2f} GB, more than is left of "
            f"{self.budget / 1e9:.2f} GB ({SHARE:.0%} of the free memory); its frozen layers run for every batch"
            for data in self.all
            if data.layers and data.layers not in data.kept
        ]
        return "\n".join(lines)
