"""BERT over packed batches (Devlin et al. 2019), written from scratch.

Every layer works on [T, H], the tokens of all sequences end to end. Only `attention` knows where a sequence begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_bert import init_weights, load_weights, read_config, resolve_pretrained
from config import BertConfig
from kernels import varlen_attention
from kernels.compiled import CompiledFunction
from kernels.dropout import Dropout
from kernels.embedding import SmallEmbedding, WordEmbedding
from kernels.grouped_attention import grouped_attention
from kernels.half_copies import half_copies
from kernels.half_low_rank import HalfLowRank, LowRank, half_low_rank, half_low_rank_linear
from kernels.linear import linear
from kernels.padded_attention import PaddedBatch, padded_attention
from text.packing import Batch, EncodedBatch, PackedBatch, pack_padded, unpack


def attention(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, heads: int, dropout: float, cls_only: bool
) -> Tensor:
    """Compute scaled dot-product attention inside each sequence of a packed batch (Vaswani et al. 2017, section 3.2.1).

    `query`, `key`, `value` and the result are [T, H]. With `cls_only`, only the first token of each sequence asks:
    `query` and the result are [S, H] then. `dropout` acts on the attention probabilities.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # adapters may return fp32
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if isinstance(batch, PaddedBatch):
        return padded_attention(query, key, value, batch.mask, heads)
    kernel = varlen_attention.choose_kernel(query, key, value, heads)
    if kernel is None:
        return grouped_attention(query, key, value, batch.grouping, heads, dropout, cls_only)
    starts = batch.cu_seqlens
    query_starts = torch.arange(len(starts), dtype=starts.dtype, device=starts.device) if cls_only else starts
    query, key, value = (x.unflatten(1, (heads, -1)) for x in (query, key, value))  # [.., H] -> [.., heads, width]
    out = varlen_attention.attend(kernel, query, key, value, query_starts, starts, batch.max_seqlen, dropout)
    return out.flatten(1)


@dataclass(frozen=True)
class Adapter:
    """What is added to one layer from outside: `function(hidden, batch, cls_only)` of the layer's input [T, H].

    Its result is [T, H], or [S, H] with `cls_only`. It is added before the LayerNorm of the layer's `attention` or of
    its `feed-forward`, whichever `residual` names.
    """

    function: Callable[[Tensor, PackedBatch, bool], Tensor]
    residual: str


def output_rows(hidden: Tensor, batch: PackedBatch, cls_only: bool) -> Tensor:
    """Return the rows of [T, H] for which a layer computes outputs: all, or with `cls_only` the first tokens [S, H]."""
    return hidden.index_select(0, batch.cu_seqlens[:-1]) if cls_only else hidden


class Parameters(NamedTuple):
    """The parameters of a linear layer, or of several with one input, end to end."""

    weight: Tensor  # [out, in]
    bias: Tensor  # [out]


class Linear(nn.Linear):
    """nn.Linear that keeps the half-precision copies of frozen weights, which autocast would make anew in every pass.

    The copies are kept until the weights change, move, or train. A CUDA graph casts by itself, since passes outside of
    it could replace the copies that it reads.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out)
        self.cast: tuple[tuple[object, ...], Parameters] | None = None  # what the copies are made of, and these

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Map [..., in] to [..., out]; with `gelu`, return the GELU of that."""
        if self.uses_copies(x.device.type):
            return linear(x, *self.copies(torch.get_autocast_dtype(x.device.type)), gelu)
        if self.cast is not None:
            self.cast = None
        return linear(x, self.weight, self.bias, gelu)

    def parts(self) -> Parameters | None:
        """Return weight and bias, or None unless both train in fp32."""
        trains = all(p.requires_grad and p.dtype == torch.float32 for p in (self.weight, self.bias))
        return Parameters(self.weight, self.bias) if trains else None

    def uses_copies(self, device: str) -> bool:
        """Return whether autocast would cast frozen weights here."""
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
            return False
        frozen = not (self.weight.requires_grad or self.bias.requires_grad) and self.weight.dtype == torch.float32
        return frozen and not (device == "cuda" and torch.cuda.is_current_stream_capturing())

    def copies(self, dtype: torch.dtype) -> Parameters:
        """Return weight and bias as `dtype`."""
        made_of = dtype, *((parameter.data_ptr(), parameter._version) for parameter in (self.weight, self.bias))
        if self.cast is None or self.cast[0] != made_of:
            with torch.inference_mode(False), torch.no_grad():  # training may use copies that evaluation made
                self.cast = made_of, Parameters(self.weight.to(dtype), self.bias.to(dtype))
        return self.cast[1]


HalfParameters = Parameters | HalfLowRank


def half_linear(dtype: torch.dtype, groups: Sequence[Sequence[Parameters]]) -> list[Parameters]:
    """Return the parameters of each group of layers as `dtype`, end to end."""
    copies = half_copies(dtype, [[part[i] for part in group] for i in range(2) for group in groups])
    return [Parameters(*pair) for pair in zip(copies[: len(groups)], copies[len(groups) :], strict=True)]


def apply_half(x: Tensor, half: HalfParameters, gelu: bool = False) -> Tensor:
    """Return the output [T, out] of a linear layer, or of several side by side, by half-precision copies."""
    if not isinstance(half, HalfLowRank):
        return linear(x, *half, gelu)
    y = half_low_rank_linear(x, half)
    return F.gelu(y) if gelu else y


def apply_linear(layer: nn.Module, x: Tensor, half: HalfParameters | None, gelu: bool = False) -> Tensor:
    """Return the output of a linear layer, by half-precision copies of its parameters if there are some."""
    out: Tensor = layer(x, gelu) if half is None else apply_half(x, half, gelu)
    return out


class BertSelfAttention(nn.Module):
    """Multi-head self-attention, without the output projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden: Tensor, batch: PackedBatch, cls_only: bool = False, joined: HalfParameters | None = None
    ) -> Tensor:
        """Map [T, H] to [T, H], or with `cls_only` to [S, H].

        `joined` are those of query, key and value together, for one product instead of three.
        """
        if joined is None:
            query, key, value = self.query(output_rows(hidden, batch, cls_only)), self.key(hidden), self.value(hidden)
        else:
            query, key, value = apply_half(hidden, joined).chunk(3, dim=1)
            query = output_rows(query, batch, cls_only)
        dropout = self.dropout if self.training else 0.0
        return attention(query, key, value, batch, self.heads, dropout, cls_only)


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
        self.compiled: CompiledFunction | None = None  # `after_attention`, for training

    def forward(
        self, hidden: Tensor, batch: PackedBatch, cls_only: bool = False, adapter: Adapter | None = None
    ) -> Tensor:
        """Map [T, H] to [T, H], or with `cls_only` to [S, H]."""
        half = self.half_parameters(hidden.device.type)
        context = self.self_attention(hidden, batch, cls_only, half[0])
        added = None if adapter is None else adapter.function(hidden, batch, cls_only)
        residual = None if adapter is None else adapter.residual
        finish = BertLayer.after_attention if self.compiled is None or not self.training else self.compiled
        return finish(self, output_rows(hidden, batch, cls_only), context, half[1:], added, residual)

    def after_attention(
        self,
        hidden: Tensor,
        context: Tensor,
        half: Sequence[HalfParameters | None],
        added: Tensor | None,
        residual: str | None,
    ) -> Tensor:
        """Map the layer's input and the output of attention, both [T, H], to the layer's output [T, H].

        `half` are the half-precision parameters of the three linear layers or None. `added` [T, H] is the result of an
        adapter at the `residual`.
        """
        dense, interm, out = half
        total = hidden + self.dropout(apply_linear(self.attention_dense, context, dense))
        attended = self.attention_layer_norm(total if residual != "attention" else total + added)
        expanded = apply_linear(self.interm_dense, attended, interm, gelu=True)
        total = attended + self.dropout(apply_linear(self.out_dense, expanded, out))
        return self.out_layer_norm(total if residual != "feed-forward" else total + added)

    def half_parameters(self, device: str) -> list[HalfParameters | None]:
        """Return what autocast would cast one by one on a GPU: the parameters of query, key and value end to end, then
        those of `attention_dense`, `interm_dense` and `out_dense`.

        They are None on a CPU, without autocast, and for layers that do not train alike.
        """
        attention = self.self_attention
        groups: list[list[Any]] = [
            [attention.query, attention.key, attention.value],
            [self.attention_dense],
            [self.interm_dense],
            [self.out_dense],
        ]
        half: list[HalfParameters | None] = [None] * len(groups)
        if device == "cpu" or not torch.is_autocast_enabled(device):
            return half
        dtype = torch.get_autocast_dtype(device)
        parts = [[layer.parts() for layer in group] for group in groups]
        copiers: tuple[tuple[type, Callable[..., Sequence[HalfParameters]]], ...]
        copiers = (Parameters, half_linear), (LowRank, half_low_rank)
        for kind, copy in copiers:
            alike = [i for i, group in enumerate(parts) if all(isinstance(part, kind) for part in group)]
            copies: Sequence[HalfParameters] = copy(dtype, [parts[i] for i in alike]) if alike else ()
            for i, copied in zip(alike, copies, strict=True):
                half[i] = copied
        for i, (layer, *others) in enumerate(groups):
            if not others and isinstance(layer, Linear) and layer.uses_copies(device):
                half[i] = layer.copies(dtype)
        return half


class BertModel(nn.Module):
    """Embeddings, layers and the tanh pooler. The names of the parameters are those of the course's handout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.word_embedding = WordEmbedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.pos_embedding = SmallEmbedding(config.max_position_embeddings, width)
        self.tk_type_embedding = SmallEmbedding(config.type_vocab_size, width)
        self.embed_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.embed_dropout = Dropout(config.hidden_dropout_prob)
        self.bert_layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler_dense = Linear(width, width)
        self.apply(partial(init_weights, std=config.initializer_range))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str]) -> "BertModel":
        """Return a pretrained model in evaluation mode, as the course's handout does.

        The name is one that --pretrained takes: a folder or a name of the hub, such as bert-base-uncased. Raises
        UserError if it is found nowhere, or if its files are damaged or belong to another architecture.
        """
        folder = resolve_pretrained(str(pretrained_model_name_or_path))
        config = read_config(folder)
        weights = load_weights(folder, config)  # first: config.json may ask for a model of any size
        model = cls(config)
        model.load_state_dict(weights)
        return model.eval()

    def compile_layers(self) -> None:
        """Let torch compile what the layers do after attention, when training first comes there."""
        compiled = CompiledFunction(BertLayer.after_attention)
        for layer in self.bert_layers:
            assert isinstance(layer, BertLayer)
            layer.compiled = compiled

    def embed(self, batch: PackedBatch) -> Tensor:
        """Return the embedding output [T, H]."""
        summed = (
            self.word_embedding(batch.input_ids)
            + self.pos_embedding(batch.position_ids, batch.max_seqlen)
            + self.tk_type_embedding(batch.token_type_ids)
        )
        return self.embed_dropout(self.embed_layer_norm(summed))

    def encode(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        cls_only: bool = False,
        done: int = 0,
        adapters: Sequence[Adapter] = (),
    ) -> Tensor:
        """Map the output of the lowest `done` layers (0: of the embeddings) [T, H] to the last hidden state [T, H].

        With `cls_only` the result is [S, H]: the last layer computes only the first tokens, with the same numbers.
        `adapters` is empty or has one for each layer.
        """
        slots: Sequence[Adapter | None] = adapters or [None] * len(self.bert_layers)
        *lower, last = list(zip(self.bert_layers, slots, strict=True))[done:]
        for layer, adapter in lower:
            hidden = layer(hidden, batch, adapter=adapter)
        layer, adapter = last
        return layer(hidden, batch, cls_only, adapter)

    def pool(self, first: Tensor) -> Tensor:
        """Map the hidden states of the first tokens [S, H] to [S, H] by the tanh pooler."""
        return torch.tanh(self.pooler_dense(first))

    def sentence_embedding(self, batch: Batch, pooling: str, adapters: Sequence[Adapter] = ()) -> Tensor:
        """Return embeddings [S, H] in the caller's order: pooled first tokens (`cls`) or means over tokens (`mean`)."""
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
        """Return how many of the lowest layers neither train nor stand above anything that trains.

        The pooler counts with the last layer, so all layers are frozen only where nothing trains at all.
        """
        trained = [height for parameter, height in self.heights().items() if parameter.requires_grad]
        return max(0, min(trained, default=len(self.bert_layers) + 1) - 1)

    def heights(self) -> dict[nn.Parameter, int]:
        """Return the layer of each parameter, counted from 1: 0 for embeddings, the last one for the pooler."""
        found = {}
        for name, parameter in self.named_parameters():
            part, number = name.split(".")[:2]
            top = len(self.bert_layers) if part == "pooler_dense" else 0
            found[parameter] = int(number) + 1 if part == "bert_layers" else top
        return found

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Map padded tensors [S, L], as the course's handout defines them, to padded outputs.

        Returns last_hidden_state [S, L, H], which is zero at padding, and pooler_output [S, H].
        """
        batch = pack_padded(input_ids, attention_mask, token_type_ids)
        hidden = self.encode(self.embed(batch), batch)
        last = unpack(hidden, batch, input_ids.shape[1])
        return {"last_hidden_state": last, "pooler_output": self.pool(last[:, 0])}
