"""Numbers that went wrong: the run stops, says by which batch, and saves none of them.

Losses stay on the device; they are looked at now and then and at an epoch's end, so that no step waits. Each is kept
with the number of its step, and so the first bad batch is known however late it is seen.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from datasets import Batches
from optimizer import local
from training.meters import TaskMeter
from training.run_directory import BAD_BATCH, RunDirectory
from training.task_sampling import Step
from utils.errors import UserError

MIN_SCALE = 1e-4  # of fp16 losses; below it gradients overflow by themselves (fairseq stops there too)
REMEDY = "lower --lr or set --clip (the best.pt of an earlier epoch, if there is one, stands unharmed)"


def refuse_bad_losses(
    meters: Mapping[str, TaskMeter],
    steps: Sequence[Step],
    epoch: int,
    data: Mapping[str, Batches],
    run: RunDirectory,
) -> None:
    """Raise UserError where a loss of an epoch, counted from 1, is not finite, and write what is known of its batch.

    `meters` have the losses so far by task, and which of the epoch's `steps` each belongs to.
    bad_batch.json in the run directory then names the examples of the first such batch and of the one before, since
    weights that an update ruined show in the next loss only. Waits for the device.
    """
    bad: list[tuple[int, float]] = []
    for meter in meters.values():
        if not meter.losses:  # its turn has not come yet
            continue
        values = torch.stack(meter.losses).float().cpu()
        bad += [(meter.numbers[i], float(values[i])) for i in (~values.isfinite()).nonzero().flatten().tolist()[:1]]
    if not bad:
        return
    number, loss = min(bad)

    def batch(step: Step) -> dict[str, Any]:
        ids = data[step.task].examples.ids
        return {"task": step.task, "ids": [ids[i] for i in step.indices.tolist()]}

    step = steps[number]
    before = batch(steps[number - 1]) if number else None
    known = {"epoch": epoch, "batch": number + 1, "loss": str(loss), **batch(step), "batch_before": before}
    run.write_json(BAD_BATCH, known)
    title = data[step.task].examples.task.title
    raise UserError(
        f"{title}: a loss is not finite any more, at first {loss} in batch {number + 1} of epoch {epoch}, whose "
        f"examples stand in {run.path / BAD_BATCH}; {REMEDY}"
    )


def refuse_ruined(tensors: Iterable[tuple[str, Any]]) -> None:
    """Raise UserError, naming the first, where one of these tensors is not finite; waits for the device once."""
    named = [(name, local(own)) for name, own in tensors if isinstance(own, Tensor) and own.is_floating_point()]
    # A sum is finite only where all of it is, and a CPU makes it in a twentieth of the time of a norm.
    sums = [own.detach().sum().isfinite() for _, own in named]
    if not sums or torch.stack(sums).all():
        return
    name = next((name for name, own in named if not own.isfinite().all()), None)
    if name is None:  # only a sum has overflown
        return
    raise UserError(f"{name} is not finite any more and was not saved; {REMEDY}")


def states_of(optimizers: Mapping[str, Optimizer]) -> Iterable[tuple[str, Any]]:
    """Every number in the states of the optimizers, with a name for people."""
    for name, optimizer in optimizers.items():
        for state in optimizer.state.values():
            yield from ((f"{key} of the optimizer of {name}", own) for key, own in state.items())


class Scaler(torch.amp.GradScaler):
    """torch's scaler of fp16 losses, which also says which steps it skipped.

    A step whose gradients overflowed is none: the optimizer's state and running averages stay, and the scale is halved
    (Micikevicius et al. 2018, "Mixed precision training", section 3.2). The next step has its learning rate; what the
    schedule loses in an epoch by that, it has caught up with when the next one begins. Whether a step was made the host
    has to know, so that in fp16 each waits for a GPU; in bf16, which newer ones have, nothing is scaled and none does.
    """

    skipped = 0

    def moves(self, optimizer: Optimizer) -> bool:
        """Whether a step by the gradients at hand was made. Raises UserError where the scale has fallen for good."""
        made: list[bool] = []
        hook = optimizer.register_step_post_hook(lambda *_: made.append(True))
        try:
            self.step(optimizer)
        finally:
            hook.remove()
        self.update()
        if not made:
            self.skipped += 1
            if self.get_scale() < MIN_SCALE:
                raise UserError(f"the gradient overflows fp16 even when scaled by {self.get_scale():.0e}; {REMEDY}")
        return bool(made)

    def skipped_steps(self) -> int | None:
        """How many steps were skipped since this was last asked; None where nothing is scaled."""
        count, self.skipped = self.skipped, 0
        return count if self.is_enabled() else None

    def state_dict(self) -> dict[str, Any]:
        """torch's, and the count."""
        return {**super().state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        if "scale" in state_dict:  # not so after a run without scaling
            super().load_state_dict(state_dict)
        self.skipped = state_dict.get("skipped", 0)
