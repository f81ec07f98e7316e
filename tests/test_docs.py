"""The documentation: its links lead somewhere, and every flag that it names exists."""

import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

from tasks import TASKS, task_by_alias

SCRIPTS = ("multitask_classifier", "ensemble", "sweep", "report", "benchmark", "datasets", "sample_topics")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "recipes/README.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
FLAG = r"--[A-Za-z{][\w{},]*(?:-\w+)*"


def relative(path: Path) -> str:
    """Return the name of a page in the ids of tests."""
    return path.relative_to(ROOT).as_posix()


@cache
def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{count}" if count else slug)
    return set(found)


def dead_links(page: Path) -> Iterator[str]:
    """Yield the relative links of a page that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def named_flags(page: Path) -> Iterator[str]:
    """Yield the flags of our scripts in a page's code spans. Another program's stand before a script or without one."""
    for span in re.findall(r"`([^`]+)`", prose(page)):
        command = re.sub(r"^[^-@].*?(\.py\b|$)", "", span, flags=re.DOTALL)
        yield from re.findall(rf"(?<![\w-]){FLAG}", command)


@pytest.fixture
def known_flags(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """All flags of our scripts, as their --help shows them."""
    pages = [(script, ["--help"]) for script in SCRIPTS]
    pages += [("multitask_classifier", ["--help", name]) for name in task_by_alias(TASKS)]
    for script, words in pages:
        with pytest.raises(SystemExit):
            importlib.import_module(script).main(words)
    shown = re.findall(r"^ +(?:-h \S+, )?(--.*)", capsys.readouterr().out, flags=re.MULTILINE)
    return {flag for line in shown for flag in re.findall(FLAG, line)}


@pytest.mark.parametrize("page", LINKED, ids=relative)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    assert not list(dead_links(page))


def test_flags_in_code_spans_exist(known_flags: set[str]) -> None:
    """NAME and the example of a further task stand for a task. A switch is there with no_ before its name, too."""
    for page in PAGES:
        for flag in named_flags(page):
            name = re.sub("NAME|headlines", "sst", flag[2:].replace("-", "_"))
            assert {f"--{name}", f"--{name.removeprefix('no_')}"} & known_flags, f"{relative(page)}: {flag}"


def test_checks_find_faults(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`\n# A b\n[x](#a-b) [x](#a-b-1) [x](#a) [y](none.md) [z](http://z) `--a-b` `pip --c`")
    assert list(dead_links(page)) == ["#a", "none.md"] and list(named_flags(page)) == ["--a-b"]
