"""The kernels beside what a user would reach for instead, on the same buffers in the same run.

    python -m pytest benchmarks/profile_batch_benchmark.py --benchmark-enable

Columns: time of one call; our rate; share of the limit measured in the same run (for reductions the rate at which
BLAS' ddot reads the same buffer, for ghost norms the best float32 matrix product of 1024^3); how many times faster than
pure-Python loops, the best NumPy form, the best torch form, torch with a float32 result (16-bit rows), torch's
addcmul_ (one call per sample), numba (where it is installed); and than the best of those.

Regression gate: the ratio to the best peer must not fall below 0.6 of the one in results/kernel_ratios.json for this
processor (vendor, family, instruction set); where it has none, a line at the end says so and nothing is compared.
Ratios are paired and interleaved, a failing one is measured three times, and the margin is what other work on the
machine can do to a cache-sized case; set LAYERLENS_BENCHMARK_RECORD=benchmarks/results to store this processor's ratios
(and the table) anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from interleaved import Measured, measure
from stored_ratios import STORED, processor_key, read_ratios

from layerlens import kernels

try:
    import numba
except ImportError:
    numba = None

GATE = 0.6
# Peers that have targets of their own.
TO_F32, ADDCMUL, CONVERTED = "torch vector_norm to f32", "torch addcmul_", "torch copy_ addcmul_"
SETTLE_S = 0.01  # longer than an idle OpenMP worker spins
ORIGIN_SIZES = [(256, 1024), (512, 2048), (1024, 4096)]  # the project's origin: layers x hidden


@dataclass
class Case:
    """Our call, its peers (the first word of a name is the family), and what the work amounts to."""

    name: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    threads: int = 1
    limit: Callable[[], object] | None = None
    limit_work: float = 0.0
    work: float = 0.0
    unit: str = "GB/s"
    python: Callable[[], object] | None = None


def python_energy(rows: list[list[float]]) -> list[float]:
    energies = []
    for row in rows:
        total = 0.0
        for value in row:
            total += value * value
        energies.append(total)
    return energies


def python_fisher(rows: list[list[float]]) -> list[float]:
    sums = [0.0] * len(rows[0])
    for row in rows:
        for column, value in enumerate(row):
            sums[column] += value * value
    return [total / len(rows) for total in sums]


if numba is not None:

    @numba.njit(fastmath=True)
    def numba_energy(x):
        out = np.empty(x.shape[0])
        for i in range(x.shape[0]):
            total = 0.0
            for j in range(x.shape[1]):
                total += np.float64(x[i, j]) * np.float64(x[i, j])
            out[i] = total
        return out

    @numba.njit(fastmath=True)
    def numba_fisher(x):
        out = np.zeros(x.shape[1])
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                out[j] += np.float64(x[i, j]) * np.float64(x[i, j])
        return out / x.shape[0]


def read_limit(x: torch.Tensor) -> Callable[[], object]:
    flat = x.view(torch.uint8).reshape(-1).numpy()
    doubles = flat[: flat.size // 8 * 8].view(np.float64)
    return lambda: np.dot(doubles, doubles)


def energy_case(rows: int, cols: int, dtype: torch.dtype, threads: int = 1, python: bool = False) -> Case:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    peers: dict[str, Callable[[], object]] = {
        "torch vector_norm": lambda: torch.linalg.vector_norm(x, dim=1),
        "torch sum of squares": lambda: torch.einsum("ij,ij->i", x, x),
    }
    if dtype in (torch.bfloat16, torch.float16):
        peers[TO_F32] = lambda: torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    if dtype in (torch.float32, torch.float64):
        array = x.numpy()
        peers["numpy einsum"] = lambda: np.einsum("ij,ij->i", array, array)
        peers["numpy square sum"] = lambda: np.square(array).sum(axis=1)
        if numba is not None:
            peers["numba loop"] = lambda: numba_energy(array)
    given = x.numpy() if dtype in (torch.float32, torch.float64) else x  # what NumPy and numba get too
    lists = x.double().tolist() if python else []
    size = x.numel() * x.element_size()
    return Case(
        f"row energy {rows}x{cols} {str(dtype)[6:]} threads={threads}",
        lambda: kernels.row_sum_of_squares(given, threads=threads),
        peers,
        threads,
        limit=read_limit(x),
        limit_work=size,
        work=size,
        python=(lambda: python_energy(lists)) if python else None,
    )


def fisher_case(
    samples: int,
    cols: int,
    dtype: torch.dtype,
    threads: int = 1,
    python: bool = False,
    into: type[np.floating] = np.float64,
) -> Case:
    """Into float64, what callers get by default; into float32 beside peers of the same width."""
    g = torch.randn(samples, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, sums = np.zeros(cols, dtype=into), torch.zeros(cols)

    def addcmul() -> None:
        for row in g:
            sums.addcmul_(row, row, value=1 / samples)

    peers: dict[str, Callable[[], object]] = {
        ADDCMUL: addcmul,
        "torch square mean": lambda: g.float().square().mean(0),
    }
    if dtype == torch.bfloat16:
        converted = torch.empty(cols)

        def convert_and_addcmul() -> None:
            for row in g:
                converted.copy_(row)
                sums.addcmul_(converted, converted, value=1 / samples)

        peers[CONVERTED] = convert_and_addcmul
    if dtype in (torch.float32, torch.float64):
        array = g.numpy()
        peers["numpy einsum"] = lambda: np.einsum("ij,ij->j", array, array)
        peers["numpy square mean"] = lambda: np.square(array).mean(axis=0)
        if numba is not None:
            peers["numba loop"] = lambda: numba_fisher(array)
    lists = g.double().tolist() if python else []
    size = g.numel() * g.element_size()
    return Case(
        f"diagonal Fisher {samples}x{cols} {str(dtype)[6:]}{' to float32' * (into is np.float32)} threads={threads}",
        lambda: kernels.fisher_diagonal(g, out, threads=threads),
        peers,
        threads,
        limit=read_limit(g),
        limit_work=size,
        work=size + 2 * out.nbytes,
        python=(lambda: python_fisher(lists)) if python else None,
    )


def statistics_case(rows: int, cols: int, dtype: torch.dtype) -> Case:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype)

    def passes() -> object:
        return (
            torch.linalg.vector_norm(x, dim=1),
            x.sum(1),
            torch.linalg.vector_norm(x, ord=float("inf"), dim=1),
            x.isfinite().logical_not_().sum(1),
            (x == 0).sum(1),
        )

    size = x.numel() * x.element_size()
    name = f"five statistics {rows}x{cols} {str(dtype)[6:]} threads=1"
    ours = lambda: kernels.row_statistics(x)  # noqa: E731
    return Case(name, ours, {"torch passes": passes}, limit=read_limit(x), limit_work=size, work=size)


def ragged_case(dtype: torch.dtype, threads: int) -> Case:
    """The 144 parameters of the 12 blocks of a ViT-S."""
    dim = 384
    shapes = [(3 * dim, dim), (3 * dim,), (dim, dim), (dim,), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), *[(dim,)] * 5]
    tensors = [torch.randn(shape).to(dtype) for _ in range(12) for shape in shapes]
    size = sum(x.numel() * x.element_size() for x in tensors)
    return Case(
        f"ragged 144 tensors {str(dtype)[6:]} threads={threads}",
        lambda: kernels.ragged_sum_of_squares(tensors, threads=threads),
        {"torch foreach": lambda: torch._foreach_norm(tensors)},
        threads,
        work=size,
    )


def ghost_case(batch: int, tokens: int, d_in: int, d_out: int) -> Case:
    h, d = torch.randn(batch, tokens, d_in), torch.randn(batch, tokens, d_out)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    left_array, right_array = left.numpy(), right.numpy()

    def product() -> object:  # whichever BLAS is faster here is found by the caller's ratio to both
        return np.dot(left_array, right_array)

    gram = kernels.ghost_form(tokens, d_in, d_out) == "gram"
    adds = batch * (tokens * (tokens + 1) / 2 * (d_in + d_out) if gram else tokens * d_in * d_out)
    return Case(
        f"ghost norm {batch}x{tokens} {d_in}->{d_out} float32 threads=1",
        lambda: kernels.ghost_norms(h, d),
        {
            "torch Gram": lambda: ((h @ h.mT) * (d @ d.mT)).sum((1, 2)),
            "torch direct": lambda: (d.mT @ h).square().sum((1, 2)),
        },
        limit=product,
        limit_work=2 * 1024**3,
        work=2 * adds,
        unit="GFLOP/s",
    )


CASES: dict[str, Callable[[], Case]] = {}
for _rows, _cols in ORIGIN_SIZES:
    CASES[f"energy-{_rows}x{_cols}"] = lambda r=_rows, c=_cols: energy_case(r, c, torch.float32, python=True)
    CASES[f"fisher-{_rows}x{_cols}"] = lambda r=_rows, c=_cols: fisher_case(r, c, torch.float32, python=True)
for _dtype in (torch.float64, torch.bfloat16, torch.float16):
    CASES[f"energy-{_dtype}"] = lambda t=_dtype: energy_case(1024, 4096, t)
for _rows, _cols in [(64, 4096), (1024, 4096), (4096, 16384)]:  # in L2, in L3, beyond
    CASES[f"energy-{_rows}x{_cols}-2"] = lambda r=_rows, c=_cols: energy_case(r, c, torch.float32, threads=2)
for _dtype in (torch.bfloat16, torch.float16):
    CASES[f"energy-128MiB-{_dtype}"] = lambda t=_dtype: energy_case(4096, 16384, t)
CASES["energy-256MiB"] = lambda: energy_case(4096, 16384, torch.float32)
CASES["fisher-1"] = lambda: fisher_case(1, 1 << 22, torch.float32)
CASES["fisher-8"] = lambda: fisher_case(8, 1 << 22, torch.float32)
CASES["fisher-8-bf16"] = lambda: fisher_case(8, 1 << 22, torch.bfloat16)
CASES["fisher-1-into-f32"] = lambda: fisher_case(1, 1 << 22, torch.float32, into=np.float32)
CASES["fisher-1-into-f32-64MiB"] = lambda: fisher_case(1, 1 << 24, torch.float32, into=np.float32)
CASES["fisher-8-into-f32"] = lambda: fisher_case(8, 1 << 22, torch.float32, into=np.float32)
CASES["fisher-8-into-f32-512MiB"] = lambda: fisher_case(8, 1 << 24, torch.float32, into=np.float32)
CASES["fisher-8-bf16-into-f32"] = lambda: fisher_case(8, 1 << 22, torch.bfloat16, into=np.float32)
CASES["statistics"] = lambda: statistics_case(1024, 4096, torch.float32)
CASES["statistics-bf16"] = lambda: statistics_case(1024, 4096, torch.bfloat16)
for _threads in (1, 2):
    CASES[f"ragged-{_threads}"] = lambda n=_threads: ragged_case(torch.float32, n)
    CASES[f"ragged-bf16-{_threads}"] = lambda n=_threads: ragged_case(torch.bfloat16, n)
CASES["ghost-64"] = lambda: ghost_case(16, 64, 384, 384)
CASES["ghost-128"] = lambda: ghost_case(8, 128, 768, 3072)
CASES["ghost-512"] = lambda: ghost_case(4, 512, 384, 384)


def best(measured: Measured, peers: list[str]) -> tuple[str, float]:
    """The fastest of the peers and how many times faster than it we are."""
    fastest = min(peers, key=measured.median)
    return fastest, measured.speedup("ours", over=fastest)


def row_of(case: Case, measured: Measured) -> dict[str, str]:
    seconds = measured.median("ours")
    rate = case.work / seconds / 1e9
    row = {"case": case.name, "time": f"{seconds * 1e6:.0f} us", "rate": f"{rate:.0f} {case.unit}", "of limit": ""}
    if case.limit is not None:
        row["of limit"] = f"{rate / (case.limit_work / measured.median('limit') / 1e9):.2f}"
    if case.python is not None:
        once = measure({"python": case.python}, budget_s=0.0, warm_calls=1).median("python")
        row["Python"] = f"{once / seconds:.0f}x"
    for family in ("numpy", "torch", "numba"):
        names = [name for name in case.peers if name.startswith(family)]
        row[family] = f"{best(measured, names)[1]:.2f}x" if names else ""
    for column, name in (("to f32", TO_F32), ("addcmul_", ADDCMUL)):
        row[column] = f"{measured.speedup('ours', over=name):.2f}x" if name in case.peers else ""
    fastest, ratio = best(measured, list(case.peers))
    row["best peer"] = f"{ratio:.2f}x {fastest}"
    return row


@pytest.mark.parametrize("name", CASES)
def test_profile_batch(name: str, benchmark, report: list[dict]) -> None:
    case = CASES[name]()
    torch.set_num_threads(case.threads)
    candidates = {"ours": case.ours, **case.peers, **({"limit": case.limit} if case.limit else {})}
    recording = bool(os.environ.get("LAYERLENS_BENCHMARK_RECORD"))
    stored = {} if recording else read_ratios(STORED).get(processor_key(kernels.isa()), {})
    budget_s, settle_s = (0.5, 0.0) if case.threads == 1 else (3.0, SETTLE_S)
    wanted = GATE * stored.get(case.name, 0.0)
    for _ in range(3):
        measured = measure(candidates, budget_s=budget_s, settle_s=settle_s)
        _, ratio = best(measured, list(case.peers))
        if ratio >= wanted:
            break
    row = row_of(case, measured)
    report.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(case.ours, rounds=10, warmup_rounds=3)
    assert ratio >= wanted, f"{case.name}: {ratio:.2f} of the best peer, stored {stored[case.name]:.2f}, gate {GATE}"
