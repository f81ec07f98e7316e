"""The word embedding's gradient in reused memory, and that of few rows by one product, against torch's."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.embedding import SmallEmbedding, WordEmbedding, gradient_of_few_rows

Tables = tuple[WordEmbedding, nn.Embedding]


@pytest.fixture
def tables() -> Tables:
    """A WordEmbedding and torch's with the same weights."""
    torch.manual_seed(0)
    ours, theirs = WordEmbedding(50, 6, padding_idx=3), nn.Embedding(50, 6, padding_idx=3)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def backward(tables: Tables, seed: int, add: bool = False) -> tuple[Tensor, Tensor]:
    """Return the gradients of a batch of words, with repeats and padding, instead of or added to the former ones."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.randint(0, 50, (12,), generator=generator), torch.tensor([3, 7, 7])])
    weights = torch.randn(len(ids), 6, generator=generator)
    for table in tables:
        if not add:
            table.zero_grad(set_to_none=True)
        (table(ids) * weights).sum().backward()
    return grads(tables)


def grads(tables: Tables) -> tuple[Tensor, Tensor]:
    found, wanted = (table.weight.grad for table in tables)
    assert found is not None and wanted is not None
    return found, wanted


def test_gradients_are_in_the_same_memory(tables: Tables) -> None:
    places = set()
    for seed in range(5):
        found, wanted = backward(tables, seed)
        assert torch.equal(found, wanted) and wanted.any()
        places.add(found.data_ptr())
        del found, wanted
    assert len(places) == 1


def test_a_gradient_that_is_kept_stays(tables: Tables) -> None:
    """Whether by the caller, or to be added to."""
    kept = [backward(tables, seed) for seed in range(3)]
    assert all(torch.equal(found, wanted) for found, wanted in kept)
    for seed, add in ((7, True), (8, True), (9, False)):
        assert torch.equal(*backward(tables, seed, add))


@pytest.mark.parametrize("change", [lambda grad: grad.add_(1.0), lambda grad: grad.mul_(torch.nan)])
def test_a_gradient_may_be_changed(tables: Tables, change: Callable[[Tensor], object]) -> None:
    """As clipping does. Rows that the batch did not reach are cleared, too."""
    change(backward(tables, 1)[0])
    place = grads(tables)[0].data_ptr()
    found, wanted = backward(tables, 2)
    assert torch.equal(found, wanted) and found.data_ptr() == place


def test_words_of_the_batch_before_may_be_overwritten(tables: Tables) -> None:
    ids = torch.tensor([4, 8, 8])
    for words in ([4, 8, 8], [5, 9, 9]):
        ids.copy_(torch.tensor(words))
        for table in tables:
            table.zero_grad(set_to_none=True)
            table(ids).square().sum().backward()
    assert torch.equal(*grads(tables))


def test_words_used_twice_in_one_pass_and_in_another_precision(tables: Tables) -> None:
    for dtype in (torch.float32, torch.float64):
        for table in tables:
            table.to(dtype).zero_grad(set_to_none=True)
            first, second = table(torch.tensor([[1, 3], [1, 49]])), table(torch.tensor([49, 2]))
            (first.square().sum() * second.sin().sum()).backward()
        found, wanted = grads(tables)
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    tables[0].weight.requires_grad_(False)
    assert not tables[0](torch.tensor([1])).requires_grad


@pytest.mark.parametrize(("rows", "reached", "tokens"), [(2, 2, 50), (40, 9, 50), (40, 9, 0)])
def test_the_gradient_of_few_rows_by_one_product(rows: int, reached: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, reached, (tokens,), generator=generator)
    grad = torch.randn(tokens, 6, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient_of_few_rows(ids, grad, rows, reached)
    wanted = torch.zeros(rows, 6, dtype=torch.float64).index_add(0, ids, grad.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reached", [None, 9, 99])
def test_a_table_of_few_rows_off_the_cpu_is_not_given_to_torchs_kernel(reached: int | None) -> None:
    """On torch's meta device, which goes the way of a GPU."""
    table, seen = SmallEmbedding(40, 6, device="meta"), Counter()  # type: ignore[var-annotated]

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    with Seen():
        out = table(torch.zeros(5, 3, dtype=torch.long, device="meta"), reached)
        out.sum().backward()
    assert out.shape == (5, 3, 6) and table.weight.grad is not None and table.weight.grad.shape == (40, 6)
    assert seen["mm"] == 1 and seen["embedding_dense_backward"] == 0
