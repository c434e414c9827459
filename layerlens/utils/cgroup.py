"""The control group of this process, which limits what a container may use (Linux)."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def folders(root: Path, membership: Path) -> list[Path]:
    """Folders of the process's control group and its parents, version 2; empty where there is none."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # no /proc: not Linux
        return []
    for line in lines:
        if line.startswith("0::/"):
            own = root / line.removeprefix("0::/")
            return [own, *(parent for parent in own.parents if parent == root or root in parent.parents)]
    return []


def fields(path: Path) -> list[str]:
    """The words of a control file; empty if its controller is not there, which means no limit."""
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
