"""The optimizers of a run: which parameters and rates each has, its schedule, clipping and the scaler of its losses."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from config import Config
from models.multitask_bert import MultitaskBERT
from optimizer import OPTIMIZERS, Schedule
from tasks import Task
from training.meters import REMEDY
from training.task_sampling import Step
from utils.device import Device
from utils.errors import UserError

MIN_SCALE = 1e-4  # of fp16 losses; below it, gradients overflow by themselves (fairseq stops there too)


class Scaler(torch.amp.GradScaler):
    """torch's scaler, which also counts the steps that it skips.

    If the gradients of a step overflow, the step is skipped: the optimizer's state and the running averages stay, and
    the scale is halved (Micikevicius et al. 2018, "Mixed precision training", section 3.2). The next step takes the
    skipped one's learning rate. The host must know whether a step was made, so in fp16 every step waits for the GPU. In
    bf16, which newer GPUs have, nothing is scaled and no step waits.
    """

    skipped = 0  # steps of the epoch

    def step_optimizer(self, optimizer: Optimizer) -> bool:
        """Make an optimizer step; return whether it was made. Raises UserError if the scale has become too small."""
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

    def take_skipped(self) -> int | None:
        """Return how many steps were skipped since the last call; None if nothing is scaled."""
        count, self.skipped = self.skipped, 0
        return count if self.is_enabled() else None

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state and the count."""
        return {**super().state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if "scale" in state_dict:  # missing after a run without scaling
            super().load_state_dict(state_dict)
        self.skipped = state_dict.get("skipped", 0)


class Optimizers:
    """One optimizer for each task, or one for all (--optimizers one, --routine joint); each task has its schedule.

    A parameter that several tasks share has the mean of their rates and decays in the one for all.
    """

    def __init__(self, config: Config, model: MultitaskBERT, device: Device) -> None:
        self.clip = config.train.clip
        self.schedules = {name: make_schedule(config, task) for name, task in model.tasks.items()}
        groups = joint_groups(model) if config.train.has_one_optimizer() else task_groups(model)
        if config.train.layer_lr_decay < 1.0:
            groups = {name: split_by_layer(model, parts, config.train.layer_lr_decay) for name, parts in groups.items()}
        self.by_name = {name: make_optimizer(config, parts) for name, parts in groups.items()}
        self.by_task = {task: name for name, parts in groups.items() for part in parts for task in part["tasks"]}
        self.scaler = Scaler(device.device.type, enabled=device.scaled)

    def for_step(self, step: Step) -> Optimizer:
        """Return the optimizer that moves the weights after the batches of `step`."""
        return self.by_name[self.by_task[step.batches[0].task]]

    def set_rates(self, optimizer: Optimizer, position: float) -> dict[str, float]:
        """Set the learning rates of an optimizer after `position` epochs; return the rate of each task."""
        rates = {name: schedule.at(position) for name, schedule in self.schedules.items()}
        for group in optimizer.param_groups:
            group["lr"] = group.get("lr_factor", 1.0) * mean([rates[name] for name in group["tasks"]])
        return rates

    def has_gradients(self, optimizer: Optimizer) -> bool:
        """Whether any parameter of an optimizer has a gradient."""
        return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])

    def clip_gradients(self, optimizer: Optimizer, measure: bool) -> Tensor | None:
        """Scale the gradient down to --clip where it is longer; return its norm before.

        The norm costs a pass over memory: without --clip it is None unless `measure` asks for it.
        """
        if self.clip is None and not measure:
            return None
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip is not None:
            torch._foreach_mul_(gradients, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the optimizers and of the scaler."""
        states = {name: optimizer.state_dict() for name, optimizer in self.by_name.items()}
        return {"optimizers": states, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, optimizer in self.by_name.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])


def task_groups(model: MultitaskBERT) -> dict[str, list[dict[str, Any]]]:
    """Return the parameter groups of one optimizer for each task."""
    return {name: [{"params": model.task_parameters(name), "tasks": (name,)}] for name in model.tasks}


def joint_groups(model: MultitaskBERT) -> dict[str, list[dict[str, Any]]]:
    """Return the groups of one optimizer for all tasks: one for each set of tasks that reach the same parameters."""
    tasks_of: dict[torch.nn.Parameter, tuple[str, ...]] = {}
    for name in model.tasks:
        for parameter in model.task_parameters(name):
            tasks_of[parameter] = (*tasks_of.get(parameter, ()), name)
    groups: dict[tuple[str, ...], list[torch.nn.Parameter]] = {}
    for parameter, names in tasks_of.items():
        groups.setdefault(names, []).append(parameter)
    return {"joint": [{"params": parameters, "tasks": names} for names, parameters in groups.items()]}


def split_by_layer(model: MultitaskBERT, groups: list[dict[str, Any]], decay: float) -> list[dict[str, Any]]:
    """Return the groups with one for each layer, whose rate is `decay` times that of the layer above.

    The top layer and all above it have the whole rate (Howard and Ruder 2018, "ULMFiT", section 3.2).
    """
    top = model.bert_config.num_hidden_layers
    heights = {p: height for task in model.tasks for p, height in model.backbone(task).heights().items()}
    split = []
    for group in groups:
        layers: dict[int, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            layers.setdefault(heights.get(parameter, top), []).append(parameter)
        split += [{**group, "params": layers[layer], "lr_factor": decay ** (top - layer)} for layer in sorted(layers)]
    return split


def make_optimizer(config: Config, groups: list[dict[str, Any]]) -> Optimizer:
    """Return an optimizer whose groups have the mean rate and decay of their tasks."""
    base = config.train.scaled_lr()
    for group in groups:
        group["lr"] = mean([base * config.tasks[name].lr_multiplier for name in group["tasks"]])
        group["weight_decay"] = mean([config.tasks[name].weight_decay for name in group["tasks"]])
    decoupled = {"decoupled": True} if config.train.decoupled else {}
    return OPTIMIZERS[config.train.optim](groups, lr=base, **decoupled)


def mean(numbers: list[float]) -> float:
    """Return the mean of some numbers."""
    return sum(numbers) / len(numbers)


def make_schedule(config: Config, task: Task) -> Schedule:
    """Return the schedule of a task's learning rate."""
    options = config.train
    return Schedule(
        options.lr_schedule,
        options.scaled_lr() * config.tasks[task.name].lr_multiplier,
        options.epochs,
        gamma=options.lr_lambda,
        floor=task.lr_floor,
        warmup=options.warmup,
        restart=options.lr_cycle == "restart",
    )
