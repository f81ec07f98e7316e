"""SMART and the Bregman loss: closed forms, bounds, equal dropout masks, and training that they leave no trace in."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import changed, copied, forward_result, load_batch, make_ready, make_trainer
from torch import Tensor, nn

from config import TrainOptions
from tasks import DEFAULT_TASKS
from text.packing import EncodedBatch, PackedBatch
from training.averaging import MomentumModel
from training.smart import ascend, bregman_loss, divergence, first_noise, same_pass, smart_loss

OPTIONS = TrainOptions(smart_epsilon=0.3, smart_sigma=0.1, smart_eta=0.2, smart_steps=3)
ROWS = [4, 1, 9, 2]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_divergences_of_the_kinds_of_outputs() -> None:
    """Symmetric KL of classes and, of one logit, of Bernoulli distributions: a softmax over it would make that 0."""
    a, b = normal(7, 5), normal(7, 5, seed=1)
    p, q = a.log_softmax(1), b.log_softmax(1)
    kl = nn.functional.kl_div
    wanted = kl(q, p, reduction="batchmean", log_target=True) + kl(p, q, reduction="batchmean", log_target=True)
    assert divergence("kl", a, b).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert divergence("kl", b, a).item() == pytest.approx(wanted.item(), rel=1e-5)
    a, b = normal(9), normal(9, seed=1)
    p, q = (torch.distributions.Bernoulli(logits=logits.double()) for logits in (a, b))
    wanted = (torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)).mean()
    assert wanted > 0.1 and divergence("kl", a, b).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert divergence("mse", a, b).item() == pytest.approx(((a - b) ** 2).mean().item())


@pytest.mark.parametrize(("name", "shape"), [("kl", (4, 5)), ("kl", (4,)), ("mse", (4,))])
def test_divergence_vanishes_where_nothing_differs(name: str, shape: tuple[int, ...]) -> None:
    a = (40 * normal(*shape)).requires_grad_()
    value = divergence(name, a, a.detach())
    value.backward()
    assert value.item() == 0 and a.grad is not None and not a.grad.any()


@pytest.mark.parametrize("width", [1, 7])
def test_a_linear_model_is_moved_to_the_corner_of_the_cube(width: int) -> None:
    """f(x) = w x with squared error: the worst perturbation is epsilon sign(w), its loss (epsilon |w|_1)^2."""
    w, epsilon = normal(width, seed=3), 1e-3
    options = replace(OPTIONS, smart_epsilon=epsilon, smart_sigma=1e-6, smart_eta=1.0, smart_steps=2)
    x = normal(1, width, seed=4)
    noise = ascend(lambda d: (x + d) @ w, x @ w, 1e-6 * normal(1, width), "mse", options)
    assert noise.abs().tolist() == [pytest.approx([epsilon] * width)]
    value = divergence("mse", (x.double() + noise.double()) @ w.double(), x.double() @ w.double()).item()
    assert value == pytest.approx((epsilon * w.abs().sum().item()) ** 2, rel=1e-3)


def test_steps_follow_the_gradient_and_stay_in_the_cube() -> None:
    """Against the rule written out, on a model that is not linear; the last token has no influence."""
    weight, clean_at, start = normal(6, 4, seed=5), normal(4, 6, seed=6), 0.1 * normal(4, 6, seed=7)

    def run(noise: Tensor) -> Tensor:
        return ((clean_at + noise)[:3] @ weight).tanh()

    clean, wanted = run(torch.zeros_like(start)), start
    found = ascend(run, clean, start, "kl", OPTIONS)
    for _ in range(3):
        variable = wanted.clone().requires_grad_()
        divergence("kl", run(variable), clean).backward()
        assert variable.grad is not None
        steps = [0.2 * row / row.abs().max() for row in variable.grad[:3]] + [torch.zeros(6)]
        wanted = (wanted + torch.stack(steps)).clamp(-0.3, 0.3)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found[3], start[3]) and not found.requires_grad
    assert divergence("kl", run(found), clean) > divergence("kl", run(start), clean)


def test_without_steps_the_perturbation_is_the_first_noise(tiny_flags: list[str], tmp_path: Path) -> None:
    """R1, section 4.4: no ascent, and one more pass."""
    flags = ["--arch", "v2", "--train_sst", "--sst_smart", 1, "--smart_steps", 0, "--smart_sigma", 0.1]
    trainer = make_trainer(
        tiny_flags, tmp_path / "run", *flags, "--backbone_dropout_prob", 0, "--hidden_dropout_prob", 0
    )
    result, backbone = forward_result(trainer, "sst", ROWS), trainer.model.backbone("sst")
    assert isinstance(result.batch.inputs, PackedBatch)
    hidden = backbone.embed(result.batch.inputs)
    noisy = EncodedBatch(hidden + first_noise(hidden, trainer.config.train, 7), 0, result.batch.inputs)
    wanted = divergence("kl", trainer.model("sst", noisy), result.outputs)
    assert wanted > 0 and smart_loss(trainer.config.train)(result).item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["kl", "mse"])
def test_a_task_can_choose_its_divergence(tiny_flags: list[str], tmp_path: Path, name: str) -> None:
    """R3 tried both for STS."""
    flags = ["--train_sts", "--sts_smart", 1, "--sts_smart_divergence", name, "--smart_sigma", 0.1, "--smart_steps", 0]
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "v2", *flags)
    result, other = forward_result(trainer, "sts", ROWS), {"kl": "mse", "mse": "kl"}[name]
    found = smart_loss(trainer.config.train)(result).item()
    trainer.config.tasks["sts"].smart_divergence = None if name == "mse" else other
    assert (smart_loss(trainer.config.train)(result).item() == found) == (name == "mse")


def test_the_first_noise_is_gaussian_seeded_and_another_one_each_batch() -> None:
    hidden, state = torch.zeros(500, 40), torch.get_rng_state()
    one, again, other = (first_noise(hidden, OPTIONS, number) for number in (4, 4, 5))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.std().item() == pytest.approx(0.1, rel=0.03) and abs(one.mean().item()) < 0.01


@pytest.mark.parametrize("arch", ["yin-yang", "v2", "r4"])
def test_another_pass_draws_the_same_masks_and_leaves_no_trace(
    tiny_flags: list[str], tmp_path: Path, arch: str
) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", arch)
    for task in DEFAULT_TASKS:
        result = forward_result(trainer, task, ROWS)
        before, state = copied(trainer.model), torch.get_rng_state()
        with same_pass(result):
            repeated = trainer.model(task, result.batch.inputs)
        assert torch.equal(repeated, result.outputs)
        value = smart_loss(trainer.config.train)(result)
        assert value.item() >= 0 and value.requires_grad
        assert torch.equal(state, torch.get_rng_state()) and changed(before, copied(trainer.model)) == set()
        assert not torch.equal(trainer.model(task, result.batch.inputs), result.outputs)  # with other masks


def test_larger_cubes_leave_room_for_larger_changes(tiny_flags: list[str], tmp_path: Path) -> None:
    """Without a perturbation nothing is added, to rounding."""
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "v2")
    for task in DEFAULT_TASKS:
        result = forward_result(trainer, task, ROWS)
        nothing = replace(trainer.config.train, smart_epsilon=1e-30, smart_sigma=0.0)
        assert smart_loss(nothing)(result).item() < 1e-10
        cubes = [replace(trainer.config.train, smart_epsilon=size, smart_eta=1.0) for size in (1e-3, 1e-2, 1e-1)]
        small, larger, largest = (smart_loss(cube)(result).item() for cube in cubes)
        assert 0 < small < larger < largest


def test_the_gradient_is_that_of_both_passes(tiny_flags: list[str], tmp_path: Path) -> None:
    """Of the whole model, embeddings included; the perturbation alone is a constant."""
    still = ["--backbone_dropout_prob", 0, "--hidden_dropout_prob", 0]
    trainer = make_ready(tiny_flags, tmp_path / "run", "--arch", "v2", *still)
    model, result = trainer.model, forward_result(trainer, "sst", ROWS)
    packed = result.batch.inputs
    assert isinstance(packed, PackedBatch)
    hidden, fixed = (model.backbone("sst").embed(packed) for _ in range(2))

    def run(start: Tensor) -> Tensor:
        return model.outputs("sst", model.embed("sst", EncodedBatch(start, 0, packed)))

    start = first_noise(hidden, OPTIONS, result.batch.number)
    noise = ascend(lambda noise: run(fixed.detach() + noise), result.outputs, start, "classes", OPTIONS)
    wanted = divergence("kl", run(hidden + noise), run(hidden))
    found = smart_loss(OPTIONS)(result)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4) and wanted.item() > 1e-6
    names = ("word_embedding.weight", "bert_layers.0.interm_dense.weight", "bert_layers.1.out_dense.bias")
    weights = [*(model.backbone("sst").get_parameter(name) for name in names), *model.heads["sst"].parameters()]
    pairs = zip(torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights), strict=True)
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    another = smart_loss(OPTIONS)(forward_result(trainer, "sst", ROWS, number=8))
    assert abs(another.item() / wanted.item() - 1) > 1e-4  # each batch draws a noise of its own


def test_smart_makes_a_model_steadier(tmp_path: Path, tiny_flags: list[str]) -> None:
    """What it is for: after training with it, the same perturbation moves the outputs less."""
    found = {}
    flags = ["--train_sst", "--arch", "v2", "--fine_tune_mode", "full-model", "--epochs", 15, "--optim", "AdamW"]
    flags += ["--smart_epsilon", 0.2, "--smart_eta", 0.2, "--eval_every", 15, "--lr_schedule", "constant"]
    for weight in (1e-9, 5):
        trainer = make_trainer(tiny_flags, tmp_path / str(weight), *flags, "--sst_smart", weight)
        trainer.fit()
        torch.manual_seed(0)
        found[weight] = np.mean(
            [smart_loss(trainer.config.train)(forward_result(trainer, "sst", range(20))).item() for _ in range(5)]
        )
    assert found[5] < 0.5 * found[1e-9]


def test_the_bregman_loss_is_0_at_the_same_weights(tiny_flags: list[str], tmp_path: Path) -> None:
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--sts_bregman", 1, "--sst_bregman", 1)
    for task in ("sst", "sts"):
        assert bregman_loss(forward_result(trainer, task, ROWS)).item() == 0
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    result = forward_result(trainer, "sst", ROWS)
    before, momentum_model = copied(trainer.model), result.objective.momentum_model
    loss = bregman_loss(result)
    assert loss.item() > 1e-3 and changed(before, copied(trainer.model)) == set()
    assert momentum_model is not None
    with same_pass(result), momentum_model.averaged_weights():
        fixed = trainer.model("sst", result.batch.inputs).detach()  # the slow average's pass has no gradient
    head = list(trainer.model.heads["sst"].parameters())
    wanted = torch.autograd.grad(divergence("classes", result.outputs, fixed), head, retain_graph=True)
    for found, expected in zip(torch.autograd.grad(loss, head), wanted, strict=True):
        torch.testing.assert_close(found, expected)
        assert expected.any()


def test_the_momentum_model_follows_by_the_two_rates(tiny_flags: list[str], tmp_path: Path) -> None:
    model = make_trainer(tiny_flags, tmp_path / "run").model
    momentum_model = MomentumModel(model, replace(OPTIONS, fine_tune_mode="full-model", epochs=1), steps=30)
    name, weight = next((n, p) for n, p in model.named_parameters() if n.startswith("heads.sst"))
    wanted = weight.detach().double().clone()
    for step in range(30):
        with torch.no_grad():
            weight.add_(0.1)
        momentum_model.after_step()
        rate = 0.99 if step < 3 else 0.999
        wanted = rate * wanted + (1 - rate) * weight.detach().double()
    with momentum_model.averaged_weights():
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_mixed_precision_hides_no_small_change(tiny_flags: list[str], tmp_path: Path, pooling: str) -> None:
    """bf16 would round SMART's perturbations away: its passes are in fp32, the clean one too.

    The slow average computes in the clean pass's precision, but not with the clean pass's cast weights.
    """
    trainer = make_trainer(tiny_flags, tmp_path / "run", "--arch", "v2", "--pooling", pooling, "--sst_bregman", 1)
    bregman = []
    for scale in (1.0, 1.1):
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(scale)
        for half in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                torch.manual_seed(1)
                bregman.append(bregman_loss(forward_result(trainer, "sst", ROWS)).item())
    assert bregman[:2] == [0, 0] and bregman[3] == pytest.approx(bregman[2], rel=0.1) and bregman[2] > 1e-3
    for task in DEFAULT_TASKS:
        smart = []
        for half in (False, True):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                smart.append(smart_loss(trainer.config.train)(forward_result(trainer, task, ROWS)).item())
        assert smart[1] == pytest.approx(smart[0], rel=1e-6) and smart[0] > 0


def test_no_pass_of_a_task_with_smart_is_in_tf32(tiny_flags: list[str], tmp_path: Path, tf32: None) -> None:
    """Backward included, and whatever --tf32 allows to the other tasks."""
    trainer, seen = make_ready(tiny_flags, tmp_path / "run", "--arch", "v1", "--sst_smart", 1), set()
    torch.backends.cuda.matmul.allow_tf32 = True  # the trainer's device, a CPU, has switched it off
    dense = trainer.model.backbone("sst").pooler_dense
    dense.register_forward_hook(lambda *_: seen.add(torch.backends.cuda.matmul.allow_tf32))
    dense.weight.register_hook(lambda *_: seen.add(torch.backends.cuda.matmul.allow_tf32))
    for task, allowed in (("sst", False), ("para", True)):
        trainer.forward_backward(load_batch(trainer, task, range(8)), 1.0)
        assert seen == {allowed} and torch.backends.cuda.matmul.allow_tf32
        seen.clear()
