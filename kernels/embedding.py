"""Embeddings with a faster gradient, of many rows on a CPU and of few rows on a GPU. The plain form is nn.Embedding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
    """nn.Embedding whose gradient reuses, on a CPU, the memory of the previous gradient.

    torch clears new memory [V, H] for the few rows that a batch reaches, which for a small BERT takes a tenth of a
    training step. This class clears only the rows that the previous batch reached, or all rows if something changed
    that gradient since. It allocates new memory if anything else still refers to the old one.
    """

    memory: Tensor | None = None  # the last gradient: zero except for the rows `reached` while `version` is its version
    reached: Tensor
    version: int

    def forward(self, ids: Tensor) -> Tensor:
        """Map word ids [...] to [..., H]."""
        if ids.device.type != "cpu" or not (self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(ids)
        out: Tensor = _Lookup.apply(self.weight, ids, self)
        return out

    def gradient(self, ids: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of the weight [V, H] from the gradient [T, H] of the rows `ids` [T]."""
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
        self.reached, self.version = ids.clone(), memory._version  # a CUDA graph overwrites `ids`
        return memory.detach()


def _is_shared(tensor: Tensor) -> bool:
    """Return whether another tensor shares the memory of this one; assume so where torch cannot tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is None or count(tensor.untyped_storage()._cdata) > 2  # the tensor and the handle made here


class _LookupOfFewRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, reached: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.reached = len(weight), reached
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return gradient_of_few_rows(ids.flatten(), grad.flatten(0, -2), ctx.rows, ctx.reached), None, None


def gradient_of_few_rows(ids: Tensor, grad: Tensor, rows: int, reached: int) -> Tensor:
    """Return the gradient of a table [rows, H] from the gradient [T, H] of its rows `ids` [T], all below `reached`.

    It is the product of a matrix [reached, T], which says with ones what row each token takes, and `grad`.
    """
    chosen = grad.new_empty(reached, len(ids))
    torch.eq(torch.arange(reached, device=ids.device)[:, None], ids, out=chosen)
    out = grad.new_empty(rows, grad.shape[1]) if reached == rows else grad.new_zeros(rows, grad.shape[1])
    torch.mm(chosen, grad, out=out[:reached])  # into given memory, where autocast does not round
    return out


class SmallEmbedding(nn.Embedding):
    """nn.Embedding for a table of few rows, whose gradient on a GPU is one product.

    Many tokens share a row. torch's kernels add these one after another: up to 3,072 tokens in one block for all of
    them, and above that in sorted runs.
    """

    def forward(self, ids: Tensor, reached: int | None = None) -> Tensor:
        """Map row numbers [...] to [..., H]; all of them are below `reached`, where that is given."""
        if ids.device.type == "cpu" or not (self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(ids)
        rows = self.num_embeddings
        out: Tensor = _LookupOfFewRows.apply(self.weight, ids, rows if reached is None else min(reached, rows))
        return out
