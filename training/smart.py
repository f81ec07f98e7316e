"""SMART (Jiang et al. 2020): outputs change little under small perturbations of the embeddings (equation 2), and little
from one step to the next (the Bregman proximal point method with momentum, equations 5 and 6).

Both losses compare the outputs of two passes that differ in nothing else. Dropout draws the masks of the clean pass
again, and running statistics and generators stay as the clean pass left them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from config import TrainOptions
from models.heads import BatchNorm
from text.packing import EncodedBatch, PackedBatch
from training.objective import AuxiliaryLoss, ForwardResult
from utils.device import random_state, set_random_state


def divergence(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Return the mean distance of the outputs `a` and `b`, in fp32: symmetric, and 0 where they agree.

    `kl` is KL(p, q) + KL(q, p) in nats of logits [B, C], or of the Bernoulli distributions of logits [B], since a
    softmax over one logit would be 1 whatever it is. `mse` is the squared error.
    """
    a, b = a.float(), b.float()
    if name == "mse":
        return F.mse_loss(a, b)
    if a.dim() == 1:
        return ((a.sigmoid() - b.sigmoid()) * (a - b)).mean()
    p, q = F.log_softmax(a, dim=1), F.log_softmax(b, dim=1)
    return ((p.exp() - q.exp()) * (p - q)).sum(dim=1).mean()


def divergence_of(result: ForwardResult) -> str:
    """Return the name of the divergence of a batch's outputs: --NAME_smart_divergence, or that which suits the task."""
    task = result.batch.task
    by_kind = "mse" if result.objective.model.tasks[task].kind == "similarity" else "kl"
    return result.objective.config.tasks[task].smart_divergence or by_kind


def ascend(run: Callable[[Tensor], Tensor], clean: Tensor, start: Tensor, name: str, options: TrainOptions) -> Tensor:
    """Return the perturbation [T, H] after --smart_steps ascent steps from `start`: it moves run() away from `clean`.

    `name` is that of the divergence. Without steps the perturbation is the noise of the start (R1, section 4.4).
    The largest coordinate of each token's step is --smart_eta; each step ends inside the cube of --smart_epsilon.
    Public versions normalise again after that, so that their epsilon has no effect.
    """
    noise = start
    for _ in range(options.smart_steps):
        noise = noise.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(name, run(noise), clean.detach()), noise)
        largest = gradient.abs().amax(dim=1, keepdim=True)  # [T, 1]
        # a token without any influence stays where it is
        step = torch.where(largest > 0, options.smart_eta * gradient / largest, 0.0)
        noise = (noise + step).clamp(-options.smart_epsilon, options.smart_epsilon)
    return noise.detach()


def smart_loss(options: TrainOptions) -> AuxiliaryLoss:
    """Return a loss: how far a small adversarial perturbation of the embedding output moves the outputs."""

    def loss(result: ForwardResult) -> Tensor:
        objective, batch = result.objective, result.batch
        model, device, packed = objective.model, objective.device.device, batch.inputs
        assert isinstance(packed, PackedBatch)
        # Half precision would round away perturbations of this size: the clean pass is then repeated in fp32.
        half = torch.is_autocast_enabled(device.type)
        with same_pass(result, in_fp32=True):
            hidden = objective.embed_tokens(batch)  # [T, H], those of the clean pass
            masks = random_state(device)

            def run(start: Tensor) -> Tensor:
                set_random_state(device, masks)
                embedding = objective.embed(batch, EncodedBatch(start, 0, packed))
                return result.gather(model.outputs(batch.task, embedding))

            clean = run(hidden) if half else result.outputs
            name, fixed = divergence_of(result), hidden.detach()
            start = first_noise(hidden, options, objective.context.rank_seed(batch.number))
            noise = ascend(lambda noise: run(fixed + noise), clean, start, name, options)
            return divergence(name, run(hidden + noise), clean)

    return loss


def first_noise(hidden: Tensor, options: TrainOptions, number: int) -> Tensor:
    """Return Gaussian noise like `hidden`, of --smart_sigma; a function of the seed and the number of the batch."""
    generator = torch.Generator(hidden.device).manual_seed(hash((options.seed, number)) % 2**63)
    noise = torch.randn(hidden.shape, generator=generator, device=hidden.device, dtype=hidden.dtype)
    return options.smart_sigma * noise


def bregman_loss(result: ForwardResult) -> Tensor:
    """Return how far the outputs are from those that the slow average of the weights gives."""
    objective, batch = result.objective, result.batch
    assert objective.momentum_model is not None
    with same_pass(result), torch.no_grad(), objective.momentum_model.averaged_weights():
        embedding = objective.embed(batch, batch.inputs)
        before = result.gather(objective.model.outputs(batch.task, embedding))
    return divergence(divergence_of(result), result.outputs, before)


@contextmanager
def same_pass(result: ForwardResult, in_fp32: bool = False) -> Iterator[None]:
    """Let passes inside draw the random numbers of the clean pass again, and leave no trace of them.

    They have the precision of the clean pass too, unless `in_fp32`.
    """
    model, device = result.objective.model, result.objective.device.device
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    after = random_state(device)
    set_random_state(device, result.random_state)
    for norm in norms:
        norm.momentum = 0.0  # running statistics stay
    half = torch.is_autocast_enabled(device.type) and not in_fp32
    try:
        # Without autocast's cache, which has the cast weights of the clean pass and not those of a slow average.
        with torch.autocast(device.type, enabled=half, cache_enabled=False):
            yield
    finally:
        for norm in norms:
            del norm.momentum  # the default of the class applies again
        set_random_state(device, after)
