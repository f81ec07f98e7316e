"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024): wrappers that train a low-rank update beside a frozen nn.Linear.

A wrapped layer keeps the names `weight` and `bias`, so that a backbone's own tensors are called the same with and
without adapters; the trained tensors beside them are `lora_A`, `lora_B` and, in DoRA, `magnitude`.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_bert import misfits
from config import LoraOptions, upper_bound
from kernels.dropout import Dropout
from kernels.linear import linear
from kernels.low_rank import _LowRankLinear, _own_precision, _updated
from utils.errors import UserError

# The linears of one BERT layer that can be wrapped, and their paths inside a layer of transformers' BertModel.
TARGETS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_dense": "attention.output.dense",
    "interm_dense": "intermediate.dense",
    "out_dense": "output.dense",
}
MODES = {
    "attn": ("query", "key", "value"),
    "attn-only": ("query", "key", "value"),
    "all-lin": tuple(TARGETS),
    "all-lin-only": tuple(TARGETS),
}
DORA_NORMS = ("row", "column")
CANCELLATION = 0.1  # share of its terms below which a squared norm has lost too many digits to their cancellation


# ----------------------------------------------------------------------------------------------------------------------
# Options


def _refuse(key: str, value: Any, remedy: str) -> UserError:
    return UserError(f"--lora_dict: {key} is {value!r}; {remedy}")


@dataclass(frozen=True)
class LoRAConfig:
    """What is wrapped and how (R0, section 4.4.5).

    `mode`: `attn` wraps query, key and value, `all-lin` all linears of the layers; with `-only` everything else in the
    backbone is frozen, without it the rest follows the unfreezing schedule. `targets`, if given, are wrapped in place
    of the mode's own. The update is scaled by alpha/rank, with `rslora` by alpha/sqrt(rank) (Kalajdzievski 2023);
    `alpha` None is alpha = rank. `dora_norm` `column` is R0's formula taken literally.

    Raises UserError for a value that cannot be.
    """

    mode: str = "attn-only"
    rank: int = 1
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False
    dora_norm: str = "row"
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise _refuse("mode", self.mode, f"choose one of {', '.join(MODES)}, or none")
        rank, alpha, dropout = map(_most, ("lora_rank", "lora_alpha", "lora_dropout"))
        if not _is_number(self.rank, int) or not 1 <= self.rank <= rank:
            raise _refuse("r", self.rank, f"give a whole number of at least 1 and at most {rank}")
        if self.alpha is not None and not (_is_number(self.alpha, int, float) and 0 < self.alpha <= alpha):
            remedy = f"give a number above 0 and at most {alpha}, or leave it out for alpha = r"
            raise _refuse("alpha", self.alpha, remedy)
        if not _is_number(self.dropout, int, float) or not 0 <= self.dropout <= dropout:
            raise _refuse("dropout", self.dropout, f"give a number from 0 to {dropout}")
        if self.dora_norm not in DORA_NORMS:
            raise _refuse("dora_norm", self.dora_norm, f"choose one of {', '.join(DORA_NORMS)}")
        if self.dora_norm != "row" and not self.dora:
            raise _refuse("dora_norm", self.dora_norm, "it belongs to DoRA; add dora 1 or leave it out")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown:
            raise _refuse("targets", ",".join(map(str, unknown)), f"choose from {','.join(TARGETS)}")

    @classmethod
    def from_options(cls, options: LoraOptions) -> "LoRAConfig | None":
        """What the flags ask for; None where they ask for no adapters."""
        if options.lora_dict is not None:
            return cls.from_lora_dict(options.lora_dict)
        if options.lora_mode == "none":
            return None
        return cls(
            mode=options.lora_mode,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            rslora=options.rslora,
            dropout=options.lora_dropout,
            dora=options.dora,
            dora_norm=options.dora_norm,
            targets=options.lora_targets or (),
        )

    def to_options(self) -> LoraOptions:
        """The flags that ask for this."""
        return LoraOptions(
            lora_mode=self.mode,
            lora_rank=self.rank,
            lora_alpha=self.alpha,
            rslora=self.rslora,
            lora_dropout=self.dropout,
            dora=self.dora,
            dora_norm=self.dora_norm,
            lora_targets=self.targets or None,
        )

    @classmethod
    def from_lora_dict(cls, text: str) -> "LoRAConfig | None":
        """The options of R0's flag, as '{"mode": "attn-only", "r": 1, "dora": 1}'; None for the mode `none`.

        Keys are the fields of this class with `r` for the rank; switches take 0, 1, false and true.
        Raises UserError for text that is no JSON object, for an unknown key and for a value that cannot be.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"--lora_dict {text:.200}: is no JSON ({error}); write it as "
                """'{"mode": "attn-only", "r": 1, "dora": 1}' with the quotes of both kinds"""
            ) from error
        if not isinstance(values, dict):
            raise UserError(f'--lora_dict {text}: is no JSON object; write it as \'{{"mode": "attn-only", "r": 1}}\'')
        names = {"r" if f.name == "rank" else f.name: f.name for f in fields(cls)}
        for key in values:
            if key not in names:
                raise UserError(f"--lora_dict: unknown key {key!r}; choose from {', '.join(names)}")
        if values.get("mode") == "none":
            return None
        for key in ("rslora", "dora"):
            if values.get(key, 0) not in (0, 1):
                raise _refuse(key, values[key], "give 0 or 1")
            values[key] = bool(values.get(key, 0))
        if "targets" in values:
            values["targets"] = _names(values["targets"])
        return cls(**{names[key]: value for key, value in values.items()})

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the wrapped linears."""
        return self.targets or MODES[self.mode]

    @property
    def scaling(self) -> float:
        """s, the factor of the low-rank update."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def freezes_rest(self) -> bool:
        """Whether all of the backbone but the adapters is frozen."""
        return self.mode.endswith("-only")


def _most(name: str) -> Any:
    """The upper bound of one of LoraOptions' numbers: a checkpoint keeps what a LoRAConfig asks for as those."""
    return upper_bound(float, LoraOptions.__dataclass_fields__[name].metadata)


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _names(value: Any) -> tuple[str, ...]:
    """Target names from a JSON list or from a comma-separated text."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _refuse("targets", value, f"give a list of names from {','.join(TARGETS)}")
    return tuple(name.strip() for name in names)


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class LoRALinear(nn.Module):
    """W0 x + b + s B A dropout(x) with W0 [out, in] and b frozen, A [r, in] and B [out, r] trained (Hu et al. 2021).

    A is drawn from N(0, 1/r^2), as peft's `gaussian` does (the paper gives no width), and B is zero, so that the layer
    starts as the one it wraps. The wrapped layer's parameters are taken over, not copied.
    """

    adapters: tuple[str, ...] = ("lora_A", "lora_B")

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.kind = type(linear)  # of which `restore` makes one again
        self.weight, self.bias = linear.weight, linear.bias
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        out_features, in_features = linear.weight.shape
        self.scaling = config.scaling
        self.dropout = Dropout(config.dropout)
        self.lora_A = nn.Parameter(linear.weight.new_empty(config.rank, in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(out_features, config.rank))
        nn.init.normal_(self.lora_A, std=1 / config.rank)
        self.register_buffer("merged_weight", None, persistent=False)
        self.merged_weight: Tensor | None

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """[..., in] to [..., out]; with `gelu`, the GELU of that."""
        if self.merged_weight is not None:
            return linear(x, self.merged_weight, self.bias, gelu)
        dropped = self.training and self.dropout.p
        y = self.adapt_dropped(x, self.dropout(x)) if dropped else self.adapt(x, self.bias)
        return F.gelu(y) if gelu else y

    def adapt(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W' x + bias with the adapted weight W'."""
        return _LowRankLinear.apply(x, self.weight, bias, self.lora_A, self.lora_B, self.scaling, None)

    def adapt_dropped(self, x: Tensor, dropped: Tensor) -> Tensor:
        """W0 x + b + (W' - W0) dropped."""
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B)
        return linear(x, self.weight, self.bias) + self.scaling * update

    def adapted_weight(self) -> Tensor:
        """W' [out, in]."""
        return _updated(self.weight, self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """Use W' as it is now in place of W0 and the adapters; `weight` itself is never written to."""
        self.merged_weight = self.adapted_weight()

    def unmerge(self) -> None:
        """Undo `merge`."""
        self.merged_weight = None


class DoRALinear(LoRALinear):
    """m V/norm(V) x + b with V = W0 + s B A, norms over `in`, and m [out, 1] trained, at first norm(W0).

    As the paper suggests (Liu et al. 2024, section 4.3), norm(V) follows A and B but is treated as a constant by the
    gradient. The bias is not scaled. With dropout it is W0 x + b + (W' - W0) dropout(x). A row of zeros in
    W0 stays one.
    """

    adapters = ("lora_A", "lora_B", "magnitude")

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        super().__init__(linear, config)
        self.register_buffer("squared_norm", self._squared_norm(), persistent=False)  # [out], a constant as W0 is
        self.squared_norm: Tensor
        self.magnitude = nn.Parameter(self.squared_norm.sqrt()[:, None].to(linear.weight.dtype))

    def _squared_norm(self) -> Tensor:
        return _at_least_fp32(self.weight.detach()).square().sum(1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.squared_norm = self._squared_norm()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """norm(V) [out] in at least fp32, from norm(W0)^2 + 2 s <W0 A^T, B> + s^2 <B A A^T, B> without making V.

        Where an update nearly undoes its row the terms cancel; such rows are made after all. Looking for them
        would make the host wait for a GPU, which makes all of V in less time.
        """
        with _own_precision(self.weight.device):
            w, a, b = (_at_least_fp32(t) for t in (self.weight, self.lora_A, self.lora_B))
            if w.device.type != "cpu":
                return torch.addmm(w, b, a, alpha=self.scaling).norm(dim=1)
            positive = self.squared_norm + self.scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
            squared = positive + 2 * self.scaling * ((w @ a.t()) * b).sum(1)
            norm = squared.clamp(min=0).sqrt()
            if (cancelled := squared < CANCELLATION * positive).any():
                norm[cancelled] = torch.addmm(w[cancelled], b[cancelled], a, alpha=self.scaling).norm(dim=1)
        return norm

    def factor(self) -> Tensor:
        """m/norm(V) [out]."""
        return self.magnitude.squeeze(1) / _positive(self.norm())

    def adapt(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W' x + bias with the adapted weight W'."""
        return _LowRankLinear.apply(x, self.weight, bias, self.lora_A, self.lora_B, self.scaling, self.factor())

    def adapt_dropped(self, x: Tensor, dropped: Tensor) -> Tensor:
        """W0 x + b + (W' - W0) dropped, as W0 (x - dropped) + b + W' dropped."""
        return linear(x - dropped, self.weight, self.bias) + self.adapt(dropped, None)

    def adapted_weight(self) -> Tensor:
        """W' [out, in]."""
        return super().adapted_weight() * self.factor()[:, None].to(self.weight.dtype)


class ColumnDoRALinear(DoRALinear):
    """R0's DoRA formula taken literally (section 4.4.4): norms over `out`, m [1, in], the norm's gradient kept."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        super().__init__(linear, config)
        norm = _at_least_fp32(linear.weight.detach()).norm(dim=0, keepdim=True)
        self.magnitude = nn.Parameter(norm.to(linear.weight.dtype))

    def factor(self) -> Tensor:
        """m/norm(V) [in]."""
        norm = _at_least_fp32(LoRALinear.adapted_weight(self)).norm(dim=0)
        return self.magnitude.squeeze(0) / _positive(norm)

    def adapt(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W' x + bias with the adapted weight W'."""
        return LoRALinear.adapt(self, x * self.factor().to(x.dtype), bias)

    def adapted_weight(self) -> Tensor:
        """W' [out, in]."""
        return LoRALinear.adapted_weight(self) * self.factor().to(self.weight.dtype)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _positive(norm: Tensor) -> Tensor:
    """`norm` with its zeros raised to the smallest number, so that 0/0 is 0."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)


# ----------------------------------------------------------------------------------------------------------------------
# Models


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every wrapped layer of a model with its name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def inject(backbone: nn.Module, config: LoRAConfig) -> None:
    """Wrap the linears that `config` names, in place.

    Load the backbone's weights first: DoRA's magnitudes start from them. Raises ValueError where there is nothing to
    wrap, as in a backbone that has adapters already.
    """
    kind: type[LoRALinear] = LoRALinear
    if config.dora:
        kind = DoRALinear if config.dora_norm == "row" else ColumnDoRALinear
    _replace(backbone, nn.Linear, config.linears, lambda linear: kind(linear, config))


def restore(backbone: nn.Module) -> None:
    """Undo `inject`: the plain linears again, with their own weights, and trainable."""

    def unwrap(layer: LoRALinear) -> nn.Linear:
        out_features, in_features = layer.weight.shape
        with torch.device("meta"):
            linear = layer.kind(in_features, out_features)
        linear.weight, linear.bias = layer.weight, layer.bias
        return linear.requires_grad_(True)

    _replace(backbone, LoRALinear, tuple(TARGETS), unwrap)


def _replace(backbone: nn.Module, kind: type, names: tuple[str, ...], make: Any) -> None:
    """Put `make(module)` in the place of each module of this kind and with one of these names."""
    found = [
        (parent, name, module)
        for parent in backbone.modules()
        for name, module in parent.named_children()
        if name in names and isinstance(module, kind)
    ]
    if not found:
        raise ValueError(f"the model has no {kind.__name__} named {' or '.join(names)}")
    for parent, name, module in found:
        setattr(parent, name, make(module))


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes with merged weights, as fast as without adapters.

    Meant for evaluation: the adapters get no gradients and must not change inside. Nothing in the model's state is
    written to, so that a checkpoint or a hash made inside is the same as outside.
    """
    layers = [layer for _, layer in adapted_layers(model) if layer.merged_weight is None]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.unmerge()


@torch.no_grad()
def merged_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The state of a plain backbone that computes the same: W' as `weight` and no adapters."""
    weights = {f"{name}.weight": layer.adapted_weight() for name, layer in adapted_layers(backbone)}
    return {name: weights.get(name, tensor) for name, tensor in base_state(backbone).items()}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by their names in the model, without copying."""
    return {
        f"{name}.{own}": layer.get_parameter(own).detach()
        for name, layer in adapted_layers(model)
        for own in layer.adapters
    }


def base_state(backbone: nn.Module) -> dict[str, Tensor]:
    """All tensors of a backbone but the adapters', without copying."""
    adapters = adapter_state(backbone)
    return {name: tensor for name, tensor in backbone.state_dict().items() if name not in adapters}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], source: str = "adapter weights") -> None:
    """Copy what `adapter_state` returned into a model with the same adapters.

    Raises UserError that lists the missing, left-over and misshapen tensors; the model is then as it was.
    """
    wanted = adapter_state(model)
    if lists := misfits(state, {name: tensor.shape for name, tensor in wanted.items()}):
        raise UserError(
            f"{source}: the tensors do not fit the model's adapters ({lists}); "
            "use the --lora_dict and the backbone that they were trained with"
        )
    for name, tensor in wanted.items():
        tensor.copy_(state[name])


def base_weights_sha256(backbone: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of `base_state`, in hexadecimal.

    It is the same before and after `inject`. An adapter checkpoint names its base by it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state(backbone).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Freezing


def frozen_by_policy(backbone: nn.Module, config: LoRAConfig) -> set[str]:
    """Names of the parameters that never train: the wrapped layers' own; with `-only` all but the adapters."""
    if config.freezes_rest:
        adapters = adapter_state(backbone)
        return {name for name, _ in backbone.named_parameters() if name not in adapters}
    return {
        f"{layer_name}.{name}"
        for layer_name, layer in adapted_layers(backbone)
        for name, _ in layer.named_parameters()
        if name not in layer.adapters
    }


# ----------------------------------------------------------------------------------------------------------------------
# Exchange with peft

# What a peft configuration may ask for and this module has not: each key with the values that ask for nothing.
PEFT_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", None),  # the others change the base weights
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
}
