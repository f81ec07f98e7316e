"""A trained model from Python: labels with probabilities and embeddings, in the order of the texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import predictions_of, refusal

from datasets import BadRows, read_examples
from evaluation import load
from models import checkpoint
from tasks import DEFAULT_TASKS, STS, Task


def dev_texts(folder: Path, task: Task) -> Any:
    """Return the texts of a dev file, or the pairs."""
    texts = read_examples(folder / task.files["dev"], task, "dev", BadRows(0, print)).texts
    return list(zip(*texts, strict=True)) if task.is_pair else texts[0]


@pytest.mark.parametrize("run", ["yin", "cross"])
def test_predictions_are_those_of_the_run(finished_runs: Path, small_data: Path, run: str) -> None:
    """In batches of any size and in the order of the texts."""
    model = load(finished_runs / run / "best.pt", device="cpu", batch_size=5)
    wanted = predictions_of(finished_runs / run)
    for name, task in DEFAULT_TASKS.items():
        texts = dev_texts(small_data, task)
        found, values = model.predict(name, texts), model.probabilities(name, texts)
        by_file = wanted[f"{name}-dev-output.csv"]
        if task.kind == "similarity":
            labels = read_examples(small_data / task.files["dev"], task, "dev", BadRows(0, print)).labels
            by_file = np.clip(np.polyval(np.polyfit(by_file, labels, 1), by_file), 0, 5)
        assert [one.label for one in found] == pytest.approx(by_file, abs=1e-4)
        assert model.probabilities(name, texts[::-1]) == pytest.approx(values[::-1], abs=1e-5)
        assert model.predict(name, []) == [] and len(model.probabilities(name, [])) == 0
        if task.kind == "similarity":
            assert all(one.name == "" and one.probability is None for one in found)
            continue
        assert [one.name for one in found] == [task.label_names[int(one.label)] for one in found]
        both = values if task.kind == "classes" else np.stack([1 - values, values], axis=1)
        assert np.allclose(both.sum(axis=1), 1) and np.allclose([one.probability for one in found], both.max(axis=1))


def test_a_checkpoint_without_lines_gives_raw_similarities(
    finished_runs: Path, small_data: Path, tmp_path: Path
) -> None:
    content = checkpoint.load(finished_runs / "yin" / "best.pt")
    assert content["similarity_lines"].keys() == {"sts"}
    for lines in ({"sts": ["a", 1.0]}, {"sts": 3}, {"sts": [float("nan"), 0.0]}, 5):
        checkpoint.save(tmp_path / "odd.pt", {**content, "similarity_lines": lines})
        assert "save it anew" in refusal(load, tmp_path / "odd.pt")
    del content["similarity_lines"]
    checkpoint.save(tmp_path / "old.pt", content)
    found = load(tmp_path / "old.pt", device="cpu").probabilities("sts", dev_texts(small_data, STS))
    assert found == pytest.approx(predictions_of(finished_runs / "yin")["sts-dev-output.csv"], abs=1e-5)


@pytest.mark.parametrize("run", ["yin", "cross"])
def test_embeddings_are_those_of_each_text_alone(finished_runs: Path, run: str) -> None:
    """By default those of the similarity's backbone."""
    trained = load(str(finished_runs / run / "best.pt"), device="cpu", batch_size=2)
    texts = ["A goat .", "A server sings about a very old goat .", "A goat ."]
    found = trained.embed(texts)
    assert found.shape == (3, 32) and found.dtype == np.float32 and np.allclose(found[0], found[2], atol=1e-6)
    ids = torch.from_numpy(trained.tokenizer.encode([texts[1]]).input_ids)[None].long()
    with torch.no_grad():
        alone = trained.model.eval().backbone("sts")(ids, torch.ones_like(ids))["pooler_output"][0]
    assert np.abs(found[1] - alone.numpy()).max() < 1e-5
    assert np.allclose(trained.embed(texts, "sst"), found, atol=1e-6) == (run == "cross")  # one backbone for all
    assert trained.embed([]).shape == (0, 32)


def test_wrong_texts_and_tasks_are_named(finished_runs: Path, tmp_path: Path) -> None:
    model = load(finished_runs / "sst" / "best.pt")
    wrong: list[Any] = ["one text", [("one", "pair")], [1]]
    for texts in wrong:
        assert "SST sentiment needs a list of texts" in refusal(model.predict, "sst", texts)
        assert "embed needs a list of texts" in refusal(model.embed, texts)
    assert "task quora" in refusal(model.predict, "quora", []) and "choose from sst" in refusal(model.embed, [], "mnli")
    pairs = load(finished_runs / "yin" / "best.pt")
    for texts in (["one text"], [("a", "b", "c")], [("a", 1)]):
        assert "STS similarity needs a list of pairs" in refusal(pairs.predict, "sts", texts)
    assert "no such checkpoint" in refusal(load, tmp_path / "best.pt")
