"""Methods together: what is refused says so in one line, all else trains, and nothing moves but what should.

Each method is a name in `METHODS`, each refusal a row in `REFUSED`. A run has a method from nearly every axis, so that
a hundred runs hold all pairs that are not refused. The last of them, which hold few new ones, and each method alone
are behind the marker `long`.
"""

import math
import shlex
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import changed, copied, cut, load_batch, make_bert, make_trainer, metrics, steps_of, write_films

from cli.parser import build_config, build_parser, expand_arguments
from config import ARCHS, COSINE_HEADS, GROUPS, Config, ModelOptions, TaskOptions
from models.checkpoint import load_model, model_checkpoint, save
from tasks import TASKS
from training.trainer import Trainer
from utils.device import Device
from utils.errors import UserError

Method = tuple[str, str]  # axis and name
Row = dict[str, str]  # axis -> name

FEATURES = "--pair_features u,v,abs,mul,cos,diff"
PAL = "--pal_size 8 --pal_heads 2"
DRAWN = "--steps_per_epoch 8"
ONE_RATE = " ".join(f"--{task}_lr_multiplier 4 --{task}_weight_decay 0.01" for task in TASKS)

# axis -> name -> flags. A run takes at most one method of an axis.
METHODS: dict[str, dict[str, str]] = {
    "arch": {name: f"--arch {name}" for name in ARCHS},
    "routine": {
        "sequential": "--routine sequential",
        "interleave": "--routine interleave",
        "random-epoch": f"--routine random-epoch {DRAWN}",
        "random": f"--routine random {DRAWN}",
        "round-robin": f"--routine round-robin {DRAWN}",
        "annealed": f"--routine annealed --anneal_factor 0.5 {DRAWN}",
        "joint": "--routine joint",
        "surgery": "--routine joint --pcgrad",
        "all examples": "--routine joint --steps_per_epoch 3",
    },
    "adapters": {
        "attn": "--lora_mode attn",
        "attn-only": "--lora_mode attn-only",
        "all-lin": "--lora_mode all-lin --lora_rank 2",
        "all-lin-only": "--lora_mode all-lin-only",
        "dora": "--lora_mode all-lin --dora --lora_rank 2",
        "dora by column": "--lora_mode attn-only --dora --dora_norm column",
        "dropout": "--lora_mode attn --lora_targets query,value --lora_dropout 0.2 --rslora --lora_alpha 3",
        "dictionary": """--lora_dict '{"mode": "all-lin-only", "r": 2, "dora": 1}'""",
    },
    "pal": {
        "pal": f"--pal pal {PAL}",
        "low-rank": "--pal low-rank --pal_low_rank_size 6",
        "shared-v": f"--pal shared-v {PAL}",
        "shared-attention": f"--pal shared-attention {PAL}",
        "mixed": f"--pal mixed {PAL} --pal_low_rank_size 6",
        "after attention": f"--pal pal {PAL} --pal_residual attention",
        "sst only": f"--pal pal {PAL} --pal_tasks sst",
    },
    "optimizer": {
        **{name: f"--optim {name}" for name in ("AdamW", "Adam", "Adamax", "RAdam")},
        "SGD": "--optim SGD --lr 0.05",
        "decoupled": "--optim Adamax --decoupled",
        "one for all": f"--optimizers one {ONE_RATE}",
        "one for each": "--optimizers per-task",
    },
    "schedule": {
        **{name: f"--lr_schedule {name}" for name in ("constant", "lambda", "cosine", "triangular", "cyclic")},
        "linear": "--lr_schedule linear --warmup 0",  # with a warm-up the first step has a rate of 0
        "cumulative": "--lr_schedule cyclic --lr_cycle cumulative",
        "for a larger batch": "--lr_schedule constant --lr_scaling linear",
        "its root": "--lr_schedule constant --lr_scaling sqrt",
    },
    "losses": {
        "ce mse": "--sst_loss ce --sts_loss mse",
        "bce log-cosh": "--sst_loss bce --sts_loss log-cosh",
        "kl pearson": "--sst_loss kl --sts_loss pearson",
        "ordinal mixed": "--sst_loss ordinal --sts_loss mixed",
        "mixed": "--sst_loss mixed --sts_loss mixed --sst_weight 0.5",
    },
    "embedding": {
        "contrastive": "--quora_embedding_loss contrastive --sts_embedding_loss contrastive",
        "simcse": "--sst_embedding_loss simcse --quora_embedding_loss simcse --sts_embedding_loss simcse",
        "ranking": "--quora_embedding_loss ranking --sts_embedding_loss ranking",
        "cosine": "--quora_embedding_loss cosine --sts_embedding_loss cosine",
    },
    "average": {
        "ema": "--average ema --ema_decay 0.9",
        "ema by epoch": "--average ema --ema_every epoch --ema_warmup",
        "swa": "--average swa",
        "refreshed": "--refresh_batchnorm",
    },
    "share": {
        "rounds": "--num_sts_trains 2",
        "no rounds": "--num_quora_trains 0",
        "fraction": "--quora_fraction 0.5",
        "late": "--sts_from_epoch 2",
    },
    "pair layer": {
        **{name: f"--pair_layer {name}" for name in ("none", "linear", "plain", "batchnorm")},
        "shared statistics": "--pair_layer batchnorm --shared_batchnorm_stats",
    },
    "head": {
        "linear": "--clf linear",
        "nonlinear": "--clf nonlinear --head_batchnorm",
        "conv": "--clf conv --head_layers 2 --no_head_batchnorm",
        "mlp": "--clf mlp --head_layers 2 --head_width 12 --head_activation gelu --output_dropout_prob 0.1",
    },
    "sts head": {
        "regression": "--sts_head regression",
        "bare cosine": "--sts_head cosine --no_sts_projection",
        "projection": "--sts_head cosine --sts_projection",
        "residual": "--sts_head residual",
    },
    "fine-tuning": {name: f"--fine_tune_mode {name}" for name in ("last-layer", "full-model", "iterative")},
    "backbones": {name: f"--backbones {name}" for name in ("shared", "sentiment-similarity", "per-task")},
    "tasks": {
        "sst": "--train_sst",
        "sts": "--train_sts",
        "pairs": "--train_quora --train_sts",
        "films": "--train_sts --train_cfimdb",
    },
    "pairs": {"siamese": f"--pair_encoding siamese {FEATURES}", "cross": "--pair_encoding cross"},
    "pooling": {
        **{name: f"--pooling {name}" for name in ("cls", "mean")},
        "of tasks": "--pooling cls --sst_pooling mean --sts_pooling mean",
    },
    "smart": {
        "smart": "--sst_smart 1 --quora_smart 1 --sts_smart 1 --smart_epsilon 1e-3 --sts_smart_divergence mse",
        "noise": "--sst_smart 1 --sts_smart 1 --sts_smart_divergence kl --smart_steps 0",
    },
    "bregman": {"bregman": "--sst_bregman 1 --quora_bregman 1 --sts_bregman 1"},
    "two passes": {"rdrop": "--sst_rdrop 1 --quora_rdrop 0.5 --sts_rdrop 2"},
    "cache": {"cache": "--cache_frozen"},
    "memory": {"micro batches": "--micro_batch_size 3"},
    "pre-training": {"mlm": "--mlm"},
    "measuring": {"benchmark": "--benchmark rows.csv"},
    "precision": {"bf16": "--amp"},
    "start": {"checkpoint": "--init_from CHECKPOINT"},
    "clip": {"clip": "--clip 0.5"},
    "dropout": {"none": "--backbone_dropout_prob 0 --hidden_dropout_prob 0"},
}
MODEL_AXES = ("arch", "pair layer", "head", "sts head", "backbones", "tasks", "pairs", "pooling")

# Methods that exclude each other ("axis: names", | between several, * for any), and words of the line that says so.
REFUSED: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("pairs: cross", "sts head: bare cosine"), ("--sts_head cosine", "--pair_encoding cross", "use")),
    (("pairs: cross", "sts head: residual"), ("--sts_head residual", "--pair_encoding cross", "use")),
    (("pairs: cross", "sts head: projection"), ("--sts_projection", "--pair_encoding cross", "drop")),
    (("arch: r1-baseline|v2", "sts head: bare cosine"), ("--sts_head cosine", "--pair_encoding cross", "use")),
    (("arch: r1-baseline|v2", "sts head: residual"), ("--sts_head residual", "--pair_encoding cross", "use")),
    (("arch: r1-baseline|v2", "sts head: projection"), ("--sts_projection", "--pair_encoding cross", "drop")),
    (("pairs: cross", "embedding: contrastive|ranking|cosine"), ("_embedding_loss", "needs", "--pair_encoding")),
    (("arch: r1-baseline|v2", "embedding: contrastive|ranking|cosine"), ("_embedding_loss", "needs", "--pair_enc")),
    (("dropout: none", "embedding: simcse"), ("_embedding_loss simcse", "raise --backbone_dropout_prob")),
    (("dropout: none", "two passes: rdrop"), ("_rdrop", "raise --backbone_dropout_prob")),
    (("cache: cache", "embedding: simcse|ranking"), ("_embedding_loss", "--cache_frozen", "drop")),
    (("cache: cache", "fine-tuning: full-model"), ("--cache_frozen", "--fine_tune_mode full-model", "use last-layer")),
    (("cache: cache", "fine-tuning: last-layer", "adapters: *"), ("--cache_frozen", "--lora_mode", "use")),
    (("cache: cache", "pal: *"), ("--cache_frozen", "--pal", "drop")),
    (("cache: cache", "smart: *"), ("--cache_frozen", "--sst_smart", "drop")),
    (("pre-training: mlm", "cache: cache"), ("--cache_frozen", "--mlm", "drop")),
    (("pre-training: mlm", "smart: *"), ("--sst_smart", "--mlm", "drop")),
    (("pre-training: mlm", "bregman: bregman"), ("--sst_bregman", "--mlm", "drop")),
    (("pre-training: mlm", "two passes: rdrop"), ("_rdrop", "--mlm", "drop")),
    (("pre-training: mlm", "embedding: *"), ("_embedding_loss", "--mlm", "drop")),
    (("share: rounds", "routine: random-epoch|random|round-robin|annealed|all examples"), ("--num_sts_trains",)),
    (
        ("optimizer: one for each", "routine: joint|surgery|all examples"),
        ("--optimizers per-task", "--routine joint", "drop"),
    ),
    (("tasks: sts|pairs|films", "pal: sst only"), ("--pal_tasks sst", "--train_sst", "drop")),
    (("tasks: sts", "share: late"), ("no task trains in epoch 1", "set one --NAME_from_epoch")),
]


def members(pattern: str) -> list[Method]:
    """Return the methods that a word of `REFUSED` stands for."""
    axis, names = pattern.split(": ")
    return [(axis, name) for name in (METHODS[axis] if names == "*" else names.split("|"))]


EXCLUDED = {frozenset(methods): words for patterns, words in REFUSED for methods in product(*map(members, patterns))}
ALL: list[Method] = [(axis, name) for axis, names in METHODS.items() for name in names]
PAIRS = [(a, b) for a, b in combinations(ALL, 2) if a[0] != b[0]]


def allowed(methods: Sequence[Method]) -> bool:
    """Whether nothing in `REFUSED` is among them."""
    groups = (frozenset(group) for size in (2, 3) for group in combinations(methods, size))
    return not any(group in EXCLUDED for group in groups)


def covering_rows() -> list[Row]:
    """Return rows of methods that hold every allowed pair at least once. Each begins with a pair that is still missing.

    The other axes then take what adds most new pairs, in the table's order, or nothing.
    """
    missing = dict.fromkeys(frozenset(pair) for pair in PAIRS if allowed(pair))
    rows = []
    while missing:
        row: list[Method] = sorted(next(iter(missing)), key=ALL.index)
        for axis in METHODS:
            if axis not in dict(row):
                gains = {
                    name: sum(frozenset(((axis, name), other)) in missing for other in row)
                    for name in METHODS[axis]
                    if allowed_beside((axis, name), row)
                }
                if gains and max(gains.values()) > 0:
                    row.append((axis, max(gains, key=lambda name: gains[name])))
        for pair in combinations(row, 2):
            missing.pop(frozenset(pair), None)
        rows.append(dict(row))
    return rows


def allowed_beside(method: Method, row: Sequence[Method]) -> bool:
    """Whether a method can be added to a row that is allowed."""
    groups = (frozenset((method, *group)) for size in (1, 2) for group in combinations(row, size))
    return not any(group in EXCLUDED for group in groups)


def words_of(row: Row) -> list[str]:
    return [word for axis, name in row.items() for word in shlex.split(METHODS[axis][name])]


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    return build_parser("test", "Test.", TASKS)


def refusal(parser: ArgumentParser, methods: Sequence[Method]) -> str | None:
    """Return the line of the UserError that these flags end in, if they do."""
    words = expand_arguments(words_of(dict(methods)))
    try:
        build_config(vars(parser.parse_args(words)), TASKS)
    except UserError as error:
        return str(error)
    return None


def test_what_the_table_excludes_is_refused_in_one_line_and_nothing_else(parser: ArgumentParser) -> None:
    """Of all methods alone, all pairs, and the excluded threes."""
    for methods in [*((method,) for method in ALL), *PAIRS, *(tuple(group) for group in EXCLUDED if len(group) > 2)]:
        line, words = refusal(parser, methods), EXCLUDED.get(frozenset(methods))
        assert (line is None) == (words is None), f"{methods}: {line}"
        if line is not None and words is not None:
            assert "\n" not in line and all(word in line for word in words), f"{methods}: {line}"


def test_every_choice_of_the_command_line_is_in_the_table() -> None:
    """A new choice has to say here what it goes together with."""
    text = " ".join(flags for names in METHODS.values() for flags in names.values()) + " "
    options = [spec for group in ("model", "lora", "pal", "train") for spec in fields(GROUPS[group])]
    choices = {f"--{spec.name}": spec.metadata.get("choices", ()) for spec in options}
    of_one_task = [spec for spec in fields(TaskOptions) if spec.name not in vars(ModelOptions())]
    choices |= {f"--sts_{spec.name}": spec.metadata.get("choices", ()) for spec in of_one_task}
    choices |= {f"--{name}_loss": TASKS[name].losses for name in ("sst", "sts")}
    del choices["--pair_features"], choices["--lora_targets"]  # lists
    idle = {"none", "relu", "restart", "feed-forward", "step", "row"}
    words = [f"{flag} {choice}" for flag, values in choices.items() for choice in values if choice not in idle]
    assert [word for word in words if f"{word} " not in text] == []


def test_the_rows_hold_every_pair() -> None:
    held = {frozenset(pair) for row in covering_rows() for pair in combinations(row.items(), 2)}
    assert held == {frozenset(pair) for pair in PAIRS if allowed(pair)}


SHARING = {
    "shared": {"sst": "shared", "para": "shared", "sts": "shared", "cfimdb": "shared"},
    "sentiment-similarity": {"sst": "sentiment", "para": "similarity", "sts": "similarity", "cfimdb": "sentiment"},
    "per-task": {"sst": "sst", "para": "para", "sts": "sts", "cfimdb": "cfimdb"},
}
LINEARS = ("query", "key", "value", "attention_dense", "interm_dense", "out_dense")
WRAPPED = {"attn": LINEARS[:3], "dora by column": LINEARS[:3], "attn-only": LINEARS[:3], "dropout": ("query", "value")}
FREEZING = ("attn-only", "all-lin-only", "dora by column", "dictionary")
Moves = list[set[str]]  # the tasks of each optimizer step


def should_change(name: str, row: Row, config: Config, epochs: Sequence[Moves], needed: int) -> bool:
    """Return whether a tensor changes in two epochs of these moves, from the meaning of the methods alone.

    `needed` is how many steps it takes where the first one has no gradient: what stands before a V_D or a lora_B, which
    are zero at first. Decay alone moves it in that step, if there is anything to decay.
    """
    part, owner, *rest = name.split(".")
    served = set().union(*(move for moves in epochs for move in moves))  # tasks
    bare = {"sts"} if config.model.sts_head in COSINE_HEADS else set()  # passes by what the pair tasks share
    mlm = "pre-training" in row  # passes by the heads, the pair layer and the poolers
    if part == "heads":
        return owner in served and not mlm
    if part == "pair_layer" and mlm:
        return False
    if part == "pair_layer":
        stats = rest[-1].rpartition("_")[2] if rest[-1].startswith("running_") else "all"
        return bool((served & {"para", "sts"} if stats == "all" else served & {stats}) - bare)
    if part == "pals":
        return sum(owner in move for moves in epochs for move in moves) >= (1 if rest[0] == "decoders" else needed)
    on_it = {task for task, backbone in SHARING[str(config.model.backbones)].items() if backbone == owner}
    if part == "mlm":
        return bool(on_it & served)
    is_adapter = rest[-1] in ("lora_A", "lora_B", "magnitude")
    adapters, mode = row.get("adapters"), row.get("fine-tuning", "full-model" if mlm else "iterative")
    if adapters and not is_adapter and (adapters in FREEZING or rest[-2] in WRAPPED.get(adapters, LINEARS)):
        return False
    if rest[0] == "pooler_dense":
        poolings = {task: config.tasks[task].pooling or config.model.pooling for task in on_it & set(config.tasks)}
        on_it = {task for task, pooling in poolings.items() if pooling == "cls" and not mlm}
    if mode == "last-layer" and not is_adapter:
        return False
    if mode == "iterative":  # nothing in the first epoch, the upper one of two layers in the second
        longer = row.get("schedule") in ("cyclic", "cumulative")
        if longer or not (rest[0] == "pooler_dense" or rest[:2] == ["bert_layers", "1"]):
            return False
        epochs = epochs[1:]
    moves = sum(bool(on_it & move) for moves in epochs for move in moves)
    return moves >= (needed if rest[-1] == "lora_A" else 1)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of two epochs of two steps a task, of a model 16 wide; weight decay for all, which moves every weight."""
    folder = tmp_path_factory.mktemp("matrix")
    bert = make_bert(folder / "bert", hidden_size=16, intermediate_size=24)
    write_films(data := cut(folder / "data", 8, 4, 2), "ids-cfimdb")
    words = ["--pretrained", bert, "--data_dir", data, "--max_length", 64, "--threads", 1]
    words += ["--epochs", 2, "--batch_size", 4, "--lr", 1e-3, "--eval_every", 2, "--quora_weight_decay", 0.01]
    return [str(word) for word in words]


def start_checkpoint(flags: list[str], row: Row, path: Path) -> Path:
    """Save other weights for the model of this row."""
    words = words_of({axis: name for axis, name in row.items() if axis in MODEL_AXES})
    trainer = make_trainer(flags, path.parent / "start", *words, "--seed", 5)
    save(path, model_checkpoint(trainer.model, trainer.checkpointer.tokenizer, trainer.config, {}, {}))
    return path


def train(flags: list[str], row: Row, folder: Path) -> None:
    """Train with the methods of a row, and check what has changed, what was saved and what a batch reaches."""
    words = words_of(row)
    if "start" in row:
        words[words.index("CHECKPOINT")] = str(start_checkpoint(flags, row, folder / "start.pt"))
    device = Device(torch.device("cpu"), torch.bfloat16 if "precision" in row else None)
    trainer = make_trainer(flags, folder / "run", *words, device=device)
    before = copied(trainer.model)
    if "start" in row:
        wanted = torch.load(folder / "start.pt", weights_only=True)["weights"]
        assert all(torch.equal(before[name], tensor) for name, tensor in wanted.items())
    trainer.save_state = lambda: None  # type: ignore[method-assign]
    trainer.fit()
    losses = [figures["loss"] for line in metrics(folder / "run") for figures in line["train"].values()]
    assert losses and all(math.isfinite(loss) for loss in losses)
    after = copied(trainer.model)
    epochs = [[{batch.task for batch in step.batches} for step in steps_of(trainer, epoch)] for epoch in range(2)]
    needed = {name: 1 if tensor.any() else 2 for name, tensor in before.items()}
    wanted = {name for name in before if should_change(name, row, trainer.config, epochs, needed[name])}
    found = changed(before, after)
    assert found == wanted, f"moved: {sorted(found - wanted)}; did not: {sorted(wanted - found)}"
    with trainer.evaluation_weights():
        saved, *_ = load_model(trainer.checkpointer.run.best)
        assert changed(copied(trainer.model), copied(saved)) == set()
    for name in trainer.model.tasks:
        check_reached(trainer, name)


def check_reached(trainer: Trainer, task: str) -> None:
    """Check that a batch gives a gradient to all that its task owns: DistributedDataParallel waits for each."""
    trainer.model.train().zero_grad()
    trainer.forward_backward(load_batch(trainer, task, np.arange(4)), 1.0)
    reached = {id(parameter) for parameter in trainer.model.parameters() if parameter.grad is not None}
    assert reached == {id(parameter) for parameter in trainer.model.task_parameters(task) if parameter.requires_grad}


ROWS = covering_rows()
SOON = 64  # rows that hold most pairs; each of the others adds a few


@pytest.mark.parametrize("row", ROWS[:SOON], ids=map(str, range(SOON)))
def test_methods_go_together(flags: list[str], tmp_path: Path, row: Row) -> None:
    train(flags, row, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS[SOON:], ids=map(str, range(SOON, len(ROWS))))
def test_further_pairs_go_together(flags: list[str], tmp_path: Path, row: Row) -> None:
    train(flags, row, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("method", ALL, ids=" ".join)
def test_each_method_alone(flags: list[str], tmp_path: Path, method: Method) -> None:
    train(flags, dict([method]), tmp_path)
