"""MultitaskBERT: the backbones, the shared pair layer and the heads of all tasks, built from options and task table."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from base_bert import load_mlm_head
from bert import Adapter, BertModel
from config import COSINE_HEADS, BertConfig, ModelOptions, PalOptions, TaskOptions, TrainOptions
from lora import (
    LoRAConfig,
    adapter_state_dict,
    base_state_dict,
    base_weights_sha256,
    inject,
    load_adapter_state_dict,
    restore,
)
from models.freezing import frozen_by_adapters, parse_command, scheduled_layers, set_trainable
from models.heads import CosineHead, PairLayer, ResidualHead, build_head, pair_features
from models.mlm import MaskedWordHead
from models.pals import TaskAdapter
from tasks import Task
from text.packing import Batch, PackedBatch, join_padded_pairs, pack_padded, stack_padded_pairs
from utils.errors import UserError


class MultitaskBERT(nn.Module):
    """Backbones of the shape `bert_config`, a pair layer that pair tasks share, and one head for each task.

    Only the backbones and heads that `tasks` need are built. `options` hold for all tasks, unless those of a task in
    `task_options` say otherwise. `options` must be resolved.
    """

    def __init__(
        self,
        options: ModelOptions,
        bert_config: BertConfig,
        tasks: Mapping[str, Task],
        task_options: Mapping[str, TaskOptions] | None = None,
    ) -> None:
        super().__init__()
        self.options = options
        self.bert_config = bert_config
        self.tasks = dict(tasks)
        self.lora: LoRAConfig | None = None
        self.base_sha256 = ""
        self.backbone_of = {name: self._backbone_name(task) for name, task in tasks.items()}
        names = dict.fromkeys(self.backbone_of.values())
        self.backbones = nn.ModuleDict({name: BertModel(bert_config) for name in names})
        given = {name: task_options[name].model_options() if task_options else {} for name in tasks}
        self.options_of = {name: replace(options, **given[name]) for name in tasks}
        pairs = [name for name, task in tasks.items() if task.is_pair]
        self.pair_layer = None
        if pairs and options.pair_layer != "none":
            stats = ("all",) if options.shared_batchnorm_stats else pairs
            width = 2 * bert_config.hidden_size
            self.pair_layer = PairLayer(self._feature_width(pairs[0]), width, str(options.pair_layer), stats)
        self.heads = nn.ModuleDict({name: self._build_head(name, given[name].get("head_layers")) for name in tasks})
        self.pals = nn.ModuleDict()  # by task
        self.mlm = nn.ModuleDict()  # by backbone

    def _backbone_name(self, task: Task) -> str:
        names = {"shared": "shared", "sentiment-similarity": task.backbone, "per-task": task.name}
        return names[str(self.options.backbones)]

    def _feature_width(self, task: str) -> int:
        hidden = self.bert_config.hidden_size
        if not self.is_siamese(task):
            return hidden
        return sum(1 if name == "cos" else hidden for name in self.options.pair_features or ())

    def _build_head(self, task: str, cosine_layers: int | None) -> nn.Module:
        row, options, hidden = self.tasks[task], self.options_of[task], self.bert_config.hidden_size
        if self.has_cosine_head(task) and options.sts_head == "cosine":
            return CosineHead(hidden, options, row.label_range[1], cosine_layers)
        width = 2 * hidden if self.uses_pair_layer(task) else self._feature_width(task)
        head = build_head(options, width, hidden, row.num_outputs)
        if not self.has_cosine_head(task):
            return head
        return ResidualHead(head, options.pair_features or (), row.label_range[1])

    def has_cosine_head(self, task: str) -> bool:
        """Return whether the head takes two embeddings and compares them, as --sts_head cosine makes a similarity."""
        similarity = self.tasks[task].kind == "similarity"
        return similarity and self.is_siamese(task) and self.options.sts_head in COSINE_HEADS

    def uses_pair_layer(self, task: str) -> bool:
        """Return whether the shared pair layer lies between the features of a task and its head."""
        return self.pair_layer is not None and self.tasks[task].is_pair and not self.has_cosine_head(task)

    def backbone(self, task: str) -> BertModel:
        """Return the backbone that serves a task."""
        module = self.backbones[self.backbone_of[task]]
        assert isinstance(module, BertModel)
        return module

    def pooling(self, task: str) -> str:
        """Return how a task makes one embedding of a sequence: cls or mean."""
        return str(self.options_of[task].pooling)

    def is_siamese(self, task: str) -> bool:
        """Return whether a batch of B examples holds 2B sequences, with all first texts before all second texts."""
        return self.tasks[task].is_siamese(self.options_of[task].pair_encoding)

    def pair_encodings(self) -> dict[str, str]:
        """Return for each task how the two texts of a pair are encoded: siamese or cross."""
        return {name: str(options.pair_encoding) for name, options in self.options_of.items()}

    def forward(self, task: str, batch: Batch) -> Tensor:
        """Return the outputs of `task`: logits [B, classes], or [B] for one logit or one similarity."""
        return self.outputs(task, self.embed(task, batch))

    def embed(self, task: str, batch: Batch) -> Tensor:
        """Return sentence embeddings [B, H], or [2B, H] for siamese pairs, with the first texts before the second."""
        return self.backbone(task).sentence_embedding(batch, self.pooling(task), self.adapters(task))

    def adapters(self, task: str) -> list[Adapter]:
        """Return what the task adds to each layer of its backbone, or an empty list if it adds nothing."""
        if task not in self.pals:
            return []
        module = self.pals[task]
        assert isinstance(module, TaskAdapter)
        return module.slots()

    def outputs(self, task: str, embedding: Tensor) -> Tensor:
        """Return what `forward` returns, in fp32, from the sentence embeddings."""
        out = self.classify(task, embedding).float()
        return out if self.tasks[task].kind == "classes" else out.squeeze(1)

    def classify(self, task: str, embedding: Tensor) -> Tensor:
        """Map sentence embeddings ([B, H], or [2B, H] for siamese pairs) to outputs [B, outputs]."""
        if not self.tasks[task].is_pair:
            return self.heads[task](embedding)
        if self.is_siamese(task):
            u, v = embedding.chunk(2)
            if self.has_cosine_head(task):
                return self.heads[task](u, v)
            embedding = pair_features(u, v, self.options.pair_features or ())
        if self.pair_layer is not None:
            embedding = self.pair_layer(embedding, task)
        return self.heads[task](embedding)

    def predict_sentiment(self, input_ids: Tensor | PackedBatch, attention_mask: Tensor | None = None) -> Tensor:
        """Return SST logits [B, 5] from padded tensors [B, L] or from a packed batch."""
        if isinstance(input_ids, PackedBatch):
            return self("sst", input_ids)
        assert attention_mask is not None
        return self("sst", pack_padded(input_ids, attention_mask))

    def predict_paraphrase(self, first: Tensor | PackedBatch, *rest: Tensor) -> Tensor:
        """Return Quora logits [B] from a packed batch, or from ids_1, mask_1, ids_2 and mask_2, each [B, L]."""
        return self._predict_pair("para", first, *rest)

    def predict_similarity(self, first: Tensor | PackedBatch, *rest: Tensor) -> Tensor:
        """Return STS similarities [B] from a packed batch, or from ids_1, mask_1, ids_2 and mask_2, each [B, L]."""
        return self._predict_pair("sts", first, *rest)

    def _predict_pair(self, task: str, first: Tensor | PackedBatch, *rest: Tensor) -> Tensor:
        if isinstance(first, PackedBatch):
            return self(task, first)
        join = stack_padded_pairs if self.is_siamese(task) else join_padded_pairs
        return self(task, join(first, *rest))

    def hidden_rows(self, task: str, batch: PackedBatch, rows: Tensor) -> Tensor:
        """Return the last hidden states [M, H] at `rows` [M] of a packed batch of `task`."""
        backbone = self.backbone(task)
        return backbone.encode(backbone.embed(batch), batch, adapters=self.adapters(task))[rows]

    def masked_words(self, task: str, hidden: Tensor) -> Tensor:
        """Return the logits [M, V] of the words whose last hidden states are `hidden` [M, H]."""
        return self.mlm[self.backbone_of[task]](hidden, self.backbone(task).word_embedding.weight)

    def add_adapters(self, config: LoRAConfig) -> None:
        """Wrap linear layers of every backbone. Load the pretrained weights before. Heads are never wrapped."""
        self.lora = config
        self.base_sha256 = base_weights_sha256(next(iter(self.backbones.values())))
        for backbone in self.backbones.values():
            inject(backbone, config)

    def start_from_adapters(self, config: LoRAConfig, state: Mapping[str, Tensor], source: str) -> None:
        """Give every backbone these adapters of one backbone. `source` names their file in messages.

        Layers of which `state` has nothing get new adapters, which change nothing yet. Raises UserError if the others
        do not fit; the model is then unchanged.
        """
        self.add_adapters(config)
        layers = {name.split(".")[1] for name in state}
        try:
            for backbone in self.backbones.values():
                new = {
                    name: tensor
                    for name, tensor in adapter_state_dict(backbone).items()
                    if name.split(".")[1] not in layers
                }
                load_adapter_state_dict(backbone, {**new, **state}, source)
        except UserError:
            self.remove_adapters()
            raise

    def remove_adapters(self) -> None:
        """Put back the plain linear layers with their base weights."""
        for backbone in self.backbones.values():
            restore(backbone)
        self.lora, self.base_sha256 = None, ""

    def add_pals(self, options: PalOptions) -> None:
        """Give all tasks, or those in `options.pal_tasks`, projected attention layers beside their backbones."""
        if options.pal != "none":
            for name in options.pal_tasks or self.tasks:
                self.pals[name] = TaskAdapter(options, self.bert_config)

    def compile_layers(self) -> None:
        """Let torch compile parts of the layers of every backbone, for training."""
        for backbone in self.backbones.values():
            assert isinstance(backbone, BertModel)
            backbone.compile_layers()

    def add_mlm_heads(self) -> None:
        """Give every backbone a head that predicts masked words, and freeze the heads of the tasks."""
        for name in self.backbones:
            self.mlm[name] = MaskedWordHead(self.bert_config)
        for module in (self.heads, self.pair_layer):
            if module is not None:
                module.requires_grad_(False)

    def load_backbones(self, weights: Mapping[str, Tensor]) -> None:
        """Load these pretrained weights into every backbone."""
        for backbone in self.backbones.values():
            backbone.load_state_dict(weights)

    def load_mlm_heads(self, folder: Path) -> bool:
        """Load the pretrained weights in `folder` into the heads of masked words; return False if it has none."""
        weights = load_mlm_head(folder, self.bert_config)
        if weights is None:
            return False
        for head in self.mlm.values():
            head.load_state_dict(weights)
        return True

    def frozen_parameter_names(self, options: TrainOptions) -> set[str]:
        """Return the names of the backbones' tensors that adapters keep as pretrained; checkpoints leave them out.

        There are none with --init_from, whose weights no folder holds.
        """
        names: set[str] = set()
        if self.lora is not None and options.init_from is None:
            for name, backbone in self.backbones.items():
                last_layer = options.fine_tune_mode == "last-layer"
                frozen = base_state_dict(backbone) if last_layer else frozen_by_adapters(backbone, self.lora)
                names |= {f"backbones.{name}.{parameter}" for parameter in frozen}
        return names

    def manage_freezing(self, structure: str, adapters_always: bool = False) -> None:
        """Freeze or unfreeze the backbones by a command of R0, appendix B. Raises UserError as `parse_command` does."""
        self.set_trainable_layers(parse_command(structure, self.bert_config.num_hidden_layers), adapters_always)

    def set_trainable_layers(self, trainable_layers: int, adapters_always: bool = False) -> None:
        """Let so many layers of every backbone train; models/freezing.py explains the number and `adapters_always`.

        Heads and PALs are left alone: they always train, since no pre-training has seen them. Only --mlm freezes the
        heads of the tasks.
        """
        for backbone in self.backbones.values():
            assert isinstance(backbone, BertModel)
            set_trainable(backbone, trainable_layers, self.lora, adapters_always)

    def trainable_layers(self, options: TrainOptions, epoch: int) -> int:
        """Return how many layers train in `epoch`, counted from 0."""
        return scheduled_layers(options.fine_tune_mode, options.stage(epoch), self.bert_config.num_hidden_layers)

    def freeze_for_epoch(self, options: TrainOptions, epoch: int) -> int:
        """Freeze what does not train in `epoch`, counted from 0, and return how many layers train."""
        layers = self.trainable_layers(options, epoch)
        self.set_trainable_layers(layers, adapters_always=options.fine_tune_mode == "last-layer")
        return layers

    def trained_parameters(self, options: TrainOptions) -> dict[str, nn.Parameter]:
        """Return by name the parameters that train in any epoch of a run, and leave the model frozen as in the last.

        No epoch freezes what an earlier one trained, so the last one decides.
        """
        self.freeze_for_epoch(options, options.epochs - 1)
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def parts(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        """Yield the title and the parameters of each part: backbones, their adapters, PALs, pair layer, heads."""
        for name, backbone in self.backbones.items():
            adapters = adapter_state_dict(backbone)
            named = dict(backbone.named_parameters())
            yield f"backbone {name}", [parameter for key, parameter in named.items() if key not in adapters]
            if adapters:
                yield f"adapters {name}", [named[key] for key in adapters]
        for name, pal in self.pals.items():
            yield f"pal {name}", list(pal.parameters())
        for name, head in self.mlm.items():
            yield f"masked words {name}", list(head.parameters())
        if self.pair_layer is not None:
            yield "pair layer", list(self.pair_layer.parameters())
        for name, head in self.heads.items():
            yield f"head {name}", list(head.parameters())

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """Return every parameter that a batch of `task` reaches; with --mlm, the heads of masked words."""
        reached: list[nn.Module] = [self.backbone(task)]
        reached.append(self.mlm[self.backbone_of[task]] if self.mlm else self.heads[task])
        if task in self.pals:
            reached.append(self.pals[task])
        if self.pair_layer is not None and self.uses_pair_layer(task) and not self.mlm:
            reached.append(self.pair_layer)
        pools = self.pooling(task) == "cls" and not self.mlm
        unused = set() if pools else set(self.backbone(task).pooler_dense.parameters())
        return [parameter for module in reached for parameter in module.parameters() if parameter not in unused]
