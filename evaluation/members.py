"""The members of an ensemble: the checkpoints that the user names, and their predictions, kept in a folder."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import EnsembleOptions
from datasets import Examples, tokenise
from evaluation.ensembling import check_alike
from evaluation.predict import predict
from models.checkpoint import load, load_model, trained_tasks
from tasks import TASKS
from utils.console import say
from utils.device import Device
from utils.errors import UserError
from utils.files import sha256, write_atomically
from utils.pickles import refuse_inflating

Outputs = dict[tuple[str, str], np.ndarray]  # (split, task) -> raw outputs, [N, classes] or [N]
Splits = Mapping[str, Mapping[str, Examples]]  # split -> task -> examples


@dataclass(frozen=True)
class Member:
    """A checkpoint: its path as the user gave it, the hash of the file, the tasks that it knows, and its votes."""

    path: Path
    sha256: str
    tasks: tuple[str, ...]
    votes: int


def find_members(names: Sequence[str]) -> list[Member]:
    """Return the distinct checkpoints, with a vote for each time they are named. Raises UserError for a bad file."""
    for name in names:
        if not Path(name).is_file():
            raise UserError(f"--filepaths {name}: there is no such checkpoint; check the path")
    members, first_name = [], {Path(name).resolve(): name for name in reversed(names)}
    for name, votes in Counter(first_name[Path(name).resolve()] for name in names).items():
        tasks = tuple(trained_tasks(load(Path(name)), Path(name)))  # loads the whole file, so that damage is found here
        members.append(Member(Path(name), sha256(Path(name)), tasks, votes))
    return members


def check_members(members: Sequence[Member], options: EnsembleOptions) -> None:
    """Raise UserError if --select or --soup makes no sense with these members."""
    for flag in ("select", "soup"):
        if getattr(options, flag) is not None and len(members) < 2:
            raise UserError(f"--{flag} {getattr(options, flag)} needs a choice; name two different checkpoints or more")
    if options.select is not None:
        member_of = {task: member.path for member in members for task in member.tasks}
        for member in members:
            if missing := sorted(member_of.keys() - set(member.tasks)):
                raise UserError(
                    f"--select compares members by all their tasks, but {member.path} does not know {missing[0]}, "
                    f"as {member_of[missing[0]]} does; leave one of them out, or --select"
                )
    if options.soup is not None:
        soup = soup_path(options)
        if soup.resolve() in [member.path.resolve() for member in members]:
            raise UserError(f"--soup writes {soup}, which is a member too; choose another --run_dir")
        check_alike({member.path: load(member.path, mmap=True) for member in members})


def soup_path(options: EnsembleOptions) -> Path:
    """Return the file that --soup writes."""
    return Path(options.run_dir) / "soup.pt"


def cache_file(cache: Path, member: Member, splits: Splits, device: Device) -> Path:
    """Return the file of a member's outputs, named by the hash of everything that they depend on."""
    digest = hashlib.sha256(f"{member.sha256} {device.amp}".encode())
    for split, by_task in splits.items():
        for name, examples in by_task.items():
            digest.update(f"\n{split} {name}\n".encode())
            for texts in zip(*examples.texts, strict=True):
                digest.update("\t".join((*texts, "")).encode())
    return cache / f"{digest.hexdigest()[:32]}.npz"


def read_outputs(path: Path) -> Outputs | None:
    """Return the outputs in a file of the cache, or None if it is missing or damaged."""
    try:
        refuse_inflating(path)
        with np.load(path, allow_pickle=False) as saved:
            return {(key.split("/")[0], key.split("/")[1]): saved[key] for key in saved.files}
    except Exception:  # numpy and zipfile raise a dozen kinds for a damaged file
        return None


def write_outputs(path: Path, outputs: Outputs) -> None:
    """Write outputs into a file of the cache. Raises UserError if it cannot be written."""

    def write(temporary: Path) -> None:
        named: dict[str, Any] = {f"{split}/{name}": values for (split, name), values in outputs.items()}
        with temporary.open("wb") as file:
            np.savez(file, **named)

    write_atomically(path, write)


def fits(outputs: Outputs, splits: Splits) -> bool:
    """Return whether these are finite outputs for all examples of `splits`."""
    shapes = {
        (split, name): (len(examples), TASKS[name].num_outputs)[: 2 if TASKS[name].kind == "classes" else 1]
        for split, by_task in splits.items()
        for name, examples in by_task.items()
    }
    return {key: values.shape for key, values in outputs.items()} == shapes and all(
        values.dtype.kind == "f" and np.isfinite(values).all() for values in outputs.values()
    )


@dataclass(frozen=True)
class Predictor:
    """Predicts with members, and keeps their outputs in the folder `cache`.

    `pretrained` names the base weights of members with adapters, where they are not found otherwise.
    """

    cache: Path
    device: Device
    batch_size: int
    pretrained: str | None = None

    def outputs(self, member: Member, splits: Splits, read: Callable[[], Mapping[str, Any]] | None = None) -> Outputs:
        """Return a member's raw outputs for each split and each task that it knows.

        `read` returns the content of a checkpoint that is not a file yet. Raises UserError if the checkpoint is damaged
        or an output is not finite.
        """
        splits = {
            split: {name: examples for name, examples in by_task.items() if name in member.tasks}
            for split, by_task in splits.items()
        }
        path = cache_file(self.cache, member, splits, self.device)
        outputs = read_outputs(path)
        if outputs is not None and fits(outputs, splits):
            say(f"{member.path}: predictions from {self.cache}")
            return outputs
        model, tokenizer, saved = load_model(member.path, read and read(), spare_base=self.pretrained)
        model.to(self.device.device)
        data = tokenise(splits, tokenizer, model.pair_encodings(), saved.data.extra_clean, say)
        outputs = {
            (split, name): predict(model, task_data, self.device.device, self.batch_size, self.device.amp)
            for split, by_task in data.items()
            for name, task_data in by_task.items()
        }
        write_outputs(path, outputs)
        say(f"{member.path}: predicted")
        return outputs
