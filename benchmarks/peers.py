"""The two sides of a comparison: training as most people write it with transformers and peft, and this package's."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from base_bert import load_weights
from benchmarks.options import BenchmarkOptions
from benchmarks.workloads import LR, Workload, ignore, load_start, requested_device, say
from cli.parser import parse
from datasets import TaskData, load_splits, tokenise
from evaluation.predict import predict
from lora import TARGETS, LoRAConfig
from models.multitask_bert import MultitaskBERT
from tasks import TASKS, Task
from training.distributed import SINGLE_PROCESS, DistributedContext
from training.logger import describe_freezing
from training.losses import LOSSES
from training.run_directory import RunDirectory
from training.task_sampling import Step, TaskBatch
from training.trainer import Trainer
from utils.errors import UserError

NO_RUN = RunDirectory(Path(os.devnull))  # only Trainer.fit, which the benchmark does not call, writes there
Texts = Sequence[tuple[Any, ...]]  # of each text, what the peer's model takes: token ids and mask [B, L], for example


def import_peer(name: str) -> Any:
    """Return the package transformers or peft. Raises UserError where it is not installed.

    transformers looks once for a package named datasets, and must not take our datasets.py for it. It remembers the
    answer; a None in sys.modules means that there is no such package.
    """
    ours = sys.modules["datasets"]
    sys.modules["datasets"] = None  # type: ignore[assignment]
    try:
        import transformers
        from transformers.utils.import_utils import is_datasets_available

        assert not is_datasets_available()
        peer = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is missing; pip install -r requirements-dev.txt") from None
    finally:
        sys.modules["datasets"] = ours
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return peer


class PeerModel(nn.Module):
    """transformers' BertModel with the heads of arch v1: linear on u (and v), or the scaled cosine of u and v."""

    attention = "sdpa"  # transformers' name of it

    def __init__(self, work: Workload, adapters: LoRAConfig | None) -> None:
        super().__init__()
        self.kind, self.max_label, self.device = work.task.kind, work.task.label_range[1], work.device.device
        bert_class = import_peer("transformers").BertModel
        self.bert = bert_class.from_pretrained(work.folder, attn_implementation=self.attention).float()
        self.dropout = nn.Dropout(work.bert_config.hidden_dropout_prob)
        self.head = None if self.kind == "similarity" else work.head()
        if adapters is not None:
            peft, rank = import_peer("peft"), adapters.rank
            paths = "|".join(TARGETS[name].replace(".", r"\.") for name in adapters.linears)
            targets = rf"encoder\.layer\.\d+\.({paths})"
            config = peft.LoraConfig(
                r=rank, lora_alpha=rank, target_modules=targets, use_dora=adapters.dora, lora_dropout=0.0
            )
            self.bert = peft.get_peft_model(self.bert, config)

    def forward(self, texts: Texts) -> Tensor:
        """Return the outputs [B, classes] or [B]."""
        pooled = [self.dropout(self.pooled(*(self.moved(value) for value in text))) for text in texts]
        if self.head is None:
            return self.max_label * F.cosine_similarity(*pooled)
        logits = self.head(torch.cat(pooled, dim=1))
        return logits if self.kind == "classes" else logits.squeeze(1)

    def moved(self, value: Any) -> Any:
        """Return a tensor on the model's device, and anything else as it is."""
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the pooled outputs [B, H] of token ids and mask [B, L]."""
        pooled: Tensor = self.bert(input_ids=ids, attention_mask=mask).pooler_output
        return pooled


class PaddedBatches(torch.utils.data.Dataset):
    """The examples of a task; the key is the example numbers [B] of a batch, padded to its longest text."""

    def __init__(self, data: TaskData, pad_id: int) -> None:
        self.data, self.pad_id = data, pad_id
        self.texts = [
            torch.from_numpy(tokens.input_ids).long().split(np.diff(tokens.offsets).tolist()) for tokens in data.tokens
        ]

    def __getitem__(self, indices: np.ndarray) -> tuple[Texts, Tensor]:
        texts = [self.joined([examples[i] for i in indices.tolist()]) for examples in self.texts]
        return texts, self.data.labels(indices)

    def joined(self, sequences: list[Tensor]) -> tuple[Any, ...]:
        """Return token ids and mask [B, L] of sequences of token ids."""
        ids = pad_sequence(sequences, batch_first=True, padding_value=self.pad_id)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(tokens) for tokens in sequences])[:, None]
        return ids, mask.long()


class TransformersSide:
    """transformers, used as most people do. With `adapters`, only peft's adapters and the head train."""

    model_class: type[PeerModel] = PeerModel
    data_class: type[PaddedBatches] = PaddedBatches

    def __init__(self, work: Workload, adapters: LoRAConfig | None = None) -> None:
        self.work, self.device = work, work.device.device
        self.model = self.model_class(work, adapters).to(self.device).train()
        options = work.config.tasks[work.task.name]
        self.loss = LOSSES[options.loss]
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        build = partial(torch.optim.AdamW, lr=LR, eps=1e-6, weight_decay=options.weight_decay, fused=True)
        self.optimizer: torch.optim.Optimizer = build(parameters)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=work.device.scaled)
        self.train, self.dev = (self.data_class(data, work.tokenizer.pad_id) for data in (work.train, work.dev))
        self.loaded: Iterator[tuple[Texts, Tensor]] | None = None
        if workers := work.loader_workers:
            load = partial(torch.utils.data.DataLoader, batch_size=None, num_workers=workers, prefetch_factor=4)
            self.loaded = iter(load(self.train, sampler=work.batches, pin_memory=self.device.type == "cuda"))

    def forward(self, indices: np.ndarray) -> Tensor:
        """Return the outputs [B, classes] or [B] of training examples [B]."""
        return self.model(self.train[indices][0])

    def train_on(self, *batches: np.ndarray) -> None:
        """Make an optimizer step for the examples [B] of each batch, from token ids to new weights."""
        for indices in batches:
            texts, labels = self.train[indices] if self.loaded is None else next(self.loaded)
            with self.work.device.autocast():
                outputs = self.model(texts)
            loss = self.loss(outputs.float(), labels.to(self.device, non_blocking=True))
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self) -> np.ndarray:
        """Return the outputs [N, classes] or [N] of all dev examples, in the order of the file."""
        self.model.eval()
        order, size = self.order(self.work.dev), self.work.config.train.batch_size
        with torch.inference_mode(), self.work.device.autocast():
            outputs = [self.model(self.dev[order[i : i + size]][0]).float() for i in range(0, len(order), size)]
        self.model.train()
        return torch.cat(outputs).cpu().numpy()[np.argsort(order)]

    def order(self, data: TaskData) -> np.ndarray:
        """Return the numbers of the examples [N] in the order of evaluation: that of the file."""
        return np.arange(len(data))


def trainer_from_flags(
    options: BenchmarkOptions, flags: Sequence[str], tasks: Mapping[str, Task], say: Callable[[str], None]
) -> Trainer:
    """Return what trains `tasks` by these flags of multitask_classifier.py on the benchmark's data and device."""
    config = parse([*flags, "--data_dir", options.data_dir], TASKS, "benchmark.py", "")
    device = requested_device(options, say)
    folder, bert_config, tokenizer = load_start(options.pretrained)
    splits = load_splits(config.data, config.tasks, tasks, ["train", "dev"], say)
    model = MultitaskBERT(config.model, bert_config, tasks, config.tasks)
    model.load_backbones(load_weights(folder, bert_config))
    if config.train.compile:
        model.compile_layers()
    train, dev = tokenise(splits, tokenizer, model.pair_encodings(), False, say).values()
    return Trainer.from_config(config, model, tokenizer, train, dev, device, NO_RUN, say=ignore)


def start_epoch(trainer: Trainer, epoch: int) -> str:
    """Freeze what does not train in `epoch`, counted from 0, and say in words what trains."""
    options = trainer.config.train
    layers = trainer.model.freeze_for_epoch(options, epoch)
    if trainer.data_parallel is not None:
        trainer.data_parallel.rebuild()
    trainer.model.train()
    return describe_freezing(trainer.model, layers, options.fine_tune_mode)


def train_on(trainer: Trainer, task: str, *batches: np.ndarray) -> list[Tensor]:
    """Make an optimizer step for the examples [B] of each batch, and return the losses.

    These are the steps of an epoch for the loader, which prefetches, and for the feature cache, if there is one.
    """
    steps = [Step((TaskBatch(task, indices),)) for indices in batches]
    trainer.loader.begin_epoch(steps, done=0, number=0)
    return [trainer.train_step(step).batches[0].loss for step in steps]


class MinbertSide:
    """This package, running the code of training and evaluation. With `adapters`, only they and the head train."""

    def __init__(
        self, work: Workload, adapters: LoRAConfig | None = None, context: DistributedContext = SINGLE_PROCESS
    ) -> None:
        name = work.task.name
        self.work, self.model = work, MultitaskBERT(work.config.model, work.bert_config, {name: work.task})
        self.model.load_backbones(load_weights(work.folder, work.bert_config))
        for module in self.model.heads[name].modules():
            if isinstance(module, nn.Linear):  # a cosine has none
                module.load_state_dict(work.head().state_dict())
        if adapters is not None:
            self.model.add_adapters(adapters)
        if work.config.train.compile:
            self.model.compile_layers()
        train, dev = {name: work.train}, {name: work.dev}
        self.trainer = Trainer.from_config(
            work.config, self.model, work.tokenizer, train, dev, work.device, NO_RUN, context, say
        )
        start_epoch(self.trainer, 0)

    def forward(self, indices: np.ndarray) -> Tensor:
        """Return the outputs [B, classes] or [B] of training examples [B]."""
        return self.model(self.work.task.name, self.work.train.batch(indices).to(self.work.device.device))

    def train_on(self, *batches: np.ndarray) -> list[Tensor]:
        """Make an optimizer step for the examples [B] of each batch, and return the losses."""
        return train_on(self.trainer, self.work.task.name, *batches)

    def evaluate(self) -> np.ndarray:
        """Return the outputs [N, classes] or [N] of all dev examples."""
        device = self.work.device
        return predict(self.model, self.work.dev, device.device, self.work.config.train.batch_size, device.amp)
