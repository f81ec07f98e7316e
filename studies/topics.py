"""A sample of a training file with an exact number of examples of each topic (R2, sections 5.3.4 and A.1)."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from base_bert import load_weights, read_config, resolve_pretrained
from bert import BertModel
from config import ComputeOptions, FileOptions, TaskOptions
from datasets import BadRows, Examples, column_names, find_file, read_examples
from tasks import Task
from text.packing import pack, ragged_rows
from text.tokenizer import Tokenizer, load_tokenizer
from utils.console import progress, say
from utils.device import Device, device_of
from utils.errors import UserError, first_line
from utils.untrusted import parse_json, read_text

COLUMN = "topic"
EXAMPLE_LINE = "`Finance: 600: money, bank`"


@dataclass(frozen=True)
class Topic:
    """A topic: how many examples it gets, and words or phrases that describe it."""

    quota: int
    words: tuple[str, ...]


def read_topics(path: Path) -> dict[str, Topic]:
    """Return the topics of a file by name. Raise UserError with the line's number if a line is not a topic."""
    try:
        lines = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--topics {path}: cannot be read ({error}); give a text file in UTF-8") from error
    topics: dict[str, Topic] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *rest = (part.strip() for part in line.split(":", 2))
        words = tuple(word.strip() for word in rest[-1].split(",") if word.strip()) if len(rest) == 2 else ()
        if not name or not words or not re.fullmatch(r"0*[1-9]\d{0,11}", rest[0]):
            raise UserError(f"--topics {path}, line {number}: is not a topic; write it as {EXAMPLE_LINE}")
        if name in topics:
            raise UserError(f"--topics {path}, line {number}: {name} is there twice; remove one of the two")
        topics[name] = Topic(int(rest[0]), words)
    if not topics:
        raise UserError(f"--topics {path}: has no topic; write a line for each as {EXAMPLE_LINE}")
    return topics


def read_labels(path: Path) -> dict[str, str]:
    """Return the best label of each text in a file of results of transformers' pipeline zero-shot-classification.

    The file has a result in each line, or is a list of them. Raise UserError if it is damaged.
    """
    try:
        text = read_text(path).strip()
        results = parse_json(text) if text.startswith("[") else [parse_json(line) for line in text.split("\n")]
        best = [result["labels"][int(np.argmax(result["scores"]))] for result in results]
        return {" ".join(result["sequence"].split()): str(label) for result, label in zip(results, best, strict=True)}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"--labels {path}: cannot be read ({first_line(error):.80}); give json lines with sequence, labels, scores"
        ) from error


def labelled_topics(examples: Examples, labels: Mapping[str, str]) -> np.ndarray:
    """Return the label [N] of each example's first text, or of all its texts together.

    Raise UserError if some examples have none.
    """
    found = [labels.get(texts[0]) or labels.get(" ".join(texts)) for texts in zip(*examples.texts, strict=True)]
    if None in found:
        text = examples.texts[0][found.index(None)]
        raise UserError(
            f"--labels: lacks {found.count(None):,} of {len(found):,} examples, such as {text[:60]!r}; label the first "
            "text of each"
        )
    return np.array(found)


def draw(topic_names: np.ndarray, topics: Mapping[str, Topic], seed: int) -> np.ndarray:
    """Return the sorted indices of a sample that fills every quota. `topic_names` [N] has each example's topic.

    The draw of a topic depends only on the seed, its name and its examples. Raise UserError if a quota is too high.
    """
    members = {name: np.flatnonzero(topic_names == name) for name in topics}
    short = [
        f"{name} has {len(members[name]):,} of {topic.quota:,}"
        for name, topic in topics.items()
        if len(members[name]) < topic.quota
    ]
    if short:
        raise UserError(f"--topics: too few examples ({'; '.join(short)}); lower these counts or give other words")
    chosen = [
        np.random.default_rng([seed, *name.encode()]).choice(members[name], topic.quota, replace=False)
        for name, topic in topics.items()
    ]
    return np.sort(np.concatenate(chosen))


def nearest_topics(examples: np.ndarray, topics: np.ndarray) -> np.ndarray:
    """Return for each example [N, H] the index [N] of the topic [K, H] with the greatest cosine.

    Both are centred first, because embeddings of BERT have a large common part without meaning (Mu and Viswanath 2018,
    "All-but-the-top", section 2).
    """
    from sklearn.metrics.pairwise import cosine_similarity  # changes random's generator when it is imported

    cosines = cosine_similarity(examples - examples.mean(axis=0), topics - topics.mean(axis=0))
    return np.asarray(cosines.argmax(axis=1))


def embed(texts: Sequence[str], model: BertModel, tokenizer: Tokenizer, device: Device, batch_size: int) -> np.ndarray:
    """Return the mean token embeddings of texts, [N, H] float32."""
    tokens = tokenizer.encode(texts)
    lengths = np.diff(tokens.offsets)
    by_length = np.argsort(-lengths, kind="stable")
    blocks = [by_length[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    embeddings = np.empty((len(texts), model.config.hidden_size), np.float32)
    for block in progress(blocks, "embeddings", "batch"):
        rows = ragged_rows(tokens.offsets[block], lengths[block])
        batch = pack(tokens.input_ids[rows], lengths[block], tokens.second_start[block]).to(device.device)
        with torch.inference_mode(), device.autocast():
            embeddings[block] = model.sentence_embedding(batch, "mean").float().cpu().numpy()
    return embeddings


def assign_topics(
    examples: Examples, topics: Mapping[str, Topic], pretrained: str, compute: ComputeOptions
) -> np.ndarray:
    """Return the name [N] of the topic whose words are nearest to each example. All its texts count equally."""
    device = device_of(compute, say)
    folder = resolve_pretrained(pretrained)
    config = read_config(folder)
    model = BertModel(config)
    model.load_state_dict(load_weights(folder, config))
    model.to(device.device).eval()
    tokenizer = load_tokenizer(folder, config.max_position_embeddings)

    def embed_all(texts: Sequence[str]) -> np.ndarray:
        return embed(texts, model, tokenizer, device, compute.eval_batch_size)

    example_embeddings = np.mean([embed_all(column) for column in examples.texts], axis=0)  # [N, H]
    topic_embeddings = np.stack([embed_all(topic.words).mean(axis=0) for topic in topics.values()])  # [K, H]
    return np.array(list(topics))[nearest_topics(example_embeddings, topic_embeddings)]


def read_training_file(
    data: FileOptions, options: TaskOptions, task: Task, out: Path
) -> tuple[Examples, np.ndarray | None]:
    """Return the examples of the task's training file, and its column of topics [N] if it has one.

    Print the rows that cannot be read. Raise UserError if they are too many, if the file is missing, or if `out` would
    replace it.
    """
    path = find_file(Path(data.data_dir), options.train, task, "train")
    if path is None:
        raise UserError(f"--data_dir {data.data_dir}: has no {task.files['train']}; name one with --{task.name}_train")
    if out.resolve() == path.resolve():
        raise UserError(f"--out {out}: is the file that the sample is drawn from; name another one")
    bad_rows = BadRows(data.max_bad_rows, lambda line: say(f"skipped row {line}"))
    has_topics = COLUMN in column_names(path)
    columns = (*task.text_columns, COLUMN) if has_topics else task.text_columns  # reads the topic as one more text
    examples = read_examples(path, replace(task, text_columns=columns), "train", bad_rows, quoting=data.quoting)
    bad_rows.check()
    texts = examples.texts[: len(task.text_columns)]
    return replace(examples, task=task, texts=texts), np.array(examples.texts[-1]) if has_topics else None


def format_training_file(examples: Examples, topic_names: np.ndarray) -> str:
    """Return examples as a training file in the course's format, with a column of topics."""
    assert examples.labels is not None  # a training file has them
    task, text = examples.task, io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["", "id", *task.text_columns, task.label_column, COLUMN])
    columns = examples.ids, *examples.texts, examples.labels, topic_names
    writer.writerows([number, *row] for number, row in enumerate(zip(*columns, strict=True)))
    return text.getvalue()
