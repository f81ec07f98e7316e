"""The recipes of R1 to R4 and of R0's early experiments: their values are the reports', and all of them run."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, configure

import multitask_classifier
from config import Config

RECIPES = ROOT / "recipes"
REPORTS = ("r1", "r2", "r3", "r4")
FILES = [path for report in REPORTS for path in (RECIPES / report).glob("*.args") if not path.is_symlink()]
NAMES = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in FILES)
EARLY = sorted(f"r0/{path.stem}" for path in (RECIPES / "r0").glob("e*.args"))  # and those of R0's efficiency


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name one another from the repository's root."""
    monkeypatch.chdir(ROOT)


def recipe(name: str) -> Config:
    return configure(f"@recipes/{name}.args")


def changes(name: str) -> str:
    """Return the text of a recipe and of those that it includes, without what all runs of its report share."""
    if name.endswith(("/base", "/common")):
        return ""
    text = (RECIPES / f"{name}.args").read_text(encoding="utf-8")
    return text + "".join(map(changes, re.findall(r"^@recipes/(\S+)\.args$", text, re.MULTILINE)))


@pytest.mark.parametrize("name", NAMES)
def test_the_reports_defaults(name: str) -> None:
    """Batch, rate and epochs of each report's runs, where the recipe's own row does not say otherwise."""
    config = recipe(name)
    text = (RECIPES / f"{name}.args").read_text(encoding="utf-8")
    assert text.startswith(f"# R{name[1]}, ") or text.startswith("# What R")
    report = name.split("/")[0]
    batch, epochs = {"r1": (16, 100), "r2": (16, 10), "r3": (16, 10), "r4": (8, 10)}[report]
    changed = changes(name)
    assert "--batch_size" in changed or config.train.batch_size == batch
    assert "--lr " in changed or config.train.lr == 1e-5
    assert "--epochs" in changed or config.train.epochs == epochs
    assert config.train.optim == "AdamW" and all(task.lr_multiplier == 1 for task in config.tasks.values())
    assert all(task.weight_decay == 0 for task in config.tasks.values())


def test_what_single_rows_ask_for() -> None:
    """Of every kind of row one, by hand."""
    lora = recipe("r1/lora-r4-alpha8")
    assert (lora.lora.lora_rank, lora.lora.lora_alpha, lora.train.fine_tune_mode) == (4, 32, "last-layer")
    assert (lora.train.routine, lora.train.steps_per_epoch, lora.model.pair_encoding) == ("annealed", 300, "cross")
    pal = recipe("r1/shared-v-sst").pal
    assert (pal.pal, pal.pal_tasks, pal.pal_residual) == ("shared-v", ("sst",), "feed-forward")
    assert recipe("r1/mixed-aa").pal.pal_residual == "attention"
    smart = recipe("r1/smart-alpha1e-2-lambda1e-3")
    assert (smart.train.smart_steps, smart.train.smart_sigma, smart.train.eval_every) == (0, 1e-2, 4)
    assert [task.smart for task in smart.tasks.values()] == [1e-3] * 3
    assert recipe("r1/multitask").train.routine == "random-epoch"
    assert all(recipe(name).tasks["sst"].extra == ("ids-cfimdb-train.csv",) for name in NAMES if name.startswith("r1/"))
    assert recipe("r2/v1").model.sts_head == "cosine" and recipe("r2/smart-sts-k250").train.smart_steps == 250
    values = [recipe(name).train for name in NAMES if name.startswith("r2/") and "smart" in name]
    assert {(train.smart_sigma, train.smart_epsilon, train.smart_eta) for train in values} == {(1e-5, 1e-5, 1e-3)}
    assert recipe("r2/v1-dora").lora == replace(recipe("r2/v1-lora").lora, dora=True)
    dora = recipe("r2/dora-r2-rslora").lora
    assert (dora.dora, dora.rslora, dora.lora_targets, dora.lora_alpha) == (True, True, ("query", "value"), 8)
    assert recipe("r2/dora-r8-rslora-amp").compute.amp
    assert recipe("r3/r8").train.pcgrad and recipe("r3/r6").tasks["sts"].smart == 5
    assert recipe("r3/r1").model.sts_head == "regression"
    assert recipe("r3/base").model.sts_head == "cosine" and recipe("r3/base").train.routine == "joint"
    assert recipe("r4/ensembled").model.backbones == "per-task" and recipe("r4/pearson").tasks["sts"].loss == "pearson"
    layers = recipe("r2/layers-6-dropout")
    assert (layers.model.head_layers, layers.model.hidden_dropout_prob, layers.train.lr) == (2, 0.4, 2e-5)
    assert (layers.train.batch_size, layers.train.epochs) == (32, 20) and layers.tasks["para"].train
    heads = recipe("r2/sampled-heads").train
    assert (heads.fine_tune_mode, heads.epochs, heads.lr) == ("last-layer", 10, 1e-5)
    big = recipe("r4/bigdata")
    assert (big.model.pair_features, big.lora.lora_rank) == (("u", "v", "diff"), 200) and big.tasks["para"].extra
    final = recipe("r4/final")
    assert final.train.pcgrad and final.model == replace(big.model, backbones="shared")
    assert final.model.head_width == 100 and final.tasks["sts"].loss == "pearson" and final.lora == big.lora
    stage = recipe("r4/ranking-stage").tasks["sts"]
    assert (stage.weight, stage.embedding_loss) == (0, "ranking") and recipe(
        "r4/ranking-stage"
    ).train.ranking_scale == 1
    assert recipe("r4/base").train.steps_per_epoch == math.ceil(283_003 / 8)  # all of Quora's pairs
    assert final.train.steps_per_epoch == math.ceil((283_003 + 50_000) / 8)


SEVERAL = ("separate", "duality", "clean", "50", "late", "shallow", "triangular", "cyclic", "ema", "lambda")


@pytest.mark.parametrize("name", NAMES + EARLY)
def test_only_the_later_runs_of_r0_have_an_optimizer_for_each_task(name: str) -> None:
    """Its appendix G introduces them with figure 13; all runs of R1 to R4 have one."""
    several = name.startswith(tuple(f"r0/early-{word}" for word in SEVERAL))
    assert recipe(name).train.has_one_optimizer() != several
    assert recipe("r0/g6-yin-yang").train.optimizers != "one"


def test_heads_and_pooling_of_r3() -> None:
    """Figure 1 and sections 3.4 and A.7."""
    base, before = recipe("r3/base"), recipe("r3/r2")
    assert (base.model.pooling, base.tasks["sts"].pooling, before.tasks["sts"].pooling) == ("cls", "mean", "cls")
    assert [task.head_layers for task in base.tasks.values()] == [0, None, None] and base.model.head_layers == 1
    assert recipe("r3/r10-shallow-para").tasks["para"].head_layers == 0
    assert recipe("r3/r10-deep-sts").tasks["sts"].head_layers == 3


def test_r3_varies_rate_and_dropout_separately() -> None:
    """Its appendix A.6."""
    runs = [recipe(name) for name in NAMES if name.startswith("r3/r9")]
    found = {(config.train.lr, config.model.hidden_dropout_prob) for config in runs}
    assert found == {(1e-4, 0.3), (1e-6, 0.3), (1e-7, 0.3), (1e-5, 0.4), (1e-5, 0.5), (1e-5, 0.6)}
    assert {config.train.epochs for config in runs} == {6}


ALONE = [name for name in NAMES if re.match(r"r1/finetune-|r2/(smart|v1)-s[st][st]", name)]


@pytest.mark.parametrize("name", ALONE)
def test_runs_of_one_task_score_the_others_too(name: str) -> None:
    tasks, trained = recipe(name).tasks, name.split("-")[1]
    assert {task: options.num_trains for task, options in tasks.items()} == {
        task: int(task == trained) for task in ("sst", "para", "sts")
    }


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("r1/lora")])
def test_adapters_of_r1_wrap_no_dense_layer_of_attention(name: str) -> None:
    """Its counts prove it: 55,296 + 92,160 parameters for rank 1, and 2,311 in its wrapped heads (table 1)."""
    assert recipe(name).lora.lora_targets == ("query", "key", "value", "interm_dense", "out_dense")


def stage_before(name: str) -> str | None:
    """The recipe of the run that a recipe starts from."""
    path = recipe(name).train.init_from
    return None if path is None else str(Path(path).parent.relative_to("runs"))


def test_every_stage_has_a_run_after_it() -> None:
    before = {name: stage_before(name) for name in NAMES}
    assert {name for name in NAMES if name.endswith("-stage")} == {name for name in before.values() if name}
    for name in before.values():
        assert name is None or recipe(name).run.run_dir == f"runs/{name}"


def run(name: str, few: list[str], data: Path, folder: Path) -> Path:
    """The folder of a few steps of a recipe on a tiny model, after the stages that it starts from."""
    config, quora = recipe(name), str(data / "quora-train.csv")
    more = ["--steps_per_epoch", "3"] if config.train.steps_per_epoch else []
    more += ["--smart_steps", "2"] if config.train.smart_steps > 1 else []
    if (para := config.tasks.get("para")) is not None:
        more += ["--para_train", quora] if para.train else []
        more += ["--para_extra", quora] if para.extra else []
        more += ["--para_from_epoch", "1"] if para.from_epoch > 1 else []
    if "cfimdb" in config.tasks:
        reviews = folder / "reviews.csv"
        reviews.write_text("id\tsentence\tsentiment\na\ta dull film\t0\nb\ta fine film\t1\n", encoding="utf-8")
        more += ["--cfimdb_train", str(reviews), "--cfimdb_dev", str(reviews)]
    if (before := stage_before(name)) is not None:
        more += ["--init_from", str(run(before, few, data, folder) / "best.pt")]
    out = folder / name
    multitask_classifier.main([f"@recipes/{name}.args", *few, *more, "--run_dir", str(out)])
    return out


@pytest.fixture
def few(tiny_flags: list[str]) -> list[str]:
    return [*tiny_flags, "--epochs", "1", "--batch_size", "8", "--max_train_examples", "8", "--no_tensorboard"]


@pytest.mark.parametrize("name", [name for name in NAMES + EARLY if not name.endswith("-stage")])
def test_every_recipe_trains(name: str, few: list[str], small_data: Path, tmp_path: Path) -> None:
    elsewhere = ["--amp_dtype", "auto", "--no_extra_clean"]  # without a GPU and the data of nltk
    folder = run(name, [*few, *elsewhere], small_data, tmp_path)
    dev = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["dev"]
    assert dev.keys() == {*recipe(name).tasks, "score", "score_raw_r"} and 0 <= dev["score"] <= 1
