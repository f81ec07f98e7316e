"""The rules of ensembles against references: votes, halves of dev, greedy choices and averages of weights."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SAMPLE, configure
from scipy.special import expit, softmax
from scipy.stats import pearsonr

from config import DataOptions, TaskOptions
from datasets import load_splits
from evaluation.ensembling import (
    average_weights,
    check_alike,
    greedy_soup,
    halves,
    score_dev,
    select_votes,
    vote,
    z_scores,
)
from evaluation.metrics import correlation, decide, probabilities
from models.checkpoint import load, save
from tasks import DEFAULT_TASKS, PARA, SST, STS
from utils.errors import UserError

rng = np.random.default_rng


def test_votes_are_means_of_probabilities_or_z_scores() -> None:
    outputs = [rng(i).normal(size=(50, 5)).astype(np.float32) * 3 for i in range(3)]
    voted = vote(SST, outputs, [1, 1, 1], "probabilities")
    assert np.abs(voted - np.mean([softmax(values, axis=1) for values in outputs], axis=0)).max() < 1e-6
    one = [values[:, 0] for values in outputs]
    voted = vote(PARA, one, [1, 1, 1], "probabilities")
    assert np.abs(voted - np.mean([expit(values) for values in one], axis=0)).max() < 1e-6
    wanted = np.mean([(values - values.mean()) / values.std() for values in one], axis=0)
    assert np.abs(vote(STS, one, [1, 1, 1], "probabilities") - wanted).max() < 1e-5
    scaled = [one[0] * 100 - 7, one[1] * 0.01, one[2] + 3]  # members trained with Pearson have no common scale
    assert np.abs(vote(STS, scaled, [1, 1, 1], "probabilities") - wanted).max() < 1e-4


def test_logits_mode_averages_raw_outputs() -> None:
    logits = [rng(i).normal(size=(20, 5)).astype(np.float32) * 4 for i in range(2)]
    assert np.abs(vote(SST, logits, [2, 1], "logits") - softmax((2 * logits[0] + logits[1]) / 3, axis=1)).max() < 1e-6
    one = [values[:, 0] for values in logits]
    assert np.abs(vote(PARA, one, [1, 1], "logits") - expit((one[0] + one[1]) / 2)).max() < 1e-6
    assert np.abs(vote(STS, one, [1, 1], "logits") - (one[0] + one[1]) / 2).max() < 1e-6
    # A single loud member decides here, which is why probabilities are the default.
    members = [np.array([12.0], np.float32), np.array([-3.0], np.float32), np.array([-3.0], np.float32)]
    assert decide(PARA, vote(PARA, members, [1, 1, 1], "logits")).tolist() == [1]
    assert decide(PARA, vote(PARA, members, [1, 1, 1], "probabilities")).tolist() == [0]


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("task", list(DEFAULT_TASKS))
def test_votes_equal_naming_a_member_repeatedly(task: str, average: str) -> None:
    shape = (30, 5) if task == "sst" else (30,)
    a, b, c = (rng(i).normal(size=shape).astype(np.float32) for i in range(3))
    listed = vote(DEFAULT_TASKS[task], [a, b, a, c, a], [1, 1, 1, 1, 1], average)
    voted = vote(DEFAULT_TASKS[task], [a, b, c], [3, 1, 1], average)
    assert np.abs(listed - voted).max() < 1e-6
    assert np.abs(voted - vote(DEFAULT_TASKS[task], [a, b, c], [1, 1, 1], average)).max() > 1e-2
    alone = vote(DEFAULT_TASKS[task], [a], [3], average)
    if task == "sts":
        assert pearsonr(alone, a).statistic == pytest.approx(1.0)
    else:
        assert np.array_equal(decide(DEFAULT_TASKS[task], alone), a.argmax(axis=1) if task == "sst" else a >= 0)


def test_members_are_not_rounded_before_the_threshold() -> None:
    """One sure member outvotes two that are barely against it."""
    members = [np.log(p / (1 - p)).astype(np.float32) for p in (np.array([0.95]), np.array([0.45]), np.array([0.45]))]
    assert decide(PARA, vote(PARA, members, [1, 1, 1], "probabilities")).tolist() == [1]  # mean 0.617
    classes = np.log(np.array([[[0.8, 0.1, 0.1]], [[0.4, 0.5, 0.1]], [[0.4, 0.5, 0.1]]], np.float32))
    assert [decide(SST, probabilities(SST, values)).tolist() for values in classes] == [[0], [1], [1]]
    assert decide(SST, vote(SST, list(classes), [1, 1, 1], "probabilities")).tolist() == [0]


def test_z_scores_of_a_constant_are_zero() -> None:
    """Also if rounding makes it differ in the last digit, which z-scores would enlarge."""
    values = rng(0).normal(size=40) * 3 + 8
    assert z_scores(values).mean() == pytest.approx(0, abs=1e-12) and z_scores(values).std() == pytest.approx(1)
    for value, size, dtype in itertools.product((0.1, 2.7, 1e4 / 7), (3, 150, 864), (np.float32, np.float64)):
        assert np.abs(z_scores(np.full(size, value, dtype))).max() < 1e-3
    constant = np.full(50, 2.7, np.float32)
    rounded = np.where(np.arange(50) % 3, constant, np.nextafter(constant, np.float32(9)))
    useful = rng(1).normal(size=50)
    assert correlation(vote(STS, [useful, rounded], [1, 1], "probabilities"), useful) == pytest.approx(1)


def test_halves_are_random_disjoint_and_follow_the_ids() -> None:
    for size in (2, 3, 150, 151):
        first, second = halves([f"id{i}" for i in range(size)])
        assert sorted([*first, *second]) == list(range(size)) and len(first) - len(second) == size % 2
        assert first.dtype == np.int64 and (np.diff(first) > 0).all() and (np.diff(second) > 0).all()
    ids = [f"id{i}" for i in range(1000)]
    first, second = halves(ids)
    assert abs(first.mean() - second.mean()) < 60  # five deviations; the first 500 would be 500 away
    assert abs(np.mean(first % 2) - 0.5) < 0.08
    assert 200 < len(set(first) & set(halves(ids, seed=1)[0])) < 300
    shuffled = [ids[i] for i in rng(0).permutation(1000)]
    for half, again in zip(halves(ids), halves(shuffled), strict=True):
        assert {ids[i] for i in half} == {shuffled[i] for i in again}


def test_scores_of_rows() -> None:
    """They are those of a file with these rows alone."""
    options = dict.fromkeys(DEFAULT_TASKS, TaskOptions())
    dev = load_splits(DataOptions(data_dir=str(SAMPLE)), options, DEFAULT_TASKS, ["dev"], print)["dev"]
    values = {("dev", "sst"): rng(0).random((150, 5)), ("dev", "sts"): rng(1).random(150)}
    found = score_dev(values, dev, {name: np.arange(10, 30) for name in DEFAULT_TASKS})
    assert set(found) == {"sst", "sts", "score", "score_raw_r"} and json.dumps(found)
    sst, sts = dev["sst"].labels, dev["sts"].labels
    assert sst is not None and sts is not None
    assert found["sst"]["accuracy"] == np.mean(values["dev", "sst"][10:30].argmax(axis=1) == sst[10:30])
    assert found["sts"]["pearson"] == pytest.approx(np.corrcoef(values["dev", "sts"][10:30], sts[10:30])[0, 1])


def similarity_score(members: Sequence[np.ndarray], labels: np.ndarray) -> Callable[[Sequence[int]], float]:
    return lambda votes: correlation(vote(STS, members, votes, "probabilities"), labels)


def noisy_members(seed: int, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return similarities of members that are right in different measure, and the labels."""
    draw = rng(seed).normal  # one generator for all: numpy takes the seeds 3 and [3, 0] for the same
    labels = draw(size=30)
    return [(labels + draw(size=30) * (1 + 0.3 * i)).astype(np.float32) for i in range(count)], labels


def reference_selection(members: Sequence[np.ndarray], labels: np.ndarray, limit: int) -> list[int]:
    """Select with replacement over lists of members, in the words of the paper."""
    library = [(values - values.mean()) / values.std() for values in members]
    bag: list[int] = []
    best: tuple[float, list[int]] = (-2.0, [])
    while len(bag) < limit:
        gains = [
            np.corrcoef(np.mean([library[j] for j in [*bag, i]], axis=0), labels)[0, 1] for i in range(len(library))
        ]
        bag = [*bag, int(np.argmax(gains))]
        if max(gains) > best[0] + 1e-12:
            best = (max(gains), bag)
    return [Counter(best[1])[i] for i in range(len(members))]


@pytest.mark.parametrize("seed", range(6))
def test_selection_equals_references(seed: int) -> None:
    members, labels = noisy_members(seed, 5)
    score = similarity_score(members, labels)
    found = select_votes(5, 12, score)
    assert found == reference_selection(members, labels, 12)
    assert max(found) > 1 and np.count_nonzero(found) > 1
    alone = [score(np.eye(5, dtype=int)[i]) for i in range(5)]
    first = int(np.argmax(alone))
    assert score(found) >= alone[first]
    assert select_votes(5, 1, score) == np.eye(5, dtype=int)[first].tolist()
    pairs = [pair for pair in itertools.combinations_with_replacement(range(5), 2) if first in pair]
    best = max(pairs, key=lambda pair: score(np.bincount(pair, minlength=5)))
    assert select_votes(5, 2, score) == np.bincount(best, minlength=5).tolist()


def test_selection_by_hand() -> None:
    """The second vote falls, the third rises above the first: the best point is kept, not the first peak or the end."""
    scores = {(1, 0): 0.5, (0, 1): 0.4, (2, 0): 0.3, (1, 1): 0.4, (2, 1): 0.6, (1, 2): 0.2, (3, 1): 0.6, (2, 2): 0.1}
    for limit, wanted in ((1, [1, 0]), (2, [1, 0]), (3, [2, 1]), (4, [2, 1])):
        assert select_votes(2, limit, lambda votes: scores[tuple(votes)]) == wanted
    assert select_votes(3, 5, lambda votes: 0.7) == [1, 0, 0]  # of equals, the first and the smallest


def test_greedy_soup_by_hand() -> None:
    """In the order of the scores alone; an equal soup is taken, a lower one is not; votes are kept."""
    asked = []

    def score(votes: Sequence[int]) -> float:
        asked.append(tuple(votes))
        return {(2, 0, 0, 3): 0.8, (2, 1, 0, 3): 0.79, (2, 0, 1, 3): 0.81}[tuple(votes)]

    assert greedy_soup([2, 1, 1, 3], [0.7, 0.6, 0.5, 0.8], score) == [2, 0, 1, 3]
    assert asked == [(2, 0, 0, 3), (2, 1, 0, 3), (2, 0, 1, 3)]  # the best member alone needs no soup
    assert greedy_soup([1, 1, 1], [0.5, 0.7, 0.7], lambda votes: 0.0) == [0, 1, 0]


def random_state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "dense.weight": torch.randn(7, 5, generator=generator) * 1e3,
        "norm.running_var_all": torch.rand(7, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "count": torch.tensor([seed, 5]),
    }


def test_average_weights_is_the_weighted_mean() -> None:
    states, votes = [random_state(seed) for seed in (3, 4, 5)], [1, 3, 2]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    found = average_weights(zip(states, votes, strict=True))
    assert list(found) == list(states[0])
    for name in ("dense.weight", "norm.running_var_all"):
        wanted = np.average([state[name].numpy().astype(np.float64) for state in states], axis=0, weights=votes)
        assert found[name].dtype == torch.float32
        assert np.allclose(found[name].numpy(), wanted, rtol=1e-7, atol=0)
    assert found["half"].dtype == torch.bfloat16
    assert found["count"].tolist() == [3, 5] and found["count"].dtype == torch.int64
    for state, old in zip(states, before, strict=True):
        assert all(torch.equal(state[name], old[name]) for name in old)
    one = average_weights([(states[0], 7)])
    assert all(torch.equal(one[name], tensor) for name, tensor in states[0].items())
    assert all(one[name].data_ptr() != tensor.data_ptr() for name, tensor in states[0].items())


def test_a_mapped_checkpoint_leaves_its_weights_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    weights = {"w": torch.randn(1000, 100), "b": torch.randn(3)}
    save(path, {"format": 1, "weights": weights, "tasks": ["sst"]})
    mapped = load(path, mmap=True)
    assert mapped["tasks"] == ["sst"] and all(torch.equal(mapped["weights"][name], weights[name]) for name in weights)
    spans = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    address = mapped["weights"]["w"].data_ptr()
    assert any(int(start, 16) <= address < int(end, 16) for start, end in spans)


def test_members_with_other_cleaning_are_not_averaged() -> None:
    content = {"bert_config": {}, "tasks": ["sst"], "tokenizer_sha256": "f" * 64, "weights": {}}
    plain, cleaned = ({**content, "config": configure(*flags).to_dict()} for flags in ([], ["--extra_clean"]))
    with pytest.raises(UserError, match="b.pt has --extra_clean True instead of False, unlike a.pt"):
        check_alike({Path("a.pt"): plain, Path("b.pt"): cleaned})
