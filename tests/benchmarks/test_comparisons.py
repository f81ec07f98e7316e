"""Both sides of a comparison do the same work, and a difference is refused."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import benchmark_options
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import modes
from benchmarks.modes import COMPARISONS, Side, check_same, forward_flops, measure_speed
from benchmarks.peers import MinbertSide, TransformersSide, import_peer, trainer_from_flags
from benchmarks.workloads import LR, Workload, make_workload
from bert import BertModel
from kernels import linear
from tasks import DEFAULT_TASKS, PARA
from utils.errors import UserError

FIFTY_STEPS_LR = 1e-4


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


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A folder of start weights with dropout."""
    return write_bert(tmp_path_factory.mktemp("bert"), tiny_bert, dropout=0.1)


@pytest.fixture(scope="module")
def still_bert(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """The same without dropout."""
    return write_bert(tmp_path_factory.mktemp("still-bert"), tiny_bert, dropout=0.0)


def build_sides(work: Workload, comparison: str = "full-model") -> dict[str, Side]:
    return {name: build(work) for name, build in COMPARISONS[comparison].items()}


@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_outputs_and_evaluation_are_the_same(bert: Path, small_data: Path, task: str) -> None:
    work = make_workload(benchmark_options(bert, small_data), task, print)
    sides = build_sides(work)
    assert check_same(sides, work) < 2e-5
    peer, ours = (np.asarray(side.evaluate()) for side in sides.values())
    assert peer.shape == ours.shape and len(ours) == 12 and ours.std() > 0.01
    np.testing.assert_allclose(ours, peer, rtol=0, atol=2e-5)
    for side in sides.values():
        assert side.model.training
        first, second = side.forward(work.batches[0]), side.forward(work.batches[0])
        assert (first - second).abs().max() > 1e-3  # dropout is on


def test_a_side_that_shall_compile_does(still_bert: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be measured as an eager one otherwise."""
    compiled: list[BertModel] = []
    monkeypatch.setattr(BertModel, "compile_layers", lambda model: compiled.append(model))
    options = benchmark_options(still_bert, small_data)
    work = make_workload(options, "para", print)
    MinbertSide(work)
    trainer_from_flags(options, ["--train_para"], {"para": PARA}, print)
    assert not compiled
    config = replace(work.config, train=replace(work.config.train, compile=True))
    side = MinbertSide(replace(work, config=config))
    trainer = trainer_from_flags(options, ["--train_para", "--compile"], {"para": PARA}, print)
    assert compiled == [side.model.backbone("para"), trainer.model.backbone("para")]


@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_training_is_the_same_without_dropout(still_bert: Path, small_data: Path, task: str) -> None:
    work = make_workload(benchmark_options(still_bert, small_data), task, print)
    peer, ours = TransformersSide(work), MinbertSide(work)
    before = {side: [p.detach().clone() for p in side.model.parameters()] for side in (peer, ours)}
    for side in (peer, ours):
        side.train_on(work.batches[0])
    bert = peer.model.bert
    backbone = ours.model.backbone(task)
    pairs = {
        bert.embeddings.word_embeddings.weight: backbone.word_embedding.weight,
        bert.encoder.layer[0].attention.self.query.weight: backbone.bert_layers[0].self_attention.query.weight,
        bert.encoder.layer[1].output.dense.bias: backbone.bert_layers[1].out_dense.bias,
        bert.pooler.dense.weight: backbone.pooler_dense.weight,
    }
    # The first moment is a tenth of the gradient, the same whatever the optimizer's eps does.
    for theirs, mine in pairs.items():
        wanted = peer.optimizer.state[theirs]["exp_avg"]
        found = ours.trainer.optimizers.by_name[task].state[mine]["exp_avg"]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        assert wanted.abs().max() > 0
        assert (mine - theirs).abs().mean() < LR / 10
    for side, old in before.items():
        assert all((a != b).any() for a, b in zip(old, side.model.parameters(), strict=True))


@pytest.mark.parametrize("fewest", [1, linear.MIN_MULTIPLICATIONS])
@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_fifty_steps_have_the_losses_of_padded_training(
    still_bert: Path, small_data: Path, task: str, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train with SGD, whose step is torch's, at a rate at which the loss moves a thousand times as far as the bound.

    One case has oneDNN for all products, where there is oneDNN; the other has torch's for all of these small ones.
    """
    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", fewest)
    work = make_workload(benchmark_options(still_bert, small_data, steps=49), task, print)
    options = replace(work.config.tasks[task], lr_multiplier=1.0)
    train = replace(work.config.train, optim="SGD", lr=FIFTY_STEPS_LR)
    work = replace(work, config=replace(work.config, train=train, tasks={**work.config.tasks, task: options}))
    peer, ours = TransformersSide(work), MinbertSide(work)
    decay = options.weight_decay
    peer.optimizer = torch.optim.SGD(peer.model.parameters(), FIFTY_STEPS_LR, 0.9, weight_decay=decay, nesterov=True)
    wanted: list[float] = []
    loss = peer.loss

    def recorded(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = loss(outputs, labels)
        wanted.append(value.item())
        return value

    peer.loss = recorded
    peer.train_on(*work.batches)
    found = [float(value) for value in ours.train_on(*work.batches)]
    assert len(found) == len(wanted) == 50
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    (again,) = ours.train_on(*work.batches[:1])
    assert abs(float(again) - wanted[0]) > 1e-2  # training went somewhere


@pytest.mark.parametrize("comparison", ["lora", "dora"])
def test_both_sides_train_as_many_adapters_and_nothing_else(bert: Path, small_data: Path, comparison: str) -> None:
    work = make_workload(benchmark_options(bert, small_data), "sst", print)
    sides = build_sides(work, comparison)
    assert check_same(sides, work) <= 1e-5
    counts = []
    for side in sides.values():
        trained = {name: p for name, p in side.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in side.model.named_parameters()}
        side.train_on(*work.batches)
        changed = {name for name, p in side.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == set(trained)
        assert all(any(part in name for part in ("lora_", "magnitude", "head")) for name in changed)
        counts.append(sum(p.numel() for p in trained.values()))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("perturbed", "bias", "change", "shown"),
    [
        ("transformers", "1.attention.output.dense.bias", 0.05, r"\d"),
        ("minbert", "1.attention_dense.bias", 0.05, r"\d"),
        ("minbert", "1.attention_dense.bias", torch.nan, "nan"),
    ],
)
def test_a_difference_is_refused(
    bert: Path,
    small_data: Path,
    perturbed: str,
    bias: str,
    change: float,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = COMPARISONS["full-model"][perturbed]

    def build_perturbed(work: Workload) -> Side:
        side = build(work)
        parameter = next(p for name, p in side.model.named_parameters() if name.endswith(bias))
        with torch.no_grad():
            parameter[0] += change
        return side

    monkeypatch.setitem(COMPARISONS["full-model"], perturbed, build_perturbed)
    monkeypatch.setattr(modes, "time_in_turn", lambda *_: pytest.fail("timed in spite of the difference"))
    wanted = f"SST sentiment: the outputs of transformers and minbert differ by up to {shown}"
    with pytest.raises(UserError, match=wanted):
        measure_speed(benchmark_options(bert, small_data), "full-model", "sst")


def test_flops_are_those_that_torch_counts(still_bert: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_onednn", lambda: False)  # torch does not count its products
    work = make_workload(benchmark_options(still_bert, small_data), "sst", print)
    lengths = np.diff(work.train.tokens[0].offsets)
    same = np.flatnonzero(lengths == np.bincount(lengths).argmax())  # nothing is padded
    assert len(same) > 1
    head = 2 * len(same) * work.bert_config.hidden_size * 5
    side = MinbertSide(work)
    with FlopCounterMode(display=False) as counter:
        side.train_on(same)
    assert counter.get_total_flops() == 3 * (forward_flops(work.bert_config, lengths[same]) + head)


def test_loader_workers_make_the_same_batches(bert: Path, small_data: Path) -> None:
    work = make_workload(benchmark_options(bert, small_data, loader_workers=1), "para", print)
    peer = TransformersSide(work)
    assert peer.loaded is not None
    for number, (texts, labels) in enumerate(peer.loaded):
        wanted, wanted_labels = peer.train[work.batches[number]]
        assert all(torch.equal(a, b) for x, y in zip(texts, wanted, strict=True) for a, b in zip(x, y, strict=True))
        assert torch.equal(labels, wanted_labels)
    assert number + 1 == len(work.batches)


def test_missing_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = sys.modules["datasets"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers is missing; pip install -r requirements-dev\.txt"):
        import_peer("transformers")
    assert sys.modules["datasets"] is ours
