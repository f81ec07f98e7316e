"""What people bring along from the course's handout: its checks of bert.py, its command lines, its checkpoints."""

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import ROOT, configure, hf_model, max_difference, randomise, refusal

import ensemble
from bert import BertModel
from config import BertConfig
from tasks import DEFAULT_TASKS, TASKS

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


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ("--option pretrain", "last-layer"),
        ("--option=finetune", "full-model"),
        ("--fine-tune-mode last-linear-layer", "last-layer"),
        ("--fine-tune-mode full-model", "full-model"),
    ],
)
def test_its_words_for_what_trains(words: str, mode: str) -> None:
    assert configure(*words.split()).train.fine_tune_mode == mode


def files_of_the_handout(split: str) -> list[str]:
    """Return the flags that name the data of a split, with the defaults of multitask_classifier.py."""
    return [word for name, task in DEFAULT_TASKS.items() for word in (f"--{name}_{split}", f"data/{task.files[split]}")]


OUT = {f"--{name}_{split}_out": f"predictions/{name}-{split}-output.csv" for name in TASKS for split in ("dev", "test")}
OUT_WORDS = [word for flag, file in OUT.items() if "cfimdb" not in flag for word in (flag, file)]
OTHERS = "--seed 11711 --epochs 1 --option finetune --use_gpu --batch_size 8 --hidden_dropout_prob 0.3 --lr 1e-5"
FILES = [word for split in ("train", "dev", "test") for word in files_of_the_handout(split)]
WHOLE = " ".join([*FILES, OTHERS, *OUT_WORDS])
SMALL = ["--threads", 1, "--max_length", 64, "--no_tensorboard"]


@pytest.fixture
def handout(script: Callable[..., str], small_data: Path, tiny_bert: Path, tmp_path: Path) -> Callable[..., str]:
    """The script in a folder with data/, with words of the handout and a small model instead of bert-base-uncased."""
    (tmp_path / "data").symlink_to(small_data)
    return lambda *words: script(*words, "--pretrained", tiny_bert, *SMALL)


@pytest.mark.parametrize(
    "words",
    [
        WHOLE,
        "--option pretrain --use_gpu --batch_size=64 --lr 1e-3",
        "--option finetune --epochs=10 --lr=1e-5 --batch_size=64 --use_gpu",
        "--fine-tune-mode last-linear-layer --lr 1e-3",
        "--fine-tune-mode full-model --lr 1e-5 --use_gpu --hidden_dropout_prob 0.1 --seed 1",
    ],
)
def test_its_command_lines_are_understood(handout: Callable[..., str], words: str) -> None:
    printed = handout(*words.split(), "--dry_run")
    assert all(task.title in printed for task in DEFAULT_TASKS.values())


def test_a_run_writes_its_six_files(handout: Callable[..., str], tmp_path: Path) -> None:
    handout(*WHOLE.split(), "--run_dir", "run")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "run" / "predictions").iterdir()}
    found = {path.name: path.read_bytes() for path in (tmp_path / "predictions").iterdir()}
    assert found == wanted and len(found) == 6
    ensemble.main(["run/best.pt", "--data_dir", "data", "--sts_test_out", "voted.csv", "--cache", "cache"])
    voted = tmp_path / "runs" / "ensemble" / "predictions" / "sts-test-output.csv"
    assert (tmp_path / "voted.csv").read_bytes() == voted.read_bytes()


def test_files_for_predictions_are_known_to_be_of_use_before_training(
    handout: Callable[..., str], tmp_path: Path
) -> None:
    assert "--sts_test_out" in refusal(handout, "--sts_test_out", "x.csv", "--no_test_predictions")
    assert "--para_dev_out" in refusal(handout, "--para_dev_out", "x.csv", "--mlm")
    (tmp_path / "folder").mkdir()
    message = refusal(handout, "--quora_dev_out", "folder", "--run_dir", "run")
    assert message.startswith("--para_dev_out folder: is a folder") and not (tmp_path / "run" / "best.pt").exists()
    assert "--sst_dev_out folder" in refusal(ensemble.main, ["run/best.pt", "--sst_dev_out", "folder"])


def test_its_other_flags_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    for words, meant in {"--local_files_only": "HF_HUB_OFFLINE=1", "--dev_out x": "--sst_dev_out"}.items():
        with pytest.raises(SystemExit):
            configure(*words.split())
        assert meant in capsys.readouterr().err


class Trap:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def save_as_the_handout(bert: BertModel, path: Path, **others: object) -> None:
    """Save what its multitask_classifier.py saves, with a head and the buffer that its BertModel has."""
    state = {f"bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    content = {
        "model": {**state, "bert.position_ids": torch.arange(512)[None], "sst_out.weight": torch.zeros(5, 32)},
        "optim": torch.optim.AdamW(bert.parameters()).state_dict(),
        "args": argparse.Namespace(lr=1e-5),
        "model_config": SimpleNamespace(hidden_size=768),
        "system_rng": random.getstate(),
        "numpy_rng": np.random.get_state(),
        "torch_rng": torch.random.get_rng_state(),
    }
    torch.save({**content, **others}, path)


def test_its_checkpoints_are_refused_with_the_remedy_and_run_no_code(
    stand_in: Path, script: Callable[..., str], tiny_flags: list[str], tmp_path: Path
) -> None:
    bert = BertModel.from_pretrained(snapshot_of(stand_in))
    save_as_the_handout(bert, Path("one.pt"), args=Trap(tmp_path / "run"))
    torch.save({"model": bert.state_dict(), "optim": {}}, "two.pt")  # by a program that saves no options
    for name in ("one.pt", "two.pt"):
        for message in (
            refusal(script, "--evaluate", name),
            refusal(script, *tiny_flags, "--init_from", name),
            refusal(ensemble.main, [name]),
        ):
            assert f"{name}: is a checkpoint of the course's code" in message
            assert "--pretrained" in message and "docs/python_api.md" in message
    assert not (tmp_path / "run").exists()


# The lines of docs/python_api.md.
CONVERSION = """
from pathlib import Path
import torch
from base_bert import resolve_pretrained, save_pretrained
from bert import BertModel
from text.tokenizer import load_tokenizer

start = "bert-base-uncased"
saved = torch.load("finetune-10-1e-05-multitask.pt", map_location="cpu", weights_only=False)["model"]
bert = BertModel.from_pretrained(start)
bert.load_state_dict({name: saved[f"bert.{name}"] for name in bert.state_dict()})
save_pretrained(Path("my-bert"), bert.config, bert.state_dict(), load_tokenizer(resolve_pretrained(start), 512))
"""


def test_the_bert_of_its_checkpoint_becomes_start_weights(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = BertModel.from_pretrained(snapshot_of(stand_in))
    randomise(trained, seed=9)
    save_as_the_handout(trained, Path("finetune-10-1e-05-multitask.pt"))
    exec(CONVERSION.replace("bert-base-uncased", str(snapshot_of(stand_in))), {})
    found, wanted = BertModel.from_pretrained("my-bert").state_dict(), trained.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
