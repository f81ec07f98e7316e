"""--profile: show where the time and the memory of a few training steps go."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from utils.console import format_table
from utils.device import Device

TRACE = "profile.pt.trace.json.gz"  # in the run directory
WAIT, WARMUP, ACTIVE = 1, 2, 5  # steps that pass, that run with the profiler on, and that are recorded
ROWS = 8  # operations in a table
T = TypeVar("T")


class Profiler:
    """Records steps of the first epoch that it sees, and writes profile.pt.trace.json.gz into a run directory.

    Perfetto (ui.perfetto.dev) opens that file as it is, TensorBoard with the plugin torch-tb-profiler.
    """

    def __init__(self, folder: Path, device: Device, say: Callable[[str], None]) -> None:
        self.trace, self.device, self.say = folder / TRACE, device, say
        self.on_gpu = device.device.type == "cuda"
        self.done = False

    def __call__(self, steps: Iterable[T]) -> Iterator[T]:
        """Yield `steps` and record what is done with them."""
        if self.done:
            yield from steps
            return
        self.done = True
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.on_gpu]
        plan = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
        with profile(activities=activities, schedule=plan, on_trace_ready=self.write, profile_memory=True) as profiler:
            for step in steps:
                yield step
                profiler.step()
        if profiler.step_num <= WAIT + WARMUP:
            self.say(f"--profile: an epoch of at least {WAIT + WARMUP + 1} steps is needed; this one had fewer")

    def write(self, profiler: Any) -> None:
        """Write the trace and print the tables."""
        if profiler.step_num <= WAIT + WARMUP:  # stopped before the first step that was to be recorded
            return
        profiler.export_chrome_trace(str(self.trace))
        # what a kernel took is also counted for the operation that started it
        events = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
        kind = "device" if self.on_gpu else "cpu"
        self.say(f"\n{time_table(events, f'self_{kind}_time_total')}")
        self.say(f"\n{memory_table(events, f'{kind}_memory_usage')}")
        self.say(f"trace, for ui.perfetto.dev or TensorBoard: {self.trace}")


def time_table(events: list[Any], key: str) -> str:
    """Return a table of the operations that take most time, without the operations that they call."""
    total = sum(getattr(event, key) for event in events) or 1.0
    longest = sorted(events, key=lambda event: -getattr(event, key))[:ROWS]
    rows = [
        [
            "Python and other code" if event.key.startswith("ProfilerStep") else event.key,
            str(event.count),
            f"{getattr(event, key) / 1e3:.1f} ms",
            f"{getattr(event, key) / total:.1%}",
        ]
        for event in longest
    ]
    return format_table(["time", "calls", "", "share"], rows)


def memory_table(events: list[Any], key: str) -> str:
    """Return a table of the operations that leave most memory taken, with the operations that they call."""
    largest = sorted(events, key=lambda event: -getattr(event, key))
    named = [event for event in largest if not event.key.startswith(("aten::empty", "ProfilerStep"))][:ROWS]
    rows = [[event.key, str(event.count), f"{getattr(event, key) / 1e6:.1f} MB"] for event in named]
    return format_table(["memory", "calls", ""], rows)
