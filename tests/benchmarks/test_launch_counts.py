"""Launches are counted: what has been gained here stays."""

import pytest

from benchmarks.launch_counts import CASES, graph_shapes, step_launches


@pytest.mark.parametrize(("size", "most"), [(64, 5), (256, 3), (512, 3)])
def test_padding_for_graphs_starts_few_blocks_in_few_shapes(size: int, most: int) -> None:
    ratio, shapes = graph_shapes(size)
    assert ratio <= 1.15 and shapes <= most


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "most", "most_outside"),
    [
        ("BERT-base", 560, 4),
        ("BERT-base, compiled", 416, 4),
        ("MiniLM, compiled", 242, 4),
        ("MiniLM, fp32", 308, 4),
        ("MiniLM, fp32, SMART", 950, 4),
        ("MiniLM, LoRA", 385, 4),
        ("MiniLM, DoRA", 559, 4),
        ("MiniLM, joint, PCGrad", 1003, 49),
        ("MiniLM, joint, graphs", 25, 25),
        ("MiniLM, joint, PCGrad, graphs", 58, 58),
    ],
)
def test_a_step_has_few_launches(name: str, most: int, most_outside: int) -> None:
    everything, outside = step_launches(CASES[name])
    assert everything.total() <= most and outside.total() <= most_outside, everything
