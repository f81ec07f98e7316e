"""A table that can be written as markdown, csv and html."""

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from utils.untrusted import shown

Value = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A column's name with its unit, and the format in which people read its numbers."""

    name: str
    format: str = ""

    def text(self, value: Value) -> str:
        """Return a value as people read it."""
        if value is None:
            return ""
        return shown(value, None) if isinstance(value, str) else format(value, self.format)


@dataclass(frozen=True)
class Table:
    """Columns, and rows with a value for each column."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]

    def without_empty_columns(self) -> "Table":
        """Return the table without columns that are empty in every row."""
        kept = [i for i in range(len(self.columns)) if any(row[i] not in (None, "") for row in self.rows)]
        return Table([self.columns[i] for i in kept], [[row[i] for i in kept] for row in self.rows])

    def cells(self) -> list[list[str]]:
        """Return the header and all rows as text."""
        body = [[column.text(value) for column, value in zip(self.columns, row, strict=True)] for row in self.rows]
        return [[column.name for column in self.columns], *body]

    def to_markdown(self) -> str:
        """Return the table in GitHub's markdown."""
        header, *body = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in self.cells()]
        return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["-"] * len(header), *body])

    def to_csv(self) -> str:
        """Return the table as csv. Numbers have all their digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        writer.writerows(
            [shown(value, None) if isinstance(value, str) else value for value in row] for row in self.rows
        )
        return text.getvalue()

    def to_html(self) -> str:
        """Return a table element in a box that scrolls sideways on a narrow page, by the keyboard too."""
        header, *body = [[html.escape(cell) for cell in row] for row in self.cells()]
        head = "".join(f"<th>{cell}</th>" for cell in header)
        lines = ["".join(f"<td{' class=long' * (len(cell) > 40)}>{cell}</td>" for cell in row) for row in body]
        rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
        table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"
        return f'<div class="table" tabindex="0">{table}</div>'
