"""Run the modes in order, print their tables, and write everything into a file."""

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from benchmarks.comparisons import compare_sides
from benchmarks.measure import ignore, say
from benchmarks.modes import (
    measure_frozen,
    measure_optimizers,
    measure_recipe,
    measure_scaling,
    measure_start,
    measure_tokenising,
    min_rows,
)
from benchmarks.options import GENERATED, PEER_MODES, BenchmarkOptions
from benchmarks.peers import import_transformers
from benchmarks.tables import LEGEND, MODE_LINES, comparison_table, target_lines
from benchmarks.workloads import prepared_data, requested_device
from kernels import flash_attention
from models.checkpoint import git_commit
from utils.device import Device
from utils.files import write_text

Records = list[dict[str, Any]]


def measure(options: BenchmarkOptions) -> tuple[Records, Records]:
    """Return the records of the comparisons with a peer, and those of the other modes.

    What starts processes comes first, while this process is small.
    """
    modes, tasks = options.modes, options.tasks
    others = [measure_tokenising(options)] if "tokenise" in modes else []
    others += [measure_start(options)] if "start" in modes else []
    others += [measure_scaling(options, task) for task in tasks] if "scaling" in modes else []
    compared = compare_sides(replace(options, modes=tuple(mode for mode in modes if mode in PEER_MODES)))
    others += [measure_frozen(options, task) for task in tasks] if "frozen" in modes else []
    others += measure_optimizers(options) if "optimizer" in modes else []
    others += [measure_recipe(options)] if "recipe" in modes else []
    return compared, others


def file_content(
    options: BenchmarkOptions, device: Device, started: str, packages: Mapping[str, Any], results: Records
) -> dict[str, Any]:
    """Return the results with what they depend on: options, commit, versions and device."""
    versions = {name: str(package.__version__) for name, package in packages.items()}
    return {
        "config": asdict(options),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **versions},
        "device": device.name,
        "amp": device.amp and str(device.amp),
        "started": started,
        "attention": dict(flash_attention.calls),
        "results": results,
    }


def run(options: BenchmarkOptions) -> None:
    """Measure what the options ask for, write the results into a file of --out, and print the tables."""
    started = time.strftime("%Y%m%d-%H%M%S")
    with prepared_data(options, min_rows(options)) as prepared:
        compared, others = measure(prepared)
    device = requested_device(options, ignore)
    packages = {"torch": torch, "numpy": np, "tokenizers": tokenizers}
    if compared:
        packages["transformers"] = import_transformers()
    content = file_content(options, device, started, packages, compared + others)
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
