"""benchmark.py: both sides do the same work, a difference is refused, and the results hold what they should."""

import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmark import (
    COMPARISONS,
    LR,
    Minbert,
    Options,
    Side,
    Transformers,
    Workload,
    check_same,
    forward_flops,
    make_workload,
    measure_speed,
)
from bert import BertModel
from config import BertConfig
from kernels import linear as products
from tasks import DEFAULT_TASKS
from text.packing import PackedBatch
from training.task_sampling import Step
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FIFTY_STEPS_LR = 1e-4


def make_bert(folder: Path, tokenizer_from: Path, dropout: float) -> Path:
    """A folder that transformers wrote, in which every parameter, biases included, is random."""
    shape = transformers.BertConfig.from_pretrained(tokenizer_from).to_dict()
    shape |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    torch.manual_seed(0)
    model: Any = transformers.BertModel(transformers.BertConfig.from_dict(shape))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.3)
    model.save_pretrained(folder)
    shutil.copy(tokenizer_from / "vocab.txt", folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"), tiny_bert, dropout=0.1)


@pytest.fixture(scope="module")
def still_bert(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    return make_bert(tmp_path_factory.mktemp("still-bert"), tiny_bert, dropout=0.0)


def options(bert: Path, small_data: Path, **others: Any) -> Options:
    common: dict[str, Any] = {"batch_size": 8, "steps": 2, "warmup": 1, "threads": 1}
    return Options(**{**common, "pretrained": str(bert), "data_dir": str(small_data), **others})


def make_sides(bert: Path, small_data: Path, task: str) -> tuple[Workload, dict[str, Side]]:
    work = make_workload(options(bert, small_data), task, print)
    return work, {name: build(work) for name, build in COMPARISONS["full-model"].items()}


# Both sides do the same


@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_outputs_and_evaluation_are_the_same(bert: Path, small_data: Path, task: str) -> None:
    work, sides = make_sides(bert, small_data, task)
    assert check_same(sides, work) < 2e-5
    peer, own = (np.asarray(side.evaluate()) for side in sides.values())
    assert peer.shape == own.shape and len(own) == 12 and own.std() > 0.01
    np.testing.assert_allclose(own, peer, rtol=0, atol=2e-5)
    assert all(side.model.training for side in sides.values())


@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_training_is_the_same_without_dropout(still_bert: Path, small_data: Path, task: str) -> None:
    work, sides = make_sides(still_bert, small_data, task)
    peer, own = sides["transformers"], sides["minbert"]
    assert isinstance(peer, Transformers) and isinstance(own, Minbert)
    before = {side: [p.detach().clone() for p in side.model.parameters()] for side in (peer, own)}
    for side in (peer, own):
        side.train_on(work.batches[0])
    bert: Any = peer.model.bert
    backbone: Any = own.model.backbone(task)
    pairs = {
        bert.embeddings.word_embeddings.weight: backbone.word_embedding.weight,
        bert.encoder.layer[0].attention.self.query.weight: backbone.bert_layers[0].self_attention.query.weight,
        bert.encoder.layer[1].output.dense.bias: backbone.bert_layers[1].out_dense.bias,
        bert.pooler.dense.weight: backbone.pooler_dense.weight,
    }
    # The first moment is a tenth of the gradient, the same whatever the optimizer's eps does.
    for theirs, ours in pairs.items():
        wanted = peer.optimizer.state[theirs]["exp_avg"]
        found = own.trainer.optimizers[task].state[ours]["exp_avg"]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        assert wanted.abs().max() > 0
        assert (ours - theirs).abs().mean() < LR / 10
    for side, old in before.items():
        assert all((a != b).any() for a, b in zip(old, side.model.parameters(), strict=True))


@pytest.mark.parametrize("fewest", [1, products.MIN_MULTIPLICATIONS])
@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_fifty_steps_have_the_losses_of_padded_training(
    still_bert: Path, small_data: Path, task: str, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SGD, whose step is torch's own; a rate at which the loss moves a thousand times as far as the bound.

    Once with oneDNN for all products, where there is one, and once with torch's for all of these small ones.
    """
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", fewest)
    work = make_workload(options(still_bert, small_data, steps=49), task, print)
    own_options = replace(work.config.tasks[task], lr_multiplier=1.0)
    train = replace(work.config.train, optim="SGD", lr=FIFTY_STEPS_LR)
    work = replace(work, config=replace(work.config, train=train, tasks={**work.config.tasks, task: own_options}))
    peer, own = Transformers(work), Minbert(work)
    decay = own_options.weight_decay
    peer.optimizer = torch.optim.SGD(peer.model.parameters(), FIFTY_STEPS_LR, 0.9, weight_decay=decay, nesterov=True)
    wanted: list[float] = []
    loss = peer.loss

    def recorded(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = loss(outputs, labels)
        wanted.append(value.item())
        return value

    peer.loss = recorded
    found = []
    for indices in work.batches:
        peer.train_on(indices)
        found.append(own.trainer.train_step(Step(task, indices), False)[0].item())
    assert len(found) == len(wanted) == 50
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    again = own.trainer.train_step(Step(task, work.batches[0]), False)[0].item()
    assert abs(again - wanted[0]) > 1e-2  # training went somewhere


@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_dropout_is_on_in_training(bert: Path, small_data: Path, task: str) -> None:
    work, sides = make_sides(bert, small_data, task)
    for side in sides.values():
        first, second = side.forward(work.batches[0]), side.forward(work.batches[0])
        assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("comparison", ["lora", "dora"])
def test_both_sides_train_as_many_adapters_and_nothing_else(bert: Path, small_data: Path, comparison: str) -> None:
    work = make_workload(options(bert, small_data), "sst", print)
    sides = {name: build(work) for name, build in COMPARISONS[comparison].items()}
    assert benchmark.check_same(sides, work) <= 1e-5
    counts = []
    for side in sides.values():
        trained = {name: p for name, p in side.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in side.model.named_parameters()}
        for indices in work.batches:
            side.train_on(indices)
        changed = {name for name, p in side.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == set(trained)
        assert all(any(part in name for part in ("lora_", "magnitude", "head")) for name in changed)
        counts.append(sum(p.numel() for p in trained.values()))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("perturbed", ["transformers", "minbert"])
def test_a_difference_is_refused(bert: Path, small_data: Path, perturbed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = COMPARISONS["full-model"][perturbed]

    def build_perturbed(work: Workload) -> Side:
        side = build(work)
        weight = next(p for name, p in side.model.named_parameters() if name.endswith("1.attention.output.dense.bias")
                      or name.endswith("1.attention_dense.bias"))  # fmt: skip
        with torch.no_grad():
            weight[0] += 0.05
        return side

    monkeypatch.setitem(COMPARISONS["full-model"], perturbed, build_perturbed)
    monkeypatch.setattr(benchmark, "time_in_turn", lambda *_: pytest.fail("timed in spite of the difference"))
    with pytest.raises(UserError, match="SST sentiment: the outputs of transformers and minbert differ by up to"):
        measure_speed(options(bert, small_data), "full-model", "sst")


def test_a_difference_that_is_no_number_is_refused(bert: Path, small_data: Path) -> None:
    work, sides = make_sides(bert, small_data, "sts")
    with torch.no_grad():
        next(sides["minbert"].model.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="differ by up to nan"):
        check_same(sides, work)


# Figures


def test_flops_are_those_that_torch_counts(still_bert: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_onednn", lambda: False)  # whose products torch does not count
    work, sides = make_sides(still_bert, small_data, "sst")
    lengths = np.diff(work.train.tokens[0].offsets)
    same = np.flatnonzero(lengths == np.bincount(lengths).argmax())  # nothing is padded
    assert len(same) > 1
    head = 2 * len(same) * work.bert_config.hidden_size * 5
    with FlopCounterMode(display=False) as counter:
        sides["minbert"].train_on(same)
    assert counter.get_total_flops() == 3 * (forward_flops(work.bert_config, lengths[same]) + head)


def test_the_script(bert: Path, small_data: Path, tmp_path: Path) -> None:
    flags = ["--tasks", "para", "--steps", "2", "--warmup", "1", "--batch_size", "8", "--threads", "1"]
    flags += ["--pretrained", str(bert), "--data_dir", str(small_data), "--out", str(tmp_path / "results")]
    done = subprocess.run([sys.executable, ROOT / "benchmark.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").iterdir()
    content = json.loads(path.read_text())
    assert content["config"]["batch_size"] == 8 and content["config"]["tasks"] == ["para"]
    assert content["versions"]["transformers"] == transformers.__version__
    assert content["device"].startswith("cpu") and "git_commit" in content
    train, evaluation = content["results"]
    assert (train["mode"], evaluation["mode"]) == ("train", "eval")
    for record in (train, evaluation):
        assert record["max_difference"] <= 1e-4 and record["matmul_peak"] > 0
        assert list(record["seconds"]) == ["transformers", "minbert"]
        assert all(len(own) == 2 and min(own) > 0 for own in record["seconds"].values())
        for peaks in record["memory"].values():
            assert 50e6 < peaks["built"] <= peaks["eval"] <= peaks["train"]
        first, second = (cell.split() for cell in done.stdout.splitlines() if cell.startswith("full-model  para"))
        peer, own = (np.array(seconds) for seconds in record["seconds"].values())
        shown = first if record is train else second
        assert shown[2] == record["mode"] and float(shown[5]) == pytest.approx(np.median(peer / own), abs=0.006)
    assert train["batches"] == 1 and train["examples"] == [8, 8]
    assert evaluation["batches"] == 2 and evaluation["examples"] == [12, 12]
    work = make_workload(options(bert, small_data), "para", print)
    assert train["tokens"] == [work.train.batch(step).num_tokens for step in work.batches[1:]]
    assert evaluation["tokens"] == [work.dev.lengths.sum()] * 2
    assert str(path) in done.stdout


def test_tokenising_a_large_file(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own-cache"))
    monkeypatch.setattr(benchmark, "PAIRS", 12_000)
    monkeypatch.setattr(benchmark, "import_transformers", lambda: pytest.fail("there is no peer"))
    benchmark.main(["--modes", "tokenise", "--pretrained", str(tiny_bert), "--out", str(tmp_path / "results")])
    (path,) = (tmp_path / "results").iterdir()
    (record,) = json.loads(path.read_text())["results"]
    assert (record["mode"], record["pairs"]) == ("tokenise", 12_000)
    first, cached = record["first"], record["cached"]
    assert first["tokens"] == cached["tokens"] == pytest.approx(13, abs=0.1)
    assert 0 < cached["seconds"] < first["seconds"] and min(first["peak"], cached["peak"]) > 50e6
    line = f"tokenise 12,000 pairs of 13.0 tokens a text: first {first['seconds']:.2f} s"
    assert line in capsys.readouterr().out
    assert not (tmp_path / "own-cache").exists()  # it has a cache of its own, which is gone


def test_steps_of_the_optimizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    monkeypatch.setattr(benchmark, "BertConfig", lambda: small)
    benchmark.main(["--modes", "optimizer", "--steps", "3", "--threads", "1", "--out", str(tmp_path / "results")])
    (path,) = (tmp_path / "results").iterdir()
    records = json.loads(path.read_text())["results"]
    assert [record["optimizer"] for record in records] == ["AdamW", "Adamax"]
    assert [list(record["seconds"]) for record in records] == [
        ["torch, fused", "minbert"],
        ["torch, foreach", "minbert"],
    ]
    count = sum(parameter.numel() for parameter in BertModel(small).parameters())
    said = capsys.readouterr().out
    for record in records:
        assert record["parameters"] == count
        assert all(len(own) == 3 and min(own) > 0 for own in record["seconds"].values())
        assert f"{record['optimizer']}, a step of {count:,} parameters: torch, " in said


def test_epochs_with_the_cache_of_frozen_layers(tiny_bert: Path, small_data: Path) -> None:
    record = benchmark.measure_frozen(options(tiny_bert, small_data), "para")
    assert (record["task"], record["steps"], record["batch_size"]) == ("para", 3, 8)  # of 20 examples
    assert list(record["seconds"]) == ["computed anew", "--cache_frozen"]
    plain, cached = (np.array(own) for own in record["seconds"].values())
    assert len(plain) == len(cached) == benchmark.FROZEN_EPOCHS and plain.min() > 0 and cached.min() > 0
    line = benchmark.frozen_line(record)
    assert line.startswith("frozen para, an epoch of 3 steps of 8 examples: ")
    assert line.endswith(f"; {np.median(plain / cached):.1f} times as fast")


def test_only_one_side_computes_frozen_layers_again(
    tiny_bert: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_dropout: list[bool] = []
    embed = BertModel.embed

    def counted(self: BertModel, batch: PackedBatch) -> torch.Tensor:
        with_dropout.append(self.training)
        return embed(self, batch)

    monkeypatch.setattr(BertModel, "embed", counted)
    monkeypatch.setattr(benchmark, "FROZEN_EPOCHS", 4)
    benchmark.measure_frozen(options(tiny_bert, small_data), "sst")
    assert with_dropout.count(True) == 5 * 3  # an epoch more than is timed
    assert with_dropout.count(False) == 1  # all examples at once


def test_the_start_of_a_run(tiny_bert: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "STARTS", 1)
    record = benchmark.measure_start(options(tiny_bert, small_data))
    assert 0 < record["seconds"]["help"][0] < record["seconds"]["run"][0]
    assert benchmark.start_line(record).startswith("start: --help 0.")
    with pytest.raises(UserError, match=r"multitask_classifier.py .* failed: (.*\n)*error: --run_dir"):
        monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda: nullcontext(__file__))
        benchmark.measure_start(options(tiny_bert, small_data))


# What a GPU is held to


def test_made_data_have_the_real_lengths(tiny_bert: Path) -> None:
    with benchmark.with_data(options(tiny_bert, Path(benchmark.MADE), steps=20), least=400) as given:
        work = make_workload(given, "para", print)
        assert len(work.train) == 8 * 21 and len(work.dev) == benchmark.EVAL_BATCHES * 8
    lengths = benchmark.drawn_lengths(DEFAULT_TASKS["para"], 20_000, 0)
    assert lengths.shape == (20_000, 2) and lengths.mean() == pytest.approx(15.8, abs=0.3)
    assert (lengths.min(), np.quantile(lengths, 0.9)) == (3, 25) and lengths.max() <= 95
    made = np.concatenate([np.diff(tokens.offsets) for tokens in work.train.tokens])
    assert made.mean() == pytest.approx(lengths.mean(), abs=2)
    assert not Path(given.data_dir).exists()


def test_the_recipe_is_timed_stage_by_stage(tiny_bert: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "RECIPE_WARMUP", 0)
    monkeypatch.setattr(benchmark, "RECIPE_STEPS", 1)
    record = benchmark.measure_recipe(options(tiny_bert, small_data))
    assert list(record["stages"]) == ["freezeall", "unfreezetop1", "unfreezetop2", "unfreezeall"]
    assert all(list(own) == list(benchmark.ROWS) and min(own.values()) > 0 for own in record["stages"].values())
    quora = sum(record["stages"][name]["para"] for name in ("freezeall", "unfreezetop1", "unfreezetop1"))
    quora += record["stages"]["unfreezetop2"]["para"] + 3 * record["stages"]["unfreezeall"]["para"]
    assert record["train"]["para"] == pytest.approx(quora * 4422)  # batches of 64
    assert benchmark.recipe_line(record).startswith("recipe: freezeall sst ")


def test_targets() -> None:
    train = {"mode": "train", "task": "para", "comparison": "full-model", "square_peak": 1e15}
    train |= {"seconds": {"transformers": [1.0, 1.0], "minbert": [0.5, 0.2]}, "examples": [2560, 2560]}
    train |= {"flops": [1e14, 1e14]}  # 0.2e15 and 0.5e15 a second
    recipe = {"mode": "recipe", "train": {"sst": 100.0, "para": 150.0}, "evaluation": 49.0}
    assert benchmark.targets([train, recipe], 256) == [
        "met     times transformers at batch 256: 3.50, at least 2.5",
        "met     share of the device's peak at batch 256: 0.350, at least 0.35",
        "MISSED  seconds for 283,003 pairs at batch 256: 31.6, at most 25",
        "met     seconds of the Yin Yang recipe: 299, at most 300",
    ]
    assert benchmark.targets([train], 64)[0] == "MISSED  times transformers at batch 64: 3.50, at least 5"
    on_cpu = benchmark.targets([{**train, "square_peak": None}], 256)  # whose peak is not measured
    assert [line[8:].split(":")[0] for line in on_cpu] == [
        "times transformers at batch 256",
        "seconds for 283,003 pairs at batch 256",
    ]


def test_the_peers_batches_made_by_processes_are_the_same(bert: Path, small_data: Path) -> None:
    work = make_workload(options(bert, small_data, loader_workers=1), "para", print)
    peer = Transformers(work)
    assert peer.loader is not None
    for number, (texts, labels) in enumerate(peer.loader):
        wanted, wanted_labels = peer.batches[number]
        assert all(torch.equal(a, b) for x, y in zip(texts, wanted, strict=True) for a, b in zip(x, y, strict=True))
        assert torch.equal(labels, wanted_labels)
    assert number + 1 == len(work.batches)


# Mistakes


def test_a_batch_larger_than_the_data(bert: Path, small_data: Path) -> None:
    with pytest.raises(UserError, match=r"--batch_size 21: .*ids-sst-train.csv has only 20 examples"):
        make_workload(options(bert, small_data, batch_size=21), "sst", print)


def test_too_few_data_for_the_recipe(tiny_bert: Path, small_data: Path) -> None:
    with pytest.raises(UserError, match=r"recipe needs 31 steps of sst, but --data_dir .* has only 1; use .* made"):
        benchmark.measure_recipe(options(tiny_bert, small_data))


def test_few_data_are_used_again(bert: Path, small_data: Path) -> None:
    work = make_workload(options(bert, small_data, steps=6), "sst", print)
    assert len(work.batches) == 7 and {len(step) for step in work.batches} == {8}
    assert set(np.concatenate(work.batches)) <= set(range(20))


def test_missing_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = sys.modules["datasets"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers is missing; pip install -r requirements-dev\.txt"):
        benchmark.import_transformers()
    assert sys.modules["datasets"] is ours


def test_an_output_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/results: cannot be made"):
        benchmark.main(["--out", str(tmp_path / "file" / "results")])
