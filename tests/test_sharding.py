"""--fsdp on gloo: the model is that of one process, each rank holds its share, and files are those of one process."""

import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from ranks import launch
from test_distributed import CASES as WITHOUT_FSDP
from test_distributed import EXACT, as_text, check_files, small_run

from cli.parser import parse
from evaluation.predict import predict
from models.checkpoint import load, load_model
from tasks import TASKS
from training.cuda_graphs import check_device
from training.distributed import ONE
from training.sharding import Shards
from utils.device import Device
from utils.errors import UserError

STEPS = 20
CASES: dict[str, list[Any]] = {
    "sequential, AdamW": ["--optim", "AdamW", "--sst_weight_decay", 0.1, "--clip", 0.5],
    "sequential, Adamax": ["--arch", "duality", "--clip", 0.5],
    "joint, AdamW": ["--routine", "joint", "--optim", "AdamW", "--arch", "v2", "--clip", 0.5],
    "joint, Adamax": ["--routine", "joint", "--clip", 0.5],
    "DoRA, PAL": ["--lora_mode", "all-lin", "--dora", "--pal", "low-rank", "--arch", "v2", "--clip", 0.5],
}
LONGER: dict[str, list[Any]] = {
    "annealed, three backbones": ["--routine", "annealed", "--arch", "r4", "--optim", "RAdam"],
    **{name: WITHOUT_FSDP[name] for name in ("embeddings", "SMART")},
}
ON_THREE = ("sequential, Adamax", "joint, AdamW")
# A run that trains the heads, then the upper layer, then both, then everything.
UNFREEZING = ["--fine_tune_mode", "iterative", "--epochs", 5, "--routine", "joint", "--optim", "AdamW"]
UNFREEZING += ["--refresh_batchnorm"]


# --------------------------------------------------------------------------------------------------- the same model


def trained(flags: list[str], cases: dict[str, list[Any]], folder: Path, size: int = 1) -> dict[str, Any]:
    """The cases in float64: on several ranks with --fsdp, or in this process without."""
    flags = [*flags, *as_text(EXACT)]
    if size == 1:
        return ranks.train_cases(flags, cases, folder, STEPS, True)
    log, flags = folder.with_name(f"{folder.name}-log"), [*flags, "--fsdp"]
    return launch(size, log, ranks.train_cases, flags, cases, folder, STEPS, True).result()


def check_same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """Parameters, statistics of BatchNorm, losses and gradient norms."""
    assert list(found["weights"]) == list(alone["weights"])
    assert alone["losses"].isfinite().all() and len(alone["losses"].unique()) > STEPS / 2
    for name in ("losses", "norms"):
        torch.testing.assert_close(found[name], alone[name], rtol=1e-6, atol=1e-6, equal_nan=True)
    for name, own in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], own, rtol=0.0, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def one_process(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cases without torchrun."""
    return trained(tiny_flags, CASES, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def by_shards(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The cases on 2 and 3 ranks."""
    folder = tmp_path_factory.mktemp("shards")
    some = {name: CASES[name] for name in ON_THREE}
    return {size: trained(tiny_flags, own, folder / str(size), size) for size, own in ((2, CASES), (3, some))}


@pytest.mark.parametrize(("size", "case"), [*((2, case) for case in CASES), *((3, case) for case in ON_THREE)])
def test_shards_train_the_model_of_one_process(
    one_process: dict[str, Any], by_shards: dict[int, dict[str, Any]], size: int, case: str
) -> None:
    """After 20 steps of ragged batches, in some of which a rank of three has nothing."""
    check_same(by_shards[size][case], one_process[case])


@pytest.mark.long
def test_further_losses_and_backbones(tiny_flags: list[str], tmp_path: Path) -> None:
    """Several passes through a layer before one pass back, and passes back that stop at the embeddings."""
    alone, found = (trained(tiny_flags, LONGER, tmp_path / str(size), size) for size in (1, 2))
    for case, own in alone.items():
        check_same(found[case], own)


def test_half_precision_of_shards_is_that_of_whole_weights(tiny_flags: list[str], tmp_path: Path) -> None:
    """Autocast's bf16 with a frozen layer, of which no casts are kept, that would be whole."""
    ended = launch(2, tmp_path / "log", ranks.steps_in_half, [*tiny_flags, *as_text(EXACT)], tmp_path, 6)
    found = ended.result()
    for whole, sharded in zip(found["Ranks"], found["Shards"], strict=True):
        torch.testing.assert_close(sharded, whole, rtol=1e-4, atol=1e-4)
    assert found["Ranks casts"] > 0 and found["Shards casts"] == 0


# --------------------------------------------------------------------------------------------------------- the share


def test_each_rank_holds_its_share(tiny_flags: list[str], tmp_path: Path) -> None:
    """Of weights, gradients and states of the backbones, between steps; all of the weights for an evaluation alone."""
    size = 3
    flags = [*tiny_flags, "--routine", "joint", "--batch_size", "9", "--fsdp"]
    ended = launch(size, tmp_path / "log", ranks.held, flags, tmp_path / "run", 4)
    found = [ended.result(rank) for rank in range(size)]
    for own in found:
        assert own["gathered"] == own["all"] and own["sharded"] > 0
        assert set(own["between"]) == {own["sharded"]}
        for name in ("weights", "gradients", "exp_avg", "exp_inf", "loaded"):
            assert own[name] < 1.2 * own["all"] / size, (name, own)
    assert sum(own["exp_avg"] for own in found) >= found[0]["all"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_are_those_of_torchs_shards(count: int, size: int) -> None:
    from torch.distributed.tensor import Shard

    whole = torch.randn(count, 2)
    wanted, _ = Shard(0)._split_tensor(whole, size, with_padding=False)
    for rank in range(size):
        assert torch.equal(Shards(rank, size, rank, 1).rows(whole), wanted[rank])


# ------------------------------------------------------------------------------------------------------------- files


def test_a_checkpoint_is_that_of_one_process(tiny_flags: list[str], tmp_path: Path) -> None:
    """It loads without torchrun and predicts what the ranks have, of which one had fewer batches, or none."""
    flags = [*tiny_flags, "--epochs", "2", "--eval_every", "2", "--arch", "r4", "--lora_mode", "attn"]
    counts = (11, 1)
    ended = launch(2, tmp_path / "log", ranks.fit_and_predict, [*flags, "--fsdp"], tmp_path / "run", counts)
    found = [ended.result(rank) for rank in range(2)]
    model, _, _ = load_model(tmp_path / "run" / "best.pt")
    trainer = ranks.make_trainer(ONE, flags, tmp_path / "alone")
    for task, data in trainer.dev_data.items():
        alone = predict(model, data, torch.device("cpu"), 5)
        for own, count in product(found, counts):
            np.testing.assert_allclose(own[f"{task} {count}"].numpy(), alone[:count], rtol=1e-5, atol=1e-5)


def one_epoch_back(run: Path, copy: Path) -> Path:
    """A copy of a run's folder as it was before the last epoch."""
    shutil.copytree(run, copy)
    (copy / "resume-previous.pt").replace(copy / "resume.pt")
    return copy


def test_runs_are_repeated_and_go_on_to_the_same_bits(tiny_flags: list[str], tmp_path: Path) -> None:
    """With dropout and adapters; metrics, weights and the files of the best ones."""
    flags = [*tiny_flags, "--lora_mode", "attn", "--dora", "--fsdp"]
    ended = launch(2, tmp_path / "log", ranks.fit_twice, flags, tmp_path)
    assert ended.codes == [0, 0], ended.text()
    again = one_epoch_back(tmp_path / "a", tmp_path / "again")
    assert load(again / "resume.pt")["epoch"] == 1
    ended = launch(2, tmp_path / "log-again", ranks.fit, flags, again, "--resume")
    found = ended.result()
    assert ended.result(1) == {}  # what files hold is in the memory of one
    whole = load(tmp_path / "a.pt")["weights"]
    for other in (load(tmp_path / "b.pt")["weights"], found):
        assert list(other) == list(whole) and all(torch.equal(own, other[name]) for name, own in whole.items())
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("a", "b", "again")]
    assert lines[0] == lines[1] == lines[2] and len(lines[0].splitlines()) == 2
    best = [load(tmp_path / name / "best.pt")["weights"] for name in "ab"]
    assert all(torch.equal(own, best[1][name]) for name, own in best[0].items())


def test_runs_go_on_with_other_ranks_with_and_without_fsdp(tiny_flags: list[str], tmp_path: Path) -> None:
    """A run that unfreezes part by part, from two ranks to one and to three, and back: all end as one process does.

    Frozen layers get no gradient, thawed ones do, and BatchNorm is refreshed by passes of all ranks.
    """
    flags = [*tiny_flags, *as_text([*EXACT, *UNFREEZING])]
    whole = ranks.fit_in_double(flags, tmp_path / "whole")
    ended = launch(2, tmp_path / "log", ranks.fit_in_double, [*flags, "--fsdp"], tmp_path / "two")
    found = {"two": ended.result()}
    assert "the top 1 layer train" in ended.text("out")
    found["one"] = ranks.fit_in_double(flags, one_epoch_back(tmp_path / "two", tmp_path / "one"), "--resume")
    for name, size, source in (("three", 3, "two"), ("back", 2, "whole")):
        run = one_epoch_back(tmp_path / source, tmp_path / name)
        found[name] = launch(
            size, tmp_path / f"log-{name}", ranks.fit_in_double, [*flags, "--fsdp"], run, "--resume"
        ).result()
    for name, weights in found.items():
        assert list(weights) == list(whole)
        for key, own in whole.items():
            torch.testing.assert_close(weights[key], own, rtol=0.0, atol=1e-6, msg=f"{name}: {key}")


def test_weights_that_do_not_fit_are_refused(tiny_flags: list[str], tmp_path: Path) -> None:
    """Before any of them travels."""
    model = ranks.make_trainer(ONE, tiny_flags, tmp_path / "run").model
    name, *others = weights = model.state_dict()
    with pytest.raises(UserError, match=f"^resume.pt: the weights do not fit .* missing {name}$"):
        Shards(0, 2, 0, 1).load(model, {other: weights[other] for other in others}, Path("resume.pt"), set())


def test_the_script_with_fsdp(tiny_flags: list[str], small_data: Path, tmp_path: Path) -> None:
    """Training, evaluation of the best checkpoint and predictions: rank 0 writes all files, and alone prints."""
    flags = [*small_run(tiny_flags, tmp_path / "run"), "--lora_mode", "attn-only", "--fsdp"]
    ended = launch(2, tmp_path / "log", ranks.script, *flags)
    assert ended.codes == [0, 0], ended.text()
    assert (tmp_path / "log" / "1.out").read_text() == (tmp_path / "log" / "1.err").read_text() == ""
    check_files(tmp_path / "run", ended.text("out"), small_data)


# ------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--average", "ema"], "--average ema"),
        (["--routine", "joint", "--pcgrad"], "--pcgrad"),
        (["--sts_bregman", "1"], "--sts_bregman"),
        (["--use_gpu", "--amp", "--cuda_graphs"], "--cuda_graphs"),
        (["--cache_frozen"], "--cache_frozen"),
        (["--evaluate", "best.pt"], "--evaluate"),
    ],
)
def test_what_does_not_go_with_it_is_refused(monkeypatch: pytest.MonkeyPatch, words: list[str], flag: str) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    parse(["--fsdp"], TASKS, "test", "Test.")
    with pytest.raises(UserError, match=f"{flag} .*drop"):
        parse(["--fsdp", *words], TASKS, "test", "Test.")


def test_one_process_has_nothing_to_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="--fsdp .*torchrun"):
        parse(["--fsdp"], TASKS, "test", "Test.")


def test_scaled_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = SimpleNamespace(train=SimpleNamespace(cuda_graphs=False), run=SimpleNamespace(fsdp=True))
    check_device(config, Device(torch.device("cpu"), torch.bfloat16))
    with pytest.raises(UserError, match="--fsdp: .*--amp"):
        check_device(config, Device(torch.device("cpu"), torch.float16, scaled=True))
