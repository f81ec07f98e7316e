"""Tables and pages: values, escapes and names of files."""

import csv
from pathlib import Path

import pytest
from helpers import read_page

from reporting.page import Report, ReportItem, Section, write_report
from reporting.tables import Column, Table


def test_a_table_in_three_formats() -> None:
    table = Table(
        [Column("text | it"), Column("share", ".1%"), Column("nothing"), Column("count", ",d")],
        [["a | b\nc <d>", 0.12345, None, 1234], ["", None, "", 5]],
    ).without_empty_columns()
    assert table.to_markdown().splitlines() == [
        "| text \\| it | share | count |",
        "| - | - | - |",
        "| a \\| b c <d> | 12.3% | 1,234 |",
        "|  |  | 5 |",
    ]
    rows = list(csv.reader(table.to_csv().splitlines(keepends=True)))
    assert rows == [["text | it", "share", "count"], ["a | b\nc <d>", "0.12345", "1234"], ["", "", "5"]]
    assert "<td>a | b\nc &lt;d&gt;</td><td>12.3%</td><td>1,234</td>" in table.to_html()


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["a/b", "a b", "a-b", "../a"], ["a-b-1", "a-b-2", "a-b", "a"]),
        (["a-2", "a", "a"], ["a-2", "a", "a-3"]),  # the number that is tried first is taken
    ],
)
def test_names_of_files_are_unique_and_texts_are_escaped(tmp_path: Path, names: list[str], files: list[str]) -> None:
    table = Table([Column("x")], [["1"]] * 30)
    items = [ReportItem(name, "<b>Title</b> & co", "a < b", table, source="python x.py <y>") for name in names]
    write_report(Report("R", "made <so>", [Section("S", items, ["left <out>"])], ["not <read>"]), tmp_path, "report")
    assert sorted(path.stem for path in tmp_path.glob("*.csv")) == sorted(files)
    page = read_page(tmp_path)
    assert page.text.count("In numbers") == len(names)  # tables of many rows are folded
    for text in ("<b>Title</b> & co", "a < b", "made <so>", "left <out>", "not <read>", "python x.py <y>"):
        assert text in page.text
    text = (tmp_path / "report.md").read_text()
    assert text.count("Source: `python x.py <y>`") == len(names) == text.count("<") and "a &lt; b" in text
