"""The objective: the loss of a batch, from task losses and auxiliary losses or from masked words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from config import Config
from models.multitask_bert import MultitaskBERT
from text.packing import Batch, PackedBatch
from training.averaging import MomentumModel
from training.distributed import DistributedContext
from training.grad_cache import GradCache
from training.loader import LoadedBatch
from training.losses import task_loss
from utils.device import Device, random_state


@dataclass(frozen=True)
class ForwardResult:
    """One forward pass of a training batch, for losses that look at more than outputs and labels.

    With several processes, `batch.inputs` and `embedding` are this one's shard, while `outputs` and `batch.labels` are
    those of the whole batch. A loss must `gather` what it computes from a shard, so that all processes have one loss.
    """

    objective: "Objective"
    batch: LoadedBatch
    embedding: Tensor  # [S, H], or [2B, H] for siamese pairs, first texts before second
    outputs: Tensor  # [B, classes] or [B]
    random_state: Tensor  # of the generator before the pass; from it, a loss can draw the same dropout masks again

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows [B, ...] of the whole batch, one for each example, from those of the shard."""
        return self.objective.context.gather_rows(rows, self.batch.shard)

    def gather_texts(self, rows: Tensor) -> Tensor:
        """Return the rows [S, ...] of the whole batch, one for each sequence, from those of the shard."""
        texts = 2 if self.objective.model.is_siamese(self.batch.task) else 1
        return self.objective.context.gather_rows(rows, self.batch.shard, texts)


AuxiliaryLoss = Callable[[ForwardResult], Tensor]


class Objective:
    """The loss of a batch of labelled examples: its task's loss plus the task's auxiliary losses."""

    def __init__(
        self,
        config: Config,
        model: MultitaskBERT,
        device: Device,
        context: DistributedContext,
        auxiliary_losses: Mapping[str, Sequence[AuxiliaryLoss]],
        momentum_model: MomentumModel | None = None,
        grad_cache: GradCache | None = None,
    ) -> None:
        self.config, self.model, self.device, self.context = config, model, device, context
        self.auxiliary_losses, self.momentum_model, self.grad_cache = auxiliary_losses, momentum_model, grad_cache

    def __call__(self, batch: LoadedBatch) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, and its outputs [B, classes] or [B], detached."""
        auxiliary_losses = self.auxiliary_losses[batch.task]
        state = random_state(self.device.device) if auxiliary_losses else None
        with self.device.autocast():
            embedding = self.embed(batch, batch.inputs)
            outputs = self.model.outputs(batch.task, embedding)
            if batch.shard is not None:
                outputs = self.context.gather_rows(outputs, batch.shard)
            auxiliary = []
            if state is not None:
                result = ForwardResult(self, batch, embedding, outputs, state)
                auxiliary = [auxiliary_loss(result) for auxiliary_loss in auxiliary_losses]
        return sum(auxiliary, start=self.loss_of(batch, outputs)), outputs.detach()

    def loss_of(self, batch: LoadedBatch, outputs: Tensor) -> Tensor:
        """Return the weighted loss of a batch's outputs against its labels."""
        options = self.config.tasks[batch.task]
        return options.weight * task_loss(options)(outputs, batch.labels)

    def embed(self, batch: LoadedBatch, inputs: Batch, view: int = 0) -> Tensor:
        """Return the sentence embeddings [S, H] of `inputs`.

        These are the inputs of `batch`, or what the lower part of the backbone has made of them (`EncodedBatch`). With
        --micro_batch_size, two passes of a batch have the same dropout masks if they have the same `view`.
        """
        if self.grad_cache is None:
            return self.model.embed(batch.task, inputs)
        return self.grad_cache.embed(batch.task, inputs, batch.number, view)

    def embed_tokens(self, batch: LoadedBatch) -> Tensor:
        """Return the embedding output [T, H] of a packed batch."""
        assert isinstance(batch.inputs, PackedBatch)
        if self.grad_cache is None:
            return self.model.backbone(batch.task).embed(batch.inputs)
        return self.grad_cache.embed_tokens(batch.task, batch.inputs, batch.number)


class MaskedWordObjective:
    """The loss of masked words (--mlm), without labels: Gururangan et al. 2020, "Don't stop pretraining", section 4."""

    def __init__(
        self, config: Config, model: MultitaskBERT, device: Device, grad_cache: GradCache | None = None
    ) -> None:
        self.config, self.model, self.device, self.grad_cache = config, model, device, grad_cache
        self.momentum_model = None

    def __call__(self, batch: LoadedBatch) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch's masked words in nats, and the loss of each word [M], detached."""
        assert isinstance(batch.inputs, PackedBatch) and batch.masked_rows is not None
        with self.device.autocast():
            if self.grad_cache is None:
                hidden = self.model.hidden_rows(batch.task, batch.inputs, batch.masked_rows)  # [M, H]
            else:
                hidden = self.grad_cache.hidden_rows(batch.task, batch.inputs, batch.masked_rows, batch.number)
            logits = self.model.masked_words(batch.task, hidden)  # [M, V]
        losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
        mean = losses.sum() / max(len(losses), 1)  # 0 where no word is masked
        return self.config.tasks[batch.task].weight * mean, losses.detach()
