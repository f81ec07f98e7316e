"""What one training pass has seen, for the terms of a loss that look at more than outputs and labels."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from multitask_bert import MultitaskBERT
from packing import Batch
from training.averaging import NoAverage


@dataclass(frozen=True)
class Seen:
    """One training pass: a batch of `task`, its sentence embeddings [S, H], the outputs and the labels [B].

    `random_state` is the generator's before the pass, so that its dropout masks can be drawn again; `step` counts
    batches; `teacher` is the slow average of the weights that --NAME_bregman compares with.
    """

    model: MultitaskBERT
    task: str
    batch: Batch
    embedding: Tensor
    outputs: Tensor
    labels: Tensor
    random_state: Tensor
    step: int
    teacher: NoAverage


Term = Callable[[Seen], Tensor]
