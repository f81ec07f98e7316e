"""Running averages of the weights, which evaluation and best.pt see in place of the weights that train.

Exponential moving average (R0, appendix E; Polyak averaging) and stochastic weight averaging (SWA: Izmailov et al.
2018, section 3). Training itself never sees the average: its weights and random numbers are those of a run without.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from config import TrainOptions
from models.heads import BatchNorm
from models.multitask_bert import MultitaskBERT

# Batches of each task from which statistics are taken. Running ones with momentum .1 are worth 19 batches: 2/.1 - 1.
REFRESH_BATCHES = 32


def averaged_tensors(model: MultitaskBERT, options: TrainOptions) -> dict[str, Tensor]:
    """The model's own tensors that an average needs a copy of: parameters that train at some time, and float buffers.

    What never trains is its own average. Integer buffers are not averaged: the model's present ones are used. The model
    is left as the last epoch freezes it.
    """
    saved = model.state_dict()
    buffers = {name: own for name, own in model.named_buffers() if name in saved and own.is_floating_point()}
    return {**model.trained(options), **buffers}


class NoAverage:
    """What the loop talks to, and the choice `none`: evaluation sees the weights that train."""

    def __init__(self, model: MultitaskBERT, options: TrainOptions, pass_batches: Callable[[], None]) -> None:
        """Average the weights that `model` has from now on; `pass_batches` runs training batches through it."""
        self.model, self.options, self.pass_batches = model, options, pass_batches

    def after_step(self) -> None:
        """Take note of an optimizer step."""

    def after_epoch(self, epoch: int) -> None:
        """Take note of the end of an epoch, counted from 1."""

    def applied(self) -> AbstractContextManager[None]:
        """Inside, the model has the averaged weights; after it, those that train again, to the bit."""
        return refreshed_batchnorm(self.model, self.pass_batches) if self.options.refresh_batchnorm else nullcontext()

    def swapped(self) -> AbstractContextManager[None]:
        """The same, with the statistics of BatchNorm left alone."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned."""


class RunningAverage(NoAverage):
    """An average that moves towards the weights at each update; at first it is the start weights."""

    def __init__(self, model: MultitaskBERT, options: TrainOptions, pass_batches: Callable[[], None]) -> None:
        super().__init__(model, options, pass_batches)
        self.tensors = averaged_tensors(model, options)
        self.averages = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Move the average by the share `weight` of the way to the weights."""
        torch._foreach_lerp_(list(self.averages.values()), list(self.tensors.values()), weight)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights and statistics of BatchNorm that belong to them.

        Before the first update it keeps its own weights, as without an average.
        """
        if self.updates:
            with self.swapped(), refreshed_batchnorm(self.model, self.pass_batches):
                yield
        else:
            with super().applied():
                yield

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, and their statistics of BatchNorm as they are."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange the memory of weights and averages: no copy, and nothing is rounded."""
        for tensor, average in zip(self.tensors.values(), self.averages.values(), strict=True):
            tensor.data, average.data = average.data, tensor.data

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: the average and its number of updates."""
        return {"updates": self.updates, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        self.updates = state["updates"]
        for name, average in self.averages.items():
            average.copy_(state["averages"][name])


class EMA(RunningAverage):
    """s = d s + (1 - d) th after every step or epoch, from the start weights on (R0, appendix E, listing 3)."""

    def after_step(self) -> None:
        """Update, if --ema_every says so."""
        self.update_every("step")

    def after_epoch(self, epoch: int) -> None:
        """Update, if --ema_every says so."""
        self.update_every("epoch")

    def update_every(self, unit: str) -> None:
        """Update after a `unit`, step or epoch, if --ema_every names it."""
        if self.options.ema_every == unit:
            self.update(1 - self.decay(self.updates + 1))

    def decay(self, number: int) -> float:
        """d of update `number`, counted from 1; --ema_warmup begins with 2/11 and soon forgets the start weights."""
        warm = (1 + number) / (10 + number)
        return min(self.options.ema_decay, warm) if self.options.ema_warmup else self.options.ema_decay


class SWA(RunningAverage):
    """The equal-weight mean of the weights at the ends of epochs, from --swa_from_epoch on (Izmailov et al. 2018)."""

    def after_epoch(self, epoch: int) -> None:
        """Take the weights into the mean; the first ones replace the start weights."""
        if epoch >= self.options.swa_from_epoch:
            self.update(1 / (self.updates + 1))


AVERAGES: dict[str, type[NoAverage]] = {"none": NoAverage, "ema": EMA, "swa": SWA}


# ----------------------------------------------------------------------------------------------------------------------
# Batch normalisation


@contextmanager
def refreshed_batchnorm(model: MultitaskBERT, pass_batches: Callable[[], None]) -> Iterator[None]:
    """Inside, running statistics are those of training batches under the weights that the model has now.

    An average of statistics is not the statistics of the averaged weights (Izmailov et al. 2018, section 3.2).
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        if norms:
            refresh_statistics(model, norms, pass_batches)
        yield
    finally:
        for buffer, values in kept:
            buffer.copy_(values)


@torch.no_grad()
def refresh_statistics(model: MultitaskBERT, norms: list[BatchNorm], pass_batches: Callable[[], None]) -> None:
    """Make the running statistics of `norms` the mean over the batches, each counting alike.

    Unlike in torch.optim.swa_utils.update_bn, dropout is off, as in the evaluation that the statistics are for. Dropout
    widens what reaches a BatchNorm (Li et al. 2019, "variance shift") and moves the features of a siamese pair: even
    two equal texts then differ. After 171 steps of yin-yang from MiniLM, Quora dev accuracy was .640 with statistics
    under dropout and .777 without. A set of statistics that no batch reaches stays as it is.
    """
    training = model.training
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.batches = Counter()
        pass_batches()
    finally:
        for norm in norms:
            norm.batches = None
        model.train(training)
