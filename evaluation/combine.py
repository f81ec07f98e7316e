"""Combine the members of an ensemble: mean, soup and selection, with their scores and predictions."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ComputeOptions, DataOptions, EnsembleOptions, FileOptions, TaskOptions
from datasets import Examples, load_splits
from evaluation.ensembling import Rows, average_weights, greedy_soup, halves, score_dev, select_votes, vote_all
from evaluation.members import Member, Outputs, Predictor, Splits, check_members, find_members, soup_path
from evaluation.metrics import Scores, probabilities, score_table, similarity_lines
from evaluation.prediction_files import refuse_training_run, score_and_write
from models.checkpoint import load, load_model, model_checkpoint, save
from tasks import TASKS
from utils.console import say
from utils.device import device_of
from utils.errors import UserError
from utils.files import probe_folder, write_json


@dataclass(frozen=True)
class Combination:
    """What members make together: probabilities or similarities by (split, task), and the votes by file."""

    values: Outputs
    votes: dict[str, int]


def run_ensemble(
    names: Sequence[str],
    options: EnsembleOptions,
    files: FileOptions,
    task_options: Mapping[str, TaskOptions],
    compute: ComputeOptions,
) -> None:
    """Load the checkpoints `names` and their data, and `combine` them. Raises UserError for what cannot be used."""
    members = find_members(names)
    check_members(members, options)
    tasks = {name: task for name, task in TASKS.items() if any(name in member.tasks for member in members)}
    splits = load_splits(DataOptions(**vars(files)), task_options, tasks, ["dev", "test"], say)
    refuse_training_run(Path(options.run_dir))
    probe_folder(Path(options.cache), "--cache")
    combine(members, splits, options, compute)


def combine(members: Sequence[Member], splits: Splits, options: EnsembleOptions, compute: ComputeOptions) -> None:
    """Combine the members over `splits`, and print and write scores and predictions."""
    dev = splits["dev"]
    rows_of_half = cut_dev(dev) if options.select is not None or options.soup == "greedy" else {}

    def scores_of(values: Outputs) -> Scores:
        scores = score_dev(values, dev)
        return scores | {half: score_dev(values, dev, rows)["score"] for half, rows in rows_of_half.items()}

    device = device_of(compute, say)
    predictor = Predictor(Path(options.cache), device, compute.eval_batch_size, options.pretrained)
    outputs = [predictor.outputs(member, splits) for member in members]
    member_names = [f"{member.path}" + (f" ({member.votes} votes)" if member.votes > 1 else "") for member in members]
    member_scores = {
        name: scores_of(as_probabilities(values)) for name, values in zip(member_names, outputs, strict=True)
    }
    votes = [member.votes for member in members]
    combinations = {"mean": Combination(vote_all(outputs, votes, options.average), votes_by_file(members, votes))}
    if options.soup is not None:
        half = rows_of_half["chosen_half"] if options.soup == "greedy" else None
        alone = [scores["chosen_half"] for scores in member_scores.values()] if half else []
        combinations[f"{options.soup} soup"] = make_soup(members, alone, splits, half, options, predictor)
    if options.select is not None:
        combinations["selection"] = make_selection(members, outputs, dev, rows_of_half["chosen_half"], options)
    combined_scores = {name: scores_of(combination.values) for name, combination in combinations.items()}
    report(member_scores, combinations, combined_scores, splits, options, tuple(rows_of_half))


def cut_dev(dev: Mapping[str, Examples]) -> dict[str, Rows]:
    """Return the rows of each dev set by which choices are made (chosen_half) and the others (held_out_half).

    Raises UserError for a dev set of one example.
    """
    for name, examples in dev.items():
        if len(examples) < 2:
            raise UserError(f"{examples.path}: one example has no halves; --{name}_dev names a longer file")
    both = {name: halves(examples.ids) for name, examples in dev.items()}
    return {
        "chosen_half": {name: first for name, (first, _) in both.items()},
        "held_out_half": {name: second for name, (_, second) in both.items()},
    }


def as_probabilities(outputs: Outputs) -> Outputs:
    """Return the raw outputs of one member as probabilities; similarities stay as they are."""
    return {(split, name): probabilities(TASKS[name], values) for (split, name), values in outputs.items()}


def votes_by_file(members: Sequence[Member], votes: Sequence[int]) -> dict[str, int]:
    """Return the votes of the members that have any."""
    return {str(member.path): count for member, count in zip(members, votes, strict=True) if count}


def make_selection(
    members: Sequence[Member],
    outputs: Sequence[Outputs],
    dev: Mapping[str, Examples],
    half: Rows,
    options: EnsembleOptions,
) -> Combination:
    """Return the vote of the members that a greedy selection by `half` of dev chooses."""
    on_dev = [{key: values for key, values in member.items() if key[0] == "dev"} for member in outputs]

    def score(votes: Sequence[int]) -> float:
        return float(score_dev(vote_all(on_dev, votes, options.average), dev, half)["score"])

    votes = select_votes(len(members), options.select or 0, score)
    return Combination(vote_all(outputs, votes, options.average), votes_by_file(members, votes))


def soup_content(members: Sequence[Member], votes: Sequence[int]) -> dict[str, Any]:
    """Return the checkpoint of a soup: the average weights of the members with votes, all else from the first one."""
    voting = [(member.path, count) for member, count in zip(members, votes, strict=True) if count]
    weights = average_weights((load(path, mmap=True)["weights"], count) for path, count in voting)
    return {**load(voting[0][0], mmap=True), "weights": weights}


def make_soup(
    members: Sequence[Member],
    alone: Sequence[float],
    splits: Splits,
    half: Rows | None,
    options: EnsembleOptions,
    predictor: Predictor,
) -> Combination:
    """Average the weights of members, write the checkpoint and predict with it.

    A greedy soup is chosen by the rows `half` of dev; `alone` are the members' scores on them. A uniform soup takes all
    members, and `half` is None.
    """
    path = soup_path(options)

    def predict_soup(votes: Sequence[int], over: Splits) -> Outputs:
        named = [f"{member.sha256} {count}" for member, count in zip(members, votes, strict=True) if count]
        soup = Member(path, hashlib.sha256("\n".join(["soup", *named]).encode()).hexdigest(), members[0].tasks, 1)
        return as_probabilities(predictor.outputs(soup, over, read=lambda: soup_content(members, votes)))

    def score(votes: Sequence[int]) -> float:
        return float(score_dev(predict_soup(votes, {"dev": splits["dev"]}), splits["dev"], half)["score"])

    votes = [member.votes for member in members]
    if half is not None:
        votes = greedy_soup(votes, alone, score)
    values = predict_soup(votes, splits)
    model, tokenizer, config = load_model(path, soup_content(members, votes), spare_base=options.pretrained)
    named_votes = votes_by_file(members, votes)
    scores = score_dev(values, splits["dev"])
    dev = splits["dev"].items()
    scored = {name: (values["dev", name], part.labels) for name, part in dev if part.labels is not None}
    lines = similarity_lines(TASKS, scored)
    save(path, {**model_checkpoint(model, tokenizer, config, scores, lines), "soup": named_votes})
    if any("running_" in name for name in model.state_dict()):
        say(f"{path}: running statistics of batch normalisation are averages too, which is only approximate")
    return Combination(values, named_votes)


def report(
    member_scores: Mapping[str, Scores],
    combinations: Mapping[str, Combination],
    combined_scores: Mapping[str, Scores],
    splits: Splits,
    options: EnsembleOptions,
    half_names: Sequence[str],
) -> None:
    """Print and write the scores of members and combinations, and write the predictions of the last combination."""
    folder = Path(options.run_dir)
    tasks = {name: TASKS[name] for name in splits["dev"]}
    last, written = list(combinations.items())[-1]
    scores = score_and_write(tasks, written.values, splits, folder)
    about = {"predictions": last, "votes": written.votes, "members": member_scores, "average": options.average}
    combined = {name: {"dev": combined_scores[name], "votes": made.votes} for name, made in combinations.items()}
    write_json(folder / "scores.json", {"dev": scores, **about, "combined": combined})
    say("\n" + score_table(tasks, {**member_scores, **combined_scores}, half_names))
    if half_names:
        say("chosen half: of dev, what choices were made by; held-out half: whether they hold for other examples")
    for name, made in list(combinations.items())[1:]:
        say(f"{name}: " + ", ".join(f"{path} x {count}" for path, count in made.votes.items()))
    say(f"scores and predictions ({last}) in {folder}")
