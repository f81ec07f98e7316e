"""Heads: modules that map sentence embeddings to the outputs of a task."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import Linear
from config import ModelOptions
from kernels.dropout import Dropout


class SharedBatch(Protocol):
    """What normalises a batch of which this process has a part only."""

    def count(self, x: Tensor) -> int:
        """Values for each channel in the whole batch, of which `x` [N, C] or [N, C, L] is a part."""

    def batch_norm(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, momentum: float,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """`x` normalised by the statistics of the whole batch, which also move the running ones by `momentum`."""


class BatchNorm(nn.Module):
    """Batch normalisation over [N, C] or [N, C, L] with running statistics of their own for each name in `stats`.

    A layer that several tasks share sees batches of all of them; with one set of statistics the task trained last
    would set the scale on which every other task is evaluated. A batch with one value per channel has no variance and
    is normalised with the running statistics.

    Running statistics forget by `momentum`, or, while `batches` is a counter, are the equal-weight mean over the
    batches since it was empty.

    Where `shared` is set, statistics are those of a batch that several processes share.
    """

    momentum, eps = 0.1, 1e-5

    def __init__(self, channels: int, stats: Sequence[str] = ("all",)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        for name in stats:
            self.register_buffer(f"running_mean_{name}", torch.zeros(channels))
            self.register_buffer(f"running_var_{name}", torch.ones(channels))
        self.batches: Counter[str] | None = None
        self.shared: SharedBatch | None = None

    def forward(self, x: Tensor, stats: str = "all") -> Tensor:
        """The normalised `x`; in training also updates the running statistics of `stats`."""
        mean, var = self.get_buffer(f"running_mean_{stats}"), self.get_buffer(f"running_var_{stats}")
        count = x.numel() // x.shape[1] if self.shared is None else self.shared.count(x)
        use_batch = self.training and count > 1
        momentum = self.momentum
        if use_batch and self.batches is not None:
            self.batches[stats] += 1
            momentum = 1 / self.batches[stats]
        if use_batch and self.shared is not None:
            return self.shared.batch_norm(x, mean, var, self.weight, self.bias, momentum, self.eps)
        return F.batch_norm(x, mean, var, self.weight, self.bias, use_batch, momentum, self.eps)


class PairLayer(nn.Module):
    """The feature layer that pair tasks share (R0, appendix I): Linear-[BN]-ReLU-Linear-[BN]."""

    def __init__(self, width_in: int, width_out: int, batchnorm: bool, stats: Sequence[str]) -> None:
        super().__init__()
        self.stats = tuple(stats)
        self.dense = Linear(width_in, width_out)
        self.out = Linear(width_out, width_out)
        self.norm = BatchNorm(width_out, stats) if batchnorm else None
        self.out_norm = BatchNorm(width_out, stats) if batchnorm else None

    def forward(self, features: Tensor, task: str) -> Tensor:
        """Map [B, width_in] to [B, width_out]."""
        stats = task if task in self.stats else self.stats[0]
        hidden = self.dense(features)
        hidden = F.relu(hidden if self.norm is None else self.norm(hidden, stats))
        out = self.out(hidden)
        return out if self.out_norm is None else self.out_norm(out, stats)


class Convolution(nn.Conv1d):
    """nn.Conv1d of one channel, computed as products with sliding windows in a tenth of the time on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 1, L] to [N, C, L - width + 1]."""
        assert self.bias is not None
        width = self.weight.shape[2]
        length = x.shape[2] - width + 1
        windows = torch.cat([x[:, :, at : at + length] for at in range(width)], 1)  # [N, width, length]
        # One product for each example. For a single product torch would copy everything into another order.
        weight = self.weight.squeeze(1).expand(len(x), -1, -1)  # [N, C, width]
        return torch.baddbmm(self.bias[:, None], weight, windows)


class CosineHead(nn.Module):
    """Similarity as the cosine of two embeddings, after an optional linear layer and activation (R3, R4).

    A cosine of 1 gives the label `highest`.
    """

    def __init__(self, width: int, options: ModelOptions, highest: float) -> None:
        super().__init__()
        self.highest = highest
        self.projection = nn.Sequential(Dropout(options.hidden_dropout_prob))
        if options.sts_projection:
            self.projection.extend([Linear(width, width), ACTIVATIONS[str(options.head_activation)]()])

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """Map two embeddings [B, H] to [B, 1], between -highest and highest."""
        return self.highest * F.cosine_similarity(self.projection(u), self.projection(v))[:, None]


def build_head(options: ModelOptions, width: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a head that maps features [B, width] to outputs [B, outputs]; `hidden` is the backbone's width H.

    linear: Linear. nonlinear: Linear(H/2)-[BN]-act-Linear. conv: Conv1d(1, 4, 3)-[BN]-Flatten, then --head_layers
    times (Linear(H/2)-[BN]-act), then Linear. mlp: --head_layers times (Linear(H)-act-Dropout), then Linear. Every head
    begins with dropout. The dropout before the last layer of an mlp can differ (R4, section 4.2). --head_width replaces
    H and H/2.
    """
    layers: list[nn.Module] = [Dropout(options.hidden_dropout_prob)]
    activation = ACTIVATIONS[str(options.head_activation)]
    depth = {"linear": 0, "nonlinear": 1}.get(str(options.clf), options.head_layers or 0)
    if options.clf == "conv":
        layers += [nn.Unflatten(1, (1, width)), Convolution(1, CONV_CHANNELS, CONV_WIDTH)]
        layers += [BatchNorm(CONV_CHANNELS)] if options.head_batchnorm else []
        layers += [nn.Flatten()]
        width = CONV_CHANNELS * (width - CONV_WIDTH + 1)
    inner = options.head_width or (hidden if options.clf == "mlp" else hidden // 2)
    dropouts = [options.hidden_dropout_prob] * depth
    if options.output_dropout_prob is not None:
        dropouts[-1] = options.output_dropout_prob
    for dropout in dropouts:
        layers += [Linear(width, inner)]
        if options.clf == "mlp":
            layers += [activation(), Dropout(dropout)]
        else:
            layers += [BatchNorm(inner)] if options.head_batchnorm else []
            layers += [activation()]
        width = inner
    return nn.Sequential(*layers, Linear(width, outputs))


def pair_features(u: Tensor, v: Tensor, names: Sequence[str]) -> Tensor:
    """Return the named features of two embeddings [B, H] side by side: u, v, abs(u-v), u*v, cos [B, 1], v-u."""
    features = {
        "u": lambda: u,
        "v": lambda: v,
        "abs": lambda: (u - v).abs(),
        "mul": lambda: u * v,
        "cos": lambda: F.cosine_similarity(u, v)[:, None],
        "diff": lambda: v - u,
    }
    return torch.cat([features[name]() for name in names], dim=1)


ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
CONV_CHANNELS, CONV_WIDTH = 4, 3
