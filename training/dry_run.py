"""--dry_run: tell what a run will do: parameters by part, steps per epoch, memory and disk."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import nn

from config import DRAWING_ROUTINES, Config, TaskOptions, TrainOptions
from datasets import TaskData
from models.multitask_bert import MultitaskBERT
from optimizer import OPTIMIZERS
from training.averaging import averaged_tensors
from training.feature_cache import FeatureCache
from training.logger import describe_freezing, parameter_table
from training.task_sampling import ROUTINES, Plan, Step, passes
from utils.console import format_table
from utils.device import Device, process_peak

ACTIVATIONS_PER_LAYER = 34  # values of width H that one layer saves per token for backward, attention scores aside
BYTES_PER_SCORE = 5  # of each attention score: a probability and whether dropout keeps it; FlashAttention keeps neither


def weight_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of these parameters."""
    return 4 * sum(parameter.numel() for parameter in parameters)


def optimizer_bytes(model: MultitaskBERT, config: Config) -> int:
    """Return the bytes of the optimizers' states once everything trains that will. Each optimizer has its states."""
    count, trains = len(OPTIMIZERS[config.train.optim].states), set(model.trained_parameters(config.train).values())
    trained = [name for name in model.tasks if config.tasks[name].num_trains]
    reached = [p for name in trained for p in model.task_parameters(name) if p in trains]
    if config.train.has_one_optimizer():
        reached = list(dict.fromkeys(reached))
    return count * weight_bytes(reached)


def average_bytes(model: MultitaskBERT, config: Config) -> int:
    """Return the bytes of the running averages of the weights: that of --average, and that of --NAME_bregman."""
    count = (config.train.average != "none") + any(task.bregman > 0.0 for task in config.tasks.values())
    return 4 * count * sum(tensor.numel() for tensor in averaged_tensors(model, config.train).values())


def checkpoint_bytes(model: MultitaskBERT, config: Config) -> int:
    """Return about the most that checkpoints take on disk: best.pt, two states, and one that is being written."""
    frozen_names = model.frozen_parameter_names(config.train)
    best = weight_bytes(parameter for name, parameter in model.named_parameters() if name not in frozen_names)
    resume = best + optimizer_bytes(model, config) + average_bytes(model, config)
    return int(1.05 * (best + 3 * resume)) + (1 << 20)  # with room for what surrounds the tensors


def memory_bytes(model: MultitaskBERT, config: Config, data: Mapping[str, TaskData], processes: int = 1) -> int:
    """Return about the memory of training: weights, averages, gradients, optimizer states, activations.

    Activations are those of the largest batch that can occur: the examples of a task that take most. Layers below the
    lowest that trains keep none. Of several processes, each has its part of a batch.
    """
    trains = model.trained_parameters(config.train).values()
    activations = max(largest_batch_bytes(config, model, name, examples, processes) for name, examples in data.items())
    states = optimizer_bytes(model, config) + average_bytes(model, config)
    return int(weight_bytes(model.parameters()) + weight_bytes(trains) + states + activations)


def largest_batch_bytes(
    config: Config, model: MultitaskBERT, task: str, examples: TaskData, processes: int = 1
) -> float:
    """Return about the bytes that the activations of a task's largest possible batch take."""
    shape = model.bert_config
    layers = shape.num_hidden_layers - (0 if task in model.pals else model.backbone(task).frozen_layers())
    lengths = np.stack([np.diff(tokens.offsets) for tokens in examples.tokens]).astype(np.float64)  # [texts, N]
    per_example = (
        4 * ACTIVATIONS_PER_LAYER * shape.hidden_size * lengths
        + BYTES_PER_SCORE * shape.num_attention_heads * lengths**2
    ).sum(axis=0)
    count = math.ceil(examples_at_a_time(config, model, task, processes))
    return layers * passes_of_a_batch(config.tasks[task]) * float(np.sort(per_example)[-count:].sum())


def passes_of_a_batch(options: TaskOptions) -> int:
    """Return how many passes of one batch keep their activations together: SimCSE, R-Drop and SMART add one each."""
    return 1 + (options.embedding_loss == "simcse") + (options.rdrop > 0.0) + (options.smart > 0.0)


def examples_at_a_time(config: Config, model: MultitaskBERT, task: str, processes: int) -> float:
    """Return how many examples of a task keep activations in one process."""
    examples = config.train.batch_size / processes
    if config.train.micro_batch_size is None:
        return examples
    return min(examples, config.train.micro_batch_size / (2 if model.is_siamese(task) else 1))


BAR = 40  # characters of the longest bar


def passes_chart(model: MultitaskBERT, plan: Plan, options: TrainOptions) -> list[str]:
    """Return a bar for each task: how often the run goes through it."""
    counts = passes(plan, options.routine, options.epochs)
    width = max(len(model.tasks[name].title) for name in counts)
    longest = max(counts.values())
    bars = [
        f"{model.tasks[name].title:<{width}}  {'#' * round(BAR * number / longest):<{BAR}} {number:6.2f}"
        for name, number in counts.items()
    ]
    return [f"passes over the training examples in {options.epochs} epoch{'s' * (options.epochs > 1)}:", *bars]


def tasks_table(
    config: Config, model: MultitaskBERT, data: Mapping[str, TaskData], plan: Plan, steps: Sequence[Step]
) -> str:
    """Return a table of each task's sizes, rates and loss, and of its share of an epoch's `steps`."""
    rows = [
        [
            model.tasks[name].title,
            f"{len(examples):,}",
            str(plan.rounds[name]),
            f"{sum(batch.task == name for step in steps for batch in step.batches):,}",
            f"{examples.lengths.mean():.1f}",
            f"{config.train.scaled_lr() * config.tasks[name].lr_multiplier:.2e}",
            f"{config.tasks[name].weight_decay:g}",
            "masked words" if config.train.mlm else config.tasks[name].loss,
        ]
        for name, examples in data.items()
    ]
    return format_table(["task", "examples", "rounds", "steps", "tokens", "lr", "decay", "loss"], rows)


def model_lines(config: Config) -> list[str]:
    """Return what the model is made of, and in what single tasks differ."""
    model, heads = config.model, config.heads_of_tasks()
    of_all = (
        f"arch {model.arch}: {model.backbones} backbones, {model.pair_encoding} pairs, {model.pooling} pooling, "
        f"{model.clf} heads; start weights {model.pretrained}"
    )
    return [of_all, "except " + ", ".join(f"--{name} {value}" for name, value in heads.items())][: 1 + bool(heads)]


def freezing_course(model: MultitaskBERT, options: TrainOptions) -> str:
    """Say in words what trains from which epoch on."""
    told: list[str] = []
    before = None
    for epoch in range(options.epochs):
        layers = model.trainable_layers(options, epoch)
        if layers != before:
            told.append(f"from epoch {epoch + 1} {describe_freezing(model, layers, options.fine_tune_mode)}")
        before = layers
    return "; ".join(told)


def smart_cost(config: Config, model: MultitaskBERT, device: Device) -> list[str]:
    """Return a line on the cost of SMART for each of its tasks."""
    # After its ascent steps comes the perturbed pass; in half precision the clean one is repeated in fp32.
    more = config.train.smart_steps + 1 + (device.amp is not None)
    return [
        f"SMART on {model.tasks[name].title}: {more} more passes forward and back a batch"
        for name, task in config.tasks.items()
        if task.smart > 0.0
    ]


def described_cache(
    config: Config, model: MultitaskBERT, data: Mapping[str, Mapping[str, TaskData]], device: Device
) -> tuple[int, list[str]]:
    """Return the bytes that --cache_frozen caches in the first epoch, when they are most, and its lines about them."""
    if not config.train.cache_frozen:
        return 0, []
    lines: list[str] = []
    model.freeze_for_epoch(config.train, 0)
    cache = FeatureCache(config, model, data["train"], data.get("dev", {}), device, lines.append)
    cache.begin_epoch(())
    return cache.taken(), lines


def memory_line(need: int, device: Device, processes: int) -> str:
    """Return a line on the memory that a run needs, beside what is free on the device, and what to do if it is less."""
    free = device.free_memory()
    line = f"estimated memory {need / 1e9:.2f} GB{' a process' if processes > 1 else ''} with the largest batch that "
    line += f"can occur; free on this {device.device.type} {free / 1e9:.2f} GB"
    if need - device.peak_memory() <= free:
        return line
    return line + ", which is less: lower --batch_size or --max_length, or give --micro_batch_size"


def describe(
    config: Config,
    model: MultitaskBERT,
    splits: Mapping[str, Mapping[str, TaskData]],
    device: Device,
    processes: int = 1,
) -> str:
    """Return the text of --dry_run; `splits` are the examples of each task by split."""
    options, data, (cached, lines) = config.train, splits["train"], described_cache(config, model, splits, device)
    # The program and its libraries; a GPU's memory is counted without them, as `peak_memory` does.
    program = 0 if device.device.type == "cuda" else max(0, process_peak() - weight_bytes(model.parameters()))
    plan = Plan.of(options, config.tasks, {name: len(examples) for name, examples in data.items()})
    steps = ROUTINES[options.routine](plan, options.epochs - 1)
    uneven = max(plan.from_epochs.values()) > 1 or min(plan.fractions.values()) < 1.0
    late = " (the last one)" if uneven or options.routine in DRAWING_ROUTINES else ""
    freezing = freezing_course(model, options)
    model.freeze_for_epoch(options, options.epochs - 1)
    return "\n".join(
        [
            *model_lines(config),
            "",
            tasks_table(config, model, data, plan, steps),
            "steps are those of an epoch, tokens those of an example on average",
            f"{options.epochs} epoch{'s' * (options.epochs > 1)} of {len(steps):,} steps{late}, "
            f"routine {options.routine}, batch size {options.batch_size}, {options.optim}, schedule "
            f"{options.lr_schedule}",
            "",
            *passes_chart(model, plan, options),
            *smart_cost(config, model, device),
            "",
            f"{options.fine_tune_mode}: {freezing}. In the last epoch:",
            parameter_table(model),
            "",
            *lines,
            f"state of {options.optim}, one for {'all tasks' if options.has_one_optimizer() else 'each task'}: "
            f"{optimizer_bytes(model, config) / 1e9:.2f} GB",
            memory_line(memory_bytes(model, config, data, processes) + cached + program, device, processes),
            f"checkpoints on disk {checkpoint_bytes(model, config) / 1e9:.2f} GB",
        ]
    )
