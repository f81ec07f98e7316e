"""The reports' tables: their files are read and checked, their trials planned, and docs/reports.md made."""

import re
from pathlib import Path

import pytest
from helpers import ROOT, refusal

import sweep
from studies.report_tables import RECIPES, Reported, all_tables, list_tables, markdown, number_of, read_tables
from studies.trials import Plan

FILE = ROOT / "tests" / "r9" / "tables.toml"
TABLES = all_tables()
REPORTS = ROOT.parent / "shared" / "reports"
UNITS = {"minutes": (1.0, 60.0, 1 / 60), "seconds_per_epoch": (1.0, 1 / 60, 1 / 3600), "peak_memory_gb": (1.0, 1e3),
         "trainable_parameters": (1.0, 1e-3, 1e-6)}  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name one another from the repository's root."""
    monkeypatch.chdir(ROOT)


def plan(*words: str, file: Path = FILE, table: str = "1") -> Plan:
    """The plan of a table, as sweep.main makes it."""
    made = sweep.read_command(["--tables", str(file), "--table", table, "--out", "out", *words])[1]
    assert made is not None
    return made


def test_a_stage_is_shared_and_an_ensemble_waits_for_its_members() -> None:
    made = plan("--seeds", "1,2", "--batch_size=8", "--threads", "1", "--use_gpu")
    groups = [["row=base"], ["recipe=stage", "row=staged"], ["row=again"], ["row=both"]]
    names = [f"{name},seed={seed}" for group in groups for seed in (1, 2) for name in group]
    assert list(made.trials) == names
    base, staged, both = (made.trials[f"row={name},seed=2"] for name in ("base", "staged", "both"))
    assert base.words[-5:] == ["--batch_size=8", "--threads", "1", "--use_gpu", "--seed=2"] and not base.needs
    assert base.config is not None and base.config.train.batch_size == 8 and base.config.run.filepath is None
    assert staged.needs == ["recipe=stage,seed=2"] and staged.config is not None
    assert staged.config.train.init_from == "out/trials/recipe=stage,seed=2/best.pt" and staged.config.train.seed == 2
    assert list(made.trials["recipe=stage,seed=2"].config.tasks) == ["sts"]  # type: ignore[union-attr]
    assert both.command == (
        "python ensemble.py out/trials/row=base,seed=2/best.pt out/trials/row=base,seed=2/best.pt "
        "out/trials/row=staged,seed=2/best.pt --threads 1 --use_gpu --cache=out/ensemble-cache --average logits"
    )
    assert both.needs == ["row=base,seed=2", "row=staged,seed=2"]
    assert made.table is not None
    rows = {row.id: row.trials for row in made.table.rows}
    assert rows["base"] == rows["base-test"] == ["row=base,seed=1", "row=base,seed=2"] and rows["lost"] == []


def test_without_seeds_a_recipe_has_its_own_and_flags_of_a_row_come_after_it() -> None:
    again = plan().trials["row=again"]
    assert again.config is not None and again.config.train.seed == 11711
    assert again.config.model.hidden_dropout_prob == 0.4
    made = plan("--hidden_dropout_prob", "0.2")  # of all rows, so that two of them are the same run
    assert made.table is not None and "row=again" not in made.trials
    assert {row.id: row.trials for row in made.table.rows}["again"] == ["row=staged"]


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ('recipe = "base"', 'recipe = "bass"', "table 1, row base: there is no recipe .*bass.args; add it or name"),
        ('recipe = "base"', "", "table 1, row base: its verdict is reproduced, and it has no recipe"),
        ('stages = ["stage"]', 'stages = ["stag"]', "row staged: there is no recipe .*stag.args"),
        ('id = "staged"', 'id = "base"', "row base: another row has the same id"),
        ('id = "staged"', 'id = "a/b"', "row a/b: its id is no file name"),
        ('id = "figure-2"', 'id = "1"', "has two tables 1"),
        ('verdict = "differs"', 'verdict = "similar"', "row staged: its verdict is similar; choose from reproduced, "),
        ('because = "Our heads train."', "", "row staged: its verdict is differs; because is for"),
        ('because = "The report', 'recipe = "base"\nbecause = "The', "row lost: its verdict is impossible, and it has"),
        ('split = "test"', 'split = "tset"', "row base-test: its split is tset"),
        ("reported = {score = 0.72}", "reported = {sts = 1}", "row both: it reports sts, which is no column"),
        ('"1:30:30"', '"90 min"', "row base: it reports something .*'90 min' is no time"),
        ('flags = ["--hidden_dropout_prob", "0.4"]', 'flags = "--clip 2"', "row again: cannot be read .flags is no"),
        ("votes = 2", "vote = 2", "row both: cannot be read .*vote"),
        ("votes = 2", "votes = 0", "row both: a member has less than one vote"),
        ('name = "Ensemble"', 'name = "E"\nrecipe = "base"', "row both: it has a recipe, .*beside members"),
        ('"sts_pearson", ', '"sts_accuracy", ', "table 1: has the column sts_accuracy; choose from sst_accuracy, "),
        ('title = "The baseline in bars"', "", "table figure-2: cannot be read .*title"),
        ("[[table]]", "[[tabel]]", "cannot be read as a list of tables"),
        ("[[table]]", "[[table", "cannot be read as a list of tables"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_line_with_table_and_row(old: str, new: str, wanted: str, tmp_path: Path) -> None:
    for path in FILE.parent.glob("*.args"):
        (tmp_path / path.name).write_text(path.read_text())
    text = FILE.read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "tables.toml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert re.match(re.escape(f"{file}: ") + ".*" + wanted, refusal(read_tables, file))
    file.unlink()
    assert refusal(read_tables, file).startswith(f"{file}: cannot be read as a list of tables (")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--table 3 --out o", "--table 3: tests/r9/tables.toml has 1, figure-2; choose one"),
        ("--table 1", "--out: name the folder"),
        ("--table 1 --out o --grid lr=1", "--table: trains the rows of a table, and a grid"),
        ("--table 1 --out o --pruner median", "--pruner: ends trials early"),
        ("--table 1 --out o --tables=", "--table 1: name its file too"),
    ],
)
def test_mistakes_on_the_command_line(words: str, wanted: str) -> None:
    assert refusal(sweep.main, ["--tables", "tests/r9/tables.toml", *words.split()]).startswith(wanted)


def test_times_are_minutes() -> None:
    times = {"1:30:30": 90.5, "0:54:45": 54.75, "2:30": 2.5, "10.5h": 630, "6h 25m": 385, "16m 6s": 16.1}
    assert {time: number_of(time) for time in times} == times and number_of(3) == 3
    for text in ("", "h", "90", "1:3"):
        with pytest.raises(ValueError, match="is no time such as"):
            number_of(text)


def test_the_list_of_tables(capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main(["--tables", str(FILE)])
    assert capsys.readouterr().out.splitlines()[:2] == [
        "R9 Table 1: A task first, dev and test (6 rows, 5 can be run)",
        "    python sweep.py --tables recipes/r9/tables.toml --table 1 --out runs/r9-table-1",
    ]


def test_the_page_has_every_row_with_one_verdict() -> None:
    page = markdown(read_tables(FILE)).splitlines()
    assert "## R9" in page and "### Table 1: A task first, dev and test" in page and "### Figure 2: " in "\n".join(page)
    assert "| row | sst accuracy | sts pearson | score | minutes | verdict |" in page
    assert "| Baseline | 0.5 | 0.860 | 0.715 | 1:30:30 | reproduced by this command |" in page  # the report's digits
    assert "| STS first / then both | 0.523 |  | 0.7 |  | differs: Our heads train. |" in page
    assert "| Baseline, test |  |  | 0.702 |  | reproduced by this command |" in page
    assert "`python sweep.py --tables recipes/r9/tables.toml --table figure-2 --out runs/r9-figure-2`" in page


# --------------------------------------------------------------------------------------------------- the real reports


def test_docs_reports_md_is_up_to_date() -> None:
    """Make it again with: python -m studies.report_tables > docs/reports.md."""
    assert (ROOT / "docs" / "reports.md").read_text(encoding="utf-8") == markdown(TABLES)
    assert "(docs/reports.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.report}-{table.id}")
def test_every_row_of_the_reports_can_be_planned(table: object) -> None:
    """Each recipe's flags parse, and what starts from another run says from which."""
    assert isinstance(table, type(TABLES[0]))
    if not any(row.systems for row in table.rows):
        return
    made = plan(file=RECIPES / table.report.lower() / "tables.toml", table=table.id)
    assert [trial.refusal for trial in made.trials.values() if trial.refusal] == []
    starts = {name: trial.config.train.init_from for name, trial in made.trials.items() if trial.config is not None}
    assert [name for name, start in starts.items() if start and not start.startswith("out/")] == []


def is_printed(name: str, value: Reported, text: str, numbers: set[float]) -> bool:
    """Whether a report prints a figure, in this unit or another usual one. A time stands there as it is."""
    if isinstance(value, str):
        return value in text
    units = UNITS.get(name, (1.0, 100.0))
    return any(abs(abs(float(value)) * unit - number) < 1e-9 * max(1.0, number) for unit in units for number in numbers)


@pytest.mark.parametrize("report", sorted({table.report for table in TABLES}))
def test_reported_figures_stand_in_the_report(report: str) -> None:
    text = REPORTS / f"{report}.txt"
    if not text.exists():
        pytest.skip("the reports' text is not here")
    content = " ".join(text.read_text(encoding="utf-8").split())
    numbers = set(map(float, re.findall(r"\d*\.?\d+", re.sub(r"(?<=\d)\{?,\}?(?=\d{3}\b)", "", content))))
    rows = [(table.id, row) for table in TABLES if table.report == report for row in table.rows]
    figures = [(id, row.id, name, value) for id, row in rows for name, value in row.reported.items()]
    assert [figure for figure in figures if not is_printed(*figure[2:], content, numbers)] == []


def test_all_tables_are_listed() -> None:
    assert len(list(list_tables(TABLES))) == 2 * len(TABLES)
