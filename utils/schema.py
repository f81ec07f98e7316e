"""What the files of runs, checkpoints and studies hold, and the check of a file's values as they are read.

A kind is a type or a union of types, a list with the kind of its items, a tuple with that of each item, or a mapping
from keys to kinds. A key that ends with ? may be missing. The kind of ANY is that of all keys that are not named;
without it they may hold anything. A float is any finite number.
"""

import math
from collections.abc import Mapping
from typing import Any

ANY = "*"
NUMBERS = {ANY: float}  # by metric or by task
SCORES = {"score?": float, "score_raw_r?": float, ANY: NUMBERS}  # those of a task by metric
RUN_SCORES = {"dev": SCORES, "epoch?": int | None}  # scores.json
# A line of metrics.jsonl and of timing.jsonl.
METRICS = {"epoch": int, "train": {ANY: NUMBERS}, "dev": SCORES, "trainable_parameters?": int}
TIMING = {
    "epoch": int, "seconds": float, "train_seconds": NUMBERS, "tokens?": NUMBERS, "train_peak_memory_bytes?": NUMBERS,
    "peak_memory_bytes": float, "gpu_utilization?": float, "device": str,
}  # fmt: skip
RUN_INPUTS = [dict.fromkeys(("flag", "path", "sha256"), str)]  # inputs.json
CHECKPOINT = {  # what best.pt and resume.pt have in common, and what not all of them have
    "format": int, "weights": dict, "base_sha256?": str, "git_commit?": str | None, "config?": {ANY: dict},
    "bert_config?": dict, "tasks?": [str], "tokenizer?": str | None, "tokenizer_sha256?": str, "scores?": SCORES,
    "similarity_lines?": {ANY: (float, float)}, "epoch?": int | None, "step?": int, "seed?": int,
}  # fmt: skip
STUDY_TABLE = {  # table.json
    **dict.fromkeys(("report", "id", "label", "title"), str), "columns": [str],
    "rows": [dict.fromkeys(("id", "name", "split", "because"), str) | {"reported": NUMBERS, "trials": [str]}],
}  # fmt: skip
STUDY_ROW = {"trial": str, "status": str, "cause?": str, "command?": str, ANY: str | int | float | None}
STUDY_RECORD = {"trial": str, "flags?": {ANY: str}, "worker?": {"host": str, "log": str}, "row?": STUDY_ROW}


def check(value: Any, kind: Any, name: str) -> Any:
    """Return a value that was read from a file. Raises ValueError, with its `name`, if it is not of this kind."""
    if isinstance(kind, list | tuple):
        if not isinstance(value, list | tuple) or (isinstance(kind, tuple) and len(value) != len(kind)):
            raise ValueError(f"{name} is no list of that kind")
        for item in value:
            check(item, kind[0], f"an item of {name}")
    elif isinstance(kind, dict):
        check_mapping(value, kind, name)
    elif kind is float:
        finite_number(value, name)
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is of the type {type(value).__name__}")
    return value


def check_mapping(value: Any, kinds: Mapping[str, Any], name: str) -> None:
    """Do `check` for each key of a mapping."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} is no mapping from names")
    named = {key.removesuffix("?"): kind for key, kind in kinds.items() if key != ANY}
    if missing := [key for key in kinds if key != ANY and not key.endswith("?") and key not in value]:
        raise ValueError(f"{name} lacks {missing[0]}")
    for key, item in value.items():
        if key in named or ANY in kinds:
            check(item, named.get(key, kinds.get(ANY)), key)


def finite_number(value: Any, name: str) -> float:
    """Return a number as a float. Raises ValueError, with its `name`, if it is none, nan or infinite."""
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is no finite number")
    return number
