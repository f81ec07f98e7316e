"""Predict with a model, in training, evaluation and ensembles."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from datasets import Batches
from kernels.linear import ran_out_of_memory
from lora import merged
from text.packing import Batch
from utils.console import progress
from utils.errors import UserError

T = TypeVar("T")


def halving(run: Callable[[np.ndarray], T], rows: np.ndarray) -> list[T]:
    """Return [run(rows)], or the results of smaller parts of `rows`, in order, if memory is short."""
    try:
        return [run(rows)]
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error) or len(rows) == 1:
            raise
    middle = len(rows) // 2  # outside `except`, since the error holds the tensors of the failed pass
    return halving(run, rows[:middle]) + halving(run, rows[middle:])


def outputs_in_batches(
    model: nn.Module,
    forward: Callable[[Batch], torch.Tensor],
    data: Batches,
    device: torch.device,
    batch_size: int,
    amp: torch.dtype | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Return what `forward`, a part of `model`, makes of all examples of `data` or of these `rows` [N], in that order.

    The result is [N, ...], float32. A batch has examples of similar length. The model is in evaluation mode with merged
    adapters inside, and is left as it was.
    """
    training = model.training
    model.eval()
    outputs: list[torch.Tensor] = []
    rows = np.arange(len(data)) if rows is None else rows
    by_length = np.argsort(-data.lengths[rows], kind="stable")
    blocks = [rows[by_length[i : i + batch_size]] for i in range(0, len(rows), batch_size)]
    autocast = torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None)
    with merged(model), torch.inference_mode(), autocast:
        for block in progress(blocks, f"{data.examples.task.name} {data.examples.split}", "batch", leave=False):
            outputs += halving(lambda part: forward(data.batch(part).to(device)).float(), block)
    model.train(training)
    joined = torch.cat(outputs).cpu().numpy()
    restored = np.empty_like(joined)
    restored[by_length] = joined
    return restored


def predict(
    model: nn.Module,
    data: Batches,
    device: torch.device,
    batch_size: int,
    amp: torch.dtype | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Return the raw outputs of the model for all examples of `data`, or for these `rows` [N], in that order.

    They are [N, classes] or [N], float32. Raises UserError if an output is not finite.
    """
    task = data.examples.task
    outputs = outputs_in_batches(model, partial(model, task.name), data, device, batch_size, amp, rows)
    if not np.isfinite(outputs).all():
        raise UserError(
            f"{task.title}: an output on {data.examples.split} is not finite any more; lower --lr or set --clip, or "
            "use an earlier checkpoint (the best.pt of an earlier epoch, if there is one, stands unharmed)"
        )
    return outputs
