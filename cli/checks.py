"""Which options exclude each other, and the remedy."""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from config import (
    ARCHS,
    MAX_RATE,
    ROUTINES_WITHOUT_ROUNDS,
    SAVE_EVERY,
    USES_OF_A_MODEL,
    Config,
    TaskOptions,
    TrainOptions,
)
from tasks import Task, task_by_alias
from utils.console import processes
from utils.errors import UserError


def check(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """What is wrong with a combination of options, a sentence each."""
    return [
        *check_adapters(config),
        *check_run(config, tasks),
        *check_training(config),
        *check_embedding_losses(config, tasks),
        *check_cache_frozen(config),
        *check_pals(config, tasks),
        *check_mlm(config),
        *check_fsdp(config),
        *check_tasks(config),
    ]


def changed(options: Any) -> list[str]:
    """The names of options that have not their defaults."""
    return [spec.name for spec in fields(options) if getattr(options, spec.name) != spec.default]


def check_adapters(config: Config) -> list[str]:
    """What is wrong with the options of LoRA and DoRA."""
    problems, lora = [], config.lora
    adapters = changed(lora)
    for whole in ("lora_dict", "init_peft"):
        others = ", ".join(f"--{name}" for name in adapters if name != whole)
        if whole in adapters and others:
            problems.append(f"--{whole} says all that {others} says; give one or the other")
    if adapters and not {"lora_mode", "lora_dict", "init_peft"} & set(adapters):
        problems.append(f"--{adapters[0]} needs adapters; choose them with --lora_mode")
    if config.train.init_from is not None and adapters:
        problems.append(
            f"--init_from trains on from weights that no --pretrained holds, and --{adapters[0]} would save adapters "
            "without them; drop one of the two"
        )
    if lora.dora_norm != "row" and not lora.dora and lora.lora_dict is None:
        problems.append("--dora_norm belongs to --dora; add that or drop it")
    return problems


def check_run(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """What is wrong with what is asked for: with its files, or with what is to be done with a trained model."""
    problems, run = [], config.run
    for name in ("predict", "export", "export_peft"):
        if getattr(run, name) is not None and run.evaluate is None:
            problems.append(f"--{name} needs a trained model; name its checkpoint with --evaluate")
    if run.benchmark is not None and run.profile:
        problems.append("--profile slows the steps that --benchmark measures; give one of the two")
    if run.benchmark is not None and config.train.cuda_graphs:
        problems.append("--cuda_graphs hides memory from the figures of --benchmark; give one of the two")
    if run.predict is not None and run.task is None:
        problems.append(f"--predict needs --task, one of {', '.join(tasks)}")
    known = task_by_alias(tasks)
    if run.task is not None and run.predict is None:
        problems.append("--task belongs to --predict; add that or drop it")
    if run.task is not None and run.task not in known:
        problems.append(f"--task {run.task} is none of {', '.join(known)}")
    if run.overwrite and run.resume:
        problems.append("--overwrite starts afresh and --resume goes on; give one of the two")
    if run.resume and run.run_dir is None:
        problems.append("--resume needs --run_dir, the folder of the unfinished run")
    if run.name is not None and run.run_dir is not None:
        problems.append("--name is that of a folder in runs, but --run_dir gives the folder; give one of the two")
    if not re.fullmatch(SAVE_EVERY, run.save_every):
        problems.append(f"--save_every {run.save_every}: give steps, such as 500, or minutes, such as 30m")
    return problems


def check_training(config: Config) -> list[str]:
    """What is wrong with how the run trains."""
    problems, train = [], config.train
    if train.optim == "SparseAdam":
        problems.append("--optim SparseAdam refuses the dense gradients of a BERT; use Adam or Adamax")
    problems += check_requirements(train)
    if train.routine in ROUTINES_WITHOUT_ROUNDS:
        problems += [
            f"--num_{name}_trains belongs to --routine sequential and interleave, not {train.routine}; drop one"
            for name, own in config.tasks.items()
            if own.num_trains > 1
        ]
    if train.pcgrad and train.routine != "joint":
        problems.append(f"--pcgrad needs the gradients of all tasks at once, but --routine {train.routine}; use joint")
    smart = [name for name, own in config.tasks.items() if own.smart > 0.0]
    for name in changed(train):
        if name.startswith("smart_") and not smart:
            problems.append(f"--{name} belongs to SMART; choose tasks for it with --NAME_smart, such as --sst_smart 1")
    if smart and train.cache_frozen:
        problems.append(
            f"--{smart[0]}_smart perturbs the embeddings, which --cache_frozen leaves out; drop one of them"
        )
    if train.cuda_graphs and not (config.compute.use_gpu and config.compute.amp):
        problems.append("--cuda_graphs needs --use_gpu and --amp; add them or drop it")
    return problems


def check_tasks(config: Config) -> list[str]:
    """What is wrong with when the tasks train and are averaged, and with the weights of their losses."""
    problems, train = [], config.train
    if train.average == "swa" and train.swa_from_epoch > train.epochs:
        problems.append(f"--swa_from_epoch {train.swa_from_epoch} is past --epochs {train.epochs}; lower it")
    problems += [
        f"--{name}_from_epoch {own.from_epoch} is past --epochs {train.epochs}; lower it"
        for name, own in config.tasks.items()
        if own.from_epoch > train.epochs
    ]
    problems += [
        f"--lr {train.lr:g} times --{name}_lr_multiplier {own.lr_multiplier:g} is too large; lower one of the two"
        for name, own in config.tasks.items()
        if train.scaled_lr() * own.lr_multiplier > MAX_RATE
    ]
    if all(chosen.num_trains == 0 for chosen in config.tasks.values()):
        problems.append("every --num_NAME_trains is 0, so no task trains; set one to 1 or more")
    elif min(chosen.from_epoch for chosen in config.tasks.values() if chosen.num_trains) > 1:
        problems.append("no task trains in epoch 1; set one --NAME_from_epoch to 1")
    lost = [own.weight == own.smart == own.bregman == 0.0 for own in config.tasks.values()]
    if all(lost) and not train.mlm and all(own.embedding_loss == "none" for own in config.tasks.values()):
        problems.append("every --NAME_weight is 0 and no other loss is chosen, so nothing would be learned; raise one")
    return problems


def check_requirements(options: TrainOptions) -> list[str]:
    """What is set although the option that it belongs to has a value under which it means nothing."""
    problems = []
    for name in changed(options):
        owner, values = options.__dataclass_fields__[name].metadata.get("requires", (None, ()))
        if owner is not None and (chosen := getattr(options, owner)) not in values:
            problems.append(
                f"--{name} belongs to --{owner} {', '.join(values)}, not {chosen}; drop one of the two, or give "
                f"--{name} its default"
            )
    return problems


def check_evaluate(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with the flags beside --evaluate, of `given` as `build_config` has it."""
    if "run.evaluate" not in given:
        return []
    use = next(name for name in USES_OF_A_MODEL if f"run.{name}" in given)
    known = {"evaluate", "task", use, *USES_OF_A_MODEL[use]}
    idle = [key for key in given if not key.startswith("compute.") and key.rpartition(".")[2] not in known]
    if not idle:
        return []
    flags = ", ".join(map(flag_of, idle))
    return [f"--{use} takes a trained model as it is, for which {flags} would change nothing; drop what is idle"]


def flag_of(key: str) -> str:
    """The flag of an option "group.option" or "tasks.NAME.option"."""
    _, *task, name = key.split(".")
    return "--" + (TaskOptions.__dataclass_fields__[name].metadata["template"].format(task=task[0]) if task else name)


def check_embedding_losses(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """What is wrong with --NAME_embedding_loss."""
    problems = []
    pairs = config.model.pair_encoding or ARCHS[config.model.arch].pair_encoding
    for name, own in config.tasks.items():
        flag = f"--{name}_embedding_loss {own.embedding_loss}"
        if own.embedding_loss == "none" and own.embedding_weight != 1.0:
            problems.append(f"--{name}_embedding_weight belongs to --{name}_embedding_loss; add that or drop it")
        if own.embedding_loss in ("contrastive", "ranking", "cosine") and not (
            tasks[name].is_pair and pairs == "siamese"
        ):
            problems.append(f"{flag} compares two embeddings; it needs a pair task and --pair_encoding siamese")
        if own.embedding_loss == "simcse" and config.model.backbone_dropout_prob == 0.0:
            problems.append(f"{flag} needs two different dropout views; raise --backbone_dropout_prob above 0")
    return problems


def check_mlm(config: Config) -> list[str]:
    """What is wrong with --mlm."""
    if not config.train.mlm:
        return []
    problems = []
    if config.train.patience is not None:
        problems.append("--patience waits for a better score on dev, which --mlm does not read; drop one of the two")
    if config.train.cache_frozen:
        problems.append("--cache_frozen keeps what whole texts become, but --mlm masks them anew; drop one of the two")
    if config.train.cuda_graphs:
        problems.append("--cuda_graphs replays passes over whole texts, but --mlm masks them anew; drop one of the two")
    for name, own in config.tasks.items():
        given = {"smart": own.smart > 0.0, "bregman": own.bregman > 0.0, "embedding_loss": own.embedding_loss != "none"}
        problems += [
            f"--{name}_{flag} adds to the loss on labels, which --mlm does without; drop one of the two"
            for flag, there in given.items()
            if there
        ]
    return problems


def check_fsdp(config: Config) -> list[str]:
    """What is wrong with --fsdp."""
    if not config.run.fsdp:
        return []
    problems = []
    if config.train.average != "none":
        problems.append(
            f"--average {config.train.average} keeps a second set of weights, which --fsdp does not shard; drop one of "
            "the two"
        )
    if config.train.pcgrad:
        problems.append(
            "--pcgrad compares whole gradients, of which --fsdp leaves each process a part; drop one of the two"
        )
    problems += [
        f"--{name}_bregman keeps a second set of weights, which --fsdp does not shard; drop one of the two"
        for name, own in config.tasks.items()
        if own.bregman > 0.0
    ]
    return problems


def check_cache_frozen(config: Config) -> list[str]:
    """What is wrong with --cache_frozen."""
    if not config.train.cache_frozen:
        return []
    problems = []
    mode, lora = config.train.fine_tune_mode, config.lora
    if config.train.cuda_graphs:
        problems.append(
            "--cuda_graphs replays whole passes, of which --cache_frozen leaves out a part; drop one of them"
        )
    if mode == "full-model":
        problems.append(
            "--cache_frozen keeps what frozen layers put out, but --fine_tune_mode full-model freezes none; "
            "use last-layer or iterative, or drop --cache_frozen"
        )
    if mode == "last-layer" and (lora.lora_mode != "none" or lora.lora_dict or lora.init_peft):
        problems.append(
            "--cache_frozen keeps what frozen layers put out, but --fine_tune_mode last-layer trains the adapters "
            "(--lora_mode) in every layer; use --fine_tune_mode iterative or drop --cache_frozen"
        )
    if config.pal.pal != "none":
        problems.append(
            f"--cache_frozen keeps what frozen layers put out, but --pal {config.pal.pal} trains beside every layer; "
            "drop one of the two"
        )
    problems += [
        f"--{name}_embedding_loss {own.embedding_loss} looks at more than --cache_frozen keeps; drop one of the two"
        for name, own in config.tasks.items()
        if own.embedding_loss in ("simcse", "ranking")
    ]
    return problems


def check_pals(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """What is wrong with --pal and the flags that belong to it."""
    pal, known = config.pal, task_by_alias(tasks)
    given = changed(pal)
    if pal.pal == "none":
        return [f"--{given[0]} belongs to --pal; choose a kind with --pal or drop it"] if given else []
    without = {"low-rank": ("pal_size", "pal_heads"), "mixed": ()}.get(pal.pal, ("pal_low_rank_size",))
    problems = [f"--{name} has no effect on --pal {pal.pal}; drop one of the two" for name in without if name in given]
    if pal.pal != "low-rank" and pal.pal_size % pal.pal_heads:
        problems.append(
            f"--pal_size {pal.pal_size} is not a multiple of --pal_heads {pal.pal_heads}; "
            f"give --pal_size {pal.pal_heads * math.ceil(pal.pal_size / pal.pal_heads)} or other heads"
        )
    for name in pal.pal_tasks or ():
        if name not in known:
            problems.append(f"--pal_tasks {name} is none of {', '.join(known)}")
        elif known[name] not in config.tasks:
            problems.append(f"--pal_tasks {name} is not trained in this run; add --train_{name} or drop it")
    return problems


def check_processes(config: Config) -> None:
    """Raise UserError for what does not go with the processes that torchrun started, or with none of them.

    Apart from `build_config`, since a configuration may also be read of a run that others started elsewhere.
    """
    run, train = config.run, config.train
    if processes() == 1:
        if run.fsdp:
            raise UserError(
                "--fsdp shards the backbones over processes, and this is the only one; use torchrun or drop it"
            )
        return
    alone = [name for name in ("predict", "export", "export_peft") if getattr(run, name) is not None]
    problems = [f"--{name} works in one process; start it without torchrun" for name in alone + ["mlm"] * train.mlm]
    if train.cuda_graphs:
        problems.append("--cuda_graphs records the passes of one process; drop it or torchrun")
    if train.cache_frozen:
        problems.append("--cache_frozen keeps the examples in the memory of one process; drop it or torchrun")
    if problems:
        raise UserError("; ".join(problems))
