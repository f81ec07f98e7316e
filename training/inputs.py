"""The files that decide a run: data and start weights. --resume compares their contents, wherever they lie."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from base_bert import WEIGHTS_FILES, weights_sha256
from config import Config
from datasets import find_extra, find_file, read_content
from models.multitask_bert import MultitaskBERT
from models.peft_exchange import peft_files
from tasks import TASKS
from text.tokenizer import Tokenizer
from utils.files import sha256


@dataclass(frozen=True)
class InputFile:
    """A file (the folder of weights that are dealt out among files), the flag that names it, and its SHA-256."""

    flag: str
    path: str
    sha256: str

    @classmethod
    def of(cls, flag: str, path: Path, sha256: str) -> "InputFile":
        """Return the same with the path from the root, which means the same in every working folder."""
        return cls(flag, os.path.abspath(path), sha256)


def text_sha256(text: str | bytes) -> str:
    """Return the SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def input_files(config: Config, init_peft: str | None, model: MultitaskBERT, tokenizer: Tokenizer) -> list[InputFile]:
    """Return the inputs of a run whose `model` and `tokenizer` are those of --pretrained; always in the same order.

    `init_peft` is --init_peft, which the options of its adapters have replaced in the configuration. Test files are
    left out, since only the trained model reads them. Raises UserError if a file cannot be read any more.
    """
    return [*data_files(config), *weights_files(config, init_peft, model, tokenizer)]


def data_files(config: Config) -> Iterator[InputFile]:
    """Yield the training and dev files of each task, as they are when they are decompressed."""
    folder = Path(config.data.data_dir)
    for name, options in config.tasks.items():
        task = TASKS[name]
        found = [(f"--{name}_train", find_file(folder, options.train, task, "train"))]
        found += [(f"--{name}_extra", find_extra(folder, extra, task)) for extra in options.extra or ()]
        if not config.train.mlm:
            found.append((f"--{name}_dev", find_file(folder, options.dev, task, "dev")))
        for flag, path in found:
            if path is not None:
                yield InputFile.of(flag, path, text_sha256(read_content(path)))


def weights_files(
    config: Config, init_peft: str | None, model: MultitaskBERT, tokenizer: Tokenizer
) -> Iterator[InputFile]:
    """Yield what training starts from: shape, weights and vocabulary of --pretrained, --init_from and --init_peft."""
    folder = Path(tokenizer.source).parent
    weights = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), folder)
    yield InputFile.of("--pretrained", folder / "config.json", text_sha256(json.dumps(model.bert_config.to_dict())))
    yield InputFile.of("--pretrained", weights, weights_sha256(folder))
    yield InputFile.of("--pretrained", Path(tokenizer.source), tokenizer.sha256)
    if config.train.init_from is not None:
        yield InputFile.of("--init_from", Path(config.train.init_from), sha256(Path(config.train.init_from)))
    for path in () if init_peft is None else peft_files(Path(init_peft)):
        yield InputFile.of("--init_peft", path, sha256(path))
