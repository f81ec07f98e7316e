"""Run a study: a training run for every combination of a grid of flags, and a row of one csv file for each.

    python sweep.py --out runs/ranks --grid lora_rank=1,2,5 lora_mode=attn,attn-only dora=0,1 @recipes/minilm-cpu.args
    python sweep.py @recipes/studies/lora-ranks.args --data_dir data --jobs 2

Flags other than the sweep's own are multitask_classifier.py's and hold for every trial. A grid names flags with their
values, and each combination is a trial; another --grid adds its own combinations, a baseline for instance. A switch
takes 0 and 1. A value that is itself a list is written with spaces: "lora_targets=query value,key".

A combination that multitask_classifier.py refuses is not run; its row has the reason. A trial is a process of its own
that works in OUT/trials/NAME and prints into log.txt there; if it runs out of memory or crashes, that is its row, and
the others go on. Trials leave the test files alone, since a study chooses by dev. Once its row stands, a trial's
checkpoints are deleted, unless --keep_checkpoints.

A sweep that was killed, in whatever way, goes on when it is started again: trials that have a row are done, and one
that was cut short goes on from its last state (--save_every). More values may be added to the grid. To have a trial run
again, delete its row and its folder. Several sweeps on one machine may share a study, on a GPU each for instance: start
the same command again.

Several machines share a study by --storage FILE, a file that all of them see, or the URL of a database that Optuna
knows: start the same command on each, with the same last folder in --out, which is the name of the study there. The
table of every machine gets the rows of all; a machine that dies gives its trials back within about a minute.

OUT/results.csv has the columns trial, status (ok, refused, out of memory, failed), the grid's flags, and COLUMNS of
training/efficiency.py: dev scores, seconds and peak memory of training per epoch, the parameters that train in the last
epoch, and what a run depends on. What a trial does not have is left empty.
"""

import fcntl
import hashlib
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from cli.checks import check_processes
from cli.parser import build_config, build_parser, expand_arguments, groups_of
from config import Config, option
from studies.results import COLUMNS, Table, figures
from studies.shared_study import OwnStudy, SharedStudy
from tasks import TASKS
from utils.console import bar_style, run_script, say
from utils.errors import OUT_OF_MEMORY, UserError
from utils.untrusted import read_json

SCRIPT = "multitask_classifier.py"
STATUSES = ("ok", "refused", "out of memory", "failed")
POLL = 0.2  # seconds between looks at the running trials


@dataclass
class SweepOptions:
    """Sweep."""

    out: str = option("", "folder of the study: results.csv and trials/", metavar="DIR")
    storage: str = option(
        "", "share the study with other machines: a file that all of them see, or a database's URL", metavar="FILE"
    )
    jobs: int = option(1, "trials at a time; without --threads they share the CPU's cores", low=1)
    keep_checkpoints: bool = option(False, "keep best.pt and resume.pt of trials that have their row")
    dry_run: bool = option(False, "list the trials and stop")


# ----------------------------------------------------------------------------------------------------------------------
# From grids to trials


@dataclass(frozen=True)
class Trial:
    """One combination: the grid's flags, all flags, and the configuration, or why there can be none."""

    flags: Mapping[str, str]
    words: Sequence[str]
    config: Config | None
    refusal: str = ""

    @property
    def name(self) -> str:
        """A folder's name, made from the flags; the same in whatever order they were given."""
        text = ",".join(f"{flag}={value}" for flag, value in sorted(self.flags.items()))
        plain = re.sub(r"[^\w.,=+-]+", "-", text)
        if plain == text and len(text) <= 100:
            return text
        return f"{plain[:90]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def command(self) -> str:
        """The command line that trains this."""
        return shlex.join(["python", SCRIPT, *self.words])


def read_grid(words: Sequence[str]) -> dict[str, list[str]]:
    """The values of each flag, from words such as lora_rank=1,2,5. Raises UserError for a word without values."""
    grid: dict[str, list[str]] = {}
    for word in words:
        name, _, values = word.partition("=")
        flag = name.replace("-", "_")
        listed = [value.strip() for value in values.split(",") if value.strip()]
        if not listed:
            raise UserError(f"--grid {word}: has no values; write it as lora_rank=1,2,5")
        if flag in grid:
            raise UserError(f"--grid {word}: {flag} is there twice; write all its values behind one =")
        grid[flag] = list(dict.fromkeys(listed))
    return grid


def flag_word(parser: ArgumentParser, flag: str, value: str) -> str:
    """A flag of the grid as the command line spells it: --flag=value, or --flag and --no_flag for a switch."""
    known = parser._option_string_actions
    action = known.get(f"--{flag}")
    if action is None:
        raise UserError(f"--grid {flag}={value}: {SCRIPT} has no flag --{flag}; its --help lists all flags")
    if action.nargs != 0:
        return f"--{flag}={value}"
    if f"--no_{flag}" not in known or value not in ("0", "1"):
        raise UserError(f"--grid {flag}={value}: is a switch; write it as {flag.removeprefix('no_')}=0,1")
    return f"--{flag}" if value == "1" else f"--no_{flag}"


def make_trial(parser: ArgumentParser, base: Sequence[str], flags: Mapping[str, str]) -> Trial:
    """The trial of one combination; multitask_classifier.py's own checks say whether it can be.

    Exits with code 2 for a flag or value that does not exist; raises UserError for a flag that is the sweep's to give.
    """
    words = [*base, *(flag_word(parser, flag, value) for flag, value in flags.items())]
    given = vars(parser.parse_args(words))
    for key in given:
        group, _, name = key.partition(".")
        if group == "run" and name not in ("tensorboard", "save_every"):
            raise UserError(f"--{name}: a sweep gives each trial its own; leave it out")
    try:
        config = build_config(given, TASKS)
        check_processes(config)
        return Trial(flags, words, config)
    except UserError as error:
        return Trial(flags, words, None, str(error))


def make_trials(grids: Sequence[Mapping[str, Sequence[str]]], base: Sequence[str]) -> list[Trial]:
    """All combinations of each grid, each once. A combination that is the same run as an earlier one is refused."""
    parser = build_parser(SCRIPT, "", TASKS)
    trials: dict[str, Trial] = {}
    first: dict[str, str] = {}  # configuration -> the trial that has it
    for grid in grids:
        for values in itertools.product(*grid.values()):
            trial = make_trial(parser, base, dict(zip(grid, values, strict=True)))
            if trial.name in trials:
                continue
            if trial.config is not None:
                same = first.setdefault(json.dumps(trial.config.to_dict()), trial.name)
                if same != trial.name:
                    trial = Trial(trial.flags, trial.words, None, f"is the same run as {same}")
            trials[trial.name] = trial
    return list(trials.values())


# ----------------------------------------------------------------------------------------------------------------------
# What became of a trial

ERROR = re.compile(r"error: |[\w.]+(Error|Exception|Interrupt)\b|[\w.]+: error: ")
TAIL = 40  # lines of a log in which an error's text is looked for


def verdict(code: int, log: str) -> tuple[str, str]:
    """Status and cause, one line, from a process's exit status and all that it printed."""
    if code == 0:
        return "ok", ""
    lines = [line.strip()[:300] for line in re.split(r"[\r\n]+", log) if line.strip()][-TAIL:]
    if code == -signal.SIGKILL:
        return "out of memory", "killed by SIGKILL, as the system does when memory runs out"
    memory = [line for line in lines if OUT_OF_MEMORY.search(line)]
    if memory:
        return "out of memory", memory[-1]
    if code < 0:
        known = {own.value: own.name for own in signal.Signals}  # real-time signals have no name of their own
        return "failed", f"killed by {known.get(-code, f'signal {-code}')}"
    errors = [line for line in lines if ERROR.match(line)]
    return "failed", (errors or lines or [f"exit code {code}"])[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Running


@dataclass
class Job:
    """A trial that this sweep has claimed. `process` is None where the run was found finished.

    The claim is a lock on `log`, the trial's log.txt. Its process inherits the lock, so that a trial which outlives a
    killed sweep is not started a second time.
    """

    trial: Trial
    log: TextIO
    commit: str | None
    process: "subprocess.Popen[bytes] | None"

    @property
    def done(self) -> bool:
        """Whether the run has ended, well or not."""
        return self.process is None or self.process.poll() is not None


def claim(log_path: Path) -> TextIO | None:
    """The log, locked for us; None where another process has it."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log = log_path.open("a", encoding="utf-8")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        return None
    return log


def began_as(config: Config, folder: Path) -> bool:
    """Whether the run in a folder has this configuration, where and on what it runs aside."""
    try:
        before = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    now = json.loads(json.dumps(config.to_dict()))
    return all(before.get(group) == now[group] for group in now if group not in ("run", "compute"))


def row_of(trial: Trial, status: str, cause: str, commit: str | None) -> dict[str, Any]:
    """What every row has."""
    seed = {} if trial.config is None else {"seed": trial.config.train.seed}
    about = {"trial": trial.name, "status": status, "cause": cause, "command": trial.command, "commit": commit}
    return {**about, **seed, **trial.flags}


class Study:
    """A folder with the table and the trials' run directories, alone or shared with other machines."""

    def __init__(self, options: SweepOptions, flags: Sequence[str]) -> None:
        self.options = options
        out = Path(options.out)
        own = dict.fromkeys(["trial", "status", *flags])
        self.table = Table(out / "results.csv", [*own, *(name for name in COLUMNS if name not in own)])
        self.machines = SharedStudy(options.storage, out.resolve().name) if options.storage else OwnStudy()

    def folder(self, trial: Trial) -> Path:
        """A trial's run directory."""
        return Path(self.options.out) / "trials" / trial.name

    def rows(self) -> dict[str, dict[str, str]]:
        """The rows of the table by trial."""
        return {row["trial"]: row for row in self.table.rows()}

    def check(self, trials: Sequence[Trial]) -> None:
        """Raise UserError where a row was made by another command than its trial's."""
        shared = {row["trial"]: row for row in self.machines.rows()}
        rows = {**self.rows(), **shared}
        for trial in trials:
            before = rows.get(trial.name, {}).get("command", trial.command)
            if before != trial.command:
                raise UserError(
                    f"--out {self.options.out}: there {trial.name} is the run of `{before}` and not of "
                    f"`{trial.command}`; repeat the flags or choose another folder"
                )

    def refuse(self, trials: Sequence[Trial]) -> None:
        """Put combinations that cannot be into the table."""
        from models.checkpoint import git_commit

        commit = git_commit()
        self.table.add([row_of(trial, "refused", trial.refusal, commit) for trial in trials], key="trial")

    def exchange(self, trials: Sequence[Trial]) -> dict[str, dict[str, str]]:
        """Give the rows that we have to the other machines, take theirs; returns all by trial."""
        rows, names = self.rows(), {trial.name for trial in trials}
        for name in names & rows.keys():
            if self.machines.take(name):
                self.machines.finish(rows[name])
        theirs = [row for row in self.machines.rows() if row["trial"] in names - rows.keys()]
        if not theirs:
            return rows
        self.table.add(theirs, key="trial")
        return self.rows()

    def run(self, trials: Sequence[Trial]) -> None:
        """Run all that have no row yet, --jobs at a time, and wait for those that other sweeps run."""
        rows = self.exchange(trials)
        todo = [trial for trial in trials if trial.name not in rows]
        jobs: list[Job] = []
        waiting = False
        # miniters 0: drawn by the clock alone, so that the time goes on while a long trial runs
        pace = {"smoothing": 0, "miniters": 0, "mininterval": 1 if sys.stderr.isatty() else 60}
        bar = tqdm(total=len(todo), unit="trial", disable=not todo, **{**bar_style(), **pace})
        try:
            while todo:
                for trial in todo:
                    if len(jobs) < self.options.jobs and (job := self.take(trial)) is not None:
                        jobs.append(job)
                if not jobs and not waiting:
                    with bar.external_write_mode():
                        say(f"waiting for {len(todo)} trials that another process runs")
                    waiting = True
                time.sleep(POLL)
                for job in [job for job in jobs if job.done]:
                    with bar.external_write_mode():
                        say(self.finish(job))
                    jobs.remove(job)
                self.machines.keep()
                rows = self.exchange(todo)
                bar.update(sum(trial.name in rows for trial in todo))
                todo = [trial for trial in todo if trial.name not in rows]
        finally:
            bar.close()
            for job in jobs:
                if job.process is not None:
                    job.process.kill()
            self.machines.release()

    def take(self, trial: Trial) -> Job | None:
        """Claim a trial and start it; None where another has it, a job of ours included, or where it has its row."""
        from models.checkpoint import git_commit
        from training.distributed import cores
        from training.run_directory import RunDirectory

        assert trial.config is not None
        folder = self.folder(trial)
        if not self.machines.take(trial.name):
            return None
        log = claim(folder / "log.txt")
        if log is None:
            return None
        if trial.name in self.rows():
            log.close()
            return None
        ours = began_as(trial.config, folder)
        if ours and (folder / "scores.json").exists():
            return Job(trial, log, git_commit(), None)
        resumes = ours and bool(RunDirectory(folder).states())
        if not resumes:
            log.truncate(0)
            RunDirectory(folder).clear()
        # measured as --benchmark does it; the row is written here
        words = [*trial.words, "--no_test_predictions", "--benchmark=", "--run_dir", str(folder)]
        if resumes:
            words.append("--resume")
        if trial.config.compute.threads is None and self.options.jobs > 1:
            words += ["--threads", str(max(1, cores() // self.options.jobs))]
        script = [sys.executable, str(Path(__file__).with_name(SCRIPT)), *words]
        process = subprocess.Popen(script, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return Job(trial, log, git_commit(), process)

    def finish(self, job: Job) -> str:
        """Make the row of a run that has ended, delete its checkpoints and give the claim back; returns a line."""
        from training.run_directory import RunDirectory

        folder = self.folder(job.trial)
        code = 0 if job.process is None else job.process.returncode
        status, cause = verdict(code, (folder / "log.txt").read_text(encoding="utf-8", errors="replace"))
        row = {**figures(folder), **row_of(job.trial, status, cause, job.commit)}
        if self.machines.finish(row):
            self.table.add([row], key="trial")
        if not self.options.keep_checkpoints:
            (folder / "best.pt").unlink(missing_ok=True)
            RunDirectory(folder).drop_states()
        job.log.close()
        return f"{job.trial.name}: {status}, " + (f"score {row['score']:.4f}" if "score" in row else cause)


def read_command(argv: Sequence[str]) -> tuple[SweepOptions, list[dict[str, list[str]]], list[str]]:
    """The sweep's own options, the grids, and the flags that hold for every trial."""
    groups = {"sweep": SweepOptions}
    parser = build_parser("sweep.py", str(__doc__).split("\n\n")[0], {}, groups)
    parser.usage = f"sweep.py --out DIR --grid FLAG=VALUE,... [flags] [flags of {SCRIPT}] [@file-of-flags]"
    parser.add_argument(
        "--grid",
        nargs="+",
        action="append",
        default=[],
        metavar="FLAG=VALUE,...",
        help="the values of each flag; every combination is a trial, and another --grid adds its own",
    )
    for flag in ("--run_dir", "--name", "--filepath"):  # of a recipe: each trial has its own
        parser.add_argument(flag, help=SUPPRESS)
    own, base = parser.parse_known_args(expand_arguments(argv))
    options: SweepOptions = groups_of(vars(own), groups)["sweep"]
    if not options.out:
        raise UserError("--out: name the folder of the study")
    if not own.grid:
        raise UserError("--grid: name flags and their values, such as --grid lora_mode=attn lora_rank=1,2,5")
    return options, [read_grid(words) for words in own.grid], base


def main(argv: Sequence[str]) -> None:
    """Do what the command line asks; exits with code 1 where a trial failed otherwise than by lack of memory."""
    options, grids, base = read_command(argv)
    trials = make_trials(grids, base)
    feasible = [trial for trial in trials if trial.config is not None]
    for trial in trials:
        if trial.config is None:
            say(f"refused {trial.name}: {trial.refusal}")
        elif options.dry_run:
            say(trial.name)
    if options.dry_run:
        say(f"{len(feasible)} trials, {len(trials) - len(feasible)} refused")
        return

    from utils.files import probe_folder

    probe_folder(Path(options.out), "--out")
    study = Study(options, [flag for grid in grids for flag in grid])
    study.check(trials)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the trials end with the sweep
    study.refuse([trial for trial in trials if trial.config is None])
    study.run(feasible)
    rows = study.rows()
    counts = Counter(rows[trial.name]["status"] for trial in trials)
    summary = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    say(f"{summary}: {study.table.path}")
    if counts["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
