"""Checkpoints: save a model with all that evaluation needs, and load it from a file that may be damaged or foreign."""

import platform
import reprlib
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from base_bert import cached_pretrained, describe_mismatches, is_whole, load_weights, resolve_pretrained
from config import BertConfig, Config
from lora import LoRAConfig, inject, merged_state_dict
from models.multitask_bert import MultitaskBERT
from models.run_records import recorded
from tasks import TASKS, Task
from text.tokenizer import Tokenizer, load_tokenizer
from utils.errors import UserError, first_line
from utils.files import write_atomically
from utils.pickles import load_plain, refuse_objects
from utils.schema import CHECKPOINT, check

StateDict = Mapping[str, torch.Tensor]
FORMAT = 1
OF_THE_HANDOUT = (
    "is a checkpoint of the course's code, whose heads are unknown here; load its BERT into "
    "BertModel.from_pretrained and write it by save_pretrained for --pretrained, as docs/python_api.md shows"
)


def save(path: Path, content: Mapping[str, Any], keep: Path | None = None) -> None:
    """Save tensors and plain containers atomically. With `keep`, the old file is renamed to that first."""
    write_atomically(path, lambda temporary: torch.save(dict(content), temporary), keep)


def verify(path: Path) -> None:
    """Raise BadZipFile if a checkpoint's bytes have changed since it was written, by the CRC-32 beside each tensor.

    torch.load does not check them, so a flipped bit in a tensor would become another weight. A flipped bit in the
    attributes of an entry, which are all 0, would make it a folder, whose numbers torch would take from uninitialised
    memory.
    """
    with zipfile.ZipFile(path) as file:
        odd = next((entry.filename for entry in file.infolist() if entry.external_attr), None)
        if (name := odd or file.testzip()) is not None:
            raise zipfile.BadZipFile(f"{name} has changed since it was written")


def is_whole_file(path: Path) -> bool:
    """Return whether a checkpoint's bytes are those that were written."""
    try:
        verify(path)
    except (OSError, zipfile.BadZipFile):
        return False
    return True


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Return what `save` wrote. With `mmap`, tensors are not verified and stay in the file until they are used.

    Raises UserError if the file is missing, damaged, or no checkpoint of this program.
    """
    try:
        refuse_objects(path)
        if not mmap:
            verify(path)
        content = load_plain(path, mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name the best.pt in it") from None
    except Exception as error:  # a damaged pickle can raise anything
        if is_of_the_handout(path):
            raise UserError(f"{path}: {OF_THE_HANDOUT}") from error
        raise UserError(f"{path}: not a readable checkpoint, damaged or foreign ({first_line(error):.120})") from error
    if isinstance(content, dict) and "model" in content and "format" not in content:
        raise UserError(f"{path}: {OF_THE_HANDOUT}")
    if not isinstance(content, dict) or repr(content.get("format")) != repr(FORMAT):
        raise UserError(f"{path}: not a checkpoint of this program (format {FORMAT}); name a best.pt of a run")
    try:
        check(content, CHECKPOINT, "it")
    except ValueError as error:
        raise _not_understood(path, error) from error
    return content


def is_of_the_handout(path: Path) -> bool:
    """Return whether a file that cannot be loaded names the class of the options that the course's code saves.

    The pickle is read and not run.
    """
    with suppress(Exception):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if path.is_file() else []
        return "types.SimpleNamespace" in names
    return False


def copy(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    write_atomically(target, lambda temporary: shutil.copyfile(source, temporary))


def git_commit() -> str | None:
    """Return the commit of this source tree, with a + if the tree was changed; None outside a checkout."""
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
    lines: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    """Return the content of a checkpoint: everything that evaluation needs, with the tokenizer.

    A model with adapters leaves out the tokenizer and the pretrained weights that never train, since loading needs the
    folder of the base weights anyway. `base_sha256` and `tokenizer_sha256` identify them. But what began with
    --init_from has no such folder, and nothing is left out. `lines` are slope and intercept of each similarity
    (`similarity_lines`).
    """
    frozen = model.frozen_parameter_names(config.train)
    return {
        "format": FORMAT,
        "weights": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name not in frozen},
        "base_sha256": model.base_sha256,
        "config": config.to_dict(),
        "bert_config": model.bert_config.to_dict(),
        "tasks": list(model.tasks),
        "tokenizer": None if needs_base(config, model.lora) else tokenizer.to_json(),
        "tokenizer_sha256": tokenizer.sha256,
        "scores": dict(scores),
        "similarity_lines": {name: list(line) for name, line in lines.items()},
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "seed": config.train.seed,
    }


def saved_lines(content: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return slope and intercept of each similarity, which an older checkpoint lacks."""
    return {name: (float(a), float(b)) for name, (a, b) in content.get("similarity_lines", {}).items()}


def needs_base(config: Config, lora: LoRAConfig | None) -> bool:
    """Return whether a checkpoint leaves out what is in a folder of base weights."""
    return lora is not None and config.train.init_from is None


def check_state_dict(wanted: StateDict, found: Any, source: Path, may_lack: Set[str]) -> None:
    """Raise UserError if `found` does not fit a model with the state dict `wanted`; it may lack some names."""
    if not isinstance(found, Mapping):
        raise UserError(f"{source}: its weights are no mapping from names to tensors; save it anew")
    odd = [name for name, tensor in found.items() if not isinstance(name, str) or not is_whole(tensor)]
    if odd:
        raise UserError(f"{source}: {reprlib.repr(odd[0])} is not a plain tensor with all its numbers; save it anew")
    shapes = {name: tensor.shape for name, tensor in wanted.items() if name in found or name not in may_lack}
    if lists := describe_mismatches(found, shapes):
        raise UserError(f"{source}: the weights do not fit the model, another arch perhaps ({lists})")


def check_base_weights(model: MultitaskBERT, sha256: str, pretrained: str, source: Path) -> None:
    """Raise UserError if the model's base weights are not those with this SHA-256, on which a checkpoint relies."""
    if model.base_sha256 != sha256:
        raise UserError(
            f"{source}: its adapters were trained on other base weights than {pretrained} has here "
            f"(SHA-256 {sha256:.12}, not {model.base_sha256:.12}); name the original ones with --pretrained"
        )


def load_model_state_dict(model: MultitaskBERT, state_dict: StateDict, source: Path, may_lack: Set[str]) -> None:
    """Copy a checkpoint's weights into a model of the same arch. They may lack the names in `may_lack`.

    Raises UserError that lists missing, unknown and misshapen tensors; the model is then unchanged.
    """
    present = model.state_dict()
    check_state_dict(present, state_dict, source, may_lack)
    model.load_state_dict({**present, **state_dict})


def saved_config(content: Mapping[str, Any], path: Path) -> Config:
    """Return the options in a checkpoint's content. Raises UserError if this program does not know them."""
    try:
        return Config.from_dict(content["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_understood(path, error) from error


def init_from_checkpoint(
    model: MultitaskBERT, tokenizer: Tokenizer, path: Path, pretrained: str, say: Callable[[str], None]
) -> None:
    """Load the weights of a checkpoint into `model` for --init_from. `say` prints what stays new.

    `pretrained` names the start weights of the model, on which the checkpoint's adapters may have been trained too.
    Adapters are taken as they are if the model has the same. Otherwise they are merged, and the model's are fresh.
    The checkpoint may lack heads of masked words, PALs, and what serves only tasks that it does not know. It may hold
    no tensor of the model's tasks that the model lacks. A checkpoint of --mlm never trained its heads, so they are not
    taken. Raises UserError, and leaves the model unchanged, if anything else is missing or of another shape, or if the
    tokenizer is another one.
    """
    source, source_tokenizer, source_config = load_model(path, spare_base=pretrained)
    if source_tokenizer.sha256 != tokenizer.sha256:
        raise UserError(f"--init_from {path}: was trained with another tokenizer than --pretrained has; name its own")
    untrained = ("heads.", "pair_layer.") if source_config.train.mlm else ()
    state_dict = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith(untrained)}
    adapters = model.lora
    if adapters is not None and adapters != source.lora:
        model.remove_adapters()  # until the weights below them are there
    for backbone, module in source.backbones.items() if model.lora is None else ():
        state_dict |= {f"backbones.{backbone}.{name}": tensor for name, tensor in merged_state_dict(module).items()}
    new_tasks = [task for task in model.tasks if task not in source.tasks]
    known = {*source.backbones, *(model.backbone_of[task] for task in model.tasks if task not in new_tasks)}
    new_backbones = [name for name in model.backbones if name not in known]
    new_pair_layer = model.pair_layer is not None and not any(task.is_pair for task in source.tasks.values())
    new = ["mlm.", *untrained, *(f"heads.{task}." for task in new_tasks)]
    new += [f"backbones.{name}." for name in new_backbones]
    new += [f"pals.{task}." for task in model.pals if task not in source.pals]
    new += ["pair_layer."] if new_pair_layer else []
    # The batch normalisation of the shared pair layer has statistics for each task.
    statistics = tuple(f"_{moment}_{task}" for moment in ("mean", "var") for task in new_tasks)
    wanted = model.state_dict()
    may_lack = {name for name in wanted if name.startswith(tuple(new)) or name.endswith(statistics)}
    of_tasks = tuple(f"{part}.{task}." for part in ("heads", "pals") for task in model.tasks)
    taken = {name: tensor for name, tensor in state_dict.items() if name in wanted or name.startswith(of_tasks)}
    load_model_state_dict(model, taken, Path(f"--init_from {path}"), may_lack)
    if adapters is not None and model.lora is None:
        model.add_adapters(adapters)
    if new_tasks:
        kept = f", and backbone {' and '.join(new_backbones)} as --pretrained has it" if new_backbones else ""
        say(
            f"--init_from {path}: knows nothing of {', '.join(new_tasks)}, "
            f"whose heads {'and pair layer ' if new_pair_layer else ''}are new{kept}"
        )


def trained_tasks(content: Mapping[str, Any], path: Path) -> dict[str, Task]:
    """Return the tasks whose heads a checkpoint has trained. Raises UserError if it is of --mlm, which trains none."""
    tasks = _tasks_of(content, path)
    if saved_config(content, path).train.mlm:
        raise UserError(f"{path}: was made by --mlm, which trains no heads; train some with --init_from")
    return tasks


def load_model(
    path: Path, content: Mapping[str, Any] | None = None, base: str | None = None, spare_base: str | None = None
) -> tuple[MultitaskBERT, Tokenizer, Config]:
    """Return the model, tokenizer and configuration of a checkpoint. `content` is what `load` returned, if at hand.

    `base` names the base weights of its adapters. `spare_base` does so too, but only counts where they are not found.
    Raises UserError if the file is damaged or its parts do not fit together.
    """
    content = content or load(path)
    tasks, config = _tasks_of(content, path), saved_config(content, path)
    shape, lora, frozen = _check_content(content, config, tasks, path)
    if lora is not None and needs_base(config, lora):
        folder = _base_folder(config, base, spare_base, path)
        model, tokenizer = _model_on_base(content, config, tasks, shape, lora, folder, path)
    else:
        model = MultitaskBERT(config.model, shape, tasks, config.tasks)
        if lora is not None:
            model.add_adapters(lora)
        tokenizer = Tokenizer.from_json(content.get("tokenizer"), config.data.max_length, str(path))
        if base is not None:
            raise UserError(f"--pretrained {base}: {path} holds all of its weights; drop it")
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size} words, its weights only {shape.vocab_size}")
    _add_parts(model, config)
    load_model_state_dict(model, content["weights"], path, frozen)
    return model, tokenizer, config


def _tasks_of(content: Mapping[str, Any], path: Path) -> dict[str, Task]:
    """Return the tasks that a checkpoint knows. Raises UserError for a state of --resume or an unknown task."""
    if "optimizers" in content:
        raise UserError(f"{path}: is a state for --resume; name the best.pt beside it")
    try:
        tasks = {name: TASKS[name] for name in content["tasks"]}
    except (KeyError, TypeError) as error:
        raise _not_understood(path, error) from error
    if not tasks:
        raise UserError(f"{path}: knows no task; name a best.pt of a run")
    return tasks


def _not_understood(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: the checkpoint is damaged or of another version ({first_line(error)}); save it anew")


def _check_content(
    content: Mapping[str, Any], config: Config, tasks: Mapping[str, Task], path: Path
) -> tuple[BertConfig, LoRAConfig | None, set[str]]:
    """Return the backbones' shape, the adapters and the names of the tensors that a checkpoint leaves out.

    Its weights are compared with a model on the device meta, so a file that claims a huge model takes no memory.
    Raises UserError if anything does not fit.
    """
    try:
        shape = BertConfig.from_dict(content["bert_config"], str(path))
        lora = LoRAConfig.from_options(config.lora)
        if not isinstance(content["base_sha256"], str):
            raise TypeError("base_sha256")
        weights, _ = content["weights"], content["tokenizer_sha256"]
        with torch.device("meta"):
            model = MultitaskBERT(config.model, shape, tasks, config.tasks)
            if lora is not None:
                model.lora = lora
                for backbone in model.backbones.values():
                    inject(backbone, lora)
            _add_parts(model, config)
        frozen = model.frozen_parameter_names(config.train)
    except UserError:
        raise
    except Exception as error:  # options that no command line allows may fail anywhere
        raise _not_understood(path, error) from error
    check_state_dict(model.state_dict(), weights, path, frozen)
    return shape, lora, frozen


def _add_parts(model: MultitaskBERT, config: Config) -> None:
    model.add_pals(config.pal)
    if config.train.mlm:
        model.add_mlm_heads()


def _base_folder(config: Config, base: str | None, spare_base: str | None, path: Path) -> Path:
    """Return the folder of the base weights of a checkpoint with adapters: that of the user's `base`, if there is one.

    The name in the checkpoint counts where this user's cache records a folder for the run, for a folder beside the
    checkpoint, and for the caches of models. It is never looked up on the hub. If that leads nowhere, `spare_base`
    counts, which the user gave too. Raises UserError if nothing is found.
    """
    if base is not None:
        return resolve_pretrained(base)
    name, places = config.model.pretrained, recorded(config)
    try:
        if places is not None and places["pretrained"] is not None:
            return resolve_pretrained(places["pretrained"])
        return resolve_pretrained(name) if _is_inside(Path(name), path.parent) else cached_pretrained(name)
    except UserError as error:
        if spare_base is not None:
            return resolve_pretrained(spare_base)
        raise UserError(
            f"{path}: its adapters need the base weights that they were trained on, and {name} is only what the file "
            f"calls them; name them with --pretrained, as a folder or on the hub ({error})"
        ) from error


def _is_inside(folder: Path, outer: Path) -> bool:
    """Return whether a folder and all files in it are inside the folder `outer`, after following links."""
    with suppress(OSError, ValueError, RuntimeError):  # a name that cannot be one, or links in a circle
        return all(path.resolve().is_relative_to(outer.resolve()) for path in (folder, *folder.iterdir()))
    return False


def _model_on_base(
    content: Mapping[str, Any],
    config: Config,
    tasks: Mapping[str, Task],
    shape: BertConfig,
    lora: LoRAConfig,
    folder: Path,
    path: Path,
) -> tuple[MultitaskBERT, Tokenizer]:
    """Return `load_model`'s model and tokenizer for a checkpoint with adapters, from the folder of its base weights."""
    pretrained = load_weights(folder, shape)  # before the model, since `shape` may ask for a model of any size
    model = MultitaskBERT(config.model, shape, tasks, config.tasks)
    model.load_backbones(pretrained)
    model.add_adapters(lora)
    check_base_weights(model, content["base_sha256"], str(folder), path)
    tokenizer = load_tokenizer(folder, config.data.max_length)
    if tokenizer.sha256 != content["tokenizer_sha256"]:  # older checkpoints read fewer of the folder's files
        tokenizer = load_tokenizer(folder, config.data.max_length, as_stored=True)
    if tokenizer.sha256 != content["tokenizer_sha256"]:
        raise UserError(f"{path}: was trained with another tokenizer than {folder} has; put the original one there")
    return model, tokenizer
