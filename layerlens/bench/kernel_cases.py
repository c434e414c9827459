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

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

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
"""Peers that have columns of their own."""

FROM_MEMORY_BYTES = 2**25
"""What moves more than this in a call waits for memory on most machines; what moves less is in the last cache."""
FROM_MEMORY_TARGET, IN_CACHE_TARGET = 0.95, 1.1
"""Wanted ratios to the best peer. From memory nobody can be faster than the memory is."""
LIMIT = "limit: "
"""What the names of limits begin with among the candidates of a measurement."""


@dataclass
class Case:
    """Our call, its peers (the first word of a name is the family), and what the work amounts to.

    Args:
        name: what is done, on what, with how many threads.
        ours: the kernel's call.
        peers: other ways to the same result.
        threads: that our call uses.
        limits: other ways to do ``limit_work`` in a call, as fast as the machine can; the fastest of them counts.
        work: bytes or operations of one call.
        unit: of ``work`` in a second, times 1e9.
        array: the input, where NumPy has its type.
        python: the same by loops.
        wanted: ratio to the best peer, where it is not that of all.
    """

    name: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    threads: int = 1
    limits: dict[str, Callable[[], object]] = field(default_factory=dict)
    limit_work: float = 0.0
    work: float = 0.0
    unit: str = "GB/s"
    array: np.ndarray | None = None
    python: Callable[[], object] | None = None
    wanted: float | None = None

    @property
    def target(self) -> float:
        """The ratio to the best peer that this shall reach."""
        if self.wanted is not None:
            return self.wanted
        reads_memory = self.unit == "GB/s" and self.work > FROM_MEMORY_BYTES
        return FROM_MEMORY_TARGET if reads_memory else IN_CACHE_TARGET

    @property
    def candidates(self) -> dict[str, Callable[[], object]]:
        """All that is measured together: "ours", the peers, and the limits under names that begin with ``LIMIT``."""
        limits = {LIMIT + name: limit for name, limit in self.limits.items()}
        return {"ours": self.ours, **self.peers, **limits}

    def of_limit(self, measured: Measured) -> float | None:
        """Our rate over the fastest one that was measured, ours among them; None without limits.

        Our kernel is one of the readers, so the share is 1 where none is faster, and never more.
        """
        if not self.limits:
            return None
        ours = self.work / measured.median("ours")
        others = [self.limit_work / measured.median(LIMIT + name) for name in self.limits]
        return ours / max(ours, *others)


def readers(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read the whole buffer once and write nothing, none of which is the fastest on every machine."""
    flat = x.view(torch.uint8).reshape(-1).numpy()
    doubles = flat[: flat.size // 8 * 8].view(np.float64)
    tensor = torch.from_numpy(doubles)
    address, size = ctypes.c_void_p(flat.ctypes.data), ctypes.c_size_t(flat.size)
    compare = ctypes.CDLL(None).memcmp
    return {
        "NumPy's BLAS": lambda: np.dot(doubles, doubles),
        "torch's BLAS": lambda: torch.dot(tensor, tensor),
        "torch sum": lambda: tensor.sum(),  # on as many threads as torch has
        # Every line comes from memory once: its second load finds it in the first cache. The loads are memcpy's.
        "memcmp": lambda: compare(address, address, size),
    }


def readers_and_update(x: torch.Tensor, out: np.ndarray) -> dict[str, Callable[[], object]]:
    """Ways to read the buffer once and to read and write ``out`` once, by the ``readers`` and a scaling in place."""

    def both(read: Callable[[], object]) -> Callable[[], object]:
        return lambda: (read(), np.multiply(out, 1.0, out=out))

    return {name: both(read) for name, read in readers(x).items()}


def products(size: int) -> dict[str, Callable[[], object]]:
    """A float32 product of size³ by each of the BLAS libraries here, of which now the one and now the other leads."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    arrays = left.numpy(), right.numpy()
    return {"NumPy's BLAS": lambda: np.dot(*arrays), "torch's BLAS": lambda: torch.mm(left, right)}


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
        if hasattr(np, "vecdot"):  # NumPy 2: one ddot or sdot for each row
            peers["numpy vecdot"] = lambda: np.vecdot(array, array)
    given = x.numpy() if dtype in (torch.float32, torch.float64) else x  # what NumPy and numba get too
    size = x.numel() * x.element_size()
    return Case(
        f"row energy {rows}x{cols} {str(dtype)[6:]} threads={threads}",
        lambda: kernels.row_sum_of_squares(given, threads=threads),
        peers,
        threads,
        limits=readers(x),
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
        limits=readers_and_update(g, out),
        limit_work=size + 2 * out.nbytes,
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
    return Case(name, ours, {"torch passes": passes}, limits=readers(x), limit_work=size, work=size)


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
        wanted=None if threads == 1 else 2.5 if dtype == torch.bfloat16 else 1.4,  # one start of threads, not 144
    )


def ghost_case(batch: int, tokens: int, d_in: int, d_out: int, threads: int = 1) -> Case:
    """Norms of per-sample gradients that are never formed."""
    h, d = torch.randn(batch, tokens, d_in), torch.randn(batch, tokens, d_out)
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
        limits=products(1024),
        limit_work=2 * 1024**3,
        work=2 * adds,
        unit="GFLOP/s",
    )
