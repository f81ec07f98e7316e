"""What every test file shares: the import path, one thread, and oracles that do not mistake our datasets.py."""

import sys
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the all-MiniLM-L6-v2 files; fetched once into the cache folder of this user."""
    from base_bert import resolve_pretrained

    return resolve_pretrained("all-MiniLM-L6-v2")
