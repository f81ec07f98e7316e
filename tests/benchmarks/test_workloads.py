"""The data and batches that both sides of a comparison get."""

from pathlib import Path

import numpy as np
import pytest
from helpers import benchmark_options

from benchmarks.options import GENERATED
from benchmarks.workloads import EVAL_BATCHES, draw_lengths, make_workload, prepared_data
from tasks import DEFAULT_TASKS
from utils.errors import UserError


def test_generated_data_have_the_real_lengths(tiny_bert: Path) -> None:
    with prepared_data(benchmark_options(tiny_bert, GENERATED, steps=20), min_rows=400) as prepared:
        work = make_workload(prepared, "para", print)
        assert len(work.train) == 8 * 21 and len(work.dev) == EVAL_BATCHES * 8
    lengths = draw_lengths(DEFAULT_TASKS["para"], 20_000, 0)
    assert lengths.shape == (20_000, 2) and lengths.mean() == pytest.approx(15.8, abs=0.3)
    assert (lengths.min(), np.quantile(lengths, 0.9)) == (3, 25) and lengths.max() <= 95
    generated = np.concatenate([np.diff(tokens.offsets) for tokens in work.train.tokens])
    assert generated.mean() == pytest.approx(lengths.mean(), abs=2)
    assert not Path(prepared.data_dir).exists()


def test_a_batch_larger_than_the_data(tiny_bert: Path, small_data: Path) -> None:
    with pytest.raises(UserError, match=r"--batch_size 21: .*ids-sst-train.csv has only 20 examples"):
        make_workload(benchmark_options(tiny_bert, small_data, batch_size=21), "sst", print)


def test_few_data_are_used_again(tiny_bert: Path, small_data: Path) -> None:
    work = make_workload(benchmark_options(tiny_bert, small_data, steps=6), "sst", print)
    assert len(work.batches) == 7 and {len(indices) for indices in work.batches} == {8}
    assert set(np.concatenate(work.batches)) <= set(range(20))
