"""Refuse to go on without the packages that a script needs, and say how to install them."""

import re
from importlib.util import find_spec

from utils.errors import UserError

PACKAGES = ("torch", "numpy", "scipy", "sklearn", "tokenizers", "safetensors", "huggingface_hub", "tqdm")
OLDEST_TORCH = (2, 11)


def refuse_missing(*names: str) -> None:
    """Raise UserError that lists those of the packages that are not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        file = "requirements.txt" if "torch" in missing else "requirements-ranges.txt"  # which leaves torch as it is
        raise UserError(f"not installed: {', '.join(missing)}; python -m pip install -r {file}")


def check_packages(*more: str) -> None:
    """Raise UserError if a package is missing that all scripts need, or one of `more`, or if torch is too old.

    Call this after the command line is parsed, because torch takes seconds to import.
    """
    refuse_missing(*PACKAGES, *more)
    import torch

    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
        raise UserError(
            f"torch {torch.__version__} is too old; python -m pip install --upgrade 'torch>=2.11', or start in an "
            "environment of its own"
        )
