"""The run directory: the folder of one run, which no other run can write to at the same time."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from base_bert import WEIGHTS_FILES
from cli.checks import flag_of
from config import Config
from evaluation.prediction_files import prediction_files, remove_predictions
from models.run_records import record
from training.inputs import InputFile
from utils.errors import UserError, first_line
from utils.files import cause, lock, probe_folder, remove_left_files, write_json
from utils.schema import RUN_INPUTS, check
from utils.untrusted import read_json

BAD_BATCH = "bad_batch.json"  # the examples whose loss was not finite
RUN_FILES = (
    "config.json", "inputs.json", "metrics.jsonl", "timing.jsonl", "scores.json", "best.pt", "resume.pt",
    "resume-previous.pt", "profile.pt.trace.json.gz", BAD_BATCH,
)  # fmt: skip
# Options that say where a file is. What --resume compares is in the file.
PATHS = ("data.data_dir", "model.pretrained", "train.init_from")
PATHS_OF_TASKS = ("train", "dev", "test", "extra", "dev_out", "test_out")


def is_path(key: str) -> bool:
    """Return whether an option, given as "group.option" or "tasks.NAME.option", only says where a file is."""
    return key in PATHS or (key.startswith("tasks.") and key.split(".")[-1] in PATHS_OF_TASKS)


class RunDirectory:
    """The folder of one run: checkpoints, configuration, metrics, scores, predictions/ and TensorBoard's events."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        """Without `writes`, nothing is written: another process of the run does it."""
        self.path, self.writes = path, writes
        self.best = path / "best.pt"
        self.resume = path / "resume.pt"
        self.previous = path / "resume-previous.pt"
        self.inputs = path / "inputs.json"
        self.predictions = path / "predictions"

    @classmethod
    def named(cls, run_dir: str | None, name: str, writes: bool = True) -> "RunDirectory":
        """Return --run_dir, or runs/NAME."""
        return cls(Path(run_dir) if run_dir else Path("runs") / name, writes)

    @staticmethod
    def fresh_name(arch: str) -> str:
        """Return a name under runs/, of the arch and the time, that no run has."""
        stem = f"{arch}-{time.strftime('%Y%m%d-%H%M%S')}"
        name, number = stem, 1
        while (Path("runs") / name).exists():
            number += 1
            name = f"{stem}-{number}"
        return name

    def states(self) -> list[Path]:
        """Return the files that --resume can continue from, the newest first."""
        return [path for path in (self.resume, self.previous) if path.exists()]

    def drop_states(self) -> None:
        """Delete the states: they are several times as large as best.pt."""
        for path in self.states():
            path.unlink(missing_ok=True)

    def remove_left_files(self) -> None:
        """Remove what a killed run has left: half-written files and, if the run had finished, its states."""
        for path in (*(self.path / name for name in RUN_FILES), *prediction_files(self.path)):
            remove_left_files(path)
        if (self.path / "scores.json").is_file():
            self.drop_states()

    def claim(self) -> None:
        """Lock the folder and remove what a killed run has left.

        Raises UserError if a run goes on here, or if a file that the run writes is a link or a pipe.
        """
        files = [*(self.path / name for name in (".lock", *RUN_FILES)), *self.event_files()]
        odd = [path for path in files if path.is_symlink() or (path.exists() and not path.is_file())]
        odd += [path for path in (self.predictions, self.path / "tensorboard") if path.is_symlink()]
        if odd:
            raise UserError(f"{odd[0]}: is a link, a folder or a pipe where the run writes a file; remove it")
        try:
            lock(self.path / ".lock", f"--run_dir {self.path}")
            self.remove_left_files()
        except OSError as error:
            raise UserError(
                f"--run_dir {self.path}: cannot be written ({first_line(error)}); choose another"
            ) from error

    def prepare(self, overwrite: bool, resume: bool, needed: int) -> None:
        """Make the folder ready for a run that will save about `needed` bytes.

        Raises UserError if the folder holds a run or a model, if a run goes on here, or if the disk is too small.
        """
        if model := next((name for name in WEIGHTS_FILES if (self.path / name).exists()), None):
            raise UserError(f"--run_dir {self.path}: holds a model ({model}) and no run; choose another folder")
        if self.path.is_dir():
            self.claim()
        finished, started = (self.path / "scores.json").exists(), (self.path / "config.json").exists()
        if started and not overwrite and not resume:
            unfinished = "--resume goes on with it" if self.states() else "of which no state was saved"
            state = "a finished run" if finished else f"an unfinished run ({unfinished})"
            raise UserError(f"--run_dir {self.path}: holds {state}; choose another folder or --overwrite it")
        probe_folder(self.path, "--run_dir")
        self.claim()
        if overwrite:
            self.clear()
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"--run_dir {self.path}: the checkpoints need about {needed / 1e6:,.0f} MB but no space is left for "
                f"them ({free / 1e6:,.0f} MB free); free some, or choose another folder"
            )

    def check_resume(self, config: Config) -> None:
        """Check that a run can continue here with these options; a file may lie elsewhere now (`check_inputs`).

        Raises UserError if there is no run to continue, or if it began with other options, which are listed.
        """
        if (self.path / "scores.json").exists():
            if self.writes:
                self.claim()
            raise UserError(f"--run_dir {self.path}: this run is finished; --overwrite starts it again")
        path = self.path / "config.json"
        if not self.states():
            if path.exists():  # without --resume it would be in the way
                raise UserError(f"--run_dir {self.path}: no state of this run was saved; --overwrite starts it again")
            raise UserError(f"--run_dir {self.path}: there is no resume.pt to go on from; leave --resume out")
        try:
            saved = Config.from_dict(read_json(path))
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:  # or another kind of json
            raise UserError(
                f"--resume: {path} cannot be read ({first_line(error)}); --overwrite starts again"
            ) from error
        before, now = saved.flat(), config.flat()
        changed = [
            f"{flag_of(key)} {before[key]} instead of {value}"
            for key, value in now.items()
            if key.split(".")[0] not in ("run", "compute") and key in before and before[key] != value
            and not (is_path(key) and self.inputs.exists())
        ]  # fmt: skip
        if saved.tasks.keys() != config.tasks.keys():
            changed.insert(0, f"the tasks {', '.join(saved.tasks)} instead of {', '.join(config.tasks)}")
        if changed:
            more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
            raise UserError(
                f"--resume {self.path}: the run began with {', '.join(changed[:6])}{more}; repeat its flags"
            )

    def check_inputs(self, files: Sequence[InputFile]) -> bool:
        """Check that a run can continue with these files; return whether one of them lies elsewhere now.

        Earlier versions did not write down their contents; paths were compared then. Raises UserError for the first
        file that has another content than the run began with.
        """
        try:
            saved = [InputFile(**row) for row in check(read_json(self.inputs), RUN_INPUTS, "it")]
        except FileNotFoundError:
            return False
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--resume: {self.inputs} cannot be read ({first_line(error)}); delete it") from error
        for flag in dict.fromkeys(file.flag for file in (*saved, *files)):
            before, now = ([file for file in group if file.flag == flag] for group in (saved, files))
            if len(before) != len(now):
                given = " and ".join(file.path for file in before) or "left out"
                raise UserError(f"--resume {self.path}: the run began with {flag} {given}; repeat its flags")
            for old, new in zip(before, now, strict=True):
                if old.sha256 != new.sha256:
                    raise UserError(
                        f"--resume {self.path}: the run began with another content of {flag} {new.path}; put it back, "
                        "or --overwrite the run"
                    )
        return [file.path for file in saved] != [file.path for file in files]

    def begin(self, config: Config, files: Sequence[InputFile]) -> None:
        """Write config.json and inputs.json, or check that the run that they belong to can continue.

        This user's cache records where the files of the run are.
        """
        record(config)
        if config.run.resume:
            self.check_resume(config)
            if not self.check_inputs(files):
                return
        self.write_json("inputs.json", [asdict(file) for file in files])
        self.write_json("config.json", config.to_dict())

    def clear(self) -> None:
        """Remove a former run's files and nothing else."""
        curves = self.event_files()
        for path in (*(self.path / name for name in RUN_FILES), *curves):
            path.unlink(missing_ok=True)
        remove_predictions(self.path)
        folders = {path.parent for path in curves} - {self.path}
        for folder in (self.predictions, *sorted(folders, reverse=True), self.path / "tensorboard"):
            with suppress(OSError):  # somebody else's files are in it
                folder.rmdir()

    def require(self) -> None:
        """Raise UserError if the folder has been deleted since the run began; a new one would be half a run."""
        if not self.path.is_dir():
            raise UserError(f"--run_dir {self.path}: the folder was deleted while the run went on; start it again")

    def event_files(self) -> list[Path]:
        """Return the run's event files of TensorBoard. Earlier versions wrote them into the folder tensorboard."""
        events = "events.out.tfevents.*"
        return [*self.path.glob(events), *(self.path / "tensorboard").rglob(events)]

    def write_json(self, name: str, content: Any) -> None:
        """Write a json file of the run atomically. Raises UserError if it cannot be written."""
        if self.writes:
            self.require()
            write_json(self.path / name, content)

    def append_json(self, name: str, content: Any) -> None:
        """Append one line to a jsonl file of the run. Raises UserError if it cannot be written."""
        if not self.writes:
            return
        self.require()
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a state that is saved later counts on it
        except OSError as error:
            raise UserError(f"{self.path / name}: cannot be written ({cause(error, self.path)})") from error
