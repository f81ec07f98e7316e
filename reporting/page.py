"""The parts of a report, and its files: one html page, markdown, tables as csv and figures as png."""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from reporting.tables import Table
from utils.files import write_atomically, write_text
from utils.untrusted import shown, without_middle

MAX_NAME = 160  # characters of the name of an item's files
FOLDED_ROWS = 20  # a table with more rows is folded
# The first two shades of a table's box move with its content and hide the others, which therefore show only at a side
# where the table goes on.
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1a1a1a; --quiet: #555; --line: #d5d5d5; --link: #0059a0;
  --shade: rgb(0 0 0 / .35); }
@media (prefers-color-scheme: dark) {
  :root { --page: #17191c; --text: #e4e4e4; --quiet: #a8abb0; --line: #44474c; --link: #7fb9ff;
    --shade: rgb(255 255 255 / .45); }
  img { filter: invert(.91) hue-rotate(180deg); }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 76rem;
  margin: 0 auto; padding: 0 1rem 4rem; overflow-wrap: break-word; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); } h3 { margin: 2rem 0 .3rem; }
p, ul, nav { max-width: 46rem; }
nav ol { padding-left: 1.4rem; } nav ol ol { padding-left: 1rem; font-size: .9rem; }
a { color: var(--link); }
img { display: block; width: 31rem; max-width: 100%; height: auto; margin: .5rem 0; }
.table { overflow-x: auto; margin: .8rem 0; background:
  linear-gradient(to right, var(--page) 40%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 40%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / 1rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { vertical-align: bottom; } td { min-width: 2.5rem; } td:first-child { min-width: 7rem; } .long { min-width: 16rem; }
.about, .source { color: var(--quiet); font-size: .8rem; }
.source { font-family: ui-monospace, monospace; font-size: .7rem; } .source span { white-space: nowrap; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="about">{about}</p>
<nav>
<ol>
{contents}
</ol>
</nav>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class ReportItem:
    """A figure, the table of its numbers, or both, under one title. `name` names its files.

    `source` says where the numbers come from: commit, device and command. `printed` is what report.py prints of the
    item. The table of such an item is never folded.
    """

    name: str
    title: str
    text: str = ""
    table: Table | None = None
    figure: Figure | None = None
    source: str = ""
    printed: str = ""


@dataclass
class Section:
    """Items under one heading. `left_out` has a line for each item that the data do not suffice for."""

    title: str
    items: list[ReportItem] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, item: ReportItem | str) -> None:
        """Add an item. A string says why there is none."""
        if isinstance(item, str):
            self.left_out.append(f"{self.title}: {item}")
        else:
            self.items.append(item)


@dataclass(frozen=True)
class Report:
    """All of a report. `about` says what it was made of, `problems` what could not be read."""

    title: str
    about: str
    sections: Sequence[Section]
    problems: Sequence[str] = ()

    @property
    def left_out(self) -> list[str]:
        """A line for each item that the data do not suffice for."""
        return [line for section in self.sections for line in section.left_out]

    def parts(self) -> list[tuple[str, Sequence[ReportItem], Sequence[str]]]:
        """Return each heading with the items under it, or with the lines on what is not in the report, and why."""
        parts: list[tuple[str, Sequence[ReportItem], Sequence[str]]] = [
            *((section.title, section.items, ()) for section in self.sections),
            ("Not shown, and why", (), self.left_out),
            ("Not read", (), self.problems),
        ]
        return [part for part in parts if part[1] or part[2]]


def with_unique_names(report: Report) -> Report:
    """Return the report with item names that are valid in file names and occur once."""
    taken: set[str] = set()

    def with_unique_name(item: ReportItem) -> ReportItem:
        stem = name = without_middle(re.sub(r"[^\w.=+]+", "-", item.name).strip("-."), MAX_NAME)
        number = len(taken)
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        return replace(item, name=name)

    sections = [replace(section, items=list(map(with_unique_name, section.items))) for section in report.sections]
    return replace(report, sections=sections)


def write_report(report: Report, out: Path, stem: str) -> list[Path]:
    """Write STEM.html, STEM.md, and NAME.csv and NAME.png of each item into `out`. Return the first two paths."""
    report = with_unique_names(report)
    images: dict[str, bytes] = {}
    for item in (item for section in report.sections for item in section.items):
        if item.table is not None:
            write_text(out / f"{item.name}.csv", item.table.to_csv())
        if item.figure is not None:
            item.figure.savefig(buffer := io.BytesIO(), format="png")
            images[item.name] = buffer.getvalue()
            write_atomically(out / f"{item.name}.png", partial(Path.write_bytes, data=images[item.name]))
    page, text = out / f"{stem}.html", out / f"{stem}.md"
    write_text(page, to_html(report, images))
    write_text(text, to_markdown(report))
    return [page, text]


def markdown_text(text: str) -> str:
    """Return a text, which may quote foreign files, as markdown shows it: without tags."""
    return shown(text, None).replace("<", "&lt;")


def to_markdown(report: Report) -> str:
    """Return the report as markdown that shows the png files."""
    lines = [f"# {markdown_text(report.title)}", "", markdown_text(report.about)]
    for title, items, reasons in report.parts():
        lines += ["", f"## {markdown_text(title)}"]
        for item in items:
            lines += ["", f"### {markdown_text(item.title)}"]
            if item.text:
                lines += ["", markdown_text(item.text)]
            if item.figure is not None:
                lines += ["", f"![{markdown_text(item.title)}]({item.name}.png)"]
            if item.source:
                lines += ["", "Source: `" + shown(item.source).replace("`", "'") + "`"]
            if item.table is not None:
                lines += ["", markdown_text(item.table.to_markdown())]
        if reasons:
            lines += ["", *(f"- {markdown_text(reason)}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def html_text(text: str) -> str:
    """Return a text, which may quote foreign files, as html shows it: without tags."""
    return html.escape(shown(text, None))


def to_html(report: Report, images: Mapping[str, bytes]) -> str:
    """Return one page that needs no other file and no network. It contains `images`, by the names of their items."""
    contents, body = [], []
    for number, (title, items, reasons) in enumerate(report.parts()):
        links = [f'<li><a href="#{item.name}">{html_text(item.title)}</a></li>' for item in items]
        contents.append(f'<li><a href="#section-{number}">{html_text(title)}</a><ol>{"".join(links)}</ol></li>')
        body.append(f'<h2 id="section-{number}">{html_text(title)}</h2>')
        body += [item_html(item, images.get(item.name)) for item in items]
        if reasons:
            body += ["<ul>", *(f"<li>{html_text(reason)}</li>" for reason in reasons), "</ul>"]
    return PAGE.format(
        style=STYLE,
        title=html_text(report.title),
        about=html_text(report.about),
        contents="\n".join(contents),
        body="\n".join(body),
    )


def item_html(item: ReportItem, image: bytes | None) -> str:
    """Return an item as elements of the page."""
    title = html_text(item.title)
    parts = [f'<h3 id="{item.name}">{title}</h3>']
    if item.text:
        parts.append(f"<p>{html_text(item.text)}</p>")
    if image is not None:
        data = base64.b64encode(image).decode("ascii")
        parts.append(f'<img alt="{title}" src="data:image/png;base64,{data}">')
    if item.source:
        source = re.sub(r"--\w+", r"<span>\g<0></span>", html_text(item.source))
        parts.append(f'<p class="source">{source}</p>')
    if item.table is not None:
        table = item.table.to_html()
        folded = not item.printed and (image is not None or len(item.table.rows) > FOLDED_ROWS)
        parts.append(f"<details><summary>In numbers</summary>\n{table}\n</details>" if folded else table)
    return "\n".join(parts)
