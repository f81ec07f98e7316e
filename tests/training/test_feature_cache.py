"""Frozen layers: no gradient, nothing saved for one, and with --cache_frozen no work twice and the same numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import cut, make_bert
from test_memory import ask_the_allocator
from test_training import changed, copied, digest, make_trainer, metrics
from torch import Tensor

from bert import BertModel
from config import BertConfig
from lora import LoRAConfig, inject
from models.freezing import scheduled_layers, set_trainable
from text.packing import EncodedBatch, PackedBatch, pack_padded
from training import feature_cache as frozen
from training.feature_cache import FrozenData
from training.trainer import Trainer
from utils.device import Device, free_memory

Losses = list[float]
SMALL = BertConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=48,
)


def small_batch(seed: int = 0, size: int = 5) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (size,), generator=generator)
    mask = (torch.arange(12) < lengths[:, None]).long()
    return pack_padded(torch.randint(3, SMALL.vocab_size, mask.shape, generator=generator), mask)


# ------------------------------------------------------------------------------------------------- without the cache


def saved_shapes(backbone: BertModel, batch: PackedBatch | EncodedBatch, pooling: str) -> list[tuple[int, ...]]:
    """Shapes of all tensors that a pass saves for backward."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone.sentence_embedding(batch, pooling)
    return shapes


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("adapters", [None, LoRAConfig("attn-only"), LoRAConfig("all-lin", rank=2, dora=True)])
def test_frozen_layers_save_nothing_for_a_gradient(pooling: str, adapters: LoRAConfig | None) -> None:
    """Dropout is on. With the top layers unfrozen, the pass saves what one saves that begins at these layers."""
    backbone, batch = BertModel(SMALL).train(), small_batch()
    if adapters is not None:
        inject(backbone, adapters)
    set_trainable(backbone, 0)
    assert saved_shapes(backbone, batch, pooling) == []
    for trained in (1, 2, 4):
        set_trainable(backbone, trained)
        hidden = torch.randn(batch.num_tokens, SMALL.hidden_size)
        wanted = saved_shapes(backbone, EncodedBatch(hidden, 4 - trained, batch), pooling)
        assert saved_shapes(backbone, batch, pooling) == wanted and len(wanted) > 10 * trained


# ----------------------------------------------------------------------------------------------- how much is frozen


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 12, 24])
@pytest.mark.parametrize("mode", ["last-layer", "iterative", "full-model"])
def test_the_number_of_frozen_layers(depth: int, mode: str) -> None:
    """What the schedule says is what the parameters say; all layers count as frozen only together with the pooler."""
    config = BertConfig(
        vocab_size=9, hidden_size=2, num_hidden_layers=depth, num_attention_heads=1, intermediate_size=4
    )
    backbone = BertModel(config)
    for epoch in range(6):
        layers = scheduled_layers(mode, epoch, depth)
        set_trainable(backbone, layers)
        trains = [any(p.requires_grad for p in layer.parameters()) for layer in backbone.bert_layers]
        assert backbone.frozen_layers() == max(0, depth - layers) == trains.count(False)
        assert trains == sorted(trains)
    set_trainable(backbone, 0)
    backbone.pooler_dense.bias.requires_grad_(True)
    assert backbone.frozen_layers() == depth - 1
    backbone.pos_embedding.weight.requires_grad_(True)
    assert backbone.frozen_layers() == 0


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_pass_may_begin_at_any_layer(pooling: str) -> None:
    backbone, batch = BertModel(SMALL).eval(), small_batch(1)
    wanted = backbone.sentence_embedding(batch, pooling)
    hidden = backbone.embed(batch)
    for layers in range(4):
        assert torch.equal(backbone.sentence_embedding(EncodedBatch(hidden, layers, batch), pooling), wanted)
        hidden = backbone.bert_layers[layers](hidden, batch)
    assert backbone.sentence_embedding(EncodedBatch(wanted, 4, None), pooling) is wanted


# ------------------------------------------------------------------------------------------- the same numbers with it


@pytest.fixture(scope="session")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run of a four-layer model without backbone dropout on 20 examples a task, three steps a round."""
    folder = tmp_path_factory.mktemp("frozen")
    words = ["--pretrained", make_bert(folder / "bert", num_hidden_layers=4), "--data_dir", cut(folder / "data", 20)]
    words += ["--max_length", 64, "--threads", 1, "--batch_size", 8, "--eval_every", 9, "--lr", 1e-4]
    words += ["--backbone_dropout_prob", 0]
    return [str(word) for word in words]


def losses_of(trainer: Trainer) -> Losses:
    """Train; the loss of every step."""
    losses: Losses = []
    step = trainer.train_step

    def recorded(*arguments: Any) -> Any:
        done = step(*arguments)
        losses.append(done[0].item())
        return done

    trainer.train_step = recorded  # type: ignore[method-assign]
    trainer.fit()
    return losses


def assert_same(flags: list[str], folder: Path, *more: object) -> Trainer:
    """With and without the cache, losses and dev scores agree; returns the trainer with the cache."""
    plain = losses_of(make_trainer(flags, folder / "plain", *more))
    trainer = make_trainer(flags, folder / "cached", *more, "--cache_frozen")
    cached = losses_of(trainer)
    assert len(plain) >= 50
    np.testing.assert_allclose(cached, plain, rtol=0, atol=1e-5)
    scores = [metrics(folder / name)[-1]["dev"]["score"] for name in ("plain", "cached")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    return trainer


@pytest.mark.parametrize(
    ("mode", "arch"),
    [
        ("last-layer", ("--arch", "yin-yang")),  # siamese, cls, two backbones, heads with batch norm and dropout
        ("last-layer", ("--arch", "v2", "--pooling", "mean")),  # cross, one backbone
        ("iterative", ("--arch", "yin-yang")),
        ("iterative", ("--arch", "v2", "--average", "ema", "--ema_decay", "0.9")),
        ("iterative", ("--arch", "r4")),  # siamese, mean, three backbones; a bare cosine, so that STS begins in epoch 2
    ],
)
def test_losses_are_those_of_the_plain_path(flags: list[str], tmp_path: Path, arch: tuple[str, ...], mode: str) -> None:
    """All stages of unfreezing: 4, 3, 2, 1 and 0 frozen layers."""
    assert_same(flags, tmp_path, *arch, "--fine_tune_mode", mode, "--epochs", 6)


@pytest.mark.parametrize("lora", ["attn", "all-lin-only"])
def test_with_adapters_in_all_layers(flags: list[str], tmp_path: Path, lora: str) -> None:
    """Those of the frozen layers rest, and are merged."""
    more = ["--lora_mode", lora, "--lora_rank", 2, "--dora", "--epochs", 6, "--arch", "v2"]
    assert_same(flags, tmp_path, *more, "--fine_tune_mode", "iterative")


def test_shuffled_parts_of_a_task_and_several_rounds(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has not been computed is NaN, so that a wrong row shows; what no batch asks for stays so."""
    keep, compute = FrozenData.keep, FrozenData.compute
    computed: dict[str, int] = {}

    def poisoned(self: FrozenData, layers: int) -> None:
        keep(self, layers)
        self.kept[layers].values.fill_(torch.nan)

    def counted(self: FrozenData, indices: np.ndarray, wanted: Any) -> Any:
        computed[self.title] = computed.get(self.title, 0) + len(indices)
        return compute(self, indices, wanted)

    monkeypatch.setattr(FrozenData, "keep", poisoned)
    monkeypatch.setattr(FrozenData, "compute", counted)
    parts = ["--sst_fraction", 0.1, "--quora_fraction", 0.5, "--num_quora_trains", 3, "--sts_from_epoch", 3]
    more = [*parts, "--arch", "r4", "--routine", "interleave", "--epochs", 6]
    for mode in ("last-layer", "iterative"):
        folder = tmp_path / mode
        trainer = assert_same(flags, folder, *more, "--fine_tune_mode", mode)
        kept = {name: data.kept for name, data in trainer.frozen.train.items()}
        if mode == "iterative":
            assert kept == {"sst": {}, "para": {}, "sts": {}}
            continue
        assert 2 < kept["sst"][4].filled.sum() < 20  # each of the six epochs takes two of the 20 examples
        for name, own in kept.items():
            assert computed[trainer.frozen.train[name].title] == own[4].filled.sum()
            finite = own[4].values.isfinite().all(dim=2).all(dim=0)  # [C, N, H]
            assert finite.tolist() == own[4].filled.tolist()


def test_a_resumed_run_ends_the_same(flags: list[str], tmp_path: Path) -> None:
    more = ["--cache_frozen", "--fine_tune_mode", "iterative", "--epochs", 3, "--eval_every", 1]
    more += ["--backbone_dropout_prob", 0.1]
    whole = make_trainer(flags, tmp_path / "whole", *more)
    whole.fit()
    broken = make_trainer(flags, tmp_path / "broken", *more)
    broken.out_of_patience = lambda: broken.epoch == 2  # type: ignore[method-assign]
    broken.fit()
    resumed = make_trainer(flags, tmp_path / "broken", *more, "--resume")
    resumed.fit()
    assert changed(copied(whole.model), copied(resumed.model)) == set()
    assert (tmp_path / "broken" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_mixed_precision_keeps_half_the_bytes(flags: list[str], tmp_path: Path) -> None:
    losses = []
    device = Device(torch.device("cpu"), torch.bfloat16)
    for more in ([], ["--cache_frozen"]):
        trainer = make_trainer(flags, tmp_path / f"run{len(more)}", "--arch", "v2", "--epochs", 2, *more, device=device)
        losses.append(losses_of(trainer))
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=0.03)
    assert {kept.values.dtype for data in trainer.frozen.all for kept in data.kept.values()} == {torch.bfloat16}


@pytest.mark.parametrize("arch", ["yin-yang", "v2"])
def test_a_lack_of_memory_in_frozen_layers_halves_what_goes_through_them(
    flags: list[str], tmp_path: Path, arch: str
) -> None:
    """Not the batches of training, and dropout goes on in the layers that train."""
    losses = []
    more = ["--arch", arch, "--epochs", 2, "--backbone_dropout_prob", 0.1, "--cache_frozen"]
    for most in (None, 5):
        trainer = make_trainer(flags, tmp_path / str(most), *more)

        def hook(module: Any, given: tuple[Any, ...], most: int | None = most) -> None:
            if most is not None and given[1].num_sequences > most and not torch.is_grad_enabled():
                ask_the_allocator()

        for backbone in trainer.model.backbones.values():
            backbone.bert_layers[0].register_forward_pre_hook(hook)
        losses.append(losses_of(trainer))
        assert not trainer.memory.sizes
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------- nothing is done twice


def rows_through(trainer: Trainer) -> dict[str, int]:
    """Rows that come to the lowest layer and to the top one of the backbones in a whole run."""
    rows = {"lowest": 0, "top": 0}
    for backbone in trainer.model.backbones.values():
        for place, layer in (("lowest", backbone.bert_layers[0]), ("top", backbone.bert_layers[-1])):
            layer.register_forward_pre_hook(
                lambda module, inputs, place=place: rows.update({place: rows[place] + len(inputs[0])})
            )
    trainer.fit()
    return rows


def tokens(trainer: Trainer) -> int:
    return sum(int(data.lengths.sum()) for data in (*trainer.train_data.values(), *trainer.dev_data.values()))


def test_each_example_passes_each_frozen_layer_once(flags: list[str], tmp_path: Path) -> None:
    more = ["--cache_frozen", "--eval_every", 1]
    trainer = make_trainer(flags, tmp_path / "last", *more, "--fine_tune_mode", "last-layer", "--epochs", 5)
    before = copied(trainer.model)
    assert rows_through(trainer) == {"lowest": tokens(trainer), "top": tokens(trainer)}
    assert digest(copied(trainer.model), "backbones.") == digest(before, "backbones.")
    trainer = make_trainer(flags, tmp_path / "iterative", *more, "--epochs", 4)
    assert rows_through(trainer) == {"lowest": tokens(trainer), "top": 4 * tokens(trainer)}


def test_dropout_is_off_in_frozen_layers_alone(flags: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    more = ["--backbone_dropout_prob", 0.5, "--cache_frozen", "--epochs", 6]
    trainer = make_trainer(flags, tmp_path / "run", *more, say=said.append)
    data, rows = trainer.train_data["para"], np.array([3, 0, 11])
    assert isinstance(data, FrozenData)
    seen: list[tuple[int, Tensor]] = []
    step = trainer.train_step

    def looked(*arguments: Any) -> Any:
        if arguments[0].task == "para":
            batch = data.batch(rows)
            assert data.backbone.training
            if isinstance(batch, EncodedBatch):
                seen.append((batch.layers, batch.hidden))
                one, other = (data.backbone.sentence_embedding(batch, "cls") for _ in range(2))
                assert torch.equal(one, other) == (batch.layers == 4)
                packed = data.data.batch(rows)
                data.backbone.eval()
                with torch.no_grad():
                    wanted = data.backbone.sentence_embedding(packed, "cls")
                    torch.testing.assert_close(data.backbone.sentence_embedding(batch, "cls"), wanted)
                data.backbone.train()
        return step(*arguments)

    trainer.train_step = looked  # type: ignore[method-assign]
    trainer.fit()
    assert [layers for layers, _ in seen] == [4] * 3 + [3] * 3 + [2] * 3 + [1] * 3
    for one, other in zip(seen, seen[1:], strict=False):
        assert one[0] != other[0] or torch.equal(one[1], other[1])
    told = [line for line in said if line.startswith("--cache_frozen")]
    assert len(told) == 5 and all("dropout is off in them" in line for line in told[:4])
    assert "lowest 3 of 4 layers" in told[1] and "dropout is on in all layers" in told[4]


def test_what_has_changed_is_computed_anew(flags: list[str], tmp_path: Path) -> None:
    """Frozen, unfrozen and changed, frozen again, as no schedule does: nothing old may come back."""
    trainer = make_trainer(flags, tmp_path / "run", "--cache_frozen")
    data, rows = trainer.train_data["sst"], np.array([5, 2, 19, 7])
    assert isinstance(data, FrozenData) and trainer.frozen is not None
    trainer.model.eval()

    def check(command: str) -> None:
        trainer.model.manage_freezing(command)
        trainer.frozen.begin_epoch([])
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
    assert all(data.kept[layers] is kept[layers] for layers in (1, 2))
    assert all(data.kept[layers] is not kept[layers] for layers in (3, 4))
    check("unfreezeall")
    assert data.kept == {}
    shift(0)
    check("unfreezetop3")
    check("freezeall")


# ------------------------------------------------------------------------------------------------------------- memory


def test_what_does_not_fit_is_said_and_not_kept(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers never depend on the memory there is: dropout is off in frozen layers all the same."""
    more = ["--backbone_dropout_prob", 0.3, "--cache_frozen", "--epochs", 4, "--fine_tune_mode", "iterative"]
    more += ["--optim", "AdamW", "--lr", 1e-5]  # Adamax takes full steps where a gradient is rounding error alone
    losses, said = [], []
    for free in (0, 100_000, 1 << 30):
        monkeypatch.setattr(frozen, "free_memory", lambda free=free: free)
        lines: list[str] = []
        trainer = make_trainer(flags, tmp_path / str(free), *more, say=lines.append)
        losses.append(losses_of(trainer))
        said.append("\n".join(lines))
        assert trainer.frozen is not None and trainer.frozen.taken() <= trainer.frozen.budget
    np.testing.assert_allclose(losses[0], losses[2], rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses[1], losses[2], rtol=0, atol=1e-5)
    shortage = "its frozen layers run for every batch"
    assert said[0].count(shortage) == 4 * 6 and said[2].count(shortage) == 0
    assert 0 < said[1].count(shortage) < 3 * 6  # sentence embeddings fit, hidden states of everything do not
    assert "SST sentiment train would take" in said[0] and "50% of the free memory" in said[0]


def test_bytes_are_those_of_the_tensors(flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(flags, tmp_path / "run", "--cache_frozen")
    trainer.model.manage_freezing("freezeall")
    assert trainer.frozen is not None
    trainer.frozen.begin_epoch([])
    tensors = [kept.values for data in trainer.frozen.all for kept in data.kept.values()]
    assert trainer.frozen.taken() == sum(tensor.nbytes for tensor in tensors)
    quora = trainer.train_data["para"]
    assert isinstance(quora, FrozenData)
    assert quora.kept[4].values.shape == (2, 20, 32)
    assert quora.kept[2].values.shape == (quora.lengths.sum(), 32)


@pytest.mark.parametrize(
    ("groups", "limits", "wanted"),
    [
        ("0::/job/step", {}, 8_000_000 * 1024),
        ("0::/job/step", {"job/memory.max": "3000000000", "job/step/memory.max": "max"}, 3_000_000_000),
        ("0::/", {"memory.max": "5000000000"}, 5_000_000_000),
        ("4:memory:/job\n3:cpuset:/", {"memory/job/memory.limit_in_bytes": "4000000000"}, 4_000_000_000),
        ("4:memory:/job", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 8_000_000 * 1024),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "1000"}, 0),
    ],
)
def test_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, limits: dict[str, str], wanted: int
) -> None:
    files = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n", "proc/self/cgroup": groups + "\n"}
    for name, text in {**files, **{f"sys/fs/cgroup/{name}": text + "\n" for name, text in limits.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    used = free_memory(tmp_path)
    assert used == wanted or 0 < wanted - used < 3_000_000_000  # less what this process has taken


def test_free_memory_of_this_machine(tmp_path: Path) -> None:
    assert 1 << 20 < free_memory() < 1 << 50
    assert 1 << 20 < free_memory(tmp_path) < 1 << 50  # no /proc


def test_what_is_not_kept_is_rounded_like_what_is(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "free_memory", lambda: 0)
    device = Device(torch.device("cpu"), torch.bfloat16)
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--cache_frozen", device=device)
    trainer.model.freeze_for_epoch(trainer.config.train, 1)  # ends in a LayerNorm, which autocast keeps in fp32
    assert trainer.frozen is not None
    trainer.frozen.begin_epoch(trainer.steps_of(1))
    data = trainer.frozen.train["sst"]
    assert data.layers == 1 and not data.kept
    hidden = data.batch(np.arange(4)).hidden
    assert torch.equal(hidden, hidden.bfloat16().float())
