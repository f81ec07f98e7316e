"""What a report consists of, and its files: a page with all in it, markdown, tables as csv and figures as png."""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reporting.tables import Table
from utils.files import write_atomically, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONG = 20  # rows above which a table is folded
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 46rem; margin: 0 auto;
  padding: 0 1rem 4rem; overflow-wrap: break-word; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; } h3 { margin: 2rem 0 .3rem; }
nav ol { padding-left: 1.4rem; } nav ol ol { padding-left: 1rem; font-size: .9rem; }
a { color: #0059a0; }
img { display: block; width: 31rem; max-width: 100%; height: auto; margin: .5rem 0; }
.table { overflow-x: auto; margin: .8rem 0; } table { border-collapse: collapse; font-size: .8rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; }
th { white-space: nowrap; } td { min-width: 3rem; }
.about { color: #555; font-size: .8rem; }
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
class Piece:
    """A figure, the table of what it shows, or both, under one title. `name` is that of its files."""

    name: str
    title: str
    text: str = ""
    table: Table | None = None
    figure: "Figure | None" = None


@dataclass
class Section:
    """Pieces that belong together, and a line for each that has nothing to show."""

    title: str
    pieces: list[Piece] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, piece: Piece | str) -> None:
        """A piece, or why there is none."""
        if isinstance(piece, str):
            self.left_out.append(f"{self.title}: {piece}")
        else:
            self.pieces.append(piece)


@dataclass(frozen=True)
class Report:
    """All of a report. `about` says what it was made of, `problems` what could not be read."""

    title: str
    about: str
    sections: Sequence[Section]
    problems: Sequence[str] = ()

    @property
    def left_out(self) -> list[str]:
        """A line for each figure that the runs have no data for."""
        return [line for section in self.sections for line in section.left_out]


def png(figure: "Figure") -> bytes:
    """A figure as a file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def named(report: Report) -> Report:
    """The report with names that are fit for files and of which no two are the same."""
    taken: list[str] = []
    sections = []
    for section in report.sections:
        pieces = []
        for piece in section.pieces:
            stem = name = re.sub(r"[^\w.=+]+", "-", piece.name).strip("-.")
            while name in taken:
                name = f"{stem}-{len(taken)}"
            taken.append(name)
            pieces.append(replace(piece, name=name))
        sections.append(replace(section, pieces=pieces))
    return replace(report, sections=sections)


def write(report: Report, out: Path, stem: str) -> list[Path]:
    """Write STEM.html, STEM.md, and each piece's NAME.csv and NAME.png into `out`; returns the first two."""
    report = named(report)
    images: dict[str, bytes] = {}
    for piece in (piece for section in report.sections for piece in section.pieces):
        if piece.table is not None:
            write_text(out / f"{piece.name}.csv", piece.table.csv())
        if piece.figure is not None:
            images[piece.name] = png(piece.figure)
            write_atomically(out / f"{piece.name}.png", partial(Path.write_bytes, data=images[piece.name]))
    page, text = out / f"{stem}.html", out / f"{stem}.md"
    write_text(page, as_html(report, images))
    write_text(text, as_markdown(report))
    return [page, text]


def endings(report: Report) -> list[Section]:
    """What the page ends with: what is not in it, and why."""
    return [Section("Left out", left_out=report.left_out), Section("Not read", left_out=list(report.problems))]


def as_markdown(report: Report) -> str:
    """The report with links to its figures' files."""
    lines = [f"# {report.title}", "", report.about]
    for section in report.sections:
        if section.pieces:
            lines += ["", f"## {section.title}"]
        for piece in section.pieces:
            lines += ["", f"### {piece.title}"]
            if piece.text:
                lines += ["", piece.text]
            if piece.figure is not None:
                lines += ["", f"![{piece.title}]({piece.name}.png)"]
            if piece.table is not None:
                lines += ["", piece.table.markdown()]
    for ending in endings(report):
        if ending.left_out:
            lines += ["", f"## {ending.title}", "", *(f"- {line}" for line in ending.left_out)]
    return "\n".join(lines) + "\n"


def as_html(report: Report, images: Mapping[str, bytes]) -> str:
    """One page that needs no other file and no network: `images`, by the names of their pieces, are in it."""
    contents, body = [], []
    for number, section in enumerate([*report.sections, *endings(report)]):
        ending = number >= len(report.sections)
        if not (section.left_out if ending else section.pieces):
            continue
        title = html.escape(section.title)
        links = [f'<li><a href="#{piece.name}">{html.escape(piece.title)}</a></li>' for piece in section.pieces]
        contents.append(f'<li><a href="#section-{number}">{title}</a><ol>{"".join(links)}</ol></li>')
        body.append(f'<h2 id="section-{number}">{title}</h2>')
        body += [piece_html(piece, images.get(piece.name)) for piece in section.pieces]
        if ending:
            body.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in section.left_out) + "</ul>")
    return PAGE.format(
        style=STYLE,
        title=html.escape(report.title),
        about=html.escape(report.about),
        contents="\n".join(contents),
        body="\n".join(body),
    )


def piece_html(piece: Piece, image: bytes | None) -> str:
    """A piece as elements of the page."""
    title = html.escape(piece.title)
    parts = [f'<h3 id="{piece.name}">{title}</h3>']
    if piece.text:
        parts.append(f"<p>{html.escape(piece.text)}</p>")
    if image is not None:
        data = base64.b64encode(image).decode("ascii")
        parts.append(f'<img alt="{title}" src="data:image/png;base64,{data}">')
    if piece.table is not None:
        table = piece.table.html()
        folded = image is not None or len(piece.table.rows) > LONG
        parts.append(f"<details><summary>In numbers</summary>\n{table}\n</details>" if folded else table)
    return "\n".join(parts)
