"""The word embedding, whose gradient has few rows that are not zero. The plain form is nn.Embedding."""

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
