"""The peer's side of a comparison: the same training as most people write it with transformers and peft."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.workloads import LR, Workload
from datasets import TaskData
from lora import TARGETS, LoRAConfig
from text.tokenizer import TokenArrays
from training.losses import LOSSES
from utils.errors import UserError


def missing_package(name: str | None) -> UserError:
    """Return the error that says how to install a peer."""
    return UserError(f"the package {name} is missing; pip install -r requirements-dev.txt")


def import_transformers() -> Any:
    """Return the package transformers. Raises UserError where it is not installed.

    transformers looks once for a package named datasets, and must not take our datasets.py for it. It remembers the
    answer; a None in sys.modules means that there is no such package.
    """
    ours = sys.modules["datasets"]
    sys.modules["datasets"] = None  # type: ignore[assignment]
    try:
        import transformers
        from transformers.utils.import_utils import is_datasets_available

        assert not is_datasets_available()
    except ModuleNotFoundError as error:
        raise missing_package(error.name) from None
    finally:
        sys.modules["datasets"] = ours
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def add_peft_adapters(bert: nn.Module, adapters: LoRAConfig) -> nn.Module:
    """Return `bert` with the adapters as peft makes them. Raises UserError where peft is not installed."""
    try:
        import peft
    except ModuleNotFoundError:
        raise missing_package("peft") from None
    paths = "|".join(TARGETS[name].replace(".", r"\.") for name in adapters.linears)
    targets = rf"encoder\.layer\.\d+\.({paths})"
    config = peft.LoraConfig(
        r=adapters.rank, lora_alpha=adapters.rank, target_modules=targets, use_dora=adapters.dora, lora_dropout=0.0
    )
    return peft.get_peft_model(bert, config)


class PeerModel(nn.Module):
    """transformers' BertModel with the heads of arch v1: linear on u (and v), or the scaled cosine of u and v."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.kind, self.max_label = work.task.kind, work.task.label_range[1]
        self.bert = import_transformers().BertModel.from_pretrained(work.folder, attn_implementation="sdpa").float()
        self.dropout = nn.Dropout(work.bert_config.hidden_dropout_prob)
        self.head = None if self.kind == "similarity" else work.head()

    def forward(self, texts: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Return the outputs [B, classes] or [B] for the token ids and mask [B, L] of each text."""
        pooled = [self.dropout(self.bert(input_ids=ids, attention_mask=mask).pooler_output) for ids, mask in texts]
        if self.head is None:
            return self.max_label * F.cosine_similarity(*pooled)
        logits = self.head(torch.cat(pooled, dim=1))
        return logits if self.kind == "classes" else logits.squeeze(1)


class PeerBatches(torch.utils.data.Dataset):
    """The peer's training batches in their order, each as padded texts and labels [B]."""

    def __init__(self, data: TaskData, batches: Sequence[np.ndarray], pad_id: int) -> None:
        self.data, self.batches, self.pad_id = data, batches, pad_id
        self.texts = [self.split(tokens) for tokens in data.tokens]

    @staticmethod
    def split(tokens: TokenArrays) -> list[Tensor]:
        """Return the token ids [L] of each example."""
        return list(torch.from_numpy(tokens.input_ids).long().split(np.diff(tokens.offsets).tolist()))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        indices = self.batches[number]
        return self.collate(indices.tolist()), self.data.labels(indices)

    def collate(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return token ids and mask [B, L] of each text, padded to the longest one."""
        padded = []
        for examples in self.texts:
            chosen = [examples[i] for i in indices]
            ids = pad_sequence(chosen, batch_first=True, padding_value=self.pad_id)
            mask = torch.arange(ids.shape[1]) < torch.tensor([len(tokens) for tokens in chosen])[:, None]
            padded.append((ids, mask.long()))
        return padded


class TransformersSide:
    """transformers, used as most people do. With `adapters`, only peft's adapters and the head train."""

    def __init__(self, work: Workload, adapters: LoRAConfig | None = None) -> None:
        self.work, self.device = work, work.device.device
        self.model = PeerModel(work)
        if adapters is not None:
            self.model.bert = add_peft_adapters(self.model.bert, adapters)
        self.model.to(self.device).train()
        options = work.config.tasks[work.task.name]
        self.loss = LOSSES[options.loss]
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        decay = options.weight_decay
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            parameters, LR, eps=1e-6, weight_decay=decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=work.device.scaled)
        pad_id = work.tokenizer.pad_id
        self.batches, self.dev = PeerBatches(work.train, work.batches, pad_id), PeerBatches(work.dev, [], pad_id)
        self.loaded = self.load_batches() if work.loader_workers else None

    def load_batches(self) -> Iterator[Any]:
        """Return the training batches as --loader_workers processes make them, in pinned memory for a GPU."""
        loader = torch.utils.data.DataLoader(
            self.batches,
            batch_size=None,
            num_workers=self.work.loader_workers,
            prefetch_factor=4,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def to_device(self, texts: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
        """Return the texts on the device."""
        return [tuple(tensor.to(self.device, non_blocking=True) for tensor in text) for text in texts]

    def forward(self, indices: np.ndarray) -> Tensor:
        """Return the outputs [B, classes] or [B] of training examples [B]."""
        return self.model(self.to_device(self.batches.collate(indices.tolist())))

    def train_on(self, *batches: np.ndarray) -> None:
        """Make an optimizer step for the examples [B] of each batch."""
        for indices in batches:
            if self.loaded is None:
                texts, labels = self.batches.collate(indices.tolist()), self.work.train.labels(indices)
            else:
                texts, labels = next(self.loaded)
            self.train_step(self.to_device(texts), labels.to(self.device, non_blocking=True))

    def train_step(self, texts: Sequence[tuple[Tensor, ...]], labels: Tensor) -> None:
        """Make one optimizer step."""
        with self.work.device.autocast():
            outputs = self.model(texts)
        self.scaler.scale(self.loss(outputs.float(), labels)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self) -> np.ndarray:
        """Return the outputs [N, classes] or [N] of all dev examples, in the order of the file."""
        self.model.eval()
        blocks = torch.arange(len(self.work.dev)).split(self.work.config.train.batch_size)
        with torch.inference_mode(), self.work.device.autocast():
            outputs = [self.model(self.to_device(self.dev.collate(block.tolist()))).float() for block in blocks]
        self.model.train()
        return torch.cat(outputs).cpu().numpy()
