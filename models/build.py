"""Build a model from a configuration: pretrained backbones, adapters, fresh heads."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from base_bert import load_weights, read_config, resolve_pretrained
from config import BertConfig, Config
from lora import LoRAConfig
from models.checkpoint import init_from_checkpoint
from models.multitask_bert import MultitaskBERT
from models.peft_exchange import import_peft
from tasks import Task
from text.tokenizer import Tokenizer, load_tokenizer
from utils.errors import UserError


def build_model(config: Config, tasks: dict[str, Task], say: Callable[[str], None]) -> tuple[MultitaskBERT, Tokenizer]:
    """Return a pretrained model with fresh heads, and its tokenizer. Raises UserError if they do not fit together."""
    folder = resolve_pretrained(config.model.pretrained)
    dropout = config.model.backbone_dropout_prob
    bert_config = replace(read_config(folder), hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    if config.data.max_length > bert_config.max_position_embeddings:
        raise UserError(
            f"--max_length {config.data.max_length}: {config.model.pretrained} has only "
            f"{bert_config.max_position_embeddings} positions; give at most that"
        )
    joined = [name for name, task in tasks.items() if task.is_pair and config.model_of(name).pair_encoding == "cross"]
    if joined and bert_config.type_vocab_size < 2:
        raise UserError(
            f"--pair_encoding cross: {config.model.pretrained} has one token type (type_vocab_size 1), and the texts "
            "of a joined pair need two; use --pair_encoding siamese"
        )
    torch.manual_seed(config.train.seed)
    weights = load_weights(folder, bert_config)  # first: config.json may ask for a model of any size
    model = MultitaskBERT(config.model, bert_config, tasks, config.tasks)
    model.load_backbones(weights)
    tokenizer = load_tokenizer(folder, config.data.max_length)
    add_parts(config, model, folder, say)
    if config.train.compile:
        model.compile_layers()
    if config.train.init_from is not None:
        init_from_checkpoint(model, tokenizer, Path(config.train.init_from), config.model.pretrained, say)
    check_vocabulary(config, tokenizer, bert_config)
    return model, tokenizer


def add_parts(config: Config, model: MultitaskBERT, folder: Path, say: Callable[[str], None]) -> None:
    """Give a model with pretrained backbones the adapters, PALs and heads of masked words that the options ask for."""
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


def check_vocabulary(config: Config, tokenizer: Tokenizer, bert_config: BertConfig) -> None:
    """Raise UserError if a tokenizer has words that the weights lack."""
    if tokenizer.vocab_size > bert_config.vocab_size:
        raise UserError(
            f"--pretrained {config.model.pretrained}: its tokenizer has {tokenizer.vocab_size} words but its weights "
            f"only {bert_config.vocab_size}; take both from one model"
        )
