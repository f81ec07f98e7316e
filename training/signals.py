"""Signals that end a run: the current step is finished, the state is saved, and the exit code tells the signal.

Schedulers and `kill` send SIGTERM some time before SIGKILL, and a closed terminal or a dropped ssh sends SIGHUP. SLURM
sends SIGUSR1 ahead of a time limit (`#SBATCH --signal=USR1@120`). SIGINT is Ctrl-C. Exit codes are those of a shell:
128 plus the number of the signal.

A signal may arrive in the middle of a step or of a swap of weights, so nothing is raised there; `check` raises it where
the state is whole.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

NOTED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)

_received: signal.Signals | None = None  # a process has its signals once, so this is the module's


class Stopped(BaseException):
    """A signal asked for the end of the run. Like KeyboardInterrupt it is no Exception: error handlers ignore it."""

    def __init__(self, signum: signal.Signals) -> None:
        self.name, self.code = signum.name, 128 + signum


def _note(number: int, frame: Any) -> None:
    """Remember the first signal; Ctrl-C after it ends the process at once."""
    global _received
    if _received is None:
        _received = signal.Signals(number)
        with suppress(OSError):  # the terminal may be gone
            # not print: it may have been in the middle of a line
            os.write(2, f"\n{_received.name}: stopping after this step; the state is saved first\n".encode())
    elif number == signal.SIGINT:
        raise KeyboardInterrupt


@contextmanager
def noted() -> Iterator[None]:
    """Let signals wait for `check` inside. After the first one, further ones are ignored until the process ends."""
    before = {number: signal.getsignal(number) for number in NOTED}
    ours = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # nohup's, for instance
    for number in ours:
        signal.signal(number, _note)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_IGN if _received else before[number] or signal.SIG_DFL)


def received() -> int:
    """Return the number of the signal that has come, or 0."""
    return _received or 0


def stop(number: int) -> None:
    """Raise Stopped for the signal of this number, unless it is 0."""
    if number:
        raise Stopped(signal.Signals(number))


def check() -> None:
    """Raise Stopped if a signal has come."""
    stop(received())


@contextmanager
def checked_before_batches(model: nn.Module) -> Iterator[None]:
    """Begin every pass of a batch through `model`, inside, with a `check`."""
    hook = model.register_forward_pre_hook(lambda module, batch: check())
    try:
        yield
    finally:
        hook.remove()
