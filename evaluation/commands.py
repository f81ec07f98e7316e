"""What the command line does with a trained model in one process: --predict, --export and --export_peft."""

import sys
from functools import partial
from pathlib import Path

from base_bert import save_pretrained
from config import Config, ModelOptions
from datasets import Examples, tokenise
from evaluation.metrics import decide, probabilities
from evaluation.predict import predict
from lora import merged_state_dict
from models.checkpoint import load, load_model, trained_tasks
from models.multitask_bert import MultitaskBERT
from models.peft_exchange import export_peft
from tasks import TASKS, Task, task_by_alias
from text.tokenizer import Tokenizer
from utils.console import say
from utils.device import choose_device
from utils.errors import UserError
from utils.files import probe_folder


def trained_model(config: Config) -> tuple[MultitaskBERT, Tokenizer, Config]:
    """The checkpoint that --evaluate names, as `load_model` returns it. Raises UserError for one of --mlm."""
    path = Path(str(config.run.evaluate))
    content = load(path)
    trained_tasks(content, path)
    return load_model(path, content, base_of(config))


def base_of(config: Config) -> str | None:
    """Where --pretrained says that the base weights of a checkpoint with adapters are now."""
    return None if config.model.pretrained == ModelOptions.pretrained else config.model.pretrained


def export(config: Config) -> None:
    """--export: write each backbone of a checkpoint in the Hugging Face layout, in a folder named after it.

    With --export_peft, write its adapters as peft reads them.
    """

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


def predict_lines(config: Config) -> None:
    """--predict: label and probability for each line; the two texts of a pair are separated by a tab."""

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
