"""Missing and old packages: one line that names the command to install them, and what the requirements say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

# Hides the packages that are named by the first word, as if they were not installed, and runs a script.
HIDE = """
import runpy, sys
hidden, *sys.argv = sys.argv[1:]
sys.modules.update(dict.fromkeys(hidden.split(",")))
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMMANDS = [
    "multitask_classifier.py --dry_run",
    "multitask_classifier.py --evaluate best.pt",
    "multitask_classifier.py --evaluate best.pt --predict - --task sst",
    "ensemble.py a.pt b.pt",
    "sweep.py --out study --grid lr=1e-4,1e-5",
    "sweep.py --out study --tables recipes/r1/tables.toml --table 3 --dry_run",
    "report.py runs",
    "benchmark.py --out table.csv",
    "sample_topics.py --topics recipes/r2/topics.txt --out drawn.csv",
]


def start(command: str, folder: Path, hidden: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command line of a script in `folder` without the `hidden` packages."""
    script, *words = command.split()
    if not (folder / "recipes").exists():
        (folder / "recipes").symlink_to(ROOT / "recipes")
    return subprocess.run(
        [sys.executable, "-c", HIDE, hidden or "nothing", str(ROOT / script), *words],
        cwd=folder, capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_without_torch_a_script_ends_in_one_line(command: str, tmp_path: Path) -> None:
    done = start(command, tmp_path, "torch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: not installed: torch; python -m pip install -r requirements.txt\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_old_torch_is_refused_in_one_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "old" / "torch").mkdir(parents=True)
    (tmp_path / "old" / "torch" / "__init__.py").write_text('__version__ = "2.10.1+cu128"\n')
    done = start(command, tmp_path, PYTHONPATH=str(tmp_path / "old"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: torch 2.10.1+cu128 is too old") and done.stderr.count("\n") == 1
    assert "pip install --upgrade 'torch>=2.11'" in done.stderr


def test_other_missing_packages_are_named_together(tmp_path: Path) -> None:
    done = start("report.py runs", tmp_path, "matplotlib,tokenizers")
    assert done.stderr == (
        "error: not installed: tokenizers, matplotlib; python -m pip install -r requirements-ranges.txt\n"
    )
    assert "not installed: optuna" in start(COMMANDS[4], tmp_path, "optuna").stderr
    assert "not installed: tensorboard" in start(COMMANDS[0], tmp_path, "tensorboard").stderr


def test_fetching_the_data_needs_no_packages(tmp_path: Path) -> None:
    done = start("datasets.py --help", tmp_path, "torch,numpy,tokenizers,tqdm")
    assert done.returncode == 0 and "--out DIR" in done.stdout
    done = start("datasets.py --out data", tmp_path, "tqdm")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "not installed: tqdm" in done.stderr


def requirements(name: str) -> dict[str, tuple[str, str]]:
    """Return sign and version of each package that a file of requirements names."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w-]+)(==|>=)([\d.]+)", line) for line in lines if not line.startswith(("#", "-r"))]
    return {match[1]: (match[2], match[3]) for match in found if match}


def test_both_files_of_requirements_name_the_same_packages() -> None:
    pins, ranges = requirements("requirements.txt"), requirements("requirements-ranges.txt")
    assert list(pins) == list(ranges) and len(pins) == 12
    assert {sign for sign, _ in pins.values()} == {"=="} and {sign for sign, _ in ranges.values()} == {">="}
    for name, (_, lowest) in ranges.items():
        assert [int(n) for n in lowest.split(".")] <= [int(n) for n in pins[name][1].split(".")], name
    assert ranges["torch"] == (">=", "2.11")


def test_the_workflow_runs_the_tests_on_the_oldest_python_and_the_citation_has_what_it_must() -> None:
    workflow, citation = (
        yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
        for name in (".github/workflows/test.yml", "CITATION.cff")
    )
    steps = workflow["jobs"]["test"]["steps"]
    assert steps[1]["with"]["python-version"] == "3.11" and steps[-1]["run"].startswith("make test ")
    for entry in (citation, *citation["references"]):
        assert entry["title"] and entry["authors"] and entry["type"]
    assert citation["cff-version"] == "1.2.0" and citation["message"] and "license" not in citation
