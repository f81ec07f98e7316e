"""Ensemble saved checkpoints: average predictions or weights, choose members and votes, score dev, predict test.

    python ensemble.py --filepaths a.pt b.pt a.pt --data_dir data
    python ensemble.py a.pt b.pt c.pt --data_dir data --select 20 --run_dir runs/my-selection
    python ensemble.py a.pt b.pt c.pt --data_dir data --soup greedy --run_dir runs/my-soup

A file named twice has two votes. Members may differ in arch and weights. One member is in memory at a time, and each
member's predictions are kept, by the hash of its file, so that the next ensemble of the same members takes seconds.

--select and --soup greedy choose by one half of dev. The other half shows whether the choice holds for examples that
it was not made by; the members' own best epochs were chosen by both halves. Predictions are those of the last row of
the table. A soup must be of members with one arch and the same start weights; RUN_DIR/soup.pt is a checkpoint like any.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.parser import build_parser, expand_arguments, groups_of, task_options
from config import ComputeOptions, DataOptions, FileOptions, option
from tasks import TASKS
from utils.console import run_script, say
from utils.errors import UserError
from utils.files import sha256, write_atomically
from utils.untrusted import refuse_inflating

# torch takes seconds to import: everything that needs it is imported once the command line is known to be right.
if TYPE_CHECKING:
    from datasets import Examples
    from evaluation.ensembling import Rows
    from utils.device import Device

Outputs = dict[tuple[str, str], np.ndarray]  # (split, task) -> raw outputs or probabilities, [N, classes] or [N]
Splits = Mapping[str, Mapping[str, "Examples"]]


@dataclass
class EnsembleOptions:
    """Ensemble."""

    average: str = option(
        "probabilities",
        "mean of probabilities (similarities z-scored), or of raw outputs as in R0",
        choices=("probabilities", "logits"),
    )
    select: int | None = option(
        None, "also choose members and up to so many votes greedily, by one half of dev", metavar="VOTES", low=1
    )
    soup: str | None = option(
        None,
        "also average weights, into RUN_DIR/soup.pt: of all members, or greedily of those that help on half of dev",
        choices=("uniform", "greedy"),
    )
    run_dir: str = option("runs/ensemble", "folder for scores.json and predictions/", metavar="DIR")
    cache: str = option("runs/ensemble-cache", "folder that keeps each member's predictions", metavar="DIR")


@dataclass(frozen=True)
class Member:
    """A checkpoint as the user named it, the hash of its content, the tasks that it knows, and its votes."""

    path: Path
    sha256: str
    tasks: tuple[str, ...]
    votes: int


@dataclass(frozen=True)
class Combined:
    """What members make together: probabilities or similarities by (split, task), and the votes by file."""

    values: Outputs
    votes: dict[str, int]


def find_members(names: Sequence[str]) -> list[Member]:
    """The distinct checkpoints among `names`, each with the number of times that it is named."""
    from models.checkpoint import load, trained_tasks

    for name in names:
        if not Path(name).is_file():
            raise UserError(f"--filepaths {name}: there is no such checkpoint; check the path")
    members, spelled = [], {Path(name).resolve(): name for name in reversed(names)}  # each as it is named first
    for name, votes in Counter(spelled[Path(name).resolve()] for name in names).items():
        tasks = tuple(trained_tasks(load(Path(name)), Path(name)))  # all of it, so that damage is found here
        members.append(Member(Path(name), sha256(Path(name)), tasks, votes))
    return members


def check_members(members: Sequence[Member], options: EnsembleOptions) -> None:
    """See that what is asked for has a meaning with these members. Raises UserError where it has none."""
    from evaluation.ensembling import check_alike
    from models.checkpoint import load

    for flag in ("select", "soup"):
        if getattr(options, flag) is not None and len(members) < 2:
            raise UserError(f"--{flag} {getattr(options, flag)} needs a choice; name two different checkpoints or more")
    if options.select is not None:
        known = {task: member.path for member in members for task in member.tasks}
        for member in members:
            if missing := sorted(known.keys() - set(member.tasks)):
                raise UserError(
                    f"--select compares members by all their tasks, but {member.path} does not know {missing[0]}, "
                    f"as {known[missing[0]]} does; leave one of them out, or --select"
                )
    if options.soup is not None:
        if soup_path(options).resolve() in [member.path.resolve() for member in members]:
            raise UserError(f"--soup writes {soup_path(options)}, which is a member too; choose another --run_dir")
        check_alike({member.path: load(member.path, mmap=True) for member in members})


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


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
        refuse_inflating(path)
        with np.load(path, allow_pickle=False) as saved:
            return {(key.split("/")[0], key.split("/")[1]): saved[key] for key in saved.files}
    except Exception:  # of a damaged file numpy and zipfile raise a dozen kinds
        return None


def fits(outputs: Outputs, splits: Splits) -> bool:
    """Whether these are outputs for all examples of `splits`, as the tasks have them."""
    wanted = {
        (split, name): (len(examples), TASKS[name].num_outputs)[: 2 if TASKS[name].kind == "classes" else 1]
        for split, by_task in splits.items()
        for name, examples in by_task.items()
    }
    return {key: own.shape for key, own in outputs.items()} == wanted and all(
        own.dtype.kind == "f" and np.isfinite(own).all() for own in outputs.values()
    )


def member_outputs(
    member: Member,
    splits: Splits,
    cache: Path,
    device: "Device",
    batch_size: int,
    read: Callable[[], Mapping[str, Any]] | None = None,
) -> Outputs:
    """Raw outputs of a member for every split and task that it was trained on, from the cache if they are there.

    `read` gives the content of a checkpoint that is not a file yet.
    """
    from datasets import tokenise
    from evaluation.predict import predict
    from models.checkpoint import load_model

    splits = {
        split: {name: examples for name, examples in by_task.items() if name in member.tasks}
        for split, by_task in splits.items()
    }
    path = cache_file(cache, member, splits, device)
    outputs = read_outputs(path)
    if outputs is not None and fits(outputs, splits):
        say(f"{member.path}: predictions from {cache}")
        return outputs
    model, tokenizer, saved = load_model(member.path, read and read())
    model.to(device.device)
    data = tokenise(splits, tokenizer, str(model.options.pair_encoding), saved.data.extra_clean, say)
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


def as_probabilities(outputs: Outputs) -> Outputs:
    """One member's raw outputs as probabilities; similarities stay as they are."""
    from evaluation.metrics import probabilities

    return {key: probabilities(TASKS[key[1]], own) for key, own in outputs.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Soups


def soup_path(options: EnsembleOptions) -> Path:
    """The file of a soup."""
    return Path(options.run_dir) / "soup.pt"


def soup_content(members: Sequence[Member], votes: Sequence[int]) -> dict[str, Any]:
    """A checkpoint with the average of the weights of the members that have votes; the rest is the first one's."""
    from evaluation.ensembling import average_weights
    from models.checkpoint import load

    voting = [(member.path, count) for member, count in zip(members, votes, strict=True) if count]
    weights = average_weights((load(path, mmap=True)["weights"], count) for path, count in voting)
    return {**load(voting[0][0], mmap=True), "weights": weights}


def make_soup(
    members: Sequence[Member],
    alone: Sequence[float],
    splits: Splits,
    half: "Rows | None",
    options: EnsembleOptions,
    outputs_of: Callable[..., Outputs],
) -> Combined:
    """Average weights, write the checkpoint and predict with it.

    `alone` are the members' scores on `half`, the examples by which a greedy soup is chosen; None for a uniform one.
    """
    from evaluation.ensembling import greedy_soup, score_dev
    from models.checkpoint import load_model, model_checkpoint, save

    path = soup_path(options)

    def predicted(votes: Sequence[int], over: Splits) -> Outputs:
        named = [f"{member.sha256} {count}" for member, count in zip(members, votes, strict=True) if count]
        soup = Member(path, hashlib.sha256("\n".join(["soup", *named]).encode()).hexdigest(), members[0].tasks, 1)
        return as_probabilities(outputs_of(soup, over, read=lambda: soup_content(members, votes)))

    def score(votes: Sequence[int]) -> float:
        return float(score_dev(predicted(votes, {"dev": splits["dev"]}), splits["dev"], half)["score"])

    votes = [member.votes for member in members]
    if half is not None:
        votes = greedy_soup(votes, alone, score)
    values = predicted(votes, splits)
    model, tokenizer, config = load_model(path, soup_content(members, votes))
    named = votes_by_file(members, votes)
    save(path, {**model_checkpoint(model, tokenizer, config, score_dev(values, splits["dev"])), "soup": named})
    if any("running_" in name for name in model.state_dict()):
        say(f"{path}: running statistics of batch normalisation are averages too, which is only approximate")
    return Combined(values, named)


# ----------------------------------------------------------------------------------------------------------------------
# Ensembles


def votes_by_file(members: Sequence[Member], votes: Sequence[int]) -> dict[str, int]:
    """The votes of those members that have any."""
    return {str(member.path): count for member, count in zip(members, votes, strict=True) if count}


def make_selection(
    members: Sequence[Member],
    by_member: Sequence[Outputs],
    dev: "Mapping[str, Examples]",
    half: "Rows",
    options: EnsembleOptions,
) -> Combined:
    """The vote of the members that a greedy selection by `half` of dev chooses."""
    from evaluation.ensembling import score_dev, select_votes, vote_all

    on_dev = [{key: own for key, own in outputs.items() if key[0] == "dev"} for outputs in by_member]

    def score(votes: Sequence[int]) -> float:
        return float(score_dev(vote_all(on_dev, votes, options.average), dev, half)["score"])

    votes = select_votes(len(members), options.select or 0, score)
    return Combined(vote_all(by_member, votes, options.average), votes_by_file(members, votes))


def cut_dev(dev: "Mapping[str, Examples]") -> "dict[str, Rows]":
    """The half of every task's dev set that choices are made by, and the half that is held out.

    Raises UserError for a dev set of one example.
    """
    from evaluation.ensembling import halves

    for name, examples in dev.items():
        if len(examples) < 2:
            raise UserError(f"{examples.path}: one example has no halves; --{name}_dev names a longer file")
    cut = {name: halves(examples.ids) for name, examples in dev.items()}
    names = ("chosen_half", "held_out_half")
    return {half: {name: own[i] for name, own in cut.items()} for i, half in enumerate(names)}


def ensemble(members: Sequence[Member], splits: Splits, options: EnsembleOptions, compute: ComputeOptions) -> None:
    """Combine the members over `splits`; print and write scores and predictions."""
    from evaluation.ensembling import score_dev, vote_all
    from utils.device import choose_device

    dev = splits["dev"]
    cut = cut_dev(dev) if options.select is not None or options.soup == "greedy" else {}

    def scored(values: Outputs) -> dict[str, Any]:
        return score_dev(values, dev) | {name: score_dev(values, dev, half)["score"] for name, half in cut.items()}

    device = choose_device(compute.use_gpu, compute.amp, compute.threads, say)
    outputs_of = partial(member_outputs, cache=Path(options.cache), device=device, batch_size=compute.eval_batch_size)
    by_member = [outputs_of(member, splits) for member in members]
    names = [f"{member.path}" + (f" ({member.votes} votes)" if member.votes > 1 else "") for member in members]
    rows = {name: scored(as_probabilities(outputs)) for name, outputs in zip(names, by_member, strict=True)}
    votes = [member.votes for member in members]
    made = {"mean": Combined(vote_all(by_member, votes, options.average), votes_by_file(members, votes))}
    if options.soup is not None:
        half = cut["chosen_half"] if options.soup == "greedy" else None
        alone = [own["chosen_half"] for own in rows.values()] if half else []
        made[f"{options.soup} soup"] = make_soup(members, alone, splits, half, options, outputs_of)
    if options.select is not None:
        made["selection"] = make_selection(members, by_member, dev, cut["chosen_half"], options)
    report(rows, made, {name: scored(own.values) for name, own in made.items()}, splits, options, tuple(cut))


def report(
    rows: Mapping[str, dict[str, Any]],
    made: Mapping[str, Combined],
    combined: Mapping[str, dict[str, Any]],
    splits: Splits,
    options: EnsembleOptions,
    half_names: Sequence[str],
) -> None:
    """Print the scores of the members (`rows`) and of what was `made` of them, and write them all into the run folder.

    Predictions are those of the last thing made.
    """
    from evaluation.metrics import score_table
    from evaluation.prediction_files import score_and_write
    from training.run_directory import RunDirectory

    run = RunDirectory(Path(options.run_dir))
    tasks = {name: TASKS[name] for name in splits["dev"]}
    last, written = list(made.items())[-1]
    scores = score_and_write(tasks, written.values, splits, run.path)
    about = {"predictions": last, "votes": written.votes, "members": rows, "average": options.average}
    by_name = {name: {"dev": combined[name], "votes": own.votes} for name, own in made.items()}
    run.write_json("scores.json", {"dev": scores, **about, "combined": by_name})
    say("\n" + score_table(tasks, {**rows, **combined}, half_names))
    if half_names:
        say("chosen half: of dev, what choices were made by; held-out half: whether they hold for other examples")
    for name, own in list(made.items())[1:]:
        say(f"{name}: " + ", ".join(f"{path} x {count}" for path, count in own.votes.items()))
    say(f"scores and predictions ({last}) in {run.path}")


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
    from evaluation.prediction_files import refuse_training_run
    from utils.files import probe_folder

    options = groups_of(given, groups)
    members = find_members(names)
    check_members(members, options["ensemble"])
    tasks = {name: task for name, task in TASKS.items() if any(name in member.tasks for member in members)}
    own = {name: task_options(given, task) for name, task in tasks.items()}
    splits = load_splits(DataOptions(**vars(options["data"])), own, tasks, ["dev", "test"], say)
    refuse_training_run(Path(options["ensemble"].run_dir))
    probe_folder(Path(options["ensemble"].cache), "--cache")
    ensemble(members, splits, options["ensemble"], options["compute"])


if __name__ == "__main__":
    run_script(main)
