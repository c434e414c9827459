"""``layerlens bench``: how fast the kernels and the solver are here, beside this machine's limits and other libraries.

Everything is timed in the same minute on the same buffers, so that the ratios hold on a busy machine too; the rates
themselves do not, which is why the load is reported beside them.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from layerlens import __version__, kernels
from layerlens.bench.kernel_cases import (
    Case,
    energy_case,
    fisher_case,
    ghost_case,
    measure,
    products,
    ragged_case,
    readers,
)
from layerlens.cost.device import device_name
from layerlens.models import LORA, AllocationProblem, Option
from layerlens.optimization import solve
from layerlens.utils.progress import Progress, silent
from layerlens.utils.threads import set_threads

READ_BYTES = 2**28
"""More than the last cache of most machines."""
PRODUCT = 1024
SOLVER_S = 0.5
"""An instance is solved again until so much time is spent."""
SETTLE_S = 0.01
"""Longer than an idle OpenMP worker spins."""


@dataclass(frozen=True)
class Limit:
    """What this machine can do at most, as the fastest library here does it: ``rate`` in ``unit``."""

    name: str
    rate: float
    unit: str


@dataclass(frozen=True)
class KernelSpeed:
    """One kernel on one shape.

    Args:
        name: what is done, on what.
        seconds: of one call, the median.
        rate, unit: what that amounts to.
        of_limit: share of the fastest rate measured on the same buffer, at most 1; None where none was.
        peers: other way to the same result -> how many times longer it takes.
    """

    name: str
    seconds: float
    rate: float
    unit: str
    of_limit: float | None
    peers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SolverSpeed:
    """The solver on one instance: the least seconds of some runs, and the gap that it proved."""

    name: str
    seconds: float
    gap: float
    status: str


@dataclass(frozen=True)
class Speeds:
    """All that was measured, and what a reader needs to judge it (processor, threads, cores, load, versions)."""

    machine: dict[str, Any]
    limits: tuple[Limit, ...]
    kernels: tuple[KernelSpeed, ...]
    solver: tuple[SolverSpeed, ...]
    seconds: float


def measure_speeds(
    *, threads: int = 1, budget_s: float = 0.6, small: bool = False, progress: Progress = silent
) -> Speeds:
    """Time the limits, the kernels and the solver with ``threads`` threads on as many cores, for at most 20 s.

    Args:
        threads: of our kernels, of torch and of BLAS where it can still be told; 0 for all cores.
        budget_s: seconds for each kernel and its peers together.
        small: buffers of a hundredth, for trying it out; their rates mean nothing.
        progress: called after every measurement.

    Raises:
        ConfigurationError: threads that this machine has not.
    """
    start = time.perf_counter()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with pinned(threads) as (count, cores):
        cases, instances = _cases(count, small), _instances(small)
        with progress.stage("Measuring speeds", total=2 + len(cases) + len(instances)) as advance:
            limits = []
            for limit in (_read_bandwidth, _product_rate):
                limits.append(limit(small))
                advance(1)
            found = []
            for make in cases:
                found.append(_timed(make(), budget_s))
                advance(1)
            solved = []
            for name, layers, hard, refine in instances:
                solved.append(_solved(name, layers, hard, refine, count))
                advance(1)
    machine = {
        "processor": device_name(torch.device("cpu")),
        "isa": kernels.isa(),
        "threads": count,
        "cores": list(cores),
        "cores_present": os.cpu_count() or 1,
        "load_before": load,
        "system": platform.platform(terse=True),
        "versions": {"layerlens": __version__, "numpy": np.__version__, "torch": torch.__version__},
    }
    return Speeds(machine, tuple(limits), tuple(found), tuple(solved), time.perf_counter() - start)


@contextmanager
def pinned(threads: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(threads, the cores that this process is held to): no more cores than threads, where the system allows it.

    What was set before is set again afterwards.
    """
    before = torch.get_num_threads()
    count = set_threads(threads)
    try:
        if not hasattr(os, "sched_setaffinity"):  # not Linux
            yield count, ()
            return
        allowed = os.sched_getaffinity(0)
        cores = tuple(sorted(allowed)[:count])
        os.sched_setaffinity(0, cores)
        try:
            yield count, cores
        finally:
            os.sched_setaffinity(0, allowed)
    finally:
        set_threads(before)


def _cases(threads: int, small: bool) -> Sequence[Callable[[], Case]]:
    """A kernel of each family, on the shapes of a fine-tune."""
    rows, columns, width = (64, 1024, 64) if small else (1024, 4096, 768)
    return (
        lambda: energy_case(rows, columns, torch.float32, threads=threads),
        lambda: ragged_case(torch.float32, threads, dim=32 if small else 384),
        lambda: fisher_case(8, rows * columns // 4, torch.float32, threads=threads, into=np.float32),
        lambda: ghost_case(8, 32 if small else 128, width, width, threads=threads),
    )


def _instances(small: bool) -> Sequence[tuple[str, int, bool, bool]]:
    """(name, layers, hard, refine): of a small and a large language model, and one that no model has yet."""
    if small:
        return (("12 layers", 12, False, False),)
    return (
        ("72 layers × 32 options, 4 budgets", 72, True, True),
        ("224 layers × 32 options, 4 budgets", 224, True, True),
        ("10,000 layers × 32 options, 4 budgets", 10_000, True, False),
    )


def _timed(case: Case, budget_s: float) -> KernelSpeed:
    measured = measure(case.candidates, budget_s=budget_s, settle_s=0.0 if case.threads == 1 else SETTLE_S)
    seconds = measured.median("ours")
    return KernelSpeed(
        name=case.name,
        seconds=seconds,
        rate=case.work / seconds / 1e9,
        unit=case.unit,
        of_limit=case.of_limit(measured),
        peers={name: measured.speedup("ours", over=name) for name in case.peers},
    )


def _solved(name: str, layers: int, hard: bool, refine: bool, threads: int) -> SolverSpeed:
    problem = transformer_problem(layers, hard=hard)
    seconds: list[float] = []
    while not seconds or (len(seconds) < 5 and sum(seconds) < SOLVER_S):
        start = time.perf_counter()
        allocation = solve(problem, refine=refine, threads=threads)
        seconds.append(time.perf_counter() - start)
    return SolverSpeed(name, min(seconds), allocation.gap, allocation.status)


def _read_bandwidth(small: bool) -> Limit:
    """The fastest of some readers of a buffer."""
    size = READ_BYTES // (100 if small else 1) // 8 * 8
    seconds = min(map(_median, readers(torch.ones(size // 4)).values()))
    return Limit(f"reading memory ({size / 2**20:.0f} MiB)", size / seconds / 1e9, "GB/s")


def _product_rate(small: bool) -> Limit:
    """The fastest float32 matrix product: what is left of the processor's multiply-adds in practice."""
    size = PRODUCT // (8 if small else 1)
    seconds = min(map(_median, products(size).values()))
    return Limit(f"float32 multiply-adds (product of {size}³)", 2 * size**3 / seconds / 1e9, "GFLOP/s")


def _median(work: Callable[[], object], runs: int = 7) -> float:
    work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


RANKS = {LORA: 15, "adapter": 10, "prefix": 6}  # with "none": 32 options


def transformer_problem(n_layers: int, *, hard: bool, seed: int = 0) -> AllocationProblem:
    """``n_layers`` × 32 options × 4 budgets, costs as the formulas of a transformer give them.

    Modules of five widths; utility √(signal)·√rank with 20 % noise per option, signals log-uniform over two decades;
    parameters and FLOPs follow the rank, memory and latency have a fixed part for touching a layer at all. Each budget
    is a share of what the dearest choices need: 30 % (easy) or, so that all four bind, 5 % of parameters and FLOPs and
    12 % of memory and latency (hard).
    """
    rng = np.random.default_rng([seed, n_layers, int(hard)])
    width = rng.choice([384, 768, 1024, 3072, 4096], n_layers)[:, None]
    signal = 10.0 ** rng.uniform(-1.0, 1.0, (n_layers, 1))
    values, costs = [np.zeros((n_layers, 1))], [np.zeros((4, n_layers, 1))]
    for method, count in RANKS.items():
        rank = np.unique(np.round(2.0 ** np.linspace(0.0, 6.0, count + 6)))[:count][None, :]
        efficiency = {LORA: 1.0, "adapter": 0.8, "prefix": 0.6}[method] * rng.uniform(0.7, 1.3, (n_layers, 1))
        values.append(signal * efficiency * np.sqrt(rank) * rng.uniform(0.8, 1.2, (n_layers, count)))
        params = np.round(rank * width * {LORA: 2.0, "adapter": 2.1, "prefix": 1.0}[method])
        flops = 2.0 * params * 1024.0 * (1.0 if method != "prefix" else 1.7)
        vram = 16e-9 * params + 4e-9 * 1024.0 * width * rng.uniform(0.5, 1.5, (n_layers, 1))
        latency = 1e-3 * rng.uniform(5.0, 20.0, (n_layers, 1)) + flops / 5e10
        costs.append(np.stack([params, flops, vram, latency]))
    value = np.concatenate(values, axis=1)
    cost = np.concatenate(costs, axis=2)
    share = np.array([0.05, 0.05, 0.12, 0.12] if hard else [0.3, 0.3, 0.3, 0.3])
    capacity = share * cost.max(axis=2).sum(axis=1)
    capacity[:2] = np.floor(capacity[:2])
    return as_problem(value / value.max(), cost, capacity, ("trainable_params", "flops", "vram_gb", "latency_ms"))


def as_problem(
    value__lk: np.ndarray, cost__rlk: np.ndarray, capacity: np.ndarray, resources: tuple[str, ...]
) -> AllocationProblem:
    """Arrays over layers l and options k to a problem; option 0 is "none"."""
    n_layers, n_options = value__lk.shape
    # All layers share their options' names: millions of strings would take longer to make than the problem to solve.
    names = tuple(Option("layer", LORA if k else "none", k) for k in range(n_options))
    return AllocationProblem(
        layers=("layer",) * n_layers,
        options=names * n_layers,
        offset=np.arange(n_layers + 1, dtype=np.int64) * n_options,
        value=np.ascontiguousarray(value__lk.reshape(-1)),
        cost__ro=np.ascontiguousarray(cost__rlk.reshape(len(resources), -1)),
        resources=resources,
        capacity=capacity,
        budget=capacity.copy(),
        base=np.zeros(len(resources)),
    )
