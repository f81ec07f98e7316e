"""The low-rank layer against its plain formula, gradients included."""

import pytest
import torch

from kernels.low_rank import low_rank_linear, plain_low_rank_linear


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_fast_form_equals_the_formula(bias: bool, factor: bool) -> None:
    torch.manual_seed(0)
    shapes = {"x": (2, 8, 12), "weight": (9, 12), "bias": (9,), "a": (3, 12), "b": (9, 3), "factor": (9,)}
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    results = []
    for function in (low_rank_linear, plain_low_rank_linear):
        x, a, b, c = (values[name].clone().requires_grad_() for name in ("x", "a", "b", "factor"))
        y = function(x, values["weight"], values["bias"] if bias else None, a, b, 0.5, c if factor else None)
        wanted = [x, a, b, c] if factor else [x, a, b]
        results.append([y, *torch.autograd.grad(y.sin().sum(), wanted)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
