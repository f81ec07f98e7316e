"""--dry_run of a report's table: runs, steps, memory and hours of its trials."""

import io
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

from config import Config
from studies.results import study_results
from studies.study_table import label_of
from studies.trials import SCRIPT, Plan, Trial, grid_name
from training import task_sampling
from training.commands import load_inputs
from training.distributed import SINGLE_PROCESS
from training.dry_run import described_cache, memory_bytes, passes_of_a_batch
from utils.console import format_table
from utils.device import Device, device_of, process_peak
from utils.errors import UserError, first_line

SIZE, REPEATS = 2048, 20  # of the matrix products that measure a machine


@dataclass(frozen=True)
class Estimate:
    """What one run of a trial takes: optimizer steps, bytes of memory, and floating-point operations."""

    steps: int
    memory: int
    operations: float


def estimate(config: Config, program: int) -> Estimate:
    """Return the estimate for a training, without its start from another run. `program` are the bytes without a model.

    Raises UserError where its data or weights are not there.
    """
    options = replace(config.train, init_from=None)
    config = replace(config, train=options, run=replace(config.run, test_predictions=False, dry_run=True))
    with redirect_stdout(io.StringIO()):
        inputs = load_inputs(config, SINGLE_PROCESS)
    model, train = inputs.model, inputs.data["train"]
    plan = task_sampling.Plan.of(options, config.tasks, {name: len(data) for name, data in train.items()})
    steps = sum(len(task_sampling.ROUTINES[options.routine](plan, epoch)) for epoch in range(options.epochs))
    passes = task_sampling.passes(plan, options.routine, options.epochs)
    evaluations = -(-options.epochs // options.eval_every)
    operations = 0.0
    for name, task in config.tasks.items():
        layers = model.backbone(name).bert_layers
        each = 2.0 * sum(parameter.numel() for parameter in layers.parameters() if parameter.dim() == 2)
        frozen = []
        for epoch in range(options.epochs):
            model.freeze_for_epoch(options, epoch)
            frozen.append(0 if name in model.pals else model.backbone(name).frozen_layers())
        backward = 2 * (1 - mean(frozen) / len(layers))  # each layer that trains takes two products more
        repeats = passes_of_a_batch(task) + (options.smart_steps if task.smart > 0.0 else 0)
        operations += each * (1 + backward) * repeats * passes[name] * float(train[name].lengths.sum())
        dev = inputs.data.get("dev", {}).get(name)
        if dev is not None:
            operations += each * float(dev.lengths.sum()) * -(-evaluations // task.epoch_eval)
    cached, _ = described_cache(config, model, inputs.data, inputs.device)
    model.freeze_for_epoch(options, options.epochs - 1)
    return Estimate(steps, memory_bytes(model, config, train) + cached + program, operations)


def measured_speed(device: Device) -> float:
    """Return the operations per second of a matrix product on a device in the precision of the run.

    The fastest of several counts, since other programs may be at work.
    """
    left, right = torch.randn(2, SIZE, SIZE, device=device.device, dtype=device.amp or torch.float32)
    seconds = []
    for _ in range(REPEATS):
        device.synchronize()
        begin = time.perf_counter()
        left @ right
        device.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2.0 * SIZE**3 / min(seconds)


def speed_of(plan: Plan, estimates: Mapping[str, Estimate], done: Mapping[str, Mapping[str, str]]) -> tuple[float, str]:
    """Return the operations per second with which hours are estimated, and where they are from.

    `done` has the rows of the finished trials.
    """
    operations, seconds, count = 0.0, 0.0, 0
    for name, row in done.items():
        trial = plan.trials.get(name)
        if trial is not None and kind_of(trial) in estimates and row.get("minutes"):
            operations += estimates[kind_of(trial)].operations
            seconds += 60 * float(row["minutes"])
            count += 1
    if seconds:
        speed = operations / seconds
        return speed, f"hours by the {count} finished trials of this study: {speed / 1e9:,.0f} GFLOP/s in the encoders"
    compute = next(trial.config.compute for trial in plan.trials.values() if trial.config is not None)
    device = device_of(compute, lambda line: None)
    speed = measured_speed(device)
    return speed, (
        f"hours as if the encoders ran at {speed / 1e9:,.0f} GFLOP/s, the speed of a large matrix product on "
        f"{device.name} just now: a rough guess. Once a trial has finished, its time counts instead"
    )


def kind_of(trial: Trial) -> str:
    """Return what a trial is without its seed."""
    return grid_name({flag: value for flag, value in trial.flags.items() if flag != "seed"})


def describe_plan(plan: Plan, out: Path) -> str:
    """Return the text of --dry_run for a table: a line for each training and ensemble, and what remains to be done."""
    kinds: dict[str, list[Trial]] = {}
    for trial in plan.trials.values():
        kinds.setdefault(kind_of(trial), []).append(trial)
    estimates, problems, program = dict[str, Estimate](), list[str](), process_peak()
    for kind, (trial, *_) in kinds.items():
        if trial.config is None or trial.script != SCRIPT:
            continue
        try:
            on_gpu = trial.config.compute.use_gpu and torch.cuda.is_available()
            estimates[kind] = estimate(trial.config, 0 if on_gpu else program)
        except UserError as error:
            problems.append(f"{kind}: cannot be estimated: {first_line(error)}")
    done = {row["trial"]: row for row in study_results(out, plan.flags).rows() if row["status"] == "ok"}
    speed, source = speed_of(plan, estimates, done) if estimates else (0.0, "")
    rows, left = [], 0.0
    for kind, trials in kinds.items():
        todo = sum(trial.name not in done for trial in trials)
        row = [kind, str(len(trials)), str(todo)]
        if kind in estimates:
            hours = estimates[kind].operations / speed / 3600
            left += hours * todo
            row += [f"{estimates[kind].steps:,}", f"{estimates[kind].memory / 1e9:.2f}", f"{hours:.2f}"]
        rows.append([*row, *[""] * (6 - len(row))])
    table = format_table(["trial", "runs", "to do", "steps", "memory (GB)", "hours a run"], rows)
    listed = plan.table.rows if plan.table is not None else ()
    impossible = [f"{label_of(row.name, row.split)}: cannot be run: {row.because}" for row in listed if not row.trials]
    if not estimates:
        return "\n".join([table, *problems, *impossible, "hours cannot be estimated"])
    total = f"{left:.2f} hours for what is to do, one run after another; ensembles, which only predict, not counted"
    return "\n".join([table, *problems, *impossible, total, source])
