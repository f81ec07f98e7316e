"""Running averages of the weights. Evaluation and best.pt see them in place of the weights that train.

Exponential moving average (R0, appendix E; Polyak averaging) and stochastic weight averaging (SWA: Izmailov et al.
2018, section 3). Training never sees the average: its weights and random numbers are those of a run without one.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from config import TrainOptions
from models.heads import BatchNorm
from models.multitask_bert import MultitaskBERT

# Batches of each task from which statistics are taken. Running ones with momentum .1 are worth 19 batches: 2/.1 - 1.
REFRESH_BATCHES = 32


def averaged_tensors(model: MultitaskBERT, options: TrainOptions) -> dict[str, Tensor]:
    """Return the model's tensors that an average copies: parameters that train at some time, and float buffers.

    A parameter that never trains is its own average. Integer buffers are not averaged: the model's present ones are
    used. The model is left frozen as in the last epoch.
    """
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()}
    return {**model.trained_parameters(options), **buffers}


class RunningAverage:
    """An average that moves towards the weights at each update. It begins as the start weights."""

    def __init__(self, model: MultitaskBERT, options: TrainOptions) -> None:
        self.options = options
        self.tensors = averaged_tensors(model, options)
        self.averages = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.updates = 0

    def after_step(self) -> None:
        """Update the average after an optimizer step, if the kind of average does that."""

    def after_epoch(self, epoch: int) -> None:
        """Update the average after `epoch`, counted from 1, if the kind of average does that."""

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Move the average by the share `weight` of the way to the weights."""
        torch._foreach_lerp_(list(self.averages.values()), list(self.tensors.values()), weight)
        self.updates += 1

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Give the model the averaged weights inside, and its training weights afterwards, to the bit."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange the memory of weights and averages. Nothing is copied or rounded."""
        for tensor, average in zip(self.tensors.values(), self.averages.values(), strict=True):
            tensor.data, average.data = average.data, tensor.data

    def state_dict(self) -> dict[str, Any]:
        """Return the average and its number of updates."""
        return {"updates": self.updates, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.updates = state["updates"]
        for name, average in self.averages.items():
            average.copy_(state["averages"][name])


class EMA(RunningAverage):
    """s = d s + (1 - d) theta after every step or epoch, from the start weights on (R0, appendix E, listing 3)."""

    def after_step(self) -> None:
        """Update the average if --ema_every is step."""
        if self.options.ema_every == "step":
            self.update(1 - self.decay(self.updates + 1))

    def after_epoch(self, epoch: int) -> None:
        """Update the average if --ema_every is epoch."""
        if self.options.ema_every == "epoch":
            self.update(1 - self.decay(self.updates + 1))

    def decay(self, number: int) -> float:
        """Return d of an update, counted from 1; --ema_warmup begins with 2/11 and soon forgets the start weights."""
        warm = (1 + number) / (10 + number)
        return min(self.options.ema_decay, warm) if self.options.ema_warmup else self.options.ema_decay


class SWA(RunningAverage):
    """The equal-weight mean of the weights at the ends of epochs, from --swa_from_epoch on (Izmailov et al. 2018)."""

    def after_epoch(self, epoch: int) -> None:
        """Add the weights to the mean; the first ones replace the start weights."""
        if epoch >= self.options.swa_from_epoch:
            self.update(1 / (self.updates + 1))


def make_average(model: MultitaskBERT, options: TrainOptions) -> RunningAverage | None:
    """Return the average that --average names; None where it names none."""
    kinds: dict[str, type[RunningAverage]] = {"ema": EMA, "swa": SWA}
    return None if options.average == "none" else kinds[options.average](model, options)


class MomentumModel(RunningAverage):
    """The slow average theta' = b theta' + (1 - b) theta that the Bregman term compares with.

    b is .99 for the first tenth of the run, then .999 (SMART: Jiang et al. 2020, section 4.1).
    """

    early, late, change = 0.99, 0.999, 0.1

    def __init__(self, model: MultitaskBERT, options: TrainOptions, steps: int) -> None:
        """`steps` is the number of optimizer steps of the whole run."""
        super().__init__(model, options)
        self.steps = steps

    def after_step(self) -> None:
        """Move the average towards the weights."""
        self.update(1 - (self.early if self.updates < self.change * self.steps else self.late))


# ----------------------------------------------------------------------------------------------------------------------
# Batch normalisation


@contextmanager
def refreshed_batchnorm(model: MultitaskBERT, pass_batches: Callable[[], None]) -> Iterator[None]:
    """Give the model, inside, running statistics of training batches under the weights that it has now.

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
    """Make the running statistics of `norms` the equal-weight mean over the batches that `pass_batches` passes.

    Unlike in torch.optim.swa_utils.update_bn, dropout is off, as it is in the evaluation that uses the statistics.
    Dropout widens the input of a BatchNorm (Li et al. 2019, "variance shift") and moves the features of a siamese pair,
    so that even two equal texts differ. After 171 steps of yin-yang from MiniLM, Quora dev accuracy was .640 with
    statistics under dropout and .777 without. Statistics that no batch reaches stay as they are.
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
