"""BERT over packed batches (Devlin et al. 2019), written from scratch.

Every layer works on [T, H], the tokens of all sequences end to end; only `attention` knows where a sequence begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from base_bert import init_weights
from config import BertConfig
from kernels import flash_attention as flash
from kernels.dropout import Dropout, drop, keep_mask
from kernels.linear import linear
from text.packing import Batch, EncodedBatch, Grouping, PackedBatch, pack_padded, unpack


class _GroupedAttention(torch.autograd.Function):
    """Attention inside each group's rectangle, forward and backward written out.

    Autograd would get the same numbers from sliced views, but would assemble their gradients by one allocation and
    one addition of the whole buffer for every group, which on a CPU costs as much as the multiplications.
    Groups are gathered one by one, so that a group is still in the processor's cache when it is multiplied.
    Padded rows repeat a real row, so that all numbers are finite; masked keys and dropped outputs keep them out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grouping: Grouping,
        heads: int,
        dropout: float,
        first_only: bool,
    ) -> Tensor:
        parts = _parts(grouping, heads, first_only)
        width = query.shape[1] // heads
        query, key, value = (x.reshape(-1, width) for x in (query, key, value))  # [.., H] -> [.. * heads, width]
        out = torch.empty_like(query)
        probabilities, keeps = [], []
        for part in parts:
            q, k, v = part.queries(query), part.keys(key), part.keys(value)  # [n * heads, L, width]
            scores = torch.bmm(q * width**-0.5, k.transpose(1, 2))  # scaled before, lest fp16 overflows
            if part.mask is not None:
                scores.unflatten(0, (-1, heads)).add_(part.mask)
            weights = scores.softmax(dim=-1).to(v.dtype)
            probabilities.append(weights)
            if dropout:
                keeps.append(keep_mask(weights.shape, dropout, weights.device))
                weights = drop(weights, keeps[-1], dropout)
            part.put_queries(torch.bmm(weights, v), out)
        ctx.save_for_backward(query, key, value, *probabilities, *keeps)
        ctx.settings = parts, heads, dropout
        return out.view(-1, heads * width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts, heads, dropout = ctx.settings
        query, key, value, *saved = ctx.saved_tensors
        width = query.shape[1]
        grad = grad.reshape(-1, width)
        grad_query, grad_key, grad_value = grads = [torch.empty_like(x) for x in (query, key, value)]
        for i, part in enumerate(parts):
            q, k, v, g = part.queries(query), part.keys(key), part.keys(value), part.queries(grad)
            if part.mask is not None and not part.first_only:
                g.unflatten(0, (-1, heads)).mul_(part.mask.exp().transpose(2, 3))  # nothing is asked of padding
            weights = dropped = saved[i]
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            if dropout:
                keep = saved[len(parts) + i]
                dropped = drop(weights, keep, dropout)
                grad_weights.mul_(keep).mul_(1 / (1 - dropout))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(width**-0.5)
            part.put_queries(torch.bmm(grad_scores, k), grad_query)
            part.put_keys(torch.bmm(grad_scores.transpose(1, 2), q), grad_key)
            part.put_keys(torch.bmm(dropped.transpose(1, 2), g), grad_value)
        return *(x.view(-1, heads * width) for x in grads), None, None, None, None


@dataclass(frozen=True)
class _Part:
    """One group of a packed batch, each row of which is cut into rows of one head."""

    sequences: int  # n * heads, a sequence for each head
    rows: Tensor  # [n * heads * L] that fill the group's rectangle
    places: Tensor  # [t * heads] of its own rows in that rectangle
    mask: Tensor | None  # [n, 1, 1, L], as in Group
    own: slice  # its own rows
    asking: slice  # those of the queries: the same, or with `first_only` one for each sequence and head
    first_only: bool

    def keys(self, x: Tensor) -> Tensor:
        """The rectangle [n * heads, L, width] of rows [T * heads, width]."""
        return x.index_select(0, self.rows).view(self.sequences, -1, x.shape[1])

    def queries(self, x: Tensor) -> Tensor:
        """The same of the queries' rows, or with `first_only` [n * heads, 1, width]."""
        return x[self.asking, None] if self.first_only else self.keys(x)

    def put_keys(self, rectangle: Tensor, x: Tensor) -> None:
        """Write what is no padding back into rows."""
        torch.index_select(rectangle.view(-1, x.shape[1]), 0, self.places, out=x[self.own])

    def put_queries(self, rectangle: Tensor, x: Tensor) -> None:
        """The same for queries."""
        if self.first_only:
            x[self.asking] = rectangle[:, 0]
        else:
            self.put_keys(rectangle, x)


def _parts(grouping: Grouping, heads: int, first_only: bool) -> list[_Part]:
    parts, sequence = [], 0
    for group, (rows, places) in zip(grouping.groups, grouping.split(heads), strict=True):
        own = slice(group.own.start * heads, group.own.stop * heads)
        asking = slice(sequence * heads, (sequence + group.sequences) * heads) if first_only else own
        parts.append(_Part(group.sequences * heads, rows, places, group.key_mask, own, asking, first_only))
        sequence += group.sequences
    return parts


def attention(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, heads: int, dropout: float, first_only: bool
) -> Tensor:
    """Scaled dot-product attention inside each sequence of a packed batch (Vaswani et al. 2017, section 3.2.1).

    `query`, `key`, `value` and the result are [T, H]. With `first_only`, queries come from the first token of each
    sequence: `query` and the result are [S, H] instead. `dropout` acts on the attention probabilities.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # adapters may put out fp32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if not flash.usable(query, key, value, heads):
        return _GroupedAttention.apply(query, key, value, batch.grouping, heads, dropout, first_only)
    starts = batch.cu_seqlens
    query_starts = torch.arange(len(starts), dtype=starts.dtype, device=starts.device) if first_only else starts
    query, key, value = (x.unflatten(1, (heads, -1)) for x in (query, key, value))  # [.., H] -> [.., heads, width]
    return flash.attend(query, key, value, query_starts, starts, batch.max_seqlen, dropout).flatten(1)


@dataclass(frozen=True)
class Adapter:
    """What is added to one layer from outside: `function(hidden, batch, first_only)` of the layer's input [T, H].

    Its result, [T, H] or with `first_only` [S, H], joins the `residual` sum of the layer's `attention` or of its
    `feed-forward`, before the LayerNorm.
    """

    function: Callable[[Tensor, PackedBatch, bool], Tensor]
    residual: str


def output_rows(hidden: Tensor, batch: PackedBatch, first_only: bool) -> Tensor:
    """The rows of [T, H] that a layer has outputs for: all of them, or the first token of each sequence [S, H]."""
    return hidden.index_select(0, batch.cu_seqlens[:-1]) if first_only else hidden


class Linear(nn.Linear):
    """nn.Linear whose frozen weights autocast casts once, and not in every pass.

    The copies are kept until the weights change, move, or train. A CUDA graph casts by itself: it would otherwise read
    copies that later passes outside of it may have replaced.
    """

    keeps_copies = True  # not so where the weights themselves are whole for the time of a pass only

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out)
        self.cast: tuple[tuple[object, ...], Tensor, Tensor] | None = None  # what they are made of, and the copies

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """[..., in] to [..., out]; with `gelu`, the GELU of that."""
        if self.cast_once(x.device.type):
            return linear(x, *self.copies(torch.get_autocast_dtype(x.device.type)), gelu)
        if self.cast is not None:
            self.cast = None
        return linear(x, self.weight, self.bias, gelu)

    def cast_once(self, device: str) -> bool:
        """Whether autocast would cast frozen weights here."""
        frozen = not (self.weight.requires_grad or self.bias.requires_grad) and self.weight.dtype == torch.float32
        recorded = device == "cuda" and torch.cuda.is_current_stream_capturing()
        return self.keeps_copies and frozen and torch.is_autocast_enabled(device) and not recorded

    def copies(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias as `dtype`."""
        parts = self.weight, self.bias
        made_of = dtype, *((own.data_ptr(), own._version) for own in parts)
        if self.cast is None or self.cast[0] != made_of:
            with torch.inference_mode(False), torch.no_grad():  # what evaluation has made, training may use
                self.cast = made_of, parts[0].to(dtype), parts[1].to(dtype)
        return self.cast[1:]


class BertSelfAttention(nn.Module):
    """Multi-head self-attention, without the output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, batch: PackedBatch, first_only: bool = False) -> Tensor:
        """[T, H] to [T, H], or to [S, H] for the first token of each sequence only."""
        asking = output_rows(hidden, batch, first_only)
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
        self.attention_dense = Linear(width, width)
        self.attention_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.interm_dense = Linear(width, config.intermediate_size)
        self.out_dense = Linear(config.intermediate_size, width)
        self.out_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden: Tensor, batch: PackedBatch, first_only: bool = False, adapter: Adapter | None = None
    ) -> Tensor:
        """[T, H] to [T, H], or to [S, H] for the first token of each sequence only."""

        def adapted(total: Tensor, residual: str) -> Tensor:
            if adapter is None or adapter.residual != residual:
                return total
            return total + adapter.function(hidden, batch, first_only)

        context = self.self_attention(hidden, batch, first_only)
        total = output_rows(hidden, batch, first_only) + self.dropout(self.attention_dense(context))
        attended = self.attention_layer_norm(adapted(total, "attention"))
        expanded = self.interm_dense(attended, gelu=True)
        total = attended + self.dropout(self.out_dense(expanded))
        return self.out_layer_norm(adapted(total, "feed-forward"))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, module: "WordEmbedding") -> Tensor:
        ctx.save_for_backward(ids)
        ctx.module = module
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return ctx.module.gradient(ids.flatten(), grad.flatten(0, -2)), None, None


class WordEmbedding(nn.Embedding):
    """nn.Embedding whose gradient, on a CPU, takes the memory of the one before it.

    torch clears new memory of [V, H] for the few rows that a batch reaches, which for a small BERT takes a tenth of a
    training step. Here only the rows that the batch before reached are cleared, or all if that gradient was changed;
    and memory that anything else still refers to is left alone.
    """

    memory: Tensor | None = None  # zero but for the rows `reached`, as long as its version is `version`
    reached: Tensor
    version: int

    def forward(self, ids: Tensor) -> Tensor:
        """Word numbers [...] to [..., H]."""
        if ids.device.type != "cpu" or not (self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(ids)
        out: Tensor = _Lookup.apply(self.weight, ids, self)
        return out

    def gradient(self, ids: Tensor, grad: Tensor) -> Tensor:
        """That of the weight [V, H] from that of the rows `ids` [T], which is [T, H]."""
        memory = self.memory
        if memory is None or memory.dtype != grad.dtype or _is_shared(memory):
            memory = self.memory = grad.new_zeros(self.num_embeddings, self.embedding_dim)
        elif memory._version != self.version:
            memory.zero_()
        else:
            memory[self.reached] = 0.0
        memory.index_add_(0, ids, grad)
        if self.padding_idx is not None:
            memory[self.padding_idx] = 0.0
        self.reached, self.version = ids.clone(), memory._version  # a recorded pass writes its next batch over `ids`
        return memory.detach()


def _is_shared(tensor: Tensor) -> bool:
    """Whether another tensor has the memory of this one; so it is taken to be where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is None or count(tensor.untyped_storage()._cdata) > 2  # the tensor and the handle asked for here


class BertModel(nn.Module):
    """Embeddings, layers and the tanh pooler; parameter names are those of the course's handout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.word_embedding = WordEmbedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.pos_embedding = nn.Embedding(config.max_position_embeddings, width)
        self.tk_type_embedding = nn.Embedding(config.type_vocab_size, width)
        self.embed_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.embed_dropout = Dropout(config.hidden_dropout_prob)
        self.bert_layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler_dense = Linear(width, width)
        self.apply(partial(init_weights, std=config.initializer_range))

    def embed(self, batch: PackedBatch) -> Tensor:
        """Embedding output [T, H]."""
        summed = (
            self.word_embedding(batch.input_ids)
            + self.pos_embedding(batch.position_ids)
            + self.tk_type_embedding(batch.token_type_ids)
        )
        return self.embed_dropout(self.embed_layer_norm(summed))

    def encode(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        first_only: bool = False,
        done: int = 0,
        adapters: Sequence[Adapter] = (),
    ) -> Tensor:
        """Output of the lowest `done` layers [T, H] (0: embedding output) to the last hidden state [T, H].

        With `first_only`, [S, H]: the last layer does the work of the first tokens only, with the same numbers.
        `adapters`, if any, has one for each layer.
        """
        slots: Sequence[Adapter | None] = adapters or [None] * len(self.bert_layers)
        *lower, last = list(zip(self.bert_layers, slots, strict=True))[done:]
        for layer, adapter in lower:
            hidden = layer(hidden, batch, adapter=adapter)
        layer, adapter = last
        return layer(hidden, batch, first_only, adapter)

    def pool(self, first: Tensor) -> Tensor:
        """tanh pooler: [S, H] hidden states of the first tokens to [S, H]."""
        return torch.tanh(self.pooler_dense(first))

    def sentence_embedding(self, batch: Batch, pooling: str, adapters: Sequence[Adapter] = ()) -> Tensor:
        """[S, H] in the caller's order: the pooled first token (`cls`) or the mean over real tokens (`mean`)."""
        start = batch if isinstance(batch, EncodedBatch) else EncodedBatch(self.embed(batch), 0, batch)
        if start.packed is None:
            return start.hidden
        batch = start.packed
        hidden = self.encode(start.hidden, batch, pooling == "cls", start.layers, adapters)
        if pooling == "cls":
            return self.pool(hidden).index_select(0, batch.restore)
        sums = hidden.new_zeros(batch.num_sequences, hidden.shape[1]).index_add(0, batch.sequence_ids, hidden)
        return (sums / batch.lengths[:, None]).index_select(0, batch.restore)

    def frozen_layers(self) -> int:
        """How many of the lowest layers neither train nor stand above anything that trains.

        The pooler counts with the last layer: all layers are frozen only where nothing at all trains.
        """
        lowest = depth = len(self.bert_layers)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part, number = name.split(".")[:2]
                own = int(number) if part == "bert_layers" else depth - 1 if part == "pooler_dense" else 0
                lowest = min(lowest, own)
        return lowest

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
