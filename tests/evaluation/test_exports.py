"""Exported models in the loaders of others: embeddings, file modes."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import multitask_classifier
from evaluation import load
from models import checkpoint


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_sentence_transformers_gives_our_embeddings(finished_runs: Path, tmp_path: Path, pooling: str) -> None:
    library: Any = pytest.importorskip("sentence_transformers")
    content = checkpoint.load(finished_runs / "yin" / "best.pt")
    content["config"]["model"]["pooling"] = pooling
    checkpoint.save(tmp_path / "best.pt", content)
    multitask_classifier.main(["--evaluate", str(tmp_path / "best.pt"), "--export", str(tmp_path / "out")])
    ours = load(tmp_path / "best.pt", device="cpu")
    texts = ["A goat .", "A server sings about a very old goat .", "Film , film !" * 40]  # the last one is cut
    for backbone, task in (("sentiment", "sst"), ("similarity", "sts")):
        theirs = library.SentenceTransformer(str(tmp_path / "out" / backbone), device="cpu")
        assert theirs.max_seq_length == 64
        assert np.abs(theirs.encode(texts) - ours.embed(texts, task)).max() < 1e-5


def test_exported_files_have_the_mode_of_the_umask(finished_runs: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        words = ["--evaluate", str(finished_runs / "yin" / "best.pt"), "--export", str(tmp_path / "out")]
        multitask_classifier.main(words)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 8 and {path.stat().st_mode & 0o777 for path in files} == {0o640}
