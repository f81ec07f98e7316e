"""The modes without a peer, and the lines that they print."""

import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import benchmark_options

from benchmarks.modes import (
    FROZEN_EPOCHS,
    measure_frozen,
    measure_optimizers,
    measure_recipe,
    measure_scaling,
    measure_start,
    measure_tokenising,
)
from benchmarks.tables import frozen_line, optimizer_line, recipe_line, scaling_lines, start_line, tokenise_line
from benchmarks.workloads import REAL_ROWS
from bert import BertModel
from config import BertConfig
from text.packing import PackedBatch
from utils.errors import UserError


def test_tokenising_a_large_file(
    tiny_bert: Path, tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (record,) = measure_tokenising(benchmark_options(tiny_bert, small_data), pairs=12_000)
    assert (record["mode"], record["pairs"]) == ("tokenise", 12_000)
    first, cached = record["first"], record["cached"]
    assert first["tokens"] == cached["tokens"] == pytest.approx(13, abs=0.1)
    assert 0 < cached["seconds"] < first["seconds"] and min(first["peak"], cached["peak"]) > 50e6
    line = f"tokenise 12,000 pairs of 13.0 tokens a text: first {first['seconds']:.2f} s"
    assert tokenise_line(record).startswith(line)
    assert not (tmp_path / "cache").exists()  # its cache was a temporary folder


def test_steps_of_the_optimizers(tiny_bert: Path, small_data: Path) -> None:
    small = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    records = measure_optimizers(benchmark_options(tiny_bert, small_data, steps=3), small)
    assert [(record["optimizer"], list(record["seconds"])) for record in records] == [
        ("AdamW", ["torch, fused", "minbert"]),
        ("Adamax", ["torch, foreach", "minbert"]),
    ]
    count = sum(parameter.numel() for parameter in BertModel(small).parameters())
    for record in records:
        assert record["parameters"] == count
        assert all(len(times) == 3 and min(times) > 0 for times in record["seconds"].values())
        start = f"{record['optimizer']}, a step of {count:,} parameters: torch, "
        assert optimizer_line(record).startswith(start)


def test_epochs_with_the_cache_of_frozen_layers(
    tiny_bert: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_dropout: list[bool] = []
    embed = BertModel.embed

    def counted(self: BertModel, batch: PackedBatch) -> torch.Tensor:
        with_dropout.append(self.training)
        return embed(self, batch)

    monkeypatch.setattr(BertModel, "embed", counted)
    (record,) = measure_frozen(benchmark_options(tiny_bert, small_data, tasks=("para",)))
    assert with_dropout.count(True) == (1 + FROZEN_EPOCHS) * 3  # the side without a cache, an epoch before the timed
    assert with_dropout.count(False) == 1  # the side with the cache: all examples at once
    assert (record["task"], record["steps"], record["batch_size"]) == ("para", 3, 8)  # of 20 examples
    assert list(record["seconds"]) == ["computed anew", "--cache_frozen"]
    plain, cached = (np.array(times) for times in record["seconds"].values())
    assert len(plain) == len(cached) == FROZEN_EPOCHS and plain.min() > 0 and cached.min() > 0
    line = frozen_line(record)
    assert line.startswith("frozen para, an epoch of 3 steps of 8 examples: ")
    assert line.endswith(f"; {np.median(plain / cached):.1f} times as fast")


def test_the_start_of_a_run(tiny_bert: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = measure_start(benchmark_options(tiny_bert, small_data), starts=1)
    assert 0 < record["seconds"]["help"][0] < record["seconds"]["run"][0]
    assert start_line(record).startswith(f"start: --help {record['seconds']['help'][0]:.2f} s; a whole run")
    with pytest.raises(UserError, match=r"multitask_classifier.py .* failed: error: --run_dir"):
        monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda: nullcontext(__file__))
        measure_start(benchmark_options(tiny_bert, small_data))


def test_the_recipe_is_timed_stage_by_stage(tiny_bert: Path, small_data: Path) -> None:
    (record,) = measure_recipe(benchmark_options(tiny_bert, small_data), warmup=0, steps=1)
    heads, one, two, everything = record["stages"].values()
    assert all(list(tasks) == list(REAL_ROWS) and min(tasks.values()) > 0 for tasks in record["stages"].values())
    # Of two layers, half a layer is one. The last three of seven epochs train everything.
    quora = heads["para"] + 2 * one["para"] + two["para"] + 3 * everything["para"]
    assert record["train"]["para"] == pytest.approx(quora * 4422)  # batches of 64
    assert recipe_line(record).startswith("recipe: the heads train: sst ")
    with pytest.raises(UserError, match=r"recipe needs 31 steps of sst, but --data_dir .* has only 1; use .* made"):
        measure_recipe(benchmark_options(tiny_bert, small_data))


@pytest.mark.long
def test_processes_share_each_batch(tiny_bert: Path, sample: Path) -> None:
    options = benchmark_options(tiny_bert, sample, batch_size=16, steps=3, ranks=("1", "2"), tasks=("sst",))
    (record,) = measure_scaling(options)
    assert {ranks: len(times) for ranks, times in record["seconds"].items()} == {"1": 3, "2": 3}
    first, second = scaling_lines(record).splitlines()
    assert first.startswith("scaling sst, batch 16: 1 processes ") and first.endswith("efficiency 100%")
    assert second.startswith("scaling sst, batch 16: 2 processes ")
