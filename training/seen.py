"""What one training pass has seen, for the terms of a loss that look at more than outputs and labels."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from models.multitask_bert import MultitaskBERT
from text.packing import Batch
from training.averaging import NoAverage
from training.distributed import ONE, World


@dataclass(frozen=True)
class Seen:
    """One training pass: a batch of `task`, its sentence embeddings [S, H], the outputs and the labels [B].

    Of several processes, batch and embedding are this one's shard, outputs and labels those of all. What a term
    computes from a shard it has to `gather`, so that all processes have the same loss.

    `random_state` is the generator's before the pass, so that its dropout masks can be drawn again; `step` counts
    batches; `teacher` is the slow average of the weights that --NAME_bregman compares with.
    """

    model: MultitaskBERT
    task: str
    batch: Batch
    embedding: Tensor
    outputs: Tensor
    labels: Tensor
    random_state: Tensor | None
    step: int
    teacher: NoAverage
    world: World = ONE

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [B, ...], one for each example of the whole batch, from those of the shard; with gradient."""
        return self.world.gather(rows)

    def gather_texts(self, rows: Tensor) -> Tensor:
        """Rows [S, ...], one for each sequence of the whole batch, from those of the shard; with gradient."""
        return self.world.gather(rows, 2 if self.model.is_siamese(self.task) else 1)


Term = Callable[[Seen], Tensor]
