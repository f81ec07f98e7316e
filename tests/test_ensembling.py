"""Greedy choices against references, halves of dev, averages of weights; soups and selections by command line."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import cut, make_bert
from test_config import configure
from test_scripts import _output, member_outputs, read_json, refusal

import ensemble
import multitask_classifier
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
from evaluation.members import Member, cache_file
from evaluation.metrics import correlation
from models.checkpoint import load, load_model, save
from tasks import DEFAULT_TASKS, STS
from utils.device import Device
from utils.errors import UserError

Run = Callable[..., str]
rng = np.random.default_rng


# ----------------------------------------------------------------------------------------------------- halves of dev


@pytest.mark.parametrize("size", [2, 3, 150, 151])
def test_halves_are_disjoint_and_cover_everything(size: int) -> None:
    first, second = halves([f"id{i}" for i in range(size)])
    assert sorted([*first, *second]) == list(range(size)) and len(first) - len(second) == size % 2
    assert first.dtype == np.int64 and (np.diff(first) > 0).all() and (np.diff(second) > 0).all()


def test_halves_are_random_and_seeded() -> None:
    ids = [f"id{i}" for i in range(1000)]
    first, second = halves(ids)
    assert abs(first.mean() - second.mean()) < 60  # five deviations; the first 500 would be 500 away
    assert abs(np.mean(first % 2) - 0.5) < 0.08
    assert np.array_equal(halves(ids)[0], first)
    assert 200 < len(set(first) & set(halves(ids, seed=1)[0])) < 300


def test_an_example_keeps_its_half_wherever_it_stands() -> None:
    ids = [f"id{i}" for i in range(101)]
    shuffled = [ids[i] for i in rng(0).permutation(101)]
    for own, again in zip(halves(ids), halves(shuffled), strict=True):
        assert {ids[i] for i in own} == {shuffled[i] for i in again}


def test_a_member_that_says_the_same_of_all_has_no_say() -> None:
    """Also where rounding makes its similarities differ in the last digit, which z-scores would blow up."""
    constant = np.full(50, 2.7, np.float32)
    rounded = np.where(np.arange(50) % 3, constant, np.nextafter(constant, np.float32(9)))
    assert not z_scores(constant).any() and not z_scores(rounded).any()
    useful = rng(1).normal(size=50)
    found = vote(STS, [useful, rounded], [1, 1], "probabilities")
    assert correlation(found, useful) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------- greedy selection


def similarity_score(members: Sequence[np.ndarray], labels: np.ndarray) -> Callable[[Sequence[int]], float]:
    return lambda votes: correlation(vote(STS, members, votes, "probabilities"), labels)


def noisy_members(seed: int, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Similarities of members that are right and wrong in different measure, and the labels."""
    draw = rng(seed).normal  # one generator for all: numpy takes the seeds 3 and [3, 0] for the same
    labels = draw(size=30)
    return [(labels + draw(size=30) * (1 + 0.3 * i)).astype(np.float32) for i in range(count)], labels


def reference_selection(members: Sequence[np.ndarray], labels: np.ndarray, limit: int) -> list[int]:
    """Selection with replacement over lists of members, in the words of the paper."""
    library = [(own - own.mean()) / own.std() for own in members]
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


@pytest.mark.parametrize("seed", range(8))
def test_selection_equals_a_reference(seed: int) -> None:
    members, labels = noisy_members(seed, 5)
    found = select_votes(5, 12, similarity_score(members, labels))
    assert found == reference_selection(members, labels, 12)
    assert max(found) > 1 and np.count_nonzero(found) > 1


@pytest.mark.parametrize("seed", range(8))
def test_selection_equals_an_exhaustive_search_over_one_and_two_votes(seed: int) -> None:
    members, labels = noisy_members(seed, 5)
    score = similarity_score(members, labels)
    alone = [score(np.eye(5, dtype=int)[i]) for i in range(5)]
    first = int(np.argmax(alone))
    assert select_votes(5, 1, score) == np.eye(5, dtype=int)[first].tolist()
    pairs = [(i, j) for i, j in itertools.combinations_with_replacement(range(5), 2) if first in (i, j)]
    best = max(pairs, key=lambda pair: score(np.bincount(pair, minlength=5)))
    assert select_votes(5, 2, score) == np.bincount(best, minlength=5).tolist()
    assert len(set(best)) == 2  # else a single vote would do


def test_selection_by_hand() -> None:
    """The second vote falls, the third rises above the first: the best point is kept, not the first peak or the end."""
    scores = {(1, 0): 0.5, (0, 1): 0.4, (2, 0): 0.3, (1, 1): 0.4, (2, 1): 0.6, (1, 2): 0.2, (3, 1): 0.6, (2, 2): 0.1}
    for limit, wanted in ((1, [1, 0]), (2, [1, 0]), (3, [2, 1]), (4, [2, 1])):
        assert select_votes(2, limit, lambda votes: scores[tuple(votes)]) == wanted


def test_of_equals_selection_takes_the_first_and_the_fewest() -> None:
    assert select_votes(3, 5, lambda votes: 0.7) == [1, 0, 0]


def test_selection_is_never_worse_than_the_best_member_where_it_was_made() -> None:
    for seed in range(5):
        members, labels = noisy_members(seed, 4)
        score = similarity_score(members, labels)
        chosen = score(select_votes(4, 10, score))
        assert chosen >= max(score(np.eye(4, dtype=int)[i]) for i in range(4))


# --------------------------------------------------------------------------------------------------------------- soups


def test_greedy_soup_by_hand() -> None:
    """In the order of the scores alone; equal is added, lower is left out and stays out; votes are kept."""
    asked = []

    def score(votes: Sequence[int]) -> float:
        asked.append(tuple(votes))
        return {(2, 0, 0, 3): 0.8, (2, 1, 0, 3): 0.79, (2, 0, 1, 3): 0.81}[tuple(votes)]

    assert greedy_soup([2, 1, 1, 3], [0.7, 0.6, 0.5, 0.8], score) == [2, 0, 1, 3]
    assert asked == [(2, 0, 0, 3), (2, 1, 0, 3), (2, 0, 1, 3)]  # the best member alone needs no soup


def test_greedy_soup_of_one() -> None:
    assert greedy_soup([3], [0.5], lambda votes: pytest.fail("nothing is to be scored")) == [3]


def random_state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "dense.weight": torch.randn(7, 5, generator=generator) * 1e3,
        "dense.bias": torch.randn(7, generator=generator),
        "norm.running_var_all": torch.rand(7, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "count": torch.tensor([seed, 5]),
    }


def test_average_weights_is_the_weighted_mean() -> None:
    states, votes = [random_state(seed) for seed in (3, 4, 5)], [1, 3, 2]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    found = average_weights(zip(states, votes, strict=True))
    assert list(found) == list(states[0])
    for name in ("dense.weight", "dense.bias", "norm.running_var_all"):
        wanted = np.average([state[name].numpy().astype(np.float64) for state in states], axis=0, weights=votes)
        assert found[name].dtype == torch.float32
        assert np.allclose(found[name].numpy(), wanted, rtol=1e-7, atol=0)
    assert found["half"].dtype == torch.bfloat16
    assert found["count"].tolist() == [3, 5] and found["count"].dtype == torch.int64
    for state, old in zip(states, before, strict=True):
        assert all(torch.equal(state[name], old[name]) for name in old)


@pytest.mark.parametrize("votes", [1, 3, 7])
def test_a_soup_of_one_is_its_member_bitwise(votes: int) -> None:
    state = random_state(0)
    found = average_weights([(state, votes)])
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert all(found[name].data_ptr() != state[name].data_ptr() for name in state)


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


# ----------------------------------------------------------------------------------------------------- by command line


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data whose dev sets are the training sets, so that a member can be good."""
    folder = cut(tmp_path_factory.mktemp("data"), train=40)
    for task in DEFAULT_TASKS.values():
        shutil.copyfile(folder / task.files["train"], folder / task.files["dev"])
    return folder


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, data: Path) -> Path:
    """A folder with a.pt, b.pt and c.pt of one arch, cross.pt of another, lora.pt, sst.pt, and bad.pt.

    The last is a.pt with its heads' signs turned.
    """
    folder = tmp_path_factory.mktemp("members")
    flags = ["--pretrained", tiny_bert, "--data_dir", data, "--max_length", 64, "--threads", 1, "--batch_size", 8]
    long, short = (
        ["--fine_tune_mode", "full-model", "--epochs", 3, "--lr_lambda", 1],
        ["--epochs", 1, "--max_train_examples", 8],
    )
    for name, more in {
        "a": [*long, "--lr", 3e-3],
        "b": [*long, "--lr", 2e-3, "--hidden_dropout_prob", 0.1],
        "c": [*long, "--lr", 3e-3, "--seed", 5],
        "cross": ["--arch", "v2", *short],
        "lora": ["--lora_mode", "attn-only", *short],
        "sst": ["--train_sst", *short],
    }.items():
        place = ["--run_dir", folder / "runs" / name, "--filepath", folder / f"{name}.pt", "--no_tensorboard"]
        multitask_classifier.main([str(word) for word in [*flags, *place, *more]])
    content = load(folder / "a.pt")
    for head in DEFAULT_TASKS:
        last = max(int(name.split(".")[2]) for name in content["weights"] if name.startswith(f"heads.{head}."))
        for name in ("weight", "bias"):
            content["weights"][f"heads.{head}.{last}.{name}"].neg_()
    save(folder / "bad.pt", content)
    return folder


@pytest.fixture
def combine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, members: Path, data: Path) -> Run:
    """ensemble.main on members by their names, with one cache for all tests of this file."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object, data: Path = data) -> str:
        named = [members / f"{word}.pt" if (members / f"{word}.pt").exists() else word for word in words]
        flags = ["--data_dir", data, "--threads", 1, "--cache", members / "cache"]
        return _output(capsys, ensemble.main, [*named, *flags])

    return run


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["weights"]


def test_a_file_is_one_member_however_it_is_spelled(combine: Run, members: Path, tmp_path: Path) -> None:
    again = members / ".." / members.name / "a.pt"
    combine("a", again, "b", "--run_dir", "e")
    votes = {str(members / "a.pt"): 2, str(members / "b.pt"): 1}
    assert read_json(tmp_path / "e" / "scores.json")["votes"] == votes
    assert "two different checkpoints" in refusal(combine, "a", again, "--select", 3)


def test_a_uniform_soup_is_the_mean_of_its_members_with_votes(combine: Run, members: Path, tmp_path: Path) -> None:
    out = combine("a", "b", "a", "--soup", "uniform", "--run_dir", "e")
    a, b, soup = weights_of(members / "a.pt"), weights_of(members / "b.pt"), weights_of(tmp_path / "e" / "soup.pt")
    assert set(soup) == set(a) and any("running_var" in name for name in soup)
    for name, own in soup.items():
        wanted = (2 * a[name].double() + b[name].double()) / 3
        assert torch.allclose(own.double(), wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(a[name], b[name]) or not torch.equal(own, a[name])
    scores = read_json(tmp_path / "e" / "scores.json")
    votes = {str(members / "a.pt"): 2, str(members / "b.pt"): 1}
    assert scores["predictions"] == "uniform soup" and scores["votes"] == votes
    assert load(tmp_path / "e" / "soup.pt")["soup"] == votes
    assert "normalisation are averages too, which is only approximate" in out
    rows = [line for line in out.splitlines() if line.startswith(("mean", "uniform soup", str(members / "b.pt")))]
    assert f"{scores['dev']['score']:.4f}" in rows[-2] and rows[-2].startswith("uniform soup ")
    assert rows[-1] == f"uniform soup: {members}/a.pt x 2, {members}/b.pt x 1"
    assert "half" not in out  # nothing was chosen
    assert out.count("predictions from") + out.count(": predicted") == 3


def test_a_soup_evaluates_to_the_printed_score(
    combine: Run, members: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    """With the other script; it loads, has its scores in it, and is a member like any other."""
    out = combine("a", "b", "--soup", "uniform", "--run_dir", "e")
    scores = read_json(tmp_path / "e" / "scores.json")
    words = ["--evaluate", "e/soup.pt", "--data_dir", data, "--run_dir", "again", "--threads", 1]
    again = _output(capsys, multitask_classifier.main, words)
    assert read_json(tmp_path / "again" / "scores.json")["dev"] == scores["dev"]
    assert f"{scores['dev']['score']:.4f}" in again and f"{scores['dev']['score']:.4f}" in out
    found, wanted = member_outputs(tmp_path / "e"), member_outputs(tmp_path / "again")
    assert set(found) == set(wanted) and len(found) == 6
    assert all(np.array_equal(found[name], wanted[name]) for name in found)
    content = load(tmp_path / "e" / "soup.pt")
    assert content["scores"] == scores["dev"] and "epoch" not in content
    combine("e/soup.pt", "b", "--run_dir", "f")
    assert read_json(tmp_path / "f" / "scores.json")["members"]["e/soup.pt"] == scores["dev"]
    combine("e/soup.pt", "b", "--soup", "uniform", "--run_dir", "g")
    a, b, soup = (weights_of(path) for path in (members / "a.pt", members / "b.pt", tmp_path / "g" / "soup.pt"))
    assert all(torch.allclose(soup[name], a[name] / 4 + b[name] * 0.75, rtol=1e-5, atol=1e-6) for name in soup)


def test_a_greedy_soup_leaves_a_bad_member_out(combine: Run, members: Path, tmp_path: Path) -> None:
    out = combine("bad", "a", "--soup", "greedy", "--run_dir", "e")
    scores = read_json(tmp_path / "e" / "scores.json")
    assert scores["votes"] == scores["combined"]["greedy soup"]["votes"] == {str(members / "a.pt"): 1}
    assert scores["combined"]["mean"]["votes"] == {str(members / "bad.pt"): 1, str(members / "a.pt"): 1}
    soup, a = weights_of(tmp_path / "e" / "soup.pt"), weights_of(members / "a.pt")
    assert all(torch.equal(soup[name], a[name]) for name in a)
    own = {name: value for name, value in scores["members"][str(members / "a.pt")].items() if "half" not in name}
    assert scores["dev"] == own
    assert "chosen half  held out half" in out


def test_a_greedy_soup_never_falls_on_the_half_that_it_was_chosen_by(combine: Run, tmp_path: Path) -> None:
    first = combine("a", "b", "c", "--soup", "greedy", "--run_dir", "e")
    scores = read_json(tmp_path / "e" / "scores.json")
    best = max(own["chosen_half"] for own in scores["members"].values())
    assert scores["combined"]["greedy soup"]["dev"]["chosen_half"] >= best
    before = (tmp_path / "e" / "scores.json").read_bytes()
    again = combine("a", "b", "c", "--soup", "greedy", "--run_dir", "e")
    assert ": predicted" in first and ": predicted" not in again
    assert (tmp_path / "e" / "scores.json").read_bytes() == before


def test_a_selection_is_the_ensemble_with_its_votes(combine: Run, members: Path, tmp_path: Path) -> None:
    """Test predictions included: naming each file as often as the selection says gives the same."""
    out = combine("a", "cross", "c", "a", "bad", "--select", "6", "--run_dir", "e")
    scores = read_json(tmp_path / "e" / "scores.json")
    votes = scores["votes"]
    assert scores["predictions"] == "selection" and votes == scores["combined"]["selection"]["votes"]
    assert 1 <= sum(votes.values()) <= 6
    assert scores["combined"]["mean"]["votes"][str(members / "a.pt")] == 2  # the user's, for the plain mean
    names = [name for name, count in votes.items() for _ in range(count)]
    combine(*names, "--run_dir", "f")
    again = read_json(tmp_path / "f" / "scores.json")
    assert again["dev"] == scores["dev"] and again["votes"] == votes
    found, wanted = member_outputs(tmp_path / "e"), member_outputs(tmp_path / "f")
    assert set(found) == set(wanted) and len(found) == 6
    assert all(np.array_equal(found[name], wanted[name]) for name in found)
    lines = out.splitlines()
    assert any(line.startswith("selection ") and f"{scores['dev']['score']:.4f}" in line for line in lines)
    assert "selection: " + ", ".join(f"{name} x {count}" for name, count in votes.items()) in lines


def labels_and_ids(path: Path, column: str) -> tuple[list[str], list[str]]:
    header, *rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [row[header.index("id")] for row in rows], [row[header.index(column)] for row in rows]


def test_both_halves_have_their_own_score(combine: Run, data: Path, tmp_path: Path) -> None:
    """From the prediction files alone."""
    out = combine("a", "cross", "c", "--select", "5", "--run_dir", "e")
    dev = read_json(tmp_path / "e" / "scores.json")["combined"]["selection"]["dev"]
    predictions = member_outputs(tmp_path / "e")
    for half, name in enumerate(("chosen_half", "held_out_half")):
        figures = []
        for task in DEFAULT_TASKS.values():
            ids, labels = labels_and_ids(data / task.files["dev"], task.label_column)
            rows = halves(ids)[half]
            found, wanted = predictions[f"{task.name}-dev-output.csv"][rows], np.array(labels, float)[rows]
            similar = task.kind == "similarity"
            figures.append((1 + np.corrcoef(found, wanted)[0, 1]) / 2 if similar else np.mean(found == wanted))
        assert dev[name] == pytest.approx(np.mean(figures), abs=1e-6)
    row = next(line for line in out.splitlines() if line.startswith("selection "))
    assert row.split()[-2:] == [f"{dev['chosen_half']:.4f}", f"{dev['held_out_half']:.4f}"]
    assert "chosen half: of dev, what choices were made by; held-out half:" in out


def relabelled(source: Path, folder: Path, half: int, predictions: dict[str, np.ndarray]) -> Path:
    """A copy of the data in which one half of every dev set has these predictions for its labels."""
    shutil.copytree(source, folder)
    for task in DEFAULT_TASKS.values():
        path = folder / task.files["dev"]
        header, *rows = path.read_text(encoding="utf-8").splitlines()
        values = predictions[f"{task.name}-dev-output.csv"]
        if task.kind == "similarity":
            values = 5 * (values - values.min()) / max(np.ptp(values), 1e-6)
        ids, _ = labels_and_ids(path, task.label_column)
        column = header.split("\t").index(task.label_column)
        for i in halves(ids)[half]:
            fields = rows[i].split("\t")
            rows[i] = "\t".join([*fields[:column], str(values[i]), *fields[column + 1 :]])
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("flags", "favourite"),
    [(["--select", "4"], ["bad"]), (["--soup", "greedy"], ["a", "bad", "--soup", "uniform"])],
    ids=["selection", "greedy soup"],
)
def test_choices_do_not_see_the_held_out_labels(
    combine: Run, members: Path, data: Path, tmp_path: Path, flags: list[str], favourite: list[str]
) -> None:
    """Held-out labels that are all as a choice with bad.pt says do not tempt; the same labels in the other half do."""
    combine(*favourite, "--run_dir", "favourite")
    predictions = member_outputs(tmp_path / "favourite")
    found = {}
    for name, own in (
        ("true", data),
        ("held out", relabelled(data, tmp_path / "data1", 1, predictions)),
        ("chosen", relabelled(data, tmp_path / "data0", 0, predictions)),
    ):
        combine("a", "bad", *flags, "--run_dir", name, data=own)
        found[name] = read_json(tmp_path / name / "scores.json")
    bad = str(members / "bad.pt")
    assert found["held out"]["votes"] == found["true"]["votes"] and bad not in found["true"]["votes"]
    assert bad in found["chosen"]["votes"]
    for row, before in found["true"]["members"].items():
        assert found["held out"]["members"][row]["chosen_half"] == before["chosen_half"]
        assert found["held out"]["members"][row]["held_out_half"] != before["held_out_half"]
        assert found["chosen"]["members"][row]["held_out_half"] == before["held_out_half"]


def test_soup_and_selection_in_one_table(combine: Run, tmp_path: Path) -> None:
    out = combine("a", "b", "--soup", "uniform", "--select", "3", "--run_dir", "e", "--average", "logits")
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    assert [line.split("  ")[0].rsplit("/")[-1] for line in lines[start + 1 : start + 6]] == [
        "a.pt", "b.pt", "mean", "uniform soup", "selection",
    ]  # fmt: skip
    scores = read_json(tmp_path / "e" / "scores.json")
    assert list(scores["combined"]) == ["mean", "uniform soup", "selection"] and scores["predictions"] == "selection"
    assert (tmp_path / "e" / "soup.pt").exists()


# ------------------------------------------------------------------------------------------------------------- mistakes


def edited(members: Path, path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a.pt with a changed content."""
    content = load(members / "a.pt")
    edit(content)
    save(path, content)
    return path


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (lambda c: c["config"]["model"].update(pair_encoding="cross"), ["--pair_encoding cross instead of siamese"]),
        (lambda c: c["config"]["model"].update(pretrained="other"), ["--pretrained other instead of"]),
        (lambda c: c["bert_config"].update(intermediate_size=99), ["intermediate_size 99 instead of 64"]),
        (lambda c: c.update(tokenizer_sha256="f" * 64), ["tokenizer ffffffffffff instead of"]),
        (lambda c: c.update(tasks=["sst", "para"]), ["tasks sst,para instead of sst,para,sts"]),
        (lambda c: c["weights"].pop("pair_layer.dense.bias"), ["weight pair_layer.dense.bias None instead of [64]"]),
        (lambda c: c["config"]["lora"].update(lora_mode="attn"), ["has adapters"]),
        (lambda c: c["config"]["pal"].update(pal_heads=6), ["--pal_heads 6 instead of 12"]),
        (lambda c: c["config"]["model"].update(wings=2), ["wings", "save it anew"]),
    ],
    ids=["arch", "start weights", "shape", "tokenizer", "tasks", "weights", "adapters", "pals", "unknown option"],
)
def test_only_alike_members_make_a_soup(
    combine: Run, members: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], wanted: list[str]
) -> None:
    odd = edited(members, tmp_path / "odd.pt", edit)
    message = refusal(combine, "a", odd, "--soup", "uniform", "--run_dir", "e")
    assert str(odd) in message and all(word in message for word in wanted)
    assert not (tmp_path / "e").exists()


def test_free_choices_do_not_hinder_a_soup(combine: Run, members: Path, tmp_path: Path) -> None:
    """Members of a soup differ in how they were trained, dropout included; and in the arch's name alone."""
    odd = edited(members, tmp_path / "odd.pt", lambda c: c["config"]["model"].update(arch="duality"))
    combine("a", "b", odd, "--soup", "uniform", "--run_dir", "e")
    model, _, config = load_model(tmp_path / "e" / "soup.pt")
    assert config.model.arch == "yin-yang" and set(model.tasks) == set(DEFAULT_TASKS)


def test_meaningless_combinations_are_refused(combine: Run, members: Path, data: Path, tmp_path: Path) -> None:
    message = refusal(combine, "a", "cross", "--soup", "greedy")
    assert f"{members}/cross.pt" in message and f"{members}/a.pt" in message and "leave --soup out" in message
    message = refusal(combine, "a", "lora", "--soup", "uniform")
    assert f"{members}/lora.pt has adapters" in message and "predictions can be averaged" in message
    for flags in (["--select", "4"], ["--soup", "uniform"], ["--soup", "greedy"]):
        assert " ".join(flags) in refusal(combine, "a", "a", *flags)
    message = refusal(combine, "a", "sst", "--select", "4")
    assert "--select" in message and f"{members}/sst.pt does not know para" in message
    (tmp_path / "e").mkdir()
    shutil.copyfile(members / "b.pt", "e/soup.pt")
    message = refusal(combine, "a", "e/soup.pt", "--soup", "uniform", "--run_dir", "e")
    assert "e/soup.pt" in message and "--run_dir" in message
    combine("a", "b", "--run_dir", "e")  # and no other run removes it
    assert (tmp_path / "e" / "soup.pt").read_bytes() == (members / "b.pt").read_bytes()
    few = cut(tmp_path / "few", train=2, dev=1)
    message = refusal(lambda *words: combine(*words, data=few), "a", "b", "--select", "4")
    assert "ids-sst-dev.csv" in message and "--sst_dev" in message


def test_another_shape_is_no_soup(combine: Run, members: Path, data: Path, tmp_path: Path) -> None:
    """Trained from a wider BERT under the same name."""
    wide = make_bert(tmp_path / "wide", intermediate_size=96)
    flags = ["--pretrained", wide, "--data_dir", data, "--epochs", 1, "--threads", 1, "--batch_size", 8]
    more = ["--no_tensorboard", "--run_dir", "wide-run", "--max_length", 64, "--max_train_examples", 8]
    multitask_classifier.main([str(word) for word in [*flags, *more]])
    message = refusal(combine, "a", "wide-run/best.pt", "--soup", "uniform")
    assert "--pretrained" in message and "intermediate_size 96 instead of 64" in message


def test_scores_of_rows(data: Path) -> None:
    """score_dev over rows is score_dev of a file with those rows alone."""
    from config import DataOptions, TaskOptions
    from datasets import load_splits

    options = dict.fromkeys(DEFAULT_TASKS, TaskOptions())
    dev = load_splits(DataOptions(data_dir=str(data)), options, DEFAULT_TASKS, ["dev"], print)["dev"]
    values = {("dev", "sst"): rng(0).random((40, 5)), ("dev", "sts"): rng(1).random(40)}
    rows = {name: np.arange(10, 30) for name in DEFAULT_TASKS}
    found = score_dev(values, dev, rows)
    assert set(found) == {"sst", "sts", "score", "score_raw_r"}
    sst, sts = dev["sst"].labels, dev["sts"].labels
    assert sst is not None and sts is not None
    assert found["sst"]["accuracy"] == np.mean(values["dev", "sst"][10:30].argmax(axis=1) == sst[10:30])
    assert found["sts"]["pearson"] == pytest.approx(np.corrcoef(values["dev", "sts"][10:30], sts[10:30])[0, 1])
    assert json.dumps(found)


def test_of_equals_a_greedy_soup_begins_with_the_first() -> None:
    assert greedy_soup([1, 1, 1], [0.5, 0.7, 0.7], lambda votes: 0.0) == [0, 1, 0]


def test_predictions_of_another_precision_are_others(tmp_path: Path) -> None:
    member = Member(Path("a.pt"), "f" * 64, ("sst",), 1)
    names = {
        cache_file(tmp_path, member, {}, Device(torch.device("cpu"), amp))
        for amp in (None, torch.bfloat16, torch.float16)
    }
    assert len(names) == 3


def test_a_soup_of_members_with_other_cleaning_is_refused() -> None:
    content = {
        "config": configure().to_dict(), "bert_config": {}, "tasks": ["sst"], "tokenizer_sha256": "f" * 64,
        "weights": {},
    }  # fmt: skip
    cleaned = {**content, "config": configure("--extra_clean").to_dict()}
    with pytest.raises(UserError, match="b.pt has --extra_clean True instead of False, unlike a.pt"):
        check_alike({Path("a.pt"): content, Path("b.pt"): cleaned})
