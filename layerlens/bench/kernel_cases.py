"""What the kernels are compared with (our call, what a user would reach for instead, and the machine's own limit), and
the paired measurement of all of them.

`layerlens bench` times a few of these; `benchmarks/profile_batch_benchmark.py` all of them, as a regression gate.

Paired measurement: all candidates on the same buffers, in rotating order, compared round by round.

On a machine with other work a single time says little; the median over rounds of the ratio of two times taken moments
apart says much more. A candidate that writes large temporaries evicts the next one's data, so the order rotates and
every candidate gets that neighbour equally often.

Candidates with threads of their own get a second care, `settle_s`: another library's idle workers spin for some
milliseconds and would hold the second core, and a worker that has slept is often woken on its caller's core. So each
timing comes after a pause in which all workers fall asleep and as long a stretch of untimed calls that wake its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from layerlens import kernels


@dataclass(frozen=True)
class Measured:
    """Times of one call, in seconds, [round], per candidate."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def speedup(self, name: str, over: str) -> float:
        """Median over the rounds of time(over) / time(name): above 1 where `name` is faster."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return statistics.median(other / own for other, own in pairs)


def measure(
    candidates: dict[str, Callable[[], object]],
    *,
    budget_s: float = 0.5,
    warm_calls: int = 3,
    settle_s: float = 0.0,
) -> Measured:
    """Time each candidate in every round; short ones are repeated within a round so that the clock does not matter."""
    repeats = {}
    for name, call in candidates.items():
        for _ in range(warm_calls):
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
        repeats[name] = max(1, min(1000, int(200e-6 / max(once, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    end = time.perf_counter() + budget_s
    turn = 0
    while turn < 2 * len(names) + 1 or (time.perf_counter() < end and turn < 500):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call, count = candidates[name], repeats[name]
            if settle_s > 0.0:
                time.sleep(settle_s)
                settled = time.perf_counter() + settle_s
                while time.perf_counter() < settled:
                    call()
            start = time.perf_counter()
            for _ in range(count):
                call()
            seconds[name].append((time.perf_counter() - start) / count)
        turn += 1
    return Measured(seconds)


TO_F32, ADDCMUL, CONVERTED = "torch vector_norm to f32", "torch addcmul_", "torch copy_ addcmul_"
"""Peers that have targets of their own."""


@dataclass
class Case:
    """Our call, its peers (the first word of a name is the family), and what the work amounts to.

    Args:
        name: what is done, on what, with how many threads.
        ours: the kernel's call.
        peers: other ways to the same result.
        threads: that our call uses.
        limit: work that the machine cannot do faster, ``limit_work`` of it in a call.
        work: bytes or operations of one call.
        unit: of ``work`` in a second, times 1e9.
        array: the input, where NumPy has its type.
        python: the same by loops.
    """

    name: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    threads: int = 1
    limit: Callable[[], object] | None = None
    limit_work: float = 0.0
    work: float = 0.0
    unit: str = "GB/s"
    array: np.ndarray | None = None
    python: Callable[[], object] | None = None


def read_limit(x: torch.Tensor) -> Callable[[], object]:
    """Reads the whole buffer, once, as fast as BLAS' ddot does."""
    flat = x.view(torch.uint8).reshape(-1).numpy()
    doubles = flat[: flat.size // 8 * 8].view(np.float64)
    return lambda: np.dot(doubles, doubles)


def energy_case(rows: int, cols: int, dtype: torch.dtype, threads: int = 1) -> Case:
    """Row sums of squares."""
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
    given = x.numpy() if dtype in (torch.float32, torch.float64) else x  # what NumPy and numba get too
    size = x.numel() * x.element_size()
    return Case(
        f"row energy {rows}x{cols} {str(dtype)[6:]} threads={threads}",
        lambda: kernels.row_sum_of_squares(given, threads=threads),
        peers,
        threads,
        limit=read_limit(x),
        limit_work=size,
        work=size,
        array=given if isinstance(given, np.ndarray) else None,
    )


def fisher_case(
    samples: int,
    cols: int,
    dtype: torch.dtype,
    threads: int = 1,
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
    size = g.numel() * g.element_size()
    return Case(
        f"diagonal Fisher {samples}x{cols} {str(dtype)[6:]}{' to float32' * (into is np.float32)} threads={threads}",
        lambda: kernels.fisher_diagonal(g, out, threads=threads),
        peers,
        threads,
        limit=read_limit(g),
        limit_work=size,
        work=size + 2 * out.nbytes,
        array=g.numpy() if dtype in (torch.float32, torch.float64) else None,
    )


def statistics_case(rows: int, cols: int, dtype: torch.dtype) -> Case:
    """Five statistics of every row in one pass."""
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


def ragged_case(dtype: torch.dtype, threads: int, dim: int = 384) -> Case:
    """The 144 parameters of 12 transformer blocks, a ViT-S' where ``dim`` is 384."""
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


def ghost_case(batch: int, tokens: int, d_in: int, d_out: int, threads: int = 1) -> Case:
    """Norms of per-sample gradients that are never formed."""
    h, d = torch.randn(batch, tokens, d_in), torch.randn(batch, tokens, d_out)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    left_array, right_array = left.numpy(), right.numpy()

    def product() -> object:  # whichever BLAS is faster here is found by the caller's ratio to both
        return np.dot(left_array, right_array)

    gram = kernels.ghost_form(tokens, d_in, d_out) == "gram"
    adds = batch * (tokens * (tokens + 1) / 2 * (d_in + d_out) if gram else tokens * d_in * d_out)
    return Case(
        f"ghost norm {batch}x{tokens} {d_in}->{d_out} float32 threads={threads}",
        lambda: kernels.ghost_norms(h, d, threads=threads),
        {
            "torch Gram": lambda: ((h @ h.mT) * (d @ d.mT)).sum((1, 2)),
            "torch direct": lambda: (d.mT @ h).square().sum((1, 2)),
        },
        threads=threads,
        limit=product,
        limit_work=2 * 1024**3,
        work=2 * adds,
        unit="GFLOP/s",
    )
