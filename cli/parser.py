"""Parse the words of a command line into a Config."""

import argparse
import math
import re
import shlex
import shutil
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, field, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from cli.checks import check, check_evaluate, check_processes
from cli.suggestions import close_recipes, explain_unknown
from config import ARCHS, GROUPS, Config, TaskOptions
from tasks import Task, task_by_alias
from utils.console import is_main_process
from utils.errors import UserError
from utils.options import out_of_bounds, value_type
from utils.untrusted import read_text, shown

MAX_FLAGS = 1 << 20  # bytes of a file of flags
RENAMED_FLAGS = {"option": "fine_tune_mode"}  # names that the course's handout has had


class HelpFormatter(argparse.HelpFormatter):
    """Wraps texts, but keeps the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class ShowHelp(argparse.Action):
    """--help [GROUP]: print all flags, or those of one group or task, and exit."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.print_help_of(values)


class StoreWords(argparse.Action):
    """--flag A B: store the words of a flag as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line, without the usage of all flags before it.

    `pages` makes the text of --help GROUP for each group. The page "tasks" and the examples end the text of --help.
    """

    pages: Mapping[str, Callable[[], str]] = MappingProxyType({})
    examples = ""

    def format_help(self) -> str:
        """Return the text of --help."""
        tasks = self.pages["tasks"]() if "tasks" in self.pages else ""
        self.epilog = "\n\n".join(filter(None, [tasks, self.examples]))
        return super().format_help()

    def print_help_of(self, group: str) -> NoReturn:
        """Print the page of a group or, for "", the whole help, and exit."""
        if group and group not in self.pages:
            self.error(f"--help {group}: there is no such group of flags; choose from {', '.join(self.pages)}")
        text = self.pages[group]() if group else self.format_help()
        self._print_message(text.rstrip() + "\n", sys.stdout)
        sys.exit(0)

    def _print_message(self, message: str, file: Any = None) -> None:
        if is_main_process():  # the other processes of torchrun have the same command line
            super()._print_message(message, file)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args`; for unknown words, exit with code 2 and say what may be meant."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            meant = explain_unknown(unknown, self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; {meant}" if meant else ""))
        return found

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, shown(f"{self.prog}: error: {message} (--help lists all flags)") + "\n")


def expand_arguments(argv: Iterable[str], seen: tuple[Path, ...] = ()) -> list[str]:
    """Return `argv` with each @file replaced by the flags in it, and each flag spelled --with_underscores.

    A file holds flags as a shell reads them, over any number of lines; a # at the start of a word starts a comment.
    The reports print `-lr`, `--lr`, `--fine-tune-mode` and `--batch_size`, so all these spellings are accepted, and so
    are the names in RENAMED_FLAGS.

    Raises UserError for a file that cannot be read or that includes itself.
    """
    out: list[str] = []
    for word in argv:
        if "\0" in word or word.encode("utf-8", "ignore").decode() != word:
            raise UserError(f"{word}: has a NUL byte or is not UTF-8; choose another name")
        if word.startswith("@"):
            try:
                path = Path(word[1:]).resolve()
                if path in seen:
                    raise UserError(f"{word}: the file includes itself; remove the line that names it")
                text = read_text(path, MAX_FLAGS)
                out += expand_arguments(shlex.split(without_comments(text)), (*seen, path))
            except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
                close = " or ".join(f"@{name}" for name in close_recipes(word[1:]))
                remedy = f"did you mean {close}?" if close and not path.exists() else "name a file of flags"
                raise UserError(f"{word}: cannot read flags from this file ({error}); {remedy}") from error
        elif re.match(r"--?[A-Za-z]", word) and word != "-h":
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            out.append("--" + RENAMED_FLAGS.get(name, name) + equals + value)
        else:
            out.append(word)
    return out


def without_comments(text: str) -> str:
    """Return flags without their comments: what follows a # at the start of a word, outside quotes."""
    return re.sub(r"""("[^"]*"|'[^']*')|(?:^|\s)#.*""", lambda found: found[1] or "", text, flags=re.MULTILINE)


def converter(kind: Any, metadata: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return a converter for argparse from text to a value of `kind` within the option's choices and bounds."""

    def convert_list(text: str) -> tuple[str, ...]:
        items = tuple(part.strip() for part in re.split(metadata.get("separator", r"[,\s]+"), text) if part.strip())
        if not items:
            raise argparse.ArgumentTypeError(f"{text!r} names nothing; name at least one, or leave the flag out")
        for item in items:
            if item not in metadata.get("choices", items):
                raise argparse.ArgumentTypeError(f"{item!r} is none of {', '.join(metadata['choices'])}")
        return items

    def convert(text: str) -> Any:
        text = metadata.get("synonyms", {}).get(text, text)
        percent = metadata.get("percent", False) and text.endswith("%")
        try:
            value = kind(text[:-1]) / 100 if percent else kind(text)
        except ValueError:
            wanted = "not a number" if kind is float else "too large" if text.isdigit() else "not a whole number"
            raise argparse.ArgumentTypeError(f"{text!r} is {wanted}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if percent and not value < 1:
            raise argparse.ArgumentTypeError(f"{text} is no share; give less than 100%")
        if problem := out_of_bounds(value, kind, metadata):
            raise argparse.ArgumentTypeError(f"{text} is {problem}")
        return value

    return convert_list if typing.get_origin(kind) is tuple else convert


def add_option(group: Any, names: Sequence[str], dest: str, spec: "Field[Any]", hint: Any, help: str) -> None:
    """Add one dataclass field to an argparse group. A flag that is not given stays out of the namespace."""
    kind, metadata = value_type(hint), spec.metadata
    has_default = not isinstance(spec.default, bool) and spec.default not in (None, "")  # 0.0 would equal False
    if has_default and help != argparse.SUPPRESS:
        shown = ",".join(spec.default) if isinstance(spec.default, tuple) else spec.default
        help += f" (default: {shown})"
    help = help.replace("%", "%%")
    flags = [f"--{name}" for name in names]
    common: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS}
    if kind is bool:
        # A flag on the command line can undo that of a recipe; the help shows the one that changes the default.
        opposites = [f"--no_{name}" for name in names]
        on, off = (argparse.SUPPRESS, f"do not {help}") if spec.default is True else (help, argparse.SUPPRESS)
        group.add_argument(*flags, action="store_true", help=on, **common)
        group.add_argument(*opposites, action="store_false", help=off, **common)
        return
    choices = metadata.get("choices")
    many = typing.get_origin(kind) is tuple
    values = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(kind, "TEXT")
    common["metavar"] = metadata.get("metavar", values)
    if isinstance(common["metavar"], tuple):
        group.add_argument(*flags, action=StoreWords, nargs=len(common["metavar"]), help=help, **common)
        return
    group.add_argument(*flags, type=converter(kind, metadata), choices=None if many else choices, help=help, **common)


def add_group(parser: argparse.ArgumentParser, name: str, cls: type) -> None:
    """Add a flag for each field of a dataclass, under its docstring as a title."""
    group = parser.add_argument_group((cls.__doc__ or name).strip().removesuffix("."))
    hints = typing.get_type_hints(cls)
    for spec in fields(cls):
        add_option(group, [spec.name], f"{name}.{spec.name}", spec, hints[spec.name], spec.metadata["help"])


def task_defaults(task: Task) -> TaskOptions:
    """Return the options of a task with the defaults of the task table."""
    return TaskOptions(lr_multiplier=task.lr_multiplier, weight_decay=task.weight_decay, loss=task.losses[0])


def add_task(parser: argparse.ArgumentParser, task: Task, only: Sequence[str] = (), hidden: bool = False) -> None:
    """Add the flags of a task, or `only` some of them. If `hidden`, --help does not show them."""
    group = parser.add_argument_group(task.title)
    hints = typing.get_type_hints(TaskOptions)
    defaults = task_defaults(task)
    for spec in fields(TaskOptions):
        if only and spec.name not in only:
            continue
        names = [spec.metadata["template"].format(task=name) for name in (task.name, *task.aliases)]
        metadata = spec.metadata | ({"choices": task.losses} if spec.name == "loss" else {})
        shown = field(default=getattr(defaults, spec.name), metadata=metadata)
        help = spec.metadata["help"].format(title=task.title, task=task.name)
        if spec.name == "loss" and task.kind == "similarity":
            help += "; some of --arch have another default"
        help = argparse.SUPPRESS if hidden else help
        add_option(group, names, f"tasks.{task.name}.{spec.name}", shown, hints[spec.name], help)


def add_tasks_for_help(parser: argparse.ArgumentParser, tasks: Mapping[str, Task], only: Sequence[str]) -> None:
    """Add one block with the flags that every task has, such as --{sst,sts}_loss, which only --help prints."""
    notes = [f"--help {next(iter(tasks))} shows those of one"]
    notes += [f"{name} is also called {' and '.join(task.aliases)}" for name, task in tasks.items() if task.aliases]
    group = parser.add_argument_group(f"Each task ({'; '.join(notes)})")
    hints = typing.get_type_hints(TaskOptions)
    any_name = "{" + ",".join(tasks) + "}"
    for spec in fields(TaskOptions):
        if only and spec.name not in only:
            continue
        defaults = {name: getattr(task_defaults(task), spec.name) for name, task in tasks.items()}
        help = spec.metadata["help"].format(title="the task", task="NAME")
        default: Any = spec.default
        if spec.name == "loss":
            losses = "; ".join(f"{name} {', '.join(task.losses)}" for name, task in tasks.items())
            help += f": {losses}; some of --arch have another default for similarities"
        if len(set(defaults.values())) > 1:
            help += f" (default: {', '.join(f'{name} {value}' for name, value in defaults.items())})"
            default = None
        shown = field(default=default, metadata=spec.metadata)
        name = spec.metadata["template"].format(task=any_name)
        add_option(group, [name], f"tasks.{spec.name}", shown, hints[spec.name], help)


def help_width() -> int:
    """Return the width of --help: that of the terminal, but at most 110 characters."""
    return min(110, shutil.get_terminal_size().columns - 2)


def empty_parser(prog: str, **arguments: Any) -> OneLineParser:
    """Return a parser without flags."""
    return OneLineParser(
        prog=prog,
        allow_abbrev=False,
        add_help=False,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=34, width=help_width()),
        **arguments,
    )


def build_parser(
    prog: str,
    description: str,
    tasks: Mapping[str, Task],
    groups: Mapping[str, type] = GROUPS,
    only: Sequence[str] = (),
    examples: str = "",
) -> OneLineParser:
    """Return a parser with a group of flags for each dataclass and for each row of the task table.

    Its --help shows one block for the flags that every task has, and ends with `examples`.
    """

    def page(fill: Callable[..., None], *arguments: Any) -> str:
        parser = empty_parser(prog, usage=argparse.SUPPRESS)
        fill(parser, *arguments)
        return parser.format_help().strip()

    pages = {name: partial(page, add_group, name, cls) for name, cls in groups.items()}
    if tasks:
        pages["tasks"] = partial(page, add_tasks_for_help, tasks, only)
    pages |= {alias: partial(page, add_task, tasks[name], only) for alias, name in task_by_alias(tasks).items()}

    parser = empty_parser(prog, description=description, usage=f"{prog} [flags] [@file-of-flags]")
    parser.pages, parser.examples = pages, examples
    help = f"print all flags, or those of one group: {', '.join(pages)}"
    options: dict[str, Any] = {"nargs": "?", "const": "", "default": argparse.SUPPRESS, "metavar": "GROUP"}
    parser.add_argument("-h", "--help", action=ShowHelp, help=help, **options)
    for name, cls in groups.items():
        add_group(parser, name, cls)
    for task in tasks.values():
        add_task(parser, task, only, hidden=True)
    return parser


def groups_of(given: Mapping[str, Any], groups: Mapping[str, type]) -> dict[str, Any]:
    """Return an instance of each dataclass from `given`, which maps "group.option" to values."""
    return {
        name: cls(**{key.split(".")[1]: value for key, value in given.items() if key.split(".")[0] == name})
        for name, cls in groups.items()
    }


def task_options(given: Mapping[str, Any], task: Task, defaults: TaskOptions | None = None) -> TaskOptions:
    """Return the options of a task from `given`, which maps "tasks.NAME.option" to values.

    Options that are not given come from `defaults`, or else from the task table.
    """
    prefix = f"tasks.{task.name}."
    return replace(
        defaults or task_defaults(task),
        **{key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)},
    )


def build_config(given: Mapping[str, Any], tasks: Mapping[str, Task]) -> Config:
    """Return a Config from `given`, which maps "group.option" and "tasks.NAME.option" to values.

    Raises UserError that names all problems at once.
    """
    groups = groups_of(given, GROUPS)
    similarity_loss = ARCHS[groups["model"].arch].similarity_loss
    options = {}
    for task in tasks.values():
        defaults = task_defaults(task)
        if task.kind == "similarity" and similarity_loss in task.losses:
            defaults.loss = similarity_loss
        options[task.name] = task_options(given, task, defaults)
    if "run.evaluate" in given:  # its default is for training
        groups["model"].pretrained = given.get("model.pretrained", "")
    if groups["train"].mlm and "train.fine_tune_mode" not in given:
        groups["train"].fine_tune_mode = "full-model"
    chosen = chosen_tasks(given, tasks, options)
    config = Config(tasks={name: replace(options[name], enabled=True) for name in chosen}, **groups)
    if problems := check(config, tasks) + check_evaluate(given):
        raise UserError("; ".join(problems))
    if config.pal.pal_tasks is not None:
        names = task_by_alias(tasks)
        config.pal.pal_tasks = tuple(dict.fromkeys(names[name] for name in config.pal.pal_tasks))
    config.tasks = {name: options.resolved(config.model) for name, options in config.tasks.items()}
    config.model = config.model.resolved()
    return config


def chosen_tasks(given: Mapping[str, Any], tasks: Mapping[str, Task], options: Mapping[str, TaskOptions]) -> list[str]:
    """Return the names of the tasks of a run, in the order of the task table. Raises UserError if there is none."""
    if "run.evaluate" in given:
        return list(tasks)  # the checkpoint says which of them it knows
    named = [name for name in tasks if options[name].enabled]
    default = [name for name, task in tasks.items() if task.by_default and f"tasks.{name}.enabled" not in given]
    if not named and not default:
        raise UserError("no task is left to train on; give at least one --train_NAME")
    return named or default


def parse(argv: Sequence[str], tasks: Mapping[str, Task], prog: str, about: str) -> Config:
    """Return the configuration that a command line asks for. Raises UserError for a bad combination of flags.

    `about` is for --help: a description and, after an empty line, examples.
    """
    description, _, examples = about.partition("\n\n")
    parser = build_parser(prog, description, tasks, examples=examples)
    namespace = parser.parse_args(expand_arguments(argv))
    config = build_config(vars(namespace), tasks)
    check_processes(config)
    return config
