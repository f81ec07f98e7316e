"""The recipes of R1 to R4: their values are the reports', and all of them run."""

from pathlib import Path

import pytest
from test_config import ROOT, configure

import multitask_classifier
from config import Config

RECIPES = ROOT / "recipes"
REPORTS = ("r1", "r2", "r3", "r4")
FILES = [path for report in REPORTS for path in (RECIPES / report).iterdir()]
NAMES = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in FILES)
STAGES = {name: f"{name}-stage" for name in NAMES if f"{name}-stage" in NAMES}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name one another from the repository's root."""
    monkeypatch.chdir(ROOT)


def recipe(name: str) -> Config:
    return configure(f"@recipes/{name}.args")


@pytest.mark.parametrize("name", NAMES)
def test_the_reports_defaults(name: str) -> None:
    """Batch, rate and epochs of each report's runs, where the recipe's own row does not say otherwise."""
    own = recipe(name)
    text = (RECIPES / f"{name}.args").read_text(encoding="utf-8")
    assert text.startswith(f"# R{name[1]}, ") or text.startswith("# What R")
    report = name.split("/")[0]
    batch, epochs = {"r1": (16, 100), "r2": (16, 10), "r3": (16, 10), "r4": (8, 10)}[report]
    changed = "" if name.endswith("base") else text
    assert "--batch_size" in changed or own.train.batch_size == batch
    assert "--lr " in changed or own.train.lr == 1e-5
    assert "--epochs" in changed or own.train.epochs == epochs
    assert own.train.optim == "AdamW" and all(task.lr_multiplier == 1 for task in own.tasks.values())
    assert all(task.weight_decay == 0 for task in own.tasks.values())


def test_what_single_rows_ask_for() -> None:
    """Of every kind of row one, by hand."""
    lora = recipe("r1/lora-r4-alpha8")
    assert (lora.lora.lora_rank, lora.lora.lora_alpha, lora.train.fine_tune_mode) == (4, 32, "last-layer")
    assert (lora.train.routine, lora.train.steps_per_epoch, lora.model.pair_encoding) == ("annealed", 300, "cross")
    pal = recipe("r1/shared-v-sst").pal
    assert (pal.pal, pal.pal_tasks, pal.pal_residual) == ("shared-v", ("sst",), "feed-forward")
    assert recipe("r1/mixed-aa").pal.pal_residual == "attention"
    smart = recipe("r1/smart-alpha1e-2-lambda1e-3")
    assert (smart.train.smart_epsilon, smart.train.smart_sigma, smart.train.eval_every) == (1e-2, 1e-2, 4)
    assert [task.smart for task in smart.tasks.values()] == [1e-3] * 3
    assert list(recipe("r1/finetune-para").tasks) == ["para"] and recipe("r1/multitask").train.routine == "random-epoch"
    assert recipe("r2/v1").model.sts_head == "cosine" and recipe("r2/smart-sts-k250").train.smart_steps == 250
    dora = recipe("r2/dora-r2-rslora").lora
    assert (dora.dora, dora.rslora, dora.lora_targets, dora.lora_alpha) == (True, True, ("query", "value"), 8)
    assert recipe("r2/dora-r8-rslora-amp").compute.amp
    assert recipe("r3/r8").train.pcgrad and recipe("r3/r6").tasks["sts"].smart == 5
    assert recipe("r3/r1").model.sts_head == "regression"
    assert recipe("r3/base").model.sts_head == "cosine" and recipe("r3/base").train.routine == "joint"
    assert recipe("r4/ensembled").model.backbones == "per-task" and recipe("r4/pearson").tasks["sts"].loss == "pearson"
    stage = recipe("r4/ranking-stage").tasks["sts"]
    assert (stage.weight, stage.embedding_loss) == (0, "ranking")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("-stage")])
def test_every_recipe_trains(name: str, tiny_flags: list[str], tmp_path: Path) -> None:
    """A few steps on a tiny model, after its stage where it has one."""
    few = [*tiny_flags, "--epochs", "1", "--batch_size", "8", "--max_train_examples", "8", "--no_tensorboard"]
    own = recipe(name)
    few += ["--steps_per_epoch", "3"] if own.train.steps_per_epoch else []
    few += ["--smart_steps", "2"] if own.train.smart_steps > 1 else []
    if name in STAGES:
        stage = tmp_path / "stage"
        multitask_classifier.main([f"@recipes/{STAGES[name]}.args", *few, "--run_dir", str(stage)])
        few += ["--init_from", str(stage / "best.pt")]
    multitask_classifier.main([f"@recipes/{name}.args", *few, "--run_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "scores.json").is_file()
