"""Freezing: R0's commands, the schedule of each mode, and what it means for backbones with adapters."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import TINY, make_batch, make_model, make_texts, model_options, randomise, refusal

from bert import BertModel
from lora import MODES, LoRAConfig, adapted_layers, inject
from models.freezing import frozen_by_adapters, scheduled_layers, set_trainable
from models.multitask_bert import MultitaskBERT
from tasks import DEFAULT_TASKS, SST

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


# ----------------------------------------------------------------------------------------------------------------------
# With adapters


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
