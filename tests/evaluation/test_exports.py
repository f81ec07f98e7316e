"""Exported models in the loaders of others: embeddings, logits, model cards, file modes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refusal

import multitask_classifier
from evaluation import load
from models import checkpoint
from text.packing import pack
from utils.download import COURSE_FILES, git_blob_id

TEXTS = ["A goat .", "A server sings about a very old goat .", "Film , film !" * 40]  # the last one is cut
PAIRS = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[0]), (TEXTS[2], TEXTS[0]), ("A goat .", "A goat .")]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_sentence_transformers_gives_our_embeddings(finished_runs: Path, tmp_path: Path, pooling: str) -> None:
    library: Any = pytest.importorskip("sentence_transformers")
    content = checkpoint.load(finished_runs / "yin" / "best.pt")
    content["config"]["model"]["pooling"] = pooling
    checkpoint.save(tmp_path / "best.pt", content)
    multitask_classifier.main(["--evaluate", str(tmp_path / "best.pt"), "--export", str(tmp_path / "out")])
    ours = load(tmp_path / "best.pt", device="cpu")
    for backbone, task in (("sentiment", "sst"), ("similarity", "sts")):
        theirs = library.SentenceTransformer(str(tmp_path / "out" / backbone), device="cpu")
        assert theirs.max_seq_length == 64
        assert np.abs(theirs.encode(TEXTS) - ours.embed(TEXTS, task)).max() < 1e-5


def test_exported_files_have_the_mode_of_the_umask(finished_runs: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        words = ["--evaluate", str(finished_runs / "yin" / "best.pt"), "--export", str(tmp_path / "out")]
        multitask_classifier.main(words)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 8 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """best.pt of a run with joined pairs and linear heads."""
    folder = tmp_path_factory.mktemp("linear") / "run"
    flags = [*tiny_flags, "--arch", "r1-baseline", "--no_tensorboard", "--no_test_predictions", "--epochs", "1"]
    multitask_classifier.main([*flags, "--run_dir", str(folder)])
    return folder / "best.pt"


def export(best: Path, *words: object) -> None:
    """Run multitask_classifier.py --evaluate with these flags."""
    multitask_classifier.main(["--evaluate", str(best), *map(str, words)])


def logits_of(best: Path, task: str) -> np.ndarray:
    """Return our raw outputs for TEXTS, or for PAIRS joined."""
    ours = load(best, device="cpu")
    columns = zip(*PAIRS, strict=True) if ours.model.tasks[task].is_pair else [TEXTS]
    tokens = ours.tokenizer.encode(*map(list, columns))
    with torch.no_grad():
        out = ours.model.eval()(task, pack(tokens.input_ids, np.diff(tokens.offsets), tokens.second_start))
    return out.numpy()


@pytest.mark.parametrize("task", ["sst", "quora", "sts"])
def test_pipelines_of_transformers_give_our_logits(linear: Path, tmp_path: Path, task: str) -> None:
    from transformers import pipeline

    export(linear, "--export_task", task, tmp_path)
    classify = pipeline("text-classification", str(tmp_path), truncation=True, device="cpu")
    inputs: Any = TEXTS if task == "sst" else [{"text": a, "text_pair": b} for a, b in PAIRS]
    rows = [classify(one, top_k=None, function_to_apply="none") for one in inputs]
    found = [{one["label"]: one["score"] for one in row} for row in rows]
    ours, name = load(linear, device="cpu"), {"quora": "para"}.get(task, task)
    wanted = logits_of(linear, name)
    if task == "sst":
        by_label = [dict(zip(ours.model.tasks[name].label_names, row, strict=True)) for row in wanted]
    elif task == "quora":
        by_label = [{"different": 0.0, "paraphrase": logit} for logit in wanted]
    else:  # on the scale of the labels, but not cut to it
        slope, intercept = ours.lines["sts"]
        by_label = [{"similarity": slope * value + intercept} for value in wanted]
    assert all(row == pytest.approx(other, abs=1e-5) for row, other in zip(found, by_label, strict=True))
    if task != "sts":
        best = [classify(one)["label"] if task == "quora" else classify(one)[0]["label"] for one in inputs]
        assert best == [one.name for one in ours.predict(name, TEXTS if task == "sst" else PAIRS)]


def test_heads_that_transformers_lacks_are_refused_by_name(finished_runs: Path, tmp_path: Path) -> None:
    for run, task, named in [("cross", "sst", "--clf mlp"), ("yin", "sts", "--pair_encoding siamese")]:
        message = refusal(export, finished_runs / run / "best.pt", "--export_task", task, tmp_path / "out")
        assert f"--export_task {task}" in message and named in message and "--export_onnx" in message
    assert "was not trained on it" in refusal(
        export, finished_runs / "sst" / "best.pt", "--export_task", "sts", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", ["yin", "cross"])
def test_onnx_files_with_the_tokenizer_beside_them_predict_as_we_do(
    finished_runs: Path, tmp_path: Path, run: str
) -> None:
    runtime: Any = pytest.importorskip("onnxruntime")
    from transformers import AutoTokenizer

    best, folder = finished_runs / run / "best.pt", tmp_path / "out"
    export(best, "--export_onnx", folder)
    ours, tokenizer = load(best, device="cpu"), AutoTokenizer.from_pretrained(folder)
    options: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "np"}
    for task in ("sst", "para", "sts"):
        session = runtime.InferenceSession(str(folder / f"{task}.onnx"), providers=["CPUExecutionProvider"])
        first, second = (list(column) for column in zip(*PAIRS, strict=True))
        if task == "sst":
            inputs = tokenizer(TEXTS, **options)
        elif run == "cross":
            inputs = tokenizer(first, second, **options)
        else:
            second_inputs = {f"{name}_b": array for name, array in tokenizer(second, **options).items()}
            inputs = {**tokenizer(first, **options), **second_inputs}
        outputs = dict(zip([one.name for one in session.get_outputs()], session.run(None, dict(inputs)), strict=True))
        if task == "sst":
            found = torch.from_numpy(outputs["logits"]).softmax(1).numpy()
        else:
            found = outputs["similarity"] if task == "sts" else 1 / (1 + np.exp(-outputs["logits"]))
        assert np.abs(found - ours.probabilities(task, TEXTS if task == "sst" else PAIRS)).max() < 1e-5


def test_one_task_as_onnx_and_the_package_that_it_needs(
    finished_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = finished_runs / "yin" / "best.pt"
    pytest.importorskip("onnx")
    export(best, "--export_onnx", tmp_path / "one", "--task", "quora")
    assert [path.name for path in (tmp_path / "one").glob("*.onnx")] == ["para.onnx"]
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = refusal(export, best, "--export_onnx", tmp_path / "none")
    assert message == "--export_onnx: no package onnx; pip install onnx onnxruntime"
    assert not (tmp_path / "none").exists()


def test_model_cards(linear: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a file that is certainly the course's is named by its source."""
    from huggingface_hub import ModelCard

    content = checkpoint.load(linear)
    content["config"]["model"]["pretrained"] = "bert-base-uncased"
    content["config"]["data"]["extra_clean"] = True
    checkpoint.save(tmp_path / "best.pt", content)
    course = small_data / "sts-train.csv"
    monkeypatch.setitem(COURSE_FILES, course.name, git_blob_id(course.read_bytes()))
    export(tmp_path / "best.pt", "--export", tmp_path / "out", "--export_task", "sst", tmp_path / "sst")
    card = ModelCard.load(tmp_path / "out" / "shared" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "google-bert/bert-base-uncased",
        "datasets": ["sentence-transformers/stsb"],
        "language": "en",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
    }
    scores = json.loads((linear.parent / "scores.json").read_text())["dev"]
    assert f"| Quora paraphrase | accuracy | {scores['para']['accuracy']:.4f} |" in card.text
    assert "- STS similarity: `sts-train.csv`, the course's file of the STS benchmark (Cer et al. 2017)" in card.text
    assert "- SST sentiment: `ids-sst-train.csv`\n" in card.text and "check the licence of your data" in card.text
    assert "python multitask_classifier.py --arch r1-baseline" in card.text and "--extra_clean" in card.text
    assert 'SentenceTransformer("shared")' in card.text
    card = ModelCard.load(tmp_path / "sst" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
    assert card.data.datasets == ["sentence-transformers/stsb"] and "| STS" not in card.text
    assert 'model({"text": "a fine film", "text_pair"' in card.text
    checkpoint.save(tmp_path / "odd.pt", {**content, "scores": {"sst": {"accuracy": "high"}}})
    assert "accuracy is no finite number" in refusal(export, tmp_path / "odd.pt", "--export", tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_the_card_of_a_run_on_other_weights_names_no_base(linear: Path, tmp_path: Path) -> None:
    content = checkpoint.load(linear)
    content["config"]["train"] |= {"init_from": "stage/best.pt"}
    del content["scores"]
    checkpoint.save(tmp_path / "best.pt", content)
    export(tmp_path / "best.pt", "--export", tmp_path)
    text = (tmp_path / "shared" / "README.md").read_text()
    assert "base_model" not in text and "stage/best.pt, whose data count too" in text and "accuracy" not in text
