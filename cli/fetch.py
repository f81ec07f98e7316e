"""Fetch the course's files: what datasets.py does as a script."""

from collections.abc import Sequence
from pathlib import Path

from cli.parser import OneLineParser
from utils.packages import refuse_missing


def main(argv: Sequence[str]) -> None:
    """Fetch the course's files into the folder --out."""
    parser = OneLineParser(prog="datasets.py", description="Fetch the course's files of 2024 and verify them.")
    parser.add_argument("--out", default="data", metavar="DIR", help="folder to put them in (default: %(default)s)")
    out = Path(parser.parse_args(argv).out)
    refuse_missing("tqdm")
    from utils.download import COURSE_URL, fetch

    fetch(out, COURSE_URL)
