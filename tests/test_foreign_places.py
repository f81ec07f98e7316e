"""Names and folders in files that others made: nothing is looked up on the hub, and nothing of ours is read."""

import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from helpers import configure, fail, make_trainer, read_json, refusal

import ensemble
import multitask_classifier
import report
from base_bert import cached_pretrained
from evaluation import load as load_trained
from models.checkpoint import load, load_model, save
from models.run_records import record, recorded


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """best.pt of a finished run with adapters, whose start weights are a local folder."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    make_trainer(tiny_flags, run, "--lora_mode", "attn-only", "--lora_rank", 2, "--epochs", 1).fit()
    return run / "best.pt"


@pytest.fixture
def foreign(adapted: Path, tmp_path: Path) -> Callable[[object], Path]:
    """Return a function that writes a checkpoint whose adapters are said to be on other start weights."""

    def write(name: object) -> Path:
        content = load(adapted)
        config = content["config"]
        path = tmp_path / "inbox" / "foreign.pt"
        save(path, {**content, "config": {**config, "model": {**config["model"], "pretrained": str(name)}}})
        return path

    return write


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Let no connection begin; return the list of those that were asked for."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "run", fail)  # pip
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


def test_no_name_in_a_file_is_looked_up_on_the_hub(
    foreign: Callable[[object], Path], connections: list[Any], small_data: Path, tmp_path: Path, tiny_flags: list[str]
) -> None:
    path, data, evaluate = foreign("nobody/nothing"), ("--data_dir", small_data), multitask_classifier.main
    (tmp_path / "x.txt").write_text("a fine film\n")
    calls: dict[str, Callable[[], object]] = {
        "--evaluate": lambda: evaluate([*map(str, ("--evaluate", path, *data))]),
        "--predict": lambda: evaluate(
            [*map(str, ("--evaluate", path, "--predict", tmp_path / "x.txt", "--task", "sst"))]
        ),
        "--export": lambda: evaluate([*map(str, ("--evaluate", path, "--export", tmp_path / "out"))]),
        "--export_peft": lambda: evaluate([*map(str, ("--evaluate", path, "--export_peft", tmp_path / "out"))]),
        "ensemble.py": lambda: ensemble.main([*map(str, (path, *data, "--run_dir", tmp_path / "e"))]),
        "report.py": lambda: report.main([*map(str, ("--compare", path, path, *data, "--out", tmp_path / "r"))]),
        "evaluation.load": lambda: load_trained(path),
    }
    for name, call in calls.items():
        message = refusal(call)
        assert all(word in message for word in (str(path), "nobody/nothing", "--pretrained")), (name, message)
    assert connections == []
    refusal(lambda: evaluate([*map(str, ("--evaluate", path, "--pretrained", "nobody/nothing", *data))]))
    assert connections  # what the user types himself is looked up
    del connections[:]
    make_trainer(tiny_flags, tmp_path / "run", "--init_from", path, "--lora_mode", "attn-only", "--lora_rank", 2)
    assert connections == []  # on the user's own --pretrained


def test_the_base_model_that_an_adapter_of_peft_names_is_not_looked_up(
    adapted: Path, connections: list[Any], tiny_flags: list[str], tiny_bert: Path, tmp_path: Path
) -> None:
    words = ["--evaluate", adapted, "--pretrained", tiny_bert, "--export_peft", tmp_path / "peft"]
    multitask_classifier.main([*map(str, words)])
    for folder in (tmp_path / "peft").iterdir():
        values = read_json(folder / "adapter_config.json")
        (folder / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": "nobody/x"}))
        make_trainer(tiny_flags, tmp_path / folder.name, "--init_peft", folder)
    assert connections == []


def test_start_weights_of_a_file_are_found_where_they_may_be(
    adapted: Path, foreign: Callable[[object], Path], tiny_bert: Path, tmp_path: Path, connections: list[Any]
) -> None:
    """In a record of the run in the user's own cache and beside the file, but nowhere else."""
    beside = tmp_path / "inbox" / "bert"
    path = foreign(beside)
    assert "--pretrained" in refusal(load_model, path)
    shutil.copytree(tiny_bert, beside)
    load_model(path)
    (beside / "vocab.txt").rename(tmp_path / "vocab.txt")
    (beside / "vocab.txt").symlink_to(tmp_path / "vocab.txt")
    assert "--pretrained" in refusal(load_model, path)
    assert "--pretrained" in refusal(load_model, foreign(tiny_bert))
    record(load_model(foreign("elsewhere"), base=str(tiny_bert))[2])  # of that run, and of no other
    assert "--pretrained" in refusal(load_model, adapted)
    record(load_model(adapted, base=str(tiny_bert))[2])
    load_model(shutil.copy(adapted, tmp_path / "moved.pt"))
    load_model(foreign("elsewhere"), spare_base=str(tiny_bert))
    assert connections == []


def test_names_in_files_are_looked_up_in_caches_only(connections: list[Any], tmp_path: Path) -> None:
    for name in ("all-MiniLM-L6-v2", "bert-base-uncased", "../../etc", "/etc", "a" * 5000, "\0"):
        assert "--pretrained" in refusal(cached_pretrained, name)
    snapshot = tmp_path / "hub" / "models--somebody--bert" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (snapshot / name).write_text("{}")
    assert cached_pretrained("somebody/bert") == snapshot and connections == []


def test_a_report_reads_the_dev_files_of_runs_that_began_here(
    finished_runs: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Not those that a folder of somebody else names, unless a flag names them too."""
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0\n")
    run = shutil.copytree(finished_runs / "sst", tmp_path / "run")
    config = read_json(run / "config.json")
    config["tasks"]["sst"]["dev"] = str(secret)
    (run / "config.json").write_text(json.dumps(config))
    report.main([str(run), "--out", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    assert "--sst_dev" in printed and "--data_dir" in printed
    texts = "".join(path.read_text() for path in (tmp_path / "report").iterdir() if path.suffix in (".md", ".html"))
    assert "x:0:0" not in texts + printed and not list((tmp_path / "report").glob("*sst-confusion*"))
    report.main([str(run), "--data_dir", str(small_data), "--out", str(tmp_path / "again")])
    assert list((tmp_path / "again").glob("*sst-confusion.png"))


def test_a_record_outlives_versions_and_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = configure("--train_sst", "--data_dir", "here", "--sst_dev", "x.csv", "--seed", 5)
    assert recorded(config) is None
    record(config)
    monkeypatch.chdir("/")
    assert recorded(configure("--train_sst", "--data_dir", "here", "--sst_dev", "x.csv", "--seed", 6)) is None
    wanted = {"pretrained": None, "data_dir": str(tmp_path / "here"), "dev": {"sst": str(tmp_path / "x.csv")}}
    assert recorded(config) == wanted
    (file,) = (tmp_path / "minbert" / "runs").iterdir()
    for content in ("[", "5", '{"pretrained": 5, "data_dir": "", "dev": {}}'):
        file.write_text(content)
        assert recorded(config) is None
