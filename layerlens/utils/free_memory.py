"""Memory that this process can still get."""

from __future__ import annotations

import os
from pathlib import Path

from layerlens.utils import cgroup

MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int:
    """Bytes of main memory that are free or can be freed, within the limit of the control group.

    Files in the page cache count as free: the system drops them when memory is short. If the system does not say how
    much is available, the free pages count.
    """
    machine = meminfo(MEMINFO).get("MemAvailable")
    if machine is None:
        try:
            machine = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # the system does not say
            machine = 2**62
    limit = _cgroup_bytes(cgroup.ROOT, cgroup.MEMBERSHIP)
    return machine if limit is None else min(machine, limit)


def meminfo(path: Path) -> dict[str, int]:
    """Name -> bytes of the kernel's memory table; empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name: 1024 * int(value.split()[0]) for name, _, value in pairs}


def _cgroup_bytes(root: Path, membership: Path) -> int | None:
    """What the process's control group and its parents leave of their limits; None where there is no limit."""
    files = [
        (folder / "memory.max", folder / "memory.current", folder / "memory.stat", "inactive_file")
        for folder in cgroup.folders(root, membership)
    ]
    old = root / "memory"  # version 1, as containers see it
    files.append(
        (old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat", "total_inactive_file")
    )
    left = []
    for limit, used, statistics, cached in files:
        most, now = cgroup.fields(limit), cgroup.fields(used)
        if most and now and most[0] != "max":
            words = cgroup.fields(statistics)
            table = dict(zip(words[::2], words[1::2], strict=False))
            left.append(max(0, int(most[0]) - int(now[0]) + int(table.get(cached, 0))))
    return min(left, default=None)
