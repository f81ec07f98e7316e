"""Ensemble saved checkpoints: average their predictions, score dev and predict test.

    python ensemble.py --filepaths a.pt b.pt a.pt --data_dir data
    python ensemble.py a.pt b.pt --data_dir data --run_dir runs/my-ensemble

A file named twice has two votes. Members may differ in arch and weights. One member is in memory at a time, and each
member's predictions are kept, by the hash of its file, so that the next ensemble of the same members takes seconds.
"""

import hashlib
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import (
    ComputeOptions,
    DataOptions,
    FileOptions,
    UserError,
    build_parser,
    expand_arguments,
    groups_of,
    option,
    run_script,
    say,
    task_defaults,
    task_options,
)
from tasks import TASKS, Task

# torch takes seconds to import: everything that needs it is imported once the command line is known to be right.
if TYPE_CHECKING:
    from datasets import Examples
    from training.device import Device

Outputs = dict[tuple[str, str], np.ndarray]  # (split, task) -> raw outputs [N, classes] or [N]
Splits = Mapping[str, Mapping[str, "Examples"]]


@dataclass
class EnsembleOptions:
    """Ensemble."""

    average: str = option(
        "probabilities",
        "mean of probabilities (similarities z-scored), or of raw outputs as in R0",
        choices=("probabilities", "logits"),
    )
    run_dir: str = option("runs/ensemble", "folder for scores.json and predictions/")
    cache: str = option("runs/ensemble-cache", "folder that keeps each member's predictions")


@dataclass(frozen=True)
class Member:
    """A checkpoint as the user named it, the hash of its content, the tasks that it knows, and its votes."""

    path: Path
    sha256: str
    tasks: tuple[str, ...]
    votes: int


def find_members(names: Sequence[str]) -> list[Member]:
    """The distinct checkpoints among `names`, each with the number of times that it is named."""
    from training.checkpoint import load, sha256

    for name in names:
        if not Path(name).is_file():
            raise UserError(f"--filepaths {name}: there is no such checkpoint; check the path")
    members = []
    for name, votes in Counter(names).items():
        tasks = tuple(load(Path(name), mmap=True).get("tasks", ()))
        if not tasks or not set(tasks) <= set(TASKS):
            raise UserError(f"--filepaths {name}: knows no task of the task table; name a best.pt of a run")
        members.append(Member(Path(name), sha256(Path(name)), tasks, votes))
    return members


def cache_file(cache: Path, member: Member, splits: Splits, device: "Device") -> Path:
    """Where a member's predictions are kept: named by all that they depend on."""
    digest = hashlib.sha256(f"{member.sha256} {device.amp}".encode())
    for split, by_task in splits.items():
        for name, examples in by_task.items():
            digest.update(f"\n{split} {name}\n".encode())
            for row in zip(*examples.texts, strict=True):
                digest.update("\t".join((*row, "")).encode())
    return cache / f"{digest.hexdigest()[:32]}.npz"


def read_outputs(path: Path) -> Outputs | None:
    """What an earlier ensemble kept; None where there is nothing or it is damaged."""
    try:
        with np.load(path) as saved:
            return {(key.split("/")[0], key.split("/")[1]): saved[key] for key in saved.files}
    except (OSError, ValueError, EOFError, KeyError, IndexError, zipfile.BadZipFile):
        return None


def member_outputs(member: Member, splits: Splits, cache: Path, device: "Device", batch_size: int) -> Outputs:
    """Raw outputs of a member for every split and task that it was trained on, from the cache if they are there."""
    from datasets import tokenise
    from evaluation import predict
    from training.checkpoint import load_model, write_atomically

    splits = {
        split: {name: examples for name, examples in by_task.items() if name in member.tasks}
        for split, by_task in splits.items()
    }
    path = cache_file(cache, member, splits, device)
    outputs = read_outputs(path)
    if outputs is not None:
        say(f"{member.path}: predictions from {cache}")
        return outputs
    model, tokenizer, _ = load_model(member.path)
    model.to(device.device)
    data = tokenise(splits, tokenizer, str(model.options.pair_encoding), say)
    outputs = {
        (split, name): predict(model, task_data, device.device, batch_size, device.amp)
        for split, by_task in data.items()
        for name, task_data in by_task.items()
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            named: dict[str, Any] = {f"{split}/{name}": values for (split, name), values in outputs.items()}
            np.savez(file, **named)

    write_atomically(path, write)
    say(f"{member.path}: predicted")
    return outputs


def z_scores(values: np.ndarray) -> np.ndarray:
    """Values [N] with mean 0 and deviation 1; all 0 where they are constant."""
    exact = values.astype(np.float64)
    deviation = exact.std()
    constant = deviation <= 1e-6 * np.abs(exact).max(initial=0.0)  # what rounding alone can make of equal numbers
    return np.zeros_like(exact) if constant else (exact - exact.mean()) / deviation


def vote(task: Task, outputs: Sequence[np.ndarray], votes: Sequence[int], average: str) -> np.ndarray:
    """The members' mean as probabilities [N(, classes)], or as similarities [N].

    Members trained with the Pearson loss have no common scale, so similarities are z-scored first; `logits` averages
    raw outputs instead (R0, appendix D). Decisions are made from the mean, never from rounded members.
    """
    from evaluation import probabilities

    if average == "logits":
        return probabilities(task, np.average(outputs, axis=0, weights=votes).astype(np.float32))
    comparable = z_scores if task.kind == "similarity" else lambda own: probabilities(task, own)
    return np.average([comparable(own) for own in outputs], axis=0, weights=votes)


def ensemble(members: Sequence[Member], splits: Splits, options: EnsembleOptions, compute: ComputeOptions) -> None:
    """Average the members over `splits`; print and write scores and predictions."""
    from evaluation import overall, probabilities, score_and_write, score_task
    from training.checkpoint import RunDirectory
    from training.device import choose_device
    from training.telemetry import score_table

    device = choose_device(compute, say)
    by_member = [
        member_outputs(member, splits, Path(options.cache), device, compute.eval_batch_size) for member in members
    ]
    tasks = {name: TASKS[name] for name in splits["dev"]}
    rows = {}
    for member, own in zip(members, by_member, strict=True):
        scores = {
            name: score_task(task, probabilities(task, own["dev", name]), splits["dev"][name].labels)
            for name, task in tasks.items()
            if ("dev", name) in own
        }
        rows[f"{member.path}" + (f" ({member.votes} votes)" if member.votes > 1 else "")] = overall(tasks, scores)
    averaged = {}
    for split, by_task in splits.items():
        for name in by_task:
            having = [i for i, own in enumerate(by_member) if (split, name) in own]
            outputs, votes = [by_member[i][split, name] for i in having], [members[i].votes for i in having]
            averaged[split, name] = vote(TASKS[name], outputs, votes, options.average)
    run = RunDirectory(Path(options.run_dir))
    scores = score_and_write(tasks, averaged, splits, run.path)
    votes_by_file = {str(member.path): member.votes for member in members}
    run.write_json("scores.json", {"dev": scores, "members": rows, "votes": votes_by_file, "average": options.average})
    say("\n" + score_table(tasks, {**rows, "ensemble": scores}))
    say(f"scores and predictions in {run.path}")


def main(argv: Sequence[str]) -> None:
    """Do what the command line asks."""
    groups = {"data": FileOptions, "compute": ComputeOptions, "ensemble": EnsembleOptions}
    parser = build_parser("ensemble.py", str(__doc__).split("\n\n")[0], TASKS, groups, ("dev", "test"))
    parser.usage = "ensemble.py CHECKPOINT [CHECKPOINT ...] [flags] [@file-of-flags]"
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="a best.pt; named twice, it votes twice")
    parser.add_argument("--filepaths", nargs="+", default=[], metavar="CHECKPOINT", help="the same, by a flag")
    given = vars(parser.parse_args(expand_arguments(argv)))
    names = given["checkpoints"] + given["filepaths"]
    if not names:
        raise UserError("--filepaths: name at least one checkpoint")
    from datasets import load_splits

    options = groups_of(given, groups)
    members = find_members(names)
    tasks = {name: task for name, task in TASKS.items() if any(name in member.tasks for member in members)}
    own = {name: task_options(given, task, task_defaults(task)) for name, task in tasks.items()}
    splits = load_splits(DataOptions(**vars(options["data"])), own, tasks, ["dev", "test"], say)
    ensemble(members, splits, options["ensemble"], options["compute"])


if __name__ == "__main__":
    run_script(main)
