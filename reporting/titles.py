"""What configurations are called beside each other: a few words that say what sets each apart."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

from config import GROUPS, Config, ModelOptions, TaskOptions
from reporting.sources import defaults_of, flags_of
from tasks import TASKS

PER_TASK: dict[str, Field[Any]] = {
    spec.metadata["template"].format(task=task): spec for task in TASKS for spec in fields(TaskOptions)
}
OPTIONS: dict[str, Field[Any]] = {spec.name: spec for group in GROUPS.values() for spec in fields(group)} | PER_TASK
# How many options have a word among their choices: a word of one option alone needs no name beside it.
MEANINGS = Counter(
    word
    for group in (*GROUPS.values(), TaskOptions)
    for spec in fields(group)
    for word in spec.metadata.get("choices", ())
)

Flags = Mapping[str, Any]


def settings(config: Config, without: Collection[str] = ()) -> dict[str, str]:
    """Every option that can change a result, by its flag, apart from those in `without`.

    Files and their folder count by their last name alone, since each machine has its own place for them.
    """
    files = [spec.metadata["template"] for spec in fields(TaskOptions) if spec.name in ("dev", "test")]
    places = {"data_dir", *(template.format(task=name) for template in files for name in config.tasks)}
    apart = {"use_gpu", "threads", "eval_batch_size", "max_bad_rows", *without}
    return {
        name: Path(str(value)).name if name in places else str(value)
        for name, value in flags_of(config).items()
        if name not in apart
    }


def differing(configs: Sequence[Config], without: Collection[str] = ()) -> list[str]:
    """The flags by which configurations differ."""
    all_settings = [settings(config, without) for config in configs]
    names = dict.fromkeys(name for own in all_settings for name in own)
    return [name for name in names if len({own.get(name) for own in all_settings}) > 1]


def has_adapters(config: Config) -> bool:
    """Whether a configuration has LoRA or DoRA."""
    return config.lora.lora_mode != "none"


def method_of(config: Config) -> tuple[str, bool]:
    """The mode of its adapters and whether they are DoRA, or without any what of the backbones trains."""
    return (config.lora.lora_mode, config.lora.dora) if has_adapters(config) else (config.train.fine_tune_mode, False)


def title_of(config: Config) -> str:
    """A configuration in a few words."""
    mode, dora = method_of(config)
    kind = f"{'DoRA' if dora else 'LoRA'} {mode} r{config.lora.lora_rank}" if has_adapters(config) else mode
    return kind + " + AMP" * config.compute.amp


def titles_of(configs: Sequence[Config]) -> list[str]:
    """A name for each configuration, of which no two have the same `settings` apart from their seed.

    Where their `title_of` differs a name begins with it; those that share one are told apart by what else differs.
    """
    titles = [title_of(config) for config in configs]
    shared = len(set(titles)) == 1
    words: dict[int, list[str]] = {}
    for title in dict.fromkeys(titles):
        own = [i for i, other in enumerate(titles) if other == title]
        words |= zip(own, apart([configs[i] for i in own], needed=shared), strict=True)
    return [", ".join([title] * (not shared) + words[i]) or title for i, title in enumerate(titles)]


# ----------------------------------------------------------------------------------------------------------------------
# What tells configurations of one title apart


def apart(configs: Sequence[Config], needed: bool) -> list[list[str]]:
    """What sets each configuration apart: the options that differ, where this one has not their default.

    One at all defaults has an empty list, or if a name is `needed` the option that most of the others changed.
    """
    all_flags, all_changed = [flags_of(config) for config in configs], [changed_by(config) for config in configs]
    names = telling(differing(configs, ("seed",)), all_flags)
    names.sort(key=lambda name: -sum(name in changed for changed in all_changed))
    out = []
    for flags, changed in zip(all_flags, all_changed, strict=True):
        chosen = [name for name in names if name in changed]
        if needed and not chosen:
            chosen = [name for name in names if OPTIONS[name].name == OPTIONS[names[0]].name]
        out.append(list(dict.fromkeys(phrase(shared_name(name, chosen, flags), flags.get(name)) for name in chosen)))
    return out


def changed_by(config: Config) -> set[str]:
    """The flags that are not at their default, for which no other option accounts either.

    Defaults are those of the run's arch and tasks; these two count as changed where they are not the program's own.
    """
    chosen = {"arch": ModelOptions().arch} | {f"train_{task}": False for task in config.tasks}
    defaults = {**defaults_of(config), **chosen}
    flags = flags_of(config)
    return {name for name, value in flags.items() if value != defaults[name] and not follows(config.model, name)}


def follows(model: ModelOptions, name: str) -> bool:
    """Whether a choice of the model's is what the others come to without it: cross pairs have no pair_features."""
    if getattr(ModelOptions, name, 0) is not None:  # of another group, or one with a default of its own
        return False
    left_out: dict[str, Any] = {name: None}
    return replace(model, **left_out).resolved() == model


def telling(names: Sequence[str], all_flags: Sequence[Flags]) -> list[str]:
    """The flags without those that say nothing new: details such as smart_epsilon that always change with smart.

    Options whose names begin with the same word are one method's; of those that change together, the shortest counts.
    """

    def kind(name: str) -> tuple[str, tuple[int, ...]]:
        values = [own.get(name) for own in all_flags]
        return OPTIONS[name].name.split("_")[0], tuple(map(values.index, values))

    kept: dict[tuple[str, tuple[int, ...]], str] = {}
    for name in sorted(names, key=lambda name: len(OPTIONS[name].name)):
        kept.setdefault(kind(name), OPTIONS[name].name)
    return [name for name in names if kept[kind(name)] == OPTIONS[name].name]


def shared_name(name: str, chosen: Collection[str], flags: Flags) -> str:
    """The name of a per-task option without the task, where it is chosen and the same for all tasks of the run."""
    siblings = [other for other in flags if other in PER_TASK and PER_TASK[other].name == OPTIONS[name].name]
    same = len(siblings) > 1 and all(other in chosen and flags[other] == flags.get(name) for other in siblings)
    return OPTIONS[name].name if same and OPTIONS[name].name != "enabled" else name


def phrase(name: str, value: Any) -> str:
    """An option in words: `annealed`, `pcgrad`, `no head_batchnorm`, `smart 0.01`."""
    if value is True:
        return name
    if value is False or value is None or value == ():
        return f"no {name}"
    if isinstance(value, tuple):
        return f"{name} {','.join(value)}"
    return str(value) if name not in PER_TASK and MEANINGS[value] == 1 else f"{name} {value}"
