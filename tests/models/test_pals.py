"""PALs and low-rank layers: sizes, the identity at the start, a plain reference over padded tensors, and runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, make_batch, make_model, make_texts, model_options, randomise, weighted_sum
from torch import Tensor, nn

import multitask_classifier
from config import BertConfig, PalOptions, TrainOptions
from lora import LoRAConfig
from models.checkpoint import load
from models.multitask_bert import MultitaskBERT
from tasks import DEFAULT_TASKS
from text.packing import EncodedBatch, pack_padded, unpack
from utils.errors import UserError

State = dict[str, Tensor]
DEPTH, HEADS = 3, 3
DEEP = replace(TINY, num_hidden_layers=DEPTH)
# For each layer of three: which pair V_E, V_D it uses, and which attention.
PLAN: dict[str, list[tuple[int, int | None]]] = {
    "pal": [(0, 0), (1, 1), (2, 2)],
    "low-rank": [(0, None), (1, None), (2, None)],
    "shared-v": [(0, 0), (0, 1), (0, 2)],
    "shared-attention": [(0, 0), (0, 0), (0, 0)],
    "mixed": [(0, 0), (0, 1), (1, None)],
}
all_kinds = pytest.mark.parametrize("kind", list(PLAN))
both_residuals = pytest.mark.parametrize("residual", ["feed-forward", "attention"])


def pal_options(kind: str, **given: Any) -> PalOptions:
    return PalOptions(pal=kind, pal_size=12, pal_heads=HEADS, pal_low_rank_size=10, **given)


def make_pal_model(kind: str, residual: str = "feed-forward", tasks: Any = None, **given: Any) -> MultitaskBERT:
    """Return a model whose every parameter is random, those of its PALs included."""
    model = make_model(config=DEEP, **given)
    model.add_pals(pal_options(kind, pal_residual=residual, pal_tasks=tasks))
    randomise(model.pals, 7, 0.4)
    return model


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("kind", "tasks", "added", "total"),
    [
        ("pal", None, 15_831_936, 125_319_559),
        ("low-rank", None, 5_560_848, 115_048_471),
        ("shared-v", None, 5_459_508, 114_947_131),
        ("shared-v", ("sst",), 1_819_836, 111_307_459),
        ("shared-attention", None, 1_319_328, 110_806_951),
        ("mixed", None, 5_981_652, None),  # R1's own number fits no reading of its text
    ],
)
def test_parameter_counts_of_bert_base(kind: str, tasks: Any, added: int, total: int | None) -> None:
    """What the tasks have in all, and R1's totals with it (table 2)."""
    with torch.device("meta"):
        model = MultitaskBERT(model_options(arch="r1-baseline"), BertConfig(), DEFAULT_TASKS)
        model.add_pals(PalOptions(pal=kind, pal_tasks=tasks))
    assert count(model.pals) == added
    assert total is None or count(model) == total


def test_attention_and_low_rank_meet_in_the_middle() -> None:
    """`mixed`: of an even number of layers the lower half attends, of one layer the only one."""
    for depth, attending in ((1, 1), (2, 1), (6, 3), (12, 6)):
        model = make_model(config=replace(TINY, num_hidden_layers=depth))
        model.add_pals(pal_options("mixed"))
        names = {name.rsplit(".", 1)[0] for name, _ in model.pals["sst"].named_parameters()}
        encoders = {f"encoders.{i}" for i in range(1 + depth - attending)}
        assert {name for name in names if name.startswith("encoders")} == encoders
        assert {name for name in names if name.endswith("query")} == {f"attentions.{i}.query" for i in range(attending)}


@all_kinds
@both_residuals
@pytest.mark.parametrize("arch", ["yin-yang", "r1-baseline", "r4"])
def test_fresh_pals_change_nothing_and_learn_through_v_d(kind: str, residual: str, arch: str) -> None:
    """Bitwise: outputs, gradients, and what the dropouts draw. V_D moves in the first step, the rest in the second."""
    shape = replace(DEEP, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    base = make_model(config=shape, arch=arch, hidden_dropout_prob=0.3)
    model = make_model(config=shape, arch=arch, hidden_dropout_prob=0.3)
    model.add_pals(pal_options(kind, pal_residual=residual))
    for task in DEFAULT_TASKS:
        outputs = []
        for each in (base, model):
            each.train().zero_grad()
            torch.manual_seed(3)
            outputs.append(each(task, make_batch(each, task)))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
        for name, parameter in base.named_parameters():
            other = model.get_parameter(name).grad
            assert (other is None) == (parameter.grad is None), name
            assert other is None or parameter.grad is None or torch.equal(other, parameter.grad), name
    for step in range(2):
        model.zero_grad()
        model("sst", make_batch(model, "sst")).square().sum().backward()
        for name, parameter in model.pals["sst"].named_parameters():
            assert parameter.grad is not None
            if not name.endswith("key.bias"):  # the softmax cancels it
                assert bool(parameter.grad.any()) == (step == 1 or name.startswith("decoders.")), name
            parameter.data -= 0.1 * parameter.grad


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def padded_attention(x: Tensor, mask: Tensor, state: State, name: str, heads: int) -> Tensor:
    """Self-attention of [S, L, D] without an output projection."""
    q, k, v = (
        linear(x, state, f"{name}.{part}").unflatten(2, (heads, -1)).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(mask[:, None, None, :] == 0, -torch.inf)
    return (scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2)


def padded_pal(x: Tensor, mask: Tensor, state: State, kind: str, layer: int) -> Tensor:
    pair, attention = PLAN[kind][layer]
    small = linear(x, state, f"encoders.{pair}")
    if attention is None:
        return linear(F.gelu(small), state, f"decoders.{pair}")
    attended = padded_attention(small, mask, state, f"attentions.{attention}", HEADS)
    return F.gelu(linear(attended, state, f"decoders.{pair}"))


def padded_encode(h: Tensor, mask: Tensor, bert: State, pal: State, kind: str, residual: str) -> Tensor:
    """Embedding output [S, L, H] to the last hidden state [S, L, H]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[2:], bert[f"{name}.weight"], bert[f"{name}.bias"], DEEP.layer_norm_eps)

    for layer in range(DEPTH):
        name = f"bert_layers.{layer}"
        ts = padded_pal(h, mask, pal, kind, layer)
        mh = padded_attention(h, mask, bert, f"{name}.self_attention", DEEP.num_attention_heads)
        mh = linear(mh, bert, f"{name}.attention_dense")
        a = norm(h + mh + (ts if residual == "attention" else 0.0), f"{name}.attention_layer_norm")
        ffn = linear(F.gelu(linear(a, bert, f"{name}.interm_dense")), bert, f"{name}.out_dense")
        h = norm(a + ffn + (ts if residual == "feed-forward" else 0.0), f"{name}.out_layer_norm")
    return h


@all_kinds
@both_residuals
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_outputs_and_gradients_equal_a_plain_implementation(kind: str, residual: str, pooling: str) -> None:
    """With the gradient of the embedding output, which SMART needs. Pooling `cls` takes the short last layer."""
    model = make_pal_model(kind, residual, backbones="shared", pooling=pooling).double().eval()
    backbone = model.backbone("sst")
    ids, mask = make_texts(5, size=9)
    batch, length = pack_padded(ids, mask), mask.shape[1]
    embedded = backbone.embed(batch).detach().requires_grad_()
    hidden = backbone.encode(embedded, batch, pooling == "cls", adapters=model.adapters("sst"))
    padded = unpack(embedded.detach(), batch, length).requires_grad_()
    bert, pal = dict(backbone.named_parameters()), dict(model.pals["sst"].named_parameters())
    last = padded_encode(padded, mask, bert, pal, kind, residual)
    if pooling == "cls":
        found, wanted = backbone.pool(hidden)[batch.restore], torch.tanh(linear(last[:, 0], bert, "pooler_dense"))
    else:
        found, wanted = unpack(hidden, batch, length), last * mask[:, :, None]
    assert (found - wanted).abs().max() < 1e-10
    parameters = {**{f"bert.{n}": p for n, p in bert.items()}, **{f"pal.{n}": p for n, p in pal.items()}}
    reached = {n: p for n, p in parameters.items() if "embed" not in n and (pooling == "cls" or "pooler" not in n)}
    ours = torch.autograd.grad(weighted_sum(found), [embedded, *reached.values()])
    plain = torch.autograd.grad(weighted_sum(wanted), [padded, *reached.values()])
    assert (unpack(ours[0], batch, length) - plain[0] * mask[:, :, None]).abs().max() < 1e-10
    for name, a, b in zip(reached, ours[1:], plain[1:], strict=True):
        assert (a - b).abs().max() < 1e-9, name
        assert b.abs().max() > 1e-6 or name.endswith("key.bias"), name


@all_kinds
@both_residuals
def test_a_pass_that_begins_at_any_layer_has_the_adapters_of_that_layer(kind: str, residual: str) -> None:
    model = make_pal_model(kind, residual).eval()
    backbone, adapters, batch = model.backbone("sst"), model.adapters("sst"), make_batch(model, "sst")
    wanted = model.embed("sst", batch)
    hidden = backbone.embed(batch)
    for done in range(DEPTH):
        assert torch.equal(model.embed("sst", EncodedBatch(hidden, done, batch)), wanted)
        hidden = backbone.bert_layers[done](hidden, batch, adapter=adapters[done])


@all_kinds
def test_a_batch_reaches_its_own_task_alone(kind: str) -> None:
    """PALs of one task change no bit of the others."""
    base, model = make_model(config=DEEP).eval(), make_pal_model(kind, tasks=("sst", "sts")).eval()
    for task in DEFAULT_TASKS:
        model.zero_grad()
        out = model(task, make_batch(model, task))
        assert torch.equal(out, base(task, make_batch(base, task))) == (task == "para")
        out.sum().backward()
        reached = {id(p) for p in model.parameters() if p.grad is not None}
        listed = [id(p) for p in model.task_parameters(task)]
        assert len(listed) == len(set(listed)) and set(listed) == reached
        for other in model.pals:
            assert all((id(p) in reached) == (other == task) for p in model.pals[other].parameters())
    parts = dict(model.parts())
    assert [name for name in parts if name.startswith("pal ")] == ["pal sst", "pal sts"]
    assert sorted(id(p) for part in parts.values() for p in part) == sorted(id(p) for p in model.parameters())
    state = model.state_dict()  # in which no weight stands twice
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


def test_pals_train_whatever_is_frozen_and_are_never_wrapped() -> None:
    model = make_pal_model("pal")
    model.add_adapters(LoRAConfig("all-lin"))
    model.set_trainable_layers(0)
    assert all(p.requires_grad for p in model.pals.parameters())
    frozen = model.frozen_parameter_names(TrainOptions(fine_tune_mode="last-layer"))
    assert frozen and not any(name.startswith("pals.") for name in frozen)
    assert not any("lora_" in name for name in model.pals.state_dict())
    parts = dict(model.parts())
    assert sorted(id(p) for part in parts.values() for p in part) == sorted(id(p) for p in model.parameters())
    assert {"backbone sentiment", "adapters sentiment", "pal sst", "pair layer", "head sst"} <= parts.keys()


def test_a_run_is_evaluated_and_not_exported(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    run, best = tmp_path / "run", str(tmp_path / "run" / "best.pt")
    flags = ["--pal", "shared-v", "--pal_size", "12", "--pal_heads", "3", "--pal_tasks", "sst,quora"]
    multitask_classifier.main([*tiny_flags, *flags, "--run_dir", str(run), "--no_tensorboard", "--epochs", "1"])
    decoders = {name: tensor for name, tensor in load(run / "best.pt")["weights"].items() if ".decoders." in name}
    assert {name.split(".")[1] for name in decoders} == {"sst", "para"} and all(t.any() for t in decoders.values())
    multitask_classifier.main(["--evaluate", best, "--data_dir", str(small_data)])
    scores = [json.loads((folder / "scores.json").read_text())["dev"] for folder in (run, run / "best-evaluation")]
    assert scores[0] == scores[1]
    for flag in ("--export", "--export_peft"):
        with pytest.raises(UserError, match=f"{flag}: .*best.pt has --pal shared-v"):
            multitask_classifier.main(["--evaluate", best, flag, str(tmp_path / "exported")])
    assert not (tmp_path / "exported").exists()
