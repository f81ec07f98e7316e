"""How much memory is free, in containers and batch jobs too."""

from pathlib import Path

import pytest

from utils.device import free_memory


@pytest.mark.parametrize(
    ("groups", "limits", "wanted"),
    [
        ("0::/job/step", {}, 8_000_000 * 1024),
        ("0::/job/step", {"job/memory.max": "3000000000", "job/step/memory.max": "max"}, 3_000_000_000),
        ("0::/", {"memory.max": "5000000000"}, 5_000_000_000),
        ("4:memory:/job\n3:cpuset:/", {"memory/job/memory.limit_in_bytes": "4000000000"}, 4_000_000_000),
        ("4:memory:/job", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 8_000_000 * 1024),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "1000"}, 0),
    ],
)
def test_free_memory(tmp_path: Path, groups: str, limits: dict[str, str], wanted: int) -> None:
    files = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n", "proc/self/cgroup": groups + "\n"}
    for name, text in {**files, **{f"sys/fs/cgroup/{name}": text + "\n" for name, text in limits.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = free_memory(tmp_path)
    assert found == wanted or 0 < wanted - found < 3_000_000_000  # less what this process has taken


def test_free_memory_of_this_machine(tmp_path: Path) -> None:
    assert 1 << 20 < free_memory() < 1 << 50
    assert 1 << 20 < free_memory(tmp_path) < 1 << 50  # no /proc
