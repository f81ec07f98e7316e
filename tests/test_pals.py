"""PALs and low-rank layers: sizes, the identity at the start, a plain reference over padded tensors, and runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_config import configure, refusal
from test_multitask_bert import TINY, make_batch, make_model, make_texts, options
from test_training import State, assert_resumes, changed, copied, make_trainer, states_by_epoch
from torch import Tensor, nn

import multitask_classifier
from config import BertConfig, PalOptions
from lora import adapted_layers
from models.checkpoint import load, load_model
from models.multitask_bert import MultitaskBERT
from tasks import DEFAULT_TASKS
from text.packing import EncodedBatch, pack_padded, unpack
from utils.errors import UserError

DEPTH, SIZE, HEADS, LOW_RANK = 3, 12, 3, 10
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
    small = {"pal_size": SIZE, "pal_heads": HEADS, "pal_low_rank_size": LOW_RANK}
    return PalOptions(pal=kind, **{**small, **given})


def randomise(module: nn.Module, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)


def make_pal_model(kind: str, residual: str = "feed-forward", tasks: Any = None, **given: Any) -> MultitaskBERT:
    """A model whose every parameter is random, those of its PALs included."""
    model = make_model(config=DEEP, **given)
    model.add_pals(pal_options(kind, pal_residual=residual, pal_tasks=tasks))
    randomise(model.pals)
    return model


def bits(x: Tensor) -> Tensor:
    return x.detach().view(torch.int32)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("kind", "added", "total"),
    [
        ("pal", 15_831_936, 125_319_559),
        ("low-rank", 5_560_848, 115_048_471),
        ("shared-v", 5_459_508, 114_947_131),
        ("shared-attention", 1_319_328, 110_806_951),
        ("mixed", 5_981_652, None),  # R1's own number fits no reading of its text
    ],
)
@both_residuals
def test_parameter_counts_of_bert_base(kind: str, added: int, total: int | None, residual: str) -> None:
    """What three tasks have in all, and R1's totals with it (table 2)."""
    with torch.device("meta"):
        model = MultitaskBERT(options(arch="r1-baseline"), BertConfig(), DEFAULT_TASKS)
        model.add_pals(PalOptions(pal=kind, pal_residual=residual))
    assert count(model.pals) == added
    assert total is None or count(model) == total


def test_one_task_has_a_third_of_it() -> None:
    with torch.device("meta"):
        model = MultitaskBERT(options(arch="r1-baseline"), BertConfig(), DEFAULT_TASKS)
        model.add_pals(PalOptions(pal="shared-v", pal_tasks=("sst",)))
    assert count(model) == 111_307_459  # R1, table 2: SST only


@all_kinds
def test_no_weight_stands_twice_in_a_checkpoint(kind: str) -> None:
    """Shared ones neither: on a GPU each name would be a copy."""
    model = make_pal_model(kind)
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


# ----------------------------------------------------------------------------------------------- at the start: nothing


@all_kinds
@both_residuals
@pytest.mark.parametrize("arch", ["yin-yang", "r1-baseline", "r4"])
def test_fresh_pals_change_nothing(kind: str, residual: str, arch: str) -> None:
    """Bitwise: outputs, gradients, and what the dropouts draw."""
    shape = replace(DEEP, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    base = make_model(config=shape, arch=arch, hidden_dropout_prob=0.3)
    model = make_model(config=shape, arch=arch, hidden_dropout_prob=0.3)
    model.add_pals(pal_options(kind, pal_residual=residual))
    for adapter in model.pals.values():
        assert isinstance(adapter, nn.Module)
        decoders = {name for name, p in adapter.named_parameters() if not p.any()}
        assert {name for name in decoders if name.endswith("weight")} == {
            f"decoders.{pair}.weight" for pair, _ in PLAN[kind]
        }
        randomise(adapter)
        for name, parameter in adapter.named_parameters():
            if name.startswith("decoders."):
                parameter.data.zero_()
    for training in (True, False):
        for task in DEFAULT_TASKS:
            found = []
            for own in (base, model):
                own.train(training).zero_grad()
                torch.manual_seed(3)
                out = own(task, make_batch(own, task))
                out.square().sum().backward()
                found.append(out)
            assert torch.equal(bits(found[0]), bits(found[1]))
            grads = dict(model.named_parameters())
            for name, parameter in base.named_parameters():
                other = grads[name].grad
                assert (other is None) == (parameter.grad is None), name
                assert other is None or parameter.grad is None or torch.equal(other, parameter.grad), name


@all_kinds
def test_the_first_step_moves_v_d_and_the_second_the_rest(kind: str) -> None:
    model = make_model(config=DEEP)
    model.add_pals(pal_options(kind))
    for step in range(2):
        model.zero_grad()
        model("sst", make_batch(model, "sst")).square().sum().backward()
        for name, parameter in model.pals["sst"].named_parameters():
            assert parameter.grad is not None
            moves = bool(parameter.grad.any())
            if not name.endswith("key.bias"):  # which the softmax cancels
                assert moves == (step == 1 or name.startswith("decoders.")), name
            parameter.data -= 0.1 * parameter.grad


@all_kinds
def test_mixed_precision_starts_from_the_base_too(kind: str) -> None:
    base, model = make_model(config=DEEP), make_model(config=DEEP)
    model.add_pals(pal_options(kind))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [own("para", make_batch(own, "para")) for own in (base, model)]
    assert torch.equal(*outputs)


# ----------------------------------------------------------------------------- a plain implementation over padded rows


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def plain_attention(x: Tensor, mask: Tensor, state: State, name: str, heads: int) -> Tensor:
    """Self-attention of [S, L, D] without an output projection, a head at a time."""
    query, key, value = (linear(x, state, f"{name}.{part}") for part in ("query", "key", "value"))
    width = x.shape[2] // heads
    out = []
    for head in range(heads):
        q, k, v = (part[:, :, head * width : (head + 1) * width] for part in (query, key, value))
        scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(mask[:, None, :] == 0, -torch.inf)
        out.append(scores.softmax(dim=2) @ v)
    return torch.cat(out, dim=2)


def plain_ts(x: Tensor, mask: Tensor, state: State, kind: str, layer: int) -> Tensor:
    pair, attention = PLAN[kind][layer]
    small = linear(x, state, f"encoders.{pair}")
    if attention is None:
        return linear(F.gelu(small), state, f"decoders.{pair}")
    return F.gelu(
        linear(plain_attention(small, mask, state, f"attentions.{attention}", HEADS), state, f"decoders.{pair}")
    )


def plain_encode(h: Tensor, mask: Tensor, bert: State, pal: State | None, kind: str, residual: str) -> Tensor:
    """Embedding output [S, L, H] to the last hidden state [S, L, H]; no adapters where `pal` is None."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[2:], bert[f"{name}.weight"], bert[f"{name}.bias"], DEEP.layer_norm_eps)

    for layer in range(DEPTH):
        name = f"bert_layers.{layer}"
        ts = 0.0 if pal is None else plain_ts(h, mask, pal, kind, layer)
        mh = plain_attention(h, mask, bert, f"{name}.self_attention", DEEP.num_attention_heads)
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
    backbone, pal = model.backbone("sst"), model.pals["sst"]
    ids, mask = make_texts(5, size=9)
    batch = pack_padded(ids, mask)
    embedded = backbone.embed(batch).detach().requires_grad_()
    hidden = backbone.encode(embedded, batch, pooling == "cls", adapters=model.adapters("sst"))
    pooled = backbone.pool(hidden)[batch.restore] if pooling == "cls" else None
    length = mask.shape[1]
    padded = unpack(embedded.detach(), batch, length).requires_grad_()
    bert, own = dict(backbone.named_parameters()), dict(pal.named_parameters())
    last = plain_encode(padded, mask, bert, own, kind, residual)
    wanted = torch.tanh(linear(last[:, 0], bert, "pooler_dense"))
    if pooled is None:
        pooled = unpack(hidden, batch, length)
        wanted = last * mask[:, :, None]
    assert pooled.shape == wanted.shape
    assert (pooled - wanted).abs().max() < 1e-10
    without = plain_encode(padded, mask, bert, None, kind, residual)
    assert (without - last)[:, 0].abs().max() > 0.1  # the adapters matter
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=wanted.dtype)
    parameters = {**{f"bert.{n}": p for n, p in bert.items()}, **{f"pal.{n}": p for n, p in own.items()}}
    reached = {n: p for n, p in parameters.items() if "embed" not in n and (pooling == "cls" or "pooler" not in n)}
    found = torch.autograd.grad((pooled * weights).sum(), [embedded, *reached.values()])
    plain = torch.autograd.grad((wanted * weights).sum(), [padded, *reached.values()])
    assert (unpack(found[0], batch, length) - plain[0] * mask[:, :, None]).abs().max() < 1e-10
    for name, a, b in zip(reached, found[1:], plain[1:], strict=True):
        assert (a - b).abs().max() < 1e-9, name
        assert b.abs().max() > 1e-6 or name.endswith("key.bias"), name


@all_kinds
@both_residuals
def test_a_pass_that_begins_at_any_layer_has_the_adapters_of_that_layer(kind: str, residual: str) -> None:
    model = make_pal_model(kind, residual).eval()
    backbone, slots, batch = model.backbone("sst"), model.adapters("sst"), make_batch(model, "sst")
    wanted = model.embed("sst", batch)
    hidden = backbone.embed(batch)
    for done in range(DEPTH):
        assert torch.equal(model.embed("sst", EncodedBatch(hidden, done, batch)), wanted)
        hidden = backbone.bert_layers[done](hidden, batch, adapter=slots[done])


@all_kinds
@both_residuals
@pytest.mark.parametrize("arch", ["yin-yang", "r1-baseline", "r4"])
def test_a_task_without_pals_is_as_without_any(kind: str, residual: str, arch: str) -> None:
    base = make_model(config=DEEP, arch=arch).eval()
    model = make_pal_model(kind, residual, ("sst",), arch=arch).eval()
    assert list(model.pals) == ["sst"]
    for task in ("para", "sts"):
        found, wanted = (own(task, make_batch(own, task)) for own in (model, base))
        assert torch.equal(bits(found), bits(wanted))
    found, wanted = (own.embed("sst", make_batch(own, "sst")) for own in (model, base))
    assert (found - wanted).abs().max() > 0.1


@all_kinds
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_and_batch_mates_change_nothing(kind: str, pooling: str) -> None:
    model = make_pal_model(kind, pooling=pooling).double().eval()
    ids, mask = make_texts(2, size=8)
    together = model.embed("sst", pack_padded(ids, mask))
    wide = model.embed("sst", pack_padded(F.pad(ids, (0, 5), value=9), F.pad(mask, (0, 5))))
    assert torch.equal(together, wide)
    for row in range(8):
        alone = model.embed("sst", pack_padded(ids[row : row + 1], mask[row : row + 1]))
        assert (alone[0] - together[row]).abs().max() < 1e-12


@all_kinds
@pytest.mark.parametrize("arch", ["r1-baseline", "yin-yang"])
def test_a_batch_reaches_its_own_task_alone(kind: str, arch: str) -> None:
    model = make_pal_model(kind, arch=arch, tasks=("sst", "sts"))
    for task in DEFAULT_TASKS:
        model.zero_grad()
        model(task, make_batch(model, task)).sum().backward()
        reached = {id(p) for p in model.parameters() if p.grad is not None}
        listed = [id(p) for p in model.task_parameters(task)]
        assert len(listed) == len(set(listed)) and set(listed) == reached
        for other in model.pals:
            assert all((id(p) in reached) == (other == task) for p in model.pals[other].parameters())
    parts = dict(model.parts())
    assert [name for name in parts if name.startswith("pal ")] == ["pal sst", "pal sts"]
    assert sorted(id(p) for own in parts.values() for p in own) == sorted(id(p) for p in model.parameters())


def test_attention_and_low_rank_meet_in_the_middle() -> None:
    """`mixed`: of an even number of layers the lower half attends, of one layer the only one."""
    for depth, attending in ((1, 1), (2, 1), (6, 3), (12, 6)):
        model = make_model(config=replace(TINY, num_hidden_layers=depth))
        model.add_pals(pal_options("mixed"))
        names = {name.rsplit(".", 1)[0] for name, _ in model.pals["sst"].named_parameters()}
        assert {name for name in names if name.startswith("encoders")} == {
            f"encoders.{i}" for i in range(1 + depth - attending)
        }
        assert {name for name in names if name.endswith("query")} == {f"attentions.{i}.query" for i in range(attending)}
        assert model("sst", make_batch(model, "sst")).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- runs

SMALL = ["--pal_size", "12", "--pal_heads", "3"]
FLAGS = {
    "pal": SMALL,
    "low-rank": ["--pal_low_rank_size", "10"],
    "shared-v": [*SMALL, "--pal_residual", "attention"],
    "shared-attention": [*SMALL, "--pal_tasks", "sst,quora"],
    "mixed": [*SMALL, "--pal_low_rank_size", "10"],
}


def read_scores(folder: Path) -> Any:
    return json.loads((folder / "scores.json").read_text())["dev"]


@all_kinds
def test_a_run_of_each_kind(tiny_flags: list[str], small_data: Path, tmp_path: Path, kind: str) -> None:
    """The checkpoint gives the scores of its run, and holds V_Ds that are no longer zero."""
    run = tmp_path / "run"
    flags = ["--pal", kind, *FLAGS[kind], "--fine_tune_mode", "full-model", "--run_dir", str(run), "--no_tensorboard"]
    multitask_classifier.main([*tiny_flags, *flags, "--lr", "1e-2"])
    tasks = {"sst", "para"} if kind == "shared-attention" else set(DEFAULT_TASKS)
    weights = load(run / "best.pt")["weights"]
    decoders = {name: tensor for name, tensor in weights.items() if ".decoders." in name}
    assert {name.split(".")[1] for name in decoders} == tasks
    assert all(tensor.any() for tensor in decoders.values())
    multitask_classifier.main(["--evaluate", str(run / "best.pt"), "--data_dir", str(small_data)])
    assert read_scores(run / "best-evaluation") == read_scores(run)
    for flag in ("--export", "--export_peft"):
        with pytest.raises(UserError, match=f"{flag}: .*best.pt has --pal {kind}"):
            multitask_classifier.main(["--evaluate", str(run / "best.pt"), flag, str(tmp_path / "exported")])
    assert not (tmp_path / "exported").exists()


def test_a_run_starts_from_the_model_without_pals(tiny_flags: list[str], tmp_path: Path) -> None:
    """The same seed draws the same heads, so the first outputs are bitwise the same."""
    plain = make_trainer(tiny_flags, tmp_path / "plain").model
    model = make_trainer(tiny_flags, tmp_path / "pals", "--pal", "shared-v", *SMALL).model
    assert changed(copied(plain), {name: own for name, own in copied(model).items() if "pals." not in name}) == set()
    for task in DEFAULT_TASKS:
        batch = make_batch(plain, task)
        assert torch.equal(bits(model.eval()(task, batch)), bits(plain.eval()(task, batch)))


def trained_names(before: State, after: State) -> set[str]:
    """First words of the names of the tensors that changed."""
    return {name.split(".")[0] for name in changed(before, after)}


def test_pals_train_from_the_first_epoch_of_iterative_unfreezing(tiny_flags: list[str], tmp_path: Path) -> None:
    more = ["--pal", "pal", *SMALL, "--epochs", "5"]
    model, states = states_by_epoch(tiny_flags, tmp_path / "run", *more)
    assert trained_names(states[0], states[1]) == {"heads", "pair_layer", "pals"}
    assert "backbones" in trained_names(states[1], states[2])
    for name in model.pals:
        assert all(not torch.equal(states[0][key], states[1][key]) for key in states[0] if f"pals.{name}.dec" in key)


def test_last_layer_trains_pals_and_heads(tiny_flags: list[str], tmp_path: Path) -> None:
    more = ["--pal", "mixed", *SMALL, "--pal_tasks", "sst", "--fine_tune_mode", "last-layer"]
    model, states = states_by_epoch(tiny_flags, tmp_path / "run", *more)
    assert trained_names(states[0], states[-1]) == {"heads", "pair_layer", "pals"}
    assert list(model.pals) == ["sst"]


@pytest.mark.parametrize("fine_tune_mode", ["last-layer", "full-model", "iterative"])
@pytest.mark.parametrize("mode", ["all-lin", "attn-only"])
def test_with_lora(tiny_flags: list[str], tmp_path: Path, fine_tune_mode: str, mode: str) -> None:
    """LoRA wraps the backbone only; the checkpoint holds what trained, PALs among it, and gives the same outputs."""
    flags = ["--pal", "pal", *SMALL, "--lora_mode", mode, "--lora_rank", "2", "--fine_tune_mode", fine_tune_mode]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    model = trainer.model
    assert not list(adapted_layers(model.pals)) and list(adapted_layers(model.backbones))
    before = copied(model)
    trainer.fit()
    moved = changed(before, copied(model))
    frozen = model.frozen_parameter_names(fine_tune_mode)
    assert frozen and not moved & frozen and not any(name.startswith("pals.") for name in frozen)
    assert {name for name in before if ".decoders." in name} <= moved
    weights = load(trainer.run.best)["weights"]
    assert {name for name in before if name.startswith("pals.")} <= weights.keys() and not frozen & weights.keys()
    again, *_ = load_model(trainer.run.best)
    trainer.model.load_state_dict({**copied(model), **weights})
    for task in DEFAULT_TASKS:
        batch = make_batch(model, task)
        assert torch.equal(again.eval()(task, batch), model.eval()(task, batch))


def test_with_smart_joint_steps_pcgrad_and_running_averages(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["--pal", "shared-v", *SMALL, "--lora_mode", "attn", "--routine", "joint", "--pcgrad", "--average", "ema"]
    flags += ["--sst_smart", "1", "--quora_smart", "1", "--sts_smart", "1", "--sst_bregman", "1"]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    before = copied(trainer.model)
    trainer.fit()
    assert {name for name in before if ".decoders." in name} <= changed(before, copied(trainer.model))
    again, *_ = load_model(trainer.run.best)
    assert changed(before, copied(again)) >= {name for name in before if ".decoders." in name}


def test_resuming_goes_on_bit_for_bit(tiny_flags: list[str], tmp_path: Path) -> None:
    assert_resumes(tiny_flags, tmp_path, "--pal", "shared-v", *SMALL, "--epochs", "4", after=2)


def test_the_plan_counts_them(tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    multitask_classifier.main([*tiny_flags, "--pal", "low-rank", "--pal_low_rank_size", "5", "--dry_run"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    number = 2 * (32 * 5 + 5 + 5 * 32 + 32)  # layers x (V_E, V_D, biases)
    for task in DEFAULT_TASKS:
        assert ["pal", task, f"{number:,}", f"{number:,}", "100.0%"] in lines


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--pal_size 120", ["--pal_size", "--pal"]),
        ("--pal_residual attention", ["--pal_residual", "--pal"]),
        ("--pal_tasks sst", ["--pal_tasks", "--pal"]),
        ("--pal low-rank --pal_size 120", ["--pal_size", "--pal low-rank"]),
        ("--pal low-rank --pal_heads 6", ["--pal_heads", "--pal low-rank"]),
        ("--pal shared-v --pal_low_rank_size 10", ["--pal_low_rank_size", "--pal shared-v"]),
        ("--pal pal --cache_frozen", ["--cache_frozen", "--pal pal"]),
        ("--pal pal --pal_size 100", ["--pal_size 100", "--pal_heads 12", "--pal_size 108"]),
        ("--pal mixed --pal_heads 5", ["--pal_size 204", "--pal_heads 5", "--pal_size 205"]),
        ("--pal pal --pal_tasks sst,mnli", ["--pal_tasks mnli", "quora"]),
        ("--pal pal --pal_tasks sst,quora --train_sst", ["--pal_tasks quora", "--train_quora"]),
    ],
)
def test_senseless_flags_are_refused(words: str, named: list[str]) -> None:
    message = refusal(*words.split())
    assert all(word in message for word in named)


def test_quora_is_a_name_of_para_here_too() -> None:
    assert configure("--pal", "pal", "--pal_tasks", "quora, para sts").pal.pal_tasks == ("para", "sts")
