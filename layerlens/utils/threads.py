"""The number of CPU threads: one setting, resolved here, handed to everything that can use threads.

Two thread pools that both believe they own all cores slow small work down many times over.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from layerlens.exceptions import ConfigurationError
from layerlens.utils import cgroup

# Read when the library loads its pool: OpenMP (torch, our kernels), OpenBLAS (NumPy, SciPy), MKL, rayon (tokenizers).
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
MAX_THREADS_PER_CORE = 4


def available_cores() -> int:
    """Cores that this process may use: its CPU affinity, and the CPU quota of its control group (rounded down)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(cgroup.ROOT, cgroup.MEMBERSHIP)
    return cores if quota is None else max(1, min(cores, int(quota)))


def resolve_threads(n: int, processes: int = 1) -> int:
    """``n``, or the cores available to each of the ``processes`` on this machine where ``n`` is 0.

    Raises:
        ConfigurationError: ``n`` is negative, or so large that the threads would only wait for each other.
    """
    if n < 0:
        raise ConfigurationError(f"threads must be 0 (all cores) or more, got {n}")
    cores = available_cores()
    if n > MAX_THREADS_PER_CORE * cores:
        raise ConfigurationError(
            f"runtime.threads: {n} threads on {cores} core{'s' if cores > 1 else ''} would only slow each other down; "
            f"use at most {MAX_THREADS_PER_CORE * cores}, or 0 for one on each core"
        )
    return n or max(1, cores // processes)


def set_threads(n: int) -> int:
    """Give every thread pool of this process ``resolve_threads(n)`` threads; returns that number.

    torch is told directly if it is loaded; the environment tells libraries loaded later, and child processes.
    """
    threads = resolve_threads(n)
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
    return threads


def let_idle_threads_sleep() -> None:
    """Have idle threads of OpenMP and OpenBLAS sleep instead of spin, unless the user decided; call it before torch,
    NumPy and SciPy are loaded.

    torch's OpenMP runtime, the kernels' own and SciPy's OpenBLAS share the cores. Spinning threads of one, or of any
    other program, hold up the other: with both cores otherwise busy, torch products between kernel calls took two to
    three times as long, and K-FAC factors on two threads 1.4 times (OpenBLAS spins for 2^26 cycles unless told).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # spin for 2^4 cycles, the least that OpenBLAS takes


def _cgroup_quota(root: Path, membership: Path) -> float | None:
    """Smallest CPU quota, in cores, of the process's control group and its parents; None where there is no limit."""
    quotas = []
    for folder in cgroup.folders(root, membership):
        fields = cgroup.fields(folder / "cpu.max")  # cgroup v2: "max 100000" or "150000 100000"
        if len(fields) == 2 and fields[0] != "max":
            quotas.append(int(fields[0]) / int(fields[1]))
    # cgroup v1, as containers see it
    quota, period = cgroup.fields(root / "cpu/cpu.cfs_quota_us"), cgroup.fields(root / "cpu/cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        quotas.append(int(quota[0]) / int(period[0]))
    return min(quotas, default=None)
