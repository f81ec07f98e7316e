"""Do --export, --export_peft, --export_task and --export_onnx: write a trained model as other libraries read it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from base_bert import full_name, save_pretrained
from config import Config
from evaluation.commands import base_of
from evaluation.model_card import CLASSIFIER, CLEANED, SENTENCE_TRANSFORMERS, model_card
from evaluation.trained import TrainedModel, embedding_task, load_trained
from lora import merged_state_dict
from models.checkpoint import load, load_model
from models.multitask_bert import MultitaskBERT
from models.onnx_export import export_onnx, require_onnx
from models.peft_exchange import export_peft
from models.sentence_transformers import export_sentence_transformers
from models.sequence_classification import CLASS, linear_head, task_settings, what_does_not_fit
from tasks import TASKS, Task
from utils.console import say
from utils.device import Device
from utils.errors import UserError
from utils.files import probe_folder, write_text

CARD = "README.md"


def export(config: Config) -> None:
    """Do all exports that the options ask for. Raises UserError for a model that the other library cannot hold."""
    run = config.run
    if run.export_onnx is not None:
        require_onnx()
    if run.export is not None or run.export_peft is not None:
        export_backbones(config)
    if run.export_task is not None or run.export_onnx is not None:
        trained = load_trained(Path(str(run.evaluate)), Device(torch.device("cpu")), 1, base_of(config))
        if trained.config.data.extra_clean:
            say(CLEANED)
        if run.export_task is not None:
            export_classifier(trained, *run.export_task)
        if run.export_onnx is not None:
            export_tasks(trained, Path(run.export_onnx), run.task)


def export_backbones(config: Config) -> None:
    """Write each backbone of a checkpoint into a folder with its name, for --export and --export_peft.

    --export writes the layouts of transformers and sentence-transformers, and --export_peft the adapters as peft reads
    them. Raises UserError for a model that these layouts cannot hold.
    """
    path = Path(str(config.run.evaluate))
    content = load(path)
    model, tokenizer, saved = load_model(path, content, base_of(config))
    check_backbones(config, model, saved)
    scores = dev_scores(content)
    for flag in ("export", "export_peft"):
        if (out := getattr(config.run, flag)) is not None:
            probe_folder(Path(out), f"--{flag}")
    for name, backbone in model.backbones.items():
        if config.run.export is not None:
            folder, state = Path(config.run.export) / name, merged_state_dict(backbone)
            save_pretrained(folder, model.bert_config, state, tokenizer)
            tasks = tasks_of(model, name)
            task = embedding_task(tasks)
            pooling = model.pooling(task.name)
            export_sentence_transformers(folder, state, pooling, tokenizer.max_length)
            about = f"A BERT for sentence embeddings with the {pooling} pooling of {task.title}, without the heads"
            write_text(folder / CARD, model_card(about, SENTENCE_TRANSFORMERS, folder, saved, tasks, scores))
            say(
                f"backbone {name} in {folder}, for transformers and, with the {pooling} pooling of {task.title}, for "
                "sentence-transformers"
            )
        if config.run.export_peft is not None and model.lora is not None:
            folder = Path(config.run.export_peft) / name
            export_peft(backbone, model.lora, folder, full_name(base_of(config) or saved.model.pretrained))
            say(f"adapters of backbone {name} in {folder}")


def check_backbones(config: Config, model: MultitaskBERT, saved: Config) -> None:
    """Raise UserError if --export or --export_peft asks for a model that transformers or peft cannot hold."""
    if model.pals:
        flag = "--export" if config.run.export is not None else "--export_peft"
        raise UserError(
            f"{flag}: {config.run.evaluate} has --pal {saved.pal.pal} beside its backbones, for which transformers and "
            "peft have no place; export a model without --pal, or each task with --export_onnx"
        )
    if config.run.export_peft is None:
        return
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


def tasks_of(model: MultitaskBERT, backbone: str) -> list[Task]:
    """Return the tasks that a backbone serves."""
    return [task for name, task in model.tasks.items() if model.backbone_of[name] == backbone]


def dev_scores(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the scores on dev in a checkpoint, by task; none after --mlm."""
    return {name: row for name, row in content.get("scores", {}).items() if name in TASKS}


def export_classifier(trained: TrainedModel, name: str, out: str) -> None:
    """Write a task with its head as BertForSequenceClassification, for --export_task.

    Raises UserError for a head that this class does not have.
    """
    task, model = trained.task(name), trained.model
    if problem := what_does_not_fit(model, task.name):
        raise UserError(
            f"--export_task {name}: {trained.path} was trained with {problem}, but {CLASS} has only a linear layer on "
            "the pooled first token; use --export_onnx"
        )
    all_scores = dev_scores(load(trained.path, mmap=True))
    scores = {key: row for key, row in all_scores.items() if key == task.name}
    probe_folder(folder := Path(out), f"--export_task {name}")
    weight, bias = linear_head(model, task.name, trained.lines.get(task.name))
    save_pretrained(
        folder,
        model.bert_config,
        merged_state_dict(model.backbone(task.name)),
        trained.tokenizer,
        {"classifier.weight": weight, "classifier.bias": bias},
        task_settings(task),
    )
    about, tasks = f"A BERT with a linear layer for {task.title}", tasks_of(model, model.backbone_of[task.name])
    write_text(folder / CARD, model_card(about, CLASSIFIER, folder, trained.config, tasks, scores))
    say(f"{task.title} in {folder}, for transformers' {CLASS}")


def export_tasks(trained: TrainedModel, folder: Path, only: str | None) -> None:
    """Write each task, or `only` one, as an ONNX model with the tokenizer beside it, for --export_onnx."""
    names = list(trained.model.tasks) if only is None else [trained.task(only).name]
    probe_folder(folder, "--export_onnx")
    trained.tokenizer.save(folder)
    for name in names:
        export_onnx(folder / f"{name}.onnx", trained.model, name, trained.lines.get(name))
        say(f"{trained.model.tasks[name].title} in {folder / name}.onnx")
