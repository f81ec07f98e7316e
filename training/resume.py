"""The checkpointer: best.pt, and the states that --resume continues from."""

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import SAVE_EVERY, Config
from evaluation.metrics import Scores
from models.checkpoint import (
    FORMAT,
    check_base_weights,
    copy,
    is_whole_file,
    load,
    load_model_state_dict,
    model_checkpoint,
    save,
)
from models.multitask_bert import MultitaskBERT
from text.tokenizer import Tokenizer
from training.distributed import DistributedContext
from training.meters import REMEDY
from training.run_directory import RunDirectory
from utils.device import random_state, set_random_state
from utils.errors import UserError
from utils.files import cause

# What a state holds beside the weights. `seconds` are those spent on the epoch so far, `lengths` the sizes of the files
# that grow as the run goes on.
STATE = (
    "progress", "seconds", "examples", "data", "weights", "base_sha256", "optimizers", "scaler", "average",
    "momentum_model", "generators", "meters", "lengths",
)  # fmt: skip


class CheckpointInterval:
    """When --save_every asks for the next state: after so many batches (`500`) or so many minutes (`30m`)."""

    def __init__(self, text: str) -> None:
        match = re.fullmatch(SAVE_EVERY, text)
        assert match, text  # the command line's checks have seen it
        self.count, self.minutes = int(match[1]), bool(match[2])
        self.saved_at: int | None = None  # batches of the run in the newest state
        self.clock = time.monotonic()

    def is_due(self, batches: int) -> bool:
        """Whether it is time to save, after so many batches of the run."""
        if self.minutes:
            return time.monotonic() - self.clock >= 60 * self.count
        return batches - (self.saved_at or 0) >= self.count

    def saved(self, batches: int) -> None:
        """Note that a state holds so many batches."""
        self.saved_at, self.clock = batches, time.monotonic()


class Checkpointer:
    """Writes and reads the checkpoints of a run. All processes must ask for them; the main process reads and writes."""

    def __init__(
        self,
        config: Config,
        model: MultitaskBERT,
        tokenizer: Tokenizer,
        run: RunDirectory,
        context: DistributedContext,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.run, self.context, self.say = run, context, say
        self.interval = CheckpointInterval(config.run.save_every)
        self.frozen_names = model.frozen_parameter_names(config.train)  # of the weights that files leave out

    def save_best(
        self, scores: Scores, epoch: int, batches: int, lines: Mapping[str, tuple[float, float]] | None = None
    ) -> None:
        """Write best.pt, with the `similarity_lines`, and --filepath. Raises UserError if a weight is not finite."""
        if not self.context.is_main_process:
            return
        self.run.require()
        content = model_checkpoint(self.model, self.tokenizer, self.config, scores, lines or {})
        check_finite(content["weights"].items())
        save(self.run.best, {**content, "epoch": epoch, "step": batches})
        if self.config.run.filepath:
            copy(self.run.best, Path(self.config.run.filepath))

    def load_best_scores(self) -> Scores:
        """Return the scores in best.pt; no scores in the other processes."""
        return load(self.run.best)["scores"] if self.context.is_main_process else {}

    def save_state(self, state: Mapping[str, Any], batches: int) -> None:
        """Write resume.pt with a run's `state` after so many batches, and keep the one before it.

        Raises UserError if a number in it is not finite.
        """
        check_finite([*self.model.state_dict().items(), *optimizer_numbers(state["optimizers"])])
        if self.context.is_main_process:
            weights = {n: tensor for n, tensor in self.model.state_dict().items() if n not in self.frozen_names}
            content = {
                **state,
                "format": FORMAT,
                "weights": weights,
                "base_sha256": self.model.base_sha256,
                "lengths": lengths(self.run),
                "metrics_sha256": sha256_of_start(self.run.path / "metrics.jsonl"),
            }
            self.run.require()
            write_state(self.run, content)
        self.interval.saved(batches)

    def load_state(self) -> dict[str, Any]:
        """Return the newest state that is whole, and give the model its weights.

        Raises UserError if there is none, or if it belongs to other base weights.
        """
        with self.context.main_process_first():  # it may rename the files
            content = newest_state(self.run, self.say)
            for line in what_is_lost(self.run, content):
                self.say(line)
            self.forget_lost_best(content["progress"])
        if self.frozen_names:
            check_base_weights(self.model, content["base_sha256"], self.config.model.pretrained, self.run.resume)
        self.load_weights(content["weights"], self.run.resume)
        return content

    def forget_lost_best(self, progress: dict[str, Any]) -> None:
        """If best.pt is lost or damaged, say so and let the next score be the best so far."""
        if progress["best_score"] > -math.inf and not is_whole_file(self.run.best):
            self.say(f"{self.run.best}: is lost or damaged; the best model from here on takes its place")
            progress["best_score"] = -math.inf

    def load_weights(self, weights: Mapping[str, Tensor], source: Path) -> None:
        """Give the model, in all processes, the weights that the main process has read from `source`."""
        if self.context.is_main_process:
            load_model_state_dict(self.model, weights, source, self.frozen_names)
        self.context.broadcast_weights(self.model)

    def load_best(self) -> dict[str, Any]:
        """Give the model the weights of best.pt; return the file's content, which only the main process has."""
        content = load(self.run.best) if self.context.is_main_process else {}
        self.load_weights(content.get("weights", {}), self.run.best)
        return content

    def cut_back(self, before: Mapping[str, int]) -> None:
        """Cut the files that grow back to the sizes of `before`; later lines belong to steps to be made again.

        Raises UserError if they cannot be written.
        """
        if not self.context.is_main_process:
            return
        try:
            for name, size in lengths(self.run).items():
                if name not in before:
                    (self.run.path / name).unlink()
                elif size > before[name]:
                    os.truncate(self.run.path / name, before[name])
        except OSError as error:
            raise UserError(f"--run_dir {self.run.path}: cannot be written ({cause(error, self.run.path)})") from error
        if self.config.run.filepath and self.run.best.exists():  # the run may have begun without that flag
            copy(self.run.best, Path(self.config.run.filepath))

    def say_end(self, reason: str) -> None:
        """Say why the run ended and how it goes on, unless the terminal has gone."""
        with suppress(OSError):
            self.say(f"\n{reason}; {self.how_to_continue()}")

    def how_to_continue(self) -> str:
        """Return, for people, what of the run is saved and the flags that continue from there."""
        if self.interval.saved_at is None:
            return "nothing of the run is saved yet, --overwrite starts it again"
        flags = f"--run_dir {self.run.path} --resume" + " in place of --overwrite" * self.config.run.overwrite
        return f"the same command with {flags} goes on after step {self.interval.saved_at}"


def write_state(run: RunDirectory, content: Mapping[str, Any]) -> None:
    """Write resume.pt and keep the state before it, unless that is damaged and an older one may be whole."""
    assert set(content) - {"metrics_sha256"} == {"format", *STATE}
    save(run.resume, content, keep=run.previous if is_whole_file(run.resume) else None)


def newest_state(run: RunDirectory, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the newest state that is whole. `say` tells of one that is not; the state before replaces it.

    Raises UserError, naming all files, if none is whole.
    """
    problems = []
    for path in run.states():
        try:
            content = load(path)
            if missing := [name for name in STATE if name not in content]:
                raise UserError(
                    f"{path}: is no state that this version can go on from, it lacks {missing[0]}; --overwrite the run "
                    "or finish it with the version that began it"
                )
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            say(f"{problems[0]}; going on from the state before it, {path.name}")
            os.replace(path, run.resume)
        return content
    raise UserError("; ".join(problems) or f"{run.resume}: is not there; leave --resume out")


def lengths(run: RunDirectory) -> dict[str, int]:
    """Return the sizes in bytes of the files that grow as the run goes on, by their names in its folder."""
    files = [run.path / "metrics.jsonl", run.path / "timing.jsonl", *run.event_files()]
    return {str(path.relative_to(run.path)): path.stat().st_size for path in files if path.is_file()}


def sha256_of_start(path: Path, size: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first `size` bytes; of nothing where there is no file."""
    content = path.read_bytes() if path.is_file() else b""
    return hashlib.sha256(content[:size]).hexdigest()


def what_is_lost(run: RunDirectory, state: Mapping[str, Any]) -> list[str]:
    """Say what the files that grow have lost since `state` was saved. What is left of them stays."""
    found, sizes = [], lengths(run)
    for name, size in state["lengths"].items():
        if sizes.get(name, 0) < size:
            found.append(f"{run.path / name}: {size - sizes.get(name, 0):,} of its {size:,} bytes are lost; going on")
    name = "metrics.jsonl"
    size = state["lengths"].get(name, 0)
    known = state.get("metrics_sha256")  # older states lack it
    if known and sizes.get(name, 0) >= size and sha256_of_start(run.path / name, size) != known:
        found.append(f"{run.path / name}: was changed after the state was saved; going on")
    return found


def check_finite(tensors: Iterable[tuple[str, Any]]) -> None:
    """Raise UserError, naming the first, if one of these tensors is not finite; waits for the device once."""
    named = [(n, tensor) for n, tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()]
    # A sum is finite only if all terms are. A CPU computes it in a twentieth of the time of a norm.
    sums = [tensor.detach().sum().isfinite() for _, tensor in named]
    if not sums or torch.stack(sums).all():
        return
    name = next((name for name, tensor in named if not tensor.isfinite().all()), None)
    if name is None:  # only a sum has overflowed
        return
    raise UserError(f"{name} is not finite any more and was not saved; {REMEDY}")


def optimizer_numbers(states: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield every number in the states of the optimizers, with a name for people."""
    for name, state in states.items():
        for values in state["state"].values():
            yield from ((f"{key} of the optimizer of {name}", value) for key, value in values.items())


def generator_states(device: torch.device, context: DistributedContext) -> dict[str, Tensor]:
    """Return the states [ranks, bytes] of the generators that training draws from, of all ranks."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = random_state(device)
    return {name: context.all_gather(state) for name, state in states.items()}


def restore_generators(states: Mapping[str, Tensor], device: torch.device, context: DistributedContext) -> bool:
    """Restore this rank's generators; return False, and do nothing, if the states are of another number of ranks."""
    if len(states["cpu"]) != context.size:
        return False
    # clones, because torch reads beyond a state that is a row of another tensor
    torch.set_rng_state(states["cpu"][context.rank].clone())
    if device.type != "cpu" and device.type in states:
        set_random_state(device, states[device.type][context.rank].clone())
    return True
