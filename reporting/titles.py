"""Titles of configurations: a few words that say what distinguishes each from the others."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from cli.commands import default_flags_of, flags_of
from config import GROUPS, Config, ModelOptions, TaskOptions
from tasks import TASKS
from utils.untrusted import shown

PER_TASK_OPTIONS: dict[str, Field[Any]] = {
    spec.metadata["template"].format(task=task): spec for task in TASKS for spec in fields(TaskOptions)
}
OPTIONS: dict[str, Field[Any]] = {
    spec.name: spec for group in GROUPS.values() for spec in fields(group)
} | PER_TASK_OPTIONS
# In how many options a word is a choice. A title does not name the option of a word that only one option has.
CHOICE_COUNTS = Counter(
    word
    for choices in {
        spec.name: spec.metadata.get("choices", ())  # an option that tasks have too counts once
        for group in (*GROUPS.values(), TaskOptions)
        for spec in fields(group)
    }.values()
    for word in choices
)
CHOICE_COUNTS["one"] += 1  # says nothing without its option, --optimizers
WITHOUT_EFFECT = (  # options that change no result
    *("use_gpu", "threads", "eval_batch_size", "max_bad_rows"),
    *(f"{task}_{split}_out" for task in TASKS for split in ("dev", "test")),
)

Flags = Mapping[str, Any]


class Method(NamedTuple):
    """The mode of LoRA or DoRA. Without adapters `mode` is the fine-tune mode."""

    mode: str
    dora: bool


def settings(config: Config, without: Collection[str] = ()) -> dict[str, str]:
    """Return every option that can change a result by its flag, except those in `without`.

    Only the names of data files and folders count, because their place differs between machines.
    """
    files = [spec.metadata["template"] for spec in fields(TaskOptions) if spec.name in ("dev", "test")]
    paths = {"data_dir", *(template.format(task=name) for template in files for name in config.tasks)}
    return {
        name: Path(str(value)).name if name in paths else str(value)
        for name, value in flags_of(config).items()
        if name not in WITHOUT_EFFECT and name not in without
    }


def differing_options(configs: Sequence[Config], without: Collection[str] = ()) -> list[str]:
    """Return the flags whose `settings` are not the same in all configurations."""
    all_settings = [settings(config, without) for config in configs]
    names = dict.fromkeys(name for options in all_settings for name in options)
    return [name for name in names if len({options.get(name) for options in all_settings}) > 1]


def differing_dev_sets(sizes: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    """Return the numbers of dev examples of each task that has several. `sizes` are those of runs, by task."""
    found = {name: sorted({counts[name] for counts in sizes if name in counts}) for name in TASKS}
    return {name: numbers for name, numbers in found.items() if len(numbers) > 1}


def dev_set_marks(sizes: Sequence[Mapping[str, int]]) -> list[str]:
    """Return for each run the dev sets that have another size in other runs, or nothing: ` (dev: 64 sst, 20 sts)`."""
    names = differing_dev_sets(sizes)
    marks = []
    for counts in sizes:
        differing = {name: counts[name] for name in names if name in counts}
        phrase = ", ".join(f"{count:,} {name}" for name, count in differing.items())
        if len(differing) == len(counts) > 1 and len(set(differing.values())) == 1:
            phrase = f"{max(differing.values()):,} of each task"
        marks.append(f" (dev: {phrase})" if phrase else "")
    return marks


def dev_sets_note(sizes: Sequence[Mapping[str, int]]) -> str:
    """Return a sentence on dev sets that differ in size. It is empty if there are none."""
    found = [
        f"{' or '.join(f'{number:,}' for number in numbers)} {TASKS[name].title}"
        for name, numbers in differing_dev_sets(sizes).items()
    ]
    return f"Dev sets differ in size ({'; '.join(found)}), so their scores cannot be compared." if found else ""


def has_adapters(config: Config) -> bool:
    """Return whether a configuration has LoRA or DoRA."""
    return config.lora.lora_mode != "none"


def method_of(config: Config) -> Method:
    """Return the method of a configuration."""
    if has_adapters(config):
        return Method(config.lora.lora_mode, config.lora.dora)
    return Method(config.train.fine_tune_mode, False)


def short_title(config: Config) -> str:
    """Return a configuration's method, rank and precision in a few words."""
    title, dora = method_of(config)
    if has_adapters(config):
        title = f"{'DoRA' if dora else 'LoRA'} {title} r{config.lora.lora_rank}"
    return f"{title} + AMP" if config.compute.amp else title


def titles_of(configs: Sequence[Config]) -> list[str]:
    """Return a title for each configuration. Two titles are the same only if the configurations differ in the seed.

    A title begins with `short_title`, unless it is the same for all. Configurations with the same short title are
    distinguished by their other options.
    """
    short_titles = [short_title(config) for config in configs]
    all_same = len(set(short_titles)) == 1
    options: dict[int, list[str]] = {}
    for title in set(short_titles):
        members = [i for i, other in enumerate(short_titles) if other == title]
        phrases = distinguishing_options([configs[i] for i in members], required=all_same)
        options |= zip(members, phrases, strict=True)
    if all_same:
        return [", ".join(options[i]) or title for i, title in enumerate(short_titles)]
    return [", ".join([title, *options[i]]) for i, title in enumerate(short_titles)]


def distinguishing_options(configs: Sequence[Config], required: bool) -> list[list[str]]:
    """Return for each configuration phrases for the options that differ and that it changed from their defaults.

    The list of a configuration that changed none is empty. If phrases are `required`, it has the value of the option
    that most of the others changed.
    """
    all_flags, all_changed = [flags_of(config) for config in configs], [changed_options(config) for config in configs]
    names = informative_options(differing_options(configs, without=("seed",)), all_flags)
    names.sort(key=lambda name: -sum(name in changed for changed in all_changed))
    all_phrases = []
    for flags, changed in zip(all_flags, all_changed, strict=True):
        chosen = [name for name in names if name in changed]
        if required and not chosen:
            chosen = [name for name in names if OPTIONS[name].name == OPTIONS[names[0]].name]
        phrases = [shown(phrase(shared_name(name, chosen, flags), flags.get(name))) for name in chosen]
        all_phrases.append(list(dict.fromkeys(phrases)))
    return all_phrases


def changed_options(config: Config) -> set[str]:
    """Return the flags that differ from their default and that do not follow from another option.

    The defaults are those of the run's arch and tasks. These two count as changed if the program's defaults differ.
    """
    chosen = {"arch": ModelOptions().arch} | {f"train_{task}": False for task in config.tasks}
    defaults = {**default_flags_of(config), **chosen}
    flags = flags_of(config)
    return {name for name, value in flags.items() if value != defaults[name] and not is_implied(config.model, name)}


def is_implied(model: ModelOptions, name: str) -> bool:
    """Return whether the model's other options imply this one, as cross pairs imply that there are no pair_features."""
    unset = {spec.name for spec in fields(ModelOptions) if spec.default is None}  # the arch and the others set these
    cleared: dict[str, Any] = {name: None}
    return name in unset and replace(model, **cleared).resolved() == model


def informative_options(names: Sequence[str], all_flags: Sequence[Flags]) -> list[str]:
    """Return the flags without details that always change together with another, as smart_epsilon does with smart.

    Options belong together if their names begin with the same word. The one with the shortest name is kept.
    """

    def pattern(name: str) -> tuple[str, tuple[int, ...]]:
        """Return the first word of an option, and for each run the first run with the same value."""
        values = [flags.get(name) for flags in all_flags]
        return OPTIONS[name].name.split("_")[0], tuple(map(values.index, values))

    kept: dict[tuple[str, tuple[int, ...]], str] = {}
    for name in sorted(names, key=lambda name: len(OPTIONS[name].name)):
        kept.setdefault(pattern(name), OPTIONS[name].name)
    return [name for name in names if kept[pattern(name)] == OPTIONS[name].name]


def shared_name(name: str, chosen: Collection[str], flags: Flags) -> str:
    """Return the name of a per-task option without the task, if it is chosen and equal for all tasks of the run."""
    option = OPTIONS[name].name
    siblings = [other for other in flags if other in PER_TASK_OPTIONS and PER_TASK_OPTIONS[other].name == option]
    same = len(siblings) > 1 and all(other in chosen and flags[other] == flags.get(name) for other in siblings)
    return option if same and option != "enabled" else name


def phrase(name: str, value: Any) -> str:
    """Return an option in words: `annealed`, `pcgrad`, `no head_batchnorm`, `smart 0.01`."""
    if value is True:
        return name
    if value is False or value is None or value == ():
        return f"no {name}"
    if isinstance(value, tuple):
        return f"{name} {','.join(value)}"
    if name == "data_dir":
        return f"{name} {Path(value).name}"  # `settings` compares no more of it
    return str(value) if name not in PER_TASK_OPTIONS and CHOICE_COUNTS[value] == 1 else f"{name} {value}"
