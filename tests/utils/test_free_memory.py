"""Memory that is left: of the machine, and of the control group."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from layerlens.utils import cgroup, free_memory


def files(folder: Path, **contents: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(content)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of control groups; this process is in group/own."""
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("0::/group/own\n")
    return tmp_path


def test_files_in_the_page_cache_are_available(group: Path) -> None:
    # 1 GiB: what other processes may take or give back between the two readings.
    assert free_memory.available_bytes() == pytest.approx(psutil.virtual_memory().available, abs=2**30)


def test_the_least_that_a_control_group_leaves_counts(group: Path) -> None:
    files(group / "group/own", memory__max="9000000", memory__current="5000000", memory__stat="inactive_file 1000000\n")
    assert free_memory.available_bytes() == 5_000_000
    files(group / "group", memory__max="4000000", memory__current="5000000")  # lowered below what is in use
    assert free_memory.available_bytes() == 0
    files(group / "group", memory__max="max", memory__current="5000000")
    assert free_memory.available_bytes() == 5_000_000


def test_version_1_of_control_groups(group: Path) -> None:
    statistics = "inactive_file 7\ntotal_inactive_file 1000000\n"
    files(group / "memory", memory__limit_in_bytes="9000000", memory__usage_in_bytes="5000000", memory__stat=statistics)
    assert free_memory.available_bytes() == 5_000_000


def test_without_the_kernels_table_free_pages_count(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "MEMINFO", group / "nothing")
    assert 0 < free_memory.available_bytes() < psutil.virtual_memory().total
