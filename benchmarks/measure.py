"""How the benchmark measures: seconds in turn, floating-point operations, peak rates, and separate processes."""

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import BertConfig
from datasets import TaskData
from kernels.linear import product
from utils.console import progress
from utils.device import Device
from utils.errors import UserError

T = TypeVar("T")
PEAK_RUNS, PEAK_WARMUP = 10, 2  # runs of a matrix product, of which the fastest counts


def say(line: str) -> None:
    """Print a line above the progress bars."""
    tqdm.write(line)


def ignore(line: str) -> None:
    """Print nothing, where another step of the benchmark prints the same line."""


def run_in_process(label: str, function: Callable[..., T], *arguments: object) -> T:
    """Return what `function` returns in a fresh process. Raises UserError, naming `label`, where the process dies."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(f"{label}: the process died, perhaps of too little memory; free some first") from None


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


def matmul_peaks(shape: BertConfig, tokens: int, device: Device) -> dict[str, float]:
    """Return the FLOP/s of a layer's matrix products alone, for this many tokens: the best of ten runs.

    `torch_peak` is that of torch's operator; `matmul_peak` is the better one of that and kernels/linear.py.
    """
    width, inner = shape.hidden_size, shape.intermediate_size
    sizes = [(width, width)] * 4 + [(width, inner), (inner, width)]
    inputs = {n: torch.randn(tokens, n, device=device.device, dtype=device.amp) for n in (width, inner)}
    weights = [torch.randn(size, device=device.device, dtype=device.amp) for size in sizes]
    repeats = 1 if device.device.type == "cpu" else 50  # a GPU is too fast to time a single layer

    def layers(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        for weight in weights * repeats:
            multiply(inputs[len(weight)], weight)

    products = {"torch": partial(layers, torch.matmul), "kernels": partial(layers, product)}
    rounds = [()] * (PEAK_WARMUP + PEAK_RUNS)
    seconds = time_in_turn(products, rounds, PEAK_WARMUP, device, "matmul peak")
    flops = repeats * 2 * tokens * sum(rows * columns for rows, columns in sizes)
    rates = {name: flops / min(times) for name, times in seconds.items()}
    return {"torch_peak": rates["torch"], "matmul_peak": max(rates.values())}


def square_peak(device: Device) -> float | None:
    """Return the FLOP/s of one large square product on a GPU, the best of ten runs, or None on a CPU."""
    if device.device.type == "cpu":
        return None
    x = torch.randn(8192, 8192, device=device.device, dtype=device.amp)
    rounds = [()] * (PEAK_WARMUP + PEAK_RUNS)
    seconds = time_in_turn({"square": lambda: x @ x}, rounds, PEAK_WARMUP, device, "peak")["square"]
    return 2 * 8192**3 / min(seconds)
