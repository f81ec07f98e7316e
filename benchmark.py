"""Speed and memory of training and evaluation, side by side with transformers.

    python benchmark.py
    python benchmark.py --tasks sst,sts --modes train --steps 40 --data_dir data
    python benchmark.py --modes tokenise,frozen,start
    python benchmark.py --modes scaling --ranks 1,2,4,8 --use_gpu --amp
    python benchmark.py --use_gpu --amp --cuda_graphs --block 10 --pretrained random-bert-base --data_dir made

The peer is what one writes with transformers: batches padded to their longest text, SDPA, torch's fused AdamW.
random-bert-base has BERT-base's shape; made data have the lengths of the real ones. Neither needs a network.
These modes have no peer: tokenise reads and tokenises a generated file of Quora's size, at first and from the cache;
frozen trains the heads of a frozen backbone with --cache_frozen and without, in turn; start waits for --help and for a
short run; recipe adds up R0's Yin Yang from its steps; scaling trains in so many processes, each with its share of
the batch, and with --threads each. That of optimizer are torch's own optimizers.
"""

import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer
from tqdm import tqdm

from base_bert import load_weights, read_config, resolve_pretrained, save_pretrained
from bert import BertModel
from cli.checks import check_processes
from cli.parser import build_config, build_parser, expand_arguments, groups_of, parse
from config import MAX_THREADS, BertConfig, ComputeOptions, Config, option
from datasets import BadRows, TaskData, load_splits, read_examples, tokenise
from evaluation.predict import predict
from kernels import flash_attention as flash
from kernels.linear import product
from lora import TARGETS, LoRAConfig
from models.checkpoint import git_commit
from models.multitask_bert import MultitaskBERT
from optimizer import Adamax, AdamW
from tasks import DEFAULT_TASKS, PARA, TASKS, Task
from text.tokenizer import TokenArrays, Tokenizer, load_tokenizer
from training.distributed import ONE, World, joined
from training.losses import LOSSES
from training.run_directory import RunDirectory
from training.task_sampling import Plan, Step, task_batches
from training.trainer import Trainer
from utils.console import format_table, progress, run_script
from utils.device import Device, choose_device
from utils.errors import UserError
from utils.files import cache_folder, write_text

LR = 1e-5
ALONE = ("tokenise", "frozen", "start", "optimizer", "recipe", "scaling")  # modes without a peer
MAX_LENGTH = 512
LOSS = {"classes": "ce", "binary": "bce", "similarity": "mse"}
TOLERANCE = 1e-4  # largest difference between two sides' outputs that still counts as the same numbers
EVAL_BATCHES, EVAL_PASSES = 16, 5  # evaluation goes over this many batches at most, at most this often
MEMORY_STEPS = 5
BATCH = 64  # examples of the recipe's steps
RECIPE_WARMUP, RECIPE_STEPS = 30, 60  # steps of each task and stage
FROZEN_STEPS, FROZEN_EPOCHS = 60, 5  # an epoch has so many steps at most
STARTS = 3
ROOT = Path(__file__).resolve().parent
LEGEND = """ratio: the peer's seconds over ours, median over pairs of rounds; rates are ours. GFLOP/s: what real tokens
need; torch's: a layer's matrix products alone, by torch's operator; peak: by the faster of that and products.py.
MB: of a process with its libraries, or of a GPU's tensors."""
PAIRS = 283_000  # about the rows of Quora's training file

T = TypeVar("T")


@dataclass
class Options:
    """Benchmark."""

    comparisons: tuple[str, ...] = option(
        ("full-model",),
        "comma-separated rows: the peer, then ours",
        choices=("full-model", "lora", "dora", "lora-over-full", "dora-over-lora"),
    )
    tasks: tuple[str, ...] = option(tuple(DEFAULT_TASKS), "comma-separated tasks", choices=tuple(TASKS))
    modes: tuple[str, ...] = option(
        ("train", "eval"),
        "comma-separated: train, eval; tokenise a large file; frozen, with its cache and without; start of a run; "
        "recipe; the optimizer alone; scaling over --ranks",
        choices=("train", "eval", *ALONE),
    )
    batch_size: int = option(64, "examples per step", low=1)
    steps: int = option(20, "timed rounds of each side: training steps, or passes over dev", low=1)
    warmup: int = option(3, "rounds of each side before the clock starts", low=0)
    threads: int = option(2, "CPU threads", low=1, high=MAX_THREADS)
    ranks: tuple[str, ...] = option(
        ("1", "2"), "comma-separated numbers of processes for --modes scaling", metavar="NUMBERS"
    )
    data_dir: str = option(
        "data/sample", "folder with the tasks' csv files; made: texts of random words", metavar="DIR"
    )
    pretrained: str = option(
        "all-MiniLM-L6-v2",
        "weights: bert-base-uncased, another name of the hub, a folder, or random-bert-base",
        metavar="NAME",
    )
    out: str = option("benchmarks/results", "folder of the results", metavar="DIR")
    use_gpu: bool = option(False, "use cuda, else mps, else warn and use the CPU")
    amp: bool = option(False, "automatic mixed precision: bf16 where the device has it, else fp16 with a scaler")
    cuda_graphs: bool = option(False, "replay our passes from CUDA graphs")
    block: int = option(1, "training steps between two looks at the clock, which wait for a GPU", low=1)
    loader_workers: int = option(0, "processes that make the peer's batches", low=0)

    def device(self, say: Callable[[str], None]) -> Device:
        """What --use_gpu, --amp and --threads ask for."""
        return choose_device(self.use_gpu, self.amp, self.threads, say)

    def compute(self) -> ComputeOptions:
        """The options of the machine."""
        return ComputeOptions(self.use_gpu, self.amp, self.threads)


def say(line: str) -> None:
    """Print a line above the progress bars."""
    tqdm.write(line)


# ----------------------------------------------------------------------------------------------------------------------
# Weights and data that need no network

RANDOM = "random-bert-base"
MADE = "made"
# Tokens of a text, [CLS] and [SEP] among them: these shares of the real training texts have at most so many.
TEXT_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
TEXT_LENGTHS = {
    "sst": (4, 9, 11, 15, 18, 21, 24, 27, 30, 35, 41, 46, 52, 55, 58, 63, 80),
    "para": (3, 8, 9, 11, 12, 13, 14, 15, 17, 20, 25, 30, 36, 42, 47, 67, 95),
    "sts": (5, 8, 8, 9, 10, 11, 12, 13, 16, 19, 26, 31, 36, 38, 41, 46, 70),
}
# Rows of the real train and dev files.
ROWS = {"sst": (8_544, 1_101), "para": (283_003, 40_429), "sts": (6_040, 863)}


def weights_folder(name: str) -> Path:
    """The folder of the start weights."""
    return random_bert_base() if name == RANDOM else resolve_pretrained(name)


def random_bert_base() -> Path:
    """A folder with weights of BERT-base's shape, drawn from a seed, and made-up words; made once."""
    folder = cache_folder() / RANDOM
    if not (folder / "vocab.txt").is_file():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = BertModel(BertConfig())
        save_pretrained(folder, BertConfig(), model.state_dict())
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?"]
        letters = map("".join, itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=4))
        words = itertools.islice(letters, BertConfig().vocab_size - len(special))
        write_text(folder / "vocab.txt", "\n".join([*special, *words]) + "\n")
    return folder


def write_rows(path: Path, task: Task, tokenizer: Tokenizer, lengths: np.ndarray) -> None:
    """A labelled file of a task with random words of the vocabulary; `lengths` [N, texts] counts tokens."""
    words = [word for word in json.loads(tokenizer.to_json())["model"]["vocab"] if word.isalpha()]
    generator = random.Random(0)
    low, high = task.label_range
    with path.open("w", encoding="utf-8") as file:
        file.write("\t".join(["", "id", *task.text_columns, task.label_column]) + "\n")
        for number, row in enumerate(lengths.tolist()):
            texts = [" ".join(generator.choices(words, k=max(1, length - 3))).capitalize() + "?" for length in row]
            label = (
                generator.uniform(low, high) if task.kind == "similarity" else generator.randint(int(low), int(high))
            )
            file.write("\t".join([str(number), f"{generator.getrandbits(100):025x}", *texts, f"{label:.1f}"]) + "\n")


def drawn_lengths(task: Task, rows: int, seed: int) -> np.ndarray:
    """Lengths [rows, texts] as the real file's are distributed."""
    shares = np.random.default_rng(seed).random((rows, len(task.text_columns)))
    return np.interp(shares, TEXT_SHARES, TEXT_LENGTHS[task.name]).round().astype(int)


@contextmanager
def with_data(options: Options, least: int = 0) -> Iterator[Options]:
    """The options with a folder of data: made ones, at least `least` rows of each task, where they are asked for."""
    if options.data_dir != MADE:
        yield options
        return
    tokenizer = load_tokenizer(weights_folder(options.pretrained), MAX_LENGTH)
    rows = max(least, options.batch_size * options.block * (options.warmup + options.steps))
    with tempfile.TemporaryDirectory() as name:
        for task in (TASKS[name] for name in ROWS):
            for seed, (split, count) in enumerate({"train": rows, "dev": EVAL_BATCHES * options.batch_size}.items()):
                write_rows(Path(name) / task.files[split], task, tokenizer, drawn_lengths(task, count, seed))
        yield replace(options, data_dir=name)


# ----------------------------------------------------------------------------------------------------------------------
# What both sides get


@dataclass(frozen=True)
class Workload:
    """One task's data and weights, from which every side makes its model."""

    config: Config
    task: Task
    folder: Path  # of the pretrained weights
    bert_config: BertConfig
    tokenizer: Tokenizer
    train: TaskData
    dev: TaskData
    batches: list[np.ndarray]  # the examples [B] of each training step, warmup first
    device: Device
    loader_workers: int  # that make the peer's batches; 0 makes them in between

    def head(self) -> nn.Linear:
        """The linear head on u, or on u and v: the same weights whoever asks."""
        torch.manual_seed(self.config.train.seed)
        return nn.Linear(self.bert_config.hidden_size * len(self.task.text_columns), self.task.num_outputs)


def make_workload(options: Options, name: str, say: Callable[[str], None]) -> Workload:
    """Read one task's data and choose the batches as training does, but whole ones only.

    Raises UserError for data that is missing or holds less than one batch.
    """
    device = options.device(say)
    folder = weights_folder(options.pretrained)
    bert_config = read_config(folder)
    count = options.block * (options.warmup + options.steps)
    given = {
        "data.data_dir": options.data_dir,
        "data.max_train_examples": options.batch_size * count,
        "model.arch": "v1",
        "model.hidden_dropout_prob": bert_config.hidden_dropout_prob,
        "train.batch_size": options.batch_size,
        "train.optim": "AdamW",
        "train.lr": LR,
        f"tasks.{name}.lr_multiplier": 1.0,
        f"tasks.{name}.enabled": True,
        f"tasks.{name}.loss": LOSS[TASKS[name].kind],
        "train.cuda_graphs": options.cuda_graphs,
        "compute.use_gpu": options.use_gpu,
        "compute.amp": options.amp,
    }
    config = build_config(given, TASKS)
    check_processes(config)
    splits = load_splits(config.data, config.tasks, {name: TASKS[name]}, ["train", "dev"], say)
    splits["dev"][name] = splits["dev"][name].take(EVAL_BATCHES * options.batch_size, config.train.seed)
    tokenizer = load_tokenizer(folder, min(MAX_LENGTH, bert_config.max_position_embeddings))
    data = {split: own[name] for split, own in tokenise(splits, tokenizer, "siamese", False, say).items()}
    size = len(data["train"])
    if size < options.batch_size:
        raise UserError(
            f"--batch_size {options.batch_size}: {data['train'].examples.path} has only {size} examples; "
            "give at most that"
        )
    plan = Plan.of(config.train, config.tasks, {name: size})
    whole = size // options.batch_size
    steps = [step for epoch in range(-(-count // whole)) for step in task_batches(plan, epoch, name)[:whole]]
    batches = [step.indices for step in steps[:count]]
    return Workload(
        config,
        TASKS[name],
        folder,
        bert_config,
        tokenizer,
        **data,
        batches=batches,
        device=device,
        loader_workers=options.loader_workers,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Contenders


class Side(Protocol):
    """What is measured of a contender."""

    @property
    def model(self) -> nn.Module:
        """The model, in training mode."""

    def forward(self, indices: np.ndarray) -> Tensor:
        """The outputs of training examples [B]: [B, classes] or [B]."""

    def train_on(self, *batches: np.ndarray) -> None:
        """An optimizer step for the examples [B] of each batch, from token ids to new weights."""

    def evaluate(self) -> object:
        """The outputs of all dev examples."""


class Minbert:
    """This package, by the code that training and evaluation run; with `adapters`, only they and the head train."""

    def __init__(self, work: Workload, adapters: LoRAConfig | None = None, world: World = ONE) -> None:
        name = work.task.name
        self.work, self.model = work, MultitaskBERT(work.config.model, work.bert_config, {name: work.task})
        self.model.backbone(name).load_state_dict(load_weights(work.folder, work.bert_config))
        for module in self.model.heads[name].modules():
            if isinstance(module, nn.Linear):  # none where the head is a cosine
                module.load_state_dict(work.head().state_dict())
        if adapters is not None:
            self.model.add_adapters(adapters)
        self.model.manage_freezing("unfreezeall")
        run = RunDirectory(Path(os.devnull))  # only Trainer.fit writes
        train, dev = {name: work.train}, {name: work.dev}
        self.trainer = Trainer(work.config, self.model, work.tokenizer, train, dev, work.device, run, world=world)
        self.model.train()

    def forward(self, indices: np.ndarray) -> Tensor:
        return self.model(self.work.task.name, self.work.train.batch(indices).to(self.work.device.device))

    def train_on(self, *batches: np.ndarray) -> None:
        run_steps(self.trainer, [Step(self.work.task.name, indices) for indices in batches])

    def evaluate(self) -> object:
        device = self.work.device
        return predict(self.model, self.work.dev, device.device, self.work.config.train.batch_size, device.amp)


def run_steps(trainer: Trainer, steps: Sequence[Step]) -> None:
    """Steps in a row as the loop does them."""
    for number, step in enumerate(steps):
        trainer.train_step(step, False)
        if number + 1 < len(steps):
            trainer.feed.expect(steps[number + 1])


def import_transformers() -> Any:
    """The package transformers, which must not take our datasets.py for the package of that name.

    It asks once whether there is one and remembers the answer; a None in sys.modules means "not there".
    """
    ours = sys.modules["datasets"]
    sys.modules["datasets"] = None  # type: ignore[assignment]
    try:
        import transformers
        from transformers.utils.import_utils import is_datasets_available

        assert not is_datasets_available()
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is missing; pip install -r requirements-dev.txt") from None
    finally:
        sys.modules["datasets"] = ours
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class PeerModel(nn.Module):
    """transformers' BertModel with the heads of arch v1: linear on u (and v), or the scaled cosine of u and v."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.kind, self.highest = work.task.kind, work.task.label_range[1]
        self.bert = import_transformers().BertModel.from_pretrained(work.folder, attn_implementation="sdpa").float()
        self.dropout = nn.Dropout(work.bert_config.hidden_dropout_prob)
        self.head = None if self.kind == "similarity" else work.head()

    def forward(self, texts: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Token ids and mask [B, L] of each text to [B, classes] or [B]."""
        pooled = [self.dropout(self.bert(input_ids=ids, attention_mask=mask).pooler_output) for ids, mask in texts]
        if self.head is None:
            return self.highest * F.cosine_similarity(*pooled)
        logits = self.head(torch.cat(pooled, dim=1))
        return logits if self.kind == "classes" else logits.squeeze(1)


def with_peft(bert: nn.Module, adapters: LoRAConfig) -> nn.Module:
    """The same adapters as peft makes them."""
    try:
        import peft
    except ModuleNotFoundError:
        raise UserError("the package peft is missing; pip install -r requirements-dev.txt") from None
    paths = "|".join(TARGETS[name].replace(".", r"\.") for name in adapters.linears)
    targets = rf"encoder\.layer\.\d+\.({paths})"
    config = peft.LoraConfig(
        r=adapters.rank, lora_alpha=adapters.rank, target_modules=targets, use_dora=adapters.dora, lora_dropout=0.0
    )
    return peft.get_peft_model(bert, config)


class PeerBatches(torch.utils.data.Dataset):
    """The peer's training batches in their order: the texts and the labels [B] of each."""

    def __init__(self, data: TaskData, batches: Sequence[np.ndarray], pad_id: int) -> None:
        self.data, self.batches, self.pad_id = data, batches, pad_id
        self.rows = [self.texts(tokens) for tokens in data.tokens]

    @staticmethod
    def texts(tokens: TokenArrays) -> list[Tensor]:
        """The token ids [L] of each text."""
        return list(torch.from_numpy(tokens.input_ids).long().split(np.diff(tokens.offsets).tolist()))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        indices = self.batches[number]
        return self.collate(indices.tolist()), self.data.labels(indices)

    def collate(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Token ids and mask [B, L] of each text."""
        texts = []
        for rows in self.rows:
            chosen = [rows[i] for i in indices]
            ids = pad_sequence(chosen, batch_first=True, padding_value=self.pad_id)
            mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in chosen])[:, None]
            texts.append((ids, mask.long()))
        return texts


class Transformers:
    """transformers, used as most do; with `adapters`, peft's on top of it."""

    def __init__(self, work: Workload, adapters: LoRAConfig | None = None) -> None:
        self.work, self.device = work, work.device.device
        self.model = PeerModel(work)
        if adapters is not None:
            self.model.bert = with_peft(self.model.bert, adapters)
        self.model.to(self.device).train()
        own = work.config.tasks[work.task.name]
        self.loss = LOSSES[own.loss]
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, LR, eps=1e-6, weight_decay=own.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=work.device.scaled)
        pad_id = work.tokenizer.pad_id
        self.batches, self.dev = PeerBatches(work.train, work.batches, pad_id), PeerBatches(work.dev, [], pad_id)
        self.loader = iter(self.made_ahead()) if work.loader_workers else None

    def made_ahead(self) -> Any:
        """The training batches, made by processes of their own and put into pinned memory."""
        return torch.utils.data.DataLoader(
            self.batches,
            batch_size=None,
            num_workers=self.work.loader_workers,
            prefetch_factor=4,
            pin_memory=self.device.type == "cuda",
        )

    def there(self, texts: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
        """Texts on the device."""
        return [tuple(own.to(self.device, non_blocking=True) for own in text) for text in texts]

    def forward(self, indices: np.ndarray) -> Tensor:
        return self.model(self.there(self.batches.collate(indices.tolist())))

    def train_on(self, *batches: np.ndarray) -> None:
        for indices in batches:
            if self.loader is None:
                texts, labels = self.batches.collate(indices.tolist()), self.work.train.labels(indices)
            else:
                texts, labels = next(self.loader)
            self.train_step(self.there(texts), labels.to(self.device, non_blocking=True))

    def train_step(self, texts: Sequence[tuple[Tensor, ...]], labels: Tensor) -> None:
        """One optimizer step."""
        with self.work.device.autocast():
            outputs = self.model(texts)
        self.scaler.scale(self.loss(outputs.float(), labels)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self) -> object:
        self.model.eval()
        blocks = torch.arange(len(self.work.dev)).split(self.work.config.train.batch_size)  # in the file's order
        with torch.inference_mode(), self.work.device.autocast():
            outputs = [self.model(self.there(self.dev.collate(block.tolist()))).float() for block in blocks]
        self.model.train()
        return torch.cat(outputs).cpu().numpy()


LORA = LoRAConfig(mode="all-lin-only", rank=8)
DORA = LoRAConfig(mode="all-lin-only", rank=8, dora=True)

# Each row is one comparison: the peer, then ours.
COMPARISONS: dict[str, dict[str, Callable[[Workload], Side]]] = {
    "full-model": {"transformers": Transformers, "minbert": Minbert},
    "lora": {"peft": partial(Transformers, adapters=LORA), "minbert": partial(Minbert, adapters=LORA)},
    "dora": {"peft": partial(Transformers, adapters=DORA), "minbert": partial(Minbert, adapters=DORA)},
    "lora-over-full": {"full": Minbert, "lora": partial(Minbert, adapters=LORA)},
    "dora-over-lora": {"lora": partial(Minbert, adapters=LORA), "dora": partial(Minbert, adapters=DORA)},
}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def check_same(sides: Mapping[str, Side], work: Workload) -> float:
    """The largest difference between the sides' outputs without dropout. Raises UserError above TOLERANCE."""
    outputs = []
    for side in sides.values():
        side.model.eval()
        with torch.inference_mode():
            outputs.append(side.forward(work.batches[0]))
        side.model.train()
    difference = float((outputs[0] - outputs[1]).abs().max())
    if not difference <= TOLERANCE:  # nan is a difference too
        raise UserError(
            f"{work.task.title}: the outputs of {' and '.join(sides)} differ by up to {difference:.1e}, more than "
            f"{TOLERANCE:g}: they compute different things, so that their times cannot be compared"
        )
    return difference


def time_in_turn(
    actions: Mapping[str, Callable[..., object]], rounds: Sequence[tuple], warmup: int, device: Device, label: str
) -> dict[str, list[float]]:
    """Seconds of every action in every round (a tuple of its arguments) after the first `warmup`.

    The actions take turns, so that a machine's drift meets all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number, arguments in enumerate(progress(rounds, label, "round")):
        for name in sorted(actions, reverse=bool(number % 2)):
            device.synchronize()
            started = time.perf_counter()
            actions[name](*arguments)
            device.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: own[warmup:] for name, own in seconds.items()}


def forward_flops(shape: BertConfig, lengths: np.ndarray) -> float:
    """Additions and multiplications that the pooled outputs of sequences with these `lengths` [S] need.

    Padding is left out, and so is, in the last layer, what follows the keys and values of any token but the first:
    nothing reads it. Embeddings, normalisations and heads are negligible.
    """
    width, tokens = shape.hidden_size, float(lengths.sum())
    keys_values = 4 * width**2
    others = 4 * width**2 + 4 * width * shape.intermediate_size  # query, output projection, feed-forward
    layer = tokens * (keys_values + others) + 4 * width * float(np.square(lengths).sum())
    last = tokens * keys_values + len(lengths) * others + 4 * width * tokens
    return (shape.num_hidden_layers - 1) * layer + last + len(lengths) * 2 * width**2


def work_done(shape: BertConfig, data: TaskData, rounds: Sequence[np.ndarray], passes: int) -> dict[str, list]:
    """Examples, real tokens and FLOPs of every round (its examples [B]), each worth so many forward passes."""
    lengths = [np.concatenate([np.diff(tokens.offsets)[own] for tokens in data.tokens]) for own in rounds]
    return {
        "examples": [len(own) for own in rounds],
        "tokens": [int(own.sum()) for own in lengths],
        "flops": [passes * forward_flops(shape, own) for own in lengths],
    }


def matmul_peaks(shape: BertConfig, tokens: int, device: Device) -> dict[str, float]:
    """FLOP/s of a layer's matrix products for this many tokens and nothing else: the best of ten runs.

    `torch_peak` is that of torch's own operator, `matmul_peak` the better one of that and products.py.
    """
    width, inner = shape.hidden_size, shape.intermediate_size
    sizes = [(width, width)] * 4 + [(width, inner), (inner, width)]
    inputs = {n: torch.randn(tokens, n, device=device.device, dtype=device.amp) for n in (width, inner)}
    weights = [torch.randn(size, device=device.device, dtype=device.amp) for size in sizes]
    repeats = 1 if device.device.type == "cpu" else 50  # of what is too short to be timed by itself

    def layers(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        for weight in weights * repeats:
            multiply(inputs[len(weight)], weight)

    ways = {"torch": partial(layers, torch.matmul), "products": partial(layers, product)}
    seconds = time_in_turn(ways, [()] * 12, 2, device, "matmul peak")
    best = {name: repeats * 2 * tokens * sum(a * b for a, b in sizes) / min(own) for name, own in seconds.items()}
    return {"torch_peak": best["torch"], "matmul_peak": max(best.values())}


def square_peak(device: Device) -> float | None:
    """FLOP/s of one large square product on a GPU, the best of ten."""
    if device.device.type == "cpu":
        return None
    x = torch.randn(8192, 8192, device=device.device, dtype=device.amp)
    seconds = time_in_turn({"square": lambda: x @ x}, [()] * 12, 2, device, "peak")["square"]
    return 2 * 8192**3 / min(seconds)


def measure_speed(options: Options, comparison: str, task: str) -> list[dict[str, Any]]:
    """For each mode, the seconds of every round of each side, and the work in them.

    A round is a block of training steps or a pass over dev. Raises UserError where the sides compute different things.
    """
    work = make_workload(options, task, say)
    sides = {name: build(work) for name, build in COMPARISONS[comparison].items()}
    difference = check_same(sides, work)
    say(f"{comparison} {task}: outputs differ by at most {difference:.1e}")
    tokens = int(np.mean([work.train.lengths[step].sum() for step in work.batches]))
    rounds = [tuple(work.batches[i : i + options.block]) for i in range(0, len(work.batches), options.block)]
    steps = [np.concatenate(own) for own in rounds[options.warmup :]]
    passes = min(options.steps, EVAL_PASSES)
    common = {
        "comparison": comparison,
        "task": task,
        "max_difference": difference,
        **matmul_peaks(work.bert_config, tokens, work.device),
        "square_peak": square_peak(work.device),
    }
    records = []
    for mode in options.modes:
        label = f"{comparison} {task} {mode}"
        if mode == "train":
            train = {name: side.train_on for name, side in sides.items()}
            seconds = time_in_turn(train, rounds, options.warmup, work.device, label)
            # backward costs two forward passes, or one where no gradient of a large weight is wanted
            done = work_done(work.bert_config, work.train, steps, 3 if comparison == "full-model" else 2)
        else:
            evaluate = {name: side.evaluate for name, side in sides.items()}
            seconds = time_in_turn(evaluate, [()] * (1 + passes), 1, work.device, label)
            done = work_done(work.bert_config, work.dev, [np.arange(len(work.dev))] * passes, 1)
        batches = options.block if mode == "train" else -(-len(work.dev) // options.batch_size)
        records.append({**common, "mode": mode, "batches": batches, "seconds": seconds, **done})
    return records


def measure_memory(options: Options, comparison: str, contender: str, task: str) -> dict[str, int]:
    """Peak bytes of a contender after building it and after each mode, in a process of its own.

    A peak never falls, so that evaluation, which takes less, comes before training.
    """
    work = make_workload(options, task, lambda line: None)  # the caller says it
    side = COMPARISONS[comparison][contender](work)
    peaks = {"built": work.device.peak_memory()}
    if "eval" in options.modes:
        side.evaluate()
        peaks["eval"] = work.device.peak_memory()
    if "train" in options.modes:
        for indices in work.batches[:MEMORY_STEPS]:
            side.train_on(indices)
        peaks["train"] = work.device.peak_memory()
    return peaks


def all_memory(options: Options) -> dict[tuple[str, str, str], dict[str, int]]:
    """measure_memory of each (comparison, contender, task).

    Linux counts the size that a parent had at the start as its child's: this comes first, while we are small.
    """
    cases = [(row, name, task) for row in options.comparisons for name in COMPARISONS[row] for task in options.tasks]
    if not cases:
        return {}
    return {
        case: in_own_process(" ".join(case), measure_memory, options, *case)
        for case in progress(cases, "memory", "process")
    }


def in_own_process(label: str, function: Callable[..., T], *arguments: object) -> T:
    """What `function` returns in a fresh process. Raises UserError, naming `label`, where the process dies."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(f"{label}: the process died, of too little memory perhaps") from None


def tokenise_file(path: Path, weights: Path, cache: Path) -> dict[str, float]:
    """Seconds from a file to token ids, peak bytes of the process with its libraries, and tokens a text."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    tokenizer = load_tokenizer(weights, MAX_LENGTH)
    started = time.perf_counter()
    examples = read_examples(path, PARA, "train", BadRows(0, say))
    data = TaskData(examples, tokenizer, "siamese")
    seconds = time.perf_counter() - started
    tokens = float(data.lengths.mean()) / len(PARA.text_columns)
    return {"seconds": seconds, "peak": Device(torch.device("cpu")).peak_memory(), "tokens": tokens}


def measure_tokenising(options: Options) -> dict[str, Any]:
    """tokenise_file of PAIRS pairs, with an empty cache and with a full one, each in a process of its own."""
    weights = weights_folder(options.pretrained)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = np.full((PAIRS, len(PARA.text_columns)), 13)
        write_rows(folder / "pairs.csv", PARA, load_tokenizer(weights, MAX_LENGTH), lengths)
        runs = {
            label: in_own_process("tokenise", tokenise_file, folder / "pairs.csv", weights, folder / "cache")
            for label in progress(("first", "cached"), "tokenise", "process")
        }
    return {"mode": "tokenise", "pairs": PAIRS, **runs}


def measure_optimizers(options: Options) -> list[dict[str, Any]]:
    """Seconds of every step of torch's fastest optimizers and ours, in turn, on parameters of BERT-base's shapes."""
    device = replace(options, amp=False).device(lambda line: None)
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in BertModel(BertConfig()).parameters()]
    contenders: dict[str, dict[str, Callable[..., Optimizer]]] = {
        "AdamW": {"torch, fused": partial(torch.optim.AdamW, fused=True), "minbert": AdamW},
        "Adamax": {"torch, foreach": partial(torch.optim.Adamax, foreach=True), "minbert": Adamax},
    }
    records = []
    for name, sides in contenders.items():
        steps: dict[str, Callable[..., object]] = {}
        for side, make in sides.items():
            parameters = [nn.Parameter(torch.randn(shape, device=device.device)) for shape in shapes]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            steps[side] = make(parameters, lr=LR, weight_decay=0.01).step
        rounds = [()] * (options.warmup + options.steps)
        seconds = time_in_turn(steps, rounds, options.warmup, device, f"{name} steps")
        count = sum(shape.numel() for shape in shapes)
        records.append({"mode": "optimizer", "optimizer": name, "parameters": count, "seconds": seconds})
    return records


def time_rank(options: Options, task: str, rank: int, size: int, port: int) -> list[float]:
    """Seconds of every training step in one of `size` processes that share each batch."""
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in values.items()}})
    with joined(options.compute()) as world:
        work = make_workload(options, task, lambda line: None)
        step = {"step": Minbert(work, world=world).train_on}
        label = f"scaling {task} {size}"
        return time_in_turn(step, [(own,) for own in work.batches], options.warmup, work.device, label)["step"]


def measure_scaling(options: Options, task: str) -> dict[str, Any]:
    """Seconds of every training step of a task by number of processes, each of which ends a step with the others."""
    make_workload(options, task, say)  # what is wrong with the data is said once, before any process starts
    seconds: dict[str, list[float]] = {}
    for ranks in options.ranks:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        with ProcessPoolExecutor(int(ranks), mp_context=multiprocessing.get_context("spawn")) as pool:
            running = [pool.submit(time_rank, options, task, rank, int(ranks), port) for rank in range(int(ranks))]
            try:
                seconds[ranks] = running[0].result()
            except BrokenProcessPool:
                raise UserError(f"--ranks {ranks}: a process died; give fewer, or less memory to each") from None
    return {"mode": "scaling", "task": task, "batch_size": options.batch_size, "seconds": seconds}


def make_trainer(
    options: Options, flags: Sequence[str], tasks: Mapping[str, Task], say: Callable[[str], None] = say
) -> Trainer:
    """What trains `tasks` as these flags of the training script say, with the options' data, weights and device."""
    config = parse([*flags, "--data_dir", options.data_dir], TASKS, "benchmark.py", "")
    device = options.device(say)
    folder = weights_folder(options.pretrained)
    bert_config = read_config(folder)
    tokenizer = load_tokenizer(folder, min(MAX_LENGTH, bert_config.max_position_embeddings))
    splits = load_splits(config.data, config.tasks, tasks, ["train", "dev"], say)
    data = tokenise(splits, tokenizer, "siamese", False, say)
    model = MultitaskBERT(config.model, bert_config, tasks)
    model.load_backbones(load_weights(folder, bert_config))
    run = RunDirectory(Path(os.devnull))  # only Trainer.fit writes
    return Trainer(config, model, tokenizer, data["train"], data["dev"], device, run, lambda line: None)


def measure_frozen(options: Options, task: str) -> dict[str, Any]:
    """Seconds of epochs of the heads alone, R0's and its Adamax, after the first, with --cache_frozen and without."""
    flags = [f"--train_{task}", "--fine_tune_mode", "last-layer", "--batch_size", str(options.batch_size)]
    flags += ["--max_train_examples", str(FROZEN_STEPS * options.batch_size)]
    epochs: dict[str, Callable[..., object]] = {}
    for label, more in {"computed anew": [], "--cache_frozen": ["--cache_frozen"]}.items():
        trainer = make_trainer(options, [*flags, *more], {task: TASKS[task]}, (lambda line: None) if more else say)
        trainer.model.freeze_for_epoch(trainer.config.train, 0)
        trainer.model.train()
        steps = task_batches(trainer.plan, 0, task)
        epochs[label] = partial(frozen_epoch, trainer, steps)
    device = options.device(lambda line: None)
    seconds = time_in_turn(epochs, [()] * (1 + FROZEN_EPOCHS), 1, device, f"frozen {task}")
    return {"mode": "frozen", "task": task, "steps": len(steps), "batch_size": options.batch_size, "seconds": seconds}


def frozen_epoch(trainer: Trainer, steps: Sequence[Step]) -> None:
    """An epoch's steps."""
    if trainer.frozen is not None:
        trainer.frozen.begin_epoch(steps)
    run_steps(trainer, steps)


def measure_start(options: Options) -> dict[str, Any]:
    """Seconds of the training script's --help, and of a whole run of a step of each task on data/sample."""
    script = [sys.executable, str(ROOT / "multitask_classifier.py")]
    weights = weights_folder(options.pretrained)
    length = min(MAX_LENGTH, read_config(weights).max_position_embeddings)
    with tempfile.TemporaryDirectory() as folder:
        short = ["--data_dir", str(ROOT / "data" / "sample"), "--pretrained", str(weights), "--max_length", str(length)]
        short += ["--epochs", "1", "--max_train_examples", "64", "--threads", str(options.threads)]
        short += ["--run_dir", folder, "--overwrite"]
        commands = {"help": [*script, "--help"], "run": [*script, *short]}
        runs = {name: partial(run_command, command) for name, command in commands.items()}
        seconds = time_in_turn(runs, [()] * (1 + STARTS), 1, Device(torch.device("cpu")), "start")
    return {"mode": "start", "seconds": seconds}


def run_command(command: Sequence[str]) -> None:
    """Run a command to its end. Raises UserError with what it says where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def measure_recipe(options: Options) -> dict[str, Any]:
    """Seconds that R0's Yin Yang recipe would take, from those of its steps in each stage of unfreezing.

    On made data of the real files' lengths; their numbers of rows say how often each step is taken. Raises UserError
    where a task has no step left after the warmup.
    """
    flags = [f"@{ROOT / 'recipes' / 'g6-yin-yang.args'}", "--use_gpu", "--amp"]
    flags += ["--cuda_graphs"] if options.cuda_graphs else []
    tasks = {name: TASKS[name] for name in ROWS}
    trainer = make_trainer(options, flags, tasks)
    for name in tasks:
        if (steps := len(task_batches(trainer.plan, 0, name))) <= RECIPE_WARMUP:
            raise UserError(
                f"--modes recipe needs {RECIPE_WARMUP + 1} steps of {name}, but --data_dir {options.data_dir} has only "
                f"{steps}; use --data_dir {MADE}"
            )
    config, model = trainer.config, trainer.model
    epochs, stages = config.train.epochs, {}
    seconds = dict.fromkeys(tasks, 0.0)
    for epoch in progress(range(epochs), "recipe", "epoch"):
        layers = model.freeze_for_epoch(config.train, epoch)
        model.train()
        if layers not in stages:
            stages[layers] = {name: recipe_step(trainer, name) for name in tasks}
        for name in tasks:
            seconds[name] += stages[layers][name] * math.ceil(ROWS[name][0] / config.train.batch_size)
    started = time.perf_counter()
    trainer.evaluate(list(tasks))
    per_row = (time.perf_counter() - started) / sum(len(own) for own in trainer.dev_data.values())
    evaluation = epochs * per_row * sum(rows for _, rows in ROWS.values())
    report = trainer.passes.report()
    return {"mode": "recipe", "stages": stages, "train": seconds, "evaluation": evaluation, "graphs": report}


def recipe_step(trainer: Trainer, task: str) -> float:
    """Seconds of a step of a task as the model is frozen now."""
    steps = task_batches(trainer.plan, 0, task)[: RECIPE_WARMUP + RECIPE_STEPS]
    run_steps(trainer, steps[:RECIPE_WARMUP])
    trainer.device.synchronize()
    started = time.perf_counter()
    run_steps(trainer, steps[RECIPE_WARMUP:])
    trainer.device.synchronize()
    return (time.perf_counter() - started) / len(steps[RECIPE_WARMUP:])


# ----------------------------------------------------------------------------------------------------------------------
# Reporting


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for each record. Times, rates and ratios are medians over the rounds; rates and shares are ours."""
    header = ["comparison", "task", "mode", "peer s/step", "our s/step", "ratio", "examples/s", "tokens/s"]
    header += ["GFLOP/s", "of torch's", "of peak", "peer MB", "our MB"]
    rows = []
    for record in records:
        peer, own = (np.array(seconds) for seconds in record["seconds"].values())
        examples, tokens, flops = (np.median(record[name] / own) for name in ("examples", "tokens", "flops"))
        rows.append(
            [record["comparison"], record["task"], record["mode"]]
            + [f"{np.median(seconds) / record['batches']:.4f}" for seconds in (peer, own)]
            + [f"{np.median(peer / own):.2f}", f"{examples:,.0f}", f"{tokens:,.0f}", f"{flops / 1e9:,.1f}"]
            + [f"{flops / record[peak]:.0%}" for peak in ("torch_peak", "matmul_peak")]
            + [f"{peaks[record['mode']] / 1e6:,.0f}" for peaks in record["memory"].values()]
        )
    return format_table(header, rows)


# What a GPU is held to with random-bert-base and made data: by batch size, the least ratio and share of the peak.
RATIOS, SHARES = {64: 5.0, 256: 2.5}, {256: 0.35}
EPOCH_SECONDS, RECIPE_SECONDS = 25.0, 300.0


def targets(records: Sequence[Mapping[str, Any]], batch_size: int) -> list[str]:
    """A line for each target that these records speak of: what was found, what is wanted, and whether it is met."""
    lines = []

    def add(what: str, found: float, bound: str, wanted: float, digits: int) -> None:
        met = found <= wanted if bound == "at most" else found >= wanted
        lines.append(f"{'met   ' if met else 'MISSED'}  {what}: {found:.{digits}f}, {bound} {wanted:g}")

    for record in records:
        if record["mode"] == "recipe":
            seconds = sum(record["train"].values()) + record["evaluation"]
            add("seconds of the Yin Yang recipe", seconds, "at most", RECIPE_SECONDS, 0)
        if (record["mode"], record.get("task"), record.get("comparison")) != ("train", "para", "full-model"):
            continue
        peer, own = (np.array(seconds) for seconds in record["seconds"].values())
        if batch_size in RATIOS:
            add(f"times transformers at batch {batch_size}", np.median(peer / own), "at least", RATIOS[batch_size], 2)
        if batch_size in SHARES and record["square_peak"]:  # which a CPU has not
            share = np.median(record["flops"] / own) / record["square_peak"]
            add(f"share of the device's peak at batch {batch_size}", share, "at least", SHARES[batch_size], 3)
        epoch = ROWS["para"][0] / np.median(record["examples"] / own)
        add(f"seconds for {ROWS['para'][0]:,} pairs at batch {batch_size}", epoch, "at most", EPOCH_SECONDS, 1)
    return lines


def recipe_line(record: Mapping[str, Any]) -> str:
    """What measure_recipe measured."""
    stages = "; ".join(
        f"{command} {', '.join(f'{name} {1e3 * seconds:.2f}' for name, seconds in own.items())} ms/step"
        for command, own in record["stages"].items()
    )
    return f"recipe: {stages}; evaluation {record['evaluation']:.0f} s in all\n{record['graphs'] or ''}".rstrip()


def tokenise_line(record: Mapping[str, Any]) -> str:
    """What measure_tokenising measured."""
    runs = [f"{run} {record[run]['seconds']:.2f} s, {record[run]['peak'] / 1e6:,.0f} MB" for run in ("first", "cached")]
    return f"tokenise {record['pairs']:,} pairs of {record['first']['tokens']:.1f} tokens a text: {'; '.join(runs)}"


def optimizer_line(record: Mapping[str, Any]) -> str:
    """What measure_optimizers measured of one optimizer."""
    peer, own = (np.array(seconds) for seconds in record["seconds"].values())
    sides = ", ".join(f"{side} {np.median(seconds) * 1e3:.1f} ms" for side, seconds in record["seconds"].items())
    what = f"{record['optimizer']}, a step of {record['parameters']:,} parameters: {sides}"
    return f"{what}; theirs over ours {np.median(peer / own):.2f}"


def frozen_line(record: Mapping[str, Any]) -> str:
    """What measure_frozen measured of one task."""
    plain, cached = (np.array(seconds) for seconds in record["seconds"].values())
    epoch = f"frozen {record['task']}, an epoch of {record['steps']} steps of {record['batch_size']} examples"
    sides = f"{np.median(plain):.2f} s, with --cache_frozen {np.median(cached):.3f} s"
    return f"{epoch}: {sides}; {np.median(plain / cached):.1f} times as fast"


def start_line(record: Mapping[str, Any]) -> str:
    """What measure_start measured."""
    text, run = (np.median(record["seconds"][name]) for name in ("help", "run"))
    return f"start: --help {text:.2f} s; a whole run of a step of each task on data/sample {run:.1f} s"


def scaling_lines(record: Mapping[str, Any]) -> str:
    """What measure_scaling measured: rates, and their ratio to the first one's by median seconds."""
    first, *_ = (float(np.median(own)) * int(ranks) for ranks, own in record["seconds"].items())
    lines = []
    for ranks, own in record["seconds"].items():
        median = float(np.median(own))
        lines.append(
            f"scaling {record['task']}, batch {record['batch_size']}: {ranks} processes {median:.4f} s a step, "
            f"{record['batch_size'] / median:,.0f} examples/s, efficiency {first / median / int(ranks):.0%}"
        )
    return "\n".join(lines)


# Of what has no peer.
LINES = {
    "tokenise": tokenise_line,
    "frozen": frozen_line,
    "start": start_line,
    "optimizer": optimizer_line,
    "recipe": recipe_line,
    "scaling": scaling_lines,
}


def measure(options: Options) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of all comparisons, and those of the modes without a peer."""
    modes = tuple(mode for mode in options.modes if mode not in ALONE)
    compared = replace(options, modes=modes, comparisons=options.comparisons if modes else ())
    alone = [measure_tokenising(options)] if "tokenise" in options.modes else []
    alone += [measure_start(options)] if "start" in options.modes else []
    alone += [measure_scaling(options, task) for task in options.tasks] if "scaling" in options.modes else []
    memory = all_memory(compared)
    records = [
        {**record, "memory": {name: memory[row, name, task] for name in COMPARISONS[row]}}
        for row in compared.comparisons
        for task in options.tasks
        for record in measure_speed(compared, row, task)
    ]
    alone += [measure_frozen(options, task) for task in options.tasks] if "frozen" in options.modes else []
    alone += measure_optimizers(options) if "optimizer" in options.modes else []
    alone += [measure_recipe(options)] if "recipe" in options.modes else []
    return records, alone


def main(argv: Sequence[str]) -> None:
    """Measure what the command line asks for, print a table and write everything into a file."""
    groups = {"benchmark": Options}
    parser = build_parser("benchmark.py", str(__doc__).split("\n\n")[0], {}, groups)
    options: Options = groups_of(vars(parser.parse_args(expand_arguments(argv))), groups)["benchmark"]
    if not all(ranks.isdecimal() and int(ranks) for ranks in options.ranks):
        raise UserError(f"--ranks {','.join(options.ranks)}: give numbers of processes, such as 1,2")
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {options.out}: cannot be made ({error}); give a folder that can") from error
    started = time.strftime("%Y%m%d-%H%M%S")
    least = BATCH * (RECIPE_WARMUP + RECIPE_STEPS) if "recipe" in options.modes else 0
    least = max(least, options.batch_size * FROZEN_STEPS) if "frozen" in options.modes else least
    with with_data(options, least) as given:
        records, alone = measure(given)
    device = options.device(lambda line: None)
    packages = {"torch": torch, "numpy": np, "tokenizers": tokenizers}
    if records:
        packages["transformers"] = import_transformers()
    content = {
        "config": asdict(options),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **{name: str(p.__version__) for name, p in packages.items()}},
        "device": device.name,
        "amp": device.amp and str(device.amp),
        "started": started,
        "attention": dict(flash.calls),
        "results": records + alone,
    }
    path = Path(options.out) / f"{Path(options.pretrained).name}-{device.device.type}-{started}.json"
    write_text(path, json.dumps(content, indent=2) + "\n")
    say(f"{device.name}; --pretrained {options.pretrained} --batch_size {options.batch_size}")
    if records:
        say(f"{table(records)}\n{LEGEND}")
    for record in alone:
        say(LINES[record["mode"]](record))
    if options.data_dir == MADE:
        say("\n".join(targets(records + alone, options.batch_size)))
    say(f"every round: {path}")


if __name__ == "__main__":
    run_script(main)
