"""ensemble.py as people run it: means, soups and selections of checkpoints, the cache, and mistakes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import cut, make_bert, output, predictions_of, read_json, refusal, shell

import ensemble
import multitask_classifier
from evaluation.ensembling import halves
from evaluation.members import Member, cache_file, find_members
from models.checkpoint import load, load_model, save
from tasks import DEFAULT_TASKS
from utils.device import Device

Run = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data whose dev sets are the training sets, so that a member can be good."""
    folder = cut(tmp_path_factory.mktemp("data"), train=40)
    for task in DEFAULT_TASKS.values():
        shutil.copyfile(folder / task.files["train"], folder / task.files["dev"])
    return folder


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, data: Path) -> Path:
    """A folder with a.pt, b.pt and c.pt of one arch, cross.pt, lora.pt, sst.pt, and bad.pt; their runs are in runs/.

    bad.pt is a.pt with the signs of its heads turned.
    """
    folder = tmp_path_factory.mktemp("members")
    flags = ["--pretrained", tiny_bert, "--data_dir", data, "--max_length", 64, "--threads", 1, "--batch_size", 8]
    long = ["--fine_tune_mode", "full-model", "--epochs", 3, "--lr_lambda", 1]
    short = ["--epochs", 1, "--max_train_examples", 8]
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
    """ensemble.main on members by their names, with one cache for all tests; a later --cache or --data_dir holds."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        named = [members / f"{word}.pt" if (members / f"{word}.pt").exists() else word for word in words]
        return output(
            capsys, ensemble.main, "--data_dir", data, "--threads", 1, "--cache", members / "cache", *named
        )  # fmt: skip

    return run


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["weights"]


def assert_same_predictions(folder: Path, other: Path) -> None:
    found, wanted = predictions_of(folder), predictions_of(other)
    assert set(found) == set(wanted) and len(found) == 6
    assert all(np.abs(found[name] - wanted[name]).max() < 1e-6 for name in found)


def mean_of_z_scores(members: Path, file: str, *names: str) -> np.ndarray:
    values = [predictions_of(members / "runs" / name)[file] for name in names]
    return np.mean([(similarities - similarities.mean()) / similarities.std() for similarities in values], axis=0)


def test_an_ensemble_of_two_archs(combine: Run, members: Path, tmp_path: Path) -> None:
    names = [members / "a.pt", members / "cross.pt"]
    out = combine("a", "cross", "--run_dir", "e", "--cache", "new")
    scores = read_json(tmp_path / "e" / "scores.json")
    assert set(scores) == {"dev", "predictions", "votes", "members", "average", "combined"}
    assert set(scores["dev"]) == {"sst", "para", "sts", "score", "score_raw_r"}
    assert scores["votes"] == {str(name): 1 for name in names} and scores["average"] == "probabilities"
    for name, run in zip(names, ("a", "cross"), strict=True):
        assert scores["members"][str(name)] == read_json(members / "runs" / run / "scores.json")["dev"]
        assert f"{name}: predicted" in out
    assert sorted(os.listdir("e")) == ["predictions", "scores.json"]
    assert set(predictions_of(tmp_path / "e")) == set(predictions_of(members / "runs" / "a"))
    table = [line for line in out.splitlines() if line.startswith(("mean", str(members)))]
    assert f"{scores['dev']['score']:.4f}" in table[-1] and scores["predictions"] == "mean"
    assert scores["combined"] == {"mean": {"dev": scores["dev"], "votes": scores["votes"]}}
    file = "sts-dev-output.csv"
    assert np.abs(predictions_of(tmp_path / "e")[file] - mean_of_z_scores(members, file, "a", "cross")).max() < 1e-4


def test_both_ways_to_name_members_give_the_same(combine: Run, members: Path, tmp_path: Path) -> None:
    a, b = members / "a.pt", members / "b.pt"
    for name, words in {"1": [a, b], "2": ["-filepaths", a, b], "3": [a, "--filepaths", b]}.items():
        combine("--run_dir", name, *words)
        for path in (tmp_path / "1").rglob("*.*"):
            assert path.read_bytes() == (tmp_path / name / path.relative_to(tmp_path / "1")).read_bytes()


def test_a_member_named_twice_has_two_votes(combine: Run, members: Path, tmp_path: Path) -> None:
    a, cross = members / "a.pt", members / "cross.pt"
    again = members / ".." / members.name / "a.pt"  # however it is spelled
    out = combine("a", "cross", again, "--run_dir", "e")
    assert read_json(tmp_path / "e" / "scores.json")["votes"] == {str(a): 2, str(cross): 1}
    assert f"{a} (2 votes)" in out
    file = "sts-test-output.csv"
    wanted = mean_of_z_scores(members, file, "a", "a", "cross")
    assert np.abs(predictions_of(tmp_path / "e")[file] - wanted).max() < 1e-4
    shutil.copyfile(a, "copy.pt")  # another member with the same predictions
    assert combine("a", "cross", "copy.pt", "--run_dir", "f").count("predictions from") == 3
    assert_same_predictions(tmp_path / "e", tmp_path / "f")


def test_an_ensemble_of_one_is_the_member(combine: Run, members: Path, tmp_path: Path) -> None:
    combine("a", "--run_dir", "e", "--average", "logits")
    assert_same_predictions(tmp_path / "e", members / "runs" / "a")
    scores, wanted = read_json(tmp_path / "e" / "scores.json"), read_json(members / "runs" / "a" / "scores.json")
    assert scores["average"] == "logits" and scores["dev"]["score"] == pytest.approx(wanted["dev"]["score"], abs=1e-6)


def test_a_member_without_a_task_votes_on_the_others(combine: Run, members: Path, data: Path, tmp_path: Path) -> None:
    combine("a", "sst", "--run_dir", "e")
    scores = read_json(tmp_path / "e" / "scores.json")
    assert set(scores["dev"]) == {"sst", "para", "sts", "score", "score_raw_r"}
    assert scores["dev"]["para"] == read_json(members / "runs" / "a" / "scores.json")["dev"]["para"]
    assert set(scores["members"][str(members / "sst.pt")]) == {"sst", "score", "score_raw_r"}
    (tmp_path / "data").mkdir()  # members that know SST alone need no file of another task
    shutil.copyfile(data / "ids-sst-dev.csv", tmp_path / "data" / "ids-sst-dev.csv")
    combine("sst", "--run_dir", "e", "--data_dir", "data")
    assert set(read_json(tmp_path / "e" / "scores.json")["dev"]) == {"sst", "score", "score_raw_r"}
    assert os.listdir("e/predictions") == ["sst-dev-output.csv"]  # those of the first ensemble are gone


def test_kept_predictions_make_no_difference(combine: Run, tmp_path: Path) -> None:
    combine("a", "cross", "--run_dir", "1", "--cache", "one")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    out = combine("a", "cross", "--run_dir", "2", "--cache", "one")
    assert out.count("predictions from") == len(before) == 2 and ": predicted" not in out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    path = next(iter(before))
    for content in (b"", b"not an archive", path.read_bytes()[:300]):
        path.write_bytes(content)
        assert combine("a", "cross", "--run_dir", "3", "--cache", "one").count(": predicted") == 1
        assert (tmp_path / "1" / "scores.json").read_bytes() == (tmp_path / "3" / "scores.json").read_bytes()


def test_kept_predictions_follow_texts_and_precision(combine: Run, data: Path, tmp_path: Path) -> None:
    """A changed word makes another prediction; a changed label does not."""
    combine("cross", "--run_dir", "1", "--cache", "kept")
    text = (data / "sts-dev.csv").read_text()
    label = text.splitlines()[1].split("\t")[-1]
    (tmp_path / "labels.csv").write_text(text.replace(f"\t{label}\n", "\t0.5\n", 1))
    assert "predictions from" in combine("cross", "--run_dir", "2", "--cache", "kept", "--sts_dev", "labels.csv")
    (tmp_path / "texts.csv").write_text(text.replace(" a ", " the ", 1))
    assert "predictions from" not in combine("cross", "--run_dir", "3", "--cache", "kept", "--sts_dev", "texts.csv")
    member = Member(Path("a.pt"), "f" * 64, ("sst",), 1)
    devices = [Device(torch.device("cpu"), amp) for amp in (None, torch.bfloat16, torch.float16)]
    assert len({cache_file(tmp_path, member, {}, device) for device in devices}) == 3


def test_a_uniform_soup_is_the_mean_of_its_members(
    combine: Run, members: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    """With their votes. It evaluates to the printed score, and is a member like any other."""
    out = combine("a", "b", "a", "--soup", "uniform", "--run_dir", "e")
    a, b, soup = weights_of(members / "a.pt"), weights_of(members / "b.pt"), weights_of(tmp_path / "e" / "soup.pt")
    assert set(soup) == set(a) and any("running_var" in name for name in soup)
    for name, tensor in soup.items():
        wanted = (2 * a[name].double() + b[name].double()) / 3
        assert torch.allclose(tensor.double(), wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(a[name], b[name]) or not torch.equal(tensor, a[name])
    scores, content = read_json(tmp_path / "e" / "scores.json"), load(tmp_path / "e" / "soup.pt")
    votes = {str(members / "a.pt"): 2, str(members / "b.pt"): 1}
    assert scores["predictions"] == "uniform soup" and scores["votes"] == content["soup"] == votes
    assert content["scores"] == scores["dev"] and "epoch" not in content
    assert "normalisation are averages too, which is only approximate" in out and "half" not in out
    rows = [line for line in out.splitlines() if line.startswith("uniform soup")]
    assert f"{scores['dev']['score']:.4f}" in rows[0]
    assert rows[1] == f"uniform soup: {members}/a.pt x 2, {members}/b.pt x 1"

    words = ["--evaluate", "e/soup.pt", "--data_dir", data, "--run_dir", "again", "--threads", 1]
    output(capsys, multitask_classifier.main, *words)
    assert read_json(tmp_path / "again" / "scores.json")["dev"] == scores["dev"]
    assert_same_predictions(tmp_path / "e", tmp_path / "again")
    combine("e/soup.pt", "b", "--soup", "uniform", "--run_dir", "g")
    assert read_json(tmp_path / "g" / "scores.json")["members"]["e/soup.pt"] == scores["dev"]
    again = weights_of(tmp_path / "g" / "soup.pt")
    assert all(torch.allclose(again[name], a[name] / 3 + b[name] * 2 / 3, rtol=1e-5, atol=1e-6) for name in again)


def test_a_greedy_soup_leaves_a_bad_member_out(combine: Run, members: Path, tmp_path: Path) -> None:
    out = combine("bad", "a", "--soup", "greedy", "--run_dir", "e")
    scores = read_json(tmp_path / "e" / "scores.json")
    assert scores["votes"] == scores["combined"]["greedy soup"]["votes"] == {str(members / "a.pt"): 1}
    assert scores["combined"]["mean"]["votes"] == {str(members / "bad.pt"): 1, str(members / "a.pt"): 1}
    soup, a = weights_of(tmp_path / "e" / "soup.pt"), weights_of(members / "a.pt")
    assert all(torch.equal(soup[name], a[name]) for name in a)
    member = scores["members"][str(members / "a.pt")]
    assert scores["dev"] == {name: value for name, value in member.items() if "half" not in name}
    assert "chosen half  held out half" in out
    combine("a", "b", "c", "--soup", "greedy", "--run_dir", "f")  # never falls on the half that it was chosen by
    scores = read_json(tmp_path / "f" / "scores.json")
    best = max(member["chosen_half"] for member in scores["members"].values())
    assert scores["combined"]["greedy soup"]["dev"]["chosen_half"] >= best


def test_a_selection_is_the_ensemble_with_its_votes(combine: Run, members: Path, tmp_path: Path) -> None:
    """Naming each file as often as the selection says gives the same, test predictions included."""
    out = combine("a", "cross", "c", "a", "bad", "--select", "6", "--run_dir", "e")
    scores = read_json(tmp_path / "e" / "scores.json")
    votes = scores["votes"]
    assert scores["predictions"] == "selection" and votes == scores["combined"]["selection"]["votes"]
    assert 1 <= sum(votes.values()) <= 6
    assert scores["combined"]["mean"]["votes"][str(members / "a.pt")] == 2  # the user's, for the plain mean
    combine(*[name for name, count in votes.items() for _ in range(count)], "--run_dir", "f")
    again = read_json(tmp_path / "f" / "scores.json")
    assert again["dev"] == scores["dev"] and again["votes"] == votes
    assert_same_predictions(tmp_path / "e", tmp_path / "f")
    lines = out.splitlines()
    assert any(line.startswith("selection ") and f"{scores['dev']['score']:.4f}" in line for line in lines)
    assert "selection: " + ", ".join(f"{name} x {count}" for name, count in votes.items()) in lines


def test_soup_and_selection_in_one_table(combine: Run, tmp_path: Path) -> None:
    out = combine("a", "b", "--soup", "uniform", "--select", "3", "--run_dir", "e", "--average", "logits")
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    rows = [line.split("  ")[0].rsplit("/")[-1] for line in lines[start + 1 : start + 6]]
    assert rows == ["a.pt", "b.pt", "mean", "uniform soup", "selection"]
    scores = read_json(tmp_path / "e" / "scores.json")
    assert list(scores["combined"]) == ["mean", "uniform soup", "selection"] and scores["predictions"] == "selection"
    assert (tmp_path / "e" / "soup.pt").exists()


def labels_and_ids(path: Path, column: str) -> tuple[list[str], list[str]]:
    header, *rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [row[header.index("id")] for row in rows], [row[header.index(column)] for row in rows]


def test_both_halves_have_a_score(combine: Run, data: Path, tmp_path: Path) -> None:
    """It follows from the prediction files."""
    out = combine("a", "cross", "c", "--select", "5", "--run_dir", "e")
    dev = read_json(tmp_path / "e" / "scores.json")["combined"]["selection"]["dev"]
    for half, name in enumerate(("chosen_half", "held_out_half")):
        figures = []
        for task in DEFAULT_TASKS.values():
            ids, labels = labels_and_ids(data / task.files["dev"], task.label_column)
            rows = halves(ids)[half]
            found = predictions_of(tmp_path / "e")[f"{task.name}-dev-output.csv"][rows]
            wanted = np.array(labels, float)[rows]
            similar = task.kind == "similarity"
            figures.append((1 + np.corrcoef(found, wanted)[0, 1]) / 2 if similar else np.mean(found == wanted))
        assert dev[name] == pytest.approx(np.mean(figures), abs=1e-6)
    row = next(line for line in out.splitlines() if line.startswith("selection "))
    assert row.split()[-2:] == [f"{dev['chosen_half']:.4f}", f"{dev['held_out_half']:.4f}"]
    assert "chosen half: of dev, what choices were made by; held-out half:" in out


def relabelled(source: Path, folder: Path, half: int, predictions: dict[str, np.ndarray]) -> Path:
    """Copy the data; one half of each dev set gets these predictions for its labels."""
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
    """Held-out labels that agree with a choice of bad.pt change nothing; the same labels in the other half do."""
    combine(*favourite, "--run_dir", "favourite")
    predictions = predictions_of(tmp_path / "favourite")
    found = {}
    for name, folder in (
        ("true", data),
        ("held out", relabelled(data, tmp_path / "data1", 1, predictions)),
        ("chosen", relabelled(data, tmp_path / "data0", 0, predictions)),
    ):
        combine("a", "bad", *flags, "--run_dir", name, "--data_dir", folder)
        found[name] = read_json(tmp_path / name / "scores.json")
    bad = str(members / "bad.pt")
    assert found["held out"]["votes"] == found["true"]["votes"] and bad not in found["true"]["votes"]
    assert bad in found["chosen"]["votes"]
    for row, before in found["true"]["members"].items():
        assert found["held out"]["members"][row]["chosen_half"] == before["chosen_half"]
        assert found["held out"]["members"][row]["held_out_half"] != before["held_out_half"]
        assert found["chosen"]["members"][row]["held_out_half"] == before["held_out_half"]


def edited(members: Path, path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a.pt with a changed content."""
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
        (lambda c: c["config"]["lora"].update(lora_mode="attn"), ["has adapters", "predictions can be averaged"]),
        (lambda c: c["config"]["pal"].update(pal_heads=6), ["--pal_heads 6 instead of 12"]),
        (lambda c: c["config"]["tasks"]["sts"].update(pooling="mean"), ["--sts_pooling mean instead of None"]),
        (lambda c: c["config"]["model"].update(wings=2), ["wings", "save it anew"]),
    ],
    ids=[
        "arch",
        "start weights",
        "shape",
        "tokenizer",
        "tasks",
        "weights",
        "adapters",
        "pals",
        "pooling",
        "unknown option",
    ],
)
def test_only_alike_members_make_a_soup(
    combine: Run, members: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], wanted: list[str]
) -> None:
    odd = edited(members, tmp_path / "odd.pt", edit)
    message = refusal(combine, "a", odd, "--soup", "uniform", "--run_dir", "e")
    assert str(odd) in message and all(word in message for word in wanted)
    assert not (tmp_path / "e").exists()


def test_members_of_a_soup_may_differ_in_training_and_in_the_name_of_the_arch(
    combine: Run, members: Path, tmp_path: Path
) -> None:
    odd = edited(members, tmp_path / "odd.pt", lambda c: c["config"]["model"].update(arch="duality"))
    combine("a", "b", odd, "--soup", "uniform", "--run_dir", "e")
    model, _, config = load_model(tmp_path / "e" / "soup.pt")
    assert config.model.arch == "yin-yang" and set(model.tasks) == set(DEFAULT_TASKS)


def test_meaningless_combinations_are_refused(combine: Run, members: Path, data: Path, tmp_path: Path) -> None:
    message = refusal(combine, "a", "cross", "--soup", "greedy")
    assert f"{members}/cross.pt" in message and f"{members}/a.pt" in message and "leave --soup out" in message
    for flags in (["--select", "4"], ["--soup", "uniform"], ["--soup", "greedy"]):
        assert " ".join(flags) in refusal(combine, "a", "a", *flags)
    message = refusal(combine, "a", "sst", "--select", "4")
    assert "--select" in message and f"{members}/sst.pt does not know para" in message
    (tmp_path / "e").mkdir()
    shutil.copyfile(members / "b.pt", "e/soup.pt")
    message = refusal(combine, "a", "e/soup.pt", "--soup", "uniform", "--run_dir", "e")
    assert "e/soup.pt" in message and "--run_dir" in message
    combine("a", "b", "--run_dir", "e")  # no other run removes the soup
    assert (tmp_path / "e" / "soup.pt").read_bytes() == (members / "b.pt").read_bytes()
    few = cut(tmp_path / "few", train=2, dev=1)
    message = refusal(combine, "a", "b", "--select", "4", "--data_dir", few)
    assert "ids-sst-dev.csv" in message and "--sst_dev" in message
    wide = make_bert(tmp_path / "wide", intermediate_size=96)
    flags = ["--pretrained", wide, "--data_dir", data, "--epochs", 1, "--threads", 1, "--batch_size", 8]
    more = ["--no_tensorboard", "--run_dir", "wide-run", "--max_length", 64, "--max_train_examples", 8]
    multitask_classifier.main([str(word) for word in [*flags, *more]])
    message = refusal(combine, "a", "wide-run/best.pt", "--soup", "uniform")
    assert "--pretrained" in message and "intermediate_size 96 instead of 64" in message


def test_unusable_checkpoints_are_named(combine: Run, members: Path, tmp_path: Path) -> None:
    assert "--filepaths: name at least one checkpoint" in refusal(combine)
    (tmp_path / "bad.pt").write_text("x")
    assert "bad.pt: not a readable checkpoint" in refusal(combine, "a", tmp_path / "bad.pt")
    assert not (tmp_path / "runs" / "ensemble").exists()
    assert [(m.path.name, m.tasks, m.votes) for m in find_members([str(members / "sst.pt")] * 3)] == [
        ("sst.pt", ("sst",), 3)
    ]
    done = shell("ensemble.py", "missing.pt", "--data_dir", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --filepaths missing.pt: there is no such checkpoint; check the path\n"
