"""Grids and ranges: which trials they make, what these are called, and what is refused."""

import re

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from studies.trials import Trial, plan_grid, plan_search
from utils.errors import UserError


def trials(*grids: str, base: str = "") -> list[Trial]:
    return list(plan_grid([grid.split() for grid in grids], base.split()).trials.values())


def test_switches_are_given_and_taken_back() -> None:
    off, on = trials("dora=0,1", base="--dora --lora_mode=attn")
    assert off.config is not None and not off.config.lora.dora
    assert on.config is not None and on.config.lora.dora


def test_a_trial_that_the_processes_of_the_sweep_rule_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    off, on = trials("cache_frozen=0,1")
    assert off.refusal == "" and "drop it or torchrun" in on.refusal and on.config is None


def test_lists_within_a_grid_are_written_with_spaces() -> None:
    two, one = plan_grid([["lora_targets=query value,key"]], ["--lora_mode=attn"]).trials.values()
    assert two.config is not None and two.config.lora.lora_targets == ("query", "value")
    assert one.config is not None and one.config.lora.lora_targets == ("key",)
    assert two.name.startswith("lora_targets=query-value-") and len({two.name, one.name}) == 2


def test_names_are_short_and_unique_and_know_no_order() -> None:
    deep = "/".join(["folder"] * 40)
    plan = plan_grid([[f"pretrained={deep}/a,{deep}/b,a/b,a b", "lr=1e-4"]], [])
    assert len(plan.trials) == 4 and all(re.fullmatch(r"[\w.,=+-]{1,100}", name) for name in plan.trials)
    assert [trial.name for trial in trials("lr=1 seed=2", "seed=2 lr=1")] == ["lr=1,seed=2"]


def test_the_same_run_twice_is_refused_and_the_same_trial_twice_is_one() -> None:
    found = trials("lr=0.001,1e-3 lora_rank=1", "lora_rank=1 lr=0.001", "lr=0.001")
    same = "is the same run as lora_rank=1,lr=0.001"
    assert [(trial.name, trial.refusal) for trial in found] == [
        ("lora_rank=1,lr=0.001", ""),
        ("lora_rank=1,lr=1e-3", same),
        ("lr=0.001", same),
    ]


def test_ranges_are_numbers_or_words() -> None:
    plan = plan_search(3, ["lr=1e-5..3e-3:log", "lora_rank=1..64:log", "warmup=0..0.5", "optim=AdamW,Adamax"], [])
    assert list(plan.trials) == ["search-001", "search-002", "search-003"]
    assert plan.ranges == {
        "lr": FloatDistribution(1e-5, 3e-3, log=True),
        "lora_rank": IntDistribution(1, 64, log=True),
        "warmup": FloatDistribution(0, 0.5),
        "optim": CategoricalDistribution(("AdamW", "Adamax")),
    }
    trial = plan.trial("search-002", {"lr": 1e-5, "lora_rank": 1, "warmup": 0.25, "optim": "AdamW"})
    assert trial.command == "python multitask_classifier.py --lr=1e-05 --lora_rank=1 --warmup=0.25 --optim=AdamW"
    assert trial.refusal.startswith("--warmup requires --lr_schedule linear")


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("lr=3e-3..1e-5", "--range lr=3e-3..1e-5: .* write it as lr=1e-5..3e-3"),
        ("lr=0..1:log", "--range lr=0..1:log: .* write it as lr=1e-5..3e-3"),
        ("lora_rang=1..2", "--range lora_rang=1: .* has no flag --lora_rang"),
        ("lr=", "--range lr=: has no values"),
    ],
)
def test_a_range_that_is_none_is_refused(word: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        plan_search(2, [word], [])


@pytest.mark.parametrize("word", ["lr=1..inf", "lr=1..2:exp", "lora_rank=0..3", "lora_rank=1.0..4", "optim=Addam"])
def test_a_range_beyond_what_its_flag_takes_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan_search(2, [word], [])
    assert f"argument --{word.partition('=')[0]}: " in capsys.readouterr().err


def test_a_search_needs_a_dev_score() -> None:
    with pytest.raises(UserError, match="--search compares dev scores, which --mlm does not compute"):
        plan_search(2, ["lr=1e-5..1e-3"], ["--mlm"])
