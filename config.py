"""Every option once: dataclasses that are the command line, the checks and the saved configuration.

A field made by `option` is one flag: its name, type, default, help, choices and bounds stand here and nowhere else.
`parse` turns a command line into a `Config`; all that is wrong with it is gathered and reported at once.
"""

import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from utils.errors import UserError


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is also a flag.

    Metadata: `choices`, `low` and `high` (inclusive bounds), `above` (exclusive lower bound), `metavar`, `template`
    (a per-task flag's name with {task} in it), `requires` (another option of its group and the values of that under
    which it means anything).
    """
    return field(default=default, metadata={"help": help, **metadata})


SAVE_EVERY = r"([1-9]\d{0,8})(m?)"  # --save_every: steps, or minutes
MAX_SIZE, MAX_LAYERS = 1 << 24, 128  # beyond any BERT; a damaged file must not make us count for hours
MAX_WIDTH, MAX_THREADS = 1 << 16, 1024  # beyond any use; far beyond it, the machine stands still
MAX_RANK = 1 << 44  # beyond any memory, which is a trial's row in a study; a tensor of it can still be asked for
MAX_NUMBER, MAX_RATE = 1e30, 1e36  # of an option, of a learning rate: what optimizers make of it still fits into fp32


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
            high = 1 if real else MAX_LAYERS if spec.name == "num_hidden_layers" else MAX_SIZE
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
        high=MAX_WIDTH,
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
    lora_rank: int = option(1, "rank r of the update", low=1, high=MAX_RANK)
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
    pal_size: int = option(204, "width d_s of projected attention", low=1, high=MAX_WIDTH)
    pal_heads: int = option(12, "heads of projected attention, 6 in its authors' code", low=1)
    pal_low_rank_size: int = option(100, "width d_s of low-rank layers", low=1, high=MAX_WIDTH)
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
        False, "decoupled weight decay in Adam, Adamax and RAdam", requires=("optim", ("Adam", "Adamax", "RAdam"))
    )
    lr_schedule: str = option(
        "lambda",
        "course of the learning rate: --lr_lambda times as much each epoch (lambda); half a cosine down to 1/5 or 1/4 "
        "(cosine); up for --warmup and straight down to 0 (linear); to twice as much and back (triangular) or 8 times "
        "down (cyclic) in every 2 epochs",
        choices=("constant", "lambda", "cosine", "linear", "triangular", "cyclic"),
    )
    lr_lambda: float = option(
        0.5, "factor per epoch of --lr_schedule lambda", above=0.0, high=1.0, requires=("lr_schedule", ("lambda",))
    )
    warmup: float = option(
        0.1,
        "share of the epochs that --lr_schedule linear rises for",
        low=0.0,
        high=1.0,
        requires=("lr_schedule", ("linear",)),
    )
    lr_cycle: str = option(
        "restart",
        "--lr_schedule cyclic: each 2-epoch cycle starts again, or goes on from where the last one ended",
        choices=("restart", "cumulative"),
        requires=("lr_schedule", ("cyclic",)),
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
        requires=("fine_tune_mode", ("iterative",)),
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
        requires=("routine", DRAWING_ROUTINES),
    )
    anneal_factor: float = option(
        0.8,
        "--routine annealed draws by size^a; a falls from 1 by this much",
        low=0.0,
        high=1.0,
        requires=("routine", ("annealed",)),
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
        requires=("average", ("ema",)),
    )
    ema_every: str = option(
        "step", "when --average ema is updated", choices=("step", "epoch"), requires=("average", ("ema",))
    )
    ema_warmup: bool = option(
        False, "keep no more than the share (1 + t) / (10 + t) at update t", requires=("average", ("ema",))
    )
    swa_from_epoch: int = option(
        1, "first epoch whose end counts in --average swa", low=1, requires=("average", ("swa",))
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
        high=MAX_THREADS,
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
                if isinstance(value, list) and typing.get_origin(value_type(hints[name])) is tuple:
                    setattr(options, name, tuple(value))  # json has lists only
            check_values(options)
        return cls(tasks=tasks, **groups)


def upper_bound(kind: Any, metadata: Mapping[str, Any]) -> Any:
    """The upper bound of an option, inclusive; None where there is none."""
    return metadata.get("high", MAX_NUMBER if kind is float else None)


def out_of_bounds(value: Any, kind: Any, metadata: Mapping[str, Any]) -> str:
    """Where a value lies outside an option's bounds and what they are; empty where it does not."""
    low, above, high = metadata.get("low"), metadata.get("above"), upper_bound(kind, metadata)
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
        if value is None and value_type(hint) is not hint:
            continue
        kind, metadata = value_type(hint), spec.metadata
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


def value_type(hint: Any) -> Any:
    """The type inside an optional annotation."""
    if typing.get_origin(hint) is types.UnionType:
        return next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    return hint
