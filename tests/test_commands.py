"""Every training command that R0 prints runs as printed, and its plan has the values that were asked for."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import make_bert
from test_config import DUALITY, DUALITY_VALUES, YIN_YANG, YIN_YANG_VALUES, unwrapped

import multitask_classifier

TITLES = ("SST sentiment", "Quora paraphrase", "STS similarity")
STEPS = 10  # 600 examples in batches of 64


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny start weights with as many positions as BERT has, since the commands leave --max_length as it is."""
    return make_bert(tmp_path_factory.mktemp("bert"), max_position_embeddings=512)


@pytest.fixture
def plan(
    bert: Path, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """What --dry_run prints for a command's words; nothing is written."""
    monkeypatch.chdir(tmp_path)

    def run(words: list[str]) -> str:
        multitask_classifier.main([*words, "--dry_run", "--data_dir", str(sample), "--pretrained", str(bert)])
        assert list(tmp_path.iterdir()) == []
        return capsys.readouterr().out

    return run


def task_rows(text: str) -> list[list[str]]:
    """The plan's rounds, steps, learning rate, weight decay and loss of SST, Quora and STS."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line[0] in TITLES and len(line) == 8}
    assert list(rows) == list(TITLES)
    assert all(row[0] == "600" for row in rows.values())
    return [[row[1], row[2], *row[4:]] for row in rows.values()]


def wanted_rows(rates: list[float], decays: list[float], rounds: tuple[int, ...] = (1, 1, 1)) -> list[list[str]]:
    losses = ("ce", "bce", "pearson")
    return [
        [str(count), str(count * STEPS), f"{rate:.2e}", f"{decay:g}", loss]
        for rate, decay, count, loss in zip(rates, decays, rounds, losses, strict=True)
    ]


@pytest.mark.parametrize("name", DUALITY)
def test_duality_commands_run(plan: Any, name: str) -> None:
    mode, optimizer, lr, head, epochs = DUALITY_VALUES[name]
    text = plan(unwrapped(DUALITY[name]))
    # Quora's multiplier, and what is given for none of these commands, are the later appendices' values
    assert task_rows(text) == wanted_rows([5 * lr, 5 * lr, 3 * lr], [9e-3, 1e-4, 1e-2])
    assert (
        f"{epochs} epochs of {3 * STEPS} steps, routine sequential, batch size 64, {optimizer}, schedule lambda" in text
    )
    assert f"{head} heads" in text and f"\n{mode}: from epoch 1 " in text


@pytest.mark.parametrize("name", YIN_YANG)
def test_yin_yang_and_interleaver_commands_run(plan: Any, name: str) -> None:
    lr, sst_decay, sts_decay, _, multipliers, rounds = YIN_YANG_VALUES[name]
    text = plan(unwrapped(YIN_YANG[name]))
    rates = [lr * multiplier for multiplier in multipliers]
    assert task_rows(text) == wanted_rows(rates, [sst_decay, 1e-5, sts_decay], rounds)
    steps = sum(rounds) * STEPS
    assert f"7 epochs of {steps} steps, routine sequential, batch size 64, Adamax, schedule lambda" in text
    assert "conv heads" in text and "\niterative: from epoch 1 " in text


def test_the_dictionary_of_adapters_runs(plan: Any) -> None:
    text = plan(["--train_sst", "--lora_dict", '{"mode": "attn-only", "r": 1, "dora": 1}'])
    # A, B of rank 1 and the magnitudes: three vectors for each of query, key and value in two layers, 32 wide
    count = 2 * 3 * 3 * 32
    assert re.search(rf"^adapters sentiment +{count} +{count} +100\.0%$", text, re.MULTILINE)
    assert re.search(r"^backbone sentiment +[\d,]+ +0 +0\.0%$", text, re.MULTILINE)
