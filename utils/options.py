"""Fields of a dataclass that are flags: what they say of themselves, and whether a value is within their bounds."""

import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any

MAX_NUMBER = 1e30  # of any option, so that optimizers stay within fp32
MAX_LENGTH = 10_000  # characters of a text; longer than any path
MAX_WHOLE = 2**63 - 1  # of any whole number; torch and numpy take no larger one


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Return a dataclass field that is also a flag.

    Metadata: `choices`, `low` and `high` (inclusive bounds), `above` (exclusive lower bound), `metavar` (a tuple for a
    flag of several words), `template` (the name of a per-task flag, with {task} in it), `percent` (whether 1% may be
    given for .01), `separator` (of the items of a list), `requires` (another option of the group, and those of its
    values under which this option has an effect), `synonyms` (other words for some of the choices).
    """
    return field(default=default, metadata={"help": help, **metadata})


def value_type(hint: Any) -> Any:
    """Return the type inside an optional annotation."""
    if typing.get_origin(hint) is types.UnionType:
        return next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    return hint


def upper_bound(kind: Any, metadata: Mapping[str, Any]) -> Any:
    """Return the inclusive upper bound of an option, or None if it has none."""
    return metadata.get("high", {float: MAX_NUMBER, int: MAX_WHOLE}.get(kind))


def out_of_bounds(value: Any, kind: Any, metadata: Mapping[str, Any]) -> str:
    """Return how a value exceeds the bounds of an option, and what they are; empty if it lies within them."""
    low, above, high = metadata.get("low"), metadata.get("above"), upper_bound(kind, metadata)
    if low is not None and not value >= low:
        return f"too small; give at least {low}"
    if above is not None and not value > above:
        return f"too small; give more than {above}"
    if high is not None and not value <= high:  # nan too
        return f"too large; give at most {high}"
    return ""


def check_values(options: Any) -> None:
    """Raise TypeError if a field of a dataclass of options holds a value that no command line can give."""
    hints = typing.get_type_hints(type(options))
    for spec in fields(options):
        value, hint = getattr(options, spec.name), hints[spec.name]
        if value is None and value_type(hint) is not hint:
            continue
        kind, metadata = value_type(hint), spec.metadata
        items = value if isinstance(value, tuple) else (value,)
        if typing.get_origin(kind) is tuple:
            right = isinstance(value, tuple) and all(isinstance(item, str) for item in items)
        else:
            right = isinstance(value, (int, float) if kind is float else kind)
            right = right and isinstance(value, bool) == (kind is bool)
        choices = metadata.get("choices", items)
        long = any(isinstance(item, str) and len(item) > MAX_LENGTH for item in items)
        if not right or long or any(item not in choices for item in items) or out_of_bounds(value, kind, metadata):
            raise TypeError(f"{spec.name} {reprlib.repr(value)}")
