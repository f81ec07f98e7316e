"""SMART (Jiang et al. 2020): outputs may not change much under small perturbations of the embeddings (equation 2), nor
from one step to the next (the Bregman proximal point method with momentum, equations 5 and 6).

Both compare outputs of two passes, which have to differ in nothing else: dropout draws the masks of the clean pass
again, and running statistics and the generators are left as the clean pass left them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from config import TrainOptions
from models.heads import BatchNorm
from models.multitask_bert import MultitaskBERT
from text.packing import EncodedBatch, PackedBatch
from training.averaging import RunningAverage
from training.seen import Seen, Term
from utils.device import random_state, set_random_state


def divergence(kind: str, a: Tensor, b: Tensor) -> Tensor:
    """Mean distance of outputs of a task of this `kind`, in fp32; symmetric, and 0 where they agree.

    KL(p, q) + KL(q, p) in nats of logits [B, C] (classes) or [B] (binary: of Bernoulli distributions; a softmax over
    one logit would be 1 whatever it is); squared error of similarities [B].
    """
    a, b = a.float(), b.float()
    if kind == "classes":
        p, q = F.log_softmax(a, dim=1), F.log_softmax(b, dim=1)
        return ((p.exp() - q.exp()) * (p - q)).sum(dim=1).mean()
    if kind == "binary":
        return ((a.sigmoid() - b.sigmoid()) * (a - b)).mean()
    return F.mse_loss(a, b)


def ascend(run: Callable[[Tensor], Tensor], clean: Tensor, start: Tensor, kind: str, options: TrainOptions) -> Tensor:
    """The perturbation [T, H] that `start` becomes by --smart_steps steps up the divergence of run(it) from `clean`.

    Each step has the length --smart_eta in its largest coordinate, token by token, and ends inside the cube of
    --smart_epsilon. Public versions normalise again after that, so that their epsilon has no effect.
    """
    noise = start
    for _ in range(options.smart_steps):
        noise = noise.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(kind, run(noise), clean.detach()), noise)
        largest = gradient.abs().amax(dim=1, keepdim=True)  # [T, 1]
        # a token without any influence stays where it is
        step = torch.where(largest > 0, options.smart_eta * gradient / largest, 0.0)
        noise = (noise + step).clamp(-options.smart_epsilon, options.smart_epsilon)
    return noise.detach()


def smart_term(options: TrainOptions) -> Term:
    """How far a small perturbation of the embedding output, chosen for that, moves the outputs."""

    def term(seen: Seen) -> Tensor:
        model, task, batch = seen.model, seen.task, seen.batch
        assert isinstance(batch, PackedBatch)
        # Half precision would round away perturbations of this size: the clean pass is then repeated in fp32.
        half = torch.is_autocast_enabled(seen.outputs.device.type)
        with same_pass(seen, in_fp32=True):
            hidden = model.backbone(task).embed(batch)  # [T, H], the clean pass's own
            masks = random_state(hidden.device)

            def run(start: Tensor) -> Tensor:
                set_random_state(hidden.device, masks)
                return seen.gather(model.outputs(task, model.embed(task, EncodedBatch(start, 0, batch))))

            clean = run(hidden) if half else seen.outputs
            kind, fixed = model.tasks[task].kind, hidden.detach()
            start = first_noise(hidden, options, seen.world.seed(seen.step))
            noise = ascend(lambda noise: run(fixed + noise), clean, start, kind, options)
            return divergence(kind, run(hidden + noise), clean)

    return term


def first_noise(hidden: Tensor, options: TrainOptions, step: int) -> Tensor:
    """Gaussian noise like `hidden`, of --smart_sigma; a function of the seed and the step."""
    generator = torch.Generator(hidden.device).manual_seed(hash((options.seed, step)) % 2**63)
    noise = torch.randn(hidden.shape, generator=generator, device=hidden.device, dtype=hidden.dtype)
    return options.smart_sigma * noise


def bregman_term(seen: Seen) -> Tensor:
    """How far the outputs are from those that the slow average of the weights gives."""
    with same_pass(seen), torch.no_grad(), seen.teacher.swapped():
        before = seen.gather(seen.model(seen.task, seen.batch))
    return divergence(seen.model.tasks[seen.task].kind, seen.outputs, before)


class Teacher(RunningAverage):
    """th~ = b th~ + (1 - b) th after every step; b is .99 for the first tenth of the run, then .999 (section 4.1)."""

    early, late, change = 0.99, 0.999, 0.1

    def __init__(self, model: MultitaskBERT, options: TrainOptions, steps: int) -> None:
        """`steps` is how many updates the run will have."""
        super().__init__(model, options, lambda: None)
        self.steps = steps

    def after_step(self) -> None:
        """Follow the weights."""
        self.update(1 - (self.early if self.updates < self.change * self.steps else self.late))


@contextmanager
def same_pass(seen: Seen, in_fp32: bool = False) -> Iterator[None]:
    """Inside, passes draw the random numbers of the clean pass again, and none of them leaves a trace.

    They are in its precision too, unless `in_fp32`.
    """
    assert seen.random_state is not None
    device, norms = seen.outputs.device, [own for own in seen.model.modules() if isinstance(own, BatchNorm)]
    after = random_state(device)
    set_random_state(device, seen.random_state)
    for norm in norms:
        norm.momentum = 0.0  # running statistics stay
    half = torch.is_autocast_enabled(device.type) and not in_fp32
    try:
        # Without autocast's cache, which has the cast weights of the clean pass and not those of a slow average.
        with torch.autocast(device.type, enabled=half, cache_enabled=False):
            yield
    finally:
        for norm in norms:
            del norm.momentum  # the class's own again
        set_random_state(device, after)
