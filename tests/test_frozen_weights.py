"""bert.Linear: under autocast frozen weights are cast once, with the same numbers, and old copies are never used."""

from typing import Any

import pytest
import torch
from helpers import TINY, make_texts, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bert import BertModel, Linear
from kernels.linear import linear as kernel
from lora import LoRAConfig, inject
from models.freezing import set_trainable

WIDTHS = {TINY.hidden_size, TINY.intermediate_size}


class WeightCasts(TorchDispatchMode):
    """Counts the casts of matrices of weights, whose sides are widths of the model, to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.count += args[0].dim() == 2 and set(args[0].shape) <= WIDTHS
        return func(*args, **(kwargs or {}))


class Plain(nn.Linear):
    """torch's linear layer, which autocast casts in every pass, as a layer of BERT calls it."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        y = super().forward(x)
        return nn.functional.gelu(y) if gelu else y


def run(model: nn.Module) -> tuple[Tensor, int]:
    """Return the model's output under autocast, and how many weights were cast."""
    with WeightCasts() as casts, torch.autocast("cpu", torch.bfloat16):
        out = model(*make_texts(0))["pooler_output"].float()
    return out, casts.count


@pytest.mark.parametrize(("trainable_layers", "frozen"), [(0, 13), (1, 6), (3, 0)])
def test_the_same_numbers_by_fewer_casts(trainable_layers: int, frozen: int) -> None:
    plain, ours = BertModel(TINY), BertModel(TINY)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear):
                setattr(module, name, Plain(child.in_features, child.out_features))
    for model in (plain, ours):
        randomise(model, std=0.3)
        set_trainable(model, trainable_layers)
    for number in range(3):
        outputs, grads = [], []
        for model, wanted in ((plain, 13), (ours, 13 - frozen if number else 13)):
            out, count = run(model)
            assert count == wanted
            outputs.append(out)
            if trainable_layers:
                out.square().sum().backward()
                grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
                model.zero_grad()
        assert torch.equal(*outputs) and outputs[0].std() > 0.01
        assert not grads or all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_linears_beside_adapters_are_cast_once() -> None:
    """Query, key and value are wrapped; the three other linears of each layer and the pooler are frozen and plain."""
    model = BertModel(TINY)
    config = LoRAConfig(mode="attn-only", rank=2)
    inject(model, config)
    set_trainable(model, 3, config)
    run(model)
    assert run(model)[1] == 6  # the wrapped ones, whose sum with the update is another in each step


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
    assert torch.equal(linear(x), kernel(x, linear.weight, linear.bias)) and linear.cast is None
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
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert linear(x).dtype == dtype
    assert list(linear.state_dict()) == ["weight", "bias"] and not list(linear.buffers())


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


def test_evaluation_leaves_copies_that_training_can_use() -> None:
    linear, x = frozen_linear()
    with torch.inference_mode():
        check(linear, x)
    kept = linear.cast
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        linear(x).sum().backward()
    assert x.grad is not None and linear.cast is kept
