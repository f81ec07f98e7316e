"""Adapters in the format of the library peft: export and import."""

import re
import reprlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from base_bert import read_tensors
from lora import MODES, TARGETS, LoRAConfig, adapter_state_dict
from utils.errors import UserError, describe_error
from utils.files import write_atomically, write_json
from utils.untrusted import read_json

PEFT_FILES = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"  # the last one is older
PEFT_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
PEFT_PREFIX = "base_model.model."
# The heads that peft saves beside the adapters of a sentence, token or question model, asked or not. We train our own.
PEFT_HEADS = ("classifier", "score", "qa_outputs")
# What a peft configuration may ask for and we do not have: each key with the values that ask for nothing.
PEFT_PLAIN: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, "gaussian", None),  # the others change the base weights
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
}


def export_peft(backbone: nn.Module, config: LoRAConfig, folder: Path, base_name: str) -> None:
    """Write the adapters such that peft.PeftModel.from_pretrained(BertModel, folder) reads them.

    `base_name` is the hub name or folder of the base weights. Only adapters are written: if more of the backbone was
    trained, export the merged backbone instead. Raises UserError for --dora_norm column, which peft does not have.
    """
    if config.dora_norm == "column":
        raise UserError(f"{folder}: peft has no DoRA with dora_norm column; export the merged backbone instead")
    layers = "|".join(re.escape(TARGETS[name]) for name in config.linears)
    values = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",  # AutoPeftModelForFeatureExtraction then loads the base by its name too
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
    tensors = {_peft_name(name): _peft_shape(name, tensor) for name, tensor in adapter_state_dict(backbone).items()}
    write_json(folder / PEFT_FILES[0], values)
    write_atomically(folder / PEFT_FILES[1], partial(safetensors.torch.save_file, tensors, metadata={"format": "pt"}))


def _peft_name(name: str) -> str:
    """Return peft's name: for bert_layers.0.out_dense.lora_A, ...encoder.layer.0.output.dense.lora_A.weight."""
    _, number, *_, target, adapter = name.split(".")
    return f"{PEFT_PREFIX}encoder.layer.{number}.{TARGETS[target]}.{PEFT_NAMES[adapter]}"


def _peft_shape(name: str, tensor: Tensor) -> Tensor:
    """Return a magnitude, which is [out, 1] here, as [out], which peft expects; other tensors keep their shape."""
    return (tensor.squeeze(1) if name.endswith("magnitude") else tensor).cpu().contiguous()


def import_peft(folder: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Return options and tensors, in our names, of a BERT's LoRA in peft's format.

    They are for `inject` and `load_adapter_state_dict`. The rest of the backbone is frozen, as in peft (`-only`), and a
    head beside the adapters is ignored. A folder with one named adapter, as peft saves any but the default one, is that
    adapter's. Layers without adapters (layers_to_transform) are left out. Raises UserError where a file cannot be read,
    where the adapter is not LoRA, rsLoRA or DoRA, or where it touches more than the six linear layers of each BERT
    layer.
    """
    path, weights = peft_files(folder)
    folder = path.parent
    try:
        values = read_json(path)
        if (kind := values.get("peft_type", "LORA")) != "LORA":
            raise UserError(f"{path}: holds {reprlib.repr(kind)}, but only LORA (with rsLoRA and DoRA) can be read")
        rank, alpha = values["r"], values["lora_alpha"]
        values["modules_to_save"] = [name for name in values.get("modules_to_save") or () if name not in PEFT_HEADS]
        saved = read_tensors(weights)
    except UserError:
        raise
    except Exception as error:  # the parsers raise many types of errors for a bad file
        raise UserError(
            f"{folder}: cannot be read as a peft adapter ({describe_error(error)}); "
            f"name a folder with {' and '.join(PEFT_FILES[:2])}"
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


def peft_files(folder: Path) -> tuple[Path, Path]:
    """Return the configuration and the weights of the adapter in a folder. Raises UserError if it holds several."""
    folder = _named_adapter(folder)
    weights = next((folder / name for name in PEFT_FILES[1:] if (folder / name).is_file()), folder / PEFT_FILES[1])
    return folder / PEFT_FILES[0], weights


def _named_adapter(folder: Path) -> Path:
    """Return the folder of the adapter: `folder`, or the only folder in it that has one.

    Raises UserError if several have.
    """
    if (folder / PEFT_FILES[0]).exists() or not folder.is_dir():
        return folder
    inner = sorted(path.parent for path in folder.glob(f"*/{PEFT_FILES[0]}"))
    if len(inner) > 1:
        raise UserError(f"{folder}: holds {len(inner)} adapters; name one of them, such as {inner[0]}")
    return inner[0] if inner else folder


def _our_tensors(saved: Mapping[str, Tensor], rank: Any, folder: Path) -> dict[str, Tensor]:
    """Return peft's tensors, without heads, in our names and shapes. Raises UserError for any that does not fit."""
    tensors: dict[str, Tensor] = {}
    heads = tuple(f"{PEFT_PREFIX}{head}." for head in PEFT_HEADS)
    for name, tensor in saved.items():
        if name.startswith(heads):
            continue
        ours = _our_name(name)
        if ours is None and ".pooler." in name:
            raise UserError(
                f"{folder}: {name} is an adapter of the pooler, which has none here; train with target_modules "
                "that leave it out, or give the model after merge_and_unload() as --pretrained"
            )
        if ours is None:
            raise UserError(f"{folder}: {name} is no adapter of {','.join(TARGETS)} in a BERT")
        if ours in tensors or tensor.dim() != (1 if ours.endswith("magnitude") else 2):
            raise UserError(f"{folder}: {name} is there twice or has {tensor.dim()} dimensions")
        if ours.endswith("lora_A") and len(tensor) != rank:
            raise UserError(f"{folder}: {name} has rank {len(tensor)}, but {PEFT_FILES[0]} says r {reprlib.repr(rank)}")
        tensors[ours] = tensor[:, None] if ours.endswith("magnitude") else tensor
    return tensors


def _our_name(name: str) -> str | None:
    """Invert `_peft_name`, also for a BERT inside a task model; return None for any other tensor."""
    paths, names = "|".join(map(re.escape, TARGETS.values())), "|".join(map(re.escape, PEFT_NAMES.values()))
    prefix = re.escape(PEFT_PREFIX)
    match = re.fullmatch(rf"{prefix}(?:bert\.)?encoder\.layer\.(\d+)\.({paths})\.({names})", name)
    if match is None:
        return None
    target = next(ours for ours, theirs in TARGETS.items() if theirs == match[2])
    adapter = next(ours for ours, theirs in PEFT_NAMES.items() if theirs == match[3])
    inner = "self_attention." if target in MODES["attn"] else ""
    return f"bert_layers.{match[1]}.{inner}{target}.{adapter}"
