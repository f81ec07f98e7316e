"""A configuration as a command line and as values of flags, and back."""

import io
import re
import shlex
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from cli.checks import flag_of
from cli.parser import build_config, build_parser
from config import Config, ModelOptions
from tasks import TASKS
from utils.errors import UserError

SCRIPT = "multitask_classifier.py"


def flags_of(config: Config, without: tuple[str, ...] = ("run.",)) -> dict[str, Any]:
    """Return the value of every option by its flag's name.

    Groups in `without` are left out: by default that of the options that only say where a run's files are.
    """
    options = {key: value for key, value in config.flat().items() if not key.startswith(without)}
    return {flag_of(key).removeprefix("--"): value for key, value in options.items()}


def default_flags_of(config: Config) -> dict[str, Any]:
    """Return `flags_of` a run with the same tasks and arch and otherwise the defaults."""
    tasks = {f"tasks.{name}.enabled": True for name in config.tasks}
    return flags_of(build_config({"model.arch": config.model.arch, **tasks}, TASKS))


def command_of(config: Config) -> str:
    """Return the shortest command line for a configuration, without the flags that say where a run's files are."""
    default_tasks = set(build_config({}, TASKS).tasks)
    words = ["python", SCRIPT]
    if set(config.tasks) != default_tasks:
        words += [f"--train_{name}" for name in config.tasks]
    if config.model.arch != ModelOptions().arch:
        words += ["--arch", config.model.arch]
    defaults = default_flags_of(config)
    for name, value in flags_of(config).items():
        if value == defaults[name] or value is None or value == ():
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", ",".join(value) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def config_of(command: str) -> Config:
    """Return the configuration of a command line. Raise UserError if this version does not know its flags."""
    message = io.StringIO()
    try:
        with redirect_stderr(message), redirect_stdout(message):  # --help prints to the latter
            given = build_parser(SCRIPT, "", TASKS).parse_args(shlex.split(command)[2:])
    except SystemExit:
        raise UserError(message.getvalue().strip() or f"{command}: is not a training command") from None
    return build_config(vars(given), TASKS)


def shared_command(commands: Sequence[str]) -> str:
    """Return the first command with only the flags that all commands have, with the same values."""
    if not commands:
        return ""
    first, *others = (re.split(" (?=--)", command) for command in dict.fromkeys(commands))
    return " ".join(part for part in first if all(part in other for other in others))
