"""Dropout: its share, its scale, and the same mask in the backward pass."""

import pytest
import torch

from kernels.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_a_share_and_scales_the_rest(p: float) -> None:
    x = torch.linspace(1, 2, 40_001).view(1, -1).requires_grad_()  # no multiple of four
    dropout = Dropout(p)
    out = dropout(x)
    kept = out != 0
    torch.testing.assert_close(out, x * kept / (1 - p))
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, kept / (1 - p))
    assert abs((~kept).sum().item() - x.numel() * p) < 5 * (x.numel() * p * (1 - p)) ** 0.5
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x
