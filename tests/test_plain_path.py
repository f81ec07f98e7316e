"""Fifty steps are those of a plain BERT: padded rectangles, torch's operators and optimizers, gradients by autograd.

In float64 the losses agree to the last bit of their fp32, so that the same formula is computed. In fp32 they agree to
1e-5 where rounding does not grow: batch normalisation of small batches and optimizers that divide a gradient by its own
size let two orders of one sum drift apart as far as any two programs.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import cut, first_steps, make_bert, make_trainer, steps_of
from torch import Tensor, nn
from torch.optim import Optimizer

import bert
import lora
from bert import BertModel
from kernels import linear as products
from kernels.embedding import WordEmbedding
from lora import DoRALinear, LoRALinear
from models.heads import Convolution
from text.packing import Batch, EncodedBatch, PackedBatch
from training.trainer import Trainer

STEPS = 50
STILL = ["--backbone_dropout_prob", 0, "--hidden_dropout_prob", 0, "--fine_tune_mode", "full-model"]


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    y = x @ weight.t()
    y = y if bias is None else y + bias
    return 0.5 * y * (1 + torch.erf(y / math.sqrt(2))) if gelu else y


def starts_of(batch: PackedBatch) -> np.ndarray:
    return np.cumsum(batch.sizes) - batch.sizes


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedBatch, heads: int, dropout: float, cls_only: bool
) -> Tensor:
    """One rectangle [S, L] of all sequences."""
    assert not dropout and not cls_only
    count, width, column = batch.num_sequences, query.shape[1], np.arange(batch.max_seqlen)
    rows = torch.from_numpy(np.minimum(starts_of(batch)[:, None] + column, len(key) - 1))  # [S, L]
    padding = torch.from_numpy(column >= batch.sizes[:, None])
    q, k, v = (x[rows].view(count, -1, heads, width // heads).transpose(1, 2) for x in (query, key, value))
    scores = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).masked_fill(padding[:, None, None], -math.inf)
    out = (scores.softmax(dim=3) @ v).transpose(1, 2).reshape(count, -1, width)  # [S, L, H]
    return out[~padding]


def plain_embedding(self: BertModel, batch: Batch, pooling: str, adapters: Any = ()) -> Tensor:
    """All layers for all tokens."""
    start = batch if isinstance(batch, EncodedBatch) else EncodedBatch(self.embed(batch), 0, batch)
    packed = start.packed
    assert packed is not None
    hidden = self.encode(start.hidden, packed, False, start.layers, adapters)
    texts = [hidden[first : first + size] for first, size in zip(starts_of(packed), packed.sizes, strict=True)]
    if pooling == "mean":
        return torch.stack([text.mean(0) for text in texts])[packed.restore]
    first = torch.stack([text[0] for text in texts])[packed.restore]
    return torch.tanh(plain_linear(first, self.pooler_dense.weight, self.pooler_dense.bias))


def plain_lora(self: LoRALinear, x: Tensor, gelu: bool = False) -> Tensor:
    return plain_linear(x, self.weight + self.scaling * self.lora_B @ self.lora_A, self.bias, gelu)


def plain_dora(self: DoRALinear, x: Tensor, gelu: bool = False) -> Tensor:
    updated = self.weight + self.scaling * self.lora_B @ self.lora_A
    norm = updated.norm(dim=1, keepdim=True).detach()
    return plain_linear(x, self.magnitude * updated / norm, self.bias, gelu)


class PlainAdamW(Optimizer):
    """The course's AdamW, a parameter at a time."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p] or {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                self.state[p] = state
                state["t"] += 1
                state["m"] = 0.9 * state["m"] + 0.1 * p.grad
                state["v"] = 0.999 * state["v"] + 0.001 * p.grad**2
                rate = group["lr"] * math.sqrt(1 - 0.999 ** state["t"]) / (1 - 0.9 ** state["t"])
                p -= rate * state["m"] / (state["v"].sqrt() + 1e-6)
                p -= group["lr"] * group["weight_decay"] * p


class PlainSGD(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr, momentum=0.9, nesterov=True)


OPTIMIZERS: dict[str, type[Any]] = {
    "AdamW": PlainAdamW, "SGD": PlainSGD, "Adam": torch.optim.Adam, "Adamax": torch.optim.Adamax,
    "RAdam": torch.optim.RAdam,
}  # fmt: skip


def make_plain(trainer: Trainer, patch: pytest.MonkeyPatch) -> None:
    """Let a trainer compute plainly, as all others until `patch` is undone."""
    for module in (bert, lora):
        patch.setattr(module, "linear", plain_linear)
    patch.setattr(bert, "attention", plain_attention)
    patch.setattr(BertModel, "sentence_embedding", plain_embedding)
    patch.setattr(WordEmbedding, "forward", lambda self, ids: F.embedding(ids, self.weight, self.padding_idx))
    patch.setattr(Convolution, "forward", nn.Conv1d.forward)
    patch.setattr(LoRALinear, "forward", plain_lora)
    patch.setattr(DoRALinear, "forward", plain_dora, raising=False)
    kept = ("params", "lr", "weight_decay", "tasks")
    for name, optimizer in trainer.optimizers.by_name.items():
        groups = [{key: group[key] for key in kept} for group in optimizer.param_groups]
        trainer.optimizers.by_name[name] = OPTIMIZERS[trainer.config.train.optim](groups, lr=trainer.config.train.lr)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags of runs of a two-layer model on 100 examples a task, without dropout."""
    folder = tmp_path_factory.mktemp("plain")
    words: list[object] = ["--pretrained", make_bert(folder / "bert"), "--data_dir", cut(folder / "data", 100)]
    words += ["--max_length", 64, "--threads", 1, "--batch_size", 8, "--lr", 1e-4, "--epochs", 4]
    return [*words, "--routine", "interleave", *STILL]


def losses(flags: list[object], folder: Path, dtype: torch.dtype, plain: bool) -> np.ndarray:
    """Return the losses of the first batches [STEPS]."""
    trainer = make_trainer([str(word) for word in flags], folder, double=dtype == torch.float64)
    per_epoch = 18 // len(steps_of(trainer)[0].batches)  # so that all stages of freezing come
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            make_plain(trainer, patch)
        results = [result for _, result in first_steps(trainer, 3 * per_epoch, per_epoch)]
    found = [batch.loss.item() for result in results for batch in result.batches]
    assert len(found) >= STEPS
    return np.array(found[:STEPS])


PAL = ["--pal_size", 8, "--pal_heads", 2]
SMART = ["--sst_smart", 1, "--quora_smart", 1, "--sts_smart", 1, "--smart_epsilon", 1e-2, "--smart_eta", 1e-2]
STEADY: list[list[object]] = [
    ["--arch", "v1", "--optim", "SGD"],
    ["--arch", "v2", "--optim", "AdamW"],
    ["--arch", "r4", "--optim", "SGD"],
    ["--arch", "v1", "--optim", "SGD", "--lora_mode", "all-lin-only", "--lora_rank", 4],
    ["--arch", "v1", "--optim", "AdamW", "--lora_mode", "attn-only", "--dora"],
    ["--arch", "v1", "--optim", "SGD", "--pal", "mixed", "--pal_low_rank_size", 6, *PAL],
    ["--arch", "v2", "--optim", "SGD", "--routine", "joint", "--pcgrad"],
]
OTHERS: list[list[object]] = [
    ["--arch", "yin-yang", "--optim", "AdamW"],
    ["--arch", "duality", "--optim", "RAdam", "--fine_tune_mode", "iterative"],
    ["--arch", "baseline", "--optim", "Adam", "--clip", 0.5],
    ["--arch", "r1-baseline", "--optim", "Adamax", "--routine", "joint"],
    ["--arch", "cosine", "--optim", "AdamW", "--sts_embedding_loss", "cosine"],
    ["--arch", "yin-yang", "--optim", "SGD", "--lora_mode", "all-lin", "--lora_rank", 2, "--dora"],
    ["--arch", "v2", "--optim", "AdamW", "--pal", "pal", "--pal_residual", "attention", *PAL],
    ["--arch", "v1", "--optim", "SGD", *SMART],
]


def named(more: list[object]) -> str:
    return " ".join(map(str, more))


@pytest.mark.parametrize("more", [*STEADY, *OTHERS], ids=named)
def test_fifty_steps_in_float64(flags: list[object], tmp_path: Path, more: list[object]) -> None:
    found, wanted = (losses([*flags, *more], tmp_path / str(plain), torch.float64, plain) for plain in (False, True))
    assert found.std() > 0.01
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("more", STEADY, ids=named)
def test_fifty_steps_in_fp32(
    flags: list[object], tmp_path: Path, more: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small products go to oneDNN too, where there is one."""
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 1)
    found, wanted = (losses([*flags, *more], tmp_path / str(plain), torch.float32, plain) for plain in (False, True))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
