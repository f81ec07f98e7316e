"""Every option once: dataclasses that define the flags, their bounds and the saved configuration.

Each field made by `option` is one flag. Its name, type, default, help, choices and bounds stand here and nowhere else.
`cli.parser` turns a command line into a `Config`, and `cli.checks` says which options exclude each other.
"""

import math
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from utils.errors import UserError
from utils.options import check_values, option, value_type

SAVE_EVERY = r"([1-9]\d{0,8})(m?)"  # --save_every: steps, or minutes
MAX_SIZE, MAX_LAYERS = 1 << 24, 128  # larger than any BERT; more would let a damaged file keep us busy for hours
MAX_WIDTH, MAX_THREADS = 1 << 16, 1024  # larger than any use; far larger values bring the machine to a standstill
MAX_RANK = 1 << 44  # does not fit into memory, which a study records as a failed trial; torch can still address it
MAX_RATE = 1e36  # of a learning rate, so that optimizers stay within fp32


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT backbone. The field names are those of a Hugging Face config.json."""

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
        """Return the shape that a Hugging Face configuration describes. Unknown keys are ignored.

        Raises UserError, naming `source`, if the configuration has another architecture, activation or position
        embedding than a BERT, or an impossible size.
        """
        gelus = ("gelu", "gelu_python")  # the second spells out the same function
        expected = {"model_type": ("bert",), "hidden_act": gelus, "position_embedding_type": ("absolute",)}
        for key, known in expected.items():
            if values.get(key, known[0]) not in known:
                raise UserError(
                    f"{source}: {key} is {reprlib.repr(values[key])}, but only {known[0]!r} is supported; choose a BERT"
                )
        sizes = {spec.name: values.get(spec.name, spec.default) for spec in fields(cls)}
        for spec in fields(cls):
            value, real = sizes[spec.name], isinstance(spec.default, float)
            low = 0 if real or spec.name == "pad_token_id" else 1
            high = 1 if real else MAX_LAYERS if spec.name == "num_hidden_layers" else MAX_SIZE
            numeric = isinstance(value, (int, float) if real else int) and not isinstance(value, bool)
            if not numeric or not low <= value <= high:
                raise UserError(f"{source}: {spec.name} is {reprlib.repr(value)}, which is impossible; use a BERT's")
        config = cls(**sizes)
        if config.pad_token_id >= config.vocab_size:
            raise UserError(f"{source}: pad_token_id {config.pad_token_id} is beyond vocab_size {config.vocab_size}")
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"{source}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                f"{config.num_attention_heads}; the heads need equal widths"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the Hugging Face config.json of this shape."""
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            **asdict(self),
        }


@dataclass(frozen=True)
class Arch:
    """A named set of model choices (METHODS: architectures). A flag overrides each of them."""

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
    "v1": Arch(
        "shared", "siamese", "cls", ("u", "v"), "none", "linear", 0, False, sts_head="cosine", similarity_loss="mse"
    ),
    "v2": Arch("shared", "cross", "cls", (), "none", "mlp", 1, False, similarity_loss="mse"),
    "cosine": Arch("shared", "siamese", "mean", ("u", "v"), "none", "mlp", 1, False, "relu", "cosine", True, "mse"),
    "r4": Arch(
        "per-task", "siamese", "mean", ("u", "v", "diff"), "none", "mlp", 1, False, "gelu", "cosine", False, "mse"
    ),
}
DRAWING_ROUTINES = ("random-epoch", "random", "round-robin", "annealed")  # they ignore --num_NAME_trains
REFERENCE_BATCH = 64  # the batch size that --lr is meant for under --lr_scaling, which is R0's
COSINE_HEADS = ("cosine", "residual")  # choices of --sts_head that compare two embeddings
PAIR_FEATURES = ("u", "v", "abs", "mul", "cos", "diff")


@dataclass
class FileOptions:
    """Data."""

    data_dir: str = option("data", "folder with the tasks' csv files", metavar="DIR")
    max_bad_rows: float = option(
        20,
        "refuse the run if more rows than this are unreadable, over all files, or a larger share of a file (1%)",
        low=0,
        metavar="N[%]",
        percent=True,
    )
    quoting: str = option(
        "csv",
        "quotes around a field: as in csv, or a part of the text, as in GLUE's files (none)",
        choices=("csv", "none"),
    )


@dataclass
class DataOptions(FileOptions):
    """Data."""

    max_train_examples: int | None = option(
        None,
        "use at most so many training examples of each task, the same for every --seed (default: all)",
        low=1,
    )
    max_length: int = option(512, "largest number of tokens in a sequence; longer ones are truncated", low=4)
    extra_clean: bool = option(
        False, "clean texts with nltk: expand contractions, drop punctuation and stopwords (negations stay), lemmatise"
    )


@dataclass
class ModelOptions:
    """Model. Flags left out follow --arch."""

    arch: str = option("yin-yang", "named set of the choices below", choices=tuple(ARCHS))
    pretrained: str = option(
        "bert-base-uncased", "start weights: all-MiniLM-L6-v2, a hub name, or a folder", metavar="NAME"
    )
    backbones: str | None = option(None, "sharing of backbones", choices=("shared", "sentiment-similarity", "per-task"))
    pair_encoding: str | None = option(None, "pairs as two sequences or joined into one", choices=("siamese", "cross"))
    pooling: str | None = option(None, "sentence embedding: pooled first token or mean", choices=("cls", "mean"))
    pair_features: tuple[str, ...] | None = option(
        None, "comma-separated features of a siamese pair (diff is v-u)", choices=PAIR_FEATURES
    )
    pair_layer: str | None = option(
        None,
        "layer after the pair features that pair tasks share: one linear layer, or two with a ReLU between (plain) "
        "and with batch normalisation (batchnorm)",
        choices=("none", "linear", "plain", "batchnorm"),
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
        "width of hidden layers (default: the backbone's for mlp, half of it for others)",
        low=1,
        high=MAX_WIDTH,
    )
    head_batchnorm: bool | None = option(None, "batch normalisation in nonlinear and conv heads")
    head_activation: str | None = option(None, "activation of the heads", choices=("relu", "gelu"))
    sts_head: str | None = option(
        None,
        "similarity from a head, from a cosine, or from a cosine to which a head adds what it learns (residual)",
        choices=("regression", "cosine", "residual"),
    )
    sts_projection: bool | None = option(
        None, "one linear layer and activation before the cosine (--NAME_head_layers: several)"
    )
    hidden_dropout_prob: float = option(0.3, "dropout in the heads", low=0.0, high=0.99)
    output_dropout_prob: float | None = option(
        None, "dropout before the last layer of mlp heads (default: --hidden_dropout_prob)", low=0.0, high=0.99
    )
    backbone_dropout_prob: float = option(0.1, "dropout in the backbones", low=0.0, high=0.99)
    shared_batchnorm_stats: bool = option(False, "one set of running statistics in the pair layer, as in R0")

    def resolved(self) -> "ModelOptions":
        """Return a copy: the arch fills in what was left out, and choices without effect are cleared."""
        arch = ARCHS[self.arch]
        shared = {f.name for f in fields(arch)} & {f.name for f in fields(self)}
        out = replace(self, **{name: getattr(arch, name) for name in shared if getattr(self, name) is None})
        if out.sts_head != "cosine":
            out = replace(out, sts_projection=False)
        if out.clf not in ("conv", "mlp"):
            out = replace(out, head_layers=None)
        if out.clf not in ("nonlinear", "conv"):
            out = replace(out, head_batchnorm=False)
        return out


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
    dora: bool = option(False, "DoRA: train a magnitude for each row of the weight")
    dora_norm: str = option("row", "norm of DoRA; column follows R0's formula to the letter", choices=("row", "column"))
    lora_targets: tuple[str, ...] | None = option(
        None,
        "comma-separated linears to wrap instead of those of --lora_mode",
        choices=("query", "key", "value", "attention_dense", "interm_dense", "out_dense"),
    )
    init_peft: str | None = option(None, "start from the adapter that peft saved in this folder", metavar="DIR")
    lora_dict: str | None = option(
        None, 'all flags of adapters as json, as in R0: \'{"mode": "attn-only", "r": 1, "dora": 1}\'', metavar="JSON"
    )


@dataclass
class PalOptions:
    """Projected attention and low-rank layers beside the backbones."""

    pal: str = option(
        "none",
        "layers of each task beside those of the backbone: projected attention (pal), with V_E and V_D shared by all "
        "layers (shared-v), with the attention shared too (shared-attention), low-rank layers (low-rank), or shared-v "
        "in the lower half and low-rank in the upper one (mixed)",
        choices=("none", "pal", "low-rank", "shared-v", "shared-attention", "mixed"),
    )
    pal_residual: str = option(
        "feed-forward",
        "residual sum that their output joins: at the end of the layer, or after its attention (R1's alternative "
        "architecture AA)",
        choices=("feed-forward", "attention"),
    )
    pal_size: int = option(204, "width d_s of projected attention", low=1, high=MAX_WIDTH)
    pal_heads: int = option(12, "heads of projected attention, 6 in its authors' code", low=1)
    pal_low_rank_size: int = option(100, "width d_s of low-rank layers", low=1, high=MAX_WIDTH)
    pal_tasks: tuple[str, ...] | None = option(
        None, "comma-separated tasks that get these layers (default: all tasks of the run)", metavar="NAMES"
    )


@dataclass
class TrainOptions:
    """Training."""

    epochs: int = option(7, "number of epochs", low=1, high=1_000_000)
    batch_size: int = option(64, "examples per step, over all processes", low=1)
    lr: float = option(1e-4, "base learning rate, multiplied by each task's own multiplier", above=0.0)
    lr_scaling: str = option(
        "none",
        "scale --lr for another --batch_size than R0's 64: by batch size / 64 (linear) or its square root (sqrt)",
        choices=("none", "linear", "sqrt"),
    )
    optim: str = option("Adamax", "optimizer", choices=("AdamW", "Adam", "Adamax", "RAdam", "SGD"))
    optimizers: str | None = option(
        None,
        "an optimizer for each task, as R0's last runs have, or one for all tasks, which have one rate and one decay "
        "then (default: per-task; --routine joint always has one)",
        choices=("per-task", "one"),
    )
    decoupled: bool = option(
        False, "decoupled weight decay in Adam, Adamax and RAdam", requires=("optim", ("Adam", "Adamax", "RAdam"))
    )
    lr_schedule: str = option(
        "lambda",
        "learning rate over the run: multiplied by --lr_lambda each epoch (lambda); half a cosine down to 1/5 or 1/4 "
        "(cosine); up for --warmup, then straight down to 0 (linear); in every 2 epochs up to twice its value and back "
        "(triangular) or down to 1/8 (cyclic)",
        choices=("constant", "lambda", "cosine", "linear", "triangular", "cyclic"),
    )
    lr_lambda: float = option(
        0.5, "factor per epoch of --lr_schedule lambda", above=0.0, high=1.0, requires=("lr_schedule", ("lambda",))
    )
    warmup: float = option(
        0.1,
        "--lr_schedule linear: share of epochs that rise",
        low=0.0,
        high=1.0,
        requires=("lr_schedule", ("linear",)),
    )
    layer_lr_decay: float = option(
        1.0,
        "learning rate of a layer as a share of that of the layer above; embeddings are lowest",
        above=0.0,
        high=1.0,
    )
    lr_cycle: str = option(
        "restart",
        "--lr_schedule cyclic: each cycle of 2 epochs starts again, or continues where the last one ended",
        choices=("restart", "cumulative"),
        requires=("lr_schedule", ("cyclic",)),
    )
    init_from: str | None = option(
        None, "start from the weights of this checkpoint, with fresh optimizers", metavar="CHECKPOINT"
    )
    mlm: bool = option(
        False,
        "further pre-training: instead of labels, predict masked words of the training texts of the run's tasks; "
        "dev and test files are not read, and everything trains unless --fine_tune_mode says otherwise",
    )
    fine_tune_mode: str = option(
        "iterative",
        "layers that train beside the heads: none, all, or more in each stage, from the top down",
        choices=("last-layer", "full-model", "iterative"),
        # the words of the course's handout, which once called the flag --option
        synonyms={"last-linear-layer": "last-layer", "pretrain": "last-layer", "finetune": "full-model"},
    )
    unfreeze_every: int | None = option(
        None,
        "epochs of each stage of --fine_tune_mode iterative (default: 1, or 2 with --lr_schedule cyclic)",
        low=1,
        requires=("fine_tune_mode", ("iterative",)),
    )
    cuda_graphs: bool = option(
        False,
        "replay forward and backward passes from CUDA graphs, one for each common size of batch (--use_gpu --amp)",
    )
    compile: bool = option(
        False,
        "let torch compile what a layer does after attention: a step has fewer kernels, the first one waits a minute",
    )
    micro_batch_size: int | None = option(
        None,
        "most sequences that a backbone takes at a time; a larger batch goes in parts, with less memory, the same "
        "gradient and one more pass forward. A compared pair has two sequences (default: the whole batch)",
        low=1,
    )
    cache_frozen: bool = option(False, "compute the frozen layers' output once, without dropout, and keep it in memory")
    routine: str = option(
        "sequential",
        "task of the next batch: one task after the other (sequential), each in turn (interleave, round-robin), a "
        "task drawn for each epoch (random-epoch) or batch (random, annealed), or all tasks at once (joint)",
        choices=("sequential", "interleave", *DRAWING_ROUTINES, "joint"),
    )
    steps_per_epoch: int | None = option(
        None,
        "steps of an epoch in the routines that draw tasks (default: the number of batches of all tasks, or of the "
        "task that random-epoch has drawn) and in joint, where smaller tasks begin again (default: all tasks are cut "
        "to the smallest, or to that whose --num_NAME_trains are over first)",
        low=1,
        high=1_000_000,
        requires=("routine", (*DRAWING_ROUTINES, "joint")),
    )
    anneal_factor: float = option(
        0.8,
        "--routine annealed draws tasks by size^a; a falls from 1 by this much over the run",
        low=0.0,
        high=1.0,
        requires=("routine", ("annealed",)),
    )
    pcgrad: bool = option(
        False, "--routine joint: remove from each task's gradient the part that conflicts with another task's"
    )
    smart_epsilon: float = option(1e-5, "SMART: largest perturbation of an embedding's coordinate", above=0.0)
    smart_sigma: float = option(1e-5, "SMART: standard deviation of the noise at the start", low=0.0)
    smart_eta: float = option(1e-3, "SMART: length of the ascent steps", above=0.0)
    smart_steps: int = option(
        1, "SMART: number of ascent steps, each with a forward and a backward pass; 0 perturbs by noise alone", low=0
    )
    ranking_scale: float = option(
        20.0, "--NAME_embedding_loss ranking: factor on cosines before the softmax (R4 has 1)", above=0.0
    )
    contrastive_margin: float = option(
        1.0, "--NAME_embedding_loss contrastive: distance from which on different texts cost nothing", above=0.0
    )
    simcse_temperature: float = option(
        0.05, "--NAME_embedding_loss simcse: divisor of cosines before the softmax", above=0.0
    )
    clip: float | None = option(None, "largest norm of gradients; scale larger ones down (default: never)", above=0.0)
    seed: int = option(11711, "seed of initial weights, order and dropout", low=0, high=2**63 - 1)
    eval_every: int = option(1, "epochs between evaluations on dev; the last epoch always has one", low=1)
    patience: int | None = option(None, "stop after so many evaluations without a better score (default: never)", low=1)
    refresh_batchnorm: bool = option(
        False,
        "measure batch normalisation anew before an evaluation, without dropout (averages always do)",
    )
    average: str = option(
        "none",
        "evaluate and save an average of the weights: exponential, or the mean of ends of epochs",
        choices=("none", "ema", "swa"),
    )
    ema_decay: float = option(
        0.999,
        "share of the average that an update keeps; the average covers about 1 / (1 - X) updates",
        low=0.0,
        high=0.999999,
        requires=("average", ("ema",)),
    )
    ema_every: str = option("step", "when ema is updated", choices=("step", "epoch"), requires=("average", ("ema",)))
    ema_warmup: bool = option(False, "keep at most (1 + t) / (10 + t) at update t", requires=("average", ("ema",)))
    swa_from_epoch: int = option(1, "first epoch whose end counts in swa", low=1, requires=("average", ("swa",)))

    def scaled_lr(self) -> float:
        """Return --lr after --lr_scaling (Goyal et al. 2017): a larger batch makes fewer and less noisy steps."""
        ratio = self.batch_size / REFERENCE_BATCH
        return self.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.lr_scaling]

    def has_one_optimizer(self) -> bool:
        """Return whether one optimizer moves the weights of all tasks."""
        return self.optimizers == "one" or self.routine == "joint"

    def stage(self, epoch: int) -> int:
        """Return the stage of iterative unfreezing in `epoch`; both count from 0.

        With the cyclic schedule a stage lasts for one cycle of the learning rate, which has two epochs (R0, E.2).
        """
        return epoch // (self.unfreeze_every or (2 if self.lr_schedule == "cyclic" else 1))


@dataclass
class ComputeOptions:
    """Machine."""

    use_gpu: bool = option(False, "use cuda, else mps; without either, warn and use the CPU")
    amp: bool = option(False, "automatic mixed precision: bf16 if the device has it, else fp16 with a scaler")
    threads: int | None = option(
        None,
        "CPU threads (default: what torch chooses; under torchrun, the cores divided by its processes)",
        low=1,
        high=MAX_THREADS,
    )
    amp_dtype: str = option(
        "auto",
        "type of --amp: bf16 if the device has it, else fp16 (auto), or always one",
        choices=("auto", "bf16", "fp16"),
    )
    tf32: bool = option(
        False,
        "let a GPU round the factors of fp32 products to 10 bits (TF32), except in batches of a task with SMART",
    )
    eval_batch_size: int = option(128, "examples per batch in evaluation", low=1)


@dataclass
class RunOptions:
    """Run."""

    run_dir: str | None = option(None, "folder of this run (default: runs/NAME)", metavar="DIR")
    name: str | None = option(None, "name of the folder of this run in runs (default: arch and date)", metavar="NAME")
    filepath: str | None = option(None, "also save the best checkpoint here", metavar="FILE")
    overwrite: bool = option(False, "replace the run in --run_dir, finished or not")
    resume: bool = option(False, "continue the unfinished run in --run_dir")
    save_every: str = option(
        "30m",
        "save the state for --resume every so many steps (500) or minutes (30m), after each epoch, and when SIGTERM, "
        "SIGHUP, SIGUSR1 or Ctrl-C ends the run (exit codes 143, 129, 138, 130)",
        metavar="N[m]",
    )
    log_every: int = option(
        10, "steps between two points of the loss curves; a point is the mean loss since the one before", low=1
    )
    dry_run: bool = option(False, "print the plan (parameters, steps, memory) and stop")
    evaluate: str | None = option(
        None,
        "score and predict with this checkpoint, without training; --run_dir is by default a folder beside it",
        metavar="CHECKPOINT",
    )
    export: str | None = option(
        None,
        "write the backbones of --evaluate's checkpoint here, with model cards, as transformers and "
        "sentence-transformers read them",
        metavar="DIR",
    )
    export_peft: str | None = option(
        None, "write the adapters of --evaluate's checkpoint into this folder, as peft reads them", metavar="DIR"
    )
    export_task: tuple[str, ...] | None = option(
        None,
        "write a task with its linear head into this folder, as transformers' BertForSequenceClassification",
        metavar=("TASK", "DIR"),
    )
    export_onnx: str | None = option(
        None, "write each task, or that of --task, with its head into DIR/TASK.onnx", metavar="DIR"
    )
    predict: str | None = option(
        None,
        "label the sentences of this file (- for standard input) with --evaluate's checkpoint; each line has one "
        "sentence, or two with a tab between them",
        metavar="FILE",
    )
    task: str | None = option(None, "task of --predict or --export_onnx, such as sst", metavar="NAME")
    test_predictions: bool = option(True, "predict the test files too")
    tensorboard: bool = option(True, "write TensorBoard events")
    benchmark: str | None = option(
        None, "measure the training (each step waits for the device) and add a row to this csv file", metavar="FILE"
    )
    profile: bool = option(
        False,
        "profile a few steps of the first epoch: print tables of time and memory, write a trace into the run's folder",
    )


EXPORTS = ("export", "export_peft", "export_task", "export_onnx")  # options that write a trained model for others


@dataclass
class EnsembleOptions:
    """Ensemble."""

    average: str = option(
        "probabilities",
        "mean of probabilities (similarities are z-scored), or of raw outputs as in R0 (logits)",
        choices=("probabilities", "logits"),
    )
    select: int | None = option(
        None, "also choose members greedily, with so many votes at most, by one half of dev", metavar="VOTES", low=1
    )
    soup: str | None = option(
        None,
        "also average weights, into RUN_DIR/soup.pt: of all members, or greedily of those that help on half of dev",
        choices=("uniform", "greedy"),
    )
    pretrained: str | None = option(
        None, "base weights of members with adapters, where they are not found otherwise", metavar="NAME"
    )
    run_dir: str = option("runs/ensemble", "folder for scores.json and predictions/", metavar="DIR")
    cache: str = option("runs/ensemble-cache", "folder that keeps the predictions of each member", metavar="DIR")


def option_of_one_task(name: str) -> Any:
    """Return a field of `TaskOptions`: what the task has instead of an option of `ModelOptions`, or None."""
    metadata = dict(ModelOptions.__dataclass_fields__[name].metadata)
    metadata |= {"help": f"--{name} for {{title}} alone (default: --{name})", "template": f"{{task}}_{name}"}
    return option(None, **metadata)


@dataclass
class TaskOptions:
    """The options of one task; the flags carry its name."""

    enabled: bool = option(
        False,
        "train on {title}, and not on tasks that are not named so; --{task}_train FILE names its training file",
        template="train_{task}",
    )
    lr_multiplier: float = option(1.0, "factor on --lr for {title}", template="{task}_lr_multiplier", above=0.0)
    weight_decay: float = option(0.0, "weight decay for {title}", template="{task}_weight_decay", low=0.0)
    num_trains: int = option(
        1,
        "passes over {title} in an epoch; with 0 the task is not trained, but scored with its new head",
        template="num_{task}_trains",
        low=0,
        high=1_000,
    )
    loss: str = option("", "loss of {title}", template="{task}_loss")
    train: str | None = option(
        None,
        "training file (default: in --data_dir); --train_{task} without a file chooses the task",
        template="{task}_train",
        metavar="FILE",
    )
    dev: str | None = option(None, "dev file (default: in --data_dir)", template="{task}_dev", metavar="FILE")
    test: str | None = option(None, "test file (default: in --data_dir)", template="{task}_test", metavar="FILE")
    dev_out: str | None = option(
        None, "write the predictions for dev here too", template="{task}_dev_out", metavar="FILE"
    )
    test_out: str | None = option(
        None, "write the predictions for test here too", template="{task}_test_out", metavar="FILE"
    )
    columns: tuple[str, ...] | None = option(
        None,
        "the files' own names of columns, such as text=review,label=stars (for pairs text1 and text2; also id)",
        template="{task}_columns",
        metavar="WORD=NAME,...",
        separator=",",
    )
    fraction: float = option(
        1.0,
        "share of {title} that a round takes; the next one goes on where it ended",
        template="{task}_fraction",
        above=0.0,
        high=1.0,
    )
    from_epoch: int = option(1, "first epoch that trains {title}", template="{task}_from_epoch", low=1)
    extra: tuple[str, ...] | None = option(
        None,
        "comma-separated further training files of {title}, from this folder or --data_dir; if labels are classes and "
        "a file has only 0 and 1, its 1 counts as the highest class",
        template="{task}_extra",
        metavar="FILES",
    )
    weight: float = option(
        1.0,
        "factor on the loss of {title}; further losses have theirs",
        template="{task}_weight",
        low=0.0,
    )
    epoch_eval: int = option(
        1,
        "evaluate {title} after the last epoch and each whose number is a multiple of this; best.pt is chosen among "
        "epochs that evaluate all tasks",
        template="{task}_epoch_eval",
        low=1,
    )
    embedding_loss: str = option(
        "none",
        "further loss on the sentence embeddings of {title}",
        template="{task}_embedding_loss",
        choices=("none", "contrastive", "simcse", "ranking", "cosine"),
    )
    embedding_weight: float = option(1.0, "factor on the further loss", template="{task}_embedding_weight", above=0.0)
    mixed_weight: float | None = option(
        None,
        "factor on the squared error in the loss mixed of {title} (default: 0.1 of classes, 0.5 of similarities)",
        template="{task}_mixed_weight",
        low=0.0,
    )
    smart: float = option(0.0, "weight of SMART's regularisation of {title}", template="{task}_smart", low=0.0)
    smart_divergence: str | None = option(
        None,
        "distance of outputs of {title} in SMART, the Bregman loss and R-Drop: symmetric KL, where a single output is "
        "a logit, or squared error (default: mse for similarities, else kl)",
        template="{task}_smart_divergence",
        choices=("kl", "mse"),
    )
    bregman: float = option(
        0.0,
        "weight of the Bregman loss of {title}, which keeps the model close to a slow average of its weights",
        template="{task}_bregman",
        low=0.0,
    )
    rdrop: float = option(
        0.0,
        "weight of R-Drop for {title}: the distance of the outputs of two passes that differ in their dropout",
        template="{task}_rdrop",
        low=0.0,
    )
    pair_encoding: str | None = option_of_one_task("pair_encoding")
    pooling: str | None = option_of_one_task("pooling")
    clf: str | None = option_of_one_task("clf")
    head_layers: int | None = option_of_one_task("head_layers")
    head_width: int | None = option_of_one_task("head_width")
    head_batchnorm: bool | None = option_of_one_task("head_batchnorm")
    head_activation: str | None = option_of_one_task("head_activation")
    hidden_dropout_prob: float | None = option_of_one_task("hidden_dropout_prob")
    output_dropout_prob: float | None = option_of_one_task("output_dropout_prob")

    def model_options(self) -> dict[str, Any]:
        """Return the options of `ModelOptions` that this task has for itself."""
        names = [spec.name for spec in fields(self) if spec.name in ModelOptions.__dataclass_fields__]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def resolved(self, model: ModelOptions) -> "TaskOptions":
        """Return a copy with what the arch says of a head of this task's own kind, where the others' kind has none.

        `model` holds the options of all tasks and is not resolved yet.
        """
        head, of_all = replace(model, **self.model_options()).resolved(), model.resolved()
        names = [name for name in ("head_layers", "head_batchnorm") if getattr(self, name) is None]
        return replace(
            self, **{name: getattr(head, name) for name in names if getattr(head, name) and not getattr(of_all, name)}
        )


@dataclass
class Config:
    """All options of a run. `tasks` holds the tasks of this run only, in the order of the task table."""

    data: DataOptions
    model: ModelOptions
    lora: LoraOptions
    pal: PalOptions
    train: TrainOptions
    compute: ComputeOptions
    run: RunOptions
    tasks: dict[str, TaskOptions]

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain containers, fit for json and for a checkpoint."""
        return asdict(self)

    def model_of(self, task: str) -> ModelOptions:
        """Return the options of the model with those that a task has for itself."""
        return replace(self.model, **self.tasks[task].model_options())

    def flat(self) -> dict[str, Any]:
        """Return the options in one level, by "group.option" and "tasks.NAME.option"."""
        groups = self.to_dict()
        tasks = {f"tasks.{name}": options for name, options in groups.pop("tasks").items()}
        return {f"{name}.{key}": value for name, group in (groups | tasks).items() for key, value in group.items()}

    def heads_of_tasks(self) -> dict[str, Any]:
        """Return by its flag's name each option that a task has instead of one of the model's."""
        return {
            TaskOptions.__dataclass_fields__[name].metadata["template"].format(task=task): value
            for task, options in self.tasks.items()
            for name, value in options.model_options().items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Return the inverse of `to_dict`. Missing options, which an older configuration may lack, have their default.

        Raises TypeError for an option that does not exist and for a value that it cannot have.
        """
        groups = {name: group(**values.get(name, {})) for name, group in GROUPS.items()}
        tasks = {name: TaskOptions(**options) for name, options in values["tasks"].items()}
        for options in (*groups.values(), *tasks.values()):
            hints = typing.get_type_hints(type(options))
            for name, value in vars(options).items():
                if isinstance(value, list) and typing.get_origin(value_type(hints[name])) is tuple:
                    setattr(options, name, tuple(value))  # json has lists only
            check_values(options)
        return cls(tasks=tasks, **groups)


GROUPS: dict[str, type] = {
    "data": DataOptions,
    "model": ModelOptions,
    "lora": LoraOptions,
    "pal": PalOptions,
    "train": TrainOptions,
    "compute": ComputeOptions,
    "run": RunOptions,
}
