"""recipes/studies: the trials of each study, and that R0's are those of its tables."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from helpers import ROOT

import sweep
from cli.parser import expand_arguments, parse
from studies.trials import Trial, plan_grid
from tasks import TASKS

STUDIES = ROOT / "recipes" / "studies"


def read_study(name: str) -> list[Trial]:
    """The trials of a file of recipes/studies, as sweep.main makes them."""
    return list(sweep.read_command([f"@recipes/studies/{name}.args"])[1].trials.values())


def configurations(trials: Iterable[Trial]) -> set[str]:
    return {json.dumps(trial.config.to_dict()) for trial in trials if trial.config is not None}


@pytest.mark.parametrize(
    ("name", "count"),
    [("lora-ranks", 26), ("r0-grid", 416), ("r0-ranks", 64), ("r0-ablation", 12), ("r0-final", 9), ("methods", 12)],
)
def test_studies_have_their_trials_and_say_how_to_run_and_draw_them(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(ROOT)
    sweep.main([f"@recipes/studies/{name}.args", "--dry_run"])
    *listed, last = capsys.readouterr().out.splitlines()
    assert last == f"{count} trials, 0 refused" and len(set(listed)) == count
    head = (STUDIES / f"{name}.args").read_text(encoding="utf-8").splitlines()[:3]
    assert f"{count} trials" in head[0]
    assert f"python sweep.py @recipes/studies/{name}.args --data_dir data" in head[1]
    if name != "methods":
        assert f"python report.py runs/{name}/results.csv --out runs/{name}/report" in head[2]


def test_r0s_grid_has_960_combinations_of_which_416_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """R0 M.1: the checks refuse 160; R0 also leaves out adapters beside --fine_tune_mode last-layer, 384."""
    monkeypatch.chdir(ROOT)
    grid = [
        "lr=1e-4,5e-5,1e-5,5e-6", "batch_size=64,128,256,384", "lora_rank=1,5,10", "dora=0,1",
        "lora_mode=none,all-lin,attn,all-lin-only,attn-only", "fine_tune_mode=full-model,last-layer",
    ]  # fmt: skip
    base = expand_arguments(["@recipes/r0/efficiency-grid.args"])
    trials = list(plan_grid([grid], base).trials.values())
    refused = [trial for trial in trials if trial.config is None]
    assert len(trials) == 960 and len(refused) == 160 and all("needs adapters" in trial.refusal for trial in refused)
    first = [trial for trial in trials if trial.flags["fine_tune_mode"] == "full-model" and trial.config is not None]
    rest = [trial for trial in trials if trial.flags["lora_mode"] == "none" and trial.config is not None]
    left = {trial.name: trial for trial in first + rest}.values()
    assert len(left) == 416 and configurations(read_study("r0-grid")) == configurations(left)


def test_r0s_final_study_is_steady_hand_with_and_without_its_efficiency_methods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Table 7; its baseline with AMP is the recipe of I.4 with another seed."""
    monkeypatch.chdir(ROOT)
    steady = expand_arguments(["@recipes/r0/g6-yin-yang-steady-hand.args"])
    kinds: dict[tuple[str, bool, bool], set[int]] = {}
    for trial in read_study("r0-final"):
        assert trial.config is not None
        lora, compute, seed = trial.config.lora, trial.config.compute, trial.config.train.seed
        kinds.setdefault((lora.lora_mode, lora.dora, compute.amp), set()).add(seed)
        if lora.lora_mode == "none":
            words = [*steady, "--no_amp", f"--seed={seed}", "--no_tensorboard"]
            same = parse(words, TASKS, "multitask_classifier.py", "").to_dict()
            assert {**trial.config.to_dict(), "run": 0} == {**same, "run": 0}
    seeds = {11711, 11712, 11713}
    assert kinds == dict.fromkeys([("none", False, False), ("all-lin", False, True), ("all-lin", True, True)], seeds)
