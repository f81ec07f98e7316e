"""Freezing: R0's commands, the schedule of each mode, and what it means for backbones with adapters."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import TINY, make_batch, make_model, make_texts, model_options, randomise, refusal
from torch import Tensor

from bert import BertModel
from config import BertConfig
from lora import MODES, LoRAConfig, adapted_layers, inject
from models.freezing import frozen_by_adapters, scheduled_layers, set_trainable
from models.multitask_bert import MultitaskBERT
from tasks import DEFAULT_TASKS, SST
from text.packing import EncodedBatch, PackedBatch, pack_padded

DEEP = replace(TINY, num_hidden_layers=12)


LAYERS = [str(n) for n in range(12)]


def trainable(model: MultitaskBERT, backbone: str) -> set[str]:
    """Return the trainable parts of one backbone: the layers' numbers, `pooler`, `embeddings`."""
    out = set()
    for name, parameter in model.backbones[backbone].named_parameters():
        parts = name.split(".")
        if parameter.requires_grad:
            part = parts[1] if parts[0] == "bert_layers" else {"pooler_dense": "pooler"}.get(parts[0], "embeddings")
            out.add(part)
    return out


@pytest.mark.parametrize(
    "command, wanted",
    [
        ("freezeall", set()),
        ("unfreezeall", {"embeddings", *LAYERS, "pooler"}),
        ("unfreezetop0", set()),
        ("unfreezetop1", {"11", "pooler"}),
        ("unfreezetop3", {"9", "10", "11", "pooler"}),
        ("unfreezetop12", {*LAYERS, "pooler"}),
    ],
)
def test_manage_freezing(command: str, wanted: set[str]) -> None:
    model = MultitaskBERT(model_options(), DEEP, DEFAULT_TASKS)
    for before in ("unfreezeall", "freezeall", "unfreezetop5"):  # which must not matter
        model.manage_freezing(before)
        model.manage_freezing(command)
        for backbone in ("sentiment", "similarity"):
            assert trainable(model, backbone) == wanted
        heads = [model.heads, model.pair_layer]
        assert all(p.requires_grad for part in heads if part is not None for p in part.parameters())
    assert {p.requires_grad for p in model.backbone("sst").bert_layers[11].parameters()} == {"11" in wanted}


@pytest.mark.parametrize(
    "command",
    ["freeze", "", "unfreezetop", "unfreezetop13", "unfreezetop-1", "unfreezetop1.5", " unfreezeall", "unfreezeall\n"],
)
def test_unknown_commands_raise_and_change_nothing(command: str) -> None:
    model = MultitaskBERT(model_options(arch="r1-baseline"), DEEP, {"sst": SST})
    model.manage_freezing("unfreezetop2")
    message = refusal(model.manage_freezing, command)
    assert repr(command) in message and "at most 12" in message
    assert trainable(model, "shared") == {"10", "11", "pooler"}


@pytest.mark.parametrize(
    "depth, wanted", [(12, [0, 3, 6, 9, 13, 13]), (6, [0, 2, 3, 5, 7, 7]), (4, [0, 1, 2, 3, 5, 5])]
)
def test_the_schedule_of_each_mode(depth: int, wanted: list[int]) -> None:
    assert [scheduled_layers("iterative", stage, depth) for stage in range(6)] == wanted
    assert {scheduled_layers("last-layer", stage, depth) for stage in range(8)} == {0}
    assert {scheduled_layers("full-model", stage, depth) for stage in range(8)} == {depth + 1}


@pytest.mark.parametrize("layers, parts", [(1, ("bert_layers.1.", "pooler")), (0, ())])
def test_frozen_layers_get_no_gradient_and_do_not_change(layers: int, parts: tuple[str, ...]) -> None:
    model = make_model(arch="yin-yang", backbones="shared").train()
    model.set_trainable_layers(layers)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model("para", make_batch(model, "para")).square().sum().backward()
    optimizer.step()
    wanted = ("pair_layer", "heads.para", *(f"backbones.shared.{part}" for part in parts))
    for name, value in model.named_parameters():
        assert (value.grad is not None) == name.startswith(wanted), name
        assert name.startswith(wanted) or torch.equal(value, before[name]), name


def is_adapter(name: str) -> bool:
    return name.endswith(("lora_A", "lora_B", "magnitude"))


def trained_names(mode: str, layers: int, adapters_always: bool) -> tuple[set[str], set[str]]:
    """Return the names of the parameters that three steps of SGD change, and of those that require a gradient."""
    model, config = BertModel(TINY), LoRAConfig(mode, rank=2, dora=True)
    inject(model, config)
    randomise(model)
    set_trainable(model, layers, config, adapters_always)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        out = model(*make_texts(0))
        if out["pooler_output"].requires_grad:
            (out["pooler_output"].square().sum() + out["last_hidden_state"].square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    return changed, {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_trainable_is_schedule_and_policy(mode: str, layers: int) -> None:
    model = BertModel(TINY)
    plain = {name for name, _ in model.named_parameters()}
    inject(model, LoRAConfig(mode, dora=True))
    names = {name for name, _ in model.named_parameters()}
    wrapped = {f"{name}.{part}" for name, _ in adapted_layers(model) for part in ("weight", "bias")}
    assert frozen_by_adapters(model, LoRAConfig(mode)) == (plain if mode.endswith("-only") else wrapped)
    reached: Callable[[str], bool] = {
        0: lambda name: False,
        1: lambda name: name.startswith(("bert_layers.1", "pooler")),
        3: lambda name: True,
    }[layers]
    kept: Callable[[str], bool] = is_adapter if mode.endswith("-only") else lambda name: name not in wrapped

    changed, requiring = trained_names(mode, layers, adapters_always=False)
    assert requiring == {name for name in names if reached(name) and kept(name)}
    # A key's bias moves no softmax, so its gradient is rounding; it may or may not change.
    assert {name for name in requiring ^ changed if "key.bias" not in name} == set()

    changed, requiring = trained_names(mode, layers, adapters_always=True)
    assert requiring == {name for name in names if is_adapter(name) or (reached(name) and kept(name))}
    assert changed == requiring


SMALL = BertConfig(
    vocab_size=60, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=48,
)  # fmt: skip


def small_batch() -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (5,), generator=generator)
    mask = (torch.arange(12) < lengths[:, None]).long()
    return pack_padded(torch.randint(3, SMALL.vocab_size, mask.shape, generator=generator), mask)


def saved_shapes(backbone: BertModel, batch: PackedBatch | EncodedBatch, pooling: str) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors that a pass saves for backward."""
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


@pytest.mark.parametrize("depth", [1, 2, 6, 12])
@pytest.mark.parametrize("mode", ["last-layer", "iterative", "full-model"])
def test_the_number_of_frozen_layers(depth: int, mode: str) -> None:
    """What the schedule says is what the parameters say; all layers count as frozen only together with the pooler."""
    backbone = BertModel(BertConfig(9, 2, depth, 1, 4))
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
    backbone, batch = BertModel(SMALL).eval(), small_batch()
    wanted = backbone.sentence_embedding(batch, pooling)
    hidden = backbone.embed(batch)
    for layers in range(4):
        assert torch.equal(backbone.sentence_embedding(EncodedBatch(hidden, layers, batch), pooling), wanted)
        hidden = backbone.bert_layers[layers](hidden, batch)
    assert backbone.sentence_embedding(EncodedBatch(wanted, 4, None), pooling) is wanted
