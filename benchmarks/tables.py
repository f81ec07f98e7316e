"""The lines and tables that people read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.workloads import REAL_ROWS
from utils.console import format_table

LEGEND = """ratio: the peer's seconds over ours, median over pairs of rounds, or of sums where the peer's batches are
grouped by length; rates are ours. GFLOP/s: what real tokens
need; torch's: a layer's matrix products alone, by torch's operator; peak: by the faster of that and kernels/linear.py.
MB: of a process with its libraries, or of a GPU's tensors."""
# Targets on a GPU with random-bert-base and generated data.
MIN_RATIO = {64: 5.0, 256: 2.5}  # by batch size: times transformers
MIN_SHARE = {256: 0.35}  # by batch size: share of the device's peak
MAX_EPOCH_SECONDS, MAX_RECIPE_SECONDS = 25.0, 300.0


def arrays(seconds: Mapping[str, Sequence[float]]) -> list[np.ndarray]:
    """Return the seconds [rounds] of each side, the peer's first."""
    return [np.array(times) for times in seconds.values()]


def comparison_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a line of medians over the rounds for each record; rates and shares are ours.

    Where the peer's batches are grouped by length, single rounds are not comparable: the line has means then.
    """
    header = ["comparison", "task", "mode", "peer s/step", "our s/step", "ratio", "examples/s", "tokens/s"]
    header += ["GFLOP/s", "of torch's", "of peak", "peer MB", "our MB"]
    rows = []
    for record in records:
        peer, ours = arrays(record["seconds"])
        is_grouped = record["comparison"].startswith("grouped")
        middle = np.mean if is_grouped else np.median
        ratio = peer.sum() / ours.sum() if is_grouped else np.median(peer / ours)
        examples, tokens, flops = (np.median(record[name] / ours) for name in ("examples", "tokens", "flops"))
        rows.append(
            [record["comparison"], record["task"], record["mode"]]
            + [f"{middle(seconds) / record['batches']:.4f}" for seconds in (peer, ours)]
            + [f"{ratio:.2f}", f"{examples:,.0f}", f"{tokens:,.0f}", f"{flops / 1e9:,.1f}"]
            + [f"{flops / record[peak]:.0%}" for peak in ("torch_peak", "matmul_peak")]
            + [f"{peaks[record['mode']] / 1e6:,.0f}" for peaks in record["memory"].values()]
        )
    return format_table(header, rows)


def target_line(what: str, found: float, bound: str, target: float, digits: int) -> str:
    """Return a line that says what was found, the target, and whether it is met."""
    met = found <= target if bound == "at most" else found >= target
    return f"{'met   ' if met else 'MISSED'}  {what}: {found:.{digits}f}, {bound} {target:g}"


def target_lines(records: Sequence[Mapping[str, Any]], batch_size: int) -> list[str]:
    """Return a line for each target that these records can decide: those of the recipe and of full models on Quora."""
    lines = []
    for record in records:
        if record["mode"] == "recipe":
            seconds = sum(record["train"].values()) + record["evaluation"]
            lines.append(target_line("seconds of the Yin Yang recipe", seconds, "at most", MAX_RECIPE_SECONDS, 0))
        elif (record["mode"], record.get("task"), record.get("comparison")) == ("train", "para", "full-model"):
            (peer, ours), rows, batch = arrays(record["seconds"]), REAL_ROWS["para"][0], f"at batch {batch_size}"
            if batch_size in MIN_RATIO:
                ratio = np.median(peer / ours)
                lines.append(target_line(f"times transformers {batch}", ratio, "at least", MIN_RATIO[batch_size], 2))
            if batch_size in MIN_SHARE and record["square_peak"]:  # None on a CPU
                what, share = f"share of the device's peak {batch}", np.median(record["flops"] / ours)
                lines.append(target_line(what, share / record["square_peak"], "at least", MIN_SHARE[batch_size], 3))
            epoch = rows / np.median(record["examples"] / ours)
            lines.append(target_line(f"seconds for {rows:,} pairs {batch}", epoch, "at most", MAX_EPOCH_SECONDS, 1))
    return lines


def recipe_line(record: Mapping[str, Any]) -> str:
    """Return what `measure_recipe` measured."""
    stages = "; ".join(
        f"{stage}: {', '.join(f'{name} {1e3 * seconds:.2f}' for name, seconds in tasks.items())} ms/step"
        for stage, tasks in record["stages"].items()
    )
    return f"recipe: {stages}; evaluation {record['evaluation']:.0f} s in all\n{record['graphs'] or ''}".rstrip()


def tokenise_line(record: Mapping[str, Any]) -> str:
    """Return what `measure_tokenising` measured."""
    runs = [f"{run} {record[run]['seconds']:.2f} s, {record[run]['peak'] / 1e6:,.0f} MB" for run in ("first", "cached")]
    return f"tokenise {record['pairs']:,} pairs of {record['first']['tokens']:.1f} tokens a text: {'; '.join(runs)}"


def optimizer_line(record: Mapping[str, Any]) -> str:
    """Return what `measure_optimizers` measured of one optimizer."""
    theirs, ours = arrays(record["seconds"])
    sides = ", ".join(f"{side} {np.median(seconds) * 1e3:.1f} ms" for side, seconds in record["seconds"].items())
    what = f"{record['optimizer']}, a step of {record['parameters']:,} parameters: {sides}"
    return f"{what}; theirs over ours {np.median(theirs / ours):.2f}"


def frozen_line(record: Mapping[str, Any]) -> str:
    """Return what `measure_frozen` measured of one task."""
    plain, cached = arrays(record["seconds"])
    epoch = f"frozen {record['task']}, an epoch of {record['steps']} steps of {record['batch_size']} examples"
    sides = f"{np.median(plain):.2f} s, with --cache_frozen {np.median(cached):.3f} s"
    return f"{epoch}: {sides}; {np.median(plain / cached):.1f} times as fast"


def start_line(record: Mapping[str, Any]) -> str:
    """Return what `measure_start` measured."""
    text, run = (np.median(record["seconds"][name]) for name in ("help", "run"))
    return f"start: --help {text:.2f} s; a whole run of a step of each task on data/sample {run:.1f} s"


def scaling_lines(record: Mapping[str, Any]) -> str:
    """Return what `measure_scaling` measured, and each efficiency relative to the first number of processes."""
    medians = {int(ranks): float(np.median(seconds)) for ranks, seconds in record["seconds"].items()}
    first = next(median * ranks for ranks, median in medians.items())
    return "\n".join(
        f"scaling {record['task']}, batch {record['batch_size']}: {ranks} processes {median:.4f} s a step, "
        f"{record['batch_size'] / median:,.0f} examples/s, efficiency {first / median / ranks:.0%}"
        for ranks, median in medians.items()
    )


MODE_LINES = {
    "tokenise": tokenise_line,
    "frozen": frozen_line,
    "start": start_line,
    "optimizer": optimizer_line,
    "recipe": recipe_line,
    "scaling": scaling_lines,
}
