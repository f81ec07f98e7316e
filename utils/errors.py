"""The error that users can mend, and what errors of libraries mean."""

import re

from utils.untrusted import shown


class UserError(Exception):
    """A mistake that the user can mend. Scripts print it as one line and exit with code 2.

    The message may quote what somebody else wrote: `shown` makes one line of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe_error(error: BaseException) -> str:
    """Return the type of an error and the first line of its text, for a message of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|\bMemoryError|can(no|')t allocate memory|not enough memory|Unable to allocate"
    r"|bad_alloc|ALLOC_FAILED|could not create a (primitive(?! desc)|memory object)",
    re.IGNORECASE,
)  # the words of torch, numpy, Python and oneDNN


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of the machine or of a GPU ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"))
    )


LOST_CONNECTION = re.compile(r"connection (was )?(closed|reset|refused)|gloo|broken pipe", re.IGNORECASE)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error only says that another process of a distributed run has ended."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or bool(LOST_CONNECTION.search(str(error)))
