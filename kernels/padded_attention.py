"""Attention over sequences that keep their padding, in plain operators that --export_onnx can write down."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from text.packing import PackedBatch


@dataclass(frozen=True)
class PaddedBatch(PackedBatch):
    """S sequences in the caller's order that keep their padding, so that each has L rows and T is S * L.

    What is computed from padding reaches no token, since attention leaves it out.
    """

    mask: Tensor = field(kw_only=True)  # [S, L], not 0 at tokens


def keep_padding(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> PaddedBatch:
    """Return the PaddedBatch of padded tensors [S, L].

    Positions and starts are computed from a tensor, so that a trace makes them anew for inputs of another size.
    """
    ones = torch.ones_like(input_ids)
    every = torch.arange(len(input_ids))
    return PaddedBatch(
        input_ids=input_ids.flatten(),
        token_type_ids=token_type_ids.flatten(),
        position_ids=(ones.cumsum(1) - 1).flatten(),
        cu_seqlens=F.pad(ones.sum(1).cumsum(0), (1, 0)),
        max_seqlen=input_ids.shape[1],
        order=every,
        restore=every,
        sizes=np.full(len(input_ids), input_ids.shape[1]),
        mask=attention_mask,
    )


def padded_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(width)) v inside each sequence, without the keys where `mask` [S, L] is 0.

    `key` and `value` are [S * L, H]. `query` and the result are [S * L, H], or [S, H] with one query for each sequence.
    """
    width = key.shape[1] // heads
    rows = (x.reshape(mask.shape[0], -1, heads, width).transpose(1, 2) for x in (query, key, value))
    q, k, v = rows  # [S, heads, L, width]
    scores = (q * width**-0.5) @ k.transpose(2, 3)
    scores = scores.masked_fill((mask == 0)[:, None, None], torch.finfo(scores.dtype).min)
    return (scores.softmax(dim=3) @ v).transpose(1, 2).reshape(-1, heads * width)
