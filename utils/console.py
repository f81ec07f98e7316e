"""Print lines, tables and progress bars, and end a script with the right message and exit code."""

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from utils.errors import UserError, first_line, is_lost_connection, is_out_of_memory
from utils.untrusted import shown

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
SECONDS_FOR_MAIN_PROCESS = 10.0  # to report a mistake


def processes() -> int:
    """Return the number of processes that torchrun started for this run; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else 1


def is_main_process() -> bool:
    """Return whether this is the only process, or the first one of torchrun, which prints for all."""
    return processes() == 1 or os.environ["RANK"] == "0"


def say(line: str) -> None:
    """Print a line at once, also into a file; of several processes, the main one prints."""
    if is_main_process():
        print(shown(line, None), flush=True)


class ShownFormatter(logging.Formatter):
    """Writes a line of a log as `say` prints one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return shown(super().format(record), None)


class LogLines:
    """Standard error for a bar of tqdm in a file or a pipe: each state of the bar becomes a line."""

    def write(self, text: str) -> None:
        """Print a state of the bar, without the white space that redraws it on a terminal."""
        if line := text.strip():
            print(line, file=sys.stderr)

    def flush(self) -> None:
        """Flush standard error; tqdm calls this."""
        sys.stderr.flush()


def bar_style() -> dict[str, Any]:
    """Return the arguments of tqdm: a redrawn bar on a terminal, a line every half minute in a file or a pipe.

    A narrow terminal cuts off the end, which is therefore the speed and not the losses.
    """
    if sys.stderr.isatty():
        numbers = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}, {rate_fmt}]"
        return {"dynamic_ncols": True, "bar_format": numbers}
    numbers = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return {"file": LogLines(), "bar_format": numbers, "mininterval": 30.0}


def drop_lost_output() -> None:
    """Drop output that cannot be written; otherwise the interpreter complains when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def refuse_closed_output() -> None:
    """End the script if standard output or standard error is closed.

    The next file that is opened would take its place, and what libraries print would be written into a checkpoint.
    """
    for stream, name, redirection in ((sys.stdout, "output", ">"), (sys.stderr, "error", "2>")):
        if stream is None:
            end_script(2, f"error: standard {name} is closed; redirect it, such as by {redirection}/dev/null")


def report_thread(failed: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, but not of TensorBoard's writer, whose error the next write raises again."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


def run_script(main: Callable[[list[str]], object], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a script's main with `argv`, by default the process's own, and exit.

    A UserError, an error of the system and exhausted memory become one line on standard error and exit code 2.
    """
    refuse_closed_output()
    threading.excepthook = report_thread
    if isinstance(sys.stdout, io.TextIOWrapper):  # which else fails at a character that it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(ShownFormatter())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("minbert").setLevel(logging.INFO if is_main_process() else logging.WARNING)
    run: Callable[..., None] = run_main
    if processes() > 1:
        from torch.distributed.elastic.multiprocessing.errors import record

        run = record(run_main)  # so that torchrun's summary has the traceback of an error in the program
    run(main, sys.argv[1:] if argv is None else list(argv))
    sys.exit(0)


def run_main(main: Callable[[list[str]], object], argv: list[str]) -> None:
    """Call `main`; exit with a line on standard error where `run_script` says so."""
    try:
        try:
            main(argv)
        except SystemExit as error:
            if error.code:  # stays as it is, even if the terminal has gone
                wait_for_main_process(error.code)
                drop_lost_output()
                raise
        print(end="", flush=True)  # here, so that an error of writing is caught below
    except UserError as error:
        wait_for_main_process(2)
        end_script(2, f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            end_script(2, f"error: out of memory ({first_line(error):.200}); {MEMORY_REMEDY}")
        if not is_lost_connection(error):
            raise
        end_script(1, "error: another process has ended; its own message says why" if is_main_process() else "")
    except BrokenPipeError:  # whoever read our output, such as head, has gone
        end_script(1)
    except OSError as error:  # such as a full disk, which may be that of standard output
        end_script(2, f"error: {first_line(error)}")
    except KeyboardInterrupt:
        end_script(130, "stopped")


MEMORY_REMEDY = "lower --eval_batch_size, --batch_size or --max_length, or choose a smaller model or --optim SGD"


def wait_for_main_process(code: object) -> None:
    """Give the main process time to report a mistake (code 2) that all have met; torchrun ends them after it."""
    if code == 2 and not is_main_process():
        time.sleep(SECONDS_FOR_MAIN_PROCESS)


def end_script(code: int, line: str = "") -> NoReturn:
    """Print a line on standard error, or on standard output if that cannot be written, and exit."""
    with suppress(OSError):
        print(end="", flush=True)  # what was printed before comes before it
    for stream in (sys.stderr, sys.stdout) if line else ():
        with suppress(OSError):
            print(shown(line), file=stream, flush=True)
            break
    drop_lost_output()
    sys.exit(code)


@cache
def bar_class() -> "type[tqdm[Any]]":
    """Return tqdm, with a lock of this process alone: a forked process that is killed would keep that of tqdm."""
    from tqdm import tqdm  # takes a third of the time of --help, which draws no bar

    tqdm.set_lock(threading.RLock())
    return tqdm


def progress(items: Sequence[T], description: str, unit: str, leave: bool = True, done: int = 0) -> "tqdm[T]":
    """Return a progress bar over `items`; `done` items were finished before.

    In a file or a pipe, a bar that stays (`leave`) prints a line every half minute, and another one prints nothing.
    """
    return bar_class()(
        items,
        desc=description,
        unit=unit,
        leave=leave,
        initial=done,
        total=done + len(items),
        disable=(not leave and not sys.stderr.isatty()) or not is_main_process(),
        **bar_style(),
    )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain text table: the first column is left aligned, the others right. Cells may be foreign texts."""
    header, *rows = [list(map(shown, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
