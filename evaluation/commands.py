"""Do --predict, --export and --export_peft: what the command line does with a trained model in one process."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from base_bert import full_name, save_pretrained
from config import Config, ModelOptions
from evaluation.trained import TrainedModel, embedding_task, load_trained
from lora import merged_state_dict
from models.checkpoint import load_model
from models.peft_exchange import export_peft
from models.sentence_transformers import export_sentence_transformers
from tasks import Task
from utils.console import say
from utils.device import device_of
from utils.errors import UserError
from utils.files import probe_folder


def trained_model(config: Config, say: Callable[[str], None]) -> TrainedModel:
    """Return the model of --evaluate's checkpoint on the device that the options ask for.

    `say` tells what the device lacks. Raises UserError if the file is no checkpoint, or if --mlm has made it.
    """
    compute = config.compute
    device = device_of(compute, say)
    return load_trained(Path(str(config.run.evaluate)), device, compute.eval_batch_size, base_of(config))


def base_of(config: Config) -> str | None:
    """Return --pretrained if it was given: the new place of the base weights of a checkpoint with adapters."""
    return None if config.model.pretrained == ModelOptions.pretrained else config.model.pretrained


def export(config: Config) -> None:
    """Write each backbone of a checkpoint into a folder with its name, for --export and --export_peft.

    --export writes the layouts of transformers and sentence-transformers, and --export_peft the adapters as peft reads
    them. Raises UserError for a model that these layouts cannot hold.
    """
    model, tokenizer, saved = load_model(Path(str(config.run.evaluate)), base=base_of(config))
    if model.pals:
        flag = "--export" if config.run.export is not None else "--export_peft"
        raise UserError(
            f"{flag}: {config.run.evaluate} has --pal {saved.pal.pal} beside its backbones, for which transformers and "
            "peft have no place; export a model without --pal"
        )
    if config.run.export_peft is not None:
        frozen = model.lora is not None and (model.lora.freezes_rest or saved.train.fine_tune_mode == "last-layer")
        if not frozen:
            raise UserError(
                f"--export_peft: in {config.run.evaluate} more of the backbone trained than adapters; "
                "--export writes the whole backbones with merged adapters"
            )
        if saved.train.init_from is not None:
            raise UserError(
                f"--export_peft: the adapters of {config.run.evaluate} are on weights that --init_from gave, which no "
                "--pretrained holds; --export writes the whole backbones with merged adapters"
            )
    for flag in ("export", "export_peft"):
        if (out := getattr(config.run, flag)) is not None:
            probe_folder(Path(out), f"--{flag}")
    for name, backbone in model.backbones.items():
        if config.run.export is not None:
            folder = Path(config.run.export) / name
            state = merged_state_dict(backbone)
            save_pretrained(folder, model.bert_config, state, tokenizer)
            task = embedding_task([task for key, task in model.tasks.items() if model.backbone_of[key] == name])
            pooling = model.pooling(task.name)
            export_sentence_transformers(folder, state, pooling, tokenizer.max_length)
            say(
                f"backbone {name} in {folder}, for transformers and, with the {pooling} pooling of {task.title}, for "
                "sentence-transformers"
            )
        if config.run.export_peft is not None and model.lora is not None:
            folder = Path(config.run.export_peft) / name
            export_peft(backbone, model.lora, folder, full_name(base_of(config) or saved.model.pretrained))
            say(f"adapters of backbone {name} in {folder}")


def predict_lines(config: Config) -> None:
    """Print label, probability and texts of each line of the file of --predict. A pair has a tab between its texts.

    Raises UserError for a task that the checkpoint does not know and for a file that cannot be read.
    """
    trained = trained_model(config, partial(print, file=sys.stderr))  # not among the labels, which may go into a pipe
    task = trained.task(str(config.run.task))
    texts = read_lines(str(config.run.predict), task)
    for row, (label, name, probability) in zip(texts, trained.predict(task.name, texts), strict=True):
        say(
            "\t".join([f"{label:.3f}", *row] if probability is None else [str(label), name, f"{probability:.3f}", *row])
        )


def read_lines(name: str, task: Task) -> list[tuple[str, ...]]:
    """Return the texts in each line of a file, or of standard input for "-"; empty lines are skipped.

    Raises UserError if the file cannot be read, or if a line has not as many texts as the task.
    """
    try:
        # As bytes, since Python decodes standard input by the locale.
        content = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"--predict {name}: cannot be read ({error}); give a text file in UTF-8") from error
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    lines = [[text.strip() for text in line.split("\t")] for line in content.split("\n")]
    rows = {number: row for number, row in enumerate(lines, start=1) if any(row)}
    for number, row in rows.items():
        if len(row) != len(task.text_columns) or not all(row):
            wanted = "2 texts per line with a tab between them" if task.is_pair else "1 text per line"
            raise UserError(f"--predict {name}, line {number}: {task.title} needs {wanted}")
    if not rows:
        raise UserError(f"--predict {name}: holds no sentence; give one per line")
    return [tuple(row) for row in rows.values()]
