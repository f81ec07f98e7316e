"""The layout: imports go downwards only, scripts stand alone, and importing a module has no effect."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Top to bottom; a module may import from lower rows only. The scripts share a row, so they never import each other.
ROWS: list[tuple[str, ...]] = [
    ("multitask_classifier", "ensemble", "sweep", "report", "benchmark", "sample_topics"),
    ("reporting",),
    ("studies", "benchmarks"),
    ("training",),
    ("evaluation",),
    ("models",),
    ("lora", "bert", "datasets"),
    ("base_bert", "kernels", "cli"),
    ("text", "optimizer"),
    ("config", "tasks"),
    ("utils",),
]
LEVEL = {name: level for level, names in enumerate(ROWS) for name in names}
NOT_SOURCE = {"tests", "recipes", "data"}  # folders of the root without modules of the package


def sources() -> dict[str, Path]:
    """Dotted module name to file, for every source in the repository root and the folders that hold modules."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for folder in ROOT.iterdir():
        if folder.is_dir() and folder.name.isidentifier() and not folder.name.startswith("_"):
            if folder.name in NOT_SOURCE:
                continue
            for path in folder.rglob("*.py"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, source: str, is_package: bool, modules: set[str]) -> set[str]:
    """Those of `modules` that a source imports anywhere, inside functions and under TYPE_CHECKING too."""
    out = set()
    for node in ast.walk(ast.parse(source)):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if is_package else name.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            # `from training import loop` names a module, `from training.loop import train` names one of its things
            targets = [f"{base}.{alias.name}" for alias in node.names]
        for target in targets:
            parts = target.split(".")
            prefixes = [".".join(parts[: n + 1]) for n in range(len(parts))]
            out |= set([prefix for prefix in prefixes if prefix in modules][-1:])
    return out - {name}


def import_graph() -> dict[str, set[str]]:
    """Every module of ours with the modules of ours that it imports."""
    found = sources()
    return {
        name: imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py", set(found))
        for name, path in found.items()
    }


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports that do not go to a lower row, as text; inside a package any order is right."""
    wrong = []
    for name, targets in sorted(graph.items()):
        row = name.partition(".")[0]
        for target in sorted(targets):
            other = target.partition(".")[0]
            if LEVEL[other] <= LEVEL[row] and row != other:
                wrong.append(f"{name} imports {target}, which does not stand below it")
    return wrong


def test_every_module_has_its_place_in_the_layout() -> None:
    unplaced = sorted({name.partition(".")[0] for name in sources()} - LEVEL.keys())
    assert not unplaced, (
        f"{', '.join(unplaced)}: no place in the layout; put it in a row of ROWS in tests/test_layout.py, "
        "above all that it imports and below all that imports it"
    )
    assert {"config", "bert", "models", "training"} <= {name.partition(".")[0] for name in sources()}


def test_imports_go_downwards_only() -> None:
    wrong = upward_imports(
        {name: targets for name, targets in import_graph().items() if name.partition(".")[0] in LEVEL}
    )
    assert not wrong, "; ".join(wrong)


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = import_graph()
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the modules
    assert set(order) == set(graph)


@pytest.mark.parametrize(
    "name, source, wanted",
    [
        ("bert", "import config, numpy", {"config"}),
        ("bert", "def f():\n    from multitask_bert import X", {"multitask_bert"}),
        ("bert", "if TYPE_CHECKING:\n    import training.loop as l", {"training.loop"}),
        ("bert", "from training import loop", {"training.loop"}),
        ("bert", "from training import nothing_of_that_name", {"training"}),
        ("bert", "from training.loop import train", {"training.loop"}),
        ("training.loop", "from . import plan", {"training.plan"}),
        ("training.loop", "from .plan import Plan", {"training.plan"}),
        ("training.loop", "import os.path\nfrom torch import nn", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(name: str, source: str, wanted: set[str]) -> None:
    modules = {"bert", "config", "multitask_bert", "training", "training.loop", "training.plan"}
    assert imports(name, source, False, modules) == wanted


def test_upward_and_sideways_imports_are_reported() -> None:
    graph = {
        "bert": {"models.multitask_bert", "config"},
        "lora": {"models.pals"},
        "sweep": {"report", "training.loop"},
        "training.loop": {"training.plan", "evaluation"},
    }
    wrong = upward_imports(graph)
    assert [line.split(",")[0] for line in wrong] == [
        "bert imports models.multitask_bert",
        "lora imports models.pals",
        "sweep imports report",
    ]


# Run in a process of its own: imports each module and reports on standard error what that did beside defining names.
PROBE = """
import importlib, os, random, sys
root, home, *names = sys.argv[1:]
sys.path.insert(0, root)
import numpy, torch
wrong, current = [], [""]

def watch(event, args):
    # Files written below the root or the home folder, and connections; the libraries' own reading is no effect.
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
        "torch's seed": torch.initial_seed(),
        "torch's generator": torch.get_rng_state().tolist(),
        "numpy's generator": [kind, keys.tolist(), *rest],
        "random's generator": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
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
    """Import `names` from `root` in one fresh process whose home and working folder is `folder`."""
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "PYTEST", "HF_"))}
    environment |= {"HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": str(folder.parent)}
    return subprocess.run(
        [sys.executable, "-c", PROBE, str(root), str(folder), *names],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_importing_has_no_effect(tmp_path: Path) -> None:
    # From the bottom up, so that an effect is reported for the module that has it.
    names = sorted(sources(), key=lambda name: (-LEVEL.get(name.partition(".")[0], 0), name))
    done = probe(ROOT, names, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    assert list((tmp_path / "home").iterdir()) == []


def test_the_probe_sees_effects(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "seeds.py").write_text("import torch, numpy\ntorch.manual_seed(1)\nnumpy.random.rand()\n")
    (root / "writes.py").write_text("from pathlib import Path\nPath.home().joinpath('x').write_text('')\nprint(1)\n")
    (root / "quiet.py").write_text("import torch\nx = 1\n")
    done = probe(root, ["quiet", "seeds", "writes"], tmp_path / "home")
    assert done.returncode == 1
    assert done.stdout == "1\n"
    for effect in ("seeds changes torch's seed", "seeds changes torch's generator", "seeds changes numpy's generator"):
        assert effect in done.stderr
    assert f"writes writes {tmp_path / 'home' / 'x'}" in done.stderr
    assert "quiet" not in done.stderr
