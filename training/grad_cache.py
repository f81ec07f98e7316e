"""Gradient cache (--micro_batch_size): a backbone takes part of a batch at a time, and the loss still sees all of it.

Nearly all memory of a training step is what the backbone keeps for the gradient. Here the sequences of a batch pass
through the backbone in parts that keep nothing. Heads and losses work on the embeddings of all parts. When the gradient
at the embeddings is known, each part is computed again, with its dropout masks (Gao et al. 2021, "Scaling deep
contrastive learning batch size under memory limited setup", section 3.2). The gradient is that of the whole batch, also
where a loss or a BatchNorm compares examples. A step takes one more pass forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.multitask_bert import MultitaskBERT
from text.packing import Batch, EncodedBatch, PackedBatch, take
from utils.device import random_state, seed_generator, set_random_state

EMBEDDINGS, LAYERS = 0, 1  # the two stages of a part that draw dropout masks


class GradCache:
    """Passes batches of more than `size` sequences through the backbones in parts.

    The dropout masks of a part are a function of the seed, the batch's number, the view and the part. A second pass of
    the same view has the same masks, as SMART needs them; SimCSE's second view has other masks.
    """

    def __init__(self, model: MultitaskBERT, size: int, seed: int, device: torch.device) -> None:
        self.model, self.size, self.seed, self.device = model, size, seed, device

    def embed(self, task: str, inputs: Batch, number: int, view: int) -> Tensor:
        """Return the sentence embeddings [S, H] of a batch; `number` counts the batches of the run before it."""
        packed = inputs.packed if isinstance(inputs, EncodedBatch) else inputs
        if packed is None or packed.num_sequences <= self.size:
            return self.model.embed(task, inputs)
        parts, order = [], []

        def run(address: tuple[int, ...], part: Batch) -> Tensor:
            if isinstance(part, PackedBatch):
                part = EncodedBatch(self.part_tokens(task, part, address), 0, part)
            with self.masks_of(*address, LAYERS):
                return self.model.embed(task, part)

        for i, stored in enumerate(self.split(packed)):
            part, rows = take(packed, stored)
            encoded = (
                EncodedBatch(inputs.hidden[rows], inputs.layers, part) if isinstance(inputs, EncodedBatch) else part
            )
            parts.append(recomputed(partial(run, (number, view, i)), encoded))
            order.append(stored)
        places = torch.from_numpy(np.argsort(np.concatenate(order))).to(packed.restore.device)
        return torch.cat(parts)[places[packed.restore]]

    def embed_tokens(self, task: str, packed: PackedBatch, number: int) -> Tensor:
        """Return the embedding output [T, H] of a batch: the one that `embed` computes in its first view."""
        if packed.num_sequences <= self.size:
            return self.model.backbone(task).embed(packed)
        parts = [take(packed, stored) for stored in self.split(packed)]
        hidden = [self.part_tokens(task, part, (number, 0, i)) for i, (part, _) in enumerate(parts)]
        return torch.cat(hidden)[torch.cat([rows for _, rows in parts]).argsort()]

    def hidden_rows(self, task: str, packed: PackedBatch, rows: Tensor, number: int) -> Tensor:
        """Return the last hidden states [M, H] at `rows` [M] of a batch."""
        if packed.num_sequences <= self.size:
            return self.model.hidden_rows(task, packed, rows)
        parts, order = [], []

        def run(address: tuple[int, ...], part: PackedBatch, rows_of_part: Tensor) -> Tensor:
            with self.masks_of(*address):
                return self.model.hidden_rows(task, part, rows_of_part)

        for i, stored in enumerate(self.split(packed)):
            part, rows_of_part = take(packed, stored)
            place = torch.full((packed.num_tokens,), -1, device=rows.device)
            place[rows_of_part] = torch.arange(len(rows_of_part), device=rows.device)
            here = (place[rows] >= 0).nonzero().flatten()
            parts.append(recomputed(partial(run, (number, 0, i)), part, place[rows[here]]))
            order.append(here)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def split(self, packed: PackedBatch) -> list[np.ndarray]:
        """Return the numbers of the stored sequences of each part.

        Every part gets each n-th sequence in order of length, so that all parts have almost as many tokens.
        """
        count = -(-packed.num_sequences // self.size)
        return [np.arange(first, packed.num_sequences, count) for first in range(count)]

    def part_tokens(self, task: str, part: PackedBatch, address: tuple[int, ...]) -> Tensor:
        """Return the embedding output [T, H] of a part."""
        with self.masks_of(*address, EMBEDDINGS):
            return self.model.backbone(task).embed(part)

    @contextmanager
    def masks_of(self, *address: int) -> Iterator[None]:
        """Draw the dropout masks of this address inside; the generator then goes on as if nothing had been drawn."""
        before = random_state(self.device)
        seed_generator(self.device, hash((self.seed, *address)) % 2**63)
        try:
            yield
        finally:
            set_random_state(self.device, before)


def recomputed(run: Callable[..., Tensor], *arguments: Batch | Tensor) -> Tensor:
    """Return what `run` returns; backward computes it again instead of keeping what it needs."""
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
