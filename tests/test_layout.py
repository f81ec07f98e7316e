"""The layout: imports go downwards only and never in a circle, scripts stand alone, importing has no effect."""

import ast
import graphlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from helpers import ROOT

# Floors, top to bottom: a module may import from lower floors, and from its own folder. Scripts import no script.
FLOORS: list[tuple[str, ...]] = [
    ("multitask_classifier", "ensemble", "sweep", "report", "benchmark", "sample_topics"),
    ("reporting",),
    ("studies", "benchmarks"),
    ("training",),
    ("evaluation",),
    ("models",),
    ("lora", "bert", "datasets"),
    ("base_bert", "cli", "optimizer"),
    ("kernels",),
    ("text",),
    ("config", "tasks"),
    ("utils",),
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
WITHOUT_MODULES = {"tests", "recipes", "data", "runs", "docs"}  # folders of the root


def sources() -> dict[str, Path]:
    """Return dotted module name and file of each source in the root and in the folders that hold modules."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier()]
    for folder in folders:
        if folder.name not in WITHOUT_MODULES and not folder.name.startswith("_"):
            for path in folder.rglob("*.py"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, source: str, modules: set[str]) -> set[str]:
    """Return those of `modules` that a source imports anywhere, inside functions and under TYPE_CHECKING too."""
    out = set()
    for node in ast.walk(ast.parse(source)):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: write the full name of a module instead of a relative import"
            # `from training import loader` names a module, `from training.loader import Loader` a thing in it
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in targets:
            parts = target.split(".")
            prefixes = [".".join(parts[: n + 1]) for n in range(len(parts))]
            out |= set([prefix for prefix in prefixes if prefix in modules][-1:])
    return out - {name}


def import_graph() -> dict[str, set[str]]:
    """Return each of our modules with those of our modules that it imports."""
    found = sources()
    return {name: imports(name, path.read_text(encoding="utf-8"), set(found)) for name, path in found.items()}


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports that do not go to a lower floor, as text."""
    wrong = []
    for name, targets in sorted(graph.items()):
        top = name.partition(".")[0]
        for target in sorted(targets):
            other = target.partition(".")[0]
            if LEVEL[other] <= LEVEL[top] and top != other:
                wrong.append(f"{name} imports {target}")
    return wrong


def test_every_module_has_its_floor() -> None:
    unplaced = sorted({name.partition(".")[0] for name in sources()} - LEVEL.keys())
    assert not unplaced, f"{', '.join(unplaced)}: put it on a floor of FLOORS, above what it imports"
    assert {"config", "bert", "models.multitask_bert", "training.trainer"} <= set(sources())


def test_imports_go_downwards_only_and_in_no_circle() -> None:
    graph = import_graph()
    assert not upward_imports(graph), "; ".join(upward_imports(graph))
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError that names the modules
    assert set(order) == set(graph)


def test_imports_are_found_wherever_they_stand() -> None:
    modules = {"bert", "config", "training", "training.loader"}
    for source, wanted in {
        "import config, numpy": {"config"},
        "def f():\n    from training.loader import X": {"training.loader"},
        "if TYPE_CHECKING:\n    import training.loader as l": {"training.loader"},
        "from training import loader": {"training.loader"},
        "from training import nothing_of_that_name": {"training"},
        "import os.path\nfrom torch import nn": set(),
    }.items():
        assert imports("bert", source, modules) == wanted
    graph = {"bert": {"models.pals", "config"}, "sweep": {"report"}, "training.trainer": {"training.loader"}}
    assert upward_imports(graph) == ["bert imports models.pals", "sweep imports report"]


# Runs in a new process: imports each module and reports on standard error what that did beside defining names.
PROBE = """
import importlib, os, random, sys
root, home, *names = sys.argv[1:]
sys.path.insert(0, root)
import numpy, torch, sklearn.metrics  # before the first look: scikit-learn draws a number as it is imported
wrong, current = [], [""]

def watch(event, args):
    if event == "open" and isinstance(args[0], str):
        path, writes = os.path.abspath(args[0]), args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and path.startswith((root + os.sep, home + os.sep)):
            wrong.append(f"{current[0]} writes {path}")
    elif event == "os.mkdir" and os.path.abspath(args[0]).startswith((root + os.sep, home + os.sep)):
        wrong.append(f"{current[0]} makes the folder {args[0]}")
    elif event == "socket.connect":
        wrong.append(f"{current[0]} connects to {args[1]}")

def state():
    kind, keys, *rest = numpy.random.get_state()
    return {
        "torch's generator": torch.get_rng_state().tolist(),
        "numpy's generator": [kind, keys.tolist(), *rest],
        "random's generator": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the working folder": os.getcwd(),
    }

sys.addaudithook(watch)
for current[0] in names:
    before = state()
    importlib.import_module(current[0])
    after = state()
    wrong += [f"{current[0]} changes {what}" for what in before if before[what] != after[what]]
sys.exit("; ".join(wrong) or 0)
"""


def probe(root: Path, names: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Import `names` from `root` in a new process whose home and working folder is `folder`."""
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "PYTEST", "HF_"))}
    environment |= {"HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": str(folder.parent)}
    command = [sys.executable, "-c", PROBE, str(root), str(folder), *names]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_importing_has_no_effect(tmp_path: Path) -> None:
    # From the bottom up, so that an effect is reported for the module that has it.
    names = sorted(sources(), key=lambda name: (-LEVEL.get(name.partition(".")[0], 0), name))
    if find_spec("triton") is None:  # as beside torch's builds for CPUs
        names.remove("kernels.adamax_chunks")
    done = probe(ROOT, names, tmp_path / "home")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "home").iterdir()) == []
    (tmp_path / "noisy.py").write_text(
        "import numpy\nfrom pathlib import Path\nnumpy.random.rand()\n(Path.home() / 'x').touch()"
    )
    done = probe(tmp_path, ["noisy"], tmp_path / "other")  # so that an effect would be seen
    assert "noisy writes" in done.stderr and "noisy changes numpy's generator" in done.stderr
