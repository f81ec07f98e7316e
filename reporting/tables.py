"""A table that is written as markdown, as csv and as html."""

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

Value = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A column's name, with its unit, and how its numbers are shown; the csv file has them in full."""

    name: str
    format: str = ""

    def text(self, value: Value) -> str:
        """A value as people read it."""
        return "" if value is None else value if isinstance(value, str) else format(value, self.format)


@dataclass(frozen=True)
class Table:
    """Columns and rows, as wide as the columns."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]

    def filled(self) -> "Table":
        """The table without columns in which no row has anything."""
        kept = [i for i in range(len(self.columns)) if any(row[i] not in (None, "") for row in self.rows)]
        return Table([self.columns[i] for i in kept], [[row[i] for i in kept] for row in self.rows])

    def cells(self) -> list[list[str]]:
        """All rows as text, the header first."""
        body = [[column.text(value) for column, value in zip(self.columns, row, strict=True)] for row in self.rows]
        return [[column.name for column in self.columns], *body]

    def markdown(self) -> str:
        """A table as GitHub shows it."""
        header, *body = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in self.cells()]
        return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["-"] * len(header), *body])

    def csv(self) -> str:
        """The same with numbers in full."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        writer.writerows(["" if value is None else value for value in row] for row in self.rows)
        return text.getvalue()

    def html(self) -> str:
        """A table element in a box of its own, which scrolls sideways where the page is narrow."""
        header, *body = [[html.escape(cell) for cell in row] for row in self.cells()]
        head = "".join(f"<th>{cell}</th>" for cell in header)
        lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
        rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
        return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
