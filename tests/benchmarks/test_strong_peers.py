"""The stronger peers compute the same, and have what makes them strong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import benchmark_options
from torch import nn
from transformers import DataCollatorWithFlattening

from benchmarks.modes import COMPARISONS, check_same
from benchmarks.peers import TransformersSide
from benchmarks.strong_peers import FlattenedBatches, GroupedSide, VarlenSide, grouped_by_length
from benchmarks.tables import comparison_table
from benchmarks.workloads import make_workload
from bert import Linear
from tasks import DEFAULT_TASKS


@pytest.mark.parametrize("task", DEFAULT_TASKS)
@pytest.mark.parametrize("comparison", ["grouped", "varlen"])
def test_outputs_and_evaluation_are_the_same(tiny_bert: Path, small_data: Path, comparison: str, task: str) -> None:
    work = make_workload(benchmark_options(tiny_bert, small_data), task, print)
    sides = {name: build(work) for name, build in COMPARISONS[comparison].items()}
    assert check_same(sides, work) < 2e-5
    peer, ours = (side.evaluate() for side in sides.values())
    np.testing.assert_allclose(ours, peer, rtol=0, atol=2e-5)


def test_flattened_batches_are_those_of_the_collator_and_train_alike(tiny_bert: Path, small_data: Path) -> None:
    work = make_workload(benchmark_options(tiny_bert, small_data), "para", print)
    data = FlattenedBatches(work.train, work.tokenizer.pad_id)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    texts, _ = data[work.batches[0]]
    for found, examples in zip(texts, data.texts, strict=True):
        wanted = collator([{"input_ids": examples[i]} for i in work.batches[0]])
        ids, positions, starts, longest = found
        assert torch.equal(ids, wanted["input_ids"]) and torch.equal(positions, wanted["position_ids"])
        assert torch.equal(starts, wanted["cu_seq_lens_q"]) and longest == wanted["max_length_q"]
    found = []
    for side in (TransformersSide(work), VarlenSide(work)):
        side.model.eval()  # no dropout
        side.train_on(work.batches[0])
        found.append([side.optimizer.state[p]["exp_avg"] for p in side.model.parameters() if p in side.optimizer.state])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-6)


def test_batches_of_equal_lengths_have_the_same_examples() -> None:
    generator = np.random.default_rng(0)
    lengths, batches = generator.integers(3, 60, 400), np.split(generator.permutation(400), 50)
    grouped = grouped_by_length(batches, lengths)
    assert sorted(np.concatenate(grouped)) == list(range(400)) and {len(batch) for batch in grouped} == {8}
    padded, wanted = (sum(lengths[batch].max() * 8 for batch in each) for each in (grouped, batches))
    assert padded < 1.1 * lengths.sum() < wanted
    assert np.diff([lengths[batch].mean() for batch in grouped]).min() < 0  # not from short to long


def test_timed_steps_of_grouped_batches_have_the_examples_of_the_others(tiny_bert: Path, small_data: Path) -> None:
    work = make_workload(benchmark_options(tiny_bert, small_data, batch_size=4, steps=3, warmup=2), "sst", print)
    side = GroupedSide(work)
    for part in (slice(work.warmup), slice(work.warmup, None)):
        assert sorted(np.concatenate(side.work.batches[part])) == sorted(np.concatenate(work.batches[part]))
    before = side.model.head.weight.detach().clone()  # type: ignore[union-attr]
    side.train_on(*work.batches)
    assert not torch.equal(side.model.head.weight, before)  # type: ignore[union-attr]


def test_bf16_is_for_both_sides(tiny_bert: Path, small_data: Path) -> None:
    work = make_workload(benchmark_options(tiny_bert, small_data), "sst", print)
    sides = {name: build(work) for name, build in COMPARISONS["grouped-bf16"].items()}
    assert {side.work.device.amp for side in sides.values()} == {torch.bfloat16} and work.device.amp is None
    types = []
    for side, layer in zip(sides.values(), (nn.Linear, Linear), strict=True):
        dense = next(module for module in side.model.modules() if isinstance(module, layer))
        dense.register_forward_hook(lambda module, given, out: types.append(out.dtype))
        side.train_on(work.batches[0])
    assert set(types) == {torch.bfloat16}


def test_the_ratio_of_grouped_batches_is_that_of_the_sums() -> None:
    record = {"task": "sst", "mode": "train", "seconds": {"peer": [1.0, 1.0, 7.0], "ours": [1.0, 1.0, 1.0]}}
    record |= {"batches": 1, "examples": [8] * 3, "tokens": [80] * 3, "flops": [1e9] * 3, "torch_peak": 1e9}
    record |= {"matmul_peak": 1e9, "memory": {"peer": {"train": 1e6}, "ours": {"train": 1e6}}}
    lines = comparison_table([{"comparison": name, **record} for name in ("full-model", "grouped")]).splitlines()
    assert [line.split()[3:6] for line in lines[-2:]] == [["1.0000", "1.0000", "1.00"], ["3.0000", "1.0000", "3.00"]]
