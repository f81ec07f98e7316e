"""Processes for faults that no mock can show, damage to files, and comparison to the bit.

A process is a fork: it shares what is imported here and takes milliseconds where a new Python takes seconds.
"""

import os
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401  imported here once, and not in every fork
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from torch import Tensor


class Child:
    """Runs `work` in a process of its own; what it prints goes to the end of `log`."""

    def __init__(self, work: Callable[[], object], log: Path) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code: Any = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
                stream.flush()
                os.dup2(file, number)
            sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")  # in place of pytest's
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started with &
            work()
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):  # else the fork would go on as a second pytest
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code or 0)

    def send(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self, seconds: float = 60.0) -> int:
        """Return the exit status, negative for the signal that killed it; fail if it hangs, after killing it."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running after {seconds} s")
            time.sleep(0.005)
        assert self.code is not None
        return self.code


def wait_until(condition: Callable[[], bool], child: Child, seconds: float = 60.0) -> None:
    """Wait for a condition that a running child brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert child.running(), f"ended with {child.code}"
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def kill_myself(signum: signal.Signals = signal.SIGKILL) -> None:
    """Do what a scheduler does, at a moment that the test chooses."""
    os.kill(os.getpid(), signum)


def flipped(content: bytes, offset: int, bit: int) -> bytes:
    """Return `content` with one bit changed."""
    out = bytearray(content)
    out[offset] ^= 1 << bit
    return bytes(out)


def in_a_tensor(path: Path) -> int:
    """Return the offset of a byte in the middle of the largest tensor of a checkpoint."""
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda info: info.file_size)
        data = file.read(largest)
    return path.read_bytes().index(data) + len(data) // 2


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return the places at which two nested containers differ, tensors by their bits."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [where]
