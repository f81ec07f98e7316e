"""The state that --resume goes on from: when it is saved, the two newest of it, and the files that grow with it."""

import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from config import SAVE_EVERY
from models.checkpoint import is_whole_file, load, save
from training.run_directory import RunDirectory
from utils.errors import UserError
from utils.files import cause

# What a state holds. `done` is how many steps of the epoch are, `evaluating` whether only its evaluation is left.
STATE = (
    "epoch", "done", "evaluating", "step", "best", "stale", "seconds", "examples", "data", "weights", "base_sha256",
    "optimizers", "scaler", "average", "teacher", "surgery", "part_sizes", "generators", "meters", "lengths",
)  # fmt: skip


class SaveEvery:
    """When --save_every asks for the next state: after so many steps (`500`), or so many minutes (`30m`)."""

    def __init__(self, text: str) -> None:
        match = re.fullmatch(SAVE_EVERY, text)
        assert match, text  # config.check has seen it
        self.count, self.minutes = int(match[1]), bool(match[2])
        self.step: int | None = None  # of the newest state
        self.clock = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time, after so many steps of the run."""
        if self.minutes:
            return time.monotonic() - self.clock >= 60 * self.count
        return step - (self.step or 0) >= self.count

    def saved(self, step: int) -> None:
        """Take note of a state that holds so many steps."""
        self.step, self.clock = step, time.monotonic()


def save_state(run: RunDirectory, content: Mapping[str, Any]) -> None:
    """Write resume.pt; the one before it is kept as resume-previous.pt, unless it is damaged and that may be whole."""
    assert set(content) == {"format", *STATE}
    save(run.resume, content, keep=run.previous if is_whole_file(run.resume) else None)


def newest_state(run: RunDirectory, say: Callable[[str], None]) -> dict[str, Any]:
    """The newest state that is whole; `say` hears of one that is not, and it is then replaced by the one before it.

    Raises UserError, naming all files, where none is.
    """
    problems = []
    for path in run.states():
        try:
            content = load(path)
            if missing := [name for name in STATE if name not in content and name != "data"]:  # older states lack it
                raise UserError(f"{path}: is no state that this version can go on from, it lacks {missing[0]}")
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            say(f"{problems[0]}; going on from the state before it, {path.name}")
            os.replace(path, run.resume)
        return content
    raise UserError("; ".join(problems) or f"{run.resume}: is not there; leave --resume out")


def lengths(run: RunDirectory) -> dict[str, int]:
    """The sizes in bytes of the files that grow as the run goes on, by their names in its folder."""
    files = [run.path / "metrics.jsonl", run.path / "timing.jsonl", *run.tensorboard.rglob("*")]
    return {str(path.relative_to(run.path)): path.stat().st_size for path in files if path.is_file()}


def cut_back(run: RunDirectory, before: Mapping[str, int]) -> None:
    """Make the files that grow as they were: what came later belongs to steps that will be made again.

    Raises UserError where they cannot be written.
    """
    try:
        for name, size in lengths(run).items():
            if name not in before:
                (run.path / name).unlink()
            elif size > before[name]:
                os.truncate(run.path / name, before[name])
    except OSError as error:
        raise UserError(f"--run_dir {run.path}: cannot be written ({cause(error, run.path)})") from error
