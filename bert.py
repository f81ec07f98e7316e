"""BERT over packed batches (Devlin et al. 2019), written from scratch.

Every layer works on [T, H], the tokens of all sequences end to end; only `attention` knows where a sequence begins.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import flash
from base_bert import init_weights
from config import BertConfig
from packing import Batch, EncodedBatch, Group, Grouping, PackedBatch, pack_padded, unpack
from products import linear


def keep_mask(shape: torch.Size, dropout: float, device: torch.device) -> Tensor:
    """A bool mask that is False with probability `dropout`, to 1/65536.

    A CPU draws Bernoulli numbers one by one; four of these come from each 64-bit word, five times faster.
    """
    if device.type != "cpu":
        return torch.rand(shape, device=device) >= dropout
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.int16)[: shape.numel()].view(shape) >= round(dropout * 65536) - 32768


class _Dropout(torch.autograd.Function):
    """Dropout from a keep_mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float) -> Tensor:
        keep = keep_mask(x.shape, dropout, x.device)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - dropout)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None


class Dropout(nn.Dropout):
    """nn.Dropout with a faster source of random bits on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` in evaluation; in training each element is 0 with probability p, else x / (1-p)."""
        if not self.training or self.p == 0.0:
            return x
        return _Dropout.apply(x, self.p) if x.device.type == "cpu" else super().forward(x)


def _split_heads(rows: Tensor, sequences: int, heads: int) -> Tensor:
    """[n*L, H] -> [n, L, heads, width] -> [n, heads, L, width]."""
    return rows.view(sequences, -1, heads, rows.shape[1] // heads).transpose(1, 2)


class _GroupedAttention(torch.autograd.Function):
    """Attention inside each group's rectangle, forward and backward written out.

    Autograd would get the same numbers from sliced views, but would assemble their gradients by one allocation and
    one addition of the whole buffer for every group, which on a CPU costs as much as the multiplications.
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
        scale = (query.shape[1] // heads) ** -0.5
        keys, values = key.index_select(0, grouping.padded_rows), value.index_select(0, grouping.padded_rows)
        queries = query if first_only else query.index_select(0, grouping.padded_rows)  # [P or S, H]
        out = torch.empty_like(queries)
        probabilities, keeps = [], []
        for group, slices in _rectangles(grouping, first_only):
            q, k, v, o = (
                _split_heads(x[rows], group.sequences, heads)
                for x, rows in zip((queries, keys, values, out), slices, strict=True)
            )
            scores = (q * scale) @ k.transpose(2, 3)  # [n, heads, L or 1, L]; scaled first, lest fp16 overflows
            if group.key_mask is not None:
                scores.masked_fill_(~group.key_mask, -torch.inf)
            weights = scores.softmax(dim=-1).to(v.dtype)
            probabilities.append(weights)
            if dropout:
                keeps.append(keep_mask(weights.shape, dropout, weights.device))
                weights = (weights * keeps[-1]).mul_(1 / (1 - dropout))
            o.copy_(weights @ v)
        ctx.save_for_backward(queries, keys, values, *probabilities, *keeps)
        ctx.settings = grouping, heads, dropout, first_only, scale
        return out if first_only else out.index_select(0, grouping.packed_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grouping, heads, dropout, first_only, scale = ctx.settings
        queries, keys, values, *saved = ctx.saved_tensors
        groups = len(grouping.groups)
        if not first_only:
            grad = torch.zeros_like(queries).index_copy_(0, grouping.packed_rows, grad)
        grads = [torch.empty_like(x) for x in (queries, keys, values)]
        for i, (group, (query_rows, key_rows, _, _)) in enumerate(_rectangles(grouping, first_only)):
            n, weights = group.sequences, saved[i]
            q, g, grad_q = (_split_heads(x[query_rows], n, heads) for x in (queries, grad, grads[0]))
            k, v, grad_k, grad_v = (_split_heads(x[key_rows], n, heads) for x in (keys, values, grads[1], grads[2]))
            dropped, grad_weights = weights, g @ v.transpose(2, 3)
            if dropout:
                keep = saved[groups + i]
                dropped = (weights * keep).mul_(1 / (1 - dropout))
                grad_weights.mul_(keep).mul_(1 / (1 - dropout))
            grad_v.copy_(dropped.transpose(2, 3) @ g)
            grad_scores = grad_weights.sub_((grad_weights * weights).sum(dim=-1, keepdim=True)).mul_(weights)
            grad_q.copy_((grad_scores.mul_(scale)) @ k)
            grad_k.copy_(grad_scores.transpose(2, 3) @ q)
        grad_query, *others = grads
        if not first_only:
            grad_query = grad_query.index_select(0, grouping.packed_rows)
        return grad_query, *(x.index_select(0, grouping.packed_rows) for x in others), None, None, None, None


def _rectangles(grouping: Grouping, first_only: bool) -> Iterator[tuple[Group, tuple[slice, slice, slice, slice]]]:
    """Each group with its rows of queries, keys, values and outputs."""
    first = 0
    for group in grouping.groups:
        keys = slice(group.first, group.first + group.sequences * group.length)
        queries = slice(first, first + group.sequences) if first_only else keys
        first += group.sequences
        yield group, (queries, keys, keys, queries)


def attention(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, heads: int, dropout: float, first_only: bool
) -> Tensor:
    """Scaled dot-product attention inside each sequence of a packed batch (Vaswani et al. 2017, section 3.2.1).

    `query`, `key`, `value` and the result are [T, H]. With `first_only`, queries come from the first token of each
    sequence: `query` and the result are [S, H] instead. `dropout` acts on the attention probabilities.
    """
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

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if not self.cast_once(x.device.type):
            if self.cast is not None:
                self.cast = None
            return linear(x, self.weight, self.bias)
        return F.linear(x, *self.copies(torch.get_autocast_dtype(x.device.type)))

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
        expanded = F.gelu(self.interm_dense(attended))
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
