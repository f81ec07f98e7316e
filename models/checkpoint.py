"""Checkpoints: save a model with all that evaluation needs, and load it from a file that may be damaged or foreign."""

import platform
import reprlib
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch

from base_bert import is_whole, load_weights, resolve_pretrained
from config import BertConfig, Config
from lora import LoRAConfig, inject, merged_state_dict
from models.multitask_bert import MultitaskBERT
from tasks import TASKS, Task
from text.tokenizer import Tokenizer, load_tokenizer
from utils.errors import UserError, first_line
from utils.files import write_atomically
from utils.untrusted import refuse_inflating, shown

FORMAT = 1


def save(path: Path, content: Mapping[str, Any], keep: Path | None = None) -> None:
    """Save tensors and plain containers atomically; with `keep`, the old file lives on under that name."""
    write_atomically(path, lambda temporary: torch.save(dict(content), temporary), keep)


def verify(path: Path) -> None:
    """Raise BadZipFile where a checkpoint's bytes are not those that were written, by the CRC-32 beside each tensor.

    torch.load looks at none of them: a flipped bit in a tensor makes another weight of it. Of an entry's attributes,
    which are 0, one makes a folder of a tensor, whose numbers torch then leaves as memory was.
    """
    with zipfile.ZipFile(path) as file:
        odd = next((entry.filename for entry in file.infolist() if entry.external_attr), None)
        if (name := odd or file.testzip()) is not None:
            raise zipfile.BadZipFile(f"{name} has changed since it was written")


def is_whole_file(path: Path) -> bool:
    """Whether a checkpoint's bytes are those that were written."""
    try:
        verify(path)
    except (OSError, zipfile.BadZipFile):
        return False
    return True


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """What `save` wrote; with `mmap`, tensors stay in the file until they are used, and are taken as they are.

    Raises UserError for a file that is missing, damaged, or not one of ours.
    """
    try:
        refuse_inflating(path)
        if not mmap:
            verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name the best.pt in it") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"{path}: not a readable checkpoint, damaged or of another program ({first_line(error):.120})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this program (format {FORMAT}); name a best.pt of a run")
    return content


def copy(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    write_atomically(target, lambda temporary: shutil.copyfile(source, temporary))


def git_commit() -> str | None:
    """The commit of this source tree, with + appended where it was changed; None outside a checkout."""
    here = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()


def model_checkpoint(
    model: MultitaskBERT,
    tokenizer: Tokenizer,
    config: Config,
    scores: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """The content of a checkpoint: all that evaluation needs, the tokenizer included.

    `weights` are those of the whole model, which by default are its own.

    With adapters, pretrained weights that never train and the tokenizer are left out, since loading needs the folder
    of the base weights anyway; `base_sha256` and `tokenizer_sha256` say which they are.
    """
    left_out = model.never_trained(config.train.fine_tune_mode)
    weights = model.state_dict() if weights is None else weights
    return {
        "format": FORMAT,
        "weights": {name: own.detach().cpu() for name, own in weights.items() if name not in left_out},
        "base_sha256": model.base_sha256,
        "config": config.to_dict(),
        "bert_config": model.bert_config.to_dict(),
        "tasks": list(model.tasks),
        "tokenizer": tokenizer.to_json() if model.lora is None else None,
        "tokenizer_sha256": tokenizer.sha256,
        "scores": dict(scores),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "seed": config.train.seed,
    }


def refuse_misfits(own: Mapping[str, torch.Tensor], weights: Any, source: Path, left_out: Set[str]) -> None:
    """See that a checkpoint's weights are those of a model whose state is `own`; those `left_out` may be missing.

    Raises UserError that lists missing, extra and misshapen tensors.
    """
    if not isinstance(weights, Mapping):
        raise UserError(f"{source}: its weights are no mapping from names to tensors; save it anew")
    odd = [name for name, tensor in weights.items() if not isinstance(name, str) or not is_whole(tensor)]
    if odd:
        raise UserError(f"{source}: {reprlib.repr(odd[0])} is not a plain tensor with all its numbers; save it anew")
    problems = [f"missing {name}" for name in own if name not in weights and name not in left_out]
    problems += [f"unknown {shown(name)}" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        listed = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise UserError(f"{source}: the weights do not fit the model, another arch perhaps: {listed}")


def refuse_other_base(model: MultitaskBERT, saved: str, pretrained: str, source: Path) -> None:
    """Raise UserError where the base weights of a checkpoint, whose SHA-256 is `saved`, are not the model's."""
    if model.base_sha256 != saved:
        raise UserError(
            f"{source}: its adapters were trained on other base weights than {pretrained} has here "
            f"(SHA-256 {saved:.12}, not {model.base_sha256:.12}); put the original ones there"
        )


def load_weights_into(
    model: MultitaskBERT, weights: Mapping[str, torch.Tensor], source: Path, left_out: Set[str]
) -> None:
    """Copy a checkpoint's weights into a model of the same arch; those `left_out` of it may be missing.

    Raises UserError that lists missing, extra and misshapen tensors; the model is then left as it was.
    """
    own = model.state_dict()
    refuse_misfits(own, weights, source, left_out)
    model.load_state_dict({**own, **weights})


def foreign(path: Path, error: Exception) -> UserError:
    """The error for a checkpoint whose parts are not what this program writes."""
    return UserError(f"{path}: the checkpoint lacks or does not understand {first_line(error):.200}; save it anew")


def saved_config(content: Mapping[str, Any], path: Path) -> Config:
    """The options in a checkpoint's content. Raises UserError where this program does not know them."""
    try:
        return Config.from_dict(content["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise foreign(path, error) from error


def hand_over(model: MultitaskBERT, tokenizer: Tokenizer, path: Path, say: Callable[[str], None]) -> None:
    """--init_from: give `model` the weights of a checkpoint, adapters merged; `say` hears what stays as it was.

    Only heads of masked words, PALs, and what serves no task that the checkpoint knows, may be missing from it;
    nothing of the model's own tasks may be left over. Of a checkpoint of --mlm, whose heads were never trained, they
    are not taken. Raises UserError, and leaves the model as it was, where anything else is missing or of another shape,
    or the tokenizer is another one.
    """
    source, its_tokenizer, its_config = load_model(path)
    if its_tokenizer.sha256 != tokenizer.sha256:
        raise UserError(f"--init_from {path}: was trained with another tokenizer than --pretrained has; name its own")
    untrained = ("heads.", "pair_layer.") if its_config.train.mlm else ()
    weights = {key: own for key, own in source.state_dict().items() if not key.startswith(untrained)}
    for name, backbone in source.backbones.items():
        weights |= {f"backbones.{name}.{key}": own for key, own in merged_state_dict(backbone).items()}
    new = [name for name in model.tasks if name not in source.tasks]
    found = {*source.backbones, *(model.backbone_of[name] for name in model.tasks if name not in new)}
    backbones = [name for name in model.backbones if name not in found]
    new_pair_layer = model.pair_layer is not None and not any(task.is_pair for task in source.tasks.values())
    parts = ["mlm.", *untrained, *(f"heads.{name}." for name in new), *(f"backbones.{name}." for name in backbones)]
    parts += [f"pals.{name}." for name in model.pals if name not in source.pals]
    parts += ["pair_layer."] if new_pair_layer else []
    # Of batch normalisation in a layer that tasks share, which keeps them for each.
    statistics = tuple(f"_{moment}_{name}" for moment in ("mean", "var") for name in new)
    own = model.state_dict()
    fresh = {key for key in own if key.startswith(tuple(parts)) or key.endswith(statistics)}
    known = tuple(f"{part}.{name}." for part in ("heads", "pals") for name in model.tasks)
    taken = {key: tensor for key, tensor in weights.items() if key in own or key.startswith(known)}
    load_weights_into(model, taken, Path(f"--init_from {path}"), fresh)
    if new:
        kept = f", and backbone {' and '.join(backbones)} as --pretrained has it" if backbones else ""
        say(
            f"--init_from {path}: knows nothing of {', '.join(new)}, "
            f"whose heads {'and pair layer ' if new_pair_layer else ''}are new{kept}"
        )


def tasks_of(content: Mapping[str, Any], path: Path) -> dict[str, Task]:
    """The tasks that a checkpoint knows. Raises UserError where the task table has none of that name.

    So too for what is no model but the state of a run.
    """
    if "optimizers" in content:
        raise UserError(f"{path}: is a state for --resume; name the best.pt beside it")
    try:
        tasks = {name: TASKS[name] for name in content["tasks"]}
    except (KeyError, TypeError) as error:
        raise foreign(path, error) from error
    if not tasks:
        raise UserError(f"{path}: knows no task; name a best.pt of a run")
    return tasks


def trained_tasks(content: Mapping[str, Any], path: Path) -> dict[str, Task]:
    """The tasks whose heads a checkpoint has trained. Raises UserError for one of --mlm, which has none."""
    tasks = tasks_of(content, path)
    if saved_config(content, path).train.mlm:
        raise UserError(f"{path}: was made by --mlm, which trains no heads; train some with --init_from")
    return tasks


def sketch(config: Config, shape: BertConfig, tasks: Mapping[str, Task], lora: LoRAConfig | None) -> MultitaskBERT:
    """The model of these options without memory for its numbers, to compare shapes with before any is taken."""
    with torch.device("meta"):
        model = MultitaskBERT(config.model, shape, tasks)
        if lora is not None:
            model.lora = lora
            for backbone in model.backbones.values():
                inject(backbone, lora)
        model.add_pals(config.pal)
        if config.train.mlm:
            model.add_mlm_heads()
    return model


def base_folder(base: str, path: Path) -> Path:
    """The folder of the base weights of a checkpoint with adapters. Raises UserError where there is none."""
    try:
        return resolve_pretrained(base)
    except UserError as error:
        raise UserError(
            f"{path}: its adapters need the base weights that they were trained on; put them, or a link to them, "
            f"there again (--evaluate takes another place too, by --pretrained): {error}"
        ) from error


def load_model(
    path: Path, content: Mapping[str, Any] | None = None, base: str | None = None
) -> tuple[MultitaskBERT, Tokenizer, Config]:
    """The model, tokenizer and configuration of a checkpoint file (already read as `content`, if given).

    `base` is where the base weights of its adapters are, if no longer where they were. Raises UserError where the file
    is damaged or its parts do not fit together.
    """
    content = content or load(path)
    tasks, config = tasks_of(content, path), saved_config(content, path)
    try:
        shape = BertConfig.from_dict(content["bert_config"], str(path))
        weights, base_sha256, tokenizer_sha256 = (
            content[key] for key in ("weights", "base_sha256", "tokenizer_sha256")
        )
        if not isinstance(base_sha256, str):
            raise TypeError("base_sha256")
        lora = LoRAConfig.from_options(config.lora)
        planned = sketch(config, shape, tasks, lora)
        left_out = planned.never_trained(config.train.fine_tune_mode)
    except UserError:
        raise
    except Exception as error:  # options that no command line can have asked for may fail anywhere
        raise foreign(path, error) from error
    refuse_misfits(planned.state_dict(), weights, path, left_out)
    if lora is None:
        model = MultitaskBERT(config.model, shape, tasks)
        tokenizer = Tokenizer.from_json(content.get("tokenizer"), config.data.max_length, str(path))
        if base is not None:
            raise UserError(f"--pretrained {base}: {path} has no adapters, and holds all of its weights; drop it")
    else:
        base = base or config.model.pretrained
        folder = base_folder(base, path)
        pretrained = load_weights(folder, shape)  # first: `shape` may ask for a model of any size
        model = MultitaskBERT(config.model, shape, tasks)
        model.load_backbones(pretrained)
        model.add_adapters(lora)
        refuse_other_base(model, base_sha256, base, path)
        tokenizer = load_tokenizer(folder, config.data.max_length)
        if tokenizer.sha256 != tokenizer_sha256:
            raise UserError(
                f"{path}: was trained with another tokenizer than {base} has here; put the original one there"
            )
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size} words, its weights only {shape.vocab_size}")
    model.add_pals(config.pal)
    if config.train.mlm:
        model.add_mlm_heads()
    load_weights_into(model, weights, path, left_out)
    return model, tokenizer, config
