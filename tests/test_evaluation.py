"""Scores against scikit-learn and scipy, prediction files to the byte, prediction in any batch size, and votes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score

from config import ARCHS, DataOptions, ModelOptions, TaskOptions
from datasets import Examples, TaskData, load_splits
from evaluation.ensembling import vote, z_scores
from evaluation.metrics import correlation, decide, overall, primary, probabilities, score_task
from evaluation.predict import predict
from evaluation.prediction_files import score_and_write, write_predictions
from models.multitask_bert import MultitaskBERT
from tasks import DEFAULT_TASKS, PARA, SST, STS
from utils.console import progress
from utils.errors import UserError

rng = np.random.default_rng


# ------------------------------------------------------------------------------------------------------------- scores


def test_scores_of_classes_equal_scikit_learn() -> None:
    values = softmax(rng(0).normal(size=(200, 5)), axis=1)
    labels = rng(1).integers(0, 4, 200)  # the fifth class is never right
    decided = values.argmax(axis=1)
    assert score_task(SST, values, labels) == {
        "accuracy": accuracy_score(labels, decided),
        "f1": f1_score(labels, decided, average="macro"),
    }


def test_scores_of_binary_labels_equal_scikit_learn() -> None:
    values, labels = rng(0).random(200), rng(1).integers(0, 2, 200)
    decided = (values > 0.5).astype(int)
    assert score_task(PARA, values, labels) == {
        "accuracy": accuracy_score(labels, decided),
        "f1": f1_score(labels, decided),
    }


def test_scores_of_similarities_equal_scipy() -> None:
    labels = np.round(rng(0).random(200) * 5, 1).astype(np.float32)  # with ties
    values = (labels + rng(1).normal(size=200)).astype(np.float32)
    scores = score_task(STS, values, labels)
    assert list(scores) == ["pearson", "spearman"]
    assert scores["pearson"] == pytest.approx(pearsonr(values.astype(float), labels.astype(float)).statistic, abs=1e-12)
    assert scores["spearman"] == pytest.approx(spearmanr(values, labels).statistic, abs=1e-12)


def test_scores_without_any_positive_are_zero_and_silent(recwarn: pytest.WarningsRecorder) -> None:
    assert score_task(PARA, np.zeros(4), np.zeros(4, np.int64)) == {"accuracy": 1.0, "f1": 0.0}
    assert score_task(STS, np.full(7, 0.1, np.float32), rng(0).random(7)) == {
        "pearson": pytest.approx(0.0, abs=1e-9),
        "spearman": 0.0,
    }
    assert len(recwarn) == 0


def test_labels_are_needed() -> None:
    with pytest.raises(AssertionError, match="sst"):
        score_task(SST, np.eye(5), None)


def test_correlation_does_not_lose_digits_beside_a_large_mean() -> None:
    a, b = rng(0).normal(size=500), rng(1).normal(size=500)
    assert correlation(a + 1e6, b) == pytest.approx(pearsonr(a, b).statistic, abs=1e-8)
    assert correlation(np.zeros(5), np.arange(5.0)) == 0.0


def test_decisions_at_the_threshold() -> None:
    assert decide(PARA, np.array([0.49999, 0.5, 0.50001])).tolist() == [0, 1, 1]
    assert decide(SST, np.array([[0.1, 0.4, 0.4, 0.1, 0.0]])).tolist() == [1]
    assert decide(STS, np.array([-0.3, 7.5])).tolist() == [-0.3, 7.5]  # similarities are never clipped or rounded


def test_probabilities() -> None:
    logits = rng(0).normal(size=(9, 5)).astype(np.float32) * 5
    assert np.abs(probabilities(SST, logits) - softmax(logits, axis=1)).max() < 1e-6
    assert np.abs(probabilities(PARA, logits[:, 0]) - expit(logits[:, 0])).max() < 1e-6
    assert np.array_equal(probabilities(STS, logits[:, 0]), logits[:, 0])
    assert probabilities(SST, logits).dtype == np.float32


def test_overall_by_hand() -> None:
    by_task = {
        "sst": {"accuracy": 0.5, "f1": 0.1},
        "para": {"accuracy": 0.8, "f1": 0.2},
        "sts": {"pearson": 0.4, "spearman": 0.3},
    }
    scores = overall(DEFAULT_TASKS, by_task)
    assert scores["score"] == pytest.approx((0.5 + 0.8 + 0.7) / 3, abs=1e-15)  # (1 + 0.4) / 2 = 0.7
    assert scores["score_raw_r"] == pytest.approx((0.5 + 0.8 + 0.4) / 3, abs=1e-15)
    assert {name: scores[name] for name in DEFAULT_TASKS} == by_task and len(scores) == 5
    assert [primary(DEFAULT_TASKS[name], by_task[name]) for name in DEFAULT_TASKS] == [0.5, 0.8, 0.4]
    assert overall(DEFAULT_TASKS, {"sts": by_task["sts"]})["score"] == pytest.approx(0.7)
    alone = overall(DEFAULT_TASKS, {"sst": by_task["sst"]})
    assert alone["score"] == alone["score_raw_r"]


def test_r0_steady_hand_by_the_overall_formula() -> None:
    """R0 prints .551, .881 and r .853 on test, and .786 over all of it: (1 + r) / 2."""
    printed = {"sst": {"accuracy": 0.551}, "para": {"accuracy": 0.881}, "sts": {"pearson": 0.853}}
    assert round(overall(DEFAULT_TASKS, printed)["score"], 3) == 0.786


# ---------------------------------------------------------------------------------------------------- prediction files


def test_prediction_files_to_the_byte(tmp_path: Path) -> None:
    write_predictions(tmp_path / "deep" / "sst.csv", SST, ["a1", "b2"], np.eye(5)[[3, 0]])
    write_predictions(tmp_path / "para.csv", PARA, ["a1", "b2", "c3"], np.array([0.5, 0.49, 0.51]))
    write_predictions(tmp_path / "sts.csv", STS, ["a1", "b2"], np.array([4.25, -0.5], np.float32))
    assert (tmp_path / "deep" / "sst.csv").read_bytes() == b"id \t Predicted_Sentiment \na1 , 3 \nb2 , 0 \n"
    assert (tmp_path / "para.csv").read_bytes() == b"id \t Predicted_Is_Paraphrase \na1 , 1 \nb2 , 0 \nc3 , 1 \n"
    assert (tmp_path / "sts.csv").read_bytes() == b"id \t Predicted_Similiary \na1 , 4.25 \nb2 , -0.5 \n"


def test_similarities_are_written_without_loss(tmp_path: Path) -> None:
    values = rng(0).normal(size=50)
    write_predictions(tmp_path / "sts.csv", STS, [str(i) for i in range(50)], values)
    rows = (tmp_path / "sts.csv").read_text().splitlines()[1:]
    assert [float(row.split(" , ")[1]) for row in rows] == values.tolist()


def test_as_many_predictions_as_ids_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_predictions(tmp_path / "x.csv", PARA, ["a"], np.array([0.1, 0.2]))


def test_a_bar_counts_what_was_done_before() -> None:
    bar = progress(["a", "b"], "epoch", "step", done=3)
    assert (bar.n, bar.total) == (3, 5) and list(bar) == ["a", "b"]


def test_a_bar_in_a_file_is_made_of_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A log is read with an editor or grep, to which a bar that is drawn over itself is one endless line."""
    bar = progress(["a", "b", "c", "d"], "epoch 1/3", "step")
    for _ in bar:
        bar.set_postfix_str("sst loss 1.047", refresh=False)
        bar.refresh()
    lines = capsys.readouterr().err.splitlines()
    assert not any("\r" in line or "█" in line or not line.strip() for line in lines)
    assert len(lines) > 2 and lines[0].startswith("epoch 1/3:   0%| 0/4 [00:00<?")
    assert lines[-1].startswith("epoch 1/3: 100%| 4/4 [00:00<00:00, ") and lines[-1].endswith("step/s, sst loss 1.047]")


def test_score_and_write(tmp_path: Path) -> None:
    """Both splits are written, dev alone is scored."""

    def examples(split: str, labels: np.ndarray | None) -> dict[str, Examples]:
        return {"para": Examples(PARA, split, tmp_path, ["i", "j"], (["a", "b"], ["c", "d"]), labels)}

    values = {("dev", "para"): np.array([0.9, 0.8]), ("test", "para"): np.array([0.1, 0.7])}
    splits = {"dev": examples("dev", np.array([1, 0])), "test": examples("test", None)}
    scores = score_and_write({"para": PARA}, values, splits, tmp_path)
    assert scores == {
        "para": {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}, "score": 0.5, "score_raw_r": 0.5,
    }  # fmt: skip
    folder = tmp_path / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == ["para-dev-output.csv", "para-test-output.csv"]
    assert (folder / "para-dev-output.csv").read_text().splitlines()[1:] == ["i , 1 ", "j , 1 "]
    assert (folder / "para-test-output.csv").read_text().splitlines()[1:] == ["i , 0 ", "j , 1 "]


# ---------------------------------------------------------------------------------------------------------- prediction


def small_model(bert: Path, arch: str) -> tuple[MultitaskBERT, dict[str, TaskData]]:
    """A model in training mode whose BatchNorm statistics are not the initial ones, and the dev data for it."""
    from base_bert import load_weights, read_config
    from text.tokenizer import load_tokenizer

    config = read_config(bert)
    torch.manual_seed(0)
    model = MultitaskBERT(ModelOptions(arch=arch).resolved(), config, DEFAULT_TASKS)
    for backbone in model.backbones.values():
        backbone.load_state_dict(load_weights(bert, config))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running_var" in name:
                buffer.uniform_(0.5, 1.5)
            elif "running_mean" in name:
                buffer.normal_(0.0, 0.1)
    data = DataOptions(data_dir=str(Path(__file__).resolve().parent.parent / "data" / "sample"))
    splits = load_splits(data, dict.fromkeys(DEFAULT_TASKS, TaskOptions()), DEFAULT_TASKS, ["dev"], print)
    tokenizer = load_tokenizer(bert, 64)
    encoding = str(model.options.pair_encoding)
    return model, {name: TaskData(own, tokenizer, encoding) for name, own in splits["dev"].items()}


@pytest.mark.parametrize("arch", ["yin-yang", "v2", "cosine"])
def test_predictions_do_not_depend_on_the_batch_size(tiny_bert: Path, arch: str) -> None:
    model, data = small_model(tiny_bert, arch)
    for task, own in data.items():
        outputs = {size: predict(model, own, torch.device("cpu"), size) for size in (1, 7, 1000)}
        assert outputs[1].shape == ((150, 5) if task == "sst" else (150,)) and outputs[1].dtype == np.float32
        assert np.abs(outputs[1] - outputs[7]).max() < 1e-5
        assert np.abs(outputs[1] - outputs[1000]).max() < 1e-5
        spread = np.abs(outputs[1] - np.roll(outputs[1], 1, axis=0)).max()
        assert spread > 1e-3  # rows differ, so a wrong order would show


@pytest.mark.parametrize("arch", ["yin-yang", "v2"])
def test_predictions_come_in_the_order_of_the_file(tiny_bert: Path, arch: str) -> None:
    model, data = small_model(tiny_bert, arch)
    model.eval()
    for task, own in data.items():
        found = predict(model, own, torch.device("cpu"), 16)
        for i in (0, 1, 77, 149):
            with torch.no_grad():
                alone = model(task, own.batch(np.array([i])))
            assert np.abs(alone.numpy()[0] - found[i]).max() < 1e-5


def test_some_examples_alone_come_in_the_order_that_is_asked_for(tiny_bert: Path) -> None:
    model, data = small_model(tiny_bert, "yin-yang")
    rows = np.array([7, 2, 11, 0, 149])
    for own in data.values():
        found = predict(model, own, torch.device("cpu"), 2, rows=rows)
        np.testing.assert_allclose(found, predict(model, own, torch.device("cpu"), 16)[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_prediction_leaves_the_model_as_it_was(tiny_bert: Path, training: bool) -> None:
    model, data = small_model(tiny_bert, "yin-yang")
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    first = predict(model, data["sts"], torch.device("cpu"), 32)
    assert model.training == training and all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)  # dropout is off
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("running_mean" in name for name in before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert np.array_equal(first, predict(model, data["sts"], torch.device("cpu"), 32))


def test_every_arch_predicts_every_task(tiny_bert: Path) -> None:
    for arch in ARCHS:
        model, data = small_model(tiny_bert, arch)
        for own in data.values():
            few = TaskData(own.examples.take(9, 0), _tokenizer(tiny_bert), str(model.options.pair_encoding))
            assert np.isfinite(predict(model, few, torch.device("cpu"), 4)).all()


def _tokenizer(bert: Path):  # type: ignore[no-untyped-def]
    from text.tokenizer import load_tokenizer

    return load_tokenizer(bert, 64)


# --------------------------------------------------------------------------------------------------------------- votes


def test_vote_of_classes_is_the_mean_of_probabilities() -> None:
    members = [rng(i).normal(size=(20, 5)).astype(np.float32) for i in range(3)]
    voted = vote(SST, members, [1, 1, 1], "probabilities")
    assert np.abs(voted - np.mean([softmax(own, axis=1) for own in members], axis=0)).max() < 1e-6
    assert np.abs(voted.sum(axis=1) - 1).max() < 1e-6


def test_vote_of_binary_labels_is_the_mean_of_probabilities() -> None:
    members = [rng(i).normal(size=20).astype(np.float32) * 3 for i in range(3)]
    voted = vote(PARA, members, [1, 1, 1], "probabilities")
    assert np.abs(voted - np.mean([expit(own) for own in members], axis=0)).max() < 1e-6


def test_vote_of_similarities_is_the_mean_of_z_scores() -> None:
    """A member's scale has no weight: Pearson-trained members have none in common."""
    members = [rng(i).normal(size=50).astype(np.float32) for i in range(3)]
    voted = vote(STS, members, [1, 1, 1], "probabilities")
    wanted = np.mean([(own - own.mean()) / own.std() for own in members], axis=0)
    assert np.abs(voted - wanted).max() < 1e-5
    scaled = [members[0] * 100 - 7, members[1] * 0.01, members[2] + 3]
    assert np.abs(vote(STS, scaled, [1, 1, 1], "probabilities") - wanted).max() < 1e-4


def test_z_scores() -> None:
    values = rng(0).normal(size=40) * 3 + 8
    assert z_scores(values).mean() == pytest.approx(0, abs=1e-12) and z_scores(values).std() == pytest.approx(1)
    assert z_scores(np.array([2.0, 2.0, 2.0])).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [0.1, 2.7, 1e4 / 7])
def test_z_scores_of_a_constant_are_zero(value: float) -> None:
    """Its mean may differ from it by a rounding error, which must not be blown up to one."""
    for size in (3, 150, 864):
        for dtype in (np.float32, np.float64):
            assert np.abs(z_scores(np.full(size, value, dtype))).max() < 1e-3


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("task", list(DEFAULT_TASKS))
def test_votes_equal_listing_twice(task: str, average: str) -> None:
    shape = (30, 5) if task == "sst" else (30,)
    a, b, c = (rng(i).normal(size=shape).astype(np.float32) for i in range(3))
    listed = vote(DEFAULT_TASKS[task], [a, b, a, c, a], [1, 1, 1, 1, 1], average)
    voted = vote(DEFAULT_TASKS[task], [a, b, c], [3, 1, 1], average)
    assert np.abs(listed - voted).max() < 1e-6
    assert np.abs(voted - vote(DEFAULT_TASKS[task], [a, b, c], [1, 1, 1], average)).max() > 1e-2  # votes count


def test_logits_mode_averages_raw_outputs() -> None:
    logits = [rng(i).normal(size=(20, 5)).astype(np.float32) * 4 for i in range(2)]
    assert np.abs(vote(SST, logits, [2, 1], "logits") - softmax((2 * logits[0] + logits[1]) / 3, axis=1)).max() < 1e-6
    one = [own[:, 0] for own in logits]
    assert np.abs(vote(PARA, one, [1, 1], "logits") - expit((one[0] + one[1]) / 2)).max() < 1e-6
    assert np.abs(vote(STS, one, [1, 1], "logits") - (one[0] + one[1]) / 2).max() < 1e-6


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p)).astype(np.float32)


def test_members_are_not_rounded_before_the_threshold() -> None:
    """One sure member outvotes two that are barely against it; a majority of labels would say 0."""
    members = [logit(np.array([0.95])), logit(np.array([0.45])), logit(np.array([0.45]))]
    assert decide(PARA, vote(PARA, members, [1, 1, 1], "probabilities")).tolist() == [1]  # mean 0.617
    rounded = np.mean([decide(PARA, probabilities(PARA, own)) for own in members])
    assert rounded < 0.5
    # [3, 1, 3]: one member for class 0 with .8, two for class 1 with .5
    classes = np.log(np.array([[[0.8, 0.1, 0.1]], [[0.4, 0.5, 0.1]], [[0.4, 0.5, 0.1]]], np.float32))
    assert [decide(SST, probabilities(SST, own)).tolist() for own in classes] == [[0], [1], [1]]
    assert decide(SST, vote(SST, list(classes), [1, 1, 1], "probabilities")).tolist() == [0]


def test_the_two_averages_can_decide_differently() -> None:
    """Raw outputs let one loud member decide: the reason why probabilities are the default."""
    members = [np.array([12.0], np.float32), np.array([-3.0], np.float32), np.array([-3.0], np.float32)]
    assert decide(PARA, vote(PARA, members, [1, 1, 1], "logits")).tolist() == [1]
    assert decide(PARA, vote(PARA, members, [1, 1, 1], "probabilities")).tolist() == [0]


def test_one_member_decides_as_it_does_alone() -> None:
    own = rng(0).normal(size=(20, 5)).astype(np.float32)
    for average in ("probabilities", "logits"):
        assert np.array_equal(decide(SST, vote(SST, [own], [3], average)), own.argmax(axis=1))
        similarity = vote(STS, [own[:, 0]], [1], average)
        assert pearsonr(similarity, own[:, 0]).statistic == pytest.approx(1.0)


def test_missing_members_are_named(tmp_path: Path) -> None:
    from evaluation.members import find_members
    from models.checkpoint import FORMAT, save

    save(tmp_path / "a.pt", {"format": FORMAT, "tasks": ["sts"], "config": {"tasks": {}}})
    with pytest.raises(UserError, match="--filepaths .*b.pt: there is no such checkpoint"):
        find_members([str(tmp_path / "a.pt"), str(tmp_path / "b.pt")])
    members = find_members([str(tmp_path / "a.pt")] * 3)
    assert [(member.path, member.tasks, member.votes) for member in members] == [(tmp_path / "a.pt", ("sts",), 3)]


def test_a_task_without_names_for_its_labels_is_scored_like_any() -> None:
    nameless = replace(SST, name="cfimdb", label_names=(), label_range=(0, 1))
    assert nameless.num_outputs == 2
    assert score_task(nameless, np.array([[0.2, 0.8], [0.7, 0.3]]), np.array([1, 1]))["accuracy"] == 0.5
