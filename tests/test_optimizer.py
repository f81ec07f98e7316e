"""The optimizers against torch.optim and numpy in float64, and the schedules against torch's schedulers."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optimizer
from optimizer import OPTIMIZERS, SCHEDULES, Adam, Adamax, AdamW, RAdam, Schedule, SparseAdam
from utils.errors import UserError

SHAPES: list[tuple[int, ...]] = [(41, 13), (), (7,), (5, 3), (300,), (2, 3, 4)]  # the first and fifth fill pieces


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 64 elements in all, so that small tensors are cut."""
    monkeypatch.setattr(optimizer, "ELEMENTS_PER_THREAD", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def make_params(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def set_grads(params: list[nn.Parameter], seed: int) -> None:
    """Gradients of very different scales, with zeros in them, as rows of an embedding have."""
    generator = torch.Generator().manual_seed(seed)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator, dtype=param.dtype) * 10.0 ** (i - 3)
        param.grad = grad * (torch.rand(param.shape, generator=generator, dtype=param.dtype) < 0.7)


def max_difference(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def train(opt: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        opt.step()


@pytest.fixture(params=["kernel", "formula"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of Adam and AdamW: torch's kernel, and the formula where it does not apply."""
    if request.param == "formula":
        monkeypatch.setattr(optimizer, "kernel_takes", lambda *_: False)
    return str(request.param)


LR = {"lr": 1e-2}
DECAY = {**LR, "weight_decay": 0.1}
TORCH_PAIRS: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[..., Any], dict[str, Any]]] = {
    "AdamW": (AdamW, {**LR, "eps": 1e-100}, torch.optim.AdamW, {**LR, "eps": 1e-100, "weight_decay": 0.0}),
    "Adam": (Adam, DECAY, torch.optim.Adam, DECAY),
    "Adam eps": (Adam, {**LR, "eps": 0.1}, torch.optim.Adam, {**LR, "eps": 0.1}),
    "Adam decoupled": (Adam, {**DECAY, "decoupled": True}, torch.optim.AdamW, DECAY),
    "Adamax": (Adamax, DECAY, torch.optim.Adamax, DECAY),
    "Adamax eps": (Adamax, {**LR, "eps": 0.1}, torch.optim.Adamax, {**LR, "eps": 0.1}),
    "RAdam": (RAdam, {**DECAY, "eps": 0.1}, torch.optim.RAdam, {**DECAY, "eps": 0.1}),
    "RAdam decoupled": (
        RAdam, {**DECAY, "decoupled": True}, torch.optim.RAdam, {**DECAY, "decoupled_weight_decay": True},
    ),
    "SGD": (optimizer.SGD, DECAY, torch.optim.SGD, {**DECAY, "momentum": 0.9, "nesterov": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH_PAIRS)
def test_equals_torch_over_1000_steps(name: str, small_pieces: None, path: str) -> None:
    our_class, our_options, torch_class, torch_options = TORCH_PAIRS[name]
    ours, theirs = make_params(), make_params()
    opt = our_class(ours, **our_options)
    reference = torch_class(theirs, foreach=False, **torch_options)
    train(opt, ours, range(1000))
    train(reference, theirs, range(1000))
    moved = max_difference(ours, make_params())
    assert moved > 0.1
    assert max_difference(ours, theirs) < 2e-14 * max(1.0, moved)


def test_decoupled_adamax_shrinks_the_weights_first() -> None:
    ours, theirs = make_params(), make_params()
    opt = Adamax(ours, lr=1e-2, weight_decay=0.1, decoupled=True)
    reference = torch.optim.Adamax(theirs, lr=1e-2)
    for step in range(50):
        train(opt, ours, range(step, step + 1))
        with torch.no_grad():
            for param in theirs:
                param.mul_(1 - 1e-2 * 0.1)
        train(reference, theirs, range(step, step + 1))
    assert max_difference(ours, theirs) < 1e-12


def test_sparse_adam_equals_torch() -> None:
    ours, theirs = (nn.Embedding(50, 8, sparse=True, dtype=torch.float64) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    opt, reference = SparseAdam(ours.parameters(), lr=1e-2), torch.optim.SparseAdam(theirs.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    start = ours.weight.detach().clone()
    for _ in range(200):
        ids = torch.randint(0, 40, (12,), generator=generator)  # with repeats; rows 40 to 49 are never used
        target = torch.randn(12, 8, generator=generator, dtype=torch.float64)
        for embedding, stepper in ((ours, opt), (theirs, reference)):
            stepper.zero_grad()
            (embedding(ids) - target).pow(2).sum().backward()
            stepper.step()
    assert (ours.weight - theirs.weight).abs().max() < 1e-12
    assert torch.equal(ours.weight[40:], start[40:]) and not torch.equal(ours.weight[:40], start[:40])
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(opt.state[ours.weight][name], reference.state[theirs.weight][name])


def adamw_reference(
    weight: np.ndarray, grads: list[np.ndarray], lr: float, eps: float, decay: float, correct_bias: bool
) -> np.ndarray:
    """The handout's algorithm: uncorrected eps, and decay by the plain rate on the updated weight."""
    weight, m, v = weight.copy(), 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        rate = lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) if correct_bias else lr
        weight -= rate * m / (np.sqrt(v) + eps)
        weight -= lr * decay * weight
    return weight


@pytest.mark.parametrize("correct_bias", [True, False])
def test_adamw_places_eps_and_decay_as_the_handout(correct_bias: bool, path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(61, 3, 4, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {"lr": 0.05, "eps": 0.1, "weight_decay": 0.3}  # large, so that their places show
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opt, other = AdamW([ours], correct_bias=correct_bias, **options), torch.optim.AdamW([theirs], **options)
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        opt.step()
        other.step()
    expected = adamw_reference(start.numpy(), [g.numpy() for g in grads], 0.05, 0.1, 0.3, correct_bias)
    assert np.abs(ours.detach().numpy() - expected).max() < 1e-13
    assert (ours - theirs).abs().max() > 1e-3


def test_adamw_on_the_course_problem(path: str) -> None:
    """The handout's check: a 3 to 2 linear map, 1000 float32 steps on seed 0."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    opt = AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, correct_bias=True)
    for _ in range(1000):
        x = torch.from_numpy(rng.uniform(size=3)).float()
        y = torch.stack([x[0] + x[1], -x[2]])
        opt.zero_grad()
        (y - model(x)).pow(2).sum().backward()
        opt.step()
    figures = [[0.5548, 0.8666, 0.0729], [-0.4473, -0.2951, -0.2717]]
    np.testing.assert_allclose(model.weight.detach().numpy(), figures, atol=1e-4)


def optimizer_classes() -> list[str]:
    return [name for name in OPTIMIZERS if name != "SparseAdam"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", optimizer_classes())
def test_pieces_change_no_bit(name: str, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for elements in (1, 37, 64, 10**9):
        monkeypatch.setattr(optimizer, "ELEMENTS_PER_THREAD", elements)
        params = make_params(dtype=dtype)
        train(OPTIMIZERS[name](params, lr=1e-2, weight_decay=0.1), params, range(10))
        results.append(params)
    for params in results[:-1]:
        torch.testing.assert_close(params, results[-1], rtol=0, atol=0)


def test_cache_sized_covers_every_element_once_in_pieces_of_the_size() -> None:
    rows = [(torch.arange(n), torch.arange(n) + 1) for n in (3, 100, 5, 64, 1, 130)]
    pieces = list(optimizer.cache_sized(rows, 64))
    for column in (0, 1):
        seen = torch.cat([chunk for piece in pieces for chunk in piece[column]])
        assert torch.equal(seen, torch.cat([row[column] for row in rows]))
    assert [sum(chunk.numel() for chunk in piece[0]) for piece in pieces] == [3, 64, 41, 64, 1, 64, 64, 2]


@pytest.mark.parametrize("name", optimizer_classes())
def test_non_contiguous_parameters_and_gradients(name: str, small_pieces: None) -> None:
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(30, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    plain, mixed, transposed = (nn.Parameter(x) for x in (start.clone(), start.clone(), start.t().contiguous().t()))
    opt = OPTIMIZERS[name]([transposed, plain, mixed], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        plain.grad, transposed.grad, mixed.grad = grad.clone(), grad.clone(), grad.t().contiguous().t()
        opt.step()
    assert not transposed.is_contiguous() and mixed.grad is not None and not mixed.grad.is_contiguous()
    for other in (transposed, mixed):  # the kernel takes contiguous tensors alone and rounds differently
        torch.testing.assert_close(other, plain, rtol=0, atol=1e-14)
    assert not torch.equal(plain, start)


@pytest.mark.parametrize("name", optimizer_classes())
def test_frozen_parameters_have_no_state_and_start_at_step_one(name: str, small_pieces: None) -> None:
    params, alone = make_params(), make_params()
    opt = OPTIMIZERS[name](params, lr=1e-2, weight_decay=0.1)
    late, late_alone = params[0], alone[0]
    before = late.detach().clone()
    for step in range(4):
        set_grads(params, step)
        late.grad = None
        opt.step()
    assert torch.equal(late, before) and late not in opt.state

    opt_alone = OPTIMIZERS[name]([late_alone], lr=1e-2, weight_decay=0.1)
    for step in range(4, 14):  # past the fifth step, where RAdam changes its formula
        set_grads(params, step)
        late_alone.grad = late.grad.clone()  # type: ignore[union-attr]
        opt.step()
        opt_alone.step()
    assert opt.state[late]["step"] == 10 and opt.state[params[1]]["step"] == 14
    assert torch.equal(late, late_alone)


@pytest.mark.parametrize("name", optimizer_classes())
def test_state_dict_through_a_file_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    params = make_params(dtype=torch.float32)
    opt = OPTIMIZERS[name](params, lr=1e-2, weight_decay=0.1)
    train(opt, params[:-1], range(7))  # the last parameter has no state yet
    torch.save(opt.state_dict(), tmp_path / "optimizer.pt")
    resumed = [nn.Parameter(param.detach().clone()) for param in params]
    opt_resumed = OPTIMIZERS[name](resumed, lr=123.0)
    opt_resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(opt, params, range(7, 14))
    train(opt_resumed, resumed, range(7, 14))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    assert [opt_resumed.state[p]["step"] for p in resumed] == [14] * (len(resumed) - 1) + [7]


@pytest.mark.parametrize("name", optimizer_classes())
def test_optimizers_that_share_parameters_keep_their_own_state(name: str) -> None:
    params = make_params()
    first, second = (OPTIMIZERS[name](p, lr=1e-2, weight_decay=0.1) for p in (params[:4], params[2:]))
    for step in range(2):
        set_grads(params, step)
        first.step()
        second.step()
    before = copy.deepcopy(second.state_dict())
    only_second = [param.detach().clone() for param in params[4:]]
    train(first, params, range(5))
    after = second.state_dict()
    assert before["param_groups"] == after["param_groups"] and before["state"].keys() == after["state"].keys()
    for key, state in before["state"].items():
        assert state["step"] == after["state"][key]["step"] == 2
        assert all(torch.equal(state[s], after["state"][key][s]) for s in second.states)
    assert all(torch.equal(a, b) for a, b in zip(params[4:], only_second, strict=True))


def test_each_group_has_its_own_options() -> None:
    params, alone = make_params(), make_params()
    opt = Adam([{"params": params[:3], "lr": 0.1, "weight_decay": 0.2}, {"params": params[3:]}], lr=1e-3)
    separate = [Adam(alone[:3], lr=0.1, weight_decay=0.2), Adam(alone[3:], lr=1e-3)]
    for step in range(5):
        set_grads(params, step)
        set_grads(alone, step)
        for stepper in (opt, *separate):
            stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(params, alone, strict=True))


@pytest.mark.parametrize("name", optimizer_classes())
def test_gradients_stay_and_the_closure_gives_the_loss(name: str) -> None:
    param = nn.Parameter(torch.randn(9, generator=torch.Generator().manual_seed(0)))
    opt = OPTIMIZERS[name]([param], lr=1e-2, weight_decay=0.1)
    before = param.detach().clone()

    def closure() -> Tensor:
        opt.zero_grad()
        loss = param.pow(2).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == before.pow(2).sum().item()
    assert param.grad is not None and torch.equal(param.grad, 2 * before)
    assert not torch.equal(param, before) and param.requires_grad and param.is_leaf
    assert opt.step() is None


def test_sparse_adam_refuses_dense_gradients() -> None:
    param = nn.Parameter(torch.ones(4, 2))
    param.grad = torch.ones(4, 2)
    with pytest.raises(UserError, match=r"dense gradient of shape \(4, 2\); use Adam or Adamax"):
        SparseAdam([param]).step()
    assert torch.equal(param, torch.ones(4, 2))


@pytest.mark.parametrize("name", optimizer_classes())
def test_the_others_refuse_sparse_gradients(name: str) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(UserError, match=f"{name} got a sparse gradient .* use SparseAdam"):
        OPTIMIZERS[name](embedding.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"eps": -1e-8}, "eps is"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, "contain 1.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"Adam: .*{message}"):
        Adam([nn.Parameter(torch.ones(1))], **options)


BASE, EPOCHS, STEPS = 4e-4, 7, 20  # STEPS per epoch


def torch_rates(make: Callable[[torch.optim.Optimizer], Any], count: int) -> list[float]:
    """The rate before each of `count` steps of a scheduler, and the one after them."""
    opt = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=BASE)
    scheduler = make(opt)
    rates = [opt.param_groups[0]["lr"]]
    for _ in range(count):
        opt.step()
        scheduler.step()
        rates.append(opt.param_groups[0]["lr"])
    return rates


def our_rates(schedule: Schedule, per_epoch: int = 1) -> list[float]:
    return [schedule.at(step / per_epoch) for step in range(schedule.epochs * per_epoch + 1)]


def linear_factor(step: int, warmup_steps: int, total: int) -> float:
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    return max(0.0, (total - step) / max(1, total - warmup_steps))


torch_schedulers = torch.optim.lr_scheduler
EPOCH_PAIRS: dict[str, tuple[Schedule, Callable[[torch.optim.Optimizer], Any]]] = {
    "constant": (Schedule("constant", BASE, EPOCHS), lambda o: torch_schedulers.ConstantLR(o, factor=1.0)),
    "lambda": (
        Schedule("lambda", BASE, EPOCHS, gamma=0.55),
        lambda o: torch_schedulers.LambdaLR(o, lambda epoch: 0.55**epoch),
    ),
    "cosine fifth": (
        Schedule("cosine", BASE, EPOCHS, floor=0.2),
        lambda o: torch_schedulers.CosineAnnealingLR(o, T_max=EPOCHS, eta_min=BASE / 5),
    ),
    "cosine quarter": (
        Schedule("cosine", BASE, EPOCHS, floor=0.25),
        lambda o: torch_schedulers.CosineAnnealingLR(o, T_max=EPOCHS, eta_min=BASE / 4),
    ),
    "cyclic cumulative": (
        Schedule("cyclic", BASE, EPOCHS, restart=False),
        lambda o: torch_schedulers.ExponentialLR(o, gamma=8**-0.5),
    ),
}


@pytest.mark.parametrize("name", EPOCH_PAIRS)
def test_schedule_equals_torch_epoch_by_epoch(name: str) -> None:
    schedule, make = EPOCH_PAIRS[name]
    assert our_rates(schedule) == pytest.approx(torch_rates(make, EPOCHS), rel=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_linear_equals_the_usual_warmup_step_by_step(warmup: float) -> None:
    total = EPOCHS * STEPS
    expected = torch_rates(
        lambda o: torch_schedulers.LambdaLR(o, lambda step: linear_factor(step, round(warmup * total), total)), total
    )
    if warmup == 1.0:
        expected[-1] = BASE  # the usual formula drops to 0 at the step after the last
    ours = our_rates(Schedule("linear", BASE, EPOCHS, warmup=warmup), STEPS)
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_triangular_equals_torch_step_by_step() -> None:
    expected = torch_rates(
        lambda o: torch_schedulers.CyclicLR(o, BASE, 2 * BASE, step_size_up=STEPS, cycle_momentum=False), EPOCHS * STEPS
    )
    ours = our_rates(Schedule("triangular", BASE, EPOCHS), STEPS)
    assert ours == pytest.approx(expected, rel=1e-12)
    assert (min(ours), max(ours)) == (BASE, 2 * BASE)


def test_cyclic_restarts_at_base_and_falls_eightfold() -> None:
    cycle = torch_rates(lambda o: torch_schedulers.ExponentialLR(o, gamma=8 ** (-0.5 / STEPS)), 2 * STEPS)
    expected = cycle[:-1] * 3 + cycle[: STEPS + 1]
    assert our_rates(Schedule("cyclic", BASE, EPOCHS), STEPS) == pytest.approx(expected, rel=1e-12)
    assert cycle[-1] == pytest.approx(BASE / 8)


def test_lambda_is_constant_inside_an_epoch() -> None:
    schedule = Schedule("lambda", BASE, EPOCHS, gamma=0.5)
    for epoch in range(EPOCHS):
        assert {schedule.at(epoch + step / STEPS) for step in range(STEPS)} == {BASE * 0.5**epoch}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_scale_with_base_and_hold_their_end(name: str) -> None:
    schedule, multiplied = (Schedule(name, base, EPOCHS, warmup=0.1) for base in (BASE, 5 * BASE))
    for position in (0.0, 0.3, 1.0, 2.5, 6.95, 7.0):
        assert multiplied.at(position) == pytest.approx(5 * schedule.at(position), rel=1e-12)
    assert schedule.at(EPOCHS + 3.3) == schedule.at(EPOCHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "step"}, "'step' is unknown; choose from constant, lambda, cosine, linear, triangular, cyclic"),
        ({"epochs": 0}, "epochs is 0"),
        ({"warmup": 1.5}, "warmup is 1.5"),
    ],
)
def test_bad_schedules_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(**{"name": "constant", "base": BASE, "epochs": EPOCHS, **options})
