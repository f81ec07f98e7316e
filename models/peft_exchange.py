"""Adapters in peft's format: export and import."""

import json
import re
import reprlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from base_bert import reason
from lora import MODES, PEFT_PLAIN, TARGETS, LoRAConfig, adapter_state
from utils.errors import UserError
from utils.files import write_atomically, write_text
from utils.untrusted import read_json, shown

PEFT_FILES = "adapter_config.json", "adapter_model.safetensors"
PEFT_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
PEFT_PREFIX = "base_model.model."
# What peft saves beside the adapters of a sentence, token or question model, whatever its user asked for. Heads here
# are others, and new.
PEFT_HEADS = ("classifier", "score", "qa_outputs")


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
