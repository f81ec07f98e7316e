"""Functions compiled by torch (--compile), which fuses their operators. The plain form is the function itself."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from utils.errors import first_line

logger = logging.getLogger("minbert.compile")
# The compiler chooses the order of sums for so many rows. Otherwise the first batch would decide, and a resumed run,
# which begins with another batch, would round differently.
TYPICAL_ROWS = 4096
VARIANTS = 64  # of a function that torch keeps at most: for what trains, the precision, and passes without a gradient


class CompiledFunction:
    """A function that torch compiles when it is called for the first time, for any number of rows.

    `function(module, *arguments)` returns a tensor. Tensors among the arguments have their rows as first dimension.
    If the compiler fails, a line says why, and the plain function works from then on.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.compiled: Callable[..., Tensor] | None = torch.compile(function, fullgraph=True)
        torch._dynamo.config.recompile_limit = VARIANTS
        torch._dynamo.config.optimize_ddp = False  # it cuts whole models, and knows no autograd.Function

    def __call__(self, *arguments: Any) -> Tensor:
        """Return what the function returns."""
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if self.compiled is None or any(len(tensor) < 2 for tensor in tensors):  # torch takes 0 and 1 for constants
            return self.function(*arguments)
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0, hint_override=TYPICAL_ROWS)
        try:
            return self.compiled(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            cause = getattr(error, "inner_exception", error)
            logger.warning("--compile: torch cannot compile here (%s); going on without it", first_line(cause))
            self.compiled = None
            return self.function(*arguments)
