"""PCGrad against the algorithm written out on whole vectors."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.launch_counts import launches
from training.pcgrad import TaskGradients, inner_products, pcgrad

SHAPES = [(3, 4), (5,), (2, 2, 2)]


def random_gradients(count: int, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES] for _ in range(count)]


def flat(gradient: list[Tensor]) -> np.ndarray:
    return torch.cat([part.flatten() for part in gradient]).numpy()


def by_the_algorithm(vectors: list[np.ndarray], order: np.random.Generator) -> np.ndarray:
    """Yu et al. 2020, Algorithm 1: the sum of the projected gradients."""
    total = np.zeros_like(vectors[0])
    for i, vector in enumerate(vectors):
        projected = vector.copy()
        for j in order.permutation([j for j in range(len(vectors)) if j != i]):
            if projected @ vectors[j] < 0:
                projected -= projected @ vectors[j] / (vectors[j] @ vectors[j]) * vectors[j]
        total += projected
    return total


def taken(gradients: Sequence[Sequence[Tensor | None]], like: Sequence[Tensor]) -> TaskGradients:
    """Return the gradients of some tasks, of parameters with the shapes of `like`."""
    parameters = [nn.Parameter(torch.zeros_like(part)) for part in like]
    found = TaskGradients(parameters, len(gradients))
    for gradient in gradients:
        for parameter, part in zip(parameters, gradient, strict=True):
            parameter.grad = part
        found.take()
    return found


def surgery(gradients: list[list[Tensor]], seed: int = 5) -> list[Tensor]:
    found = taken(gradients, gradients[0])
    pcgrad(found.rows, np.random.default_rng(seed))
    found.give_first()
    return [parameter.grad for parameter in found.parameters if parameter.grad is not None]


def test_the_example_with_the_original_gradients() -> None:
    """(1,0) and (-1,1): each is projected on the other's ORIGINAL gradient."""
    (found,) = surgery([[torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]])
    assert found.tolist() == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_algorithm(count: int, seed: int) -> None:
    common, *gradients = random_gradients(count + 1, seed)
    signs = np.resize([1, -1], count)  # for and against a common direction, so that some conflict
    gradients = [[a + s * b for a, b in zip(g, common, strict=True)] for s, g in zip(signs, gradients, strict=True)]
    wanted = by_the_algorithm([flat(gradient) for gradient in gradients], np.random.default_rng(seed + 40))
    assert flat(surgery(gradients, seed + 40)) == pytest.approx(wanted, abs=1e-12)
    assert not np.allclose(wanted, sum(flat(gradient) for gradient in gradients))  # something was projected


def test_without_conflict_it_is_the_plain_sum() -> None:
    gradients = [[part.abs() for part in gradient] for gradient in random_gradients(3)]
    for found, parts in zip(surgery(gradients), zip(*gradients, strict=True), strict=True):
        torch.testing.assert_close(found, sum(parts), rtol=1e-14, atol=0)


def test_the_order_of_projections_matters_and_is_seeded() -> None:
    gradients = random_gradients(3, 2)
    results, again = ({tuple(np.round(flat(surgery(gradients, n)), 9)) for n in range(12)} for _ in range(2))
    assert len(results) > 1 and results == again


def test_parameters_that_a_task_does_not_reach() -> None:
    """They count as zero; a parameter that none reaches, as a frozen one, keeps no gradient."""
    first, second = random_gradients(2, 3)
    found = taken([[first[0], None, None], [second[0], second[1], None]], like=first)
    pcgrad(found.rows, np.random.default_rng(1))
    found.give_first()
    zeros = [[first[0], torch.zeros(5).double()], second[:2]]
    wanted = by_the_algorithm([flat(gradient) for gradient in zeros], np.random.default_rng(1))
    given = [parameter.grad for parameter in found.parameters]
    assert given[2] is None and found.pairs() == 1
    assert flat([part for part in given if part is not None]) == pytest.approx(wanted, abs=1e-12)


def test_a_gradient_of_zero_changes_nothing() -> None:
    (first,) = random_gradients(1)
    for found, wanted in zip(surgery([first, [torch.zeros_like(part) for part in first]]), first, strict=True):
        assert torch.equal(found, wanted)


def test_conflicts_are_counted_by_pairs() -> None:
    gradients = [[torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])], [torch.tensor([0.0, 1.0])]]
    assert pcgrad(taken(gradients, gradients[0]).rows, np.random.default_rng(0)).item() == 1


def test_gradients_are_copied_and_cleared_and_given_back() -> None:
    """Copies: the memory of a gradient may be written by the next backward pass."""
    reached, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    memory = torch.tensor([1.0, 2.0])
    reached.grad = memory
    gradients = TaskGradients([reached, other], 1)
    gradients.take()
    memory.fill_(9)
    assert reached.grad is None and gradients.reached == [[True, False]] and gradients.pairs() == 0
    gradients.give_first()
    assert reached.grad is not None and reached.grad.tolist() == [1, 2] and other.grad is None


def test_products_of_long_gradients_are_exact() -> None:
    """Two gradients of 8 million numbers that nearly cancel, as a plain product in fp32 would not tell."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(1 << 23))
    gradients = TaskGradients([parameter], 2)
    for scale in (1.0, -1e-5):
        parameter.grad = 1 + scale * torch.randn(1 << 23, generator=generator)
        gradients.take()
    wanted = (gradients.rows.double() @ gradients.rows.double().T).numpy()
    assert inner_products(gradients.rows).numpy() == pytest.approx(wanted, rel=1e-7)


def test_the_launches_do_not_grow_with_the_parameters() -> None:
    """On torch's meta device, which goes the way of a GPU."""

    def step(parameters: list[nn.Parameter]) -> None:
        gradients = TaskGradients(parameters, 3)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = parameter.detach()
            gradients.take()
        pcgrad(gradients.rows, np.random.default_rng(0))
        gradients.give_first()

    few, many = ([nn.Parameter(torch.zeros(2, 3, device="meta")) for _ in range(count)] for count in (10, 100))
    found = launches(lambda: step(few)).total(), launches(lambda: step(many)).total()
    assert found[0] == found[1] <= 36
