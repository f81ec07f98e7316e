"""The rules of ensembles: votes, halves of dev, greedy choices and averages of weights."""

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
Score = Callable[[Sequence[int]], float]  # votes of the members -> score of their combination


def z_scores(values: np.ndarray) -> np.ndarray:
    """Return the values [N] with mean 0 and standard deviation 1, or zeros if they are constant."""
    exact = values.astype(np.float64)
    deviation = exact.std()
    constant = deviation <= 1e-6 * np.abs(exact).max(initial=0.0)  # a difference that rounding can make
    return np.zeros_like(exact) if constant else (exact - exact.mean()) / deviation


def vote(task: Task, outputs: Sequence[np.ndarray], votes: Sequence[int], average: str) -> np.ndarray:
    """Return the weighted mean of the members' outputs, as probabilities [N(, classes)] or similarities [N].

    Members trained with the Pearson loss have no common scale, so their similarities are z-scored first. With `average`
    logits, raw outputs are averaged instead (R0, appendix D). Members are never rounded to labels.
    """
    if average == "logits":
        return probabilities(task, np.average(outputs, axis=0, weights=votes).astype(np.float32))
    if task.kind == "similarity":
        return np.average([z_scores(values) for values in outputs], axis=0, weights=votes)
    return np.average([probabilities(task, values) for values in outputs], axis=0, weights=votes)


def vote_all(by_member: Sequence[Outputs], votes: Sequence[int], average: str) -> dict[tuple[str, str], np.ndarray]:
    """Return `vote` for each split and task, among the members that have votes and know the task."""
    voting = [(outputs, count) for outputs, count in zip(by_member, votes, strict=True) if count]
    out = {}
    for split, name in ((split, name) for split in ("dev", "test") for name in TASKS):
        known = [(outputs[split, name], count) for outputs, count in voting if (split, name) in outputs]
        if known:
            values, counts = zip(*known, strict=True)
            out[split, name] = vote(TASKS[name], values, counts, average)
    return out


def halves(ids: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return two halves of the examples with these `ids`, as rising indices; the first half may have one more.

    The hash of `seed` and the id decides the half of an example, so its place in the file does not matter.
    """
    order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed} {ids[i]}".encode()).digest())
    middle = (len(ids) + 1) // 2
    return np.sort(np.array(order[:middle], np.int64)), np.sort(np.array(order[middle:], np.int64))


def score_dev(values: Outputs, dev: Mapping[str, Examples], rows: Rows | None = None) -> Scores:
    """Return the scores of dev probabilities and similarities, over all examples or over these `rows` of each task."""
    by_task = {}
    for name in (name for name in dev if ("dev", name) in values):
        labels = dev[name].labels
        assert labels is not None
        chosen: Any = slice(None) if rows is None else rows[name]
        by_task[name] = score_task(TASKS[name], values["dev", name][chosen], labels[chosen])
    return overall(TASKS, by_task)


def select_votes(members: int, limit: int, score: Score) -> list[int]:
    """Return the votes of `members` members, at most `limit` in all, chosen greedily with replacement by `score`.

    Each step gives a vote to the member with which the score is best, the first of equals. The result is the best
    ensemble of all steps, the smallest of equals (Caruana et al. 2004, section 2.1).
    """
    votes = [0] * members
    best, best_score = votes, -np.inf
    for _ in progress(range(limit), "--select", "vote"):
        candidates = [[count + (i == chosen) for i, count in enumerate(votes)] for chosen in range(members)]
        scores = [score(candidate) for candidate in candidates]
        votes = candidates[int(np.argmax(scores))]
        if max(scores) > best_score + 1e-9:  # a larger difference than rounding makes
            best, best_score = votes, max(scores)
    return best


def greedy_soup(votes: Sequence[int], alone: Sequence[float], score: Score) -> list[int]:
    """Return the members' `votes`, with 0 for those that a greedy soup leaves out.

    In the order of their scores `alone`, the best first, each member is added if `score` does not fall (Wortsman et al.
    2022, "Model soups", recipe 1).
    """
    best_first = sorted(range(len(votes)), key=lambda i: -alone[i])
    soup = [0] * len(votes)
    best = alone[best_first[0]]
    for i in best_first:
        candidate = [count + votes[i] * (i == j) for j, count in enumerate(soup)]
        candidate_score = score(candidate) if any(soup) else best  # a soup of one member is that member
        if candidate_score >= best:
            soup, best = candidate, candidate_score
    return soup


def average_weights(members: Iterable[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """Return the mean of the members' weights by their votes, computed in float64; integers are the first member's.

    Members are read one after the other. The running statistics of batch normalisation are averaged like the rest,
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
    return {name: (sum_ / total).to(dtypes[name]) if sum_.is_floating_point() else sum_ for name, sum_ in sums.items()}


def check_alike(contents: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raise UserError if checkpoints cannot be averaged: they have adapters, or differ in what weights depend on."""
    facts = {}
    for path, content in contents.items():
        config = saved_config(content, path)
        if LoRAConfig.from_options(config.lora) is not None:
            raise UserError(
                f"--soup: {path} has adapters, and averages of their factors A and B do not make the average of their "
                "products; leave --soup out, predictions can be averaged"
            )
        texts = {"extra_clean": config.data.extra_clean}
        facts[path] = _facts_of_weights(
            content, vars(config.model) | config.heads_of_tasks() | vars(config.pal) | texts
        )
    first, wanted = next(iter(facts.items()))
    for path, found in facts.items():
        differing = [name for name in wanted | found if wanted.get(name) != found.get(name)]
        if differing:
            shown = ", ".join(f"{name} {found.get(name)} instead of {wanted.get(name)}" for name in differing[:3])
            raise UserError(
                f"--soup: {path} has {shown}, unlike {first}; average weights of one kind only, or leave --soup out: "
                "predictions can be averaged"
            )


def _facts_of_weights(content: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be equal before weights can be averaged, by the name that a message uses."""
    return {
        # --arch only stands for other options.
        **{f"--{key}": value for key, value in options.items() if key != "arch" and not key.endswith("dropout_prob")},
        **{name: value for name, value in content["bert_config"].items() if "dropout" not in name},
        "tasks": ",".join(content["tasks"]),
        "tokenizer": content["tokenizer_sha256"][:12],
        **{f"weight {name}": list(tensor.shape) for name, tensor in content["weights"].items()},
    }
