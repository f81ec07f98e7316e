"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024): wrappers that train a low-rank update beside a frozen nn.Linear.

A wrapped layer keeps the names `weight` and `bias`, so that a backbone's own tensors are called the same with and
without adapters; the trained tensors beside them are `lora_A`, `lora_B` and, in DoRA, `magnitude`.
"""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from base_bert import misfits, reason
from config import LoraOptions, UserError, highest
from kernels.dropout import Dropout
from kernels.linear import linear, product
from utils.files import read_json, shown, write_atomically, write_text

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
    return highest(float, LoraOptions.__dataclass_fields__[name].metadata)


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


def _own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside; nothing where there is none, since entering costs 50 microseconds."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def _updated(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """V = W0 + s B A [out, in], in the parameters' own precision under autocast too."""
    with _own_precision(weight.device):
        return torch.addmm(weight, b, a, alpha=scaling)


class _LowRankLinear(torch.autograd.Function):
    """c * (V x) + bias with V = W0 + s B A and a factor c [out] or None, without a gradient of [out, in].

    With many more tokens than features, adding s B A to the weight costs far less than adding s B A x to the output:
    forward and the input's gradient are then one full matrix product each, as in a plain frozen linear. Autograd would
    get the gradients of A and B from that of V, one more full product; here they are thin ones, written out. V is made
    again in backward rather than kept, since it is as large as the weights of the whole model.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        factor: Tensor | None,
    ) -> Tensor:
        updated = _updated(weight, a, b, scaling)
        y = linear(x, updated, None if factor is not None else bias)  # [T, out]
        ctx.save_for_backward(x, weight, a, b, factor, None if factor is None else y)
        ctx.scaling = scaling
        if factor is None:
            return y
        return y * factor.to(y.dtype) if bias is None else torch.addcmul(bias.to(y.dtype), y, factor.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, factor, y = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _, needs_factor = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_factor = None
        if needs_x:
            updated = _updated(weight, a, b, ctx.scaling)
            if factor is not None:
                updated.mul_(factor[:, None])
            grad_x = product(grad, updated.to(grad.dtype)).to(x.dtype)
        grad, x = grad.flatten(0, -2), x.flatten(0, -2).to(grad.dtype)  # [T, out], [T, in]
        scaled_b = ctx.scaling * (b if factor is None else factor[:, None] * b)  # [out, r]
        # Thin products are made as [r, T]: the other way round they take up to four times as long on a CPU.
        if needs_a:
            grad_a = product(product(scaled_b.t().to(grad.dtype), grad.t()), x).to(a.dtype)  # [r, T] @ [T, in]
        if needs_b:
            grad_b = product(product(a.to(x.dtype), x.t()), grad).t().to(b.dtype) * ctx.scaling  # ([r, T] @ [T, out])^T
            grad_b = grad_b if factor is None else grad_b * factor[:, None]
        if needs_factor:
            grad_factor = (grad * y.flatten(0, -2)).sum(0, dtype=factor.dtype)
        return grad_x, None, None, grad_a, grad_b, None, grad_factor


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


def apply_adapter_policy(backbone: nn.Module, config: LoRAConfig, adapters_always: bool) -> None:
    """Make trainable = schedule AND adapter policy.

    Call it after each freezing command of the unfreezing schedule, which switches whole layers. What the policy
    freezes is frozen again. Adapters train with their layer (R0, iterative), or with `adapters_always` whatever the
    command (R1, section 4.2: the last-layer mode trains adapters and heads).
    """
    frozen, adapters = frozen_by_policy(backbone, config), adapter_state(backbone)
    for name, parameter in backbone.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
        elif name in adapters and adapters_always:
            parameter.requires_grad_(True)


# ----------------------------------------------------------------------------------------------------------------------
# Exchange with peft

PEFT_FILES = "adapter_config.json", "adapter_model.safetensors"
PEFT_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
PEFT_PREFIX = "base_model.model."
# What peft saves beside the adapters of a sentence, token or question model, whatever its user asked for. Heads here
# are others, and new.
PEFT_HEADS = ("classifier", "score", "qa_outputs")
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


def export_peft(backbone: nn.Module, config: LoRAConfig, folder: Path, base_name: str) -> None:
    """Write the adapters as peft.PeftModel.from_pretrained(BertModel, folder) reads them.

    `base_name` is the hub name or folder of the base weights. Only adapters are written: where more of the backbone
    was trained, export the merged backbone instead. Raises UserError for --dora_norm column, which peft has not.
    """
    if config.dora_norm == "column":
        raise UserError(f"{folder}: peft has no DoRA with dora_norm column; export the merged backbone instead")
    layers = "|".join(re.escape(TARGETS[name]) for name in config.linears)
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": rf"encoder\.layer\.\d+\.({layers})",
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {_peft_name(name): _peft_shape(name, tensor) for name, tensor in adapter_state(backbone).items()}
    write_text(folder / PEFT_FILES[0], json.dumps(values, indent=2) + "\n")
    write_atomically(folder / PEFT_FILES[1], partial(safetensors.torch.save_file, tensors, metadata={"format": "pt"}))


def _peft_name(name: str) -> str:
    """E.g. bert_layers.0.out_dense.lora_A to base_model.model.encoder.layer.0.output.dense.lora_A.weight.

    For a name of `adapter_state` of one backbone.
    """
    _, number, *_, target, own = name.split(".")
    return f"{PEFT_PREFIX}encoder.layer.{number}.{TARGETS[target]}.{PEFT_NAMES[own]}"


def _peft_shape(name: str, tensor: Tensor) -> Tensor:
    """peft keeps magnitudes as [out], this module as [out, 1]."""
    return (tensor.squeeze(1) if name.endswith("magnitude") else tensor).cpu().contiguous()


def import_peft(folder: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Options and tensors of a peft LoRA of a BERT, in our names, for `inject` and `load_adapter_state`.

    As in peft the rest of the backbone is frozen (`-only`); a head beside the adapters is left out. Raises UserError
    where a file cannot be read, where the adapter is of another kind than LoRA, rsLoRA or DoRA, or where it touches
    more than the six linears of each layer.
    """
    path = folder / PEFT_FILES[0]
    try:
        values = read_json(path)
        rank, alpha = values["r"], values["lora_alpha"]
        values["modules_to_save"] = [own for own in values.get("modules_to_save") or () if own not in PEFT_HEADS]
        saved = safetensors.torch.load_file(folder / PEFT_FILES[1])
    except Exception as error:  # the parsers raise many kinds for a bad file, and all of them mean just that
        raise UserError(
            f"{folder}: cannot be read as a peft adapter ({reason(error)}); "
            f"name a folder with {' and '.join(PEFT_FILES)}"
        ) from error
    for key, plain in PEFT_PLAIN.items():
        if values.get(key, plain[0]) not in plain:
            raise UserError(
                f"{path}: {key} is {reprlib.repr(values[key])}, which is not supported; train with {key} {plain[0]!r}"
            )
    tensors = _our_tensors(saved, rank, folder)
    used = {name.split(".")[-2] for name in tensors}
    linears = tuple(name for name in TARGETS if name in used)
    mode = next((mode for mode in MODES if mode.endswith("-only") and MODES[mode] == linears), None)
    try:
        config = LoRAConfig(
            mode=mode or "all-lin-only",
            rank=rank,
            alpha=alpha,
            rslora=bool(values.get("use_rslora")),
            dropout=values.get("lora_dropout") or 0.0,
            dora=bool(values.get("use_dora")),
            targets=() if mode else linears,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config, tensors


def _our_tensors(saved: Mapping[str, Tensor], rank: Any, folder: Path) -> dict[str, Tensor]:
    """peft's tensors, but heads, in our names and shapes. Raises UserError for one of no adapter, or another rank."""
    tensors: dict[str, Tensor] = {}
    heads = tuple(f"{PEFT_PREFIX}{head}." for head in PEFT_HEADS)
    for name, tensor in saved.items():
        if name.startswith(heads):
            continue
        ours = _our_name(name)
        if ours is None:
            raise UserError(
                f"{folder / PEFT_FILES[1]}: {shown(name)} is no adapter of {','.join(TARGETS)} in a BERT layer"
            )
        if ours in tensors or tensor.dim() != (1 if ours.endswith("magnitude") else 2):
            raise UserError(f"{folder / PEFT_FILES[1]}: {name} is there twice or has {tensor.dim()} dimensions")
        if ours.endswith("lora_A") and len(tensor) != rank:
            raise UserError(f"{folder}: {name} has rank {len(tensor)}, but {PEFT_FILES[0]} says r {reprlib.repr(rank)}")
        tensors[ours] = tensor[:, None] if ours.endswith("magnitude") else tensor
    return tensors


def _our_name(name: str) -> str | None:
    """The inverse of `_peft_name`, also for a BERT inside a task model; None for any other tensor."""
    paths, names = "|".join(map(re.escape, TARGETS.values())), "|".join(map(re.escape, PEFT_NAMES.values()))
    prefix = re.escape(PEFT_PREFIX)
    match = re.fullmatch(rf"{prefix}(?:bert\.)?encoder\.layer\.(\d+)\.({paths})\.({names})", name)
    if match is None:
        return None
    target = next(ours for ours, theirs in TARGETS.items() if theirs == match[2])
    own = next(ours for ours, theirs in PEFT_NAMES.items() if theirs == match[3])
    inner = "self_attention." if target in MODES["attn"] else ""
    return f"bert_layers.{match[1]}.{inner}{target}.{own}"
