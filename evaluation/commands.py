"""Do --predict, and load the model of --evaluate for it and for the exports."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from config import Config
from evaluation.trained import TrainedModel, load_trained
from tasks import Task
from utils.device import device_of
from utils.errors import UserError
from utils.untrusted import MAX_DATA, read_bytes, shown


def trained_model(config: Config, say: Callable[[str], None]) -> TrainedModel:
    """Return the model of --evaluate's checkpoint on the device that the options ask for.

    `say` tells what the device lacks. Raises UserError if the file is no checkpoint, or if --mlm has made it.
    """
    compute = config.compute
    device = device_of(compute, say)
    return load_trained(Path(str(config.run.evaluate)), device, compute.eval_batch_size, base_of(config))


def base_of(config: Config) -> str | None:
    """Return --pretrained if it was given: the base weights of a checkpoint with adapters."""
    return config.model.pretrained or None


def predict_lines(config: Config) -> None:
    """Print label, probability and texts of each line of the file of --predict. A pair has a tab between its texts.

    Raises UserError for a task that the checkpoint does not know and for a file that cannot be read.
    """
    trained = trained_model(config, partial(print, file=sys.stderr))  # not among the labels, which may go into a pipe
    task = trained.task(str(config.run.task))
    texts = read_lines(str(config.run.predict), task)
    for row, (label, name, probability) in zip(texts, trained.predict(task.name, texts), strict=True):
        about = [f"{label:.3f}"] if probability is None else [str(label), name, f"{probability:.3f}"]
        line = "\t".join([*about, *row])
        print(shown(line, None) if sys.stdout.isatty() else line)  # a pipe or a file gets the texts as they are


def read_lines(name: str, task: Task) -> list[tuple[str, ...]]:
    """Return the texts in each line of a file, or of standard input for "-"; empty lines are skipped.

    Raises UserError if the file cannot be read, or if a line has not as many texts as the task.
    """
    try:
        # As bytes, since Python decodes standard input by the locale.
        content = (sys.stdin.buffer.read() if name == "-" else read_bytes(Path(name), MAX_DATA)).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"--predict {name}: cannot be read ({error}); give a text file in UTF-8") from error
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    lines = [[text.strip() for text in line.split("\t")] for line in content.split("\n")]
    rows = {number: row for number, row in enumerate(lines, start=1) if any(row)}
    for number, row in rows.items():
        if len(row) != len(task.text_columns) or not all(row):
            wanted = "2 texts per line with a tab between them" if task.is_pair else "1 text per line"
            raise UserError(f"--predict {name}, line {number}: {task.title} needs {wanted}")
    if not rows:
        raise UserError(f"--predict {name}: holds no sentence; give one per line")
    return [tuple(row) for row in rows.values()]
