"""What people bring along from the course's handout: its checks of bert.py, its command lines, its checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT, hf_model, max_difference, randomise

from bert import BertModel
from config import BertConfig

# The calls of sanity_check.py. It runs in the folder of its data, which is a file of two tensors.
SANITY_CHECK = """
import torch
from bert import BertModel
wanted = torch.load("./sanity_check.data")
ids = torch.tensor([[101, 7592, 2088, 102, 0, 0, 0, 0], [101, 7592, 15756, 2897, 2005, 17953, 2361, 102]])
mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
outputs = BertModel.from_pretrained('bert-base-uncased')(ids, mask)
outputs["last_hidden_state"] = outputs["last_hidden_state"] * mask.unsqueeze(-1)
wanted["last_hidden_state"] = wanted["last_hidden_state"] * mask.unsqueeze(-1)
for name in ("last_hidden_state", "pooler_output"):
    assert outputs[name].shape == wanted[name].shape
    assert (outputs[name] - wanted[name]).abs().max() < 1e-5
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the Hugging Face cache that has a small model of transformers as bert-base-uncased."""
    home = tmp_path_factory.mktemp("hf")
    repo = home / "hub" / "models--bert-base-uncased"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shape = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    randomise(hf_model(config=shape), 5, 0.15).save_pretrained(snapshot)
    (snapshot / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\n")
    return home


def snapshot_of(home: Path) -> Path:
    """Return the folder with the model's files."""
    return next((home / "hub").glob("*/snapshots/*"))


def test_the_calls_of_sanity_check(stand_in: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[101, 7592, 2088, 102, 0, 0, 0, 0], [101, 7592, 15756, 2897, 2005, 17953, 2361, 102]])
    theirs = transformers.BertModel.from_pretrained(snapshot_of(stand_in)).eval()
    with torch.no_grad():
        wanted = theirs(ids, (ids > 0).long())
    tensors = {name: wanted[name] for name in ("last_hidden_state", "pooler_output")}
    torch.save(tensors, tmp_path / "sanity_check.data")
    environment = {**os.environ, "HF_HOME": str(stand_in), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SANITY_CHECK], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_from_pretrained_is_without_dropout_and_trains(stand_in: Path) -> None:
    folder = snapshot_of(stand_in)
    ours = BertModel.from_pretrained(folder)
    assert not ours.training and all(parameter.requires_grad for parameter in ours.parameters())
    assert ours.config.hidden_size == 32 and ours.config.hidden_dropout_prob == 0.1
    ids = torch.randint(1, 30_000, (5, 21), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(21) < torch.tensor([21, 1, 7, 20, 2])[:, None]).long()
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    found, wanted = ours(ids * mask, mask), theirs(ids * mask, mask)
    assert max_difference(found["last_hidden_state"], wanted.last_hidden_state * mask[..., None]) < 1e-5
    assert max_difference(found["pooler_output"], wanted.pooler_output) < 1e-5
