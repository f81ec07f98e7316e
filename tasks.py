"""The task table: one row holds everything that the package knows about a task.

Add a row to `TASKS` to add a task. The flags (`--train_NAME`, `--NAME_lr_multiplier`, ...), the reading of files, the
head, the loss, the metrics, the routines and the prediction files follow from the row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["classes", "binary", "similarity"]


@dataclass(frozen=True)
class Task:
    """One row of the task table.

    `kind` decides how a label is read and scored: `classes` (an integer class, accuracy), `binary` (0 or 1, accuracy)
    or `similarity` (a real number, Pearson correlation). Files have tabs or commas, whatever they are called, and begin
    with a line of column names: `id`, which may be missing, the one or two `text_columns` and, except in a test file,
    the `label_column`. A file called .jsonl has a JSON object with these names in each line.
    `backbone` is `sentiment` or `similarity`: the task's backbone in an architecture that has these two. `losses` are
    names in training/losses.py. `lr_multiplier`, `weight_decay` and `lr_floor` (the end of the cosine schedule as a
    fraction of its start) are the defaults of R0, appendix I and section M.4.
    """

    name: str
    title: str
    kind: Kind
    label_column: str
    label_range: tuple[float, float]
    text_columns: tuple[str, ...]
    files: dict[str, str]  # split -> file name inside --data_dir
    prediction_column: str
    backbone: str
    losses: tuple[str, ...]  # the first is the default, but for a similarity --arch may name another (config.ARCHS)
    lr_multiplier: float
    weight_decay: float
    lr_floor: float
    aliases: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    source: str = ""  # of the course's files, for model cards
    hub_name: str = ""  # of that source on the Hugging Face hub
    by_default: bool = True  # trained if no --train_NAME flag is given

    @property
    def is_pair(self) -> bool:
        """Whether an example has two texts."""
        return len(self.text_columns) == 2

    def is_siamese(self, pair_encoding: str | None) -> bool:
        """Return whether the two texts of an example are encoded apart, as --pair_encoding siamese asks for."""
        return self.is_pair and pair_encoding == "siamese"

    def column_words(self) -> dict[str, str]:
        """Return the column that each word of --NAME_columns stands for."""
        count = len(self.text_columns)
        texts = ["text"] if count == 1 else [f"text{i}" for i in range(1, count + 1)]
        return {"id": "id", **dict(zip(texts, self.text_columns, strict=True)), "label": self.label_column}

    @property
    def num_outputs(self) -> int:
        """Width of the head's output: one logit for each class, or a single number."""
        return int(self.label_range[1]) + 1 if self.kind == "classes" else 1

    @property
    def metrics(self) -> tuple[str, str]:
        """Names of the two metrics of the task, the main one first."""
        return ("pearson", "spearman") if self.kind == "similarity" else ("accuracy", "f1")

    @property
    def metric(self) -> str:
        """Name of the main metric, which models are compared by."""
        return self.metrics[0]


SENTENCE_PAIR = ("sentence1", "sentence2")

SST = Task(
    name="sst",
    title="SST sentiment",
    kind="classes",
    label_column="sentiment",
    label_range=(0, 4),
    text_columns=("sentence",),
    files={"train": "ids-sst-train.csv", "dev": "ids-sst-dev.csv", "test": "ids-sst-test-student.csv"},
    prediction_column="Predicted_Sentiment",
    backbone="sentiment",
    losses=("ce", "bce", "kl", "ordinal", "mixed"),
    lr_multiplier=4.0,
    weight_decay=9e-3,
    lr_floor=1 / 5,
    label_names=("negative", "somewhat negative", "neutral", "somewhat positive", "positive"),
    source="the Stanford Sentiment Treebank (Socher et al. 2013)",
    hub_name="stanfordnlp/sst",
)

PARA = Task(
    name="para",
    title="Quora paraphrase",
    kind="binary",
    label_column="is_duplicate",
    label_range=(0, 1),
    text_columns=SENTENCE_PAIR,
    files={"train": "quora-train.csv", "dev": "quora-dev.csv", "test": "quora-test-student.csv"},
    prediction_column="Predicted_Is_Paraphrase",
    backbone="similarity",
    losses=("bce",),
    lr_multiplier=5.0,
    weight_decay=1e-5,
    lr_floor=1 / 4,
    aliases=("quora",),
    label_names=("different", "paraphrase"),
    source="the Quora question pairs (Iyer, Dandekar and Csernai 2017), which are for non-commercial use",
    hub_name="quora-competitions/quora",
)

STS = Task(
    name="sts",
    title="STS similarity",
    kind="similarity",
    label_column="similarity",
    label_range=(0, 5),
    text_columns=SENTENCE_PAIR,
    files={"train": "sts-train.csv", "dev": "sts-dev.csv", "test": "sts-test-student.csv"},
    prediction_column="Predicted_Similiary",  # spelled so in the course's format
    backbone="similarity",
    losses=("pearson", "mse", "log-cosh", "mixed"),
    lr_multiplier=3.0,
    weight_decay=1e-2,
    lr_floor=1 / 4,
    source="the STS benchmark (Cer et al. 2017)",
    hub_name="sentence-transformers/stsb",
)

CFIMDB = Task(
    name="cfimdb",
    title="CFIMDB sentiment",
    kind="classes",
    label_column="sentiment",
    label_range=(0, 1),
    text_columns=("sentence",),
    files={"train": "ids-cfimdb-train.csv", "dev": "ids-cfimdb-dev.csv", "test": "ids-cfimdb-test-student.csv"},
    prediction_column="Predicted_Sentiment",
    backbone="sentiment",
    losses=("ce", "bce", "kl"),
    lr_multiplier=SST.lr_multiplier,
    weight_decay=SST.weight_decay,
    lr_floor=SST.lr_floor,
    label_names=("negative", "positive"),
    source="CFIMDB, film reviews",
    by_default=False,
)

TASKS: dict[str, Task] = {task.name: task for task in (SST, PARA, STS, CFIMDB)}
DEFAULT_TASKS: dict[str, Task] = {name: task for name, task in TASKS.items() if task.by_default}


def task_by_alias(tasks: Mapping[str, Task]) -> dict[str, str]:
    """Return the name of the task that each name and each alias stands for."""
    return {alias: name for name, task in tasks.items() for alias in (name, *task.aliases)}
