"""The trials of a study as processes: started, watched, pruned, and each turned into a row of results.csv."""

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from tqdm import tqdm

from config import Config
from models.checkpoint import git_commit
from studies.results import figures, read_lines, study_results
from studies.shared_study import SharedStudy
from studies.trials import SCRIPT, Plan, SweepOptions, Trial
from training.distributed import cores
from training.run_directory import RunDirectory
from utils.console import bar_style, say
from utils.errors import OUT_OF_MEMORY, UserError, first_line
from utils.files import probe_folder
from utils.schema import METRICS
from utils.untrusted import MAX_TEXT, read_bytes, read_json, shown

SCRIPTS = Path(__file__).parent.parent  # the folder of the scripts that trials run
PRUNERS = {"none": optuna.pruners.NopPruner(), "median": optuna.pruners.MedianPruner()}
POLL = 0.5  # seconds between looks at the running trials and at the storage
ERROR = re.compile(r"error: |[\w.]+(Error|Exception|Interrupt)\b|[\w.]+: error: ")
TAIL = 40  # lines of a log in which an error's text is looked for


def verdict(code: int, output: str) -> tuple[str, str]:
    """Return the status and the cause, one line, from a process's exit status and all that it printed."""
    if code == 0:
        return "ok", ""
    lines = [shown(line.strip(), 300) for line in re.split(r"[\r\n]+", output) if line.strip()][-TAIL:]
    if code == -signal.SIGKILL:
        return "out of memory", "killed by SIGKILL, as the system does when memory runs out"
    if memory := [line for line in lines if OUT_OF_MEMORY.search(line)]:
        return "out of memory", memory[-1]
    if code < 0:
        names = {signum.value: signum.name for signum in signal.Signals}  # real-time signals have none
        return "failed", f"killed by {names.get(-code, f'signal {-code}')}"
    errors = [line for line in lines if ERROR.match(line)]
    return "failed", (errors or lines or [f"exit code {code}"])[-1]


def began_as(config: Config, folder: Path) -> bool:
    """Return whether the run in a folder has this configuration, apart from where and on what it runs."""
    with suppress(OSError, ValueError):
        before, now = read_json(folder / "config.json"), json.loads(json.dumps(config.to_dict()))
        return all(before.get(group) == now[group] for group in now if group not in ("run", "compute"))
    return False


def row_of(trial: Trial, status: str, cause: str, commit: str | None) -> dict[str, Any]:
    """Return what every row has."""
    seed = {} if trial.config is None else {"seed": trial.config.train.seed}
    about = {"trial": trial.name, "status": status, "cause": cause, "command": trial.command, "commit": commit}
    return {**about, **seed, **trial.flags}


@dataclass
class Job:
    """A trial that this sweep runs. `log` is locked, and `process` is None where nothing needs to be run."""

    trial: Trial
    record: optuna.Trial
    log: TextIO
    commit: str | None
    process: "subprocess.Popen[bytes] | None" = None
    epochs: int = 0  # lines of metrics.jsonl that the storage knows
    pruned: str = ""  # why we ended it


class Sweep:
    """This sweep of a study: the folder with the table and the trials' run directories, and the shared storage."""

    def __init__(self, options: SweepOptions, plan: Plan) -> None:
        """Open table and storage. Raises UserError where one cannot be used or has other trials than the plan's."""
        self.options, self.plan, self.out = options, plan, Path(options.out)
        probe_folder(self.out, "--out")
        if plan.table is not None:
            plan.table.save(self.out)
        self.table = study_results(self.out, plan.flags)
        self.place, rows = options.storage or str(self.out / "study.journal"), self.rows()
        try:
            self.shared = SharedStudy(self.place, self.out.resolve().name, plan.ranges, self.out / "trials")
            rows |= self.shared.rows()
        except UserError:
            raise
        except Exception as error:  # of the file system, of a database's driver, or of a journal that is damaged
            raise self.unusable(error) from error
        self.shared.study.pruner = PRUNERS[options.pruner]
        self.check(rows)

    def unusable(self, error: Exception) -> UserError:
        """Return the one line that says why the storage cannot be used, and what to do."""
        remedy = "name another file or database; a damaged file can be deleted, results.csv keeps what has ended"
        return UserError(f"--storage {self.place}: cannot be used ({first_line(error)}); {remedy}")

    def check(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise UserError where a trial of the study was sampled from other ranges, or its row has another command."""
        sampled = [item for record in self.shared.records() for item in record.distributions.items()]
        if any(self.plan.ranges.get(flag) != values for flag, values in sampled):
            raise UserError(f"--range: {self.out} searches other ranges; repeat them or choose another folder")
        needed = [name for trial in self.plan.trials.values() if trial.name not in rows for name in trial.needs]
        ended = [name for name in dict.fromkeys(needed) if name in rows and rows[name]["status"] == "ok"]
        if gone := [name for name in ended if not self.checkpoint(name).exists()]:
            raise UserError(
                f"--out {self.out}: other trials need the checkpoints of {', '.join(gone)}, which are gone; to train "
                f"them again, delete their rows in {self.table.path}, their folders and study.journal"
            )
        for name in filter(rows.__contains__, self.plan.trials):
            before, command = rows[name].get("command"), self.plan.trial(name, rows[name]).command
            if before != command:
                raise UserError(
                    f"--out {self.out}: there {name} is the run of `{before}` and not of `{command}`; "
                    "repeat the flags or choose another folder"
                )

    def checkpoint(self, name: str) -> Path:
        """Return the checkpoint of a trial."""
        return self.out / "trials" / name / "best.pt"

    def rows(self) -> dict[str, Mapping[str, Any]]:
        """Return the rows of the table by trial."""
        return {row["trial"]: row for row in self.table.rows()}

    def update(self) -> list[str]:
        """Copy the rows of the storage into the table; return the names of the trials that have none yet.

        A trial whose stage or member has not ended well is refused, and so is what needs it in turn.
        """
        shared = self.shared.rows()
        self.table.add([shared[name] for name in self.plan.trials if name in shared], key="trial")
        known = self.rows()
        for trial in self.plan.trials.values():
            ended = [known[name] for name in trial.needs if name in known]
            bad = [row for row in ended if row["status"] != "ok"]
            if bad and trial.name not in known:
                cause = f"needs {bad[0]['trial']}, which is {bad[0]['status']}: {bad[0].get('cause', '')}"
                known[trial.name] = row_of(trial, "refused", cause, git_commit())
                self.table.add([known[trial.name]], key="trial")
        return [name for name in self.plan.trials if name not in known]

    def run(self) -> "Counter[str]":
        """Run all trials that have no row yet and wait for those that others run; return how many ended how."""
        for number in (signal.SIGTERM, signal.SIGHUP):  # so that the trials end with the sweep
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's, for instance
                signal.signal(number, signal.default_int_handler)
        refused, commit = [trial for trial in self.plan.trials.values() if trial.refusal], git_commit()
        self.table.add([row_of(trial, "refused", trial.refusal, commit) for trial in refused], key="trial")
        try:
            self.shared.free_dead(self.options.retry)
            self.run_trials()
        except (StorageInternalError, json.JSONDecodeError) as error:
            raise self.unusable(error) from error
        rows = self.rows()
        return Counter(str(rows[name]["status"]) for name in self.plan.trials)

    def run_trials(self) -> None:
        """Keep --jobs trials running until all have their rows. If that is interrupted, they end too."""
        todo, jobs, has_waited = self.update(), list[Job](), False
        for name in self.plan.trials.keys() - set(todo):  # a sweep may have been killed before it did this
            self.remove_left_files(name)
        # miniters 0: drawn by the clock alone, so that the time goes on while a long trial runs
        pace = {"smoothing": 0, "miniters": 0, "mininterval": 1 if sys.stderr.isatty() else 60}
        bar = tqdm(total=len(todo), unit="trial", disable=not todo, **{**bar_style(), **pace})
        try:
            while todo:
                self.shared.free_dead()
                while len(jobs) < self.options.jobs and (job := self.start(todo)) is not None:
                    jobs.append(job)
                if not jobs and not has_waited:
                    has_waited = True
                    with bar.external_write_mode():
                        say(f"waiting for {len(todo)} trials that other processes run on {self.shared.hosts()}")
                time.sleep(POLL)
                for job in list(jobs):
                    has_ended = job.process is None or job.process.poll() is not None
                    self.watch(job)
                    if has_ended:
                        jobs.remove(job)
                        with bar.external_write_mode():
                            say(self.finish(job))
                left = self.update()
                self.drop_checkpoints([name for name in todo if name not in left], left)
                bar.update(len(todo) - len(left))
                todo = left
        finally:
            with suppress(OSError):  # the terminal may have gone
                bar.close()
            for job in jobs:
                if job.process is not None:
                    job.process.kill()
                self.shared.close(job.record.number)

    def start(self, todo: list[str]) -> Job | None:
        """Take a trial and start it, or go on with it if it was cut short; None where there is none to start now."""
        waits = [name for name in todo if any(need in todo for need in self.plan.trials[name].needs)]
        ready = {name: self.plan.trials[name].flags for name in todo if name not in waits}
        taken = self.shared.take(ready, self.options.search_seed) if ready else None
        if taken is None:
            return None
        record, log = taken
        trial = self.plan.trial(record.user_attrs["trial"], record.params)
        job, folder = Job(trial, record, log, git_commit()), RunDirectory(Path(log.name).parent)
        is_same = trial.config is not None and began_as(trial.config, folder.path)
        if trial.refusal or (is_same and (folder.path / "scores.json").exists()):
            return job
        words = [str(SCRIPTS / trial.script), *trial.words, "--run_dir", str(folder.path)]
        if trial.script == SCRIPT:  # measured as --benchmark does it; the row is written here
            words += ["--no_test_predictions", "--benchmark="]
        if is_same and folder.states():
            words.append("--resume")
        else:
            log.truncate(0)
            folder.clear()
        if trial.config is not None and trial.config.compute.threads is None and self.options.jobs > 1:
            words += ["--threads", str(max(1, cores() // self.options.jobs))]
        job.process = subprocess.Popen([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return job

    def watch(self, job: Job) -> None:
        """Report the dev scores of a trial's new epochs, and end the trial where the pruner says so."""
        lines = read_lines(Path(job.log.name).with_name("metrics.jsonl"), METRICS)[job.epochs :]
        job.epochs += len(lines)
        with suppress(UpdateFinishedTrialError):  # another sweep has taken the trial over, as `finish` will see
            for line in lines:
                if "score" in line["dev"]:
                    job.record.report(line["dev"]["score"], line["epoch"])
            if lines and job.process is not None and job.record.should_prune():
                job.pruned = f"its best dev score up to epoch {job.epochs} is below the median of the other trials"
                job.process.terminate()

    def finish(self, job: Job) -> str:
        """Record the row of a trial that has ended, delete its states and unlock it; return a line about it."""
        folder, trial = Path(job.log.name).parent, job.trial
        code = 0 if job.process is None else job.process.returncode
        status, cause = verdict(code, read_bytes(folder / "log.txt", MAX_TEXT).decode("utf-8", "replace"))
        if trial.refusal:
            status, cause = "refused", trial.refusal
        elif job.pruned and code:
            status, cause = "pruned", job.pruned
        row = {**figures(folder), **row_of(trial, status, cause, job.commit)}
        if not self.shared.finish(job.record, row):
            return f"{trial.name}: another sweep has taken this trial over"
        self.remove_left_files(trial.name)
        job.log.close()
        sampled = "".join(f" {flag}={trial.flags[flag]}" for flag in self.plan.ranges)
        return f"{trial.name}{sampled}: {status}, " + (f"score {row['score']:.4f}" if "score" in row else cause)

    def remove_left_files(self, name: str) -> None:
        """Remove the half-written files and, unless they are kept, the states of a trial that has its row."""
        folder = RunDirectory(self.out / "trials" / name)
        folder.remove_left_files()
        if not self.options.keep_checkpoints:
            folder.drop_states()

    def drop_checkpoints(self, ended: Sequence[str], left: Sequence[str]) -> None:
        """Delete the checkpoints of trials that have `ended` and of those that they needed.

        A checkpoint stays while a trial that has no row yet, one of `left`, is or needs its trial.
        """
        if self.options.keep_checkpoints:
            return
        still_needed = {*left, *(need for name in left for need in self.plan.trials[name].needs)}
        done = {*ended, *(need for name in ended for need in self.plan.trials[name].needs)}
        for name in done - still_needed:
            self.checkpoint(name).unlink(missing_ok=True)
