"""Heads: modules that map sentence embeddings to the outputs of a task."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import Linear
from config import ModelOptions
from kernels.dropout import Dropout


class BatchNorm(nn.Module):
    """Batch normalisation over [N, C] or [N, C, L] with running statistics for each name in `stats`.

    A layer that several tasks share sees batches of all of them. With one set of statistics, the task trained last
    would set the scale on which every other task is evaluated. A batch with one value per channel has no variance; it
    is normalised with the running statistics.

    Running statistics forget by `momentum`. While `batches` is a counter, they are the equal-weight mean over the
    batches since the counter was empty. If `sum_over_ranks` is set, a batch is spread over several processes, and its
    statistics are those of all of it.
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
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, stats: str = "all") -> Tensor:
        """Return the normalised `x`; in training, also update the running statistics of `stats`."""
        mean, var = self.get_buffer(f"running_mean_{stats}"), self.get_buffer(f"running_var_{stats}")
        spread = self.sum_over_ranks is not None
        use_batch = self.training and (spread or x.numel() // x.shape[1] > 1)
        momentum = self.momentum
        if use_batch and self.batches is not None:
            self.batches[stats] += 1
            momentum = 1 / self.batches[stats]
        if use_batch and spread:
            return self.normalise_over_ranks(x, mean, var, momentum)
        return F.batch_norm(x, mean, var, self.weight, self.bias, use_batch, momentum, self.eps)

    def normalise_over_ranks(self, x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> Tensor:
        """Return what F.batch_norm returns in training for the batch of all ranks, of which `x` is this rank's part.

        Sums are taken in float64: there, the mean of squares less the square of the mean loses nothing that fp32 had.
        """
        assert self.sum_over_ranks is not None
        dims, wide = [0, *range(2, x.dim())], x.double()
        total = wide.sum(dims)  # [C]
        values = torch.full_like(total, x.shape[0] * x.shape[2:].numel())  # of each channel, on this rank
        total, squares, values = self.sum_over_ranks(torch.stack([total, wide.square().sum(dims), values]))
        mean = torch.where(values > 1, total / values, running_mean)
        var = torch.where(values > 1, squares / values - mean.square(), running_var)
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = var * values / (values - 1).clamp_min(1)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        shape = (-1, *[1] * (x.dim() - 2))  # of a channel's values beside x
        scale = self.weight * (var + self.eps).rsqrt()
        return (wide * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)


class PairLayer(nn.Module):
    """The feature layer that pair tasks share (R0, appendix I).

    `batchnorm`: Linear-BN-ReLU-Linear-BN. `plain`: Linear-ReLU-Linear. `linear`: Linear (R0, figure 7).
    """

    def __init__(self, width_in: int, width_out: int, kind: str, stats: Sequence[str]) -> None:
        super().__init__()
        self.stats = tuple(stats)
        batchnorm = kind == "batchnorm"
        self.dense = Linear(width_in, width_out)
        self.out = None if kind == "linear" else Linear(width_out, width_out)
        self.norm = BatchNorm(width_out, stats) if batchnorm else None
        self.out_norm = BatchNorm(width_out, stats) if batchnorm else None

    def forward(self, features: Tensor, task: str) -> Tensor:
        """Map [B, width_in] to [B, width_out]."""
        stats = task if task in self.stats else self.stats[0]
        hidden = self.dense(features)
        if self.out is None:
            return hidden
        hidden = F.relu(hidden if self.norm is None else self.norm(hidden, stats))
        out = self.out(hidden)
        return out if self.out_norm is None else self.out_norm(out, stats)


class AddChannel(nn.Module):
    """nn.Unflatten(1, (1, L)) that --export_onnx can write down for batches of any size."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, L] to [N, 1, L]."""
        return x.unsqueeze(1)


class Convolution(nn.Conv1d):
    """nn.Conv1d of one channel, computed as products with sliding windows in a tenth of the time on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 1, L] to [N, C, L - width + 1]."""
        assert self.bias is not None
        width = self.weight.shape[2]
        length = x.shape[2] - width + 1
        windows = torch.cat([x[:, :, at : at + length] for at in range(width)], 1)  # [N, width, length]
        # One product for each example. For a single product torch would copy everything into another order.
        weight = self.weight.squeeze(1).expand(x.shape[0], -1, -1)  # [N, C, width]
        return torch.baddbmm(self.bias[:, None], weight, windows)


class CosineHead(nn.Module):
    """Similarity as the cosine of two embeddings, after optional linear layers, each with an activation (R3, R4).

    `layers` is their number, by default one with --sts_projection. A cosine of 1 gives the label `highest`.
    """

    def __init__(self, width: int, options: ModelOptions, highest: float, layers: int | None = None) -> None:
        super().__init__()
        self.highest = highest
        self.projection = nn.Sequential(Dropout(options.hidden_dropout_prob))
        for _ in range(int(bool(options.sts_projection)) if layers is None else layers):
            self.projection.extend([Linear(width, width), ACTIVATIONS[str(options.head_activation)]()])

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """Map two embeddings [B, H] to [B, 1], between -highest and highest."""
        return self.highest * F.cosine_similarity(self.projection(u), self.projection(v))[:, None]


class ResidualHead(nn.Module):
    """Similarity as the cosine of two embeddings plus what `regression` makes of their `features`, 0 at the start.

    So a model whose embeddings were trained for cosines begins with what it knows, as a residual block begins as the
    identity (Goyal et al. 2017, section 5.1). A cosine of 1 gives the label `highest`.
    """

    def __init__(self, regression: nn.Sequential, features: Sequence[str], highest: float) -> None:
        super().__init__()
        self.regression, self.features, self.highest = regression, tuple(features), highest
        for parameter in regression[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """Map two embeddings [B, H] to [B, 1]."""
        cosine = F.cosine_similarity(u, v)[:, None]
        return self.highest * cosine + self.regression(pair_features(u, v, self.features))


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
        layers += [AddChannel(), Convolution(1, CONV_CHANNELS, CONV_WIDTH)]
        layers += [BatchNorm(CONV_CHANNELS)] if options.head_batchnorm else []
        layers += [nn.Flatten()]
        width = CONV_CHANNELS * (width - CONV_WIDTH + 1)
    inner = options.head_width or (hidden if options.clf == "mlp" else hidden // 2)
    dropouts = [options.hidden_dropout_prob] * depth
    if depth and options.output_dropout_prob is not None:
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
