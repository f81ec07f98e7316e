"""Peers that know more than most people's loop: batches of equal lengths on a CPU, no padding on a GPU."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import PaddedBatches, PeerModel, TransformersSide, import_peer
from benchmarks.workloads import Workload, say
from datasets import TaskData
from kernels.varlen_attention import HALF, attend
from lora import LoRAConfig
from utils.errors import first_line

VARLEN = "varlen"  # the name under which transformers knows `varlen_attention`
MEGABATCH = 50  # batches that transformers sorts by length together


def grouped_by_length(batches: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    """Return batches [B] of about equally long examples, made of those of each 50 batches, in a random order.

    transformers' `train_sampling_strategy="group_by_length"` does this too. `lengths` [N] are the tokens of each
    example.
    """
    grouped: list[np.ndarray] = []
    for i in range(0, len(batches), MEGABATCH):
        together = np.concatenate(batches[i : i + MEGABATCH])
        together = together[np.argsort(lengths[together], kind="stable")]
        grouped += np.split(together, np.cumsum([len(batch) for batch in batches[i : i + MEGABATCH]])[:-1])
    return [grouped[i] for i in np.random.default_rng(0).permutation(len(grouped))]


def in_bf16(work: Workload) -> Workload:
    """Return the same work in bf16 autocast."""
    return replace(work, device=replace(work.device, amp=torch.bfloat16, scaled=False))


class GroupedSide(TransformersSide):
    """transformers on batches of equally long texts.

    The warmup has the examples of the warmup and the timed steps have those of the timed steps, so that the sums of
    seconds are for the same examples on both sides.
    """

    def __init__(self, work: Workload) -> None:
        parts = work.batches[: work.warmup], work.batches[work.warmup :]
        batches = [batch for part in parts for batch in grouped_by_length(part, work.train.lengths)]
        super().__init__(replace(work, batches=batches))
        self.upcoming = itertools.cycle(batches)

    def train_on(self, *batches: np.ndarray) -> None:
        """Make as many optimizer steps as there are `batches`, for the next batches of equal lengths."""
        super().train_on(*(next(self.upcoming) for _ in batches))

    def order(self, data: TaskData) -> np.ndarray:
        """Return the numbers of the examples [N] from the longest to the shortest."""
        return np.argsort(-data.lengths, kind="stable")


class FlattenedBatches(PaddedBatches):
    """The examples of a task; a batch has its sequences end to end, as DataCollatorWithFlattening makes them."""

    def joined(self, sequences: list[Tensor]) -> tuple[Any, ...]:
        """Return token ids and positions [1, T], the row where each sequence begins [B+1], and the longest length."""
        lengths = torch.tensor([len(tokens) for tokens in sequences])
        starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        return torch.cat(sequences)[None], positions[None], starts, int(lengths.max())


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, dropout: float = 0.0, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention inside each of the flattened sequences, as transformers asks for it.

    `query`, `key` and `value` are [1, heads, T, width], the result is [1, T, heads, width]. `options` has what the
    flattening collator says of the sequences.
    """
    starts, longest = options["cu_seq_lens_q"], options["max_length_q"]
    rows = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]  # [T, heads, width]
    if query.device.type == "cuda":
        kernel = "flash" if query.dtype in HALF else "memory-efficient"
        return attend(kernel, rows[0], rows[1], rows[2], starts, starts, longest, dropout)[None], None
    sequences = zip(*(x.split(starts.diff().tolist(), dim=2) for x in (query, key, value)), strict=True)
    parts = [F.scaled_dot_product_attention(q, k, v, dropout_p=dropout) for q, k, v in sequences]
    return torch.cat(parts, dim=2).transpose(1, 2), None


class FlattenedPeerModel(PeerModel):
    """The same model without padding."""

    attention = VARLEN

    def __init__(self, work: Workload, adapters: LoRAConfig | None) -> None:
        import_peer("transformers").AttentionInterface.register(VARLEN, varlen_attention)
        super().__init__(work, adapters)

    def pooled(self, ids: Tensor, positions: Tensor, starts: Tensor, longest: int) -> Tensor:  # type: ignore[override]
        """Return the pooled outputs [B, H] of what `FlattenedBatches` returns."""
        sequences = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        hidden = self.bert(input_ids=ids, position_ids=positions, **sequences).last_hidden_state  # [1, T, H]
        pooled: Tensor = self.bert.pooler(hidden[0, starts[:-1].long()][:, None])
        return pooled


class VarlenSide(TransformersSide):
    """transformers with FlashAttention on flattened batches. On a GPU torch compiles the backbone for training."""

    model_class = FlattenedPeerModel
    data_class = FlattenedBatches

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        self.eager = self.trained = self.model.bert
        if self.device.type == "cuda":
            self.compile_backbone()

    def compile_backbone(self) -> None:
        """Compile the backbone for any number of tokens; say so where torch cannot, and go on without."""
        self.trained = self.model.bert = torch.compile(self.eager, dynamic=True)
        try:
            with self.work.device.autocast():
                self.forward(self.work.batches[0]).sum().backward()
        except Exception as error:  # whatever the compiler raises
            say(f"the peer's backbone could not be compiled ({first_line(error)}); it runs without")
            self.trained = self.eager
        self.model.bert = self.eager
        self.optimizer.zero_grad(set_to_none=True)

    def train_on(self, *batches: np.ndarray) -> None:
        """Make an optimizer step for the examples [B] of each batch, from token ids to new weights."""
        self.model.bert = self.trained
        super().train_on(*batches)
        self.model.bert = self.eager
