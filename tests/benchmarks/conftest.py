"""Start weights and options of small benchmarks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from benchmarks.options import BenchmarkOptions

OptionsFactory = Callable[..., BenchmarkOptions]


def write_bert(folder: Path, tiny_bert: Path, dropout: float) -> Path:
    """Return a folder that transformers wrote, in which every parameter is random, biases included."""
    shape = transformers.BertConfig.from_pretrained(tiny_bert).to_dict()
    shape |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    torch.manual_seed(0)
    model: Any = transformers.BertModel(transformers.BertConfig.from_dict(shape))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.3)
    model.save_pretrained(folder)
    shutil.copy(tiny_bert / "vocab.txt", folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A folder of start weights with dropout."""
    return write_bert(tmp_path_factory.mktemp("bert"), tiny_bert, dropout=0.1)


@pytest.fixture(scope="session")
def still_bert(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """The same without dropout."""
    return write_bert(tmp_path_factory.mktemp("still-bert"), tiny_bert, dropout=0.0)


@pytest.fixture
def make_options(small_data: Path) -> OptionsFactory:
    """A function that returns the options of a small benchmark with the given start weights."""

    def make(pretrained: Path, **others: Any) -> BenchmarkOptions:
        small: dict[str, Any] = {"batch_size": 8, "steps": 2, "warmup": 1, "threads": 1, "data_dir": str(small_data)}
        return BenchmarkOptions(**{**small, "pretrained": str(pretrained), **others})

    return make
