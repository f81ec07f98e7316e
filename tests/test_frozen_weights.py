"""Under autocast frozen weights are cast once: the same numbers, fewer casts, and never an old copy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bert import BertModel, Linear
from config import BertConfig
from kernels import linear as products
from lora import LoRAConfig, inject

SHAPE = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


class Casts(TorchDispatchMode):
    """Counts the casts of matrices of weights to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@contextmanager
def casts() -> Iterator[Casts]:
    with Casts() as mode:
        yield mode


class Plain(nn.Linear):
    """torch's linear layer, which autocast casts in every pass, as a layer of BERT calls it."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        y = super().forward(x)
        return nn.functional.gelu(y) if gelu else y


def make_model(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    model = BertModel(SHAPE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def run(model: nn.Module) -> Tensor:
    ids = torch.arange(1, 25).view(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        return model(ids, torch.ones_like(ids))["pooler_output"].float()


def weights_of(shapes: list[tuple[int, ...]]) -> int:
    """How many of the casts were of matrices of weights, whose sides are widths of the model."""
    return sum(len(shape) == 2 and set(shape) <= {32, 64} for shape in shapes)


@pytest.mark.parametrize("command", ["all", "top", "none"])
def test_the_same_numbers_by_fewer_casts(command: str) -> None:
    """All of the weights are frozen, or those below the last layer, or none."""
    plain, ours = make_model(), make_model()
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear):
                linear = Plain(child.in_features, child.out_features)
                linear.load_state_dict(child.state_dict())
                setattr(module, name, linear)
    frozen = {"all": 13, "top": 6, "none": 0}[command]
    for model in (plain, ours):
        model.requires_grad_(command == "none")
        model.bert_layers[1].requires_grad_(command != "all")
        model.pooler_dense.requires_grad_(command != "all")
    counts = []
    for _ in range(3):
        outputs, grads = [], []
        for model in (plain, ours):
            with casts() as mode:
                outputs.append(run(model))
            counts.append(weights_of(mode.shapes))
            if command != "all":
                outputs[-1].square().sum().backward()
                grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
                model.zero_grad()
        assert torch.equal(*outputs) and outputs[0].std() > 0.01
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) if grads else command == "all"
    assert counts == [13, 13, 13, 13 - frozen, 13, 13 - frozen]


def frozen_linear() -> tuple[Linear, Tensor]:
    torch.manual_seed(1)
    return Linear(8, 4).requires_grad_(False), torch.randn(3, 8)


def check(linear: Linear, x: Tensor) -> None:
    """The layer's result is that of its weights as they are now."""
    with torch.autocast("cpu", torch.bfloat16):
        wanted = torch.nn.functional.linear(x, linear.weight.clone(), linear.bias.clone())
        assert torch.equal(linear(x), wanted)


def test_other_weights_are_cast_anew() -> None:
    linear, x = frozen_linear()
    check(linear, x)
    first = linear.cast
    check(linear, x)
    assert first is not None and linear.cast is first
    linear.load_state_dict({"weight": torch.randn(4, 8), "bias": torch.randn(4)})
    check(linear, x)
    linear.bias.mul_(3)
    check(linear, x)
    other = torch.randn(4, 8)
    linear.weight.data, other = other, linear.weight.data  # as a running average of the weights does
    check(linear, x)
    with torch.autocast("cpu", torch.float16):
        assert linear(x).dtype == torch.float16
    check(linear, x)


def test_weights_that_train_are_not_kept() -> None:
    linear, x = frozen_linear()
    check(linear, x)
    linear.requires_grad_(True)
    check(linear, x)
    assert linear.cast is None
    with torch.autocast("cpu", torch.bfloat16):
        linear(x).sum().backward()
    assert linear.weight.grad is not None
    linear.requires_grad_(False)
    with torch.no_grad():
        linear.weight.add_(1.0)
    check(linear, x)


def test_without_autocast_and_in_double_nothing_is_kept() -> None:
    linear, x = frozen_linear()
    assert torch.equal(linear(x), products.linear(x, linear.weight, linear.bias))
    assert linear.cast is None
    linear.double()
    with torch.autocast("cpu", torch.bfloat16):
        linear(x.double())
    assert linear.cast is None


def test_evaluation_leaves_copies_that_training_can_use() -> None:
    linear, x = frozen_linear()
    with torch.inference_mode():
        check(linear, x)
    kept = linear.cast
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        linear(x).sum().backward()
    assert x.grad is not None and linear.cast is kept


def test_copies_are_no_part_of_the_state() -> None:
    linear, x = frozen_linear()
    check(linear, x)
    assert list(linear.state_dict()) == ["weight", "bias"]
    assert len(list(linear.buffers())) == 0


def test_linears_beside_adapters_are_cast_once() -> None:
    """Query, key and value are wrapped; the three other linears of each layer and the pooler are frozen and plain."""
    model = make_model()
    inject(model, LoRAConfig(mode="attn-only", rank=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    run(model)
    with casts() as mode:
        run(model)
    assert weights_of(mode.shapes) == 6  # the wrapped ones, whose sum with the update is another in each step


def test_another_precision_has_its_own_copies() -> None:
    layer = Linear(4, 4).requires_grad_(False)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            layer(torch.ones(2, 4))
        assert layer.cast is not None and layer.cast[1].dtype == layer.cast[2].dtype == dtype
