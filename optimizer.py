"""Optimizers written from their papers' formulas, and learning rates as a function of the position in training.

Every optimizer has one method of its formula, `update`, which works on lists of tensors by torch's multi-tensor
(foreach) operations. The base class decides what the lists hold. A foreach operation reads all its memory once, and on
a CPU this takes most of the time. There the lists hold pieces that stay in the cache from the first operation of the
formula to the last. On a GPU the number of launches matters, so the lists hold all tensors. They also do for a kernel
that computes the whole formula in one pass.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from kernels import adamax
from utils.errors import UserError

# 256 Ki float32 elements of a parameter, its gradient, two states and a temporary take 5 MiB of cache. Half of that
# takes a tenth more time, and an eighth half as much again, because threads start and meet once for each operation.
# With twice as much, some allocators return the temporary to the system and fault it in again.
ELEMENTS_PER_THREAD = 256 * 1024

Tensors = list[Tensor]
Row = tuple[Tensor, ...]  # a parameter, its gradient, its states: all of one shape
Group = dict[str, Any]
Betas = tuple[float, float]


def cache_sized(rows: Iterable[Row], size: float) -> Iterator[list[Tensors]]:
    """Cut rows into pieces of about `size` elements in each column, and yield the columns of each piece.

    Small rows share a piece. Large rows become 1-D views of at most `size` elements, or stay whole if they are not
    contiguous.
    """
    piece: list[Row] = []
    filled = 0
    for row in rows:
        parts: Iterable[Row] = [row]
        if row[0].numel() > size and all(tensor.is_contiguous() for tensor in row):
            parts = zip(*(tensor.view(-1).split(int(size)) for tensor in row), strict=True)  # each [<= size]
        for part in parts:
            count = part[0].numel()
            if piece and filled + count > size:
                yield [list(column) for column in zip(*piece, strict=True)]
                piece, filled = [], 0
            piece.append(part)
            filled += count
    if piece:
        yield [list(column) for column in zip(*piece, strict=True)]


class ForeachOptimizer(Optimizer):
    """Base of the optimizers below: it finds what to update, counts the steps and cuts the memory into pieces.

    A parameter has no state until its first gradient, and counts its steps from then on: one that was frozen for a
    while begins at 1. Parameters without a gradient do not change. Gradients never change.
    """

    states: ClassVar[tuple[str, ...]]  # names of the states, in the order in which `update` takes them
    layout: ClassVar[torch.layout] = torch.strided  # of the gradients
    update: Callable[..., None]  # (group, step, params, grads, one list per state): the formula, in place

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not defaults.get(name, 0.0) >= 0.0:
                raise UserError(f"{type(self).__name__}: {name} is {defaults[name]}; it must not be negative")
        for beta in (*defaults.get("betas", ()), defaults.get("momentum", 0.0)):
            if not 0.0 <= beta < 1.0:
                raise UserError(f"{type(self).__name__}: betas or momentum contain {beta}; each must be in [0, 1)")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, and return the loss of `closure` if one is given.

        Raises UserError for a gradient of the wrong layout (dense for SparseAdam, sparse for the others).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for step, rows in self._advance(group["params"]).items():
                for columns in cache_sized(rows, self._size(group, rows)):
                    self.update(group, step, *columns)
        return loss

    def has_kernel(self, group: Group, params: Tensors, grads: Tensors) -> bool:
        """Return whether `update` passes over the memory of these tensors once."""
        return False

    def _size(self, group: Group, rows: Sequence[Row]) -> float:
        """Return the number of elements of each column that `update` takes at a time."""
        params, grads = ([row[i] for row in rows] for i in (0, 1))
        on_cpu = params[0].device.type == "cpu" and self.layout == torch.strided
        if not on_cpu or self.has_kernel(group, params, grads):
            return math.inf
        return ELEMENTS_PER_THREAD * torch.get_num_threads()

    def _advance(self, params: Tensors) -> dict[int, list[Row]]:
        """Count a step, from 1, for each parameter that has a gradient, and return the rows by their step."""
        rows: dict[int, list[Row]] = {}
        for param in params:
            if param.grad is None:
                continue
            if param.grad.layout != self.layout:
                raise UserError(self._wrong_layout(param.grad))
            state = self.state[param]
            if not state:
                state["step"] = 0
                for name in self.states:
                    state[name] = torch.zeros_like(param)
            state["step"] += 1
            row = (param, param.grad, *(state[name] for name in self.states))
            rows.setdefault(state["step"], []).append(row)
        return rows

    def _wrong_layout(self, grad: Tensor) -> str:
        return f"{type(self).__name__} got a sparse gradient of shape {tuple(grad.shape)}; use SparseAdam for it"


def decay_weights(group: Group, params: Tensors, grads: Tensors) -> Tensors:
    """Apply weight decay before the update: decoupled shrinks the weights, coupled (L2) adds it to new gradients."""
    decay = group["weight_decay"]
    if decay == 0.0:
        return grads
    if group["decoupled"]:
        torch._foreach_mul_(params, 1.0 - group["lr"] * decay)
        return grads
    return list(torch._foreach_add(grads, params, alpha=decay))


def update_moments(betas: Betas, grads: Tensors, m: Tensors, v: Tensors) -> None:
    """Compute m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2."""
    beta1, beta2 = betas
    torch._foreach_lerp_(m, grads, 1.0 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, grads, grads, 1.0 - beta2)


def adam_step(params: Tensors, m: Tensors, v: Tensors, step_size: float, eps: float) -> None:
    """Compute th -= step_size m / (sqrt(v) + eps)."""
    denominators = torch._foreach_sqrt(v)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, m, denominators, -step_size)


NO_CORRECTION = 1 << 30  # after so many steps 1 - beta^t is 1 in any precision


def kernel_takes(params: Tensors, grads: Tensors) -> bool:
    """Return whether torch's kernels of Adam, which pass over memory once, take these tensors as they are."""
    return all(
        p.device.type in ("cpu", "cuda")
        and p.dtype in (torch.float32, torch.float64)
        and g.dtype == p.dtype
        and p.is_contiguous()
        and g.is_contiguous()
        for p, g in zip(params, grads, strict=True)
    )


def in_one_pass(
    kernel: Callable[..., None],
    betas: Betas,
    step: int,
    params: Tensors,
    grads: Tensors,
    m: Tensors,
    v: Tensors,
    **options: float,
) -> None:
    """Run one of torch's kernels of Adam with the options lr, weight_decay and eps; `step` counts from 1."""
    steps = [torch.full((), float(step), device=params[0].device)] * len(params)
    options |= {"beta1": betas[0], "beta2": betas[1]}
    kernel(params, grads, m, v, [], steps, amsgrad=False, maximize=False, **options)


class AdamW(ForeachOptimizer):
    """Adam with decoupled weight decay, as the course's handout defines it (Loshchilov and Hutter 2019, Algorithm 2).

    a_t = lr sqrt(1-b2^t)/(1-b1^t);  th -= a_t m/(sqrt(v) + eps);  then th -= lr weight_decay th.

    Unlike torch.optim.AdamW, it adds eps to the uncorrected sqrt(v) (the efficient version of Kingma and Ba 2015, end
    of section 2), and decays last, on the updated weight. `correct_bias=False` means a_t = lr. torch's kernel for its
    AdamW, which passes over memory once, computes this rule too, given other constants.
    """

    states = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    def has_kernel(self, group: Group, params: Tensors, grads: Tensors) -> bool:
        return group["lr"] * group["weight_decay"] < 1.0 and kernel_takes(params, grads)

    def update(self, group: Group, step: int, params: Tensors, grads: Tensors, m: Tensors, v: Tensors) -> None:
        beta1, beta2 = group["betas"]
        if self.has_kernel(group, params, grads):
            # The kernel computes th (1 - lr' wd') - lr'/(1-b1^t) m/(sqrt(v/(1-b2^t)) + eps'); the rule above is
            # th keep - keep a_t m/(sqrt(v) + eps).
            keep = 1.0 - group["lr"] * group["weight_decay"]
            known = step if group["correct_bias"] else NO_CORRECTION
            eps = group["eps"] / math.sqrt(1.0 - beta2**known)
            options = {"lr": keep * group["lr"], "weight_decay": group["weight_decay"] / keep, "eps": eps}
            in_one_pass(torch._fused_adamw_, group["betas"], known, params, grads, m, v, **options)
            return
        update_moments(group["betas"], grads, m, v)
        step_size = group["lr"]
        if group["correct_bias"]:
            step_size *= math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
        adam_step(params, m, v, step_size, group["eps"])
        if group["weight_decay"] != 0.0:
            torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])


class DecayedAdam(ForeachOptimizer):
    """The options of Adam, Adamax and RAdam. Weight decay is L2 (coupled), unless `decoupled`."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled}
        super().__init__(params, defaults)


class Adam(DecayedAdam):
    """Adam (Kingma and Ba 2015, Algorithm 1), the numbers of torch.optim.Adam, or torch.optim.AdamW if `decoupled`.

    th -= lr m^/(sqrt(v^) + eps) with m^ = m/(1-b1^t), v^ = v/(1-b2^t).
    """

    states = ("exp_avg", "exp_avg_sq")

    def has_kernel(self, group: Group, params: Tensors, grads: Tensors) -> bool:
        return kernel_takes(params, grads)

    def update(self, group: Group, step: int, params: Tensors, grads: Tensors, m: Tensors, v: Tensors) -> None:
        if self.has_kernel(group, params, grads):
            kernel = torch._fused_adamw_ if group["decoupled"] else torch._fused_adam_
            options = {name: group[name] for name in ("lr", "weight_decay", "eps")}
            in_one_pass(kernel, group["betas"], step, params, grads, m, v, **options)
            return
        grads = decay_weights(group, params, grads)
        update_moments(group["betas"], grads, m, v)
        beta1, beta2 = group["betas"]
        # Numerator and denominator are multiplied by sqrt(1-b2^t), which saves one pass over memory.
        correction = math.sqrt(1.0 - beta2**step)
        step_size = group["lr"] * correction / (1.0 - beta1**step)
        adam_step(params, m, v, step_size, group["eps"] * correction)


class Adamax(DecayedAdam):
    """Adam on the infinity norm (Kingma and Ba 2015, Algorithm 2), the numbers of torch.optim.Adamax.

    u = max(b2 u, |g| + eps);  th -= lr/(1-b1^t) m/u. On a GPU with Triton, one kernel computes this for all fp32
    parameters.
    """

    states = ("exp_avg", "exp_inf")

    def __init__(self, params: Any, lr: float = 2e-3, **options: Any) -> None:
        super().__init__(params, lr, **options)

    def has_kernel(self, group: Group, params: Tensors, grads: Tensors) -> bool:
        if not adamax.works(params[0].device):
            return False
        return kernel_takes(params, grads) and all(param.dtype == torch.float32 for param in params)

    def update(self, group: Group, step: int, params: Tensors, grads: Tensors, m: Tensors, u: Tensors) -> None:
        beta1, beta2 = group["betas"]
        if self.has_kernel(group, params, grads):
            decay, decoupled = group["weight_decay"], group["decoupled"]
            options = {"keep": 1.0 - group["lr"] * decay, "decay": 0.0} if decoupled else {"keep": 1.0, "decay": decay}
            options |= {"step_size": group["lr"] / (1.0 - beta1**step), "gain": 1.0 - beta1, "beta2": beta2}
            adamax.one_pass_adamax(params, grads, m, u, **options, eps=group["eps"])
            return
        decayed = decay_weights(group, params, grads)
        torch._foreach_lerp_(m, decayed, 1.0 - beta1)
        torch._foreach_mul_(u, beta2)
        if decayed is grads:
            magnitudes = list(torch._foreach_abs(grads))
        else:  # a temporary, not the gradients themselves
            torch._foreach_abs_(magnitudes := decayed)
        torch._foreach_add_(magnitudes, group["eps"])
        torch._foreach_maximum_(u, magnitudes)
        torch._foreach_addcdiv_(params, m, u, -group["lr"] / (1.0 - beta1**step))


class RAdam(DecayedAdam):
    """Rectified Adam (Liu et al. 2020, Algorithm 2), the numbers of torch.optim.RAdam.

    r_inf = 2/(1-b2) - 1;  r_t = r_inf - 2 t b2^t/(1-b2^t). While r_t <= 5, the variance of v is too large to use, and
    th -= lr m/(1-b1^t). After that, th -= lr rect sqrt(1-b2^t)/(1-b1^t) m/(sqrt(v) + eps), where
    rect = sqrt((r_t-4)(r_t-2) r_inf / ((r_inf-4)(r_inf-2) r_t)).
    """

    states = ("exp_avg", "exp_avg_sq")

    def update(self, group: Group, step: int, params: Tensors, grads: Tensors, m: Tensors, v: Tensors) -> None:
        grads = decay_weights(group, params, grads)
        update_moments(group["betas"], grads, m, v)
        beta1, beta2 = group["betas"]
        step_size = group["lr"] / (1.0 - beta1**step)
        correction = 1.0 - beta2**step
        r_inf = 2.0 / (1.0 - beta2) - 1.0
        r_t = r_inf - 2.0 * step * beta2**step / correction
        if r_t <= 5.0:
            torch._foreach_add_(params, m, alpha=-step_size)
        else:
            rect = math.sqrt((r_t - 4.0) * (r_t - 2.0) * r_inf / ((r_inf - 4.0) * (r_inf - 2.0) * r_t))
            adam_step(params, m, v, step_size * rect * math.sqrt(correction), group["eps"])


class SGD(ForeachOptimizer):
    """Stochastic gradient descent with Nesterov momentum, the numbers of torch.optim.SGD(nesterov=True).

    g += weight_decay th;  b = momentum b + g;  th -= lr (g + momentum b).
    """

    states = ("momentum_buffer",)

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "decoupled": False})

    def update(self, group: Group, step: int, params: Tensors, grads: Tensors, b: Tensors) -> None:
        grads = decay_weights(group, params, grads)
        torch._foreach_mul_(b, group["momentum"])
        torch._foreach_add_(b, grads)
        torch._foreach_add_(params, grads, alpha=-group["lr"])
        torch._foreach_add_(params, b, alpha=-group["lr"] * group["momentum"])


class SparseAdam(ForeachOptimizer):
    """Adam on the rows that a sparse gradient names, the numbers of torch.optim.SparseAdam.

    The moments and weights of all other rows do not change. There is no weight decay, since it would change every row.
    `step` raises UserError for a dense gradient.
    """

    states = ("exp_avg", "exp_avg_sq")
    layout = torch.sparse_coo

    def __init__(self, params: Any, lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def update(self, group: Group, step: int, params: Tensors, grads: Tensors, m: Tensors, v: Tensors) -> None:
        beta1, beta2 = group["betas"]
        step_size = group["lr"] * math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
        for param, grad, param_m, param_v in zip(params, grads, m, v, strict=True):
            grad = grad.coalesce()  # each row once, with its sum, since the formula is not linear in g
            at = tuple(grad.indices())  # one [N] for each sparse dimension; the values are [N, H]
            rows, m_rows, v_rows = [param[at]], [param_m[at]], [param_v[at]]
            update_moments(group["betas"], [grad.values()], m_rows, v_rows)
            adam_step(rows, m_rows, v_rows, step_size, group["eps"])
            param[at], param_m[at], param_v[at] = rows[0], m_rows[0], v_rows[0]

    def _wrong_layout(self, grad: Tensor) -> str:
        return (
            f"SparseAdam got a dense gradient of shape {tuple(grad.shape)}; use Adam or Adamax, "
            "or give it only embeddings made with sparse=True"
        )


OPTIMIZERS: dict[str, type[Any]] = {"AdamW": AdamW, "Adam": Adam, "Adamax": Adamax, "RAdam": RAdam, "SGD": SGD}

CYCLE_EPOCHS = 2  # of `triangular` and `cyclic`
CYCLE_FALL = 8.0  # a `cyclic` rate falls by this factor in a cycle (R0, appendix E)
TRIANGLE_PEAK = 2.0  # the top of `triangular` as a multiple of its base: 1e-4 to 2e-4 (R0, appendix G)


@dataclass(frozen=True)
class Schedule:
    """A learning rate as a pure function of the position in training.

    constant    base
    lambda      base gamma^epoch, one value for each epoch
    cosine      half a cosine from base to floor * base
    linear      from 0 up to base over the share `warmup` of the epochs, then straight down to 0 at the end
    triangular  from base up to 2 base in one epoch, and back in the next (torch's CyclicLR)
    cyclic      down by the factor 8 in every two epochs (R0, appendix E.2), and then up to base again (`restart`) or
                further down; geometric, because only then accumulating cycles join without a kink

    Raises UserError for an unknown name or a value out of its bounds.
    """

    name: str
    base: float  # learning rate times the task's multiplier
    epochs: int
    gamma: float = 0.5  # lambda: the factor of an epoch
    floor: float = 0.2  # cosine: the last value as a fraction of base, so that multipliers act on it too
    warmup: float = 0.0  # linear: a fraction of all epochs, 0 to 1
    restart: bool = True  # cyclic

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UserError(f"learning rate schedule {self.name!r} is unknown; choose from {', '.join(SCHEDULES)}")
        if self.epochs < 1:
            raise UserError(f"learning rate schedule: epochs is {self.epochs}; it must be at least 1")
        if not 0.0 <= self.warmup <= 1.0:
            raise UserError(f"learning rate schedule: warmup is {self.warmup}; it must be in [0, 1]")

    def at(self, position: float) -> float:
        """Return the learning rate after `position` epochs (may be a fraction). Past `epochs` the last value stays."""
        return self.base * SCHEDULES[self.name](self, min(position, self.epochs))


def _lambda(schedule: Schedule, position: float) -> float:
    return schedule.gamma ** math.floor(position)


def _cosine(schedule: Schedule, position: float) -> float:
    return schedule.floor + (1.0 - schedule.floor) * (1.0 + math.cos(math.pi * position / schedule.epochs)) / 2.0


def _linear(schedule: Schedule, position: float) -> float:
    done = position / schedule.epochs
    if schedule.warmup > 0.0 and done <= schedule.warmup:
        return done / schedule.warmup
    return (1.0 - done) / (1.0 - schedule.warmup)


def _triangular(schedule: Schedule, position: float) -> float:
    half = CYCLE_EPOCHS / 2
    rise = 1.0 - abs(position % CYCLE_EPOCHS - half) / half  # 0 to 1 and back
    return 1.0 + (TRIANGLE_PEAK - 1.0) * rise


def _cyclic(schedule: Schedule, position: float) -> float:
    cycles = (position % CYCLE_EPOCHS if schedule.restart else position) / CYCLE_EPOCHS
    return CYCLE_FALL**-cycles


# The factor on the base rate by the name of the schedule.
SCHEDULES: dict[str, Callable[[Schedule, float], float]] = {
    "constant": lambda schedule, position: 1.0,
    "lambda": _lambda,
    "cosine": _cosine,
    "linear": _linear,
    "triangular": _triangular,
    "cyclic": _cyclic,
}
