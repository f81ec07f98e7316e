"""The calls of torch's kernels of attention, on a CPU: operators that work by the formula stand in their place."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import weighted_sum
from torch import Tensor

from bert import attention
from kernels import varlen_attention as varlen
from text.packing import PackedBatch, pack_padded, pad_to_bucket


class Operator:
    """torch's operator and its gradient on a CPU. It notes the longest lengths and the dropout of each call.

    Dropout drops every second key. `forward_dropout` and `backward_dropout` say what the operator makes of it.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, float]] = []
        self.forward_dropout = self.backward_dropout = lambda dropout: dropout
        self.swapped = False

    def compute(self, q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts: Tensor, dropout: float) -> Tensor:
        q, k = (k, q) if self.swapped else (q, k)
        return by_formula(q, k, v, starts_q, starts, dropout)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts: Tensor, longest_q: int, longest: int,
        dropout: float, causal: bool, debug: bool, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert starts_q.dtype == starts.dtype == torch.int32 and not causal
        assert options["scale"] == q.shape[2] ** -0.5
        assert int(starts_q.diff().max()) <= longest_q and int(starts.diff().max()) <= longest
        assert (starts_q[-1], starts[-1]) == (len(q), len(k))
        self.calls.append((longest_q, longest, dropout))
        empty = torch.empty(0)
        return self.compute(q, k, v, starts_q, starts, self.forward_dropout(dropout)), empty, empty, empty, empty

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts_q: Tensor, starts: Tensor,
        longest_q: int, longest: int, dropout: float, *rest: Any, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return gradients(grad, q, k, v, starts_q, starts, self.backward_dropout(dropout))

    def efficient_forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, starts_q: Tensor, starts: Tensor, longest_q: int,
        longest: int, dropout: float, mask: int, compute_log_sumexp: bool, *, scale: float, **_: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert bias is None and mask == 0 and compute_log_sumexp and len(q) == len(k) == len(v) == 1
        lengths = longest_q, longest
        out, *empty = self.forward(q[0], k[0], v[0], starts_q, starts, *lengths, dropout, False, False, scale=scale)
        return out[None], *empty[:3], longest_q, longest

    def efficient_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, starts_q: Tensor, starts: Tensor,
        longest_q: int, longest: int, sums: Tensor, dropout: float, *rest: Any, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dropout = self.backward_dropout(dropout)
        return *(x[None] for x in gradients(grad[0], q[0], k[0], v[0], starts_q, starts, dropout)), torch.empty(0)


def by_formula(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, starts: Tensor, dropout: float
) -> Tensor:
    """Do what FlashAttention does on a GPU, one sequence at a time, but drop every second key if there is dropout.

    `query` and the result are [Q, heads, width], `key` and `value` [T, heads, width].
    """
    out = []
    for i in range(len(starts) - 1):
        q = query[query_starts[i] : query_starts[i + 1]].transpose(0, 1)  # [heads, Q, width]
        k, v = (x[starts[i] : starts[i + 1]].transpose(0, 1) for x in (key, value))
        weights = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(dim=2)
        if dropout:
            weights = weights * (torch.arange(k.shape[1]) % 2 / (1 - dropout)).to(v.dtype)
        out.append((weights @ v).transpose(0, 1))
    return torch.cat(out)


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts: Tensor, dropout: float
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, by hand: inside an operator there is no autograd."""
    found = []
    for i in range(len(starts) - 1):
        of_query, of_key = slice(starts_q[i], starts_q[i + 1]), slice(starts[i], starts[i + 1])
        q, g = (x[of_query].transpose(0, 1) for x in (query, grad))  # [heads, Q, width]
        k, v = (x[of_key].transpose(0, 1) for x in (key, value))
        weights = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(dim=2)
        keep = (torch.arange(k.shape[1]) % 2 / (1 - dropout) if dropout else torch.ones(k.shape[1])).to(v.dtype)
        into = (g @ v.transpose(1, 2)) * keep
        scores = weights * (into - (into * weights).sum(dim=2, keepdim=True)) * q.shape[2] ** -0.5
        found.append([scores @ k, scores.transpose(1, 2) @ q, (weights * keep).transpose(1, 2) @ g])
    return tuple(torch.cat([x.transpose(0, 1) for x in column]) for column in zip(*found, strict=True))


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operator]:
    operator = Operator()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", operator.forward, "CPU")
        library.impl("_flash_attention_backward", operator.backward, "CPU")
        library.impl("_efficient_attention_forward", operator.efficient_forward, "CPU")
        library.impl("_efficient_attention_backward", operator.efficient_backward, "CPU")
        yield operator


def batch_of(lengths: list[int]) -> PackedBatch:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pack_padded(mask.long(), mask)


@pytest.mark.parametrize("kernel", varlen.KERNELS)
@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("lengths", [[5, 1, 7, 3, 3], [1, 1, 1], [9]])
def test_the_same_numbers_as_padded_groups(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, lengths: list[int], tail: bool, cls_only: bool, kernel: str
) -> None:
    batch = pad_to_bucket(batch_of(lengths)) if tail else batch_of(lengths)
    results = []
    for use in (kernel, None):
        monkeypatch.setattr(varlen, "choose_kernel", lambda *_, use=use: use)
        torch.manual_seed(3)
        query, key, value = torch.randn(3, batch.num_tokens, 16, dtype=torch.float64)
        query = query[: batch.num_sequences] if cls_only else query
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = attention(*leaves, batch, 2, 0.0, cls_only)
        results.append([out, *torch.autograd.grad(weighted_sum(out), leaves)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    ((longest_query, *_),) = operator.calls
    assert longest_query == (1 if cls_only or batch.num_tokens == batch.num_sequences else batch.max_seqlen)


@pytest.mark.parametrize("kernel", varlen.KERNELS)
def test_the_call_is_one_that_torch_knows(kernel: str) -> None:
    """Names, types and order of the operator's arguments, and its gradient, by torch's own rules of shapes."""
    query, key = (torch.empty(n, 4, 32, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (3, 20))
    starts = torch.empty(4, dtype=torch.int32, device="meta")
    out = varlen.attend(kernel, query, key, key, starts, starts, 9, 0.1)
    assert (out.shape, out.dtype) == (query.shape, torch.bfloat16)
    if kernel == "memory-efficient":  # torch's rule of the shapes of its gradient lacks an argument
        return
    out.sum().backward()
    assert query.grad is not None and query.grad.shape == query.shape


@pytest.mark.parametrize("kernel", varlen.KERNELS)
def test_the_check_accepts_what_is_right_and_refuses_what_is_wrong(operator: Operator, kernel: str) -> None:
    def check() -> None:
        varlen.check_kernel(kernel, torch.device("cpu"), torch.float32, 16)

    check()
    assert [dropout for *_, dropout in operator.calls] == [0.0, 0.5, 0.5]
    operator.forward_dropout = lambda dropout: 0.0
    with pytest.raises(RuntimeError, match="it loses dropout"):
        check()
    operator.forward_dropout = lambda dropout: dropout
    operator.backward_dropout = lambda dropout: 0.0
    with pytest.raises(RuntimeError, match="its gradients are not those of its dropout"):
        check()
    operator.swapped = True
    with pytest.raises(RuntimeError, match="its numbers are not those of the formula"):
        check()


def test_an_evaluation_may_be_the_first_to_try(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check needs gradients, which evaluation has switched off, and exact types, which autocast changes."""
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    varlen.works.cache_clear()
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        assert varlen.works("flash", torch.device("cpu"), torch.bfloat16, 16)
    varlen.works.cache_clear()


@pytest.mark.parametrize(
    ("text", "reason"),
    [("\n  Only Ampere GPUs or newer.\nmore", "Only Ampere GPUs or newer."), ("", "RuntimeError")],
)
def test_where_it_does_not_work_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str, reason: str
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(varlen, "check_kernel", fails)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: "state")
    states: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.append(state))
    varlen.works.cache_clear()
    with caplog.at_level(logging.WARNING, "minbert"):
        for _ in range(3):
            assert varlen.first_working(torch.device("cuda"), torch.bfloat16, 64) is None
    varlen.works.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        f"attention: torch's {kernel} kernel does not work here ({reason}); going on without it"
        for kernel in ("flash", "memory-efficient")
    ]
    assert states == ["state"] * 2  # dropout draws what it would have drawn


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 17), (torch.bfloat16, 264)])
def test_what_flash_attention_does_not_take(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int) -> None:
    """The other kernel is tried then."""
    monkeypatch.setattr(varlen, "check_kernel", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    varlen.works.cache_clear()
    assert varlen.first_working(torch.device("cuda"), dtype, width) == "memory-efficient"
    varlen.works.cache_clear()


class OnGpu:
    """What `choose_kernel` asks of rows [N, 64] on a GPU."""

    device = torch.device("cuda")

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (rows, 64), dtype

    def __len__(self) -> int:
        return self.shape[0]


@pytest.mark.parametrize(
    ("rows", "query", "key", "asked", "counted"),
    [
        (4, torch.bfloat16, torch.bfloat16, [(torch.device("cuda"), torch.bfloat16, 32)], {"flash": 1}),
        (0, torch.bfloat16, torch.bfloat16, [], {}),  # the kernel refuses a shard without examples
        (4, torch.bfloat16, torch.float32, [], {"groups": 1}),
        (4, torch.float32, torch.float32, [(torch.device("cuda"), torch.float32, 32)], {"flash": 1}),
    ],
)
def test_a_kernel_takes_rows_of_one_type(
    monkeypatch: pytest.MonkeyPatch, rows: int, query: torch.dtype, key: torch.dtype, asked: Any, counted: Any
) -> None:
    """It is asked for the width of a head."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(varlen, "first_working", lambda *given: seen.append(given) or "flash")
    monkeypatch.setattr(varlen, "calls", Counter())
    given: list[Any] = [OnGpu(rows, dtype) for dtype in (query, key, query)]
    assert varlen.choose_kernel(*given, 2) == ("flash" if asked else None)
    assert seen == asked and varlen.calls == counted
    assert varlen.choose_kernel(*torch.zeros(3, 4, 16, dtype=torch.bfloat16), 2) is None  # on a CPU
    assert varlen.calls == counted
