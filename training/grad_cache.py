"""Out of memory in a training pass: the backbone takes the batch in parts, and the loss still sees all of it.

Nearly all memory of a pass is what a backbone keeps for the gradient. Where that does not fit, the sequences of a
batch go through the backbone in parts that keep nothing; heads and losses work on the embeddings of all of them; and
each part is computed again, under the dropout masks that it had, when the gradient at its embeddings is known
(gradient cache: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup", section
3.2). The gradient is that of the whole batch, also where the loss or a BatchNorm compares examples. What differs is
the dropout noise, since masks are drawn part by part, and the time: one more pass forward.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from config import Config
from datasets import Batches
from kernels.linear import ran_out_of_memory
from models.heads import BatchNorm
from models.multitask_bert import MultitaskBERT
from text.packing import Batch, EncodedBatch, PackedBatch, take
from training.task_sampling import Step
from utils.device import random_state, set_random_state
from utils.errors import UserError

T = TypeVar("T")


def packed_of(batch: Batch) -> PackedBatch | None:
    """What of a batch still has to go through the backbone; None where nothing has."""
    return batch.packed if isinstance(batch, EncodedBatch) else batch


def parts_of(batch: Batch, packed: PackedBatch, count: int) -> tuple[list[Batch], Tensor]:
    """The batch cut into `count` ones, and which of their sequences, one after the other, is the caller's first [S].

    Each gets every count-th sequence in order of length, so that all parts have about as many tokens.
    """
    stored = [np.arange(first, len(packed.restore), count) for first in range(count)]
    parts: list[Batch] = []
    for own in stored:
        part, rows = take(packed, own)
        parts.append(EncodedBatch(batch.hidden[rows], batch.layers, part) if isinstance(batch, EncodedBatch) else part)
    places = torch.from_numpy(np.argsort(np.concatenate(stored))).to(packed.restore.device)
    return parts, places[packed.restore]


def forget_failed_backward() -> None:
    """Free the graph of a backward pass that failed, of which torch keeps a part until the next one.

    What was ready to be computed stays in the thread's queue, and holds all that lies below it.
    """
    torch.zeros((), requires_grad=True).backward()


class Memory:
    """Runs training passes; `sizes` has, for each task of which a batch did not fit, the most sequences of a part."""

    def __init__(
        self,
        config: Config,
        model: MultitaskBERT,
        data: Mapping[str, Batches],
        device: torch.device,
        say: Callable[[str], None],
        alone: bool,
        release: Callable[[], bool],
    ) -> None:
        """`alone`: no other process waits for a part of the batch from this one; else a lack of memory only fails.

        `release` frees memory that can be done without, and says whether there was any.
        """
        self.config, self.model, self.data, self.device, self.say = config, model, data, device, say
        self.alone, self.release = alone, release
        self.parameters = list(model.parameters())
        norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.sizes: dict[str, int] = {}

    def run(self, step: Step, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, a pass of the step's batch forward and back, once it fits.

        An attempt that failed leaves nothing behind: no gradient, no statistics, no random numbers drawn. Gradients
        that wait for others of the same step are kept. Raises UserError where the batch cannot be cut any further.
        """
        if not self.alone:
            return attempt()
        state, statistics = random_state(self.device), [own.clone() for own in self.statistics]
        waiting = [(parameter, parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        self.clear_gradients()
        while (out := self.tried(step.task, attempt)) is None:
            self.clear_gradients()
            for own, before in zip(self.statistics, statistics, strict=True):
                own.copy_(before)
            set_random_state(self.device, state)
            forget_failed_backward()
            released = self.release()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if not released:
                self.halve(step)
        with torch.no_grad():
            for parameter, gradient in waiting:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return out

    def clear_gradients(self) -> None:
        """Module.zero_grad, without its walk through all modules, which takes a twentieth of a step of heads alone."""
        for parameter in self.parameters:
            parameter.grad = None

    def tried(self, task: str, attempt: Callable[[], T]) -> T | None:
        """What `attempt` returns, or None where memory ran out; then the pass and its tensors are gone."""
        try:
            with self.in_parts(task):
                return attempt()
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        return None

    def halve(self, step: Step) -> None:
        """From now on take half as many sequences of the step's task at a time."""
        task, packed = step.task, packed_of(self.data[step.task].batch(step.indices))
        title, own = self.model.tasks[task].title, self.config.tasks[task]
        if self.config.train.mlm:
            raise UserError(f"{title}: out of memory with {len(step.indices)} examples of --mlm; lower --batch_size")
        if packed is None:
            raise UserError(f"{title}: out of memory in the head; lower --batch_size")
        size = min(self.sizes.get(task, packed.num_sequences), packed.num_sequences)
        if own.smart > 0.0:
            raise UserError(
                f"{title}: out of memory with a batch of {packed.num_sequences} sequences, which --{task}_smart needs "
                "whole, since it compares passes under the same dropout masks; lower --batch_size or --max_length"
            )
        if size == 1:
            raise UserError(
                f"{title}: out of memory with a single sequence of up to {packed.max_seqlen} tokens; lower "
                "--max_length, or let less train (--fine_tune_mode last-layer, --lora_mode) of a smaller model"
            )
        self.sizes[task] = (size + 1) // 2
        self.say(
            f"{title}: a batch of {packed.num_sequences} sequences did not fit into memory; from now on the backbone "
            f"takes at most {self.sizes[task]} at a time. The gradient stays that of the whole batch, but dropout "
            "masks are others, and a step takes one more pass forward; a lower --batch_size avoids that"
        )

    @contextmanager
    def in_parts(self, task: str) -> Iterator[None]:
        """Inside, the model embeds batches of `task` in parts of the size that fits; whole where all did so far."""
        size, whole = self.sizes.get(task), self.model.embed
        if size is None:
            yield
            return

        def embed(task: str, batch: Batch) -> Tensor:
            packed = packed_of(batch)
            if packed is None or packed.num_sequences <= size:
                return whole(task, batch)
            parts, places = parts_of(batch, packed, -(-packed.num_sequences // size))
            # torch keeps the generators of the devices of an argument: hence the first one
            made = [checkpoint(lambda _, part: whole(task, part), places, part, use_reentrant=False) for part in parts]
            return torch.cat(made)[places]

        vars(self.model)["embed"] = embed  # for the loss's terms too, which embed again or ask for outputs
        try:
            yield
        finally:
            del vars(self.model)["embed"]
