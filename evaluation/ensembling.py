"""The rules of ensembles, apart from files and tables: votes, halves of dev, greedy choices, averages of weights."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import Examples
from evaluation.metrics import Scores, overall, probabilities, score_task
from lora import LoRAConfig
from models.checkpoint import saved_config
from tasks import TASKS, Task
from utils.console import progress
from utils.errors import UserError

Outputs = Mapping[tuple[str, str], np.ndarray]  # (split, task) -> values [N, classes] or [N]
Rows = Mapping[str, np.ndarray]  # task -> indices of its dev examples
Score = Callable[[Sequence[int]], float]  # of what the members make with these votes


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


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
    if average == "logits":
        return probabilities(task, np.average(outputs, axis=0, weights=votes).astype(np.float32))
    comparable = z_scores if task.kind == "similarity" else lambda own: probabilities(task, own)
    return np.average([comparable(own) for own in outputs], axis=0, weights=votes)


def vote_all(by_member: Sequence[Outputs], votes: Sequence[int], average: str) -> dict[tuple[str, str], np.ndarray]:
    """`vote` for every split and task, among the members that have votes and know the task."""
    voting = [(own, count) for own, count in zip(by_member, votes, strict=True) if count]
    out = {}
    for key in ((split, name) for split in ("dev", "test") for name in TASKS):
        having = [(own[key], count) for own, count in voting if key in own]
        if having:
            outputs, counts = zip(*having, strict=True)
            out[key] = vote(TASKS[key[1]], outputs, counts, average)
    return out


def halves(ids: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the examples with these `ids`, as indices; the first has one more where the number is odd.

    The hash of its id and of `seed` puts an example into its half, wherever in the file it stands.
    """
    order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed} {ids[i]}".encode()).digest())
    middle = (len(ids) + 1) // 2
    return np.sort(np.array(order[:middle], np.int64)), np.sort(np.array(order[middle:], np.int64))


def score_dev(values: Outputs, dev: Mapping[str, Examples], rows: Rows | None = None) -> Scores:
    """Scores of dev probabilities and similarities, over all examples or over these `rows` of each task."""
    by_task = {}
    for name in (name for name in dev if ("dev", name) in values):
        labels = dev[name].labels
        assert labels is not None
        chosen: Any = slice(None) if rows is None else rows[name]
        by_task[name] = score_task(TASKS[name], values["dev", name][chosen], labels[chosen])
    return overall(TASKS, by_task)


# ----------------------------------------------------------------------------------------------------------------------
# Greedy choices


def select_votes(members: int, limit: int, score: Score) -> list[int]:
    """Votes of so many `members`, at most `limit` in all, chosen greedily with replacement for a high `score`.

    From none on, the member whose vote makes the best score gets it, the first of equals. Of all the ensembles on that
    way the best is kept, the smallest of equals (Caruana et al. 2004, "Ensemble selection from libraries of models",
    section 2.1).
    """
    votes = [0] * members
    best, best_score = votes, -np.inf
    for _ in progress(range(limit), "--select", "vote"):
        added = [[own + (i == chosen) for i, own in enumerate(votes)] for chosen in range(members)]
        scores = [score(own) for own in added]
        votes = added[int(np.argmax(scores))]
        if max(scores) > best_score + 1e-9:  # more than rounding makes of two votes instead of one
            best, best_score = votes, max(scores)
    return best


def greedy_soup(votes: Sequence[int], alone: Sequence[float], score: Score) -> list[int]:
    """The members' `votes`, with 0 for those that a greedy soup leaves out.

    From the one with the best score `alone` on, in that order, each is added if `score` does not fall (Wortsman et al.
    2022, "Model soups", recipe 1).
    """
    best_first = sorted(range(len(votes)), key=lambda i: -alone[i])
    soup = [0] * len(votes)
    best = alone[best_first[0]]
    for i in best_first:
        trial = [own + votes[i] * (i == j) for j, own in enumerate(soup)]
        found = score(trial) if any(soup) else best  # a soup of one is its member
        if found >= best:
            soup, best = trial, found
    return soup


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def average_weights(members: Iterable[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """The mean of the members' weights by their votes, made in float64; whole numbers are the first member's.

    Members are taken one after the other. The running statistics of batch normalisation are averaged like the rest,
    which is approximate: those of the averaged network would have to be measured on training data.
    """
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    total = 0
    for weights, votes in members:
        for name, tensor in weights.items():
            if name not in sums:
                dtypes[name] = tensor.dtype
                sums[name] = tensor.double() * votes if tensor.is_floating_point() else tensor.clone()
            elif tensor.is_floating_point():
                sums[name].add_(tensor, alpha=votes)
        total += votes
    return {name: (own / total).to(dtypes[name]) if own.is_floating_point() else own for name, own in sums.items()}


def check_alike(contents: Mapping[Path, Mapping[str, Any]]) -> None:
    """See that the weights of these checkpoints can be averaged.

    Raises UserError for adapters, and for another arch, shape, cleaning, tokenizer, start weights or tasks than the
    first has.
    """
    alike = {}
    for path, content in contents.items():
        config = saved_config(content, path)
        if LoRAConfig.from_options(config.lora) is not None:
            raise UserError(
                f"--soup: {path} has adapters, and averages of their factors A and B do not make the average of their "
                "products; leave --soup out, predictions can be averaged"
            )
        texts = {"extra_clean": config.data.extra_clean}
        alike[path] = _meaning_of_weights(content, vars(config.model) | vars(config.pal) | texts)
    first, wanted = next(iter(alike.items()))
    for path, found in alike.items():
        differing = [name for name in wanted | found if wanted.get(name) != found.get(name)]
        if differing:
            shown = ", ".join(f"{name} {found.get(name)} instead of {wanted.get(name)}" for name in differing[:3])
            raise UserError(
                f"--soup: {path} has {shown}, unlike {first}; average weights of one kind only, or leave --soup out: "
                "predictions can be averaged"
            )


def _meaning_of_weights(content: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree before weights can be averaged, under the names that a message calls it by."""
    free = ("arch", "hidden_dropout_prob", "output_dropout_prob", "backbone_dropout_prob")  # arch names the others
    return {
        **{f"--{name}": value for name, value in options.items() if name not in free},
        **{name: value for name, value in content["bert_config"].items() if "dropout" not in name},
        "tasks": ",".join(content["tasks"]),
        "tokenizer": content["tokenizer_sha256"][:12],
        **{f"weight {name}": list(tensor.shape) for name, tensor in content["weights"].items()},
    }
