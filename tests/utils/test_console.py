"""Lines and bars, and how scripts end: one line and the right exit code, whatever becomes of standard output."""

import os
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from utils.console import format_table, progress
from utils.errors import describe_error, first_line


def ended(work: str, stdout: Any) -> tuple[int, str]:
    """Return exit code and standard error of a script whose main is `work`."""
    done = process_of(work, stdout=stdout, stderr=subprocess.PIPE)
    return done.returncode, done.stderr


def process_of(work: str, **how: Any) -> "subprocess.CompletedProcess[str]":
    """Return the ended process of a script whose main is `work`."""
    imports = "import sys; from utils.console import run_script, say; from utils.errors import UserError; "
    code = imports + f"run_script(lambda words: ({work}))"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # so that output waits to be written
    return subprocess.run([sys.executable, "-c", code], text=True, cwd=ROOT, env=environment, **how)


@pytest.mark.parametrize(
    "work",
    ["say('x')", "print('x')", "print('x' * 100_000)", "(print('x'), sys.exit())", "[say('x') for _ in range(9)]"],
)
def test_standard_output_on_a_full_disk_is_one_line(work: str) -> None:
    with open("/dev/full", "w") as full:
        assert ended(work, full) == (2, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("work", ["say('x')", "print('x')", "print('x' * 100_000)"])
def test_a_reader_who_has_gone_is_told_nothing(work: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert ended(work, writer) == (1, "")
    finally:
        os.close(writer)


@pytest.mark.parametrize(("number", "name"), [(1, "output"), (2, "error")])
def test_closed_output_is_one_line_on_the_other_stream(number: int, name: str) -> None:
    """Else the first file that is opened would get what libraries print."""
    done = process_of("say('x')", capture_output=True, preexec_fn=lambda: os.close(number))
    line = f"error: standard {name} is closed; redirect it, such as by {'2' * (number == 2)}>/dev/null\n"
    assert done.returncode == 2 and (done.stdout, done.stderr) == (("", line) if number == 1 else (line, ""))


@pytest.mark.parametrize("work", ["print('x', file=sys.stderr)", "(_ for _ in ()).throw(UserError('a mistake'))"])
def test_standard_error_on_a_full_disk_is_one_line_on_standard_output(work: str) -> None:
    with open("/dev/full", "w") as full:
        done = process_of(work, stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 2 and done.stdout.startswith("error: ") and done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("work", "code", "words"),
    [
        ("open('/nowhere/\\n')", 2, "error: [Errno 2] No such file or directory: '/nowhere/\\n'\n"),
        ("(_ for _ in ()).throw(UserError('a mistake'))", 2, "error: a mistake\n"),
        ("(_ for _ in ()).throw(MemoryError('big'))", 2, "error: out of memory (big); lower --eval_batch_size"),
        ("(_ for _ in ()).throw(KeyboardInterrupt())", 130, "stopped\n"),
        ("(_ for _ in ()).throw(RuntimeError('our bug'))", 1, "Traceback"),
    ],
)
def test_errors_end_a_script_with_their_code(tmp_path: Path, work: str, code: int, words: str) -> None:
    with (tmp_path / "out").open("w") as out:
        found, told = ended(f"print('x'), {work}", out)
    assert found == code and told.startswith(words) and (told.count("\n") == 1) == (code != 1)
    assert (tmp_path / "out").read_text() == "x\n"  # what was printed before stays
    with open("/dev/full", "w") as full:
        found, told = ended(f"print('x'), {work}", full)
    assert code == 1 or (found == code and told.startswith(words) and told.count("\n") == 1)


def test_a_bar_in_a_file_is_made_of_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """In an editor or grep, a bar that is redrawn is one endless line."""
    bar = progress(["a", "b", "c", "d"], "epoch 1/3", "step")
    for _ in bar:
        bar.set_postfix_str("sst loss 1.047", refresh=False)
        bar.refresh()
    lines = capsys.readouterr().err.splitlines()
    assert not any("\r" in line or "█" in line or not line.strip() for line in lines)
    assert len(lines) > 2 and lines[0].startswith("epoch 1/3:   0%| 0/4 [00:00<?")
    assert lines[-1].startswith("epoch 1/3: 100%| 4/4 [00:00<00:00, ") and lines[-1].endswith("step/s, sst loss 1.047]")
    bar = progress(["a", "b"], "epoch", "step", done=3)
    assert (bar.n, bar.total) == (3, 5) and list(bar) == ["a", "b"]


def test_losses_are_seen_on_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with os.fdopen(terminal, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        bar = progress(range(1234), "epoch 10/25", "step")
        bar.update(1000)
        bar.set_postfix_str("sst 1.561  para 0.656  sts 2.134")
        line = str(bar)
        bar.close()
    os.close(master)
    assert line.startswith("epoch 10/25:  81%|") and "| 1000/1234 [" in line
    assert "sst 1.561  para 0.656  sts 2.134" in line


def test_tables_and_first_lines() -> None:
    table = format_table(["task", "n"], [["sst", "10"], ["a long name", "1"]])
    assert table.splitlines() == ["task          n", "---------------", "sst          10", "a long name   1"]
    assert first_line(ValueError("\n  one\ntwo")) == "one" and first_line(ValueError()) == "ValueError"
    assert describe_error(KeyError("x")) == "KeyError: 'x'" and describe_error(ValueError()) == "ValueError"
