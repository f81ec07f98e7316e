"""report.py: what is drawn and written is what the study's table says."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import report
from config import UserError
from report import draw_ranks, markdown, rank_labels, rank_lines, read_rows, reference, small_print, trials_of
from sweep import COLUMNS

FLAGS = ["lora_mode", "lora_rank", "dora", "fine_tune_mode", "seed"]
BASE = "--train_sst --train_sts --lr 1e-4 --fine_tune_mode full-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def row(score: float | str, status: str = "ok", cause: str = "", **flags: Any) -> dict[str, Any]:
    """A row as sweep.py writes it; the flags are the grid's."""
    words = [("--dora" if value else "--no_dora") if flag == "dora" else f"--{flag}={value}"
             for flag, value in flags.items()]  # fmt: skip
    figures = {"sst_accuracy": 0.4321, "sts_pearson": 0.8, "sst_seconds_per_epoch": 12.5, "peak_memory_bytes": 1.5e9,
               "trainable_parameters": 1234567, "checkpoint_bytes": 90_400_000}  # fmt: skip
    return {
        "trial": ",".join(f"{flag}={value}" for flag, value in sorted(flags.items())), "status": status, "score": score,
        "cause": cause, "command": f"python multitask_classifier.py {BASE} {' '.join(words)}",
        "commit": COMMIT, "device": "cpu (x86_64, 1 threads)", **(figures if status == "ok" else {}), **flags,
    }  # fmt: skip


ROWS = [
    row(0.60, lora_mode="attn", lora_rank=10, dora=0),
    row(0.50, lora_mode="attn", lora_rank=2, dora=0, seed=1),
    row(0.54, lora_mode="attn", lora_rank=2, dora=0, seed=2),
    row(0.55, lora_mode="attn", lora_rank=2, dora=1),
    row(0.40, lora_mode="all-lin-only", lora_rank=1, dora=1),
    row("", "out of memory", "no | room", lora_mode="attn", lora_rank=80, dora=1),
    row("", "refused", "makes no sense", lora_mode="none", lora_rank=2, dora=0),
    row("", "refused", "makes no sense", lora_mode="none", lora_rank=5, dora=0),
    row(0.80, lora_mode="none"),
    row(0.30, lora_mode="none", fine_tune_mode="last-layer"),
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    columns = ["trial", "status", *FLAGS, *(column for column in COLUMNS if column not in FLAGS)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "results.csv", ROWS)


def test_lines_are_means_by_mode_dora_and_rank(table: Path) -> None:
    trials = trials_of(read_rows(table))
    assert len(trials) == 7
    lines = {key: [(rank, pytest.approx(score)) for rank, score in own.items()]
             for key, own in rank_lines(trials).items()}  # fmt: skip
    assert lines == {
        ("attn", False): [(2, 0.52), (10, 0.60)],
        ("attn", True): [(2, 0.55)],
        ("all-lin-only", True): [(1, 0.40)],
    }
    assert reference(trials, "full-model") == 0.8 and reference(trials, "last-layer") == 0.3
    assert reference(trials[:3], "full-model") is None


def test_the_figure_shows_the_lines(table: Path) -> None:
    figure = draw_ranks(trials_of(read_rows(table)), "commit 0123, a command")
    (axes,) = figure.axes
    drawn = [(to_rgb(line.get_color()), line.get_linestyle(), *map(list, line.get_data())) for line in axes.lines]
    attn, all_lin_only = to_rgb(report.STYLES["attn"][0]), to_rgb(report.STYLES["all-lin-only"][0])
    assert drawn == [
        (attn, "-", [2, 10], pytest.approx([0.65, 0.75])),
        (attn, "--", [2], pytest.approx([0.6875])),
        (all_lin_only, "--", [1], pytest.approx([0.5])),
        ((0, 0, 0), "-", [0, 1], [1, 1]),
        ((0, 0, 0), ":", [0, 1], pytest.approx([0.375, 0.375])),
    ]
    assert axes.get_xlabel() == "rank" and axes.get_ylabel() == "dev score relative to full fine-tuning"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "10"]
    assert list(axes.get_xticks()) == [1, 2, 10] and axes.get_xscale() == "log"
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["attn", "all-lin-only", "LoRA", "DoRA", "full fine-tuning", "frozen backbone"]
    assert [text.get_text() for text in figure.texts] == ["commit 0123, a command"]


def test_nothing_is_cut_off_or_overlaps(table: Path) -> None:
    ranks = [1, 2, 5, 10, 20, 50, 80, 100]
    many = [row(0.5 + rank / 1000, lora_mode=mode, lora_rank=rank, dora=dora)
            for mode in report.STYLES for dora in (0, 1) for rank in ranks]  # fmt: skip
    rows = read_rows(write(table, [*many, *ROWS]))
    figure = draw_ranks(trials_of(rows), small_print(rows) + " --flag value" * 30)
    figure.draw_without_rendering()
    whole = figure.bbox
    (axes,), (legend,), (note,) = figure.axes, figure.legends, figure.texts
    boxes = [part.get_window_extent() for part in (legend, axes.xaxis.label, note)]
    boxes.append(axes.get_tightbbox())
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    assert boxes[2].y1 <= boxes[1].y0 and axes.bbox.y1 <= boxes[0].y0
    ticks = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert not any(a.overlaps(b) for i, a in enumerate(ticks[:-1]) for b in ticks[i + 1 : -1])
    assert axes.get_xticklabels()[-1].get_text() == "\n100"


def test_labels_of_near_ranks_are_staggered() -> None:
    assert rank_labels([1, 2, 80, 100, 110, 200]) == ["1", "2", "80", "\n100", "110", "200"]


def test_the_table(table: Path) -> None:
    rows = read_rows(table)
    lines = markdown(rows, 0.8).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "lora mode", "lora rank", "dora", "fine tune mode", "seed", "score", "relative", "sst accuracy", "sts pearson",
        "sst seconds per epoch", "peak memory", "trainable parameters", "checkpoint",
    ]  # fmt: skip
    assert cells[3] == ["attn", "2", "0", "", "1", "0.5000", "0.625", "0.4321", "0.8000", "12.5", "1,500.0 MB",
                        "1,234,567", "90.4 MB"]  # fmt: skip
    assert {len(own) for own in cells[:9]} == {13} and cells[1] == ["-"] * 13
    assert lines[9:] == ["", "- 1 out of memory: no | room", "- 2 refused: makes no sense"]
    assert "relative" not in markdown(rows, None)


def test_the_small_print_says_commit_device_and_what_the_commands_share(table: Path) -> None:
    rows = read_rows(table)
    assert small_print(rows) == f"commit 0123456789ab; cpu (x86_64, 1 threads); python multitask_classifier.py {BASE}"
    changed = [{**rows[0], "commit": f"{COMMIT}+"}, {**rows[0], "commit": ""}, rows[0]]
    assert small_print(changed).startswith("commit 0123456789ab+, 0123456789ab; ")


def test_the_script(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report"
    done = subprocess.run(
        [sys.executable, ROOT / "report.py", table, "--out", out], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [str(out / "results.md"), str(out / "lora-ranks.png")]
    assert (out / "results.md").read_text().startswith("| lora mode | lora rank |")
    assert (out / "results.md").read_text().endswith(f"{BASE}\n")
    assert imread(out / "lora-ranks.png").shape[1] == 3.4 * 300


def test_without_a_baseline_scores_stand_for_themselves(tmp_path: Path, capsys: Any) -> None:
    table = write(tmp_path / "results.csv", ROWS[:5])
    report.main([str(table), "--out", str(tmp_path)])
    assert "nothing to be relative to" in capsys.readouterr().out
    (axes,) = draw_ranks(trials_of(read_rows(table)), "").axes
    assert axes.get_ylabel() == "dev score" and list(axes.lines[0].get_ydata()) == pytest.approx([0.52, 0.6])


def test_a_study_without_adapters_has_a_table_only(tmp_path: Path) -> None:
    report.main([str(write(tmp_path / "results.csv", ROWS[-2:])), "--out", str(tmp_path / "report")])
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["results.md"]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "has no column cause, command, commit, score, status, trial"),
        (b"trial,status,score,cause,commit\n", "has no column command"),
        (b"trial,status,score,cause,command,commit\na,failed,,b,c,d\n", "no trial has ended well yet"),
    ],
)
def test_what_is_no_table_of_a_study_is_refused(tmp_path: Path, content: bytes | None, wanted: str) -> None:
    if content is not None:
        (tmp_path / "results.csv").write_bytes(content)
    with pytest.raises(UserError, match=wanted) as error:
        report.main([str(tmp_path / "results.csv"), "--out", str(tmp_path / "report")])
    assert "\n" not in str(error.value) and not (tmp_path / "report").exists()
