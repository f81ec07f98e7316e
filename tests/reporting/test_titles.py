"""Titles and command lines of configurations."""

import pytest
from helpers import ROOT, configure

from cli.commands import command_of, config_of, flags_of, shared_command
from config import Config
from reporting.titles import settings, titles_of

RECIPES = [path for folder in ("r?", "small") for path in sorted((ROOT / "recipes").glob(f"{folder}/*.args"))]
BASE = "--train_sst --train_sts --lr 1e-4 --fine_tune_mode full-model --amp"
SMART = "--sst_smart 1e-2 --sts_smart 1e-2"


def titles(*flags: str) -> list[str]:
    """Return the titles of configurations with these flags."""
    return titles_of([configure(*f"{BASE} {words}".split()) for words in flags])


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--routine joint",), ["full-model + AMP"]),  # there is nothing to distinguish it from
        (("--batch_size 8", "--batch_size 9", "--lora_mode attn --lora_rank 2"),
         ["full-model + AMP, batch_size 8", "full-model + AMP, batch_size 9", "LoRA attn r2 + AMP"]),
        (("--routine sequential", "--routine annealed", "--routine annealed --pal pal", "--routine joint --pcgrad",
          f"--routine annealed {SMART} --smart_epsilon 1e-2 --smart_sigma 1e-2",
          "--routine annealed --pair_encoding cross"),
         ["sequential", "annealed", "annealed, pal", "joint, pcgrad", "annealed, smart 0.01", "annealed, cross"]),
        ((SMART, f"{SMART} --smart_epsilon 1e-3"), ["smart_epsilon 1e-05", "smart_epsilon 0.001"]),
        (("", "--sst_smart 1e-2", SMART), ["smart 0.0", "sst_smart 0.01", "smart 0.01"]),
        (("", "--sst_smart 1 --sts_smart 2"), ["smart 0.0", "sst_smart 1.0, sts_smart 2.0"]),
        (("", "--clf linear", "--no_head_batchnorm"), ["conv", "clf linear", "no head_batchnorm"]),
        (("--lr_schedule linear", "--lr_schedule cosine"), ["lr_schedule linear", "lr_schedule cosine"]),
        (("--pair_features abs,mul", "--pair_features abs"), ["pair_features abs,mul", "pair_features abs"]),
        (("--routine joint", "--routine joint --optimizers one"), ["no optimizers", "optimizers one"]),
        (("", "--train_para"), ["no train_para", "train_para"]),
        (("", "--head_width 8"), ["no head_width", "head_width 8"]),
        (("--arch duality --clf mlp", "--clf mlp", "--arch v1"), ["duality, mlp", "mlp", "v1"]),
        (("--sst_embedding_loss simcse", "--sts_embedding_loss simcse"),
         ["sst_embedding_loss simcse", "sts_embedding_loss simcse"]),
    ],
)  # fmt: skip
def test_titles_name_what_distinguishes_a_configuration(flags: tuple[str, ...], wanted: list[str]) -> None:
    assert titles(*flags) == wanted


def test_titles_of_all_recipes_are_distinct() -> None:
    different = {tuple(settings(config, ("seed",)).items()): config for config in map(recipe_config, RECIPES)}
    found = titles_of(list(different.values()))
    assert len(found) > 30 and len(set(found)) == len(found) and all(found)


def recipe_config(path: object) -> Config:
    return configure(f"@{path}")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_command_of_a_configuration_gives_it_back(recipe: object) -> None:
    wanted = recipe_config(recipe)
    found = config_of(command_of(wanted))
    assert flags_of(found) == flags_of(wanted) and list(found.tasks) == list(wanted.tasks)


def test_a_command_is_read_in_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")  # which --cache_frozen itself refuses
    assert config_of("python multitask_classifier.py --train_sst --cache_frozen").tasks.keys() == {"sst"}


def test_shared_flags_are_those_of_all_commands() -> None:
    commands = ["python x.py --a 1 --b 'c d' --e", "python x.py --e --a 1 --b c", "python x.py --a 1 --f --e"]
    assert shared_command(commands) == "python x.py --a 1 --e"
    assert shared_command(commands[:1]) == commands[0] and shared_command([]) == ""
