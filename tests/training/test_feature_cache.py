"""--cache_frozen: no work twice in frozen layers and the numbers of a run without it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ask_the_allocator, assert_resumes, copied, cut, digest, make_bert, make_trainer, metrics, steps_of
from torch import Tensor

from text.packing import EncodedBatch
from training import feature_cache
from training.feature_cache import CachedData, FeatureCache
from training.trainer import Trainer
from utils.device import Device

BF16 = Device(torch.device("cpu"), torch.bfloat16)


@pytest.fixture(scope="session")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run of a four-layer model without backbone dropout on 20 examples a task, three steps a round."""
    folder = tmp_path_factory.mktemp("frozen")
    words = ["--pretrained", make_bert(folder / "bert", num_hidden_layers=4), "--data_dir", cut(folder / "data", 20)]
    words += ["--max_length", 64, "--threads", 1, "--batch_size", 8, "--eval_every", 9, "--lr", 1e-4]
    words += ["--backbone_dropout_prob", 0]
    return [str(word) for word in words]


def cache_of(trainer: Trainer) -> FeatureCache:
    assert trainer.loader.feature_cache is not None
    return trainer.loader.feature_cache


def cached(trainer: Trainer, task: str) -> CachedData:
    return cache_of(trainer).train[task]


def losses_of(trainer: Trainer) -> list[float]:
    """Train; return the loss of every step."""
    losses: list[float] = []
    train_step = trainer.train_step

    def recorded(*arguments: Any) -> Any:
        result = train_step(*arguments)
        losses.extend(batch.loss.item() for batch in result.batches)
        return result

    trainer.train_step = recorded  # type: ignore[method-assign]
    trainer.fit()
    return losses


def assert_same(flags: list[str], folder: Path, *more: object) -> Trainer:
    """Check that losses and dev scores with and without the cache agree; return the trainer with the cache."""
    plain = losses_of(make_trainer(flags, folder / "plain", *more))
    trainer = make_trainer(flags, folder / "cached", *more, "--cache_frozen")
    np.testing.assert_allclose(losses_of(trainer), plain, rtol=0, atol=1e-5)
    scores = [metrics(folder / name)[-1]["dev"]["score"] for name in ("plain", "cached")]
    assert len(plain) >= 50 and scores[0] == pytest.approx(scores[1], abs=1e-3)
    return trainer


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("last-layer", ["--arch", "yin-yang"]),  # siamese, cls, two backbones, heads with batch norm and dropout
        ("last-layer", ["--arch", "v2", "--pooling", "mean"]),  # cross, one backbone
        ("last-layer", ["--arch", "baseline", "--pooling", "mean", "--sst_pooling", "cls"]),
        ("iterative", ["--arch", "v2", "--average", "ema", "--ema_decay", 0.9]),
        ("iterative", ["--arch", "r4"]),  # siamese, mean, three backbones; a bare cosine, so that STS begins in epoch 2
        ("iterative", ["--arch", "v2", "--lora_mode", "attn", "--lora_rank", 2, "--dora"]),  # frozen ones are merged
    ],
    ids=str,
)
def test_losses_are_those_of_the_plain_path(flags: list[str], tmp_path: Path, mode: str, more: list[object]) -> None:
    """All stages of unfreezing: 4, 3, 2, 1 and 0 frozen layers."""
    assert_same(flags, tmp_path, *more, "--fine_tune_mode", mode, "--epochs", 6)


def test_shuffled_parts_of_a_task_and_several_rounds(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has not been computed is NaN, so that a wrong row shows; what no batch asks for stays so."""
    keep, compute = CachedData.keep, CachedData.compute
    computed: dict[str, int] = {}

    def poisoned(self: CachedData, layers: int) -> None:
        keep(self, layers)
        self.kept[layers].values.fill_(torch.nan)

    def counted(self: CachedData, indices: np.ndarray, wanted: Any) -> Any:
        computed[self.title] = computed.get(self.title, 0) + len(indices)
        return compute(self, indices, wanted)

    monkeypatch.setattr(CachedData, "keep", poisoned)
    monkeypatch.setattr(CachedData, "compute", counted)
    parts = ["--sst_fraction", 0.1, "--quora_fraction", 0.5, "--num_quora_trains", 3, "--sts_from_epoch", 3]
    more = [*parts, "--arch", "r4", "--routine", "interleave", "--epochs", 6]
    trainer = assert_same(flags, tmp_path / "iterative", *more, "--fine_tune_mode", "iterative")
    assert not any(data.kept for data in cache_of(trainer).all)
    computed.clear()
    trainer = assert_same(flags, tmp_path / "last-layer", *more, "--fine_tune_mode", "last-layer")
    assert 2 < cached(trainer, "sst").kept[4].filled.sum() < 20  # each of the six epochs takes two of the 20 examples
    for data in cache_of(trainer).train.values():
        features = data.kept[4]
        assert computed[data.title] == features.filled.sum()
        assert features.values.isfinite().all(dim=2).all(dim=0).tolist() == features.filled.tolist()  # [C, N, H]


def test_a_resumed_run_ends_the_same(flags: list[str], tmp_path: Path) -> None:
    more = ["--cache_frozen", "--fine_tune_mode", "iterative", "--epochs", 3, "--backbone_dropout_prob", 0.1]
    assert_resumes(flags, tmp_path, *more, after=2)


def test_mixed_precision_keeps_half_the_bytes(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not kept is rounded like what is."""
    losses = []
    for more in ([], ["--cache_frozen"]):
        trainer = make_trainer(flags, tmp_path / f"run{len(more)}", "--arch", "v2", "--epochs", 2, *more, device=BF16)
        losses.append(losses_of(trainer))
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=0.03)
    kept = [features.values for data in cache_of(trainer).all for features in data.kept.values()]
    assert {values.dtype for values in kept} == {torch.bfloat16}
    monkeypatch.setattr(feature_cache, "free_memory", lambda: 0)
    trainer = make_trainer(flags, tmp_path / "none", "--cache_frozen", device=BF16)
    trainer.freeze(1)  # the frozen part ends in a LayerNorm, which autocast keeps in fp32
    trainer.loader.begin_epoch(steps_of(trainer, 1), 0, 0)
    data = cached(trainer, "sst")
    assert data.layers == 3 and not data.kept
    hidden = data.batch(np.arange(4)).hidden  # type: ignore[union-attr]
    assert torch.equal(hidden, hidden.bfloat16().float())


def test_a_lack_of_memory_in_frozen_layers_halves_what_goes_through_them(flags: list[str], tmp_path: Path) -> None:
    """Not the batches of training, and dropout goes on in the layers that train."""
    losses = []
    for most in (99, 5):
        more = ["--epochs", 2, "--backbone_dropout_prob", 0.1, "--cache_frozen"]
        trainer = make_trainer(flags, tmp_path / str(most), *more)

        def hook(module: Any, given: tuple[Any, ...], most: int = most) -> None:
            if given[1].num_sequences > most and not torch.is_grad_enabled():
                ask_the_allocator()

        for backbone in trainer.model.backbones.values():
            backbone.bert_layers[0].register_forward_pre_hook(hook)
        losses.append(losses_of(trainer))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-5)


def test_each_example_passes_each_frozen_layer_once(flags: list[str], tmp_path: Path) -> None:
    """Counted in tokens that come to the lowest and to the top layers of the backbones in a whole run."""
    for mode, epochs, passes in (("last-layer", 5, 1), ("iterative", 4, 4)):
        more = ["--cache_frozen", "--eval_every", 1, "--fine_tune_mode", mode, "--epochs", epochs]
        trainer, rows = make_trainer(flags, tmp_path / mode, *more), {"lowest": 0, "top": 0}
        for backbone in trainer.model.backbones.values():
            for place, layer in (("lowest", backbone.bert_layers[0]), ("top", backbone.bert_layers[-1])):
                layer.register_forward_pre_hook(
                    lambda module, inputs, place=place, rows=rows: rows.update({place: rows[place] + len(inputs[0])})
                )
        before = copied(trainer.model)
        trainer.fit()
        tokens = sum(int(data.lengths.sum()) for data in cache_of(trainer).all)
        assert rows == {"lowest": tokens, "top": passes * tokens}
        if mode == "last-layer":
            assert digest(copied(trainer.model), "backbones.") == digest(before, "backbones.")


def test_dropout_is_off_in_frozen_layers_alone(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(flags, tmp_path / "run", "--backbone_dropout_prob", 0.5, "--cache_frozen", "--epochs", 6)
    data, rows = cached(trainer, "para"), np.array([3, 0, 11])
    seen: list[tuple[int, Tensor]] = []
    train_step = trainer.train_step

    def looked(*arguments: Any) -> Any:
        batch = data.batch(rows) if arguments[0].batches[0].task == "para" else None
        if isinstance(batch, EncodedBatch):
            seen.append((batch.layers, batch.hidden))
            assert data.backbone.training
            one, other = (data.backbone.sentence_embedding(batch, "cls") for _ in range(2))
            assert torch.equal(one, other) == (batch.layers == 4)
            data.backbone.eval()
            with torch.no_grad():
                wanted = data.backbone.sentence_embedding(data.data.batch(rows), "cls")
                torch.testing.assert_close(data.backbone.sentence_embedding(batch, "cls"), wanted)
            data.backbone.train()
        return train_step(*arguments)

    trainer.train_step = looked  # type: ignore[method-assign]
    trainer.fit()
    assert [layers for layers, _ in seen] == [4] * 3 + [3] * 3 + [2] * 3 + [1] * 3
    for one, other in zip(seen, seen[1:], strict=False):
        assert one[0] != other[0] or torch.equal(one[1], other[1])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--cache_frozen")]
    assert len(told) == 5 and all("dropout is off in them" in line for line in told[:4])
    assert "lowest 3 of 4 layers" in told[1] and "dropout is on in all layers" in told[4]


def test_what_has_changed_is_computed_anew(flags: list[str], tmp_path: Path) -> None:
    """Frozen, unfrozen and changed, frozen again, as no schedule does: nothing old may come back."""
    trainer = make_trainer(flags, tmp_path / "run", "--cache_frozen")
    data, rows = cached(trainer, "sst"), np.array([5, 2, 19, 7])
    trainer.model.eval()

    def check(command: str) -> None:
        trainer.model.manage_freezing(command)
        trainer.loader.begin_epoch([], 0, 0)
        with torch.no_grad():
            found, wanted = (trainer.model("sst", source.batch(rows)) for source in (data, data.data))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)

    def shift(layer: int) -> None:
        with torch.no_grad():
            data.backbone.bert_layers[layer].out_dense.bias.add_(torch.randn(32))

    check("freezeall")
    kept = dict(data.kept)
    assert sorted(kept) == [1, 2, 3, 4]
    check("unfreezetop2")
    assert data.kept == {layers: kept[layers] for layers in (1, 2)}
    shift(2)
    check("freezeall")
    assert [data.kept[layers] is kept[layers] for layers in (1, 2, 3, 4)] == [True, True, False, False]
    check("unfreezeall")
    assert data.kept == {}
    shift(0)
    check("unfreezetop3")
    check("freezeall")


def test_what_does_not_fit_is_said_and_not_kept(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers never depend on the memory there is: dropout is off in frozen layers all the same."""
    more = ["--backbone_dropout_prob", 0.3, "--cache_frozen", "--epochs", 4, "--fine_tune_mode", "iterative"]
    more += ["--optim", "AdamW", "--lr", 1e-5]  # Adamax takes full steps where a gradient is rounding error alone
    losses, said = [], []
    for free in (0, 100_000, 1 << 30):
        monkeypatch.setattr(feature_cache, "free_memory", lambda free=free: free)
        trainer = make_trainer(flags, tmp_path / str(free), *more)
        losses.append(losses_of(trainer))
        said.append(capsys.readouterr().out)
        assert cache_of(trainer).taken() <= cache_of(trainer).budget
    np.testing.assert_allclose(losses[0], losses[2], rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses[1], losses[2], rtol=0, atol=1e-5)
    shortage = "its frozen layers run for every batch"
    assert said[0].count(shortage) == 4 * 6 and said[2].count(shortage) == 0
    assert 0 < said[1].count(shortage) < 3 * 6  # sentence embeddings fit, hidden states of everything do not
    assert "SST sentiment train would take" in said[0] and "50% of the free memory" in said[0]


def test_bytes_are_those_of_the_tensors(flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(flags, tmp_path / "run", "--cache_frozen")
    trainer.model.manage_freezing("freezeall")
    trainer.loader.begin_epoch([], 0, 0)
    tensors = [features.values for data in cache_of(trainer).all for features in data.kept.values()]
    assert cache_of(trainer).taken() == sum(tensor.nbytes for tensor in tensors)
    quora = cached(trainer, "para")
    assert quora.kept[4].values.shape == (2, 20, 32)
    assert quora.kept[2].values.shape == (quora.lengths.sum(), 32)
