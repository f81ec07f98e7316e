"""What each mode measures: comparisons of two sides, and the modes without a peer."""

import json
import math
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.options import ADAPTER_NAMES, GENERATED, PEER_MODES, STRONG_PEERS, BenchmarkOptions
from benchmarks.peers import MinbertSide, TransformersSide, start_epoch, train_on, trainer_from_flags
from benchmarks.strong_peers import GroupedSide, VarlenSide, in_bf16
from benchmarks.tables import LEGEND, MODE_LINES, comparison_table, target_lines
from benchmarks.workloads import (
    LR,
    REAL_ROWS,
    Workload,
    ignore,
    load_start,
    make_workload,
    prepared_data,
    requested_device,
    say,
    write_task_file,
)
from bert import BertModel
from config import BertConfig, ComputeOptions
from datasets import BadRows, TaskData, read_examples
from kernels import varlen_attention
from kernels.linear import product
from lora import LoRAConfig
from models.checkpoint import git_commit
from optimizer import Adamax, AdamW
from tasks import PARA, TASKS
from training.distributed import joined
from training.task_sampling import task_batches
from utils.console import progress
from utils.device import Device
from utils.errors import UserError
from utils.files import write_text

ROOT = Path(__file__).resolve().parent.parent
CPU = Device(torch.device("cpu"))
PEAK_RUNS, PEAK_WARMUP = 10, 2  # runs of a matrix product, of which the fastest counts
SQUARE = 8192  # the width of the square product
TOLERANCE = 1e-4  # largest difference between the outputs of two sides that compute the same
EVAL_PASSES = 5  # most passes over dev
MEMORY_STEPS = 5  # training steps before the peak of memory is read
PAIRS = 283_000  # about the rows of Quora's training file
PAIR_TOKENS = 13  # of each text
FROZEN_STEPS, FROZEN_EPOCHS = 60, 5  # most steps of an epoch; timed epochs
RECIPE_BATCH = 64  # the batch size of the recipe's file
RECIPE_WARMUP, RECIPE_STEPS = 30, 60  # steps of each task in each stage

Record = dict[str, Any]
Modes = dict[str, Callable[[BenchmarkOptions], list[Record]]]
Side = TransformersSide | MinbertSide
LORA = LoRAConfig(mode="all-lin-only", rank=8)
DORA = LoRAConfig(mode="all-lin-only", rank=8, dora=True)
# Each comparison has the peer first, then our side.
COMPARISONS: dict[str, dict[str, Callable[[Workload], Side]]] = {
    "full-model": {"transformers": TransformersSide, "minbert": MinbertSide},
    "grouped": {"transformers, grouped": GroupedSide, "minbert": MinbertSide},
    "grouped-bf16": {
        "transformers, grouped": lambda work: GroupedSide(in_bf16(work)),
        "minbert": lambda work: MinbertSide(in_bf16(work)),
    },
    "varlen": {"transformers, varlen": VarlenSide, "minbert": MinbertSide},
    "lora": {"peft": partial(TransformersSide, adapters=LORA), "minbert": partial(MinbertSide, adapters=LORA)},
    "dora": {"peft": partial(TransformersSide, adapters=DORA), "minbert": partial(MinbertSide, adapters=DORA)},
    "lora-over-full": {"full": MinbertSide, "lora": partial(MinbertSide, adapters=LORA)},
    "dora-over-lora": {"lora": partial(MinbertSide, adapters=LORA), "dora": partial(MinbertSide, adapters=DORA)},
}


def run_in_processes(label: str, function: Callable[..., Any], *calls: Sequence[object]) -> Any:
    """Return the result of the first of these calls of `function`, each of which runs in a fresh process.

    A call is given by its arguments. Raises UserError, naming `label`, where a process dies.
    """
    with ProcessPoolExecutor(len(calls), mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return [pool.submit(function, *arguments) for arguments in calls][0].result()
        except BrokenProcessPool:
            raise UserError(f"{label}: a process died, perhaps of too little memory; free some or use less") from None


def time_in_turn(
    actions: Mapping[str, Callable[..., object]], rounds: Sequence[tuple], warmup: int, device: Device, label: str
) -> dict[str, list[float]]:
    """Return the seconds of each action in each round after the first `warmup` rounds.

    A round is a tuple of the actions' arguments. The actions take turns, so that all of them meet the machine's drift.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number, arguments in enumerate(progress(rounds, label, "round")):
        for name in sorted(actions, reverse=bool(number % 2)):
            device.synchronize()
            started = time.perf_counter()
            actions[name](*arguments)
            device.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: times[warmup:] for name, times in seconds.items()}


def forward_flops(shape: BertConfig, lengths: np.ndarray) -> float:
    """Return the additions and multiplications for the pooled outputs of sequences with these `lengths` [S].

    Padding does not count. The last layer computes keys and values of all tokens, and the rest of the first token
    alone, since nothing reads the others. Embeddings, normalisations and heads are negligible.
    """
    width, tokens = shape.hidden_size, float(lengths.sum())
    keys_values = 4 * width**2
    others = 4 * width**2 + 4 * width * shape.intermediate_size  # query, output projection, feed-forward
    layer = tokens * (keys_values + others) + 4 * width * float(np.square(lengths).sum())
    last = tokens * keys_values + len(lengths) * others + 4 * width * tokens
    return (shape.num_hidden_layers - 1) * layer + last + len(lengths) * 2 * width**2


def work_per_round(shape: BertConfig, data: TaskData, rounds: Sequence[np.ndarray], passes: int) -> dict[str, list]:
    """Return the examples, real tokens and FLOPs of each round.

    A round is given by its example numbers [B]; it costs as much as `passes` forward passes.
    """
    lengths = [np.concatenate([np.diff(tokens.offsets)[indices] for tokens in data.tokens]) for indices in rounds]
    return {
        "examples": [len(indices) for indices in rounds],
        "tokens": [int(counts.sum()) for counts in lengths],
        "flops": [passes * forward_flops(shape, counts) for counts in lengths],
    }


def matmul_peaks(shape: BertConfig, tokens: int, device: Device) -> dict[str, float | None]:
    """Return FLOP/s of matrix products alone, each the best of ten runs.

    `torch_peak` is that of a layer's products for this many tokens by torch's operator; `matmul_peak` is the better one
    of that and kernels/linear.py. `square_peak` is that of one large square product on a GPU, or None on a CPU.
    """
    width, inner, is_gpu = shape.hidden_size, shape.intermediate_size, device.device.type != "cpu"
    random = partial(torch.randn, device=device.device, dtype=device.amp)
    sizes = [(width, width)] * 4 + [(width, inner), (inner, width)]
    inputs, weights = {n: random(tokens, n) for n in (width, inner)}, [random(size) for size in sizes]
    repeats = 50 if is_gpu else 1  # a GPU is too fast to time a single layer

    def layers(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        for weight in weights * repeats:
            multiply(inputs[len(weight)], weight)

    actions: dict[str, Any] = {"torch": partial(layers, torch.matmul), "kernels": partial(layers, product)}
    if is_gpu:
        square = random(SQUARE, SQUARE)
        actions["square"] = partial(torch.matmul, square, square)
    times = time_in_turn(actions, [()] * (PEAK_WARMUP + PEAK_RUNS), PEAK_WARMUP, device, "matmul peak")
    seconds = {name: min(runs) for name, runs in times.items()}
    flops = repeats * 2 * tokens * sum(rows * columns for rows, columns in sizes)
    return {
        "torch_peak": flops / seconds["torch"],
        "matmul_peak": flops / min(seconds["torch"], seconds["kernels"]),
        "square_peak": 2 * SQUARE**3 / seconds["square"] if is_gpu else None,
    }


def check_same(sides: Mapping[str, Side], work: Workload) -> float:
    """Return the largest difference between the sides' outputs without dropout. Raises UserError above TOLERANCE."""
    outputs = []
    for side in sides.values():
        side.model.eval()
        with torch.inference_mode():
            outputs.append(side.forward(work.batches[0]))
        side.model.train()
    difference = float((outputs[0] - outputs[1]).abs().max())
    if not difference <= TOLERANCE:  # nan is a difference too
        raise UserError(
            f"{work.task.title}: the outputs of {' and '.join(sides)} differ by up to {difference:.1e}, more than "
            f"{TOLERANCE:g}: they compute different things, so their times cannot be compared"
        )
    return difference


def time_training(options: BenchmarkOptions, comparison: str, work: Workload, sides: Mapping[str, Side]) -> Record:
    """Return the seconds of each side's blocks of training steps, and the work in each block."""
    blocks = [tuple(work.batches[i : i + options.block]) for i in range(0, len(work.batches), options.block)]
    actions = {name: side.train_on for name, side in sides.items()}
    seconds = time_in_turn(actions, blocks, options.warmup, work.device, f"{comparison} {work.task.name} train")
    # A backward pass costs two forward passes, or one where the large weights need no gradient.
    passes = 2 if comparison in ADAPTER_NAMES else 3
    timed = [np.concatenate(block) for block in blocks[options.warmup :]]
    costs = work_per_round(work.bert_config, work.train, timed, passes)
    return {"batches": options.block, "seconds": seconds, **costs}


def time_evaluation(options: BenchmarkOptions, comparison: str, work: Workload, sides: Mapping[str, Side]) -> Record:
    """Return the seconds of each side's passes over dev, and the work in each pass."""
    passes = min(options.steps, EVAL_PASSES)
    actions = {name: side.evaluate for name, side in sides.items()}
    seconds = time_in_turn(actions, [()] * (1 + passes), 1, work.device, f"{comparison} {work.task.name} eval")
    costs = work_per_round(work.bert_config, work.dev, [np.arange(len(work.dev))] * passes, 1)
    return {"batches": math.ceil(len(work.dev) / options.batch_size), "seconds": seconds, **costs}


def measure_speed(options: BenchmarkOptions, comparison: str, task: str) -> list[Record]:
    """Return a record for each mode with the seconds of each side's rounds and the work in them.

    Raises UserError where the sides compute different things.
    """
    work = make_workload(options, task, say)
    sides = {name: build(work) for name, build in COMPARISONS[comparison].items()}
    difference = check_same(sides, work)
    say(f"{comparison} {task}: outputs differ by at most {difference:.1e}")
    tokens = int(np.mean([work.train.lengths[indices].sum() for indices in work.batches]))
    common = {"comparison": comparison, "task": task, "max_difference": difference}
    _, ours = sides.values()
    common |= matmul_peaks(work.bert_config, tokens, ours.work.device)
    timers = {"train": time_training, "eval": time_evaluation}
    return [{**common, "mode": mode, **timers[mode](options, comparison, work, sides)} for mode in options.modes]


def measure_memory(options: BenchmarkOptions, comparison: str, task: str, side_name: str) -> dict[str, int]:
    """Return the peak bytes of one side after building it and after each mode; run it in a separate process.

    A peak never falls, so evaluation, which takes less, comes before training.
    """
    work = make_workload(options, task, ignore)  # measure_speed prints the same lines
    side = COMPARISONS[comparison][side_name](work)
    peaks = {"built": work.device.peak_memory()}
    if "eval" in options.modes:
        side.evaluate()
        peaks["eval"] = work.device.peak_memory()
    if "train" in options.modes:
        for indices in work.batches[:MEMORY_STEPS]:
            side.train_on(indices)
        peaks["train"] = work.device.peak_memory()
    return peaks


def compare_sides(options: BenchmarkOptions) -> list[Record]:
    """Return the records of each comparison, task and mode, with the memory of each side.

    Memory comes first: Linux counts the size that the parent process has at the start as its child's.
    """
    kind = requested_device(options, ignore).device.type
    names = [name for asked in options.comparisons for name in (STRONG_PEERS[kind] if asked == "strong" else [asked])]
    pairs = [(comparison, task) for comparison in names for task in options.tasks]
    cases = [(*pair, side) for pair in pairs for side in COMPARISONS[pair[0]]]
    memory: dict[tuple[str, str], dict[str, Any]] = {pair: {} for pair in pairs}
    for *pair, side in progress(cases, "memory", "process"):
        label = " ".join((*pair, side))
        memory[*pair][side] = run_in_processes(label, measure_memory, (options, *pair, side))
    return [{**record, "memory": memory[pair]} for pair in pairs for record in measure_speed(options, *pair)]


def tokenise_file(path: Path, weights: Path, cache: Path) -> dict[str, float]:
    """Return the seconds from a file to token ids, the peak bytes of the process, and the mean tokens of a text."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    *_, tokenizer = load_start(str(weights))
    started = time.perf_counter()
    data = TaskData(read_examples(path, PARA, "train", BadRows(0, say)), tokenizer, "siamese")
    seconds = time.perf_counter() - started
    tokens = float(data.lengths.mean()) / len(PARA.text_columns)
    return {"seconds": seconds, "peak": CPU.peak_memory(), "tokens": tokens}


def measure_tokenising(options: BenchmarkOptions, pairs: int = PAIRS) -> list[Record]:
    """Return what tokenise_file measures of a generated file, first with an empty cache and then with a full one."""
    weights, _, tokenizer = load_start(options.pretrained)
    with tempfile.TemporaryDirectory() as name:
        path, cache = Path(name) / "pairs.csv", Path(name) / "cache"
        write_task_file(path, PARA, tokenizer, np.full((pairs, len(PARA.text_columns)), PAIR_TOKENS))
        measure = partial(run_in_processes, "tokenise", tokenise_file, (path, weights, cache))
        runs = {label: measure() for label in progress(("first", "cached"), "tokenise", "process")}
    return [{"mode": "tokenise", "pairs": pairs, **runs}]


def run_command(command: Sequence[str]) -> None:
    """Run a command to its end. Raises UserError with its last line on standard error where it fails."""
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        *_, last = ["", *finished.stderr.strip().splitlines()]
        raise UserError(f"{' '.join(command)} failed: {last}")


def measure_start(options: BenchmarkOptions, starts: int = 3) -> list[Record]:
    """Return the seconds of the training script's --help, and of a run of one step of each task on data/sample."""
    script = [sys.executable, str(ROOT / "multitask_classifier.py")]
    weights, _, tokenizer = load_start(options.pretrained)
    with tempfile.TemporaryDirectory() as folder:
        short = ["--data_dir", str(ROOT / "data" / "sample"), "--pretrained", str(weights)]
        short += ["--max_length", str(tokenizer.max_length), "--threads", str(options.threads)]
        short += ["--epochs", "1", "--max_train_examples", "64", "--run_dir", folder, "--overwrite"]
        commands = {"help": [*script, "--help"], "run": [*script, *short]}
        actions = {name: partial(run_command, command) for name, command in commands.items()}
        seconds = time_in_turn(actions, [()] * (1 + starts), 1, CPU, "start")
    return [{"mode": "start", "seconds": seconds}]


def time_rank(options: BenchmarkOptions, task: str, rank: int, size: int, port: int) -> list[float]:
    """Return the seconds of each training step in one of `size` processes that share each batch."""
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in values.items()}})
    with joined(ComputeOptions(options.use_gpu, options.amp, options.threads)) as context:
        work = make_workload(options, task, ignore)
        actions = {"step": MinbertSide(work, context=context).train_on}
        rounds = [(indices,) for indices in work.batches]
        return time_in_turn(actions, rounds, options.warmup, work.device, f"scaling {task} {size}")["step"]


def measure_scaling(options: BenchmarkOptions) -> list[Record]:
    """Return the seconds of each training step of each task by number of processes.

    A process ends a step together with the others, so the first one's seconds stand for all.
    """
    records = []
    for task in options.tasks:
        make_workload(options, task, say)  # prints what is wrong with the data once, before any process starts
        seconds = {}
        for ranks in options.ranks:
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]  # which is free again once the server has closed
            calls = [(options, task, rank, int(ranks), port) for rank in range(int(ranks))]
            seconds[ranks] = run_in_processes(f"--ranks {ranks}", time_rank, *calls)
        records.append({"mode": "scaling", "task": task, "batch_size": options.batch_size, "seconds": seconds})
    return records


def measure_frozen(options: BenchmarkOptions, epochs: int = FROZEN_EPOCHS) -> list[Record]:
    """Return the seconds of epochs that train the heads of each task, with --cache_frozen and without.

    The first epoch, which fills the cache, does not count. The method is R0's last-layer mode with its Adamax.
    """
    records, size = [], options.batch_size
    for task in options.tasks:
        flags = [f"--train_{task}", "--fine_tune_mode", "last-layer", "--batch_size", str(size)]
        flags += ["--max_train_examples", str(FROZEN_STEPS * size)]
        actions = {}
        for label, more, printed in (("computed anew", [], say), ("--cache_frozen", ["--cache_frozen"], ignore)):
            trainer = trainer_from_flags(options, [*flags, *more], {task: TASKS[task]}, printed)
            start_epoch(trainer, 0)
            batches = [batch.indices for batch in task_batches(trainer.plan, 0, task)]
            actions[label] = partial(train_on, trainer, task, *batches)
        seconds = time_in_turn(actions, [()] * (1 + epochs), 1, trainer.device, f"frozen {task}")
        about = {"mode": "frozen", "task": task, "steps": len(batches), "batch_size": size}
        records.append({**about, "seconds": seconds})
    return records


def measure_optimizers(options: BenchmarkOptions, shape: BertConfig | None = None) -> list[Record]:
    """Return the seconds of each step of torch's fastest optimizers and of ours.

    They take turns on parameters of a BERT of this shape, by default BERT-base.
    """
    device = requested_device(replace(options, amp=False), ignore)
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in BertModel(shape or BertConfig()).parameters()]
    contenders: dict[str, dict[str, Callable[..., Any]]] = {
        "AdamW": {"torch, fused": partial(torch.optim.AdamW, fused=True), "minbert": AdamW},
        "Adamax": {"torch, foreach": partial(torch.optim.Adamax, foreach=True), "minbert": Adamax},
    }
    rounds, records = [()] * (options.warmup + options.steps), []
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


def measure_recipe(options: BenchmarkOptions, warmup: int = RECIPE_WARMUP, steps: int = RECIPE_STEPS) -> list[Record]:
    """Return the seconds that R0's Yin Yang recipe would take on the real files.

    Each stage of unfreezing has other seconds per step; the rows of the real files give the number of steps. Raises
    UserError where a task has no step left after the warmup.
    """
    flags = [f"@{ROOT / 'recipes' / 'r0' / 'g6-yin-yang.args'}", "--use_gpu", "--amp"]
    flags += ["--cuda_graphs"] if options.cuda_graphs else []
    trainer = trainer_from_flags(options, flags, {name: TASKS[name] for name in REAL_ROWS}, say)
    rounds = {}
    for name in REAL_ROWS:
        batches = [batch.indices for batch in task_batches(trainer.plan, 0, name)]
        if len(batches) <= warmup:
            raise UserError(
                f"--modes recipe needs {warmup + 1} steps of {name}, but --data_dir {options.data_dir} has only "
                f"{len(batches)}; use --data_dir {GENERATED}"
            )
        rounds[name] = [tuple(batches[:warmup]), tuple(batches[warmup : warmup + steps])]
    stages: dict[str, dict[str, float]] = {}
    train = dict.fromkeys(REAL_ROWS, 0.0)
    for epoch in range(trainer.config.train.epochs):
        stage = start_epoch(trainer, epoch)
        for name in REAL_ROWS if stage not in stages else ():
            action, label = {name: partial(train_on, trainer, name)}, f"recipe, epoch {epoch + 1}, {name}"
            (seconds,) = time_in_turn(action, rounds[name], 1, trainer.device, label)[name]
            stages.setdefault(stage, {})[name] = seconds / len(rounds[name][1])
        for name, per_step in stages[stage].items():
            train[name] += per_step * math.ceil(REAL_ROWS[name][0] / trainer.config.train.batch_size)
    started = time.perf_counter()
    evaluated = trainer.evaluate(list(REAL_ROWS))
    per_row = (time.perf_counter() - started) / sum(len(labels) for _, labels in evaluated.values())
    evaluation = trainer.config.train.epochs * per_row * sum(rows for _, rows in REAL_ROWS.values())
    graphs = None if trainer.cuda_graphs is None else trainer.cuda_graphs.report()
    return [{"mode": "recipe", "stages": stages, "train": train, "evaluation": evaluation, "graphs": graphs}]


# Those that start processes come before the comparisons, while this process is small.
EARLY_MODES: Modes = {"tokenise": measure_tokenising, "start": measure_start, "scaling": measure_scaling}
LATE_MODES: Modes = {"frozen": measure_frozen, "optimizer": measure_optimizers, "recipe": measure_recipe}


def run(options: BenchmarkOptions) -> None:
    """Measure what the options ask for, write the results into a file of --out, and print the tables."""
    started = time.strftime("%Y%m%d-%H%M%S")
    peer_modes = tuple(mode for mode in options.modes if mode in PEER_MODES)
    rows = {"recipe": RECIPE_BATCH * (RECIPE_WARMUP + RECIPE_STEPS), "frozen": FROZEN_STEPS * options.batch_size}
    with prepared_data(options, max(rows.get(mode, 0) for mode in options.modes)) as prepared:
        others = [record for mode in EARLY_MODES if mode in options.modes for record in EARLY_MODES[mode](prepared)]
        compared = compare_sides(replace(prepared, modes=peer_modes)) if peer_modes else []
        others += [record for mode in LATE_MODES if mode in options.modes for record in LATE_MODES[mode](prepared)]
    device = requested_device(options, ignore)
    packages = ["torch", "numpy", "tokenizers", *(["transformers"] if compared else [])]
    content = {
        "config": asdict(options),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": device.name,
        "amp": device.amp and str(device.amp),
        "started": started,
        "attention": dict(varlen_attention.calls),
        "results": compared + others,
    }
    path = Path(options.out) / f"{Path(options.pretrained).name}-{device.device.type}-{started}.json"
    write_text(path, json.dumps(content, indent=2) + "\n")
    say(f"{device.name}; --pretrained {options.pretrained} --batch_size {options.batch_size}")
    if compared:
        say(f"{comparison_table(compared)}\n{LEGEND}")
    for record in others:
        say(MODE_LINES[record["mode"]](record))
    if options.data_dir == GENERATED:
        say("\n".join(target_lines(compared + others, options.batch_size)))
    say(f"every round: {path}")
