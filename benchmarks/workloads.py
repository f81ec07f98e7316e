"""The data and start weights of a benchmark: given ones, or generated ones that need no network."""

import itertools
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from base_bert import read_config, resolve_pretrained, save_pretrained
from benchmarks.options import GENERATED, RANDOM_BERT, BenchmarkOptions
from bert import BertModel
from cli.checks import check_processes
from cli.parser import build_config
from config import BertConfig, Config
from datasets import TaskData, load_splits, tokenise
from tasks import TASKS, Task
from text.tokenizer import Tokenizer, load_tokenizer
from training.task_sampling import Plan, task_batches
from utils.device import Device, choose_device
from utils.errors import UserError
from utils.files import cache_folder, write_text

LR = 1e-5
MAX_LENGTH = 512
LOSS = {"classes": "ce", "binary": "bce", "similarity": "mse"}
EVAL_BATCHES = 16  # most batches of dev that an evaluation has
# Rows of the real train and dev files.
REAL_ROWS = {"sst": (8_544, 1_101), "para": (283_003, 40_429), "sts": (6_040, 863)}
# Quantiles of the token counts of the real training texts, [CLS] and [SEP] included.
QUANTILES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
TOKEN_COUNTS = {
    "sst": (4, 9, 11, 15, 18, 21, 24, 27, 30, 35, 41, 46, 52, 55, 58, 63, 80),
    "para": (3, 8, 9, 11, 12, 13, 14, 15, 17, 20, 25, 30, 36, 42, 47, 67, 95),
    "sts": (5, 8, 8, 9, 10, 11, 12, 13, 16, 19, 26, 31, 36, 38, 41, 46, 70),
}


say: Callable[[str], None] = tqdm.write  # prints a line above the progress bars


def ignore(line: str) -> None:
    """Print nothing, where another step of the benchmark prints the same line."""


def requested_device(options: BenchmarkOptions, say: Callable[[str], None]) -> Device:
    """Return the device for --use_gpu, --amp and --threads; `say` gets a line for each thing that is missing."""
    return choose_device(options.use_gpu, options.amp, options.threads, say)


def write_random_bert(folder: Path, bert_config: BertConfig) -> None:
    """Write random weights of this shape and invented words as a folder for --pretrained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(bert_config)
    save_pretrained(folder, bert_config, model.state_dict())
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?"]
    letters = map("".join, itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=4))
    words = itertools.islice(letters, bert_config.vocab_size - len(special))
    write_text(folder / "vocab.txt", "\n".join([*special, *words]) + "\n")


def random_bert_base() -> Path:
    """Return a folder with random weights of BERT-base's shape. The first call writes it."""
    folder = cache_folder() / RANDOM_BERT
    if not (folder / "vocab.txt").is_file():
        write_random_bert(folder, BertConfig())
    return folder


def load_start(name: str) -> tuple[Path, BertConfig, Tokenizer]:
    """Return the folder of the start weights, their shape, and their tokenizer."""
    folder = random_bert_base() if name == RANDOM_BERT else resolve_pretrained(name)
    bert_config = read_config(folder)
    return folder, bert_config, load_tokenizer(folder, min(MAX_LENGTH, bert_config.max_position_embeddings))


def draw_lengths(task: Task, rows: int, seed: int) -> np.ndarray:
    """Return token counts [rows, texts], distributed like those of the task's real file."""
    shares = np.random.default_rng(seed).random((rows, len(task.text_columns)))
    return np.interp(shares, QUANTILES, TOKEN_COUNTS[task.name]).round().astype(int)


def write_task_file(path: Path, task: Task, tokenizer: Tokenizer, lengths: np.ndarray) -> None:
    """Write a labelled file of a task with random words of the vocabulary.

    `lengths` [N, texts] are token counts, [CLS], [SEP] and the question mark included.
    """
    words = [word for word in json.loads(tokenizer.to_json())["model"]["vocab"] if word.isalpha()]
    generator = random.Random(0)
    low, high = map(int, task.label_range)
    draw = generator.uniform if task.kind == "similarity" else generator.randint
    with path.open("w", encoding="utf-8") as file:
        file.write("\t".join(["", "id", *task.text_columns, task.label_column]) + "\n")
        for number, row in enumerate(lengths.tolist()):
            texts = [" ".join(generator.choices(words, k=max(1, length - 3))).capitalize() + "?" for length in row]
            file.write(
                "\t".join([str(number), f"{generator.getrandbits(100):025x}", *texts, f"{draw(low, high):.1f}"]) + "\n"
            )


@contextmanager
def prepared_data(options: BenchmarkOptions, min_rows: int = 0) -> Iterator[BenchmarkOptions]:
    """Yield the options with a --data_dir that exists.

    For generated data it is a temporary folder with at least `min_rows` training rows of each task.
    """
    if options.data_dir != GENERATED:
        yield options
        return
    *_, tokenizer = load_start(options.pretrained)
    rows = max(min_rows, options.batch_size * options.training_steps)
    counts = {"train": rows, "dev": EVAL_BATCHES * options.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        for task in (TASKS[name] for name in REAL_ROWS):
            for seed, (split, count) in enumerate(counts.items()):
                write_task_file(Path(folder) / task.files[split], task, tokenizer, draw_lengths(task, count, seed))
        yield replace(options, data_dir=folder)


@dataclass(frozen=True)
class Workload:
    """One task's data and start weights, from which each side makes its model.

    `batches` are the example numbers [B] of each training step, those of the `warmup` first. `loader_workers` processes
    make the peer's batches; with 0 the peer makes them between its steps.
    """

    config: Config
    task: Task
    folder: Path
    bert_config: BertConfig
    tokenizer: Tokenizer
    train: TaskData
    dev: TaskData
    batches: list[np.ndarray]
    warmup: int
    device: Device
    loader_workers: int

    def head(self) -> nn.Linear:
        """Return a linear head on u, or on u and v. Each call returns the same weights."""
        torch.manual_seed(self.config.train.seed)
        return nn.Linear(self.bert_config.hidden_size * len(self.task.text_columns), self.task.num_outputs)


def workload_config(options: BenchmarkOptions, task: Task, bert_config: BertConfig) -> Config:
    """Return the configuration that trains as the peer does: arch v1, one task, AdamW at a constant rate."""
    given = {
        "data.data_dir": options.data_dir,
        "data.max_train_examples": options.batch_size * options.training_steps,
        "model.arch": "v1",
        "model.hidden_dropout_prob": bert_config.hidden_dropout_prob,
        "train.fine_tune_mode": "full-model",
        "train.batch_size": options.batch_size,
        "train.optim": "AdamW",
        "train.lr": LR,
        f"tasks.{task.name}.lr_multiplier": 1.0,
        f"tasks.{task.name}.enabled": True,
        f"tasks.{task.name}.loss": LOSS[task.kind],
        "train.cuda_graphs": options.cuda_graphs,
        "compute.use_gpu": options.use_gpu,
        "compute.amp": options.amp,
    }
    config = build_config(given, TASKS)
    check_processes(config)
    return config


def make_workload(options: BenchmarkOptions, name: str, say: Callable[[str], None]) -> Workload:
    """Read the data of the task `name` and choose the batches of its training steps, which are whole ones.

    Raises UserError for missing data, and for data that has less than one batch.
    """
    task, device, size = TASKS[name], requested_device(options, say), options.batch_size
    folder, bert_config, tokenizer = load_start(options.pretrained)
    config = workload_config(options, task, bert_config)
    splits = load_splits(config.data, config.tasks, {name: task}, ["train", "dev"], say)
    splits["dev"][name] = splits["dev"][name].take(EVAL_BATCHES * size, config.train.seed)
    data = tokenise(splits, tokenizer, {name: "siamese"}, False, say)
    train, dev = data["train"][name], data["dev"][name]
    if len(train) < size:
        path = train.examples.path
        raise UserError(f"--batch_size {size}: {path} has only {len(train)} examples; give at most that")
    plan, whole = Plan.of(config.train, config.tasks, {name: len(train)}), len(train) // size
    endless = (batch.indices for epoch in itertools.count() for batch in task_batches(plan, epoch, name)[:whole])
    batches = list(itertools.islice(endless, options.training_steps))
    warmup, workers = options.block * options.warmup, options.loader_workers
    return Workload(config, task, folder, bert_config, tokenizer, train, dev, batches, warmup, device, workers)
