"""Several low-rank layers at once against their plain formula, gradients included."""

import pytest
import torch
from torch import Tensor

from kernels.half_low_rank import LowRank, half_low_rank, half_low_rank_linear
from kernels.low_rank import plain_low_rank_linear

SCALING = 0.5


@pytest.mark.parametrize("dora", [False, True])
def test_layers_side_by_side_equal_the_formula(dora: bool) -> None:
    """In float64, so that nothing is rounded; a group of three layers and one of another shape."""
    torch.manual_seed(0)
    shapes = [[(9, 12)] * 3, [(4, 12)]]
    x = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    groups = [
        [
            LowRank(leaf(*s).detach(), leaf(s[0]).detach(), leaf(3, 12), leaf(s[0], 3), SCALING, leaf(s[0], 1))
            for s in group
        ]
        for group in shapes
    ]
    layers = [layer if dora else layer._replace(magnitude=None) for group in groups for layer in group]
    groups = [layers[:3], layers[3:]]
    found = torch.cat([half_low_rank_linear(x, half) for half in half_low_rank(torch.float64, groups)], dim=1)
    outputs = []
    for layer in layers:
        norm = (layer.weight + SCALING * layer.b @ layer.a).norm(dim=1).detach()
        factor = None if layer.magnitude is None else layer.magnitude.squeeze(1) / norm
        outputs.append(plain_low_rank_linear(x, layer.weight, layer.bias, layer.a, layer.b, SCALING, factor))
    wanted = torch.cat(outputs, dim=1)
    leaves = [x, *(t for layer in layers for t in (layer.a, layer.b, layer.magnitude) if t is not None)]
    results = [[y, *torch.autograd.grad(y.sin().sum(), leaves)] for y in (found, wanted)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_stays_finite() -> None:
    zeros = torch.zeros(2, 3, requires_grad=True)
    layer = LowRank(torch.zeros(2, 3), torch.ones(2), zeros, torch.zeros(2, 2), 1.0, torch.zeros(2, 1))
    (half,) = half_low_rank(torch.bfloat16, [[layer]])
    assert half_low_rank_linear(torch.ones(4, 3), half).tolist() == [[1, 1]] * 4
