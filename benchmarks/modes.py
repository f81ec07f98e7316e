"""The modes without a peer: tokenise, frozen, start, optimizer, recipe and scaling."""

import math
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from base_bert import read_config
from benchmarks.measure import ignore, run_in_process, say, time_in_turn
from benchmarks.minbert import MinbertSide, TrainerDriver, driver_from_flags
from benchmarks.options import GENERATED, BenchmarkOptions
from benchmarks.workloads import (
    LR,
    MAX_LENGTH,
    REAL_ROWS,
    make_workload,
    requested_device,
    weights_folder,
    write_task_file,
)
from bert import BertModel
from config import BertConfig, ComputeOptions
from datasets import BadRows, TaskData, read_examples
from optimizer import Adamax, AdamW
from tasks import PARA, TASKS
from text.tokenizer import load_tokenizer
from training.distributed import joined
from utils.console import progress
from utils.device import Device
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 283_000  # about the rows of Quora's training file
PAIR_TOKENS = 13  # of each text
FROZEN_STEPS, FROZEN_EPOCHS = 60, 5  # most steps of an epoch; timed epochs
STARTS = 3
RECIPE_BATCH = 64  # the batch size of the recipe's file
RECIPE_WARMUP, RECIPE_STEPS = 30, 60  # steps of each task in each stage
Record = dict[str, Any]


def min_rows(options: BenchmarkOptions) -> int:
    """Return how many training rows of each task the modes need beyond those of a comparison."""
    recipe = RECIPE_BATCH * (RECIPE_WARMUP + RECIPE_STEPS) if "recipe" in options.modes else 0
    frozen = FROZEN_STEPS * options.batch_size if "frozen" in options.modes else 0
    return max(recipe, frozen)


# ----------------------------------------------------------------------------------------------------------------------
# tokenise


def tokenise_file(path: Path, weights: Path, cache: Path) -> dict[str, float]:
    """Return the seconds from a file to token ids, the peak bytes of the process, and the mean tokens of a text."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    tokenizer = load_tokenizer(weights, MAX_LENGTH)
    started = time.perf_counter()
    examples = read_examples(path, PARA, "train", BadRows(0, say))
    data = TaskData(examples, tokenizer, "siamese")
    seconds = time.perf_counter() - started
    tokens = float(data.lengths.mean()) / len(PARA.text_columns)
    return {"seconds": seconds, "peak": Device(torch.device("cpu")).peak_memory(), "tokens": tokens}


def measure_tokenising(options: BenchmarkOptions, pairs: int = PAIRS) -> Record:
    """Return what tokenise_file measures of a generated file, first with an empty cache and then with a full one."""
    weights = weights_folder(options.pretrained)
    with tempfile.TemporaryDirectory() as name:
        path, cache = Path(name) / "pairs.csv", Path(name) / "cache"
        lengths = np.full((pairs, len(PARA.text_columns)), PAIR_TOKENS)
        write_task_file(path, PARA, load_tokenizer(weights, MAX_LENGTH), lengths)
        runs = {
            label: run_in_process("tokenise", tokenise_file, path, weights, cache)
            for label in progress(("first", "cached"), "tokenise", "process")
        }
    return {"mode": "tokenise", "pairs": pairs, **runs}


# ----------------------------------------------------------------------------------------------------------------------
# start


def run_command(command: Sequence[str]) -> None:
    """Run a command to its end. Raises UserError with its standard error where it fails."""
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise UserError(f"{' '.join(command)} failed: {finished.stderr.strip()}")


def measure_start(options: BenchmarkOptions, starts: int = STARTS) -> Record:
    """Return the seconds of the training script's --help, and of a run of one step of each task on data/sample."""
    script = [sys.executable, str(ROOT / "multitask_classifier.py")]
    weights = weights_folder(options.pretrained)
    length = min(MAX_LENGTH, read_config(weights).max_position_embeddings)
    with tempfile.TemporaryDirectory() as folder:
        short = ["--data_dir", str(ROOT / "data" / "sample"), "--pretrained", str(weights), "--max_length", str(length)]
        short += ["--epochs", "1", "--max_train_examples", "64", "--threads", str(options.threads)]
        short += ["--run_dir", folder, "--overwrite"]
        commands = {"help": [*script, "--help"], "run": [*script, *short]}
        actions = {name: partial(run_command, command) for name, command in commands.items()}
        seconds = time_in_turn(actions, [()] * (1 + starts), 1, Device(torch.device("cpu")), "start")
    return {"mode": "start", "seconds": seconds}


# ----------------------------------------------------------------------------------------------------------------------
# scaling


def free_port() -> int:
    """Return a port of this machine that no program listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def time_rank(options: BenchmarkOptions, task: str, rank: int, size: int, port: int) -> list[float]:
    """Return the seconds of each training step in one of `size` processes that share each batch."""
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in values.items()}})
    with joined(ComputeOptions(options.use_gpu, options.amp, options.threads)) as context:
        work = make_workload(options, task, ignore)
        actions = {"step": MinbertSide(work, context=context).train_on}
        rounds = [(indices,) for indices in work.batches]
        return time_in_turn(actions, rounds, options.warmup, work.device, f"scaling {task} {size}")["step"]


def measure_scaling(options: BenchmarkOptions, task: str) -> Record:
    """Return the seconds of each training step of a task by number of processes.

    A process ends a step together with the others, so the first one's seconds stand for all.
    """
    make_workload(options, task, say)  # prints what is wrong with the data once, before any process starts
    seconds: dict[str, list[float]] = {}
    for ranks in options.ranks:
        size, port = int(ranks), free_port()
        with ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn")) as pool:
            running = [pool.submit(time_rank, options, task, rank, size, port) for rank in range(size)]
            try:
                seconds[ranks] = running[0].result()
            except BrokenProcessPool:
                raise UserError(f"--ranks {ranks}: a process died; give fewer, or less memory to each") from None
    return {"mode": "scaling", "task": task, "batch_size": options.batch_size, "seconds": seconds}


# ----------------------------------------------------------------------------------------------------------------------
# frozen


def measure_frozen(options: BenchmarkOptions, task: str, epochs: int = FROZEN_EPOCHS) -> Record:
    """Return the seconds of epochs that train the heads alone, with --cache_frozen and without.

    The first epoch, which fills the cache, does not count. The method is R0's last-layer mode with its Adamax.
    """
    flags = [f"--train_{task}", "--fine_tune_mode", "last-layer", "--batch_size", str(options.batch_size)]
    flags += ["--max_train_examples", str(FROZEN_STEPS * options.batch_size)]
    actions: dict[str, Callable[..., object]] = {}
    for label, more, printed in (("computed anew", [], say), ("--cache_frozen", ["--cache_frozen"], ignore)):
        driver = driver_from_flags(options, [*flags, *more], {task: TASKS[task]}, printed)
        driver.start_epoch(0)
        batches = driver.batches(task)
        actions[label] = partial(driver.train, task, batches)
    device = requested_device(options, ignore)
    seconds = time_in_turn(actions, [()] * (1 + epochs), 1, device, f"frozen {task}")
    return {"mode": "frozen", "task": task, "steps": len(batches), "batch_size": options.batch_size, "seconds": seconds}


# ----------------------------------------------------------------------------------------------------------------------
# optimizer


def measure_optimizers(options: BenchmarkOptions, shape: BertConfig | None = None) -> list[Record]:
    """Return the seconds of each step of torch's fastest optimizers and of ours.

    They take turns on parameters of a BERT of this shape, by default BERT-base.
    """
    device = requested_device(replace(options, amp=False), ignore)
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in BertModel(shape or BertConfig()).parameters()]
    contenders: dict[str, dict[str, Callable[..., Optimizer]]] = {
        "AdamW": {"torch, fused": partial(torch.optim.AdamW, fused=True), "minbert": AdamW},
        "Adamax": {"torch, foreach": partial(torch.optim.Adamax, foreach=True), "minbert": Adamax},
    }
    rounds = [()] * (options.warmup + options.steps)
    records = []
    for name, sides in contenders.items():
        actions: dict[str, Callable[..., object]] = {}
        for side, build in sides.items():
            parameters = [nn.Parameter(torch.randn(shape, device=device.device)) for shape in shapes]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            actions[side] = build(parameters, lr=LR, weight_decay=0.01).step
        seconds = time_in_turn(actions, rounds, options.warmup, device, f"{name} steps")
        count = sum(shape.numel() for shape in shapes)
        records.append({"mode": "optimizer", "optimizer": name, "parameters": count, "seconds": seconds})
    return records


# ----------------------------------------------------------------------------------------------------------------------
# recipe


def recipe_batches(driver: TrainerDriver, data_dir: str, warmup: int, steps: int) -> dict[str, list[np.ndarray]]:
    """Return the batches of each task for the warmup and the timed steps.

    Raises UserError where a task has no step left after the warmup.
    """
    batches = {name: driver.batches(name) for name in driver.model.tasks}
    for name, found in batches.items():
        if len(found) <= warmup:
            raise UserError(
                f"--modes recipe needs {warmup + 1} steps of {name}, but --data_dir {data_dir} has only {len(found)}; "
                f"use --data_dir {GENERATED}"
            )
    return {name: found[: warmup + steps] for name, found in batches.items()}


def seconds_per_step(driver: TrainerDriver, task: str, batches: Sequence[np.ndarray], warmup: int) -> float:
    """Return the mean seconds of a task's steps after the warmup, in the present stage of unfreezing."""
    driver.train(task, batches[:warmup])
    driver.device.synchronize()
    started = time.perf_counter()
    driver.train(task, batches[warmup:])
    driver.device.synchronize()
    return (time.perf_counter() - started) / len(batches[warmup:])


def seconds_of_evaluations(driver: TrainerDriver) -> float:
    """Return the seconds that the evaluations of all epochs would take on the real dev files."""
    started = time.perf_counter()
    driver.evaluate()
    per_row = (time.perf_counter() - started) / sum(len(data) for data in driver.dev.values())
    return driver.config.train.epochs * per_row * sum(rows for _, rows in REAL_ROWS.values())


def measure_recipe(options: BenchmarkOptions, warmup: int = RECIPE_WARMUP, steps: int = RECIPE_STEPS) -> Record:
    """Return the seconds that R0's Yin Yang recipe would take on the real files.

    Each stage of unfreezing has other seconds per step; the rows of the real files give the number of steps. Raises
    UserError where a task has no step left after the warmup.
    """
    flags = [f"@{ROOT / 'recipes' / 'g6-yin-yang.args'}", "--use_gpu", "--amp"]
    flags += ["--cuda_graphs"] if options.cuda_graphs else []
    driver = driver_from_flags(options, flags, {name: TASKS[name] for name in REAL_ROWS}, say)
    batches = recipe_batches(driver, options.data_dir, warmup, steps)
    stages: dict[str, Mapping[str, float]] = {}
    seconds = dict.fromkeys(batches, 0.0)
    for epoch in progress(range(driver.config.train.epochs), "recipe", "epoch"):
        stage = driver.start_epoch(epoch)
        if stage not in stages:
            stages[stage] = {name: seconds_per_step(driver, name, found, warmup) for name, found in batches.items()}
        for name, per_step in stages[stage].items():
            seconds[name] += per_step * math.ceil(REAL_ROWS[name][0] / driver.config.train.batch_size)
    evaluation = seconds_of_evaluations(driver)
    report = driver.graphs_report()
    return {"mode": "recipe", "stages": stages, "train": seconds, "evaluation": evaluation, "graphs": report}
