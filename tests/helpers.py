"""What several test modules use."""

import base64
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.options import BenchmarkOptions
from cli.parser import parse
from config import Config
from reporting.page import ReportItem
from tasks import TASKS
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def configure(*words: object) -> Config:
    """Return the configuration of these flags."""
    return parse([str(word) for word in words], TASKS, "multitask_classifier.py", "Test.")


def refusal(run: Callable[..., object], *words: object) -> str:
    """Return the message of the UserError that a call raises. It must be one line."""
    with pytest.raises(UserError) as error:
        run(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def shell(script: str, *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, without network."""
    command = [sys.executable, ROOT / script, *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=cwd)


def benchmark_options(pretrained: Path, data_dir: Path | str, **others: Any) -> BenchmarkOptions:
    """Return the options of a small benchmark."""
    small: dict[str, Any] = {"batch_size": 8, "steps": 2, "warmup": 1, "threads": 1}
    return BenchmarkOptions(**{**small, "pretrained": str(pretrained), "data_dir": str(data_dir), **others})


# ----------------------------------------------------------------------------------------------------------------------
# Reports


def figure_of(item: ReportItem | str) -> Any:
    """Return an item's figure."""
    assert isinstance(item, ReportItem) and item.figure is not None, item
    return item.figure


def cells_of(item: ReportItem | str) -> list[list[str]]:
    """Return an item's table as text."""
    assert isinstance(item, ReportItem) and item.table is not None, item
    return item.table.cells()


def check_layout(figure: Any) -> None:
    """Check that everything is inside the figure, and that legend, panels and footnote are below one another."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns if a layout collapses
        figure.draw_without_rendering()
    (footnote,) = figure.texts
    panels = [axes.get_tightbbox() for axes in figure.axes]
    boxes = [*(legend.get_window_extent() for legend in figure.legends), *panels, footnote.get_window_extent()]
    whole = figure.bbox
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    assert all(upper.y0 >= lower.y1 for upper, lower in zip(boxes, boxes[1:], strict=False))
    assert all(axes.get_position().width > 0.2 for axes in figure.axes)
    assert figure.get_figwidth() == 3.3


class Page(HTMLParser):
    """The contents of a page. All its elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids += [attributes["id"]] if "id" in attributes else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(out: Path, stem: str = "report") -> Page:
    """Read the page in `out`. It must need no other file, and its images must be the png files beside it."""
    text = (out / f"{stem}.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    images = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.images]
    assert sorted(images) == sorted(path.read_bytes() for path in out.glob("*.png"))
    assert all(image["alt"] for image in page.images)
    return page
