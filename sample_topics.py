"""Draw from a task's training file a sample with an exact number of examples of each topic (R2, 5.3.4 and A.1).

    python sample_topics.py --topics recipes/r2/topics.txt --data_dir data --out data/quora-topics.csv
    python multitask_classifier.py @recipes/r2/sampled.args --data_dir data

A line of --topics is a topic: its name, how many examples it gets, and words for it, as in
`Finance: 600: money, bank, loans`. An example belongs to the topic whose words are nearest to its texts, by the mean
embeddings of --pretrained. Where the training file has a column `topic`, what stands there holds and no model is asked,
so that labels of another classifier can be used (R2's were BART's); --out has that column too.

Which examples of a topic are drawn is decided by --seed and by nothing else: another quota of another topic changes
nothing. The sample is a training file like any, in the order of the one that it is drawn from.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cli.parser import build_parser, expand_arguments, groups_of, task_options
from config import ComputeOptions, FileOptions, TrainOptions, option
from tasks import TASKS, Task, task_by_alias
from utils.console import format_table, run_script, say
from utils.errors import UserError

# torch takes seconds to import: everything that needs it is imported once the command line is known to be right.
if TYPE_CHECKING:
    from bert import BertModel
    from datasets import BadRows, Examples
    from text.tokenizer import Tokenizer
    from utils.device import Device

COLUMN = "topic"


@dataclass
class TopicOptions:
    """Topics."""

    topics: str | None = option(
        None, "file with a line for each topic: NAME: COUNT: WORDS, such as Finance: 600: money, bank", metavar="FILE"
    )
    out: str | None = option(None, "file to write the sample into, a training file for --NAME_train", metavar="FILE")
    task: str = option("para", "task whose training file is sampled", metavar="NAME")
    pretrained: str = option(
        "bert-base-uncased",
        "whose embeddings tell topics: all-MiniLM-L6-v2, another name of the hub, or a folder",
        metavar="NAME",
    )
    seed: int = option(TrainOptions.seed, "seed of the draw", low=0)


@dataclass(frozen=True)
class Topic:
    """A topic: how many examples it gets, and words or phrases that it is known by."""

    quota: int
    words: tuple[str, ...]


def read_topics(path: Path) -> dict[str, Topic]:
    """The topics of a file by name. Raises UserError, naming the line, for one that is none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--topics {path}: cannot be read ({error}); give a text file in UTF-8") from error
    topics: dict[str, Topic] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *rest = (part.strip() for part in line.split(":", 2))
        words = tuple(word.strip() for word in rest[-1].split(",") if word.strip()) if len(rest) == 2 else ()
        if not name or not words or not rest[0].isdecimal() or not int(rest[0]):
            raise UserError(f"--topics {path}, line {number}: is no topic; write it as `Finance: 600: money, bank`")
        if name in topics:
            raise UserError(f"--topics {path}, line {number}: {name} is there twice; drop one of the two")
        topics[name] = Topic(int(rest[0]), words)
    if not topics:
        raise UserError(f"--topics {path}: has no topic; write some as `Finance: 600: money, bank`")
    return topics


def nearest(examples: np.ndarray, topics: np.ndarray) -> np.ndarray:
    """For each example [N, H] the number [N] of the topic [K, H] with the greatest cosine to it.

    Both are centred first: embeddings of BERT have a large part in common, which says nothing (Mu and Viswanath 2018,
    "All-but-the-top", section 2).
    """
    centred = [own - own.mean(axis=0) for own in (examples, topics)]
    a, b = (own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12) for own in centred)
    return (a @ b.T).argmax(axis=1)


def drawn(labels: np.ndarray, topics: Mapping[str, Topic], seed: int) -> np.ndarray:
    """The rows, in order, of as many examples of each topic as its quota says; `labels` [N] are topics' names.

    Raises UserError that names all topics with too few examples.
    """
    rows = {name: np.flatnonzero(labels == name) for name in topics}
    short = [
        f"{name} has {len(rows[name]):,} of {own.quota:,}"
        for name, own in topics.items()
        if len(rows[name]) < own.quota
    ]
    if short:
        raise UserError(f"--topics: too few examples ({'; '.join(short)}); lower these counts or give them other words")
    chosen = [
        np.random.default_rng([seed, *name.encode()]).choice(rows[name], own.quota, replace=False)
        for name, own in topics.items()
    ]
    return np.sort(np.concatenate(chosen))


# ----------------------------------------------------------------------------------------------------------------------
# Topics by embeddings


def embeddings(
    texts: Sequence[str], model: "BertModel", tokenizer: "Tokenizer", device: "Device", batch_size: int
) -> np.ndarray:
    """Mean embeddings of texts [N, H] float32."""
    import torch

    from text.packing import pack, ragged_rows
    from utils.console import progress

    tokens = tokenizer.encode(texts)
    lengths = np.diff(tokens.offsets)
    by_length = np.argsort(-lengths, kind="stable")
    blocks = [by_length[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    out = np.empty((len(texts), model.config.hidden_size), np.float32)
    for block in progress(blocks, "embeddings", "batch"):
        rows = ragged_rows(tokens.offsets[block], lengths[block])
        batch = pack(tokens.input_ids[rows], lengths[block], tokens.second_start[block]).to(device.device)
        with torch.inference_mode(), device.autocast():
            out[block] = model.sentence_embedding(batch, "mean").float().cpu().numpy()
    return out


def told_by_embeddings(
    examples: "Examples", topics: Mapping[str, Topic], pretrained: str, compute: ComputeOptions
) -> np.ndarray:
    """The name of the topic [N] whose words are nearest to an example's texts, each of which counts alike."""
    from base_bert import load_weights, read_config, resolve_pretrained
    from bert import BertModel
    from text.tokenizer import load_tokenizer
    from utils.device import choose_device

    device, folder = choose_device(compute.use_gpu, compute.amp, compute.threads, say), resolve_pretrained(pretrained)
    shape = read_config(folder)
    model = BertModel(shape)
    model.load_state_dict(load_weights(folder, shape))
    model.to(device.device).eval()
    about = model, load_tokenizer(folder, shape.max_position_embeddings), device, compute.eval_batch_size
    own = np.mean([embeddings(column, *about) for column in examples.texts], axis=0)  # [N, H]
    words = np.stack([embeddings(topic.words, *about).mean(axis=0) for topic in topics.values()])  # [K, H]
    return np.array(list(topics))[nearest(own, words)]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def read(path: Path, task: Task, bad_rows: "BadRows") -> "tuple[Examples, np.ndarray | None]":
    """The examples of a training file, and what stands in its column of topics [N], if it has one."""
    from datasets import column_names, read_examples

    if COLUMN not in column_names(path):
        return read_examples(path, task, "train", bad_rows), None
    wider = replace(task, text_columns=(*task.text_columns, COLUMN))  # read as one text more
    examples = read_examples(path, wider, "train", bad_rows)
    *texts, topics = examples.texts
    return replace(examples, task=task, texts=tuple(texts)), np.array(topics)


def table(examples: "Examples", topics: np.ndarray) -> str:
    """A training file in the course's format, with a column of topics."""
    assert examples.labels is not None  # a training file has them
    task, text = examples.task, io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["", "id", *task.text_columns, task.label_column, COLUMN])
    columns = examples.ids, *examples.texts, examples.labels, topics
    writer.writerows([number, *row] for number, row in enumerate(zip(*columns, strict=True)))
    return text.getvalue()


def check(options: TopicOptions) -> Task:
    """The task that is meant. Raises UserError where a flag is missing or names no task."""
    for flag, given in (("topics", options.topics), ("out", options.out)):
        if given is None:
            raise UserError(f"--{flag} is missing; name a file")
    known = task_by_alias(TASKS)
    if options.task not in known:
        raise UserError(f"--task {options.task} is none of {', '.join(known)}")
    return TASKS[known[options.task]]


def main(argv: Sequence[str]) -> None:
    """Do what the command line asks."""
    groups = {"data": FileOptions, "topics": TopicOptions, "compute": ComputeOptions}
    parser = build_parser("sample_topics.py", str(__doc__).split("\n\n")[0], TASKS, groups, ("train",))
    given = vars(parser.parse_args(expand_arguments(argv)))
    made = groups_of(given, groups)
    data, options = made["data"], made["topics"]
    task = check(options)
    topics = read_topics(Path(options.topics))
    from datasets import BadRows, find_file
    from utils.files import probe_file, write_text

    path = find_file(Path(data.data_dir), task_options(given, task).train, task, "train")
    if path is None:
        raise UserError(f"--data_dir {data.data_dir}: has no {task.files['train']}; name one with --{task.name}_train")
    if Path(options.out).resolve() == path.resolve():
        raise UserError(f"--out {options.out}: is the file that is drawn from, and would be lost; name another one")
    probe_file(Path(options.out), "--out")
    bad_rows = BadRows(data.max_bad_rows, lambda line: say(f"skipped row {line}"))
    examples, labels = read(path, task, bad_rows)
    bad_rows.check()
    if labels is None:
        labels = told_by_embeddings(examples, topics, options.pretrained, made["compute"])
    chosen = drawn(labels, topics, options.seed)
    write_text(Path(options.out), table(examples.at(chosen), labels[chosen]))
    rows = [[name, f"{(labels == name).sum():,}", f"{own.quota:,}"] for name, own in topics.items()]
    say(format_table(["topic", "examples", "drawn"], [*rows, ["all", f"{len(examples):,}", f"{len(chosen):,}"]]))
    say(f"sample in {options.out}: train with --{task.name}_train {options.out}")


if __name__ == "__main__":
    run_script(main)
