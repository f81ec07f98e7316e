"""Projected attention layers (PALs) and low-rank layers beside those of a backbone (Stickland and Murray 2019).

Each task has a set of them outside the backbone, so tasks that share a backbone still have some weights for themselves.
bert.py takes them as adapters and knows nothing of tasks.
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
    """One task's functions TS beside the layers of a backbone (R1, section 4.3). A layer's input is h [T, H].

    Projected attention is GELU(V_D Attention(V_E h)), without an output projection. Low-rank is V_D GELU(V_E h).
    `shared-v` has one V_E and V_D for all layers. `shared-attention` has one attention for all layers, too. `mixed` is
    shared-v in the lower half of the layers, rounded up, and low-rank above. V_D is zero at first, so the backbone
    starts unchanged. There is no dropout here, since it would change the random numbers of the backbone's dropout.
    """

    def __init__(self, options: PalOptions, config: BertConfig) -> None:
        super().__init__()
        width, depth = config.hidden_size, config.num_hidden_layers
        self.depth, self.residual = depth, options.pal_residual
        self.attending = {"low-rank": 0, "mixed": (depth + 1) // 2}.get(options.pal, depth)  # layers, from below
        self.pairs = 1 if options.pal in ("shared-v", "shared-attention", "mixed") else self.attending  # of V_E and V_D
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

    def forward(self, layer: int, hidden: Tensor, batch: PackedBatch, cls_only: bool = False) -> Tensor:
        """Return TS of a layer, counted from 0: map [T, H] to [T, H], or with `cls_only` to [S, H]."""
        if layer >= self.attending:
            encode, decode = self.encoders[layer - self.depth], self.decoders[layer - self.depth]
            return decode(F.gelu(encode(output_rows(hidden, batch, cls_only))))
        # The remainders choose the only one or that of the layer.
        encode, decode = self.encoders[layer % self.pairs], self.decoders[layer % self.pairs]
        attention = self.attentions[layer % len(self.attentions)]
        return F.gelu(decode(attention(encode(hidden), batch, cls_only)))

    def slots(self) -> list[Adapter]:
        """Return an adapter for each layer, as `BertModel.encode` takes them."""
        return [Adapter(partial(self, layer), self.residual) for layer in range(self.depth)]
