"""Projected attention layers (PALs) and low-rank layers beside a backbone's own (Stickland and Murray 2019).

They stand outside the backbone, a set for each task, so that tasks which share a backbone keep some weights for
themselves. bert.py takes them through a slot and knows nothing of tasks.
"""

from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from base_bert import init_weights
from bert import Adapter, BertSelfAttention, Linear, output_rows
from config import BertConfig, PalOptions
from text.packing import PackedBatch


class TaskAdapter(nn.Module):
    """One task's functions TS beside the layers of a backbone (R1, section 4.3), with h [T, H] a layer's input.

    Projected attention: GELU(V_D Attention(V_E h)), without an output projection. Low-rank: V_D GELU(V_E h).
    `shared-v` has one V_E and V_D for all layers, `shared-attention` one attention too; `mixed` is shared-v in the
    lower half of the layers (the larger one of an odd number) and low-rank above. V_D is zero at first, so that the
    backbone starts as it is without; for the same reason nothing is dropped out here, since that would change which
    random numbers the backbone's own dropout draws.
    """

    def __init__(self, options: PalOptions, config: BertConfig) -> None:
        super().__init__()
        width, depth = config.hidden_size, config.num_hidden_layers
        self.depth, self.residual = depth, options.pal_residual
        self.attending = {"low-rank": 0, "mixed": (depth + 1) // 2}.get(options.pal, depth)  # layers, from below
        self.pairs = 1 if options.pal in ("shared-v", "shared-attention", "mixed") else self.attending  # of their V
        sizes = [options.pal_size] * self.pairs + [options.pal_low_rank_size] * (depth - self.attending)
        self.encoders = nn.ModuleList(Linear(width, size) for size in sizes)  # V_E
        self.decoders = nn.ModuleList(Linear(size, width) for size in sizes)  # V_D
        narrow = replace(
            config,
            hidden_size=options.pal_size,
            num_attention_heads=options.pal_heads,
            attention_probs_dropout_prob=0.0,
        )
        attentions = 1 if options.pal == "shared-attention" else self.attending
        self.attentions = nn.ModuleList(BertSelfAttention(narrow) for _ in range(attentions))
        self.apply(partial(init_weights, std=config.initializer_range))
        for parameter in self.decoders.parameters():
            nn.init.zeros_(parameter)

    def forward(self, layer: int, hidden: Tensor, batch: PackedBatch, first_only: bool = False) -> Tensor:
        """TS of a layer, counted from 0: [T, H] to [T, H], or to [S, H] for the first token of each sequence only."""
        if layer >= self.attending:
            encode, decode = self.encoders[layer - self.depth], self.decoders[layer - self.depth]
            return decode(F.gelu(encode(output_rows(hidden, batch, first_only))))
        # One for all layers, or each layer's own.
        encode, decode = self.encoders[layer % self.pairs], self.decoders[layer % self.pairs]
        attention = self.attentions[layer % len(self.attentions)]
        return F.gelu(decode(attention(encode(hidden), batch, first_only)))

    def slots(self) -> list[Adapter]:
        """What `BertModel.encode` takes: an adapter for each layer."""
        return [Adapter(partial(self, layer), self.residual) for layer in range(self.depth)]
