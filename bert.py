"""BERT over packed batches (Devlin et al. 2019), written from scratch.

Every layer works on [T, H], the tokens of all sequences end to end; only `attention` knows where a sequence begins.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_bert import init_weights
from config import BertConfig
from packing import Grouping, PackedBatch, pack_padded, unpack


class _PadRows(torch.autograd.Function):
    """Packed rows [T, H] to padded rows [P, H]; padding repeats a real row, so it is finite and needs no fill.

    The gradient at padding is zero by construction (masked keys, unused queries), so backward is a plain gather too,
    where autograd's own index_select would scatter with additions.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, grouping: Grouping) -> Tensor:
        ctx.grouping = grouping
        return rows.index_select(0, grouping.padded_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.grouping.packed_rows), None


def attention(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, heads: int, dropout: float, first_only: bool
) -> Tensor:
    """Scaled dot-product attention inside each sequence of a packed batch (Vaswani et al. 2017, section 3.2.1).

    `query`, `key`, `value` and the result are [T, H]. With `first_only`, queries come from the first token of each
    sequence: `query` and the result are [S, H] instead. `dropout` acts on the attention probabilities.
    """
    grouping = batch.grouping
    width = key.shape[1] // heads
    query_rows = [g.sequences if first_only else g.sequences * g.length for g in grouping.groups]
    key_rows = [g.sequences * g.length for g in grouping.groups]
    queries = (query if first_only else _PadRows.apply(query, grouping)).split(query_rows)
    keys = _PadRows.apply(key, grouping).split(key_rows)
    values = _PadRows.apply(value, grouping).split(key_rows)
    outputs = []
    for group, q, k, v in zip(grouping.groups, queries, keys, values, strict=True):
        # [n*L, H] -> [n, L, heads, width] -> [n, heads, L, width]
        q, k, v = (x.view(group.sequences, -1, heads, width).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.key_mask, dropout_p=dropout)
        outputs.append(out.transpose(1, 2).reshape(-1, heads * width))
    joined = torch.cat(outputs)
    return joined if first_only else joined.index_select(0, grouping.packed_rows)


class BertSelfAttention(nn.Module):
    """Multi-head self-attention, without the output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, batch: PackedBatch, first_only: bool = False) -> Tensor:
        """[T, H] to [T, H], or to [S, H] for the first token of each sequence only."""
        asking = hidden[batch.cu_seqlens[:-1]] if first_only else hidden
        dropout = self.dropout if self.training else 0.0
        return attention(
            self.query(asking), self.key(hidden), self.value(hidden), batch, self.heads, dropout, first_only
        )


class BertLayer(nn.Module):
    """One post-LayerNorm transformer layer: LN(x + dropout(f(x))) around attention and around the feed-forward."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attention = BertSelfAttention(config)
        self.attention_dense = nn.Linear(width, width)
        self.attention_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.interm_dense = nn.Linear(width, config.intermediate_size)
        self.out_dense = nn.Linear(config.intermediate_size, width)
        self.out_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, batch: PackedBatch, first_only: bool = False) -> Tensor:
        """[T, H] to [T, H], or to [S, H] for the first token of each sequence only."""
        context = self.self_attention(hidden, batch, first_only)
        residual = hidden[batch.cu_seqlens[:-1]] if first_only else hidden
        attended = self.attention_layer_norm(residual + self.dropout(self.attention_dense(context)))
        expanded = F.gelu(self.interm_dense(attended))
        return self.out_layer_norm(attended + self.dropout(self.out_dense(expanded)))


class BertModel(nn.Module):
    """Embeddings, layers and the tanh pooler; parameter names are those of the course's handout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.word_embedding = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.pos_embedding = nn.Embedding(config.max_position_embeddings, width)
        self.tk_type_embedding = nn.Embedding(config.type_vocab_size, width)
        self.embed_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.embed_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.bert_layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler_dense = nn.Linear(width, width)
        self.apply(partial(init_weights, std=config.initializer_range))

    def embed(self, batch: PackedBatch) -> Tensor:
        """Embedding output [T, H]."""
        summed = (
            self.word_embedding(batch.input_ids)
            + self.pos_embedding(batch.position_ids)
            + self.tk_type_embedding(batch.token_type_ids)
        )
        return self.embed_dropout(self.embed_layer_norm(summed))

    def encode(self, hidden: Tensor, batch: PackedBatch, first_only: bool = False) -> Tensor:
        """Embedding output [T, H] to the last hidden state [T, H].

        With `first_only`, [S, H]: the last layer does the work of the first tokens only, with the same numbers.
        """
        *lower, last = self.bert_layers
        for layer in lower:
            hidden = layer(hidden, batch)
        return last(hidden, batch, first_only)

    def pool(self, first: Tensor) -> Tensor:
        """tanh pooler: [S, H] hidden states of the first tokens to [S, H]."""
        return torch.tanh(self.pooler_dense(first))

    def sentence_embedding(self, batch: PackedBatch, pooling: str) -> Tensor:
        """[S, H] in the caller's order: the pooled first token (`cls`) or the mean over real tokens (`mean`)."""
        hidden = self.encode(self.embed(batch), batch, first_only=pooling == "cls")
        if pooling == "cls":
            return self.pool(hidden)[batch.restore]
        sums = hidden.new_zeros(batch.num_sequences, hidden.shape[1]).index_add(0, batch.sequence_ids, hidden)
        return (sums / batch.lengths[:, None])[batch.restore]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Padded tensors [S, L] in and out, as the course's handout defines them.

        Returns last_hidden_state [S, L, H], zero at padding, and pooler_output [S, H].
        """
        batch = pack_padded(input_ids, attention_mask, token_type_ids)
        hidden = self.encode(self.embed(batch), batch)
        last = unpack(hidden, batch, input_ids.shape[1])
        return {"last_hidden_state": last, "pooler_output": self.pool(last[:, 0])}
