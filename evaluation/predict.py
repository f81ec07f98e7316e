"""Predict with a model, in training, evaluation and ensembles."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from datasets import Batches
from kernels.linear import ran_out_of_memory
from lora import merged
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


def predict(
    model: nn.Module,
    data: Batches,
    device: torch.device,
    batch_size: int,
    amp: torch.dtype | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Return the raw outputs of the model for all examples of `data`, or for these `rows` [N], in that order.

    They are [N, classes] or [N], float32. A batch has examples of similar length. The model predicts in evaluation mode
    with merged adapters, and is left as it was. Raises UserError if an output is not finite.
    """
    training = model.training
    model.eval()
    outputs: list[torch.Tensor] = []
    rows = np.arange(len(data)) if rows is None else rows
    by_length = np.argsort(-data.lengths[rows], kind="stable")
    task = data.examples.task
    blocks = [rows[by_length[i : i + batch_size]] for i in range(0, len(rows), batch_size)]
    autocast = torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None)
    with merged(model), torch.inference_mode(), autocast:
        for block in progress(blocks, f"{task.name} {data.examples.split}", "batch", leave=False):
            outputs += halving(lambda part: model(task.name, data.batch(part).to(device)).float(), block)
    model.train(training)
    joined = torch.cat(outputs).cpu().numpy()
    if not np.isfinite(joined).all():
        raise UserError(
            f"{task.title}: an output on {data.examples.split} is not finite any more; lower --lr or set --clip, or "
            "use an earlier checkpoint (the best.pt of an earlier epoch, if there is one, stands unharmed)"
        )
    restored = np.empty_like(joined)
    restored[by_length] = joined
    return restored
