"""What every test file shares: the import path, one thread, and oracles that do not mistake our datasets.py."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent


def _hide_our_datasets() -> None:
    """Let transformers settle, once, that the package named datasets is absent: our datasets.py has its name.

    transformers asks importlib for the package and remembers the answer; a None in sys.modules means "not there".
    """
    missing = object()
    before = sys.modules.get("datasets", missing)
    sys.modules["datasets"] = None  # type: ignore[assignment]
    try:
        from transformers.utils.import_utils import is_datasets_available

        assert not is_datasets_available()
    finally:
        del sys.modules["datasets"]
        if before is not missing:
            sys.modules["datasets"] = before  # type: ignore[assignment]


torch.set_num_threads(1)
_hide_our_datasets()
sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != str(ROOT))]

from helpers import SAMPLE, cut, make_bert, output  # noqa: E402  (they import our datasets.py)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the all-MiniLM-L6-v2 files; fetched once into the cache folder of this user."""
    from base_bert import resolve_pretrained

    return resolve_pretrained("all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def sample() -> Path:
    """Folder of the sample data: 600, 150 and 150 rows of each task."""
    return SAMPLE


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 20, 12 and 6 rows of the sample data; tests must not write here."""
    return cut(tmp_path_factory.mktemp("small-data"), 20)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of start weights for --pretrained; tests must not write here."""
    return make_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def tiny_flags(tiny_bert: Path, small_data: Path) -> list[str]:
    """Flags of a training run of a second: tiny model, small data, two epochs of three steps a task."""
    flags = ["--pretrained", tiny_bert, "--data_dir", small_data, "--max_length", 64, "--threads", 1]
    return [str(flag) for flag in [*flags, "--epochs", 2, "--batch_size", 8, "--lr", 1e-3]]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> "Trainer":
    """A finished run of one epoch; tests must not change it."""
    from helpers import make_trainer

    trainer = make_trainer(tiny_flags, tmp_path_factory.mktemp("trained") / "run", "--epochs", 1)
    trainer.fit()
    return trainer


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """A folder with the runs `yin` (all tasks), `cross` (another arch) and `sst` (one task, one epoch)."""
    import multitask_classifier

    folder = tmp_path_factory.mktemp("runs")
    flags = [*tiny_flags, "--no_tensorboard", "--no_test_predictions"]
    kinds = {"yin": [], "cross": ["--arch", "v2", "--seed", "5"], "sst": ["--train_sst", "--epochs", "1"]}
    for name, more in kinds.items():
        multitask_classifier.main([*flags, *more, "--run_dir", str(folder / name)])
    return folder


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run multitask_classifier.py with the given flags in `tmp_path`, and return what it prints."""
    import multitask_classifier

    monkeypatch.chdir(tmp_path)
    return lambda *words: output(capsys, multitask_classifier.main, *words)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Let products of fp32 be rounded to TF32, as --tf32 does on a GPU, until the end of the test."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
