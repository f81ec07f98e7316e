"""Memory over the steps that --profile recorded, from the trace in a run directory."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reporting.figures import timeline_figure
from reporting.page import ReportItem
from reporting.sources import Run
from reporting.tables import Column, Table, Value
from reporting.trials import source_of_runs
from training.profiling import TRACE
from utils.errors import UserError, first_line
from utils.untrusted import limited, open_regular

MAX_TRACE = 2 << 30  # bytes; five steps of BERT-base have about a hundredth of them
CPU = 0  # as the profiler numbers kinds of devices


def memory_item(run: Run) -> ReportItem | str | None:
    """Return memory over the profiled steps of a run (R2, figure 10); None if it has no trace.

    Raises UserError if the trace is damaged.
    """
    path = run.path / TRACE
    if not path.is_file():
        return None
    try:
        events = read_trace(path)
        steps = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if is_step(event))
        memory = [event for event in events if event.get("name") == "[memory]"]
        kind = max((event["args"]["Device Type"] for event in memory), default=CPU)  # of a GPU, if there is one
        points = [
            (event["ts"], event["args"]["Total Allocated"]) for event in memory if event["args"]["Device Type"] == kind
        ]
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}: is damaged ({first_line(error):.80}); its memory is left out") from error
    if not steps or not any(steps[0][0] <= time <= steps[-1][1] for time, _ in points):
        return "no memory over time, since the trace has no memory of steps"
    return draw(run, steps, points, on_gpu=kind != CPU)


def read_trace(path: Path) -> list[Mapping[str, Any]]:
    """Return the events of a trace of torch's profiler. Raises ValueError if it is too large."""
    with open_regular(path) as packed, gzip.open(packed) as file:
        return list(json.loads(limited(file, MAX_TRACE))["traceEvents"])


def is_step(event: Mapping[str, Any]) -> bool:
    """Return whether an event is a step as the CPU saw it."""
    return str(event.get("name")).startswith("ProfilerStep#") and event.get("cat") == "user_annotation"


def draw(
    run: Run, steps: Sequence[tuple[float, float]], points: Sequence[tuple[float, float]], on_gpu: bool
) -> ReportItem:
    """Return the item of `steps` (their starts and ends) and `points` (times and bytes); times are in microseconds."""
    begin, end = steps[0][0], steps[-1][1]
    inside = [((time - begin) / 1e3, size / 1e6) for time, size in points if begin <= time <= end]
    rows: list[list[Value]] = []
    for number, (start, stop) in enumerate(steps, start=1):
        peak = max((size for time, size in points if start <= time <= stop), default=0.0)
        rows.append([number, (start - begin) / 1e3, (stop - start) / 1e3, peak / 1e6])
    names = ("step", "start (ms)", "time (ms)", "peak memory (MB)")
    table = Table([Column(name, "d" if name == "step" else ",.1f") for name in names], rows)
    starts = [(start - begin) / 1e3 for start, _ in steps]
    figure = timeline_figure(inside, starts, "time (ms)", "memory of tensors (MB)")
    text = "Dotted lines are the starts of steps."
    if not on_gpu:
        text += " On a CPU, the profiler counts the tensors that were made since it began."
    return ReportItem(
        f"{run.name}-memory", "Memory over the profiled steps", text, table, figure, source_of_runs([run])
    )
