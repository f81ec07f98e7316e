"""Tasks in onnxruntime: the same outputs as ours for every arch, batch size and length, with padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, make_batch, make_model, randomise

from config import ARCHS, BertConfig, PalOptions
from lora import LoRAConfig
from models.multitask_bert import MultitaskBERT
from models.onnx_export import export_onnx
from text.packing import PackedBatch, unpack

LINE = 0.7, 2.0
SMALL = BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=48,
)  # fmt: skip


def feeds(batch: PackedBatch, siamese: bool) -> dict[str, np.ndarray]:
    """Return the padded inputs of a batch by name. The two texts of siamese pairs have different lengths."""
    rows = {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}
    rows["token_type_ids"] = batch.token_type_ids
    padded = {name: unpack(tensor, batch).numpy() for name, tensor in rows.items()}
    if not siamese:
        return padded
    halves = {name: np.split(array, 2) for name, array in padded.items()}
    longest = [int(half.sum(axis=1).max()) for half in halves["attention_mask"]]
    return {
        f"{name}{suffix}": half[:, :length]
        for name, both in halves.items()
        for suffix, half, length in zip(("", "_b"), both, longest, strict=True)
    }


def check(model: MultitaskBERT, path: Path) -> None:
    """Export each task and compare it with the model in batches of sizes that the export did not see."""
    runtime: Any = pytest.importorskip("onnxruntime")
    for name, task in model.eval().tasks.items():
        line = LINE if task.kind == "similarity" else None
        export_onnx(path, model, name, line)
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for size in (1, 2, 7):
            batch = make_batch(model, name, size, seed=size)
            with torch.no_grad():
                wanted = model(name, batch).numpy()
            logits, *more = session.run(None, feeds(batch, model.is_siamese(name)))
            assert logits.shape == wanted.shape and np.abs(logits - wanted).max() < 1e-5
            assert len(more) == (line is not None)
            for similarity in more:
                assert np.abs(similarity - (LINE[0] * wanted + LINE[1]).clip(0, 5)).max() < 1e-5


@pytest.mark.parametrize("arch", ARCHS)
def test_every_arch(tmp_path: Path, arch: str) -> None:
    model = make_model(arch=arch, config=SMALL)
    for name, buffer in model.named_buffers():
        if "running" in name:  # as after training
            buffer.copy_(torch.linspace(0.5, 1.5, len(buffer)))
    check(model, tmp_path / "task.onnx")


@pytest.mark.parametrize("kind", ["pal", "shared-attention", "mixed"])
def test_pals(tmp_path: Path, kind: str) -> None:
    model = make_model(arch="v1", config=SMALL)
    model.add_pals(PalOptions(pal=kind, pal_size=8, pal_heads=2, pal_low_rank_size=3, pal_tasks=("sst", "sts")))
    randomise(model)
    check(model, tmp_path / "task.onnx")


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_merged(tmp_path: Path, dora: bool) -> None:
    model = make_model(arch="r1-baseline", config=SMALL)
    model.add_adapters(LoRAConfig(mode="all-lin", rank=3, dora=dora))
    randomise(model)
    check(model, tmp_path / "task.onnx")
    assert b"lora_A" not in (tmp_path / "task.onnx").read_bytes()
    assert all("merged" not in name for name in model.state_dict())


def test_products_that_onednn_computes_elsewhere(tmp_path: Path) -> None:
    wide = BertConfig(**{**vars(TINY), "hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16})
    model = make_model(arch="r4", config=wide)
    randomise(model, std=0.02)
    check(model, tmp_path / "task.onnx")


def test_padding_on_the_left_hides_nothing(tmp_path: Path) -> None:
    """A row whose mask begins with zeros gives the mean of its tokens at their places, and no nan."""
    runtime: Any = pytest.importorskip("onnxruntime")
    export_onnx(tmp_path / "sst.onnx", make_model(arch="cosine", config=SMALL), "sst", None)
    session = runtime.InferenceSession(str(tmp_path / "sst.onnx"), providers=["CPUExecutionProvider"])
    ids = np.array([[0, 7, 8], [0, 0, 0]])
    masks = np.array([[0, 1, 1], [0, 0, 1]])
    (logits,) = session.run(None, {"input_ids": ids, "attention_mask": masks, "token_type_ids": ids * 0})
    ids[0, 0], ids[1, :2] = 9, 5
    (other,) = session.run(None, {"input_ids": ids, "attention_mask": masks, "token_type_ids": ids * 0})
    assert np.isfinite(logits).all() and np.abs(logits - other).max() < 1e-6
