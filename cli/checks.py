"""Which options exclude each other, and the remedy: each check returns one sentence for each problem."""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from config import (
    COSINE_HEADS,
    DRAWING_ROUTINES,
    EXPORTS,
    MAX_RATE,
    PAIR_FEATURES,
    SAVE_EVERY,
    Config,
    ModelOptions,
    TaskOptions,
    TrainOptions,
)
from tasks import Task, task_by_alias
from utils.console import processes
from utils.errors import UserError

# What can be done with a trained model, and the options that it reads beside those of the machine.
USES_OF_A_MODEL: dict[str, tuple[str, ...]] = {
    "predict": ("pretrained",),
    **{name: (*EXPORTS, "pretrained") for name in EXPORTS},
    "evaluate": (
        *("pretrained", "data_dir", "max_bad_rows", "quoting", "run_dir", "test_predictions"),
        *("dev", "test", "columns", "dev_out", "test_out"),
    ),
}
# The options of a single embedding loss.
EMBEDDING_LOSS_OPTIONS = {
    "ranking_scale": "ranking",
    "contrastive_margin": "contrastive",
    "simcse_temperature": "simcse",
}


def check(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """Return what is wrong with a combination of options. `config.model` must not be resolved yet."""
    return [
        *check_model(config.model),
        *check_pair_encoding(config, tasks),
        *check_task_heads(config, tasks),
        *check_adapters(config),
        *check_run(config, tasks),
        *check_prediction_files(config),
        *check_training(config),
        *check_embedding_losses(config, tasks),
        *check_cache_frozen(config),
        *check_pals(config, tasks),
        *check_mlm(config),
        *check_tasks(config),
    ]


def changed(options: Any) -> list[str]:
    """Return the names of the options that differ from their defaults."""
    return [spec.name for spec in fields(options) if getattr(options, spec.name) != spec.default]


def check_model(given: ModelOptions) -> list[str]:
    """Return what is wrong with the options of the model."""
    model = given.resolved()
    problems = check_head(given, model, "--")
    if given.shared_batchnorm_stats and model.pair_layer != "batchnorm":
        problems.append("--shared_batchnorm_stats needs --pair_layer batchnorm; add that or drop it")
    if model.clf == "conv":
        problems += check_convolution(model, "--clf")
    return problems


def check_head(given: ModelOptions | TaskOptions, model: ModelOptions, prefix: str) -> list[str]:
    """Return which options `given` have no use in a head of `model`, which is resolved. Flags begin with `prefix`."""
    problems = []
    if given.head_layers is not None and model.clf not in ("conv", "mlp"):
        problems.append(
            f"{prefix}head_layers works with {prefix}clf conv and mlp, not {model.clf}; drop one of the two"
        )
    hidden_layers = {"linear": 0, "nonlinear": 1}.get(str(model.clf), model.head_layers)
    if given.head_width is not None and not hidden_layers:
        problems.append(
            f"{prefix}head_width sets hidden layers, but this head has none; see {prefix}clf and {prefix}head_layers"
        )
    if given.output_dropout_prob is not None and not (model.clf == "mlp" and model.head_layers):
        problems.append(
            f"{prefix}output_dropout_prob needs {prefix}clf mlp with {prefix}head_layers 1 or more; drop one of them"
        )
    if given.head_batchnorm and model.clf not in ("nonlinear", "conv"):
        problems.append(
            f"{prefix}head_batchnorm works with {prefix}clf nonlinear and conv, not {model.clf}; drop one of the two"
        )
    return problems


def check_convolution(model: ModelOptions, flag: str) -> list[str]:
    """Return what is wrong with a convolution, which `flag` asks for, over the features of a pair."""
    if model.pair_layer != "none" or set(model.pair_features or ()) != {"cos"}:
        return []
    return [
        f"{flag} conv looks at three neighbouring features, but --pair_features cos is only one; "
        f"add others or choose another {flag}"
    ]


def check_task_heads(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """Return what is wrong with the options that a task has instead of those of the model."""
    problems = []
    for name, options in config.tasks.items():
        model = config.model_of(name).resolved()
        compared = tasks[name].is_siamese(model.pair_encoding)
        if compared and tasks[name].kind == "similarity" and model.sts_head == "cosine":
            problems += [
                f"--{name}_{unused} shapes a regression head, but the similarity of {name} is a cosine; drop it or "
                "choose --sts_head regression"
                for unused in ("clf", "head_width", "head_batchnorm", "output_dropout_prob")
                if getattr(options, unused) is not None
            ]
            continue
        problems += check_head(options, model, f"--{name}_")
        if options.clf == "conv" and tasks[name].is_pair:
            problems += check_convolution(model, f"--{name}_clf")
    return problems


def check_pair_encoding(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """Return what of the options does not suit the pair encoding of the pair tasks."""
    given, model = config.model, config.model.resolved()
    of_task = {name: config.model_of(name).resolved().pair_encoding for name in config.tasks if tasks[name].is_pair}
    of_similarities = {of_task[name] for name in of_task if tasks[name].kind == "similarity"}
    encodings = set(of_task.values()) or {model.pair_encoding}
    problems = [
        f"--{name}_pair_encoding joins or compares two texts, but an example of {name} has only one; drop it"
        for name, options in config.tasks.items()
        if options.pair_encoding is not None and not tasks[name].is_pair
    ]
    if len(encodings) > 1 and model.pair_layer != "none":
        problems.append(
            f"--pair_layer {model.pair_layer} takes the features of all pair tasks, which then need one "
            "--pair_encoding; use that for all, or --pair_layer none"
        )
    if "siamese" not in encodings:
        problems += [
            f"--{name} works on two embeddings, but --pair_encoding cross makes one; drop one of the two"
            for name in ("pair_features", "sts_projection")
            if getattr(given, name)
        ]
    if given.sts_head in COSINE_HEADS and of_similarities and "siamese" not in of_similarities:
        problems.append(
            f"--sts_head {given.sts_head} compares two embeddings, but --pair_encoding cross makes one; "
            "use --sts_head regression or --pair_encoding siamese"
        )
    if "siamese" in encodings and not model.pair_features:
        problems.append(
            "--pair_encoding siamese needs --pair_features, which this arch does not set; "
            f"name some of {','.join(PAIR_FEATURES)}"
        )
    if "siamese" in encodings and given.sts_projection and model.sts_head != "cosine":
        problems.append("--sts_projection needs --sts_head cosine; add that or drop it")
    return problems


def check_adapters(config: Config) -> list[str]:
    """Return what is wrong with the options of LoRA and DoRA."""
    problems, lora = [], config.lora
    adapters = changed(lora)
    for whole in ("lora_dict", "init_peft"):
        others = ", ".join(f"--{name}" for name in adapters if name != whole)
        if whole in adapters and others:
            problems.append(f"--{whole} sets all that {others} sets; give one or the other")
    if adapters and not {"lora_mode", "lora_dict", "init_peft"} & set(adapters):
        problems.append(f"--{adapters[0]} needs adapters; choose them with --lora_mode")
    if config.train.init_from is not None and lora.init_peft is not None:
        problems.append("--init_peft starts from adapters of the base weights, which --init_from replaces; drop one")
    if lora.dora_norm != "row" and not lora.dora and lora.lora_dict is None:
        problems.append("--dora_norm needs --dora; add that or drop it")
    return problems


def check_run(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """Return what is wrong with the files of the run, or with what is to be done with a trained model."""
    problems, run = [], config.run
    for name in ("predict", *EXPORTS):
        if getattr(run, name) is not None and run.evaluate is None:
            problems.append(f"--{name} needs a trained model; name its checkpoint with --evaluate")
    if run.benchmark is not None and run.profile:
        problems.append("--profile slows the steps that --benchmark measures; give one of the two")
    if run.benchmark is not None and config.train.cuda_graphs:
        problems.append("--cuda_graphs hides memory from the figures of --benchmark; give one of the two")
    if run.predict is not None and run.task is None:
        problems.append(f"--predict needs --task, one of {', '.join(tasks)}")
    known = task_by_alias(tasks)
    if run.task is not None and run.predict is None and run.export_onnx is None:
        problems.append("--task needs --predict or --export_onnx; add that or drop it")
    exported = run.export_task[0] if run.export_task is not None else None
    for flag, task in (("task", run.task), ("export_task", exported)):
        if task is not None and task not in known:
            problems.append(f"--{flag} {task} is unknown; choose from {', '.join(known)}")
    if run.overwrite and run.resume:
        problems.append("--overwrite starts again and --resume continues; give one of the two")
    if run.resume and run.run_dir is None:
        problems.append("--resume needs --run_dir, the folder of the unfinished run")
    if run.name is not None and run.run_dir is not None:
        problems.append("--name names a folder in runs, but --run_dir gives the whole path; give one of the two")
    if not re.fullmatch(SAVE_EVERY, run.save_every):
        problems.append(f"--save_every {run.save_every}: give steps, such as 500, or minutes, such as 30m")
    return problems


def check_prediction_files(config: Config) -> list[str]:
    """Return which of the files for predictions would stay empty."""
    no_test = "mlm" if config.train.mlm else None if config.run.test_predictions else "no_test_predictions"
    reasons = {"dev": "mlm" if config.train.mlm else None, "test": no_test}
    return [
        f"--{name}_{split}_out: with --{reason} there are no predictions for {split}; drop one of the two"
        for name, options in config.tasks.items()
        for split, reason in reasons.items()
        if reason is not None and getattr(options, f"{split}_out") is not None
    ]


def check_training(config: Config) -> list[str]:
    """Return what is wrong with how the run trains."""
    problems, train = [], config.train
    if train.cuda_graphs and train.micro_batch_size is not None:
        problems.append("--cuda_graphs replays whole batches, but --micro_batch_size cuts them; drop one of the two")
    problems += check_requirements(train)
    several = [f"--num_{name}_trains {task.num_trains}" for name, task in config.tasks.items() if task.num_trains > 1]
    if several and train.routine in DRAWING_ROUTINES:
        problems.append(
            f"{several[0]} works with --routine sequential, interleave and joint, not {train.routine}; drop one"
        )
    if several and train.routine == "joint" and train.steps_per_epoch is not None:
        problems.append(f"--steps_per_epoch ends an epoch, whatever {several[0]} says; drop one of the two")
    problems += check_optimizers(config)
    if train.pcgrad and train.routine != "joint":
        problems.append(f"--pcgrad needs the gradients of all tasks at once, but --routine {train.routine}; use joint")
    smart = [name for name, options in config.tasks.items() if options.smart > 0.0]
    for name in changed(train):
        if name.startswith("smart_") and not smart:
            problems.append(f"--{name} needs SMART; choose tasks for it with --NAME_smart, such as --sst_smart 1")
    ascent = [name for name in changed(train) if name in ("smart_epsilon", "smart_eta")]
    if train.smart_steps == 0 and ascent:
        problems.append(f"--{ascent[0]} bounds ascent steps, but --smart_steps 0 makes none; drop one of the two")
    if train.smart_steps == 0 and train.smart_sigma == 0.0:
        problems.append("--smart_steps 0 and --smart_sigma 0 perturb nothing; raise one of the two")
    if smart and train.cache_frozen:
        problems.append(f"--{smart[0]}_smart perturbs the embeddings, which --cache_frozen skips; drop one of them")
    if train.cuda_graphs and not (config.compute.use_gpu and config.compute.amp):
        problems.append("--cuda_graphs needs --use_gpu and --amp; add them or drop it")
    return problems


def check_optimizers(config: Config) -> list[str]:
    """Return what is wrong with --optimizers. The groups of a joint step's optimizer take means of rates and decays."""
    routine, optimizers = config.train.routine, config.train.optimizers
    if routine == "joint" and optimizers == "per-task":
        return ["--optimizers per-task: a step of --routine joint moves all tasks at once; drop one of the two"]
    if routine == "joint" or optimizers != "one":
        return []
    problems = []
    for name, what in (("lr_multiplier", "rate"), ("weight_decay", "decay")):
        values = {task: getattr(options, name) for task, options in config.tasks.items() if options.num_trains}
        if len(set(values.values())) > 1:
            given = " ".join(f"--{task}_{name} {value:g}" for task, value in values.items())
            problems.append(f"--optimizers one has one {what}, but there are {given}; give these one value")
    return problems


def check_tasks(config: Config) -> list[str]:
    """Return what is wrong with when tasks train and are averaged, and with the weights of their losses."""
    problems, train = [], config.train
    if train.average == "swa" and train.swa_from_epoch > train.epochs:
        problems.append(f"--swa_from_epoch {train.swa_from_epoch} is past --epochs {train.epochs}; lower it")
    for name, options in config.tasks.items():
        if options.smart_divergence is not None and not max(options.smart, options.bregman, options.rdrop):
            problems.append(
                f"--{name}_smart_divergence needs --{name}_smart, --{name}_bregman or --{name}_rdrop; "
                "add one or drop it"
            )
        if options.from_epoch > train.epochs:
            problems.append(f"--{name}_from_epoch {options.from_epoch} is past --epochs {train.epochs}; lower it")
        if train.scaled_lr() * options.lr_multiplier > MAX_RATE:
            problems.append(
                f"--lr {train.lr:g} times --{name}_lr_multiplier {options.lr_multiplier:g} is too large; lower one"
            )
    if all(options.num_trains == 0 for options in config.tasks.values()):
        problems.append("every --num_NAME_trains is 0, so no task trains; set one to 1 or more")
    elif min(options.from_epoch for options in config.tasks.values() if options.num_trains) > 1:
        problems.append("no task trains in epoch 1; set one --NAME_from_epoch to 1")
    if not train.mlm and not any(has_loss(options) for options in config.tasks.values()):
        problems.append("every --NAME_weight is 0 and no other loss is chosen, so nothing would be learned; raise one")
    return problems


def has_loss(options: TaskOptions) -> bool:
    """Return whether a task has a loss with a weight above 0."""
    return max(options.weight, options.smart, options.bregman, options.rdrop) > 0.0 or options.embedding_loss != "none"


def check_requirements(options: TrainOptions) -> list[str]:
    """Return which options have no effect, since another option has not the value that they require."""
    problems = []
    for name in changed(options):
        required, values = options.__dataclass_fields__[name].metadata.get("requires", (None, ()))
        if required is not None and (chosen := getattr(options, required)) not in values:
            problems.append(
                f"--{name} requires --{required} {' or '.join(values)}, not {chosen}; drop one of the two, or give "
                f"--{name} its default"
            )
    return problems


def check_evaluate(given: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the flags beside --evaluate; `given` is what `build_config` takes."""
    if "run.evaluate" not in given:
        return []
    use = next(name for name in USES_OF_A_MODEL if f"run.{name}" in given)
    known = {"evaluate", "task", use, *USES_OF_A_MODEL[use]}
    idle = [key for key in given if not key.startswith("compute.") and key.rpartition(".")[2] not in known]
    if not idle:
        return []
    flags = ", ".join(map(flag_of, idle))
    return [f"--{use} takes a trained model as it is, so {flags} would change nothing; leave that out"]


def flag_of(key: str) -> str:
    """Return the flag of an option, given as "group.option" or "tasks.NAME.option"."""
    _, *task, name = key.split(".")
    return "--" + (TaskOptions.__dataclass_fields__[name].metadata["template"].format(task=task[0]) if task else name)


def check_embedding_losses(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """Return what is wrong with --NAME_embedding_loss and the numbers in losses."""
    used = {options.embedding_loss for options in config.tasks.values()}
    problems = [
        f"--{name} needs a task with --NAME_embedding_loss {loss}; add that or drop it"
        for name, loss in EMBEDDING_LOSS_OPTIONS.items()
        if name in changed(config.train) and loss not in used
    ]
    for name, options in config.tasks.items():
        if options.mixed_weight is not None and options.loss != "mixed":
            problems.append(f"--{name}_mixed_weight needs --{name}_loss mixed, not {options.loss}; add that or drop it")
        flag = f"--{name}_embedding_loss {options.embedding_loss}"
        two_embeddings = tasks[name].is_siamese(config.model_of(name).resolved().pair_encoding)
        if options.embedding_loss == "none" and options.embedding_weight != 1.0:
            problems.append(f"--{name}_embedding_weight needs --{name}_embedding_loss; add that or drop it")
        if options.embedding_loss in ("contrastive", "ranking", "cosine") and not two_embeddings:
            problems.append(f"{flag} compares two embeddings; it needs a pair task and --pair_encoding siamese")
        two_views = [flag] if options.embedding_loss == "simcse" else []
        if options.rdrop > 0.0:
            two_views.append(f"--{name}_rdrop {options.rdrop:g}")
        if config.model.backbone_dropout_prob == 0.0:
            reason = "needs two different dropout views; raise --backbone_dropout_prob above 0"
            problems += [f"{flags} {reason}" for flags in two_views]
    return problems


def check_mlm(config: Config) -> list[str]:
    """Return what is wrong with the options beside --mlm."""
    if not config.train.mlm:
        return []
    problems = []
    if config.train.patience is not None:
        problems.append("--patience waits for a better score on dev, which --mlm does not read; drop one of the two")
    if config.train.cache_frozen:
        problems.append("--cache_frozen keeps features of whole texts, but --mlm masks them anew; drop one")
    if config.train.cuda_graphs:
        problems.append("--cuda_graphs replays passes over whole texts, but --mlm masks them anew; drop one of the two")
    for name, options in config.tasks.items():
        losses = {loss: getattr(options, loss) for loss in ("smart", "bregman", "rdrop", "embedding_loss")}
        problems += [
            f"--{name}_{flag} adds to the loss on labels, which --mlm does not use; drop one of the two"
            for flag, value in losses.items()
            if value not in (0.0, "none")
        ]
    return problems


def check_cache_frozen(config: Config) -> list[str]:
    """Return what is wrong with the options beside --cache_frozen."""
    if not config.train.cache_frozen:
        return []
    problems = []
    mode, lora = config.train.fine_tune_mode, config.lora
    if config.train.cuda_graphs:
        problems.append("--cuda_graphs replays whole passes, but --cache_frozen skips a part; drop one")
    if mode == "full-model":
        problems.append(
            "--cache_frozen keeps the output of frozen layers, but --fine_tune_mode full-model freezes none; "
            "use last-layer or iterative, or drop --cache_frozen"
        )
    if mode == "last-layer" and (lora.lora_mode != "none" or lora.lora_dict or lora.init_peft):
        problems.append(
            "--cache_frozen keeps the output of frozen layers, but --fine_tune_mode last-layer trains the adapters "
            "(--lora_mode) in every layer; use --fine_tune_mode iterative or drop --cache_frozen"
        )
    if config.pal.pal != "none":
        problems.append(
            f"--cache_frozen keeps outputs of frozen layers, but --pal {config.pal.pal} trains in every layer; drop one"
        )
    problems += [
        f"--{name}_embedding_loss {options.embedding_loss} needs more than --cache_frozen keeps; drop one of the two"
        for name, options in config.tasks.items()
        if options.embedding_loss in ("simcse", "ranking")
    ]
    return problems


def check_pals(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """Return what is wrong with --pal and the flags that need it."""
    pal, known = config.pal, task_by_alias(tasks)
    given = changed(pal)
    if pal.pal == "none":
        return [f"--{given[0]} needs --pal; choose a kind with --pal or drop it"] if given else []
    unused = {"low-rank": ("pal_size", "pal_heads"), "mixed": ()}.get(pal.pal, ("pal_low_rank_size",))
    problems = [f"--{name} has no effect with --pal {pal.pal}; drop one of the two" for name in unused if name in given]
    if pal.pal != "low-rank" and pal.pal_size % pal.pal_heads:
        problems.append(
            f"--pal_size {pal.pal_size} is not a multiple of --pal_heads {pal.pal_heads}; "
            f"give --pal_size {pal.pal_heads * math.ceil(pal.pal_size / pal.pal_heads)} or other heads"
        )
    for name in pal.pal_tasks or ():
        if name not in known:
            problems.append(f"--pal_tasks {name} is unknown; choose from {', '.join(known)}")
        elif known[name] not in config.tasks:
            problems.append(f"--pal_tasks {name} is not trained in this run; add --train_{name} or drop it")
    return problems


def check_processes(config: Config) -> None:
    """Raise UserError if the options do not suit the number of processes that torchrun started.

    `build_config` does not call this, since it also reads configurations of runs that were started elsewhere.
    """
    run, train = config.run, config.train
    if processes() == 1:
        return
    alone = [name for name in ("predict", *EXPORTS) if getattr(run, name) is not None]
    problems = [f"--{name} works in one process; start it without torchrun" for name in alone + ["mlm"] * train.mlm]
    if train.cuda_graphs:
        problems.append("--cuda_graphs records the passes of one process; drop it or torchrun")
    if train.cache_frozen:
        problems.append("--cache_frozen keeps the examples in the memory of one process; drop it or torchrun")
    if problems:
        raise UserError("; ".join(problems))
