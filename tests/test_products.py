"""products.py: the same numbers as torch's own products, on every path; a run's memory does not grow with shapes."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import linear as products
from kernels.linear import has_onednn, linear, product

ROOT = Path(__file__).resolve().parent.parent
needs_onednn = pytest.mark.skipif(not has_onednn(), reason="a CPU with AVX-512 and oneDNN")


@pytest.fixture(autouse=True)
def even_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 1)


def known(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "plain": lambda: (known(70, 30, seed=1), known(30, 50, seed=2)),
    "transposed": lambda: (known(30, 70, seed=1).t(), known(50, 30, seed=2).t()),
    "columns of a larger one": lambda: (known(70, 60, seed=1)[:, 5:35], known(30, 90, seed=2)[:, 7:57]),
    "every second": lambda: (known(140, 60, seed=1)[::2, ::2], known(60, 100, seed=2)[::2, ::2]),
    "one row, repeated": lambda: (known(1, 30, seed=1).expand(70, 30), known(30, 50, seed=2)),
    "one number, repeated": lambda: (known(1, 1, seed=1).expand(70, 30), known(1, 1, seed=2).expand(30, 50)),
    "thin": lambda: (known(70, 1, seed=1), known(1, 50, seed=2)),
    "a single row": lambda: (known(1, 30, seed=1), known(30, 50, seed=2)),
    "no row": lambda: (known(0, 30, seed=1), known(30, 50, seed=2)),
    "long sums": lambda: (known(9, 5000, seed=1), known(5000, 11, seed=2)),
    "float64": lambda: (known(70, 30, seed=1).double(), known(30, 50, seed=2).double()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_any_layout(layout: str) -> None:
    a, b = LAYOUTS[layout]()
    wanted = a.double() @ b.double()
    found = product(a, b)
    assert found.dtype == a.dtype and found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * a.shape[1] ** 0.5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("trains", [(1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 0, 1), (0, 0, 0)])
def test_linear_and_its_gradients(bias: bool, gelu: bool, trains: tuple[int, int, int]) -> None:
    """Against float64, with each choice of what wants a gradient."""
    values = [known(37, 24, seed=1), known(40, 24, seed=2), known(40, seed=3) if bias else None]
    results = []
    for dtype, function in ((torch.float32, partial(linear, gelu=gelu)), (torch.float64, F.linear)):
        own = [
            None if v is None else v.detach().to(dtype).requires_grad_(bool(t))
            for v, t in zip(values, trains, strict=True)
        ]
        y = function(*own)  # type: ignore[operator]
        y = F.gelu(y) if gelu and dtype == torch.float64 else y
        if y.requires_grad:
            y.backward(known(37, 40, seed=4).to(dtype))
        results.append([y.detach(), *(None if v is None else v.grad for v in own)])
    for found, wanted in zip(*results, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("trains", "kept"), [((1, 0), {(40, 24)}), ((0, 1), {(37, 24)}), ((1, 1), {(40, 24), (37, 24)})]
)
def test_what_is_kept_for_the_gradient(trains: tuple[int, int], kept: set[tuple[int, ...]]) -> None:
    """No input where the weight is frozen, and no weight where the input wants none."""
    x, weight = known(37, 24, seed=1).requires_grad_(bool(trains[0])), known(40, 24, seed=2)
    weight.requires_grad_(bool(trains[1]))
    found: set[tuple[int, ...]] = set()

    def noted(own: Tensor) -> Tensor:
        found.add(tuple(own.shape))
        return own

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda own: own):
        linear(x, weight, known(40, seed=3)).sum().backward()
    assert {tuple(sorted(shape)) for shape in found} == {tuple(sorted(shape)) for shape in kept}


def test_the_gradient_of_a_plain_sum() -> None:
    """Which is one number, expanded."""
    x, weight = known(37, 24, seed=1).requires_grad_(), known(40, 24, seed=2).requires_grad_()
    linear(x, weight, None).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(37, 24), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(40, 24), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_what_takes_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 matrices on the CPU outside autocast, and nothing else; both ways round and for the input's gradient."""
    calls: list[tuple[int, ...]] = []
    fast = products._onednn

    def noting(x: Tensor, weight: Tensor, *more: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return fast(x, weight, *more)

    monkeypatch.setattr(products, "_onednn", noting)
    x, own = known(6, 4, seed=1).requires_grad_(), nn.Linear(4, 5)
    linear(x, own.weight, own.bias).square().sum().backward()
    assert calls == [(6, 4), (6, 5), (5, 6)]
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, own.weight, own.bias).dtype == torch.bfloat16
    linear(x.double(), own.weight.double(), own.bias.double())
    linear(x[None], own.weight, own.bias)
    linear(x.to("meta"), own.weight.to("meta"), own.bias.to("meta"))
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 6 * 4 * 5 + 1)
    linear(x, own.weight, own.bias)
    assert calls == []


@needs_onednn
def test_gelu_is_taken_with_the_product_where_nothing_wants_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit as by itself; where something does, by itself."""
    x, own, calls = known(6, 4, seed=1), nn.Linear(4, 5), []
    wanted = linear(x, own.weight, own.bias, gelu=True)
    monkeypatch.setattr(F, "gelu", calls.append)
    with torch.no_grad():
        assert torch.equal(linear(x, own.weight, own.bias, gelu=True), wanted)
    frozen = own.requires_grad_(False)
    assert torch.equal(linear(x, frozen.weight, frozen.bias, gelu=True), wanted) and calls == []
    linear(x.requires_grad_(), frozen.weight, frozen.bias, gelu=True)
    assert len(calls) == 1


def test_infinities_stay_in_their_row() -> None:
    a = known(20, 30, seed=1)
    a[3, 4], a[7, 1] = torch.inf, torch.nan
    finite = product(a, known(30, 50, seed=2)).isfinite().all(dim=1)
    assert (~finite).nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_product_twice_is_the_same_to_the_bit(threads: int) -> None:
    """With the long sums of a weight's gradient, which threads might share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        grad, x = known(1500, 96, seed=1), known(1500, 64, seed=2)
        first = product(grad.t(), x)
        assert all(torch.equal(product(grad.t(), x), first) for _ in range(20))
    finally:
        torch.set_num_threads(before)


GROWTH = """
import random, torch
from kernels import linear as products
from kernels.linear import product
from utils.device import choose_device, process_peak
choose_device(False, False, 1, print)
x, w = torch.randn(1500, 128), torch.randn(128, 512)
products.MIN_MULTIPLICATIONS = 1
random.seed(0)
def some():
    for _ in range(150):
        rows = x[: random.randint(500, 1500)]
        product(rows, w), product(rows.t(), rows)
some()
before = process_peak()
some(), some()
print(process_peak() - before)
"""


@needs_onednn
def test_ever_new_shapes_do_not_fill_the_memory() -> None:
    """Each shape has a compiled kernel; by oneDNN's own limit, these would take 700 MB."""
    done = subprocess.run([sys.executable, "-c", GROWTH], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6


WITHOUT_KERNELS = """
import re, resource, torch, torch.nn.functional as F
from pathlib import Path
from evaluation.predict import halving
from kernels.linear import linear
torch.set_num_threads(1)
x, weight, bias = torch.randn(900, 256), torch.randn(256, 256), torch.randn(256)
wanted = F.gelu(x.double() @ weight.double().t() + bias.double())

def run(rows):
    return F.gelu(linear(x[rows], weight, bias))

def differ(rows):
    print((torch.cat(halving(run, rows)) - wanted[rows]).abs().max().item())

every = torch.arange(900)
run(every[:5])  # the code is there, and a kernel for each operator

# memory that the process has but does not use: results find room, new kernels ask the system for more
space = torch.empty(5 << 20)
del space
space = torch.empty(4 << 20)
top = [torch.empty(20_000) for _ in range(50)]
del space
taken = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (taken, resource.RLIM_INFINITY))
try:
    run(every[:600])
except RuntimeError as error:
    print(error)
differ(every[:600])
differ(every[:700])
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
differ(every[:800])
differ(every)
"""


@needs_onednn
def test_products_go_on_where_no_kernel_can_be_compiled() -> None:
    """oneDNN compiles nothing more in a process after memory has once failed it, even where there is plenty again."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_KERNELS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *differences = done.stdout.splitlines()
    assert first == "could not create a primitive"
    assert len(differences) == 4 and max(map(float, differences)) < 1e-4
