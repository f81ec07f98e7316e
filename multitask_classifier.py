"""Train and test a multitask minBERT on sentiment, paraphrases and similarity.

python multitask_classifier.py --data_dir data/sample --pretrained all-MiniLM-L6-v2
python multitask_classifier.py @recipes/g6-yin-yang.args --use_gpu
torchrun --nproc_per_node=8 multitask_classifier.py --use_gpu --amp
python multitask_classifier.py --evaluate best.pt --data_dir data
echo "a fine film" | python multitask_classifier.py --evaluate best.pt --predict - --task sst
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.parser import expand_arguments, parse
from config import Config, ModelOptions
from tasks import TASKS, Task, task_by_alias
from utils.console import run_script, said_once, say
from utils.errors import UserError

# torch takes seconds to import: everything that needs it is imported once the command line is known to be right.
if TYPE_CHECKING:
    from datasets import TaskData
    from models.multitask_bert import MultitaskBERT
    from text.tokenizer import Tokenizer
    from training.distributed import World
    from training.run_directory import RunDirectory
    from utils.device import Device


SCRIPT = "multitask_classifier.py"


def build_model(config: Config, tasks: dict[str, Task]) -> "tuple[MultitaskBERT, Tokenizer]":
    """A model with pretrained backbones and fresh heads, and the tokenizer that belongs to it."""
    import torch

    from base_bert import load_weights, read_config, resolve_pretrained
    from lora import LoRAConfig
    from models.checkpoint import init_from_checkpoint
    from models.multitask_bert import MultitaskBERT
    from models.peft_exchange import import_peft
    from text.tokenizer import load_tokenizer

    folder = resolve_pretrained(config.model.pretrained)
    dropout = config.model.backbone_dropout_prob
    bert_config = replace(read_config(folder), hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    if config.data.max_length > bert_config.max_position_embeddings:
        raise UserError(
            f"--max_length {config.data.max_length}: {config.model.pretrained} has only "
            f"{bert_config.max_position_embeddings} positions; give at most that"
        )
    torch.manual_seed(config.train.seed)
    weights = load_weights(folder, bert_config)  # first: config.json may ask for a model of any size
    model = MultitaskBERT(config.model, bert_config, tasks)
    model.load_backbones(weights)
    tokenizer = load_tokenizer(folder, config.data.max_length)
    if config.lora.init_peft is not None:
        source = config.lora.init_peft
        lora, adapters = import_peft(Path(source))
        config.lora = lora.to_options()  # so that the checkpoint does not need that folder
        model.start_from_adapters(lora, adapters, f"--init_peft {source}")
    elif (chosen := LoRAConfig.from_options(config.lora)) is not None:
        model.add_adapters(chosen)
    model.add_pals(config.pal)
    if config.train.mlm:
        model.add_mlm_heads()
        if not model.load_mlm_heads(folder):
            say(f"--mlm: {config.model.pretrained} has no head of masked words; a new one is trained")
    if config.train.init_from is not None:
        init_from_checkpoint(model, tokenizer, Path(config.train.init_from), say)
    if tokenizer.vocab_size > bert_config.vocab_size:
        raise UserError(
            f"--pretrained {config.model.pretrained}: its tokenizer has {tokenizer.vocab_size} words but its weights "
            f"only {bert_config.vocab_size}; take both from one model"
        )
    return model, tokenizer


def scored_splits(config: Config) -> list[str]:
    """The splits that a trained model predicts: none after --mlm, and no test under --no_test_predictions."""
    if config.train.mlm:
        return []
    return ["dev", "test"] if config.run.test_predictions else ["dev"]


def train(config: Config, command: str, world: "World") -> None:
    """Train, then score and predict with the best checkpoint; --mlm has nothing to score.

    `command` is for the row of --benchmark.
    """
    from datasets import load_splits, tokenise
    from lora import LoRAConfig
    from models.checkpoint import git_commit, load
    from studies.results import BENCHMARK_COLUMNS, Table, benchmark_row
    from training.cuda_graphs import check_device
    from training.dry_run import describe
    from training.pretraining import Pretrainer
    from training.run_directory import RunDirectory
    from training.trainer import Trainer
    from utils.device import choose_device
    from utils.files import probe_file

    tasks = {name: TASKS[name] for name in config.tasks}
    # What is wrong is told before the data is read; but what --init_peft asks for is known when the model is made.
    if config.run.resume and config.lora.init_peft is None:
        RunDirectory(Path(str(config.run.run_dir))).check_resume(config)
    LoRAConfig.from_options(config.lora)
    with world.one_first():
        splits = load_splits(config.data, config.tasks, tasks, ["train", *scored_splits(config)], say)
        device = choose_device(config.compute.use_gpu, config.compute.amp, config.compute.threads, say)
        check_device(config, device)
        model, tokenizer = build_model(config, tasks)
        data = tokenise(splits, tokenizer, str(config.model.pair_encoding), config.data.extra_clean, say)
    if config.run.dry_run:
        say(describe(config, model, data, device, world.size))
        return
    table = Table(Path(config.run.benchmark), BENCHMARK_COLUMNS) if config.run.benchmark and world.leads else None
    if table is not None:
        probe_file(table.path, "--benchmark")
        table.rows()  # what is wrong with it is told before training
    run = prepare_run(config, model, world)
    say(f"{world.named(device.name)}; run directory {run.path}")
    kind = Pretrainer if config.train.mlm else Trainer
    kind(config, model, tokenizer, data["train"], data.get("dev", {}), device, run, say, world).fit()
    best = load(run.best) if world.leads else {}
    about = {"epoch": best["epoch"], "checkpoint": run.best.name} if world.leads else {}
    world.load(model, best.get("weights", {}), run.best, model.frozen_parameter_names(config.train.fine_tune_mode))
    if config.train.mlm:
        run.write_json("scores.json", {"dev": {}, **about})
    else:
        report(model, data, device, config, run, about, world)
    if world.leads:
        run.drop_states()  # there is nothing left to go on with
    if table is not None:
        table.add([benchmark_row(run.path, config, git_commit(), command)])
    what = "pre-trained, for --init_from:" if config.train.mlm else "best checkpoint"
    say(f"{what} {run.best}; curves: tensorboard --logdir {run.path.parent}")


def prepare_run(config: Config, model: "MultitaskBERT", world: "World") -> "RunDirectory":
    """The run directory, ready to be written by the process that leads."""
    from training.distributed import Unwritten
    from training.dry_run import checkpoint_bytes
    from training.run_directory import RunDirectory
    from utils.files import probe_file

    kind = RunDirectory if world.leads else Unwritten
    run = kind.named(config.run.run_dir, world.agreed(config.run.name or RunDirectory.fresh_name(config.model.arch)))
    if not world.leads:
        config.run.tensorboard = False
        return run
    if config.run.filepath:
        probe_file(Path(config.run.filepath), "--filepath")
    run.prepare(config.run.overwrite, config.run.resume, checkpoint_bytes(model, config))
    run.begin(config)
    return run


def report(
    model: "MultitaskBERT",
    data: "dict[str, dict[str, TaskData]]",
    device: "Device",
    config: Config,
    run: "RunDirectory",
    about: dict[str, Any],
    world: "World",
) -> None:
    """Score dev, predict dev and test, print the scores and write all of it into the run directory."""
    from evaluation.metrics import probabilities, score_table
    from evaluation.prediction_files import score_and_write

    values = {
        (split, name): probabilities(
            model.tasks[name], world.predict(model, own, device, config.compute.eval_batch_size)
        )
        for split in scored_splits(config)
        for name, own in data[split].items()
    }
    if not world.leads:
        return
    splits = {split: {name: own.examples for name, own in by_task.items()} for split, by_task in data.items()}
    scores = score_and_write(model.tasks, values, splits, run.path)
    run.write_json("scores.json", {"dev": scores, **about})
    say("\n" + score_table(model.tasks, {"dev": scores}))
    say(f"predictions in {run.predictions}")


def trained_model(config: Config) -> "tuple[MultitaskBERT, Tokenizer, Config]":
    """The checkpoint that --evaluate names, as `load_model` returns it. Raises UserError for one of --mlm."""
    from models.checkpoint import load, load_model, trained_tasks

    path = Path(str(config.run.evaluate))
    content = load(path)
    trained_tasks(content, path)
    return load_model(path, content, base_of(config))


def base_of(config: Config) -> str | None:
    """Where --pretrained says that the base weights of a checkpoint with adapters are now."""
    return None if config.model.pretrained == ModelOptions.pretrained else config.model.pretrained


def evaluate(config: Config, world: "World") -> None:
    """--evaluate: score dev and predict dev and test with a checkpoint."""
    from datasets import load_splits, tokenise
    from evaluation.prediction_files import refuse_training_run
    from training.run_directory import RunDirectory
    from utils.device import choose_device

    path = Path(str(config.run.evaluate))
    device = choose_device(config.compute.use_gpu, config.compute.amp, config.compute.threads, say)
    model, tokenizer, saved = trained_model(config)
    run = RunDirectory(Path(config.run.run_dir) if config.run.run_dir else path.with_name(f"{path.stem}-evaluation"))
    options = {name: config.tasks[name] for name in model.tasks}
    splits = load_splits(config.data, options, model.tasks, scored_splits(config), say)
    refuse_training_run(run.path)
    model.to(device.device)
    data = tokenise(splits, tokenizer, str(model.options.pair_encoding), saved.data.extra_clean, say)
    report(model, data, device, config, run, {"checkpoint": str(path)}, world)


def export(config: Config) -> None:
    """--export: write each backbone of a checkpoint in the Hugging Face layout, in a folder named after it.

    With --export_peft, write its adapters as peft reads them.
    """
    from base_bert import save_pretrained
    from lora import merged_state_dict
    from models.checkpoint import load_model
    from models.peft_exchange import export_peft
    from utils.files import probe_folder

    model, tokenizer, saved = load_model(Path(str(config.run.evaluate)), base=base_of(config))
    if model.pals:
        flag = "--export" if config.run.export is not None else "--export_peft"
        raise UserError(
            f"{flag}: {config.run.evaluate} has --pal {saved.pal.pal} beside its backbones, for which transformers and "
            "peft have no place; export a model without --pal"
        )
    if config.run.export_peft is not None:
        only = model.lora is not None and (model.lora.freezes_rest or saved.train.fine_tune_mode == "last-layer")
        if not only:
            raise UserError(
                f"--export_peft: in {config.run.evaluate} more of the backbone trained than adapters; "
                "--export writes the whole backbones, adapters merged"
            )
    for flag in ("export", "export_peft"):
        if (out := getattr(config.run, flag)) is not None:
            probe_folder(Path(out), f"--{flag}")
    for name, backbone in model.backbones.items():
        if config.run.export is not None:
            folder = Path(config.run.export) / name
            save_pretrained(folder, model.bert_config, merged_state_dict(backbone), tokenizer)
            say(f"backbone {name} in {folder}")
        if config.run.export_peft is not None and model.lora is not None:
            folder = Path(config.run.export_peft) / name
            export_peft(backbone, model.lora, folder, saved.model.pretrained)
            say(f"adapters of backbone {name} in {folder}")


def label_sentences(config: Config) -> None:
    """--predict: label and probability for each line; the two texts of a pair are separated by a tab."""
    from datasets import Examples, tokenise
    from evaluation.metrics import decide, probabilities
    from evaluation.predict import predict
    from utils.device import choose_device

    model, tokenizer, saved = trained_model(config)
    task = TASKS[task_by_alias(TASKS)[str(config.run.task)]]
    if task.name not in model.tasks:
        raise UserError(
            f"--task {config.run.task}: {config.run.evaluate} was not trained on it; "
            f"choose from {', '.join(model.tasks)}"
        )
    device = choose_device(config.compute.use_gpu, config.compute.amp, config.compute.threads, say)
    model.to(device.device)
    texts = read_lines(str(config.run.predict), task)
    ids = [str(i) for i in range(len(texts))]
    columns = tuple([row[i] for row in texts] for i in range(len(task.text_columns)))
    examples = Examples(task, "predict", Path(str(config.run.predict)), ids, columns, None)
    warn = partial(print, file=sys.stderr)  # not among the labels, which people pipe on
    splits, pair_encoding = {"predict": {task.name: examples}}, str(model.options.pair_encoding)
    data = tokenise(splits, tokenizer, pair_encoding, saved.data.extra_clean, warn)["predict"][task.name]
    values = probabilities(task, predict(model, data, device.device, config.compute.eval_batch_size, device.amp))
    labels = decide(task, values)
    for row, value, label in zip(texts, values, labels, strict=True):
        if task.kind == "similarity":
            say("\t".join([f"{label:.3f}", *row]))
            continue
        probability = value.max() if task.kind == "classes" else max(value, 1 - value)
        name = task.label_names[label] if task.label_names else str(label)
        say("\t".join([str(label), name, f"{probability:.3f}", *row]))


def read_lines(name: str, task: Task) -> list[list[str]]:
    """The texts of a file, or of standard input for "-", one example per line."""
    try:
        # Bytes: what Python makes of standard input depends on the locale.
        content = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"--predict {name}: cannot be read ({error}); give a text file in UTF-8") from error
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    lines = [[text.strip() for text in line.split("\t")] for line in content.split("\n")]
    rows = {number: row for number, row in enumerate(lines, start=1) if any(row)}
    wanted = len(task.text_columns)
    for number, row in rows.items():
        if len(row) != wanted or not all(row):
            raise UserError(
                f"--predict {name}, line {number}: {task.title} needs {wanted} text{'s' * (wanted > 1)} per line"
                + (" with a tab between them" if wanted > 1 else "")
            )
    if not rows:
        raise UserError(f"--predict {name}: holds no sentence; give one per line")
    return list(rows.values())


def main(argv: Sequence[str]) -> None:
    """Do what the command line asks."""
    with said_once():
        config = parse(argv, TASKS, SCRIPT, str(__doc__).split("\n\n")[0])
    if config.run.predict is not None:
        label_sentences(config)
    elif config.run.export is not None or config.run.export_peft is not None:
        export(config)
    else:
        from training.distributed import Ranks, joined

        kind = Ranks
        if config.run.fsdp:  # whose import takes a second
            from training.sharding import Shards as kind

        with joined(config.compute, kind) as world:
            if config.run.evaluate is not None:
                evaluate(config, world)
            else:
                train(config, shlex.join(["python", SCRIPT, *expand_arguments(argv)]), world)


if __name__ == "__main__":
    run_script(main)
