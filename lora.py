"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024): layers that train a low-rank update beside a frozen nn.Linear.

A wrapped layer keeps the names `weight` and `bias`, so a backbone's own tensors have the same names with and without
adapters. The trained tensors beside them are `lora_A`, `lora_B` and, in DoRA, `magnitude`.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_bert import describe_mismatches
from config import LoraOptions
from kernels.dropout import Dropout
from kernels.half_low_rank import LowRank
from kernels.linear import linear
from kernels.low_rank import low_rank_linear, updated_weight, without_autocast
from utils.errors import UserError
from utils.options import upper_bound
from utils.untrusted import parse_json

# The linear layers of one BERT layer that can be wrapped, and their paths inside a layer of transformers' BertModel.
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
CANCELLATION = 0.1  # a squared norm below this share of its positive terms has lost too many digits


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers are wrapped, and how (R0, section 4.4.5).

    The mode `attn` wraps query, key and value; `all-lin` wraps all linear layers of the BERT layers. With `-only`,
    everything else in the backbone is frozen; without it, the rest follows the unfreezing schedule. `targets` replace
    the layers of the mode. The update is scaled by alpha/rank, or by alpha/sqrt(rank) with `rslora`
    (Kalajdzievski 2023). `alpha` None means alpha = rank. `dora_norm` `column` is R0's formula taken literally.

    Raises UserError for an impossible value.
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
            raise _bad_option("mode", self.mode, f"choose one of {', '.join(MODES)}, or none")
        rank, alpha, dropout = map(_upper_bound, ("lora_rank", "lora_alpha", "lora_dropout"))
        if not _is_number(self.rank, int) or not 1 <= self.rank <= rank:
            raise _bad_option("r", self.rank, f"give a whole number of at least 1 and at most {rank}")
        if self.alpha is not None and not (_is_number(self.alpha, int, float) and 0 < self.alpha <= alpha):
            remedy = f"give a number above 0 and at most {alpha}, or leave it out for alpha = r"
            raise _bad_option("alpha", self.alpha, remedy)
        if not _is_number(self.dropout, int, float) or not 0 <= self.dropout <= dropout:
            raise _bad_option("dropout", self.dropout, f"give a number from 0 to {dropout}")
        if self.dora_norm not in DORA_NORMS:
            raise _bad_option("dora_norm", self.dora_norm, f"choose one of {', '.join(DORA_NORMS)}")
        if self.dora_norm != "row" and not self.dora:
            raise _bad_option("dora_norm", self.dora_norm, "it belongs to DoRA; add dora 1 or leave it out")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown:
            raise _bad_option("targets", ",".join(map(str, unknown)), f"choose from {','.join(TARGETS)}")

    @classmethod
    def from_options(cls, options: LoraOptions) -> "LoRAConfig | None":
        """Return what the flags ask for, or None where they ask for no adapters."""
        if options.lora_dict is not None:
            return cls.from_lora_dict(options.lora_dict)
        if options.lora_mode == "none":
            return None
        values = {spec.name: getattr(options, _flag(spec.name)) for spec in fields(cls)}
        return cls(**{**values, "targets": options.lora_targets or ()})

    def to_options(self) -> LoraOptions:
        """Return the flags that ask for this configuration."""
        values = {_flag(spec.name): getattr(self, spec.name) for spec in fields(self)}
        return LoraOptions(**{**values, "lora_targets": self.targets or None})

    @classmethod
    def from_lora_dict(cls, text: str) -> "LoRAConfig | None":
        """Read R0's flag, such as '{"mode": "attn-only", "r": 1, "dora": 1}'; return None for the mode `none`.

        The keys are the fields of this class, with `r` for the rank. Switches take 0, 1, false and true. Raises
        UserError for text that is no JSON object, for an unknown key and for an impossible value.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise UserError(
                f"--lora_dict {text}: is no JSON ({error}); write it as "
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
                raise _bad_option(key, values[key], "give 0 or 1")
            values[key] = bool(values.get(key, 0))
        if "targets" in values:
            values["targets"] = _parse_targets(values["targets"])
        return cls(**{names[key]: value for key, value in values.items()})

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the wrapped linear layers."""
        return self.targets or MODES[self.mode]

    @property
    def scaling(self) -> float:
        """s, the factor of the low-rank update."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def freezes_rest(self) -> bool:
        """Whether everything in the backbone except the adapters is frozen."""
        return self.mode.endswith("-only")


def _flag(name: str) -> str:
    """Return the name in LoraOptions of a field of LoRAConfig."""
    return name if name in LoraOptions.__dataclass_fields__ else f"lora_{name}"


def _bad_option(key: str, value: Any, remedy: str) -> UserError:
    return UserError(f"--lora_dict: {key} is {value!r}; {remedy}")


def _upper_bound(name: str) -> Any:
    """Return the upper bound of a number in LoraOptions, as which a checkpoint stores what a LoRAConfig asks for."""
    return upper_bound(float, LoraOptions.__dataclass_fields__[name].metadata)


def _is_number(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _parse_targets(value: Any) -> tuple[str, ...]:
    """Return the names of layers in a JSON list or in a comma-separated text."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _bad_option("targets", value, f"give a list of names from {','.join(TARGETS)}")
    return tuple(name.strip() for name in names)


class LoRALinear(nn.Module):
    """y = W0 x + b + s B A dropout(x), with W0 [out, in] and b frozen, A [r, in] and B [out, r] trained.

    Source: Hu et al. 2021, section 4.1. A is drawn from N(0, 1/r^2), as peft's `gaussian` does (the paper gives no
    width). B is zero at first, so the layer starts as the one it wraps. It takes that layer's parameters over and does
    not copy them.
    """

    adapters: tuple[str, ...] = ("lora_A", "lora_B")

    def __init__(self, wrapped: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.wrapped_class = type(wrapped)  # for `restore`
        self.weight, self.bias = wrapped.weight.requires_grad_(False), wrapped.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        out_features, in_features = self.weight.shape
        self.scaling = config.scaling
        self.dropout = Dropout(config.dropout)
        self.lora_A = nn.Parameter(self.weight.new_empty(config.rank, in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(out_features, config.rank))
        nn.init.normal_(self.lora_A, std=1 / config.rank)
        self.register_buffer("merged_weight", None, persistent=False)
        self.merged_weight: Tensor | None

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Map [..., in] to [..., out]; with `gelu`, return the GELU of that."""
        if self.merged_weight is not None:
            return linear(x, self.merged_weight, self.bias, gelu)
        dropped = self.training and self.dropout.p
        y = self.adapt_dropped(x, self.dropout(x)) if dropped else self.adapt(x, self.bias)
        return F.gelu(y) if gelu else y

    def parts(self) -> LowRank | None:
        """Return W0 with its update, or None under dropout, for merged weights and unless they are fp32."""
        dropped = self.training and self.dropout.p
        if dropped or self.bias is None or self.merged_weight is not None or self.weight.dtype != torch.float32:
            return None
        return LowRank(self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, None)

    def adapt(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return (W0 + s B A) x + bias."""
        return low_rank_linear(x, self.weight, bias, self.lora_A, self.lora_B, self.scaling)

    def adapt_dropped(self, x: Tensor, dropped: Tensor) -> Tensor:
        """Return W0 x + b + s B A dropped."""
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B)
        return linear(x, self.weight, self.bias) + self.scaling * update

    def adapted_weight(self) -> Tensor:
        """Return W' [out, in], the weight of a plain layer that computes the same."""
        return updated_weight(self.weight, self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with the present W' from now on, instead of W0 and the adapters. `weight` itself never changes."""
        self.merged_weight = self.adapted_weight()

    def unmerge(self) -> None:
        """Undo `merge`."""
        self.merged_weight = None


class DoRALinear(LoRALinear):
    """y = m V/norm(V) x + b, with V = W0 + s B A, norms over `in`, and m [out, 1] trained, which starts as norm(W0).

    Source: Liu et al. 2024. As their section 4.3 suggests, norm(V) follows A and B, but the gradient treats it as a
    constant. The factor m/norm(V) does not scale the bias. With dropout, y = W0 x + b + (W' - W0) dropout(x), where
    W' = m V/norm(V). A row of zeros in W0 stays a row of zeros.
    """

    adapters = ("lora_A", "lora_B", "magnitude")

    def __init__(self, wrapped: nn.Linear, config: LoRAConfig) -> None:
        super().__init__(wrapped, config)
        self.register_buffer("squared_norm", self._squared_norm(), persistent=False)  # [out], constant as W0 is
        self.squared_norm: Tensor
        self.magnitude = nn.Parameter(self.squared_norm.sqrt()[:, None].to(self.weight.dtype))

    def _squared_norm(self) -> Tensor:
        return _at_least_fp32(self.weight.detach()).square().sum(1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.squared_norm = self._squared_norm()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return norm(V) [out] in at least fp32, without making V on a CPU.

        norm(V)^2 = norm(W0)^2 + 2 s <W0 A^T, B> + s^2 <B A A^T, B>. The terms cancel where an update nearly undoes its
        row, so those rows of V are made after all. On a GPU the search for such rows would make the host wait, and
        making all of V takes less time.
        """
        with without_autocast(self.weight.device):
            w, a, b = (_at_least_fp32(t) for t in (self.weight, self.lora_A, self.lora_B))
            if w.device.type != "cpu" or torch.compiler.is_compiling():
                return torch.addmm(w, b, a, alpha=self.scaling).norm(dim=1)
            positive = self.squared_norm + self.scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
            squared = positive + 2 * self.scaling * ((w @ a.t()) * b).sum(1)
            norm = squared.clamp(min=0).sqrt()
            if (cancelled := squared < CANCELLATION * positive).any():
                norm[cancelled] = torch.addmm(w[cancelled], b[cancelled], a, alpha=self.scaling).norm(dim=1)
        return norm

    def parts(self) -> LowRank | None:
        """Return W0 with its update and m."""
        parts = super().parts()
        return None if parts is None else parts._replace(magnitude=self.magnitude)

    def factor(self) -> Tensor:
        """Return m/norm(V) [out]."""
        return self.magnitude.squeeze(1) / _positive(self.norm())

    def adapt(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W' x + bias."""
        return low_rank_linear(x, self.weight, bias, self.lora_A, self.lora_B, self.scaling, self.factor())

    def adapt_dropped(self, x: Tensor, dropped: Tensor) -> Tensor:
        """Return W0 x + b + (W' - W0) dropped, computed as W0 (x - dropped) + b + W' dropped."""
        return linear(x - dropped, self.weight, self.bias) + self.adapt(dropped, None)

    def adapted_weight(self) -> Tensor:
        """Return W' [out, in]."""
        return super().adapted_weight() * self.factor()[:, None].to(self.weight.dtype)


class ColumnDoRALinear(DoRALinear):
    """DoRA by R0's formula taken literally (R0, section 4.4.4): norms over `out`, m [1, in], a gradient of the norm."""

    def __init__(self, wrapped: nn.Linear, config: LoRAConfig) -> None:
        super().__init__(wrapped, config)
        norm = _at_least_fp32(self.weight.detach()).norm(dim=0, keepdim=True)
        self.magnitude = nn.Parameter(norm.to(self.weight.dtype))

    def parts(self) -> None:
        """Return None: the factor belongs to the input."""

    def factor(self) -> Tensor:
        """Return m/norm(V) [in]."""
        norm = _at_least_fp32(LoRALinear.adapted_weight(self)).norm(dim=0)
        return self.magnitude.squeeze(0) / _positive(norm)

    def adapt(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W' x + bias."""
        return LoRALinear.adapt(self, x * self.factor().to(x.dtype), bias)

    def adapted_weight(self) -> Tensor:
        """Return W' [out, in]."""
        return LoRALinear.adapted_weight(self) * self.factor().to(self.weight.dtype)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _positive(norm: Tensor) -> Tensor:
    """Replace zeros by the smallest positive number, so that 0/0 gives 0."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield the name and the module of every wrapped layer."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def inject(backbone: nn.Module, config: LoRAConfig) -> None:
    """Wrap the linear layers that `config` names, in place.

    Load the backbone's weights first, since DoRA's magnitudes start from them. Raises ValueError where there is nothing
    to wrap, for example in a backbone that has adapters already.
    """
    layer_class: type[LoRALinear] = LoRALinear
    if config.dora:
        layer_class = DoRALinear if config.dora_norm == "row" else ColumnDoRALinear
    _replace(backbone, nn.Linear, config.linears, lambda layer: layer_class(layer, config))


def restore(backbone: nn.Module) -> None:
    """Undo `inject`: put back the plain linear layers with their weights, trainable."""

    def unwrap(layer: LoRALinear) -> nn.Linear:
        out_features, in_features = layer.weight.shape
        with torch.device("meta"):
            plain = layer.wrapped_class(in_features, out_features)
        plain.weight, plain.bias = layer.weight, layer.bias
        return plain.requires_grad_(True)

    _replace(backbone, LoRALinear, tuple(TARGETS), unwrap)


def _replace(backbone: nn.Module, layer_class: type, names: tuple[str, ...], make: Any) -> None:
    """Replace every module of this class and with one of these names by `make(module)`."""
    found = [
        (parent, name, module)
        for parent in backbone.modules()
        for name, module in parent.named_children()
        if name in names and isinstance(module, layer_class)
    ]
    if not found:
        raise ValueError(f"the model has no {layer_class.__name__} named {' or '.join(names)}")
    for parent, name, module in found:
        setattr(parent, name, make(module))


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Let the model compute with merged weights inside, as fast as without adapters.

    This is for evaluation: the adapters get no gradient inside and must not change. The state dict stays the same, so a
    checkpoint or a hash made inside equals one made outside.
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
def merged_state_dict(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a plain backbone that computes the same: W' as `weight`, and no adapters."""
    weights = {f"{name}.weight": layer.adapted_weight() for name, layer in adapted_layers(backbone)}
    return {name: weights.get(name, tensor) for name, tensor in base_state_dict(backbone).items()}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' tensors by their names in the model, without copying them."""
    return {
        f"{name}.{adapter}": layer.get_parameter(adapter).detach()
        for name, layer in adapted_layers(model)
        for adapter in layer.adapters
    }


def base_state_dict(backbone: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a backbone except the adapters', without copying them."""
    adapters = adapter_state_dict(backbone)
    return {name: tensor for name, tensor in backbone.state_dict().items() if name not in adapters}


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], source: str = "adapter weights") -> None:
    """Copy what `adapter_state_dict` returned into a model with the same adapters.

    Raises UserError that lists the missing, left-over and misshapen tensors; the model is then unchanged.
    """
    wanted = adapter_state_dict(model)
    if lists := describe_mismatches(state, {name: tensor.shape for name, tensor in wanted.items()}):
        raise UserError(
            f"{source}: the tensors do not fit the model's adapters ({lists}); "
            "use the --lora_dict and the backbone that they were trained with"
        )
    for name, tensor in wanted.items():
        tensor.copy_(state[name])


def base_weights_sha256(backbone: nn.Module) -> str:
    """Return the SHA-256 over names, types, shapes and values of `base_state_dict`, in hexadecimal.

    It is the same before and after `inject`, so a checkpoint of adapters can name its base by it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state_dict(backbone).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
