"""Masked language modelling (Devlin et al. 2019, section 3.1): which words are masked, and the head that predicts."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_bert import init_weights
from bert import Linear
from config import BertConfig
from kernels.linear import linear
from text.packing import PackedBatch
from text.tokenizer import Tokenizer

CHOSEN = 0.15  # share of the words to predict
MASKED, REPLACED = 0.8, 0.1  # shares of these that become [MASK] and a random word; the others stay


class MaskedWordHead(nn.Module):
    """Linear-GELU-LayerNorm, then the word embeddings as decoder, with a separate bias."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.dense = Linear(width, width)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(partial(init_weights, std=config.initializer_range))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """Map last hidden states [M, H] and the backbone's word embeddings [V, H] to logits [M, V]."""
        return linear(self.layer_norm(F.gelu(self.dense(hidden))), word_embeddings, self.bias)


class Masking:
    """Chooses other words each time that a batch comes (dynamic masking: Liu et al. 2019, section 4.1)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.mask_id = tokenizer.mask_id
        self.special_ids = np.array(tokenizer.special_ids)
        self.words = np.setdiff1d(np.arange(tokenizer.vocab_size), self.special_ids)  # that can replace a word

    def __call__(self, batch: PackedBatch, generator: np.random.Generator) -> tuple[PackedBatch, Tensor, Tensor]:
        """Return a batch on the CPU with words masked, their rows [M] in it, and the ids [M] of these words.

        Each token except the special ones is chosen independently, so M varies and can be 0.
        """
        ids = batch.input_ids.numpy()  # [T]
        chosen = generator.random(len(ids)) < CHOSEN
        rows = np.flatnonzero(chosen & ~np.isin(ids, self.special_ids))
        fate = generator.random(len(rows))
        replaced = rows[(fate >= MASKED) & (fate < MASKED + REPLACED)]
        masked = ids.copy()
        masked[rows[fate < MASKED]] = self.mask_id
        masked[replaced] = generator.choice(self.words, len(replaced))
        words = torch.from_numpy(ids[rows])
        return replace(batch, input_ids=torch.from_numpy(masked)), torch.from_numpy(rows), words
