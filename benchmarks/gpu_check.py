"""All that needs a real GPU, in at most four minutes (`make gpu-check`): tests, times, memory.

Each part runs in a process of its own, which ends at the part's limit, and writes what it has found at once. A part
that fails or takes too long costs the others nothing. `make gpu-check PARTS="epoch-eager epoch-compile"` runs further
parts, for what is left of the time. `--tiny` rehearses all parts at small sizes, without limits.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.launch_counts import MINILM, SIZE, Case, make_case_trainer
from benchmarks.modes import Side, matmul_peaks, time_in_turn, work_per_round
from benchmarks.options import GENERATED, RANDOM_BERT, BenchmarkOptions
from benchmarks.peers import MinbertSide, TransformersSide, start_epoch, train_on, trainer_from_flags
from benchmarks.strong_peers import VarlenSide
from benchmarks.tables import MAX_EPOCH_SECONDS, MIN_RATIO, MIN_SHARE, target_line
from benchmarks.workloads import REAL_ROWS, Workload, make_workload, prepared_data, write_random_bert
from config import BertConfig
from tasks import PARA
from training.task_sampling import Step, TaskBatch, task_batches
from utils.console import format_table, say
from utils.errors import first_line
from utils.files import write_json

TESTS = Path(__file__).resolve().parent.parent / "tests"
ATTENTION = ("flash", "fmha", "efficient_attention")  # in the names of the kernels of attention
OURS: dict[str, dict[str, Any]] = {
    "eager": {},
    "graphs": {"cuda_graphs": True},
    "compile": {"compile": True},
    "graphs and compile": {"cuda_graphs": True, "compile": True},
}


@dataclass(frozen=True)
class Size:
    """How much the parts do."""

    pretrained: str = RANDOM_BERT
    shrink: int = 1  # what batches are divided by
    block: int = 10  # steps of a round
    warmup: int = 3  # rounds
    rounds: int = 8  # timed ones
    leak_steps: int = 1000  # after a failed capture
    repeats: int = 10  # passes over a share of Quora's rows that make an epoch
    rows: int = REAL_ROWS[PARA.name][0]
    loader_workers: int = 4
    tests: tuple[str, ...] = ()  # what pytest gets beside -m gpu


TINY_TESTS = ("-p", "simulated_gpu", "-k", "not measured and not profile")
TINY = Size("", shrink=8, block=1, rounds=2, leak_steps=30, repeats=2, rows=96, loader_workers=0, tests=TINY_TESTS)
TINY_SHAPE = BertConfig(
    vocab_size=500, hidden_size=64, num_attention_heads=2, intermediate_size=128, num_hidden_layers=2
)


def options_of(size: Size, batch_size: int) -> BenchmarkOptions:
    """Return the options of a benchmark on the GPU with generated data."""
    options = BenchmarkOptions(
        tasks=(PARA.name,), data_dir=GENERATED, pretrained=size.pretrained, use_gpu=True, amp=True
    )
    options.batch_size, options.loader_workers = batch_size // size.shrink, size.loader_workers
    options.block, options.warmup, options.steps = size.block, size.warmup, size.rounds
    return options


def run_tests(size: Size, path: Path) -> None:
    """Run the tests that are marked gpu; pytest writes each result at once. Exits with pytest's code."""
    import pytest

    files = [str(file) for file in TESTS.rglob("test_*.py") if "mark.gpu" in file.read_text(encoding="utf-8")]
    flags = ["-m", "gpu", "-v", "--tb=short", f"--junit-xml={path.with_suffix('.xml')}"]
    raise SystemExit(int(pytest.main([*files, *flags, *size.tests])))


def side_makers(work: Workload) -> dict[str, Callable[[], Side]]:
    """Return what makes each side of `measure_steps`: both peers, and ours with and without each option of `OURS`."""

    def ours(train: Mapping[str, Any]) -> Side:
        config = replace(work.config, train=replace(work.config.train, **train))
        return MinbertSide(replace(work, config=config))

    peers = {"transformers": TransformersSide, "transformers, varlen": VarlenSide}
    made: dict[str, Callable[[], Side]] = {name: partial(build, work) for name, build in peers.items()}
    return made | {name: partial(ours, train) for name, train in OURS.items()}


def make_sides(work: Workload, first: Sequence[np.ndarray], errors: dict[str, str]) -> dict[str, Side]:
    """Return the sides that can be made and train on the `first` batches; `errors` gets the reason of each other."""
    sides: dict[str, Side] = {}
    for name, make in side_makers(work).items():
        try:
            side = make()
            side.train_on(*first)
            sides[name] = side
        except Exception as error:  # one side that fails must not cost the others
            errors[name] = first_line(error)
            say(f"{name}: {errors[name]}")
    return sides


def attention_share(side: Side, batches: Sequence[np.ndarray]) -> float | None:
    """Return the share of the GPU's time that attention takes in training on `batches`; None if nothing tells."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        side.train_on(*batches)
        side.work.device.synchronize()
    kernels = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    times = {event.key: event.self_device_time_total for event in kernels}
    taken = sum(time for name, time in times.items() if any(word in name.lower() for word in ATTENTION))
    return taken / sum(times.values()) if times else None


def measure_steps(size: Size, path: Path, batch_size: int) -> None:
    """Time a training step of every side in turn on pairs of Quora's lengths, and write all rounds so far."""
    with prepared_data(options_of(size, batch_size)) as options:
        work = make_workload(options, PARA.name, say)
        blocks = [tuple(work.batches[i : i + size.block]) for i in range(0, len(work.batches), size.block)]
        record: dict[str, Any] = {"device": work.device.name, "batch_size": batch_size, "errors": {}, "seconds": {}}
        sides = make_sides(work, blocks[0], record["errors"])
        actions = {name: side.train_on for name, side in sides.items()}
        time_in_turn(actions, blocks[1 : size.warmup], 0, work.device, "warmup")
        costs = work_per_round(work.bert_config, work.train, work.batches[size.warmup * size.block :], 3)
        record["flops"] = float(np.mean(costs["flops"]))
        for i in range(size.warmup, len(blocks), 2):
            for name, seconds in time_in_turn(actions, blocks[i : i + 2], 0, work.device, "rounds").items():
                record["seconds"].setdefault(name, []).extend(second / size.block for second in seconds)
            write_json(path, record)
            say(describe_steps(record))
        runners = {name: side.trainer.cuda_graphs for name, side in sides.items() if isinstance(side, MinbertSide)}
        record["graphs"] = {name: runner.report() for name, runner in runners.items() if runner is not None}
        if "eager" in sides:
            record["attention"] = attention_share(sides["eager"], blocks[0])
        if size.pretrained == RANDOM_BERT:  # the large product would take a CPU minutes
            record["peak"] = matmul_peaks(work.bert_config, int(np.mean(costs["tokens"])), work.device)
        write_json(path, record)
        say(describe_steps(record))


def describe_steps(record: dict[str, Any]) -> str:
    """Return a table of what `measure_steps` measured, the targets, and attention's share."""
    medians = {name: float(np.median(seconds)) for name, seconds in record["seconds"].items()}
    peers = [name for name in medians if name not in OURS]
    rows = [
        [name, f"{1e3 * median:.2f}", *(f"{medians[peer] / median:.2f}" for peer in peers)]
        for name, median in medians.items()
    ]
    lines = [format_table([f"batch {record['batch_size']}", "ms a step", *(f"times {peer}" for peer in peers)], rows)]
    if record.get("attention") is not None:
        lines.append(f"attention takes {record['attention']:.0%} of the GPU's time in an eager step")
    best, batch_size = min((medians[name] for name in OURS if name in medians), default=None), record["batch_size"]
    what = f"at batch {batch_size}"
    if best and "transformers" in medians and batch_size in MIN_RATIO:
        ratio = medians["transformers"] / best
        lines.append(target_line(f"times transformers {what}", ratio, "at least", MIN_RATIO[batch_size], 2))
    if best and "peak" in record and batch_size in MIN_SHARE:
        share = record["flops"] / best / record["peak"]["square_peak"]
        lines.append(target_line(f"share of the device's peak {what}", share, "at least", MIN_SHARE[batch_size], 3))
    return "\n".join(lines)


def measure_leak(size: Size, path: Path) -> None:
    """Let a capture fail, make a thousand steps after that, and write the memory that tensors take after each tenth."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_case_trainer(Case(MINILM, ["--amp", "--cuda_graphs"]), Path(folder))
    assert trainer.cuda_graphs is not None
    compute = trainer.cuda_graphs.compute

    def waits(*args: Any) -> tuple[Tensor, Tensor]:
        loss, outputs = compute(*args)
        loss.item()  # CUDA makes a capture invalid that waits
        return loss, outputs

    trainer.cuda_graphs.compute = waits
    step, taken = Step((TaskBatch(PARA.name, np.arange(SIZE)),)), []
    for _ in range(10):
        for _ in range(size.leak_steps // 10):
            trainer.train_step(step)
        trainer.device.synchronize()
        taken.append(torch.cuda.memory_allocated())
        write_json(path, {"bytes": taken, "passes": dict(trainer.cuda_graphs.counts)})
    say(f"tensors after a failed capture, by {size.leak_steps // 10} steps: {[f'{x / 1e6:.2f} MB' for x in taken]}")
    say(target_line("MB that the last half of the steps added", (taken[-1] - taken[4]) / 1e6, "at most", 1, 2))


def measure_epoch(size: Size, path: Path, more: Sequence[str]) -> None:
    """Time an epoch of pairs of Quora's number and lengths, with flags `more`, as passes over a share of them."""
    batch_size = 256 // size.shrink
    flags = f"--train_para --arch v1 --fine_tune_mode full-model --optim AdamW --batch_size {batch_size}".split()
    flags += ["--use_gpu", "--amp", *more]
    rows = size.rows // size.repeats
    with prepared_data(replace(options_of(size, 256), steps=1, warmup=0), rows) as options:
        trainer = trainer_from_flags(options, flags, {PARA.name: PARA}, say)
        start_epoch(trainer, 0)
        seconds: list[float] = []
        for number in range(1 + size.repeats):  # the first one captures graphs, or compiles
            batches = [batch.indices for batch in task_batches(trainer.plan, number, PARA.name)]
            started = time.perf_counter()
            train_on(trainer, PARA.name, *batches)
            trainer.device.synchronize()
            seconds.append(time.perf_counter() - started)
            graphs = trainer.cuda_graphs.report() if trainer.cuda_graphs is not None else ""
            write_json(path, {"pairs": rows, "batch_size": batch_size, "seconds": seconds, "graphs": graphs})
            say(f"{rows:,} pairs at batch {batch_size} in {seconds[-1]:.2f} s; {graphs}")
    whole = sum(seconds[1:])
    say(target_line(f"seconds for {rows * size.repeats:,} pairs", whole, "at most", MAX_EPOCH_SECONDS, 1))


Part = Callable[[Size, Path], None]
# The seconds that each part may take: 240 in all. steps-64 compiles for the later ones, too.
PARTS: dict[str, tuple[int, Part]] = {
    "tests": (45, run_tests),
    "steps-64": (95, partial(measure_steps, batch_size=64)),
    "steps-256": (40, partial(measure_steps, batch_size=256)),
    "epoch": (40, partial(measure_epoch, more=["--cuda_graphs"])),
    "leak": (20, measure_leak),
}
# Further parts, which run where they are named, or in the rehearsal.
FURTHER: dict[str, tuple[int, Part]] = {
    "epoch-eager": (60, partial(measure_epoch, more=[])),
    "epoch-compile": (120, partial(measure_epoch, more=["--compile"])),
    "epoch-both": (120, partial(measure_epoch, more=["--cuda_graphs", "--compile"])),
}


def run_part(part: Part, size: Size, path: Path) -> None:
    """Run a part in this process, which leads a group of its own; what it prints goes beside its results."""
    os.setsid()
    with path.with_suffix(".txt").open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        part(size, path)


def run_parts(names: Sequence[str], size: Size, out: Path) -> bool:
    """Run parts one after another; print what each says, and return whether all have ended well in time."""
    well = True
    for name in names:
        limit, part = (PARTS | FURTHER)[name]
        path, started = out / f"{name}.json", time.perf_counter()
        # A fork has all imports; this process has not touched the GPU, which a fork could not use then.
        process = multiprocessing.get_context("fork").Process(target=run_part, args=(part, size, path))
        process.start()
        process.join(None if size.tests else limit)
        ended = "took too long" if process.is_alive() else f"exit code {process.exitcode}" if process.exitcode else "ok"
        with suppress(ProcessLookupError):
            os.killpg(int(process.pid or 0), signal.SIGKILL)  # with the processes that it has left
        process.join()
        well = well and ended == "ok"
        say(f"\n{name}: {ended}, {time.perf_counter() - started:.0f} of at most {limit} s\n")
        say("\n".join(path.with_suffix(".txt").read_text().splitlines()[-12:]))
    return well


def main(argv: Sequence[str]) -> None:
    """Run the parts that the command line names, or all. Exits with code 1 where one fails."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=str(__doc__).split("\n")[0])
    parts = f"{', '.join(PARTS)} (default: these), {', '.join(FURTHER)}"
    parser.add_argument("parts", nargs="*", metavar="PART", help=parts)
    parser.add_argument("--out", default="runs/gpu-check", help="folder of the results (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="rehearse at small sizes, without limits")
    given = parser.parse_args(argv)
    size, out = TINY if given.tiny else Size(), Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    if given.tiny:
        size = replace(size, pretrained=str(out / "bert"))
        write_random_bert(out / "bert", TINY_SHAPE)
    sys.exit(not run_parts(given.parts or [*PARTS, *(FURTHER if given.tiny else ())], size, out))


if __name__ == "__main__":
    main(sys.argv[1:])
