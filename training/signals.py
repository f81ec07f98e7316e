"""Signals that end a run: the step at hand is finished and the state saved, and the exit code says which signal it was.

SIGTERM is what schedulers and `kill` send some time before SIGKILL, SIGUSR1 what SLURM sends ahead of a time limit
(`#SBATCH --signal=USR1@120`), SIGINT is Ctrl-C. Exit codes are those of a shell: 128 and the signal's number.

Nothing is raised where the signal happens to arrive, since it may be in the middle of a step or of a swap of weights;
`check` raises it where the state is whole.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

NOTED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_received: signal.Signals | None = None  # a process has its signals once, so this is the module's


class Stopped(BaseException):
    """A signal asked for the end of the run; like KeyboardInterrupt no error, so that no handler of errors takes it."""

    def __init__(self, signum: signal.Signals) -> None:
        self.name, self.code = signum.name, 128 + signum


def _note(number: int, frame: Any) -> None:
    """Remember the first signal; Ctrl-C after any of them ends the process at once."""
    global _received
    if _received is None:
        _received = signal.Signals(number)
        os.write(2, f"\n{_received.name}: stopping after this step; the state is saved first\n".encode())  # not print:
        # it may have been in the middle of a line of its own
    elif number == signal.SIGINT:
        raise KeyboardInterrupt


@contextmanager
def noted() -> Iterator[None]:
    """Inside, the signals wait for `check`. Once one has come, further ones are ignored until the process ends."""
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
    """The number of the signal that has come, 0 where there is none."""
    return _received or 0


def stop(number: int) -> None:
    """Raise Stopped for the signal of this number, unless it is 0."""
    if number:
        raise Stopped(signal.Signals(number))


def check() -> None:
    """Raise Stopped where a signal has come."""
    stop(received())


@contextmanager
def checked_before_batches(model: nn.Module) -> Iterator[None]:
    """Inside, every pass of batches through `model` begins with a `check`."""
    hook = model.register_forward_pre_hook(lambda module, batch: check())
    try:
        yield
    finally:
        hook.remove()
