"""Every command that the documents print runs, and the README stays short."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, cut

import ensemble
import multitask_classifier
import report
import sweep

PAGES = sorted([ROOT / "README.md", ROOT / "recipes" / "README.md", *ROOT.glob("docs/*.md")])
SCRIPTS: dict[str, Callable[[list[str]], None]] = {
    "multitask_classifier.py": multitask_classifier.main,
    "ensemble.py": ensemble.main,
    "report.py": report.main,
    "sweep.py": sweep.main,
}
# What needs a network, a cluster or minutes; each is tested by itself elsewhere.
ELSEWHERE = (
    "python datasets.py --out",
    "python report.py runs/r1-table-3",
    "python -c",  # with other trackers
    "tensorboard --logdir",
    "srun ",
    "hf upload",
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    """Return page and text of each fenced block of a language."""
    found = []
    for page in PAGES:
        for name, text in FENCE.findall(page.read_text(encoding="utf-8")):
            if name == language:
                found.append((str(page.relative_to(ROOT)), text))
    return found


def commands() -> list[tuple[str, str]]:
    """Return page and line of each command in a fenced block; a batch script for SLURM is none."""
    found = []
    for page, text in blocks(""):
        if not text.startswith("#!"):
            lines = text.replace("\\\n", " ").splitlines()
            starts = ("python ", "torchrun ", "make ", "echo ", *ELSEWHERE)
            found += [(page, line) for line in lines if line.startswith(starts)]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_flags: list[str]) -> Path:
    """A folder with the files and runs that the documents name."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    cut(folder / "data", 20)
    for split in ("", "-dev"):
        rows = [f"{number % 5},text {number}\n" for number in range(12)]
        for name in ("my", "reviews"):
            (folder / f"{name}{split}.csv").write_text("".join(["stars,review\n", *rows]), encoding="utf-8")
    (folder / "pairs.txt").write_text("one text\tanother\n", encoding="utf-8")
    for name, more in (("NAME", ["--lora_mode", "attn-only"]), ("a", []), ("linear", ["--arch", "r1-baseline"])):
        multitask_classifier.main([*tiny_flags, *more, "--epochs", "1", "--run_dir", str(folder / "runs" / name)])
    shutil.copytree(folder / "runs" / "a", folder / "runs" / "b")
    for name in "abc":
        shutil.copy(folder / "runs" / "a" / "best.pt", folder / f"{name}.pt")
    (folder / "runs" / "study").mkdir()
    shutil.copy(ROOT / "benchmarks" / "methods" / "methods.csv", folder / "runs" / "study" / "results.csv")
    return folder


def prepared(script: str, words: list[str], tiny: list[str]) -> list[str]:
    """Return the words of a command in a small form: training and studies as a dry run on a tiny model."""
    if script in ("multitask_classifier.py", "sweep.py") and "--evaluate" not in words:
        return [*(word for word in words if word != "--use_gpu"), *tiny, "--dry_run"]
    return words


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_printed_command_runs(
    page: str, line: str, place: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if line.startswith(ELSEWHERE):
        return
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    monkeypatch.chdir(place)
    if words[0] == "echo":
        (place / "stdin.txt").write_text(words[1], encoding="utf-8")
        monkeypatch.setattr("sys.stdin", (place / "stdin.txt").open())
        words = words[words.index("|") + 1 :]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    tiny = ["--pretrained", str(tiny_bert), "--max_length", "64"]
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            SCRIPTS[words[at]](words[at + 1 :])
    else:
        SCRIPTS[words[at]](prepared(words[at], words[at + 1 :], tiny))


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_blocks_run(page: str, text: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(text, page, "exec")
    if "from evaluation import load" in text:
        monkeypatch.chdir(place)
        exec(code, {})


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000
