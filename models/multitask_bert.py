"""MultitaskBERT: backbones, pair features, heads and freezing, assembled from `ModelOptions` and the task table."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_bert import load_mlm_head
from bert import Adapter, BertModel, Linear
from config import BertConfig, ModelOptions, PalOptions, TrainOptions, UserError
from kernels.dropout import Dropout
from lora import (
    LoRAConfig,
    adapter_state,
    apply_adapter_policy,
    base_state,
    base_weights_sha256,
    frozen_by_policy,
    inject,
    load_adapter_state,
    restore,
)
from models.mlm import MaskedWordHead
from models.pals import TaskAdapter
from tasks import Task
from text.packing import Batch, PackedBatch, join_padded_pairs, pack_padded, stack_padded_pairs

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
CONV_CHANNELS, CONV_WIDTH = 4, 3


class SharedBatch(Protocol):
    """What normalises a batch of which this process has a part only."""

    def count(self, x: Tensor) -> int:
        """Values for each channel in the whole batch, of which `x` [N, C] or [N, C, L] is a part."""

    def batch_norm(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, momentum: float,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """`x` normalised by the statistics of the whole batch, which also move the running ones by `momentum`."""


class BatchNorm(nn.Module):
    """Batch normalisation over [N, C] or [N, C, L] with running statistics of their own for each name in `stats`.

    A layer that several tasks share sees batches of all of them; with one set of statistics the task trained last
    would set the scale on which every other task is evaluated. A batch with one value per channel has no variance and
    is normalised with the running statistics.

    Running statistics forget by `momentum`, or, while `batches` is a counter, are the equal-weight mean over the
    batches since it was empty.

    Where `shared` is set, statistics are those of a batch that several processes share.
    """

    momentum, eps = 0.1, 1e-5

    def __init__(self, channels: int, stats: Sequence[str] = ("all",)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        for name in stats:
            self.register_buffer(f"running_mean_{name}", torch.zeros(channels))
            self.register_buffer(f"running_var_{name}", torch.ones(channels))
        self.batches: Counter[str] | None = None
        self.shared: SharedBatch | None = None

    def forward(self, x: Tensor, stats: str = "all") -> Tensor:
        """The normalised `x`; in training also updates the running statistics of `stats`."""
        mean, var = self.get_buffer(f"running_mean_{stats}"), self.get_buffer(f"running_var_{stats}")
        count = x.numel() // x.shape[1] if self.shared is None else self.shared.count(x)
        use_batch = self.training and count > 1
        momentum = self.momentum
        if use_batch and self.batches is not None:
            self.batches[stats] += 1
            momentum = 1 / self.batches[stats]
        if use_batch and self.shared is not None:
            return self.shared.batch_norm(x, mean, var, self.weight, self.bias, momentum, self.eps)
        return F.batch_norm(x, mean, var, self.weight, self.bias, use_batch, momentum, self.eps)


class PairLayer(nn.Module):
    """The similarity feature layer that pair tasks share (R0, appendix I): Linear-[BN]-ReLU-Linear-[BN]."""

    def __init__(self, width_in: int, width_out: int, batchnorm: bool, stats: Sequence[str]) -> None:
        super().__init__()
        self.stats = tuple(stats)
        self.dense = Linear(width_in, width_out)
        self.out = Linear(width_out, width_out)
        self.norm = BatchNorm(width_out, stats) if batchnorm else None
        self.out_norm = BatchNorm(width_out, stats) if batchnorm else None

    def forward(self, features: Tensor, task: str) -> Tensor:
        """[B, width_in] to [B, width_out]."""
        stats = task if task in self.stats else self.stats[0]
        hidden = self.dense(features)
        hidden = F.relu(hidden if self.norm is None else self.norm(hidden, stats))
        out = self.out(hidden)
        return out if self.out_norm is None else self.out_norm(out, stats)


class Convolution(nn.Conv1d):
    """nn.Conv1d of one channel as products with sliding windows, which on a CPU take a tenth of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, L] to [N, C, L - width + 1]."""
        assert self.bias is not None
        width = self.weight.shape[2]
        length = x.shape[2] - width + 1
        windows = torch.cat([x[:, :, at : at + length] for at in range(width)], 1)  # [N, width, length]
        # One product for each example: torch would make one of all by copying everything into another order.
        weight = self.weight.squeeze(1).expand(len(x), -1, -1)  # [N, C, width]
        return torch.baddbmm(self.bias[:, None], weight, windows)


class CosineHead(nn.Module):
    """Similarity as the scaled cosine of two embeddings, after an optional linear layer and activation (R3, R4).

    A cosine of 1 is the `highest` label.
    """

    def __init__(self, width: int, options: ModelOptions, highest: float) -> None:
        super().__init__()
        self.highest = highest
        self.projection = nn.Sequential(Dropout(options.hidden_dropout_prob))
        if options.sts_projection:
            self.projection.extend([Linear(width, width), ACTIVATIONS[str(options.head_activation)]()])

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """Two [B, H] to [B, 1], between -highest and highest."""
        return self.highest * F.cosine_similarity(self.projection(u), self.projection(v))[:, None]


def build_head(options: ModelOptions, width: int, hidden: int, outputs: int) -> nn.Sequential:
    """A head from features [B, width] to outputs [B, outputs]; `hidden` is the backbone's width H.

    linear: Linear. nonlinear: Linear(H/2)-[BN]-act-Linear. conv: Conv1d(1, 4, 3)-[BN]-Flatten, then --head_layers x
    (Linear(H/2)-[BN]-act), Linear. mlp: --head_layers x (Linear(H)-act-Dropout), Linear. Dropout stands before each;
    that before the last layer of an mlp can be another one (R4, section 4.2). --head_width stands for H or H/2.
    """
    layers: list[nn.Module] = [Dropout(options.hidden_dropout_prob)]
    activation = ACTIVATIONS[str(options.head_activation)]
    depth = {"linear": 0, "nonlinear": 1}.get(str(options.clf), options.head_layers or 0)
    if options.clf == "conv":
        layers += [nn.Unflatten(1, (1, width)), Convolution(1, CONV_CHANNELS, CONV_WIDTH)]
        layers += [BatchNorm(CONV_CHANNELS)] if options.head_batchnorm else []
        layers += [nn.Flatten()]
        width = CONV_CHANNELS * (width - CONV_WIDTH + 1)
    inner = options.head_width or (hidden if options.clf == "mlp" else hidden // 2)
    dropouts = [options.hidden_dropout_prob] * depth
    if options.output_dropout_prob is not None:
        dropouts[-1] = options.output_dropout_prob
    for dropout in dropouts:
        layers += [Linear(width, inner)]
        if options.clf == "mlp":
            layers += [activation(), Dropout(dropout)]
        else:
            layers += [BatchNorm(inner)] if options.head_batchnorm else []
            layers += [activation()]
        width = inner
    return nn.Sequential(*layers, Linear(width, outputs))


def pair_features(u: Tensor, v: Tensor, names: Sequence[str]) -> Tensor:
    """The named features of two embeddings [B, H], side by side: u, v, abs(u-v), u*v, cos [B, 1], v-u."""
    made = {
        "u": lambda: u,
        "v": lambda: v,
        "abs": lambda: (u - v).abs(),
        "mul": lambda: u * v,
        "cos": lambda: F.cosine_similarity(u, v)[:, None],
        "diff": lambda: v - u,
    }
    return torch.cat([made[name]() for name in names], dim=1)


class MultitaskBERT(nn.Module):
    """Backbones, the shared pair layer and one head per task of `tasks`.

    All backbones have the shape of `bert_config`. Only the heads and backbones that `tasks` need are built.
    """

    def __init__(self, options: ModelOptions, bert_config: BertConfig, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.options = options
        self.bert_config = bert_config
        self.tasks = dict(tasks)
        self.lora: LoRAConfig | None = None
        self.base_sha256 = ""
        self.backbone_of = {name: self._backbone_name(task) for name, task in tasks.items()}
        self.backbones = nn.ModuleDict(
            {name: BertModel(bert_config) for name in dict.fromkeys(self.backbone_of.values())}
        )
        hidden = bert_config.hidden_size
        pairs = [name for name, task in tasks.items() if task.is_pair]
        feature_width = hidden
        if options.pair_encoding == "siamese":
            feature_width = sum(1 if name == "cos" else hidden for name in options.pair_features or ())
        self.pair_layer = None
        if pairs and options.pair_layer != "none":
            stats = ("all",) if options.shared_batchnorm_stats else pairs
            self.pair_layer = PairLayer(feature_width, 2 * hidden, options.pair_layer == "batchnorm", stats)
            feature_width = 2 * hidden
        self.heads = nn.ModuleDict()
        for name, task in tasks.items():
            if self._has_cosine_head(task):
                self.heads[name] = CosineHead(hidden, options, task.label_range[1])
            else:
                width = feature_width if task.is_pair else hidden
                self.heads[name] = build_head(options, width, hidden, task.num_outputs)
        self.pals = nn.ModuleDict()
        self.mlm = nn.ModuleDict()

    def _backbone_name(self, task: Task) -> str:
        return {"shared": "shared", "sentiment-similarity": task.backbone, "per-task": task.name}[
            str(self.options.backbones)
        ]

    def _has_cosine_head(self, task: Task) -> bool:
        return task.is_pair and task.kind == "similarity" and self.options.sts_head == "cosine"

    def backbone(self, task: str) -> BertModel:
        """The backbone that serves a task."""
        module = self.backbones[self.backbone_of[task]]
        assert isinstance(module, BertModel)
        return module

    def is_siamese(self, task: str) -> bool:
        """Whether a batch of B examples of this task holds 2B sequences, all first texts before all second ones."""
        return self.tasks[task].is_pair and self.options.pair_encoding == "siamese"

    def forward(self, task: str, batch: Batch) -> Tensor:
        """Outputs of `task`: logits [B, classes], or [B] for one logit or one similarity."""
        return self.outputs(task, self.embed(task, batch))

    def embed(self, task: str, batch: Batch) -> Tensor:
        """Sentence embeddings of a batch: [B, H], or [2B, H] for siamese pairs, first texts before second."""
        return self.backbone(task).sentence_embedding(batch, str(self.options.pooling), self.adapters(task))

    def adapters(self, task: str) -> list[Adapter]:
        """What the task adds to each layer of its backbone; empty where it adds nothing."""
        if task not in self.pals:
            return []
        module = self.pals[task]
        assert isinstance(module, TaskAdapter)
        return module.slots()

    def outputs(self, task: str, embedding: Tensor) -> Tensor:
        """What `forward` returns, in fp32, from the sentence embeddings."""
        out = self.classify(task, embedding).float()
        return out if self.tasks[task].kind == "classes" else out.squeeze(1)

    def classify(self, task: str, embedding: Tensor) -> Tensor:
        """Sentence embeddings ([B, H], or [2B, H] for siamese pairs) to outputs [B, outputs]."""
        if not self.tasks[task].is_pair:
            return self.heads[task](embedding)
        if self.is_siamese(task):
            u, v = embedding.chunk(2)
            if self._has_cosine_head(self.tasks[task]):
                return self.heads[task](u, v)
            embedding = pair_features(u, v, self.options.pair_features or ())
        if self.pair_layer is not None:
            embedding = self.pair_layer(embedding, task)
        return self.heads[task](embedding)

    def predict_sentiment(self, input_ids: Tensor | PackedBatch, attention_mask: Tensor | None = None) -> Tensor:
        """SST logits [B, 5] from padded tensors [B, L] or from a packed batch."""
        if isinstance(input_ids, PackedBatch):
            return self("sst", input_ids)
        assert attention_mask is not None
        return self("sst", pack_padded(input_ids, attention_mask))

    def predict_paraphrase(self, first: Tensor | PackedBatch, *rest: Tensor) -> Tensor:
        """Quora logits [B]: (input_ids_1, attention_mask_1, input_ids_2, attention_mask_2), or a packed batch."""
        return self._predict_pair("para", first, *rest)

    def predict_similarity(self, first: Tensor | PackedBatch, *rest: Tensor) -> Tensor:
        """STS similarities [B]: (input_ids_1, attention_mask_1, input_ids_2, attention_mask_2), or a packed batch."""
        return self._predict_pair("sts", first, *rest)

    def _predict_pair(self, task: str, first: Tensor | PackedBatch, *rest: Tensor) -> Tensor:
        if isinstance(first, PackedBatch):
            return self(task, first)
        join = stack_padded_pairs if self.is_siamese(task) else join_padded_pairs
        return self(task, join(first, *rest))

    def masked_words(self, task: str, batch: PackedBatch, rows: Tensor) -> Tensor:
        """Logits [M, V] of the words at `rows` [M] of a packed batch of `task`."""
        backbone = self.backbone(task)
        hidden = backbone.encode(backbone.embed(batch), batch, adapters=self.adapters(task))  # [T, H]
        return self.mlm[self.backbone_of[task]](hidden[rows], backbone.word_embedding.weight)

    def add_adapters(self, config: LoRAConfig) -> None:
        """Wrap linears of every backbone, whose pretrained weights must be there already; heads are never wrapped."""
        self.lora = config
        self.base_sha256 = base_weights_sha256(next(iter(self.backbones.values())))
        for backbone in self.backbones.values():
            inject(backbone, config)

    def start_from_adapters(self, config: LoRAConfig, state: Mapping[str, Tensor], source: str) -> None:
        """Give every backbone these adapters of a backbone; `source` is where they are from.

        Raises UserError where they do not fit; the model is then as it was.
        """
        self.add_adapters(config)
        try:
            for backbone in self.backbones.values():
                load_adapter_state(backbone, state, source)
        except UserError:
            for backbone in self.backbones.values():
                restore(backbone)
            self.lora, self.base_sha256 = None, ""
            raise

    def add_pals(self, options: PalOptions) -> None:
        """Give tasks, all or those of `options.pal_tasks`, layers of their own beside the backbone that serves them."""
        if options.pal != "none":
            for name in options.pal_tasks or self.tasks:
                self.pals[name] = TaskAdapter(options, self.bert_config)

    def add_mlm_heads(self) -> None:
        """Give every backbone a head that predicts masked words; those of the tasks no longer train."""
        for name in self.backbones:
            self.mlm[name] = MaskedWordHead(self.bert_config)
        for module in (self.heads, self.pair_layer):
            if module is not None:
                module.requires_grad_(False)

    def load_backbones(self, weights: Mapping[str, Tensor]) -> None:
        """Give every backbone these pretrained weights."""
        for backbone in self.backbones.values():
            backbone.load_state_dict(weights)

    def load_mlm_heads(self, folder: Path) -> bool:
        """Give every head of masked words the pretrained weights in `folder`; False where it has none."""
        weights = load_mlm_head(folder, self.bert_config)
        if weights is None:
            return False
        for head in self.mlm.values():
            head.load_state_dict(weights)
        return True

    def never_trained(self, fine_tune_mode: str) -> set[str]:
        """Names of the tensors that adapters leave as the pretrained weights had them, in the whole run."""
        if self.lora is None:
            return set()
        return {
            f"backbones.{name}.{tensor}"
            for name, backbone in self.backbones.items()
            for tensor in (
                base_state(backbone) if fine_tune_mode == "last-layer" else frozen_by_policy(backbone, self.lora)
            )
        }

    def manage_freezing(self, structure: str, adapters_always: bool = False) -> None:
        """Freeze or unfreeze the backbones: `freezeall`, `unfreezeall` or `unfreezetopN` (R0, appendix B).

        `unfreezetopN` trains the N layers nearest to the output and the pooler; heads and PALs, which
        no pre-training has seen, always train. With LoRA adapters, trainable is what this command AND the adapters'
        policy let train; `adapters_always` trains them whatever the command.
        """
        for backbone in self.backbones.values():
            assert isinstance(backbone, BertModel)
            set_trainable(backbone, structure)
            if self.lora is not None:
                apply_adapter_policy(backbone, self.lora, adapters_always)

    def command_for_epoch(self, options: TrainOptions, epoch: int) -> str:
        """What `manage_freezing` is told in `epoch`, counted from 0."""
        return freezing_command(options.fine_tune_mode, options.stage(epoch), self.bert_config.num_hidden_layers)

    def freeze_for_epoch(self, options: TrainOptions, epoch: int) -> str:
        """Freeze what does not train in `epoch`, counted from 0; returns the command for `manage_freezing`."""
        command = self.command_for_epoch(options, epoch)
        self.manage_freezing(command, adapters_always=options.fine_tune_mode == "last-layer")
        return command

    def trained(self, options: TrainOptions) -> dict[str, nn.Parameter]:
        """The parameters that train at some time of a run, by name; the model is left as the last epoch freezes it.

        No epoch freezes again what an earlier one trained, so the last one decides.
        """
        self.freeze_for_epoch(options, options.epochs - 1)
        return {name: own for name, own in self.named_parameters() if own.requires_grad}

    def parts(self) -> Iterator[tuple[str, list[nn.Parameter]]]:
        """The model's parts with their parameters, for tables: backbones, their adapters, PALs, pair layer, heads."""
        for name, backbone in self.backbones.items():
            adapters = adapter_state(backbone)
            named = dict(backbone.named_parameters())
            yield f"backbone {name}", [own for key, own in named.items() if key not in adapters]
            if adapters:
                yield f"adapters {name}", [named[key] for key in adapters]
        for name, pal in self.pals.items():
            yield f"pal {name}", list(pal.parameters())
        for name, words in self.mlm.items():
            yield f"masked words {name}", list(words.parameters())
        if self.pair_layer is not None:
            yield "pair layer", list(self.pair_layer.parameters())
        for name, head in self.heads.items():
            yield f"head {name}", list(head.parameters())

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """Every parameter that a batch of `task` can reach; with heads of masked words, those and not the task's."""
        reached: list[nn.Module] = [self.backbone(task)]
        reached.append(self.mlm[self.backbone_of[task]] if self.mlm else self.heads[task])
        if task in self.pals:
            reached.append(self.pals[task])
        compared = self.tasks[task].is_pair and not self._has_cosine_head(self.tasks[task])
        if self.pair_layer is not None and compared and not self.mlm:
            reached.append(self.pair_layer)
        return [parameter for module in reached for parameter in module.parameters()]


def set_trainable(backbone: BertModel, structure: str) -> None:
    """Apply one freezing command to one backbone; see MultitaskBERT.manage_freezing.

    Raises UserError for an unknown command or for more layers than there are.
    """
    depth = len(backbone.bert_layers)
    match = re.fullmatch(r"freezeall|unfreezeall|unfreezetop(\d+)", structure)
    if match is None or int(match[1] or 0) > depth:
        raise UserError(
            f"unfreezing command {structure!r} is none of freezeall, unfreezeall, unfreezetopN with N at most {depth}"
        )
    backbone.requires_grad_(structure == "unfreezeall")
    if match[1]:
        backbone.pooler_dense.requires_grad_(True)
        for layer in backbone.bert_layers[depth - int(match[1]) :]:
            layer.requires_grad_(True)


def layers_left_frozen(structure: str, depth: int) -> int:
    """How many of the lowest of `depth` layers a freezing command leaves frozen."""
    if structure == "freezeall":
        return depth
    return 0 if structure == "unfreezeall" else depth - int(structure.removeprefix("unfreezetop"))


def freezing_command(fine_tune_mode: str, stage: int, depth: int) -> str:
    """What trains in a `stage` (counted from 0; see TrainOptions.stage) of backbones with `depth` layers.

    iterative (R0, B.2): heads only, then the top quarter, half and three quarters of the layers, then everything.
    """
    if fine_tune_mode == "last-layer":
        return "freezeall"
    if fine_tune_mode == "full-model" or stage >= 4:
        return "unfreezeall"
    return "freezeall" if stage == 0 else f"unfreezetop{math.ceil(depth * stage / 4)}"
