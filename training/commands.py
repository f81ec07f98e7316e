"""What the command line does in one or several processes: train a model, and --evaluate one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config
from datasets import TaskData, load_splits, tokenise
from evaluation.commands import trained_model
from evaluation.metrics import probabilities, score_table
from evaluation.prediction_files import copy_predictions, probe_requested_files, refuse_training_run, score_and_write
from lora import LoRAConfig
from models.build import build_model
from models.multitask_bert import MultitaskBERT
from tasks import TASKS
from text.tokenizer import Tokenizer
from training.cuda_graphs import check_device
from training.distributed import DistributedContext
from training.dry_run import checkpoint_bytes, describe
from training.inputs import InputFile, input_files
from training.run_directory import RunDirectory
from training.trainer import Trainer
from utils.console import say
from utils.device import Device, device_of
from utils.files import probe_file


@dataclass
class Inputs:
    """What a run trains with: examples by split and task, a model with its tokenizer, the device, and their files."""

    data: dict[str, dict[str, TaskData]]
    model: MultitaskBERT
    tokenizer: Tokenizer
    device: Device
    files: list[InputFile]


def load_inputs(config: Config, context: DistributedContext) -> Inputs:
    """Read the data and build the model that a configuration names. Raises UserError for what is wrong with them."""
    tasks = {name: TASKS[name] for name in config.tasks}
    # Mistakes are told before the data is read; but only the model knows what --init_peft asks for.
    if config.run.resume and config.lora.init_peft is None:
        RunDirectory(Path(str(config.run.run_dir)), context.is_main_process).check_resume(config)
    LoRAConfig.from_options(config.lora)
    init_peft = config.lora.init_peft  # which the options of its adapters will replace
    with context.main_process_first():
        splits = load_splits(config.data, config.tasks, tasks, ["train", *scored_splits(config)], say)
        device = device_of(config.compute, say)
        check_device(config, device)
        model, tokenizer = build_model(config, tasks, say)
        data = tokenise(splits, tokenizer, model.pair_encodings(), config.data.extra_clean, say)
    writes = context.is_main_process and not config.run.dry_run
    return Inputs(data, model, tokenizer, device, input_files(config, init_peft, model, tokenizer) if writes else [])


def scored_splits(config: Config) -> list[str]:
    """Return the splits that a trained model predicts: none after --mlm, and no test under --no_test_predictions."""
    if config.train.mlm:
        return []
    return ["dev", "test"] if config.run.test_predictions else ["dev"]


def make_trainer(config: Config, inputs: Inputs, context: DistributedContext) -> Trainer:
    """Make the run directory ready and return the trainer of the run."""
    run = prepare_run(config, inputs, context)
    say(f"{context.device_names(inputs.device.name)}; run directory {run.path}")
    train, dev = inputs.data["train"], inputs.data.get("dev", {})
    return Trainer.from_config(config, inputs.model, inputs.tokenizer, train, dev, inputs.device, run, context)


def prepare_run(config: Config, inputs: Inputs, context: DistributedContext) -> RunDirectory:
    """Return the run directory, which the main process has made ready to be written."""
    name = context.broadcast_object(config.run.name or RunDirectory.fresh_name(config.model.arch))
    run = RunDirectory.named(config.run.run_dir, name, context.is_main_process)
    if not context.is_main_process:
        config.run.tensorboard = False
        return run
    if config.run.filepath:
        probe_file(Path(config.run.filepath), "--filepath")
    probe_requested_files(config.tasks)
    run.prepare(config.run.overwrite, config.run.resume, checkpoint_bytes(inputs.model, config))
    run.begin(config, inputs.files)
    return run


def train(config: Config, context: DistributedContext) -> RunDirectory | None:
    """Train, then score and predict with the best checkpoint; return the run's folder, or None after --dry_run.

    After --mlm there is nothing to score.
    """
    inputs = load_inputs(config, context)
    if config.run.dry_run:
        say(describe(config, inputs.model, inputs.data, inputs.device, context.size))
        return None
    trainer = make_trainer(config, inputs, context)
    trainer.fit()
    run, best = trainer.checkpointer.run, trainer.checkpointer.load_best()
    about = {"epoch": best.get("epoch"), "checkpoint": run.best.name}
    if config.train.mlm:
        run.write_json("scores.json", {"dev": {}, **about})
    else:
        report(config, inputs.model, inputs.data, inputs.device, run, about, context)
    if context.is_main_process:
        run.drop_states()  # there is nothing left to continue
    what = "pre-trained, for --init_from:" if config.train.mlm else "best checkpoint"
    say(f"{what} {run.best}; curves: tensorboard --logdir {run.path.parent}")
    return run


def report(
    config: Config,
    model: MultitaskBERT,
    data: dict[str, dict[str, TaskData]],
    device: Device,
    run: RunDirectory,
    about: dict[str, Any],
    context: DistributedContext,
) -> None:
    """Score dev, predict dev and test, print the scores and write all of it into the run directory."""
    size = config.compute.eval_batch_size
    values = {
        (split, name): probabilities(model.tasks[name], context.predict(model, examples, device, size))
        for split in scored_splits(config)
        for name, examples in data[split].items()
    }
    if not context.is_main_process:
        return
    run.require()
    splits = {split: {name: part.examples for name, part in by_task.items()} for split, by_task in data.items()}
    scores = score_and_write(model.tasks, values, splits, run.path)
    copy_predictions(run.path, config.tasks)
    run.write_json("scores.json", {"dev": scores, **about})
    say("\n" + score_table(model.tasks, {"dev": scores}))
    say(f"predictions in {run.predictions}")


def evaluate(config: Config, context: DistributedContext) -> None:
    """Score dev and predict dev and test with the checkpoint that --evaluate names."""
    path = Path(str(config.run.evaluate))
    trained = trained_model(config, say)
    model, tokenizer = trained.model, trained.tokenizer
    run = RunDirectory(Path(config.run.run_dir) if config.run.run_dir else path.with_name(f"{path.stem}-evaluation"))
    options = {name: config.tasks[name] for name in model.tasks}
    splits = load_splits(config.data, options, model.tasks, scored_splits(config), say)
    refuse_training_run(run.path)
    probe_requested_files(options)
    data = tokenise(splits, tokenizer, model.pair_encodings(), trained.config.data.extra_clean, say)
    report(config, model, data, trained.device, run, {"checkpoint": str(path)}, context)
