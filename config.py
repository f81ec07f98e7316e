"""Every option once: dataclasses that are the command line, the checks and the saved configuration.

A field made by `option` is one flag: its name, type, default, help, choices and bounds stand here and nowhere else.
`parse` turns a command line into a `Config`; all that is wrong with it is gathered and reported at once.
"""

import argparse
import io
import logging
import math
import os
import re
import reprlib
import shlex
import sys
import time
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from tasks import Task


class UserError(Exception):
    """A mistake that its maker can mend: scripts print it as one line and exit with code 2."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|\bMemoryError|can(no|')t allocate memory|not enough memory|Unable to allocate"
    r"|bad_alloc|ALLOC_FAILED|could not create a (primitive(?! desc)|memory object)",
    re.IGNORECASE,
)  # in the words of torch, numpy, Python and oneDNN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the machine or of a GPU, ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"))
    )


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is also a flag.

    Metadata: `choices`, `low` and `high` (inclusive bounds), `above` (exclusive lower bound), `metavar`, `template`
    (a per-task flag's name with {task} in it), `belongs` (another option of its group and the values of that under
    which it means anything).
    """
    return field(default=default, metadata={"help": help, **metadata})


SAVE_EVERY = r"([1-9]\d{0,8})(m?)"  # --save_every: steps, or minutes
MOST_SIZE, MOST_LAYERS = 1 << 24, 128  # beyond any BERT; a damaged file must not make us count for hours
MOST_WIDTH, MOST_THREADS = 1 << 16, 1024  # beyond any use; far beyond it, the machine stands still
MOST_RANK = 1 << 44  # beyond any memory, which is a trial's row in a study; a tensor of it can still be asked for
MOST_NUMBER, MOST_RATE = 1e30, 1e36  # of an option, of a learning rate: what optimizers make of it still fits into fp32


@dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT backbone; the field names are those of a Hugging Face config.json."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> "BertConfig":
        """The known keys of a Hugging Face configuration; one that is not a plain BERT is refused.

        Raises UserError where the file describes another architecture, activation or position embedding, or a size
        that cannot be.
        """
        expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        for key, value in expected.items():
            if values.get(key, value) != value:
                raise UserError(
                    f"{source}: {key} is {reprlib.repr(values[key])}, but only {value!r} is supported; choose a BERT"
                )
        known = {spec.name: values.get(spec.name, spec.default) for spec in fields(cls)}
        for spec in fields(cls):
            value, real = known[spec.name], isinstance(spec.default, float)
            low = 0 if real or spec.name == "pad_token_id" else 1
            high = 1 if real else MOST_LAYERS if spec.name == "num_hidden_layers" else MOST_SIZE
            numeric = isinstance(value, (int, float) if real else int) and not isinstance(value, bool)
            if not numeric or not low <= value <= high:
                raise UserError(
                    f"{source}: {spec.name} is {reprlib.repr(value)}, which cannot be; use the config.json of a BERT"
                )
        config = cls(**known)
        if config.pad_token_id >= config.vocab_size:
            raise UserError(f"{source}: pad_token_id {config.pad_token_id} is beyond vocab_size {config.vocab_size}")
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"{source}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                f"{config.num_attention_heads}; the heads need equal widths"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The Hugging Face config.json of this shape."""
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            **asdict(self),
        }


@dataclass(frozen=True)
class Arch:
    """A named set of model choices (METHODS: architectures); each can be overridden by its own flag."""

    backbones: str
    pair_encoding: str
    pooling: str
    pair_features: tuple[str, ...]
    pair_layer: str
    clf: str
    head_layers: int
    head_batchnorm: bool
    head_activation: str = "relu"
    sts_head: str = "regression"
    sts_projection: bool = False
    similarity_loss: str = "pearson"


ARCHS: dict[str, Arch] = {
    "yin-yang": Arch(
        "sentiment-similarity", "siamese", "cls", ("u", "v", "abs", "mul", "cos"), "batchnorm", "conv", 1, True
    ),
    "duality": Arch("sentiment-similarity", "siamese", "cls", ("abs", "mul", "cos"), "plain", "conv", 1, False),
    "baseline": Arch("shared", "siamese", "cls", ("abs",), "none", "conv", 0, False, similarity_loss="mse"),
    "r1-baseline": Arch("shared", "cross", "cls", (), "none", "linear", 0, False, similarity_loss="mse"),
    "v1": Arch("shared", "siamese", "cls", ("u", "v"), "none", "linear", 0, False, sts_head="cosine"),
    "v2": Arch("shared", "cross", "cls", (), "none", "mlp", 1, False, similarity_loss="mse"),
    "cosine": Arch(
        "shared", "siamese", "mean", ("u", "v"), "none", "mlp", 1, False, sts_head="cosine", sts_projection=True
    ),
    "r4": Arch(
        "per-task", "siamese", "mean", ("u", "v", "diff"), "none", "mlp", 1, False, "gelu", "cosine", False, "mse"
    ),
}
DRAWING_ROUTINES = ("random-epoch", "random", "round-robin", "annealed")
ROUTINES_WITHOUT_ROUNDS = (*DRAWING_ROUTINES, "joint")  # they do not go through a task a given number of times
REFERENCE_BATCH = 64  # examples per step for which --lr is meant under --lr_scaling: R0's
PAIR_FEATURES = ("u", "v", "abs", "mul", "cos", "diff")
# What can be done with a trained model, and which options that looks at beside those of the machine.
USES_OF_A_MODEL: dict[str, tuple[str, ...]] = {
    "predict": ("pretrained",),
    "export": ("export_peft", "pretrained"),
    "export_peft": ("pretrained",),
    "evaluate": ("pretrained", "data_dir", "max_bad_rows", "run_dir", "test_predictions", "dev", "test"),
}


@dataclass
class FileOptions:
    """Data."""

    data_dir: str = option("data", "folder with the tasks' csv files", metavar="DIR")
    max_bad_rows: int = option(20, "unreadable rows to skip, over all files, before the run is refused", low=0)


@dataclass
class DataOptions(FileOptions):
    """Data."""

    max_train_examples: int | None = option(
        None,
        "use at most this many training examples of each task, the same ones whatever --seed is (default: all)",
        low=1,
    )
    max_length: int = option(512, "longest sequence in tokens; longer ones are truncated", low=4)
    extra_clean: bool = option(
        False, "clean texts by nltk: expand contractions, drop punctuation and stopwords but no negation, lemmatise"
    )


@dataclass
class ModelOptions:
    """Model. Flags left out follow --arch."""

    arch: str = option("yin-yang", "named set of the choices below", choices=tuple(ARCHS))
    pretrained: str = option(
        "bert-base-uncased", "start weights: all-MiniLM-L6-v2, another name of the hub, or a folder", metavar="NAME"
    )
    backbones: str | None = option(
        None, "how tasks share backbones", choices=("shared", "sentiment-similarity", "per-task")
    )
    pair_encoding: str | None = option(None, "pairs as two sequences or joined into one", choices=("siamese", "cross"))
    pooling: str | None = option(None, "sentence embedding: pooled first token or mean", choices=("cls", "mean"))
    pair_features: tuple[str, ...] | None = option(
        None, "comma-separated features of a siamese pair (diff is v-u)", choices=PAIR_FEATURES
    )
    pair_layer: str | None = option(
        None, "layer after the pair features that pair tasks share", choices=("none", "plain", "batchnorm")
    )
    clf: str | None = option(
        None,
        "head of each task: one linear layer, a hidden layer before it (nonlinear), a convolution and --head_layers "
        "(conv), or --head_layers (mlp)",
        choices=("linear", "nonlinear", "conv", "mlp"),
    )
    head_layers: int | None = option(None, "hidden layers of conv and mlp heads", low=0, high=64)
    head_width: int | None = option(
        None,
        "width of hidden layers (default: the backbone's in mlp heads, half of it in others)",
        low=1,
        high=MOST_WIDTH,
    )
    head_batchnorm: bool | None = option(None, "batch normalisation in nonlinear and conv heads")
    head_activation: str | None = option(None, "activation of the heads", choices=("relu", "gelu"))
    sts_head: str | None = option(None, "similarity from a head or from a cosine", choices=("regression", "cosine"))
    sts_projection: bool | None = option(None, "one linear layer and activation before the cosine")
    hidden_dropout_prob: float = option(0.3, "dropout in the heads", low=0.0, high=0.99)
    output_dropout_prob: float | None = option(
        None, "dropout before the last layer of mlp heads (default: --hidden_dropout_prob)", low=0.0, high=0.99
    )
    backbone_dropout_prob: float = option(0.1, "dropout in the backbones", low=0.0, high=0.99)
    shared_batchnorm_stats: bool = option(
        False, "one set of running statistics for all tasks in the shared pair layer, as in R0"
    )

    def resolved(self) -> "ModelOptions":
        """These options with what was left out filled in from the arch.

        Raises UserError where explicit choices contradict each other.
        """
        arch = ARCHS[self.arch]
        own = {f.name for f in fields(self)}
        left_out = [f.name for f in fields(arch) if f.name in own and getattr(self, f.name) is None]
        out = replace(self, **{name: getattr(arch, name) for name in left_out})
        if out.pair_encoding == "cross":
            for flag, given in (("--pair_features", self.pair_features), ("--sts_projection", self.sts_projection)):
                if given:
                    raise UserError(
                        f"{flag} works on two embeddings, but --pair_encoding cross makes one; drop one of the two"
                    )
            if self.sts_head == "cosine":
                raise UserError(
                    "--sts_head cosine compares two embeddings, but --pair_encoding cross makes one; "
                    "use --sts_head regression or --pair_encoding siamese"
                )
            out = replace(out, pair_features=(), sts_head="regression")
        elif not out.pair_features:
            raise UserError(
                "--pair_encoding siamese needs --pair_features, which this arch does not set; "
                f"name some of {','.join(PAIR_FEATURES)}"
            )
        if out.sts_head != "cosine":
            if self.sts_projection:
                raise UserError("--sts_projection belongs to --sts_head cosine; add that or drop it")
            out = replace(out, sts_projection=False)
        if out.clf == "conv" and out.pair_layer == "none" and set(out.pair_features or ()) == {"cos"}:
            raise UserError(
                "--clf conv looks at three neighbouring features, but --pair_features cos is one; "
                "add others or choose another --clf"
            )
        if self.head_layers is not None and out.clf not in ("conv", "mlp"):
            raise UserError(f"--head_layers belongs to --clf conv and mlp, not {out.clf}; drop one of the two")
        hidden_layers = {"linear": 0, "nonlinear": 1}.get(str(out.clf), out.head_layers)
        if self.head_width is not None and not hidden_layers:
            raise UserError(
                "--head_width is that of hidden layers, but this head has none; see --clf and --head_layers"
            )
        if self.output_dropout_prob is not None and (out.clf != "mlp" or not out.head_layers):
            raise UserError("--output_dropout_prob belongs to --clf mlp with --head_layers 1 or more; drop one of them")
        if self.head_batchnorm and out.clf not in ("nonlinear", "conv"):
            raise UserError(f"--head_batchnorm belongs to --clf nonlinear and conv, not {out.clf}; drop one of the two")
        if self.shared_batchnorm_stats and out.pair_layer != "batchnorm":
            raise UserError("--shared_batchnorm_stats belongs to --pair_layer batchnorm; add that or drop it")
        return replace(
            out,
            head_layers=out.head_layers if out.clf in ("conv", "mlp") else None,
            head_batchnorm=out.head_batchnorm if out.clf in ("nonlinear", "conv") else False,
        )


@dataclass
class LoraOptions:
    """Adapters."""

    lora_mode: str = option(
        "none",
        "wrap query, key and value (attn) or all linears (all-lin) of the backbones; -only freezes the rest",
        choices=("none", "attn", "attn-only", "all-lin", "all-lin-only"),
    )
    lora_rank: int = option(1, "rank r of the update", low=1, high=MOST_RANK)
    lora_alpha: float | None = option(None, "the update is scaled by alpha / r (default: alpha = r)", above=0.0)
    rslora: bool = option(False, "scale by alpha / sqrt(r) instead")
    lora_dropout: float = option(0.0, "dropout on the update's input", low=0.0, high=0.99)
    dora: bool = option(False, "DoRA: a trained magnitude for each row of the weight")
    dora_norm: str = option("row", "norm of DoRA; column is R0's formula to the letter", choices=("row", "column"))
    lora_targets: tuple[str, ...] | None = option(
        None,
        "comma-separated linears to wrap in place of the mode's",
        choices=("query", "key", "value", "attention_dense", "interm_dense", "out_dense"),
    )
    init_peft: str | None = option(None, "start from the LoRA or DoRA adapter in this folder of peft's", metavar="DIR")
    lora_dict: str | None = option(
        None, 'all flags of adapters as json, as in R0: \'{"mode": "attn-only", "r": 1, "dora": 1}\'', metavar="JSON"
    )


@dataclass
class PalOptions:
    """Projected attention and low-rank layers beside the backbones."""

    pal: str = option(
        "none",
        "layers of a task's own beside the backbone's: projected attention (pal), also with V_E and V_D shared by all "
        "layers (shared-v) or the attention too (shared-attention); low-rank; or mixed: shared-v below, low-rank above",
        choices=("none", "pal", "low-rank", "shared-v", "shared-attention", "mixed"),
    )
    pal_residual: str = option(
        "feed-forward",
        "sum that they are added to, at the end of the layer or after its attention (R1's alternative architecture AA)",
        choices=("feed-forward", "attention"),
    )
    pal_size: int = option(204, "width d_s of projected attention", low=1, high=MOST_WIDTH)
    pal_heads: int = option(12, "heads of projected attention, 6 in its authors' code", low=1)
    pal_low_rank_size: int = option(100, "width d_s of low-rank layers", low=1, high=MOST_WIDTH)
    pal_tasks: tuple[str, ...] | None = option(
        None, "comma-separated tasks that have them (default: all of the run)", metavar="NAMES"
    )


@dataclass
class TrainOptions:
    """Training."""

    epochs: int = option(7, "epochs", low=1, high=1_000_000)
    batch_size: int = option(64, "examples per step, over all processes", low=1)
    lr: float = option(1e-4, "base learning rate, multiplied by each task's own multiplier", above=0.0)
    lr_scaling: str = option(
        "none",
        "factor on --lr for another --batch_size than R0's 64: batch size / 64 (linear) or its square root (sqrt)",
        choices=("none", "linear", "sqrt"),
    )
    optim: str = option("Adamax", "optimizer", choices=("AdamW", "Adam", "Adamax", "RAdam", "SGD", "SparseAdam"))
    decoupled: bool = option(
        False, "decoupled weight decay in Adam, Adamax and RAdam", belongs=("optim", ("Adam", "Adamax", "RAdam"))
    )
    lr_schedule: str = option(
        "lambda",
        "course of the learning rate: --lr_lambda times as much each epoch (lambda); half a cosine down to 1/5 or 1/4 "
        "(cosine); up for --warmup and straight down to 0 (linear); to twice as much and back (triangular) or 8 times "
        "down (cyclic) in every 2 epochs",
        choices=("constant", "lambda", "cosine", "linear", "triangular", "cyclic"),
    )
    lr_lambda: float = option(
        0.5, "factor per epoch of --lr_schedule lambda", above=0.0, high=1.0, belongs=("lr_schedule", ("lambda",))
    )
    warmup: float = option(
        0.1,
        "share of the epochs that --lr_schedule linear rises for",
        low=0.0,
        high=1.0,
        belongs=("lr_schedule", ("linear",)),
    )
    lr_cycle: str = option(
        "restart",
        "--lr_schedule cyclic: each 2-epoch cycle starts again, or goes on from where the last one ended",
        choices=("restart", "cumulative"),
        belongs=("lr_schedule", ("cyclic",)),
    )
    init_from: str | None = option(
        None, "start from the weights of this checkpoint, with fresh optimizers", metavar="CHECKPOINT"
    )
    mlm: bool = option(
        False,
        "further pre-training: in place of labels, predict masked words of the training texts of the tasks of the run; "
        "dev and test files are not read, and everything trains unless --fine_tune_mode says otherwise",
    )
    fine_tune_mode: str = option(
        "iterative",
        "what of the backbones trains beside the heads: nothing, everything, or ever more layers from the top down",
        choices=("last-layer", "full-model", "iterative"),
    )
    unfreeze_every: int | None = option(
        None,
        "epochs of each stage of --fine_tune_mode iterative (default: 1, or 2 with --lr_schedule cyclic)",
        low=1,
        belongs=("fine_tune_mode", ("iterative",)),
    )
    cuda_graphs: bool = option(
        False,
        "replay the passes forward and back from CUDA graphs, one for each common size of batch (--use_gpu --amp)",
    )
    cache_frozen: bool = option(
        False, "compute what the frozen lower layers put out once, with dropout off in them, and keep it in memory"
    )
    routine: str = option(
        "sequential",
        "which task the next batch comes from: one task after the other (sequential), each in turn (interleave, "
        "round-robin), one drawn for each epoch or batch (random-epoch, random, annealed), or all at once (joint)",
        choices=("sequential", "interleave", *ROUTINES_WITHOUT_ROUNDS),
    )
    steps_per_epoch: int | None = option(
        None,
        "steps of an epoch in the routines that draw tasks (default: as many as all batches of all tasks, or of the "
        "one that random-epoch has drawn)",
        low=1,
        high=1_000_000,
        belongs=("routine", DRAWING_ROUTINES),
    )
    anneal_factor: float = option(
        0.8,
        "--routine annealed draws by size^a; a falls from 1 by this much",
        low=0.0,
        high=1.0,
        belongs=("routine", ("annealed",)),
    )
    pcgrad: bool = option(False, "--routine joint: take out of each task's gradient what works against another task's")
    smart_epsilon: float = option(1e-5, "largest perturbation of an embedding's coordinate in SMART", above=0.0)
    smart_sigma: float = option(1e-5, "deviation of the noise that SMART's perturbation starts from", low=0.0)
    smart_eta: float = option(1e-3, "length of SMART's ascent steps", above=0.0)
    smart_steps: int = option(1, "SMART's ascent steps, each a pass forward and one back", low=1)
    clip: float | None = option(None, "scale longer gradients down to this norm (default: never)", above=0.0)
    seed: int = option(11711, "seed of weights, order and dropout", low=0, high=2**63 - 1)
    eval_every: int = option(1, "epochs between evaluations on dev, of which the last epoch always has one", low=1)
    patience: int | None = option(
        None, "stop after this many evaluations without a better score (default: never)", low=1
    )
    refresh_batchnorm: bool = option(
        False, "evaluate with statistics of batch normalisation measured anew, without dropout (averages always do)"
    )
    average: str = option(
        "none",
        "evaluate and save a running average of the weights: exponential, or the mean of the ends of epochs",
        choices=("none", "ema", "swa"),
    )
    ema_decay: float = option(
        0.999,
        "share of the average that an update keeps: it looks back over some 1 / (1 - X) updates",
        low=0.0,
        high=0.999999,
        belongs=("average", ("ema",)),
    )
    ema_every: str = option(
        "step", "when --average ema is updated", choices=("step", "epoch"), belongs=("average", ("ema",))
    )
    ema_warmup: bool = option(
        False, "keep no more than the share (1 + t) / (10 + t) at update t", belongs=("average", ("ema",))
    )
    swa_from_epoch: int = option(
        1, "first epoch whose end counts in --average swa", low=1, belongs=("average", ("swa",))
    )

    def scaled_lr(self) -> float:
        """--lr after --lr_scaling: a larger batch makes fewer steps an epoch, each less noisy (Goyal et al. 2017)."""
        times = self.batch_size / REFERENCE_BATCH
        return self.lr * {"none": 1.0, "linear": times, "sqrt": math.sqrt(times)}[self.lr_scaling]

    def stage(self, epoch: int) -> int:
        """The stage of iterative unfreezing in `epoch`, both counted from 0.

        With the cyclic schedule each deepening begins a cycle of the learning rate, which has two epochs (R0, E.2).
        """
        return epoch // (self.unfreeze_every or (2 if self.lr_schedule == "cyclic" else 1))


@dataclass
class ComputeOptions:
    """Machine."""

    use_gpu: bool = option(False, "use cuda, else mps, else warn and use the CPU")
    amp: bool = option(False, "automatic mixed precision: bf16 where the device has it, else fp16 with a scaler")
    threads: int | None = option(
        None,
        "CPU threads (default: torch's own choice; under torchrun, the cores divided by its processes)",
        low=1,
        high=MOST_THREADS,
    )
    eval_batch_size: int = option(128, "examples per batch in evaluation", low=1)


@dataclass
class RunOptions:
    """Run."""

    run_dir: str | None = option(None, "folder of this run (default: runs/NAME)", metavar="DIR")
    name: str | None = option(None, "name of the run's folder in runs (default: arch and date)", metavar="NAME")
    filepath: str | None = option(None, "also save the best checkpoint here", metavar="FILE")
    overwrite: bool = option(False, "replace the run in --run_dir, finished or not")
    resume: bool = option(False, "go on with the unfinished run in --run_dir")
    save_every: str = option(
        "30m",
        "save what --resume needs every so many steps (500) or minutes (30m), after each epoch, and when SIGTERM, "
        "SIGUSR1 or Ctrl-C ends the run (exit codes 143, 138, 130)",
        metavar="N[m]",
    )
    dry_run: bool = option(False, "print the plan (parameters, steps, memory) and stop")
    evaluate: str | None = option(
        None,
        "score and predict with this checkpoint, without training, into --run_dir (default: a folder beside it)",
        metavar="CHECKPOINT",
    )
    export: str | None = option(
        None, "write the backbones of --evaluate's checkpoint here, as transformers reads them", metavar="DIR"
    )
    export_peft: str | None = option(
        None, "write the adapters of --evaluate's checkpoint here, as peft reads them", metavar="DIR"
    )
    predict: str | None = option(
        None,
        "label the sentences of this file (- for standard input) with --evaluate's checkpoint: one a line, or two with "
        "a tab between them",
        metavar="FILE",
    )
    task: str | None = option(None, "task of --predict, such as sst", metavar="NAME")
    test_predictions: bool = option(True, "predict the test files too")
    tensorboard: bool = option(True, "write TensorBoard events")
    benchmark: str | None = option(
        None, "measure training (each step waits for the device) and add a row to this csv file", metavar="FILE"
    )
    profile: bool = option(
        False, "record a few steps of the first epoch: tables of time and memory, and a trace in the run's folder"
    )
    fsdp: bool = option(
        False,
        "under torchrun, let each process keep only a part of the backbones' weights, gradients and optimizer states",
    )


@dataclass
class TaskOptions:
    """One task's own options; the flags carry its name."""

    enabled: bool = option(False, "train on {title}; tasks that are not named so are left out", template="train_{task}")
    lr_multiplier: float = option(1.0, "factor on --lr for {title}", template="{task}_lr_multiplier", above=0.0)
    weight_decay: float = option(0.0, "weight decay for {title}", template="{task}_weight_decay", low=0.0)
    num_trains: int = option(
        1, "times that an epoch goes through {title}", template="num_{task}_trains", low=0, high=1_000
    )
    loss: str = option("", "loss of {title}", template="{task}_loss")
    train: str | None = option(
        None, "training file of {title} (default: in --data_dir)", template="{task}_train", metavar="FILE"
    )
    dev: str | None = option(
        None, "dev file of {title} (default: in --data_dir)", template="{task}_dev", metavar="FILE"
    )
    test: str | None = option(
        None, "test file of {title} (default: in --data_dir)", template="{task}_test", metavar="FILE"
    )
    fraction: float = option(
        1.0,
        "share of the examples of {title} in each round, others every time",
        template="{task}_fraction",
        above=0.0,
        high=1.0,
    )
    from_epoch: int = option(1, "first epoch that trains {title}", template="{task}_from_epoch", low=1)
    extra: tuple[str, ...] | None = option(
        None,
        "comma-separated further training files of {title}; where labels are classes and all of one file are 0 or 1, "
        "1 counts as the highest",
        template="{task}_extra",
        metavar="FILES",
    )
    weight: float = option(
        1.0, "factor on the loss of {title}; its further losses have their own", template="{task}_weight", low=0.0
    )
    epoch_eval: int = option(
        1,
        "evaluate {title} after the last epoch and those whose number is a multiple of this; best.pt is chosen where "
        "all tasks are evaluated",
        template="{task}_epoch_eval",
        low=1,
    )
    embedding_loss: str = option(
        "none",
        "further loss on the sentence embeddings of {title}",
        template="{task}_embedding_loss",
        choices=("none", "contrastive", "simcse", "ranking", "cosine"),
    )
    embedding_weight: float = option(
        1.0, "factor on the further loss of {title}", template="{task}_embedding_weight", above=0.0
    )
    smart: float = option(
        0.0, "weight of SMART's adversarial regularisation of {title}", template="{task}_smart", low=0.0
    )
    bregman: float = option(
        0.0,
        "weight of staying close to the slow average of the weights, for {title}",
        template="{task}_bregman",
        low=0.0,
    )


@dataclass
class Config:
    """All options of a run. `tasks` holds the tasks of this run only, in the table's order."""

    data: DataOptions
    model: ModelOptions
    lora: LoraOptions
    pal: PalOptions
    train: TrainOptions
    compute: ComputeOptions
    run: RunOptions
    tasks: dict[str, TaskOptions]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, fit for json and for a checkpoint."""
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """The same in one level, by "group.option" and "tasks.NAME.option"."""
        plain = self.to_dict()
        tasks = {f"tasks.{name}.{key}": value for name, own in plain.pop("tasks").items() for key, value in own.items()}
        return {f"{name}.{key}": value for name, group in plain.items() for key, value in group.items()} | tasks

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_dict`; what is not there has its default, as in a configuration saved before it was.

        Raises TypeError for an option that does not exist or a value that it cannot have.
        """
        groups = {name: group(**values.get(name, {})) for name, group in GROUPS.items()}
        tasks = {name: TaskOptions(**own) for name, own in values["tasks"].items()}
        for options in (*groups.values(), *tasks.values()):
            hints = typing.get_type_hints(type(options))
            for name, value in vars(options).items():
                if isinstance(value, list) and typing.get_origin(_value_type(hints[name])) is tuple:
                    setattr(options, name, tuple(value))  # json has lists only
            check_values(options)
        return cls(tasks=tasks, **groups)


def highest(kind: Any, metadata: Mapping[str, Any]) -> Any:
    """The upper bound of an option, inclusive; None where there is none."""
    return metadata.get("high", MOST_NUMBER if kind is float else None)


def out_of_bounds(value: Any, kind: Any, metadata: Mapping[str, Any]) -> str:
    """Where a value lies outside an option's bounds and what they are; empty where it does not."""
    low, above, high = metadata.get("low"), metadata.get("above"), highest(kind, metadata)
    if low is not None and not value >= low:
        return f"too small; give at least {low}"
    if above is not None and not value > above:
        return f"too small; give more than {above}"
    if high is not None and not value <= high:  # nan too
        return f"too large; give at most {high}"
    return ""


def check_values(options: Any) -> None:
    """Raise TypeError where a field of a dataclass of options holds what no command line can have put there."""
    hints = typing.get_type_hints(type(options))
    for spec in fields(options):
        value, hint = getattr(options, spec.name), hints[spec.name]
        if value is None and _value_type(hint) is not hint:
            continue
        kind, metadata = _value_type(hint), spec.metadata
        items = value if isinstance(value, tuple) else (value,)
        if typing.get_origin(kind) is tuple:
            right = isinstance(value, tuple) and all(isinstance(item, str) for item in items)
        else:
            right = isinstance(value, (int, float) if kind is float else kind)
            right = right and isinstance(value, bool) == (kind is bool)
        choices = metadata.get("choices", items)
        if not right or any(item not in choices for item in items) or out_of_bounds(value, kind, metadata):
            raise TypeError(f"{spec.name} {reprlib.repr(value)}")


GROUPS: dict[str, type] = {
    "data": DataOptions,
    "model": ModelOptions,
    "lora": LoraOptions,
    "pal": PalOptions,
    "train": TrainOptions,
    "compute": ComputeOptions,
    "run": RunOptions,
}


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, since the usage of all flags would bury them."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def expand_arguments(argv: Iterable[str], seen: tuple[Path, ...] = ()) -> list[str]:
    """`argv` with @files replaced by the flags in them and every flag spelled --with_underscores.

    A file holds flags as a shell would read them, over any number of lines, # starting a comment. The reports print
    `-lr`, `--lr`, `--fine-tune-mode` and `--batch_size`: all are one spelling here.
    """
    out: list[str] = []
    for word in argv:
        if word.startswith("@"):
            path = Path(word[1:]).resolve()
            if path in seen:
                raise UserError(f"{word}: the file includes itself; remove the line that names it")
            try:
                text = path.read_text(encoding="utf-8")
                out += expand_arguments(shlex.split(without_comments(text)), (*seen, path))
            except (OSError, ValueError) as error:
                raise UserError(f"{word}: cannot read flags from this file ({error}); name a file of flags") from error
        elif re.match(r"--?[A-Za-z]", word) and word != "-h":
            name, equals, value = word.lstrip("-").partition("=")
            out.append("--" + name.replace("-", "_") + equals + value)
        else:
            out.append(word)
    return out


def without_comments(text: str) -> str:
    """Flags without what follows a # at the start of a word; one inside quotes is left alone."""
    return re.sub(r"""("[^"]*"|'[^']*')|(?:^|\s)#.*""", lambda found: found[1] or "", text, flags=re.MULTILINE)


def _value_type(hint: Any) -> Any:
    """The type inside an optional annotation."""
    if typing.get_origin(hint) is types.UnionType:
        return next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    return hint


def _checked(kind: Any, metadata: Mapping[str, Any]) -> Any:
    """A converter for argparse that also holds the option's bounds."""

    def convert(text: str) -> Any:
        if typing.get_origin(kind) is tuple:
            items = tuple(part for part in re.split(r"[,\s]+", text) if part)
            if not items:
                raise argparse.ArgumentTypeError(f"{text!r} names nothing; name at least one, or leave the flag out")
            for item in items:
                if item not in metadata.get("choices", items):
                    raise argparse.ArgumentTypeError(f"{item!r} is none of {', '.join(metadata['choices'])}")
            return items
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if problem := out_of_bounds(value, kind, metadata):
            raise argparse.ArgumentTypeError(f"{text} is {problem}")
        return value

    return convert


def add_option(group: Any, names: Sequence[str], dest: str, spec: "Field[Any]", hint: Any, help: str) -> None:
    """Add one dataclass field to an argparse group. What is not given stays out of the namespace."""
    kind, metadata = _value_type(hint), spec.metadata
    if not isinstance(spec.default, bool) and spec.default not in (None, ""):  # 1 and 0.0 are to be shown
        shown = ",".join(spec.default) if isinstance(spec.default, tuple) else spec.default
        help += f" (default: {shown})"
    help = help.replace("%", "%%")
    flags = [f"--{name}" for name in names]
    common: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS}
    if kind is bool:
        # both exist, so that a later flag can undo a recipe's; help shows the one that changes the default
        opposites = [f"--no_{name}" for name in names]
        on, off = (argparse.SUPPRESS, f"do not {help}") if spec.default is True else (help, argparse.SUPPRESS)
        group.add_argument(*flags, action="store_true", help=on, **common)
        group.add_argument(*opposites, action="store_false", help=off, **common)
        return
    choices = metadata.get("choices")
    many = typing.get_origin(kind) is tuple
    values = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(kind, "TEXT")
    common["metavar"] = metadata.get("metavar", values)
    group.add_argument(*flags, type=_checked(kind, metadata), choices=None if many else choices, help=help, **common)


def add_group(parser: argparse.ArgumentParser, name: str, cls: type) -> None:
    """A flag for each field of a dataclass, titled by its docstring."""
    group = parser.add_argument_group((cls.__doc__ or name).strip().removesuffix("."))
    hints = typing.get_type_hints(cls)
    for spec in fields(cls):
        add_option(group, [spec.name], f"{name}.{spec.name}", spec, hints[spec.name], spec.metadata["help"])


def task_defaults(task: Task) -> TaskOptions:
    """What the task table says of a task's options."""
    return TaskOptions(lr_multiplier=task.lr_multiplier, weight_decay=task.weight_decay, loss=task.losses[0])


def add_task(parser: argparse.ArgumentParser, task: Task, only: Sequence[str] = ()) -> None:
    """A task's own flags, or `only` some of them."""
    group = parser.add_argument_group(task.title)
    hints = typing.get_type_hints(TaskOptions)
    defaults = task_defaults(task)
    for spec in fields(TaskOptions):
        if only and spec.name not in only:
            continue
        names = [spec.metadata["template"].format(task=name) for name in (task.name, *task.aliases)]
        shown = field(
            default=getattr(defaults, spec.name),
            metadata={**spec.metadata, **({"choices": task.losses} if spec.name == "loss" else {})},
        )
        help = spec.metadata["help"].format(title=task.title)
        if spec.name == "loss" and task.kind == "similarity":
            help += "; some of --arch have another default"
        add_option(group, names, f"tasks.{task.name}.{spec.name}", shown, hints[spec.name], help)


def build_parser(
    prog: str,
    description: str,
    tasks: Mapping[str, Task],
    groups: Mapping[str, type] = GROUPS,
    only: Sequence[str] = (),
) -> OneLineParser:
    """A script's parser: a group of flags for each dataclass and for each row of the task table."""
    parser = OneLineParser(
        prog=prog,
        description=description,
        usage=f"{prog} [flags] [@file-of-flags]",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    for name, cls in groups.items():
        add_group(parser, name, cls)
    for task in tasks.values():
        add_task(parser, task, only)
    return parser


def groups_of(given: Mapping[str, Any], groups: Mapping[str, type]) -> dict[str, Any]:
    """An instance of each dataclass from `given`, which maps "group.option" to values."""
    return {
        name: cls(**{key.split(".")[1]: value for key, value in given.items() if key.split(".")[0] == name})
        for name, cls in groups.items()
    }


def task_options(given: Mapping[str, Any], task: Task, defaults: TaskOptions | None = None) -> TaskOptions:
    """A task's options from `given`, which maps "tasks.NAME.option" to values.

    Those that are not given are `defaults`, by default the task table's.
    """
    prefix = f"tasks.{task.name}."
    return replace(
        defaults or task_defaults(task),
        **{key.removeprefix(prefix): v for key, v in given.items() if key.startswith(prefix)},
    )


def assemble(given: Mapping[str, Any], tasks: Mapping[str, Task]) -> Config:
    """A Config from `given`, which maps "group.option" and "tasks.NAME.option" to values.

    Raises UserError, naming all problems at once.
    """
    groups = groups_of(given, GROUPS)
    similarity_loss = ARCHS[groups["model"].arch].similarity_loss
    options = {}
    for task in tasks.values():
        defaults = task_defaults(task)
        if task.kind == "similarity" and similarity_loss in task.losses:
            defaults.loss = similarity_loss
        options[task.name] = task_options(given, task, defaults)
    if groups["train"].mlm and "train.fine_tune_mode" not in given:
        groups["train"].fine_tune_mode = "full-model"
    named = [name for name, chosen in options.items() if chosen.enabled]
    default = [name for name in options if tasks[name].by_default and f"tasks.{name}.enabled" not in given]
    chosen = list(options) if "run.evaluate" in given else named or default  # a checkpoint knows its own tasks
    if not chosen:
        raise UserError("no task is left to train on; give at least one --train_NAME")
    config = Config(tasks={name: replace(options[name], enabled=True) for name in chosen}, **groups)
    problems = check(config, tasks) + check_evaluate(given)
    if config.pal.pal_tasks is not None:
        known = names_of(tasks)
        config.pal.pal_tasks = tuple(dict.fromkeys(known.get(name, name) for name in config.pal.pal_tasks))
    try:
        config.model = config.model.resolved()
    except UserError as error:
        problems.insert(0, str(error))
    if problems:
        raise UserError("; ".join(problems))
    return config


def names_of(tasks: Mapping[str, Task]) -> dict[str, str]:
    """Every name and alias that a task answers to, mapped to its name."""
    return {alias: name for name, task in tasks.items() for alias in (name, *task.aliases)}


def check(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """What is wrong with a combination of options, a sentence each."""
    return [
        *check_adapters(config),
        *check_run(config, tasks),
        *check_training(config),
        *check_embedding_losses(config, tasks),
        *check_cache_frozen(config),
        *check_pals(config, tasks),
        *check_mlm(config),
        *check_fsdp(config),
        *check_tasks(config),
    ]


def changed(options: Any) -> list[str]:
    """The names of options that have not their defaults."""
    return [spec.name for spec in fields(options) if getattr(options, spec.name) != spec.default]


def check_adapters(config: Config) -> list[str]:
    """What is wrong with the options of LoRA and DoRA."""
    problems, lora = [], config.lora
    adapters = changed(lora)
    for whole in ("lora_dict", "init_peft"):
        others = ", ".join(f"--{name}" for name in adapters if name != whole)
        if whole in adapters and others:
            problems.append(f"--{whole} says all that {others} says; give one or the other")
    if adapters and not {"lora_mode", "lora_dict", "init_peft"} & set(adapters):
        problems.append(f"--{adapters[0]} needs adapters; choose them with --lora_mode")
    if config.train.init_from is not None and adapters:
        problems.append(
            f"--init_from trains on from weights that no --pretrained holds, and --{adapters[0]} would save adapters "
            "without them; drop one of the two"
        )
    if lora.dora_norm != "row" and not lora.dora and lora.lora_dict is None:
        problems.append("--dora_norm belongs to --dora; add that or drop it")
    return problems


def check_run(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """What is wrong with what is asked for: with its files, or with what is to be done with a trained model."""
    problems, run = [], config.run
    for name in ("predict", "export", "export_peft"):
        if getattr(run, name) is not None and run.evaluate is None:
            problems.append(f"--{name} needs a trained model; name its checkpoint with --evaluate")
    if run.benchmark is not None and run.profile:
        problems.append("--profile slows the steps that --benchmark measures; give one of the two")
    if run.benchmark is not None and config.train.cuda_graphs:
        problems.append("--cuda_graphs hides memory from the figures of --benchmark; give one of the two")
    if run.predict is not None and run.task is None:
        problems.append(f"--predict needs --task, one of {', '.join(tasks)}")
    known = names_of(tasks)
    if run.task is not None and run.predict is None:
        problems.append("--task belongs to --predict; add that or drop it")
    if run.task is not None and run.task not in known:
        problems.append(f"--task {run.task} is none of {', '.join(known)}")
    if run.overwrite and run.resume:
        problems.append("--overwrite starts afresh and --resume goes on; give one of the two")
    if run.resume and run.run_dir is None:
        problems.append("--resume needs --run_dir, the folder of the unfinished run")
    if run.name is not None and run.run_dir is not None:
        problems.append("--name is that of a folder in runs, but --run_dir gives the folder; give one of the two")
    if not re.fullmatch(SAVE_EVERY, run.save_every):
        problems.append(f"--save_every {run.save_every}: give steps, such as 500, or minutes, such as 30m")
    return problems


def check_training(config: Config) -> list[str]:
    """What is wrong with how the run trains."""
    problems, train = [], config.train
    if train.optim == "SparseAdam":
        problems.append("--optim SparseAdam refuses the dense gradients of a BERT; use Adam or Adamax")
    problems += check_belongs(train)
    if train.routine in ROUTINES_WITHOUT_ROUNDS:
        problems += [
            f"--num_{name}_trains belongs to --routine sequential and interleave, not {train.routine}; drop one"
            for name, own in config.tasks.items()
            if own.num_trains > 1
        ]
    if train.pcgrad and train.routine != "joint":
        problems.append(f"--pcgrad needs the gradients of all tasks at once, but --routine {train.routine}; use joint")
    smart = [name for name, own in config.tasks.items() if own.smart > 0.0]
    for name in changed(train):
        if name.startswith("smart_") and not smart:
            problems.append(f"--{name} belongs to SMART; choose tasks for it with --NAME_smart, such as --sst_smart 1")
    if smart and train.cache_frozen:
        problems.append(
            f"--{smart[0]}_smart perturbs the embeddings, which --cache_frozen leaves out; drop one of them"
        )
    if train.cuda_graphs and not (config.compute.use_gpu and config.compute.amp):
        problems.append("--cuda_graphs needs --use_gpu and --amp; add them or drop it")
    return problems


def check_tasks(config: Config) -> list[str]:
    """What is wrong with when the tasks train and are averaged, and with the weights of their losses."""
    problems, train = [], config.train
    if train.average == "swa" and train.swa_from_epoch > train.epochs:
        problems.append(f"--swa_from_epoch {train.swa_from_epoch} is past --epochs {train.epochs}; lower it")
    problems += [
        f"--{name}_from_epoch {own.from_epoch} is past --epochs {train.epochs}; lower it"
        for name, own in config.tasks.items()
        if own.from_epoch > train.epochs
    ]
    problems += [
        f"--lr {train.lr:g} times --{name}_lr_multiplier {own.lr_multiplier:g} is too large; lower one of the two"
        for name, own in config.tasks.items()
        if train.scaled_lr() * own.lr_multiplier > MOST_RATE
    ]
    if all(chosen.num_trains == 0 for chosen in config.tasks.values()):
        problems.append("every --num_NAME_trains is 0, so no task trains; set one to 1 or more")
    elif min(chosen.from_epoch for chosen in config.tasks.values() if chosen.num_trains) > 1:
        problems.append("no task trains in epoch 1; set one --NAME_from_epoch to 1")
    lost = [own.weight == own.smart == own.bregman == 0.0 for own in config.tasks.values()]
    if all(lost) and not train.mlm and all(own.embedding_loss == "none" for own in config.tasks.values()):
        problems.append("every --NAME_weight is 0 and no other loss is chosen, so nothing would be learned; raise one")
    return problems


def check_belongs(options: TrainOptions) -> list[str]:
    """What is set although the option that it belongs to has a value under which it means nothing."""
    problems = []
    for name in changed(options):
        owner, values = options.__dataclass_fields__[name].metadata.get("belongs", (None, ()))
        if owner is not None and (chosen := getattr(options, owner)) not in values:
            problems.append(
                f"--{name} belongs to --{owner} {', '.join(values)}, not {chosen}; drop one of the two, or give "
                f"--{name} its default"
            )
    return problems


def check_evaluate(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with the flags beside --evaluate, of `given` as `assemble` has it."""
    if "run.evaluate" not in given:
        return []
    use = next(name for name in USES_OF_A_MODEL if f"run.{name}" in given)
    known = {"evaluate", "task", use, *USES_OF_A_MODEL[use]}
    idle = [key for key in given if not key.startswith("compute.") and key.rpartition(".")[2] not in known]
    if not idle:
        return []
    flags = ", ".join(map(flag_of, idle))
    return [f"--{use} takes a trained model as it is, for which {flags} would change nothing; drop what is idle"]


def flag_of(key: str) -> str:
    """The flag of an option "group.option" or "tasks.NAME.option"."""
    _, *task, name = key.split(".")
    return "--" + (TaskOptions.__dataclass_fields__[name].metadata["template"].format(task=task[0]) if task else name)


def check_embedding_losses(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """What is wrong with --NAME_embedding_loss."""
    problems = []
    pairs = config.model.pair_encoding or ARCHS[config.model.arch].pair_encoding
    for name, own in config.tasks.items():
        flag = f"--{name}_embedding_loss {own.embedding_loss}"
        if own.embedding_loss == "none" and own.embedding_weight != 1.0:
            problems.append(f"--{name}_embedding_weight belongs to --{name}_embedding_loss; add that or drop it")
        if own.embedding_loss in ("contrastive", "ranking", "cosine") and not (
            tasks[name].is_pair and pairs == "siamese"
        ):
            problems.append(f"{flag} compares two embeddings; it needs a pair task and --pair_encoding siamese")
        if own.embedding_loss == "simcse" and config.model.backbone_dropout_prob == 0.0:
            problems.append(f"{flag} needs two different dropout views; raise --backbone_dropout_prob above 0")
    return problems


def check_mlm(config: Config) -> list[str]:
    """What is wrong with --mlm."""
    if not config.train.mlm:
        return []
    problems = []
    if config.train.patience is not None:
        problems.append("--patience waits for a better score on dev, which --mlm does not read; drop one of the two")
    if config.train.cache_frozen:
        problems.append("--cache_frozen keeps what whole texts become, but --mlm masks them anew; drop one of the two")
    if config.train.cuda_graphs:
        problems.append("--cuda_graphs replays passes over whole texts, but --mlm masks them anew; drop one of the two")
    for name, own in config.tasks.items():
        given = {"smart": own.smart > 0.0, "bregman": own.bregman > 0.0, "embedding_loss": own.embedding_loss != "none"}
        problems += [
            f"--{name}_{flag} adds to the loss on labels, which --mlm does without; drop one of the two"
            for flag, there in given.items()
            if there
        ]
    return problems


def check_fsdp(config: Config) -> list[str]:
    """What is wrong with --fsdp."""
    if not config.run.fsdp:
        return []
    problems = []
    if config.train.average != "none":
        problems.append(
            f"--average {config.train.average} keeps a second set of weights, which --fsdp does not shard; drop one of "
            "the two"
        )
    if config.train.pcgrad:
        problems.append(
            "--pcgrad compares whole gradients, of which --fsdp leaves each process a part; drop one of the two"
        )
    problems += [
        f"--{name}_bregman keeps a second set of weights, which --fsdp does not shard; drop one of the two"
        for name, own in config.tasks.items()
        if own.bregman > 0.0
    ]
    return problems


def check_cache_frozen(config: Config) -> list[str]:
    """What is wrong with --cache_frozen."""
    if not config.train.cache_frozen:
        return []
    problems = []
    mode, lora = config.train.fine_tune_mode, config.lora
    if config.train.cuda_graphs:
        problems.append(
            "--cuda_graphs replays whole passes, of which --cache_frozen leaves out a part; drop one of them"
        )
    if mode == "full-model":
        problems.append(
            "--cache_frozen keeps what frozen layers put out, but --fine_tune_mode full-model freezes none; "
            "use last-layer or iterative, or drop --cache_frozen"
        )
    if mode == "last-layer" and (lora.lora_mode != "none" or lora.lora_dict or lora.init_peft):
        problems.append(
            "--cache_frozen keeps what frozen layers put out, but --fine_tune_mode last-layer trains the adapters "
            "(--lora_mode) in every layer; use --fine_tune_mode iterative or drop --cache_frozen"
        )
    if config.pal.pal != "none":
        problems.append(
            f"--cache_frozen keeps what frozen layers put out, but --pal {config.pal.pal} trains beside every layer; "
            "drop one of the two"
        )
    problems += [
        f"--{name}_embedding_loss {own.embedding_loss} looks at more than --cache_frozen keeps; drop one of the two"
        for name, own in config.tasks.items()
        if own.embedding_loss in ("simcse", "ranking")
    ]
    return problems


def check_pals(config: Config, tasks: Mapping[str, Task]) -> list[str]:
    """What is wrong with --pal and the flags that belong to it."""
    pal, known = config.pal, names_of(tasks)
    given = changed(pal)
    if pal.pal == "none":
        return [f"--{given[0]} belongs to --pal; choose a kind with --pal or drop it"] if given else []
    without = {"low-rank": ("pal_size", "pal_heads"), "mixed": ()}.get(pal.pal, ("pal_low_rank_size",))
    problems = [f"--{name} has no effect on --pal {pal.pal}; drop one of the two" for name in without if name in given]
    if pal.pal != "low-rank" and pal.pal_size % pal.pal_heads:
        problems.append(
            f"--pal_size {pal.pal_size} is not a multiple of --pal_heads {pal.pal_heads}; "
            f"give --pal_size {pal.pal_heads * math.ceil(pal.pal_size / pal.pal_heads)} or other heads"
        )
    for name in pal.pal_tasks or ():
        if name not in known:
            problems.append(f"--pal_tasks {name} is none of {', '.join(known)}")
        elif known[name] not in config.tasks:
            problems.append(f"--pal_tasks {name} is not trained in this run; add --train_{name} or drop it")
    return problems


def check_processes(config: Config) -> None:
    """Raise UserError for what does not go with the processes that torchrun started, or with none of them.

    Apart from `assemble`, since a configuration may also be read of a run that others started elsewhere.
    """
    run, train = config.run, config.train
    if processes() == 1:
        if run.fsdp:
            raise UserError(
                "--fsdp shards the backbones over processes, and this is the only one; use torchrun or drop it"
            )
        return
    alone = [name for name in ("predict", "export", "export_peft") if getattr(run, name) is not None]
    problems = [f"--{name} works in one process; start it without torchrun" for name in alone + ["mlm"] * train.mlm]
    if train.cuda_graphs:
        problems.append("--cuda_graphs records the passes of one process; drop it or torchrun")
    if train.cache_frozen:
        problems.append("--cache_frozen keeps the examples in the memory of one process; drop it or torchrun")
    if problems:
        raise UserError("; ".join(problems))


def parse(argv: Sequence[str], tasks: Mapping[str, Task], prog: str, description: str) -> Config:
    """The configuration that a command line asks for.

    Exits with code 2 and one line for a flag or value that does not exist; raises UserError for a bad combination.
    """
    namespace = build_parser(prog, description, tasks).parse_args(expand_arguments(argv))
    config = assemble(vars(namespace), tasks)
    check_processes(config)
    return config


GRACE = 5.0  # seconds that the process which says what went wrong has before the others end


def processes() -> int:
    """How many processes torchrun started for this run; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else 1


def speaks() -> bool:
    """Whether this process is the one that talks to people: the only one, or the first of those of torchrun."""
    return processes() == 1 or os.environ["RANK"] == "0"


@contextmanager
def said_once() -> Iterator[None]:
    """Inside, what is wrong is wrong in all processes, and only the first one says so."""
    if speaks():
        yield
        return
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    except (UserError, SystemExit) as error:
        time.sleep(GRACE)  # torchrun ends all when one has ended
        sys.exit(error.code if isinstance(error, SystemExit) else 2)


def say(line: str) -> None:
    """Print a line at once, even into a file."""
    if speaks():
        print(line, flush=True)


class LogLines:
    """Standard error for a bar of tqdm that goes into a file or a pipe: each of its states becomes a line there."""

    def write(self, text: str) -> None:
        """Print what is no white space, with which a terminal's bar is drawn over."""
        if line := text.strip():
            print(line, file=sys.stderr)

    def flush(self) -> None:
        """As tqdm asks for it."""
        sys.stderr.flush()


def bar_style() -> dict[str, Any]:
    """How tqdm shows a bar: drawn over and over for people, a line every half minute in a file or a pipe."""
    if sys.stderr.isatty():
        return {"dynamic_ncols": True}
    numbers = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return {"file": LogLines(), "bar_format": numbers, "mininterval": 30.0}


def drop_output() -> None:
    """Let go of output that cannot be written, since else the interpreter complains at its end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_script(main: Any, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a script's main; a UserError, or one of the system, becomes one line on standard error and exit code 2."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("minbert").setLevel(logging.INFO if speaks() else logging.WARNING)
    try:
        try:
            main(sys.argv[1:] if argv is None else list(argv))
        finally:
            print(end="", flush=True)  # here, where an error of it is seen; there may be no standard output
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory ({first_line(error):.200}); lower --eval_batch_size, --batch_size or --max_length, "
            "or choose a smaller model or an --optim with less state",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:  # who read our output, such as head, has gone
        drop_output()
        sys.exit(1)
    except OSError as error:  # such as a full disk, which may be that of standard output
        drop_output()
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
