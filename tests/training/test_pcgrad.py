"""PCGrad against the algorithm written out on whole vectors."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.pcgrad import PCGrad, combine, conflicts, inner_products, projected_shares

SHAPES = [(3, 4), (5,), (2, 2, 2)]


def random_gradients(count: int, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES] for _ in range(count)]


def flat(gradient: list[Tensor]) -> np.ndarray:
    return torch.cat([own.flatten() for own in gradient]).numpy()


def by_the_algorithm(vectors: list[np.ndarray], order: np.random.Generator) -> np.ndarray:
    """Yu et al. 2020, Algorithm 1, the sum of the projected gradients."""
    total = np.zeros_like(vectors[0])
    for i, own in enumerate(vectors):
        projected = own.copy()
        for j in order.permutation([j for j in range(len(vectors)) if j != i]):
            if projected @ vectors[j] < 0:
                projected -= projected @ vectors[j] / (vectors[j] @ vectors[j]) * vectors[j]
        total += projected
    return total


def surgery(gradients: list[list[Tensor]], seed: int = 5) -> list[Tensor | None]:
    return combine(gradients, projected_shares(inner_products(gradients), np.random.default_rng(seed)))


def test_the_example_with_the_original_gradients() -> None:
    """(1,0) and (-1,1): each is projected on the other's ORIGINAL gradient."""
    found = surgery([[torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]])
    assert found[0] is not None and found[0].tolist() == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_algorithm(count: int, seed: int) -> None:
    common, *gradients = random_gradients(count + 1, seed)
    signs = np.resize([1, -1], count)  # for and against a common direction, so that some conflict
    gradients = [[a + s * b for a, b in zip(g, common, strict=True)] for s, g in zip(signs, gradients, strict=True)]
    wanted = by_the_algorithm([flat(own) for own in gradients], np.random.default_rng(seed + 40))
    found = surgery(gradients, seed + 40)
    assert flat([own for own in found if own is not None]) == pytest.approx(wanted, abs=1e-12)
    assert not np.allclose(wanted, sum(flat(own) for own in gradients))  # something was projected


def test_without_conflict_it_is_the_plain_sum() -> None:
    gradients = [[own.abs() for own in gradient] for gradient in random_gradients(3)]
    for found, own in zip(surgery(gradients), zip(*gradients, strict=True), strict=True):
        torch.testing.assert_close(found, sum(own), rtol=1e-14, atol=0)


def test_the_order_of_projections_matters_and_is_seeded() -> None:
    gradients = random_gradients(3, 2)
    results = {tuple(np.round(flat([g for g in surgery(gradients, seed) if g is not None]), 9)) for seed in range(12)}
    again = {tuple(np.round(flat([g for g in surgery(gradients, seed) if g is not None]), 9)) for seed in range(12)}
    assert len(results) > 1 and results == again


def test_each_step_has_an_order_of_its_own() -> None:
    """That of (seed, step), the same gradients in all of them."""
    gradients, found = random_gradients(3, 2), []
    parameters = [nn.Parameter(torch.zeros_like(own)) for own in gradients[0]]
    pcgrad = PCGrad(parameters, seed=5)
    for step in range(6):
        for gradient in gradients:
            for parameter, own in zip(parameters, gradient, strict=True):
                parameter.grad = own.clone()
            pcgrad.take()
        pcgrad.put()
        found.append(flat([own.grad for own in parameters if own.grad is not None]))
        wanted = by_the_algorithm([flat(own) for own in gradients], np.random.default_rng([5, step]))
        assert found[step] == pytest.approx(wanted, abs=1e-12)
    assert any(not np.allclose(found[0], own) for own in found)


def test_parameters_that_a_task_does_not_reach() -> None:
    """They count as zero; a parameter that none reaches, as a frozen one, keeps no gradient."""
    first, second = random_gradients(2, 3)
    holes = [[first[0], None, None], [second[0], second[1], None]]
    zeros = [[first[0], torch.zeros(5).double(), torch.zeros(2, 2, 2).double()], [*second[:2], torch.zeros(2, 2, 2)]]
    found = combine(holes, projected_shares(inner_products(holes), np.random.default_rng(1)))
    wanted = by_the_algorithm([flat(own) for own in zeros], np.random.default_rng(1))
    assert found[2] is None
    assert found[0] is not None and found[1] is not None
    assert flat([found[0], found[1]]) == pytest.approx(wanted[:17], abs=1e-12)


def test_a_gradient_of_zero_changes_nothing() -> None:
    (first,) = random_gradients(1)
    found = surgery([first, [torch.zeros_like(own) for own in first]])
    for own, wanted in zip(found, first, strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=0)


def test_conflicts_are_counted_by_pairs() -> None:
    gradients = [[torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])], [torch.tensor([0.0, 1.0])]]
    found, pairs = conflicts(inner_products(gradients))
    assert (found.item(), pairs) == (1.0, 3)
