"""The README.md of an export: a model card with the metadata that the Hugging Face hub reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from base_bert import HUB_NAMES, full_name
from cli.commands import command_of
from config import Config
from tasks import Task
from utils.download import COURSE_FILES, git_blob_id


@dataclass(frozen=True)
class Loader:
    """A library that reads an export: its name and pipeline on the hub, and lines of Python in which {name} stands."""

    library: str
    pipeline: str
    usage: str


SENTENCE_TRANSFORMERS = Loader(
    "sentence-transformers",
    "sentence-similarity",
    """\
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("{name}")  # this folder, or OWNER/NAME on the hub
model.encode(["a fine film", "a good movie"])""",
)
CLASSIFIER = Loader(
    "transformers",
    "text-classification",
    """\
from transformers import pipeline
model = pipeline("text-classification", "{name}", truncation=True)  # this folder, or OWNER/NAME on the hub
model("a fine film")  # two texts: model({{"text": "a fine film", "text_pair": "a good movie"}})""",
)

LICENCES = (
    "The licences of the start weights and of the data hold for this model too, and none is named here. "
    "Please check the licence of your data, then add a line `license:` above."
)
CLEANED = "Training cleaned the texts (--extra_clean); clean those that you give to the exported model, too."


def model_card(
    about: str,
    loader: Loader,
    folder: Path,
    config: Config,
    tasks: Sequence[Task],
    scores: Mapping[str, Mapping[str, float]],
) -> str:
    """Return the text of README.md for an export into `folder`.

    `about` says in one sentence what was exported, and `config` how it was trained. `tasks` are those whose data the
    exported weights have seen. `scores` are scores on dev, by task.
    """
    from huggingface_hub import ModelCardData  # takes a second

    base = full_name(config.model.pretrained)
    from_hub = not Path(base).is_absolute() and config.train.init_from is None
    certain = [task for task in tasks if is_course_file(training_files(config, task)[0])]
    metadata = ModelCardData(
        base_model=base if from_hub else None,
        datasets=[task.hub_name for task in certain if task.hub_name] or None,
        language="en" if base in HUB_NAMES.values() else None,
        library_name=loader.library,
        pipeline_tag=loader.pipeline,
    )
    start = f"checkpoint {config.train.init_from}, whose data count too" if config.train.init_from else base
    data = [f"- start weights: {start}", *(f"- {task.title}: {describe_files(config, task)}" for task in tasks)]
    sections = [f"# {folder.name}", f"{about}.", "## Data and licences", "\n".join(data), LICENCES]
    numbers = [(task.title, name, value) for task in tasks for name, value in scores.get(task.name, {}).items()]
    if numbers:
        rows = [f"| {title} | {name} | {value:.4f} |" for title, name, value in numbers]
        sections += ["## Scores of the whole model on dev", "\n".join(["| task | score | value |", "|-|-|-|", *rows])]
    sections += ["## Training", f"```\n{command_of(config)}\n```"]
    if config.data.extra_clean:
        sections.append(CLEANED)
    sections += ["## Use", f"```python\n{loader.usage.format(name=folder.name)}\n```"]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def training_files(config: Config, task: Task) -> list[Path]:
    """Return the training files of a task, of which the first may be gone, and further ones that are still there."""
    options, folder = config.tasks[task.name], Path(config.data.data_dir)
    return [Path(options.train or folder / task.files["train"]), *map(Path, options.extra or ())]


def is_course_file(path: Path) -> bool:
    """Return whether a file is still there and is the one of this name that the course gave out."""
    return path.is_file() and git_blob_id(path.read_bytes()) == COURSE_FILES.get(path.name)


def describe_files(config: Config, task: Task) -> str:
    """Return the names of a task's training files, with the source of those that are certain."""
    paths = training_files(config, task)
    names = ", ".join(f"`{path.name}`" for path in paths)
    return f"{names}, the course's file of {task.source}" if is_course_file(paths[0]) else names
