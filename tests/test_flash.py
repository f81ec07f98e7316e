"""The call of torch's FlashAttention, on a CPU: in its place stands an operator that works by the formula."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_packing import packed, ragged_ids
from test_training import make_trainer
from torch import Tensor

from bert import attention
from kernels import flash_attention as flash
from tasks import DEFAULT_TASKS
from text.packing import PackedBatch, pad_to_bucket


def parts_of(starts_q: Tensor, starts: Tensor, *rows: Tensor) -> Iterator[list[Tensor]]:
    """For each sequence its rows of a query [Q, heads, width] and of others [T, heads, width], as [heads, L, width]."""
    for i in range(len(starts) - 1):
        begins = [starts_q, *[starts] * (len(rows) - 1)]
        yield [own[begin[i] : begin[i + 1]].transpose(0, 1) for own, begin in zip(rows, begins, strict=True)]


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    """The probabilities [heads, L, L]."""
    return (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(dim=2)


def kept(weights: Tensor, dropout: float) -> Tensor:
    """A known pattern of dropout, scaled: every second key is dropped."""
    return torch.arange(weights.shape[2]) % 2 / (1 - dropout) if dropout else torch.ones(weights.shape[2])


def by_formula(query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts: Tensor, dropout: float) -> Tensor:
    """[Q, heads, width]."""
    return torch.cat(
        [
            ((weights * kept(weights, dropout).to(v.dtype)) @ v).transpose(0, 1)
            for q, k, v in parts_of(starts_q, starts, query, key, value)
            for weights in [weights_of(q, k)]
        ]
    )


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts: Tensor, dropout: float
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, by hand: an operator's own are out of autograd's reach."""
    found = []
    for (g, k, v), (q, _) in zip(
        parts_of(starts_q, starts, grad, key, value), parts_of(starts_q, starts, query, key), strict=True
    ):
        weights = weights_of(q, k)
        keep = kept(weights, dropout).to(v.dtype)
        into = (g @ v.transpose(1, 2)) * keep
        scores = weights * (into - (into * weights).sum(dim=2, keepdim=True)) * q.shape[2] ** -0.5
        found.append([scores @ k, scores.transpose(1, 2) @ q, (weights * keep).transpose(1, 2) @ g])
    return tuple(torch.cat([own.transpose(0, 1) for own in column]) for column in zip(*found, strict=True))


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, float]]]:
    """torch's operator and its gradient on a CPU; yields the longest lengths and the dropout of each call."""
    calls: list[tuple[int, int, float]] = []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts: Tensor, longest_q: int, longest: int, dropout: float,
        causal: bool, debug: bool, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert starts_q.dtype == starts.dtype == torch.int32 and not causal
        assert options["scale"] == q.shape[2] ** -0.5
        assert int(starts_q.diff().max()) <= longest_q and int(starts.diff().max()) <= longest
        assert (starts_q[-1], starts[-1]) == (len(q), len(k))
        calls.append((longest_q, longest, dropout))
        empty = torch.empty(0)
        return by_formula(q, k, v, starts_q, starts, dropout), empty, empty, empty, empty

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts_q: Tensor, starts: Tensor,
        longest_q: int, longest: int, dropout: float, *rest: Any, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return gradients(grad, q, k, v, starts_q, starts, dropout)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        monkeypatch.setattr(flash, "usable", lambda query, key, value, heads: True)
        yield calls


def both(batch: PackedBatch, cls_only: bool, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Output and gradients of `attention`, by the operator and by padded groups."""
    out = []
    for use in (True, False):
        monkeypatch.setattr(flash, "usable", lambda *_, use=use: use)
        generator = torch.Generator().manual_seed(3)
        query, key, value = torch.randn(3, batch.num_tokens, 16, dtype=torch.float64, generator=generator)
        if cls_only:
            query = query[: batch.num_sequences]
        leaves = [own.clone().requires_grad_() for own in (query, key, value)]
        result = attention(*leaves, batch, 2, 0.0, cls_only)
        weights = torch.randn(result.shape, dtype=torch.float64, generator=generator)
        out.append([result, *torch.autograd.grad((result * weights).sum(), leaves)])
    return out


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("lengths", [[5, 1, 7, 3, 3], [1, 1, 1], [9]])
def test_the_same_numbers_as_padded_groups(
    operator: list[tuple[int, int, float]],
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    tail: bool,
    cls_only: bool,
) -> None:
    batch = packed(ragged_ids(lengths, np.random.default_rng(0)))
    batch = pad_to_bucket(batch) if tail else batch
    for found, wanted in zip(*both(batch, cls_only, monkeypatch), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert len(operator) == 1
    assert operator[0][0] == (1 if cls_only or batch.num_tokens == batch.num_sequences else batch.max_seqlen)


def test_a_whole_model_by_the_operator(
    operator: list[tuple[int, int, float]], monkeypatch: pytest.MonkeyPatch, tiny_flags: list[str], tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "v1")
    model = trainer.model.eval()
    for task in DEFAULT_TASKS:
        batch = trainer.train_data[task].batch(np.arange(9))
        found = model(task, batch)
        with monkeypatch.context() as patch:
            patch.setattr(flash, "usable", lambda *_: False)
            torch.testing.assert_close(found, model(task, batch), rtol=0, atol=1e-5)
    assert len(operator) == 6 and {dropout for *_, dropout in operator} == {0.0}  # two layers
    model.train()
    model("sst", trainer.train_data["sst"].batch(np.arange(9)))
    assert {dropout for *_, dropout in operator[6:]} == {0.1}


def test_the_call_is_one_that_torch_knows() -> None:
    """Names, types and order of the operator's arguments, and its gradient, by torch's own rules of shapes."""
    query, key = (torch.empty(n, 4, 32, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (3, 20))
    starts = torch.empty(4, dtype=torch.int32, device="meta")
    out = flash.attend(query, key, key, starts, starts, 9, 0.1)
    assert (out.shape, out.dtype) == (query.shape, torch.bfloat16)
    out.sum().backward()
    assert query.grad is not None and query.grad.shape == query.shape


def test_the_trial_accepts_what_is_right(operator: list[tuple[int, int, float]]) -> None:
    flash.check_kernel(torch.device("cpu"), torch.float32, 16)
    assert [dropout for *_, dropout in operator] == [0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda right, q, k, v, *starts, dropout: right(q, k, v, *starts, 0.0), "it loses dropout"),
        (lambda right, q, k, *rest, dropout: right(k, q, *rest, dropout), "its numbers are not those of the formula"),
    ],
)
def test_the_trial_refuses_what_is_wrong(
    operator: list[tuple[int, int, float]], monkeypatch: pytest.MonkeyPatch, broken: Any, reason: str
) -> None:
    right = by_formula
    monkeypatch.setitem(globals(), "by_formula", lambda *args: broken(right, *args[:-1], dropout=args[-1]))
    with pytest.raises(RuntimeError, match=reason):
        flash.check_kernel(torch.device("cpu"), torch.float32, 16)


def test_the_trial_refuses_other_masks_backwards(
    operator: list[tuple[int, int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gradients
    monkeypatch.setitem(globals(), "gradients", lambda *args: right(*args[:-1], 0.0))
    with pytest.raises(RuntimeError, match="its gradients are not those of its dropout"):
        flash.check_kernel(torch.device("cpu"), torch.float32, 16)


def test_an_evaluation_may_be_the_first_to_try(
    operator: list[tuple[int, int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial needs gradients, which evaluation has switched off, and exact types, which autocast changes."""
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    flash.works.cache_clear()
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        assert flash.works(torch.device("cpu"), torch.bfloat16, 16)
    flash.works.cache_clear()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Only Ampere GPUs or newer.\nmore", "Only Ampere GPUs or newer."),
        ("\n  Only Ampere GPUs or newer.\nmore", "Only Ampere GPUs or newer."),
        ("", "RuntimeError"),
    ],
)
def test_where_it_does_not_work_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str, reason: str
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(flash, "check_kernel", fails)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: "state")
    states: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.append(state))
    flash.works.cache_clear()
    with caplog.at_level(logging.WARNING, "minbert"):
        for _ in range(3):
            assert not flash.works(torch.device("cuda"), torch.bfloat16, 64)
    flash.works.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        f"attention: torch's FlashAttention does not work here ({reason}); going on with padded groups"
    ]
    assert states == ["state"]  # dropout draws what it would have drawn


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 17), (torch.bfloat16, 264)])
def test_what_the_kernel_does_not_take(dtype: torch.dtype, width: int) -> None:
    assert not flash.works(torch.device("cuda"), dtype, width)


class OnGpu:
    """What is asked of rows [N, 64] there."""

    device = torch.device("cuda")

    def __init__(self, rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = (rows, 64), dtype

    def __len__(self) -> int:
        return self.shape[0]


def test_a_shard_without_examples_goes_by_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses it: "batch size must be positive"."""
    monkeypatch.setattr(flash, "works", lambda *_: True)
    monkeypatch.setattr(flash, "calls", Counter())
    for rows in (4, 0):
        own: Any = OnGpu(rows)
        assert flash.usable(own, own, own, 2) == (rows > 0)
    assert flash.calls == {"flash": 1}


@pytest.mark.parametrize(
    ("query", "key", "asked", "counted"),
    [
        (torch.bfloat16, torch.bfloat16, [(torch.device("cuda"), torch.bfloat16, 32)], {"flash": 1}),
        (torch.bfloat16, torch.float32, [], {"groups": 1}),
        (torch.float32, torch.float32, [], {}),  # where nobody expects it
    ],
)
def test_the_kernel_takes_rows_of_one_half_precision(
    monkeypatch: pytest.MonkeyPatch, query: torch.dtype, key: torch.dtype, asked: list[Any], counted: dict[str, int]
) -> None:
    """It is asked for the width of a head."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(flash, "works", lambda *given: not seen.append(given))
    monkeypatch.setattr(flash, "calls", Counter())
    rows: list[Any] = [OnGpu(4, dtype) for dtype in (query, key, query)]
    assert flash.usable(*rows, 2) == bool(asked)
    assert seen == asked and flash.calls == counted


def test_a_cpu_has_padded_groups() -> None:
    before = dict(flash.calls)
    assert not flash.usable(*torch.zeros(3, 4, 16, dtype=torch.bfloat16), 2)
    assert dict(flash.calls) == before
