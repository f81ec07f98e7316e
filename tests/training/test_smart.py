"""SMART and the Bregman term: closed forms, bounds, equal dropout masks, and training that they leave no trace in."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import assert_resumes, changed, copied, make_trainer
from torch import Tensor, nn

from config import TrainOptions
from tasks import DEFAULT_TASKS
from text.packing import EncodedBatch, PackedBatch
from training.seen import Seen
from training.smart import Teacher, ascend, bregman_term, divergence, first_noise, same_pass, smart_term
from training.trainer import Trainer

OPTIONS = TrainOptions(smart_epsilon=0.3, smart_sigma=0.1, smart_eta=0.2, smart_steps=3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- divergences


def test_divergence_of_classes_is_the_symmetric_kl() -> None:
    a, b = normal(7, 5), normal(7, 5, seed=1)
    p, q = a.log_softmax(1), b.log_softmax(1)
    wanted = nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    wanted = wanted + nn.functional.kl_div(p, q, reduction="batchmean", log_target=True)
    assert divergence("classes", a, b).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert divergence("classes", b, a).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_divergence_of_one_logit_is_that_of_bernoulli_distributions() -> None:
    """A softmax over the one logit would make it 0."""
    a, b = normal(9), normal(9, seed=1)
    p, q = (torch.distributions.Bernoulli(logits=own.double()) for own in (a, b))
    kl = torch.distributions.kl_divergence
    wanted = (kl(p, q) + kl(q, p)).mean().item()
    assert wanted > 0.1 and divergence("binary", a, b).item() == pytest.approx(wanted, rel=1e-5)


def test_divergence_of_similarities_is_the_squared_error() -> None:
    a, b = normal(6), normal(6, seed=1)
    assert divergence("similarity", a, b).item() == pytest.approx(((a - b) ** 2).mean().item())


@pytest.mark.parametrize(("kind", "shape"), [("classes", (4, 5)), ("binary", (4,)), ("similarity", (4,))])
def test_divergence_vanishes_where_nothing_differs(kind: str, shape: tuple[int, ...]) -> None:
    a = (40 * normal(*shape)).requires_grad_()
    value = divergence(kind, a, a.detach())
    value.backward()
    assert value.item() == 0 and a.grad is not None and not a.grad.any()


# ------------------------------------------------------------------------------------------------------- the ascent


@pytest.mark.parametrize("width", [1, 7])
def test_a_linear_model_is_moved_to_the_corner_of_the_cube(width: int) -> None:
    """f(x) = w x with squared error: the worst perturbation is epsilon sign(w), its loss (epsilon |w|_1)^2."""
    w, epsilon = normal(width, seed=3), 1e-3
    options = replace(OPTIONS, smart_epsilon=epsilon, smart_sigma=1e-6, smart_eta=1.0, smart_steps=2)
    x = normal(1, width, seed=4)
    noise = ascend(lambda d: (x + d) @ w, x @ w, 1e-6 * normal(1, width), "similarity", options)
    assert noise.abs().tolist() == [pytest.approx([epsilon] * width)]
    value = divergence("similarity", (x.double() + noise.double()) @ w.double(), x.double() @ w.double()).item()
    assert value == pytest.approx((epsilon * w.abs().sum().item()) ** 2, rel=1e-3)


def test_steps_follow_the_gradient_and_stay_in_the_cube() -> None:
    """Against the rule written out, on a model that is not linear."""
    weight = normal(6, 4, seed=5)
    clean_at = normal(3, 6, seed=6)
    start = 0.1 * normal(3, 6, seed=7)

    def run(noise: Tensor) -> Tensor:
        return ((clean_at + noise) @ weight).tanh()

    clean = run(torch.zeros_like(start))
    found = ascend(run, clean, start, "classes", OPTIONS)
    wanted = start
    for _ in range(3):
        variable = wanted.clone().requires_grad_()
        divergence("classes", run(variable), clean).backward()
        gradient = variable.grad
        assert gradient is not None
        for token in range(3):
            step = 0.2 * gradient[token] / gradient[token].abs().max()
            wanted = wanted.clone()
            wanted[token] = (wanted[token] + step).clamp(-0.3, 0.3)
    torch.testing.assert_close(found, wanted)
    assert found.abs().max() <= 0.3 and not torch.equal(found, start)
    grown = divergence("classes", run(found), clean) > divergence("classes", run(start), clean)
    assert grown and not found.requires_grad


def test_a_token_without_influence_stays_where_it_is() -> None:
    start = 0.1 * normal(2, 3)
    found = ascend(lambda d: d[:1] @ torch.ones(3), torch.zeros(1), start, "similarity", OPTIONS)
    assert torch.equal(found[1], start[1]) and not torch.equal(found[0], start[0]) and found.isfinite().all()


def test_the_first_noise_is_gaussian_seeded_and_another_one_each_step() -> None:
    hidden = torch.zeros(500, 40)
    state = torch.get_rng_state()
    one, again, other = (first_noise(hidden, OPTIONS, step) for step in (4, 4, 5))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.std().item() == pytest.approx(0.1, rel=0.03) and abs(one.mean().item()) < 0.01


# ------------------------------------------------------------------------------------------------------- in a model


def seen_by(trainer: Trainer, task: str, indices: np.ndarray) -> Seen:
    """A training pass, as the loop makes it."""
    model, data = trainer.model, trainer.train_data[task]
    batch, labels = data.batch(indices), data.labels(indices)
    state = torch.get_rng_state()
    embedding = model.embed(task, batch)
    outputs = model.outputs(task, embedding)
    return Seen(model, task, batch, embedding, outputs, labels, state, 7, trainer.teacher)


ROWS = np.array([4, 1, 9, 2])


@pytest.mark.parametrize("task", DEFAULT_TASKS)
@pytest.mark.parametrize("arch", ["yin-yang", "v2", "r4"])
def test_another_pass_draws_the_same_masks_and_leaves_no_trace(
    tiny_flags: list[str], tmp_path: Path, task: str, arch: str
) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", arch)
    trainer.model.train()
    seen = seen_by(trainer, task, ROWS)
    before, state = copied(trainer.model), torch.get_rng_state()
    with same_pass(seen):
        repeated = trainer.model(task, seen.batch)
    assert torch.equal(repeated, seen.outputs)
    value = smart_term(trainer.config.train)(seen)
    assert value.item() >= 0 and value.requires_grad
    assert torch.equal(state, torch.get_rng_state()) and changed(before, copied(trainer.model)) == set()
    assert not torch.equal(trainer.model(task, seen.batch), seen.outputs)  # a later pass has masks of its own


def test_without_perturbation_nothing_is_added(tiny_flags: list[str], tmp_path: Path) -> None:
    """An epsilon of next to nothing: the perturbed pass is the clean one, to rounding."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "v2")
    trainer.model.train()
    for task in DEFAULT_TASKS:
        options = replace(trainer.config.train, smart_epsilon=1e-30, smart_sigma=0.0)
        assert smart_term(options)(seen_by(trainer, task, ROWS)).item() < 1e-10


def test_larger_cubes_leave_room_for_larger_changes(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "v2")
    trainer.model.train()
    for task in DEFAULT_TASKS:
        seen = seen_by(trainer, task, ROWS)
        values = [
            smart_term(replace(trainer.config.train, smart_epsilon=epsilon, smart_eta=1.0))(seen).item()
            for epsilon in (1e-3, 1e-2, 1e-1)
        ]
        assert 0 < values[0] < values[1] < values[2]


def test_the_gradient_is_that_of_both_passes(tiny_flags: list[str], tmp_path: Path) -> None:
    """Of the whole model, embeddings included; the perturbation alone is a constant."""
    flags = ["--arch", "v2", "--backbone_dropout_prob", 0, "--hidden_dropout_prob", 0]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags, "--fine_tune_mode", "full-model")
    trainer.model.freeze_for_epoch(trainer.config.train, 0)
    model, options = trainer.model.train(), OPTIONS
    seen = seen_by(trainer, "sst", ROWS)
    assert isinstance(seen.batch, PackedBatch)
    hidden, fixed = (model.backbone("sst").embed(seen.batch) for _ in range(2))

    def run(start: Tensor) -> Tensor:
        return model.outputs("sst", model.embed("sst", EncodedBatch(start, 0, seen.batch)))

    start = first_noise(hidden, options, seen.world.seed(seen.step))
    noise = ascend(lambda own: run(fixed.detach() + own), seen.outputs, start, "classes", options)
    wanted = divergence("classes", run(hidden + noise), run(hidden))
    term = smart_term(options)(seen)
    assert term.item() == pytest.approx(wanted.item(), rel=1e-4) and wanted.item() > 1e-6
    names = ("word_embedding.weight", "bert_layers.0.interm_dense.weight", "bert_layers.1.out_dense.bias")
    weights = [*(model.backbone("sst").get_parameter(name) for name in names), *model.heads["sst"].parameters()]
    expected = torch.autograd.grad(wanted, weights)
    for found, own in zip(torch.autograd.grad(term, weights), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-3 * float(own.abs().max()))
    torch.manual_seed(0)
    another = smart_term(options)(replace(seen_by(trainer, "sst", ROWS), step=8))
    assert abs(another.item() / wanted.item() - 1) > 1e-4  # each step draws a noise of its own


@pytest.mark.parametrize("more", [["--smart_steps", 2], ["--sts_bregman", 0.5], ["--lora_mode", "attn"]])
def test_a_run_with_smart_trains_and_resumes(tiny_flags: list[str], tmp_path: Path, more: list[object]) -> None:
    flags = ["--sst_smart", 1, "--quora_smart", 0.5, "--routine", "interleave", "--epochs", 3, *more]
    whole = assert_resumes(tiny_flags, tmp_path, *flags, after=2)
    others = [] if "--smart_steps" in more else more
    plain = make_trainer(tiny_flags, tmp_path / "plain", "--routine", "interleave", "--epochs", 3, *others)
    plain.fit()
    assert changed(copied(whole.model), copied(plain.model))


def test_a_weight_of_zero_trains_as_without(tiny_flags: list[str], tmp_path: Path) -> None:
    runs = []
    for name, more in (("plain", []), ("zero", ["--sst_smart", 0, "--sts_bregman", 0])):
        trainer = make_trainer(tiny_flags, tmp_path / name, *more)
        trainer.fit()
        runs.append(copied(trainer.model))
    assert changed(*runs) == set()


def test_smart_makes_a_model_steadier(tmp_path: Path, tiny_flags: list[str]) -> None:
    """What it is for: after training with it, the same perturbation moves the outputs less."""
    found = {}
    flags = ["--train_sst", "--arch", "v2", "--fine_tune_mode", "full-model", "--epochs", 15, "--optim", "AdamW"]
    flags += ["--smart_epsilon", 0.2, "--smart_eta", 0.2, "--eval_every", 15, "--lr_schedule", "constant"]
    for weight in (1e-9, 5):
        trainer = make_trainer(tiny_flags, tmp_path / str(weight), *flags, "--sst_smart", weight)
        trainer.fit()
        trainer.model.eval()
        found[weight] = smart_term(trainer.config.train)(seen_by(trainer, "sst", np.arange(20))).item()
    assert found[5] < 0.5 * found[1e-9]


# ------------------------------------------------------------------------------------------------------- Bregman


def test_the_bregman_term_is_0_at_the_same_weights(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--sts_bregman", 1, "--sst_bregman", 1)
    trainer.model.train()
    for task in ("sst", "sts"):
        seen = seen_by(trainer, task, ROWS)
        assert isinstance(seen.teacher, Teacher) and bregman_term(seen).item() == 0
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    seen = seen_by(trainer, "sst", ROWS)
    before = copied(trainer.model)
    term = bregman_term(seen)
    assert term.item() > 1e-3 and changed(before, copied(trainer.model)) == set()
    with same_pass(seen), seen.teacher.swapped():
        fixed = trainer.model("sst", seen.batch).detach()  # the teacher's pass has no gradient
    head = list(trainer.model.heads["sst"].parameters())
    wanted = torch.autograd.grad(divergence("classes", seen.outputs, fixed), head, retain_graph=True)
    for found, own in zip(torch.autograd.grad(term, head), wanted, strict=True):
        torch.testing.assert_close(found, own)
        assert own.any()


def test_the_teacher_follows_by_the_two_rates(tiny_flags: list[str], tmp_path: Path) -> None:
    model = make_trainer(tiny_flags, tmp_path / "run").model
    teacher = Teacher(model, replace(OPTIONS, fine_tune_mode="full-model", epochs=1), steps=30)
    name, weight = next((n, p) for n, p in model.named_parameters() if n.startswith("heads.sst"))
    wanted = weight.detach().double().clone()
    for step in range(30):
        with torch.no_grad():
            weight.add_(0.1)
        teacher.after_step()
        rate = 0.99 if step < 3 else 0.999
        wanted = rate * wanted + (1 - rate) * weight.detach().double()
    torch.testing.assert_close(teacher.averages[name].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", DEFAULT_TASKS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_smart_with_mixed_precision_sees_its_small_perturbations(
    tmp_path: Path, tiny_flags: list[str], pooling: str, task: str
) -> None:
    """bf16 would round them away: the passes that are compared are in fp32, the clean one too."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "v2", "--pooling", pooling)
    trainer.model.train()
    values = []
    for half in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            values.append(smart_term(trainer.config.train)(seen_by(trainer, task, ROWS)).item())
    assert values[1] == pytest.approx(values[0], rel=1e-6) and values[0] > 0


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_with_mixed_precision_too_the_bregman_term_compares_weights_alone(
    tiny_flags: list[str], tmp_path: Path, pooling: str
) -> None:
    """The slow average computes in the clean pass's precision, but not with its cast weights."""
    flags = ["--arch", "v2", "--pooling", pooling, "--sst_bregman", 1, "--sts_bregman", 1]
    trainer = make_trainer(tiny_flags, tmp_path / "run", *flags)
    trainer.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert bregman_term(seen_by(trainer, "sst", ROWS)).item() == 0
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    values = []
    for half in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            values.append(bregman_term(seen_by(trainer, "sst", ROWS)).item())
    assert values[1] == pytest.approx(values[0], rel=0.1) and values[0] > 1e-3
