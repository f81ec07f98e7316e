"""Half-precision copies against casts one by one."""

import torch
from torch import nn

from kernels.half_copies import half_copies


def test_copies_and_gradients_are_those_of_single_casts() -> None:
    torch.manual_seed(0)
    groups = [[nn.Parameter(torch.randn(rows, 5)) for rows in (3, 1, 4)], [nn.Parameter(torch.randn(7))]]
    parameters = [parameter for group in groups for parameter in group]
    found = []
    for copies in (
        half_copies(torch.bfloat16, groups),
        [torch.cat([parameter.to(torch.bfloat16) for parameter in group]) for group in groups],
    ):
        loss = sum(
            (copy.float().square() * torch.arange(len(copy.flatten())).view(copy.shape)).sum() for copy in copies
        )
        found.append([*copies, *torch.autograd.grad(loss, parameters)])
    assert found[0][2].dtype == torch.float32
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_copy_that_is_not_used_has_a_gradient_of_zero() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    half_copies(torch.float16, [[used], [unused]])[0].sum().backward()
    assert used.grad is not None and used.grad.tolist() == [1, 1]
    assert unused.grad is not None and unused.grad.tolist() == [0, 0, 0]
