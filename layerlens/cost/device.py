"""A device, measured: how long its tensor operations take, from a minute of timing; kept in a file for this machine.

Every kind of operation has time = overhead + FLOPs / rate + bytes / bandwidth, fitted by non-negative least squares on
relative errors over sizes from tens of KiB to 16 MiB. Outputs are kept for a while, as a training step keeps them: what
an operation writes to is not in the cache. Products take other operands in every call: weights and kept activations
were last read long ago. Memory that is new to the process costs extra, by the GB. In the end a step of a small
transformer is timed, and the rates are scaled to it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from layerlens.cost.measure import time_ms
from layerlens.cost.rates import DeviceProfile, Rates
from layerlens.cost.trace import trace_step
from layerlens.exceptions import OutputError
from layerlens.faults import DeviceFault
from layerlens.models.step import (
    ATTENTION,
    CURVE,
    KINDS,
    MATMUL,
    MEMORY,
    NORM,
    RANDOM,
    SAFE_SOFTMAX,
    SLOPE,
    STRIDED,
    VIEW,
)
from layerlens.utils.atomic import atomic_write_text
from layerlens.utils.processor import processor_name
from layerlens.utils.progress import Progress, silent

FORMAT = 4
"""A file of another format is measured again."""
SECONDS = 0.08
KEPT_BYTES = 64 * 2**20
KEPT_OUTPUTS = 2048
"""Outputs of a timed operation that are kept: as many as fit, not more than these. A step writes far more than caches
hold before it comes back to the same memory."""
FRESH_ELEMENTS = 2**24
"""A float32 tensor of 64 MiB: above what glibc ever keeps for reuse."""
Timing = Callable[[Callable[[], object], float], float]
"""(work, share of the usual time to spend on it) -> milliseconds."""


def calibrate(progress: Progress = silent, *, seconds: float = SECONDS, cpu_time: bool = False) -> DeviceProfile:
    """Measure the device that torch computes on, with the threads that torch is set to.

    Args:
        progress: reports the timings.
        seconds: time spent on each of about 90 sizes.
        cpu_time: see ``time_ms``; for one thread on a machine that others use.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = list(_cases(device))

    def timed(work: Callable[[], object], share: float = 1.0) -> float:
        return time_ms(_synchronised(work, device), seconds=share * seconds, cpu_time=cpu_time)

    measured: dict[str, list[tuple[float, float, float, float]]] = {kind: [] for kind in KINDS}
    with progress.stage("Timing operations", total=len(cases) + 4) as advance:
        for kind, flops, n_bytes, work in cases:
            measured[kind].append((flops, n_bytes, 1.0, timed(_kept(work))))
            advance(1)
        fits = {kind: _fit(rows) for kind, rows in measured.items() if rows}
        rates = {kind: fit[0] for kind, fit in fits.items()}
        parameter_us = _optimizer_us(device, timed)
        advance(1)
        fresh_ms_per_gb = _fresh_ms_per_gb(device, timed)
        advance(1)
        rates = _with_host_overhead(rates, device, timed)
        advance(1)
        rates = _as_in_a_step(rates, fresh_ms_per_gb, device, timed)
        advance(1)
    return DeviceProfile(
        device=device_name(device),
        threads=torch.get_num_threads(),
        rates=rates,
        parameter_us=parameter_us,
        fresh_ms_per_gb=fresh_ms_per_gb,
        fit_error={kind: fit[1] for kind, fit in fits.items()},
    )


def profile_path(cache_dir: Path) -> Path:
    """Where the profile of this device with this number of threads is kept below ``cache_dir``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = f"{device_name(device)}|{torch.get_num_threads()}|{torch.__version__}"
    return cache_dir / f"device-{hashlib.sha256(told.encode()).hexdigest()[:12]}.json"


def save_profile(profile: DeviceProfile, path: Path) -> Path:
    """Write the profile as JSON."""
    return atomic_write_text(path, json.dumps({"format": FORMAT, **asdict(profile)}, indent=2) + "\n")


def load_profile(path: Path) -> DeviceProfile | None:
    """The profile in ``path``; None where there is none.

    Raises:
        OutputError: the file is there and is no such profile.
    """
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT:
            return None
        return DeviceProfile.of(fields)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OutputError(f"{path}: not a device profile ({error}); measure again with: layerlens calibrate").of(
            DeviceFault.DAMAGED
        ) from error


def _cases(device: torch.device) -> Iterator[tuple[str, float, float, Callable[[], object]]]:
    """(kind, FLOPs, bytes, work) over the shapes that fine-tuning meets."""

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    pool = new(KEPT_BYTES // 4)

    def product(a: torch.Tensor, b: torch.Tensor) -> tuple[str, float, float, Callable[[], object]]:
        rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
        batches = a.shape[0] if a.dim() == 3 else 1
        n_bytes = 4.0 * (a.numel() + b.numel() + batches * rows * columns)
        return MATMUL, 2.0 * batches * rows * inner * columns, n_bytes, _on_other_operands(torch.matmul, (a, b), pool)

    for rows in (128, 512, 2048):
        for n_in, n_out in ((4, 384), (384, 4), (16, 768), (768, 16), (384, 384), (384, 1536), (1536, 384), (768, 768)):
            yield product(new(rows, n_in), new(n_out, n_in).T)  # a Linear's weight is stored transposed
    for rank, features in ((8, 384), (384, 384), (384, 1536)):  # gradients of weights: a long sum
        yield product(new(1024, rank).T, new(1024, features))
    for batch, tokens, width in ((48, 64, 32), (96, 128, 32), (48, 128, 64)):  # attention by products
        yield product(new(batch, tokens, width), new(batch, width, tokens))
    for batch, heads, tokens, width in ((2, 12, 64, 32), (8, 12, 128, 32), (4, 12, 128, 64), (8, 4, 256, 64)):
        q = new(batch, heads, tokens, width)
        flops, n_bytes = 4.0 * batch * heads * tokens * tokens * width, 4.0 * 4 * q.numel()
        yield ATTENTION, flops, n_bytes, partial(torch.nn.functional.scaled_dot_product_attention, q, q, q)
        yield ATTENTION, 2.5 * flops, 2.0 * n_bytes, _backward_of_attention(q)  # five products for two
    for size in (2**13, 2**16, 2**18, 2**20, 2**22):  # 32 KiB to 16 MiB: larger blocks are never reused
        x, y = new(size // 128, 128), new(size // 128, 128)
        split = new(size // 4096, 64, 2, 32)  # sequences, tokens, heads, width

        def over(
            kind: str, tensors: int, function: Callable[..., object], *rest: Any, like: torch.Tensor = x, n: int = size
        ) -> tuple[str, float, float, Callable[[], object]]:
            """One operand was written long ago, as what is kept for the backward pass; the others just now."""
            return kind, 0.0, 4.0 * tensors * n, _on_other_operands(lambda one: function(one, *rest), (like,), pool)

        yield over(MEMORY, 3, torch.add, y)
        yield over(MEMORY, 2, torch.mul, 0.5)
        yield over(MEMORY, 2, torch.clone)
        yield STRIDED, 0.0, 8.0 * split.numel(), partial(_contiguous, split.permute(0, 2, 1, 3))
        yield STRIDED, 0.0, 8.0 * split.numel(), partial(_contiguous, split.permute(0, 2, 3, 1))
        yield over(CURVE, 2, torch.nn.functional.gelu)
        yield over(CURVE, 2, torch.tanh)
        yield over(SLOPE, 3, torch.ops.aten.gelu_backward, y)
        yield over(SLOPE, 3, torch.ops.aten.silu_backward, y)
        yield NORM, 0.0, 8.0 * size, partial(torch.softmax, x, dim=-1)
        yield NORM, 0.0, 8.0 * size, partial(torch.nn.functional.layer_norm, x, (128,))
        yield SAFE_SOFTMAX, 0.0, 8.0 * size, partial(torch.ops.aten._safe_softmax, x, -1)
        yield RANDOM, 0.0, 8.0 * size, partial(torch.Tensor.bernoulli_, y.clone(), 0.9)
    yield VIEW, 0.0, 0.0, partial(torch.Tensor.view, new(64, 64), -1)
    yield VIEW, 0.0, 0.0, partial(torch.Tensor.t, new(64, 64))


def _on_other_operands(
    function: Callable[..., object], like: tuple[torch.Tensor, ...], pool: torch.Tensor
) -> Callable[[], object]:
    """``function`` on tensors of these shapes and strides, each call on the next ones in ``pool``, over and over."""
    size = sum(tensor.numel() for tensor in like)
    calls = []
    for start in range(0, pool.numel() - size + 1, size)[:KEPT_OUTPUTS]:
        operands = []
        for tensor in like:
            operands.append(pool.as_strided(tensor.shape, tensor.stride(), start))
            start += tensor.numel()
        calls.append(operands)
    following = itertools.cycle(calls)
    return lambda: function(*next(following))


def _backward_of_attention(q: torch.Tensor) -> Callable[[], object]:
    query, key, value = (q.clone().requires_grad_() for _ in range(3))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    gradient = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, (query, key, value), gradient, retain_graph=True)


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _kept(work: Callable[[], object]) -> Callable[[], object]:
    """``work`` that keeps its last outputs; so many blocks of memory like them are there already."""
    one: Any = work()
    other: Any = work()
    tensors = [leaf for leaf in tree_leaves(one) if isinstance(leaf, torch.Tensor)]
    n_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    kept = max(2, min(KEPT_OUTPUTS, KEPT_BYTES // max(1, n_bytes)))
    outputs = deque([one, other], maxlen=kept)
    again = {leaf.untyped_storage()._cdata for leaf in tree_leaves(other) if isinstance(leaf, torch.Tensor)}
    # A view, or what is changed in place, needs no new memory.
    if n_bytes and again.isdisjoint(tensor.untyped_storage()._cdata for tensor in tensors):
        outputs.extend([torch.empty_like(tensor).fill_(0.0) for tensor in tensors] for _ in range(kept - 2))
    return lambda: outputs.append(work())


def _fresh_ms_per_gb(device: torch.device, timed: Timing) -> float:
    """Writing to new memory against writing to the same again."""
    again = torch.empty(FRESH_ELEMENTS, device=device)
    fresh_ms = timed(lambda: torch.empty(FRESH_ELEMENTS, device=device).fill_(1.0), 4.0)
    again_ms = timed(lambda: again.fill_(1.0), 4.0)
    return max(0.0, (fresh_ms - again_ms) / (1e-9 * again.untyped_storage().nbytes()))


def _fit(rows: list[tuple[float, float, float, float]]) -> tuple[Rates, float]:
    """Rates by non-negative least squares on relative errors, and the median relative error."""
    from scipy.optimize import nnls

    table = np.array(rows)
    features, times = table[:, :3] * np.array([1e-9, 1e-9, 1.0]), table[:, 3]
    scale = np.maximum(features.max(axis=0), 1e-30)  # columns of one magnitude, for the solver's tolerance
    solution, _ = nnls(features / scale / times[:, None], np.ones(len(times)))
    per_gflop, per_gb, fixed = solution / scale
    errors = np.abs(features @ (solution / scale) - times) / times
    return Rates(1e3 * float(fixed), float(per_gflop), float(per_gb)), float(np.median(errors))


def _optimizer_us(device: torch.device, timed: Timing) -> float:
    """µs of a fused AdamW step for each of many small tensors."""
    parameters = [torch.nn.Parameter(torch.zeros(64, device=device)) for _ in range(100)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    return 10.0 * timed(lambda: optimizer.step(), 1.0)


def _with_host_overhead(rates: dict[str, Rates], device: torch.device, timed: Timing) -> dict[str, Rates]:
    """Overheads raised to what an operation costs inside a model: Python, module calls and autograd come on top.

    Measured on a step of a chain of layers that are so small that there is nothing else.
    """
    layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.GELU()) for _ in range(24)]
    model = _Chain(torch.nn.Sequential(*layers)).to(device)
    batch = {"x": torch.randn(4, 8, device=device)}

    def step() -> None:
        model.zero_grad()
        model(**batch).backward()

    trace = trace_step(model, batch, lambda output: output)
    bare = DeviceProfile("", 1, rates, 0.0)
    predicted = sum(map(bare.operation_ms, trace.operations))
    missing_us = 1e3 * (timed(step, 4.0) - predicted) / len(trace.operations)
    return {
        kind: Rates(max(0.0, each.overhead_us + missing_us), each.ms_per_gflop, each.ms_per_gb)
        for kind, each in rates.items()
    }


def _as_in_a_step(
    rates: dict[str, Rates], fresh_ms_per_gb: float, device: torch.device, timed: Timing
) -> dict[str, Rates]:
    """Rates scaled to what operations take inside a step of usual size.

    There they find less of their operands in caches, and less of the page table, than one operation that runs again and
    again. Measured on four frozen blocks of a transformer, through which a gradient goes.
    """
    model = _Chain(torch.nn.Sequential(*(_Block(512, 8) for _ in range(4)))).to(device).requires_grad_(False)
    batch = {"x": torch.randn(4, 256, 512, device=device, requires_grad=True)}

    def step() -> None:
        batch["x"].grad = None
        model(**batch).backward()

    trace = trace_step(model, batch, lambda output: output)
    bare = DeviceProfile("", 1, rates, 0.0, fresh_ms_per_gb)
    overhead_ms = sum(1e-3 * rates[operation.kind].overhead_us for operation in trace.operations)
    predicted = sum(map(bare.operation_ms, trace.operations)) - overhead_ms
    scale = max(1.0, (timed(step, 8.0) - overhead_ms) / predicted)
    return {
        kind: Rates(each.overhead_us, scale * each.ms_per_gflop, scale * each.ms_per_gb) for kind, each in rates.items()
    }


class _Block(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (torch.nn.Linear(width, width) for _ in range(4))
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self.heads, -1)
        inside = self.before(x)
        parts = [each(inside).view(shape).transpose(1, 2) for each in (self.query, self.key, self.value)]
        mixed = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return torch.as_tensor(x + self.down(torch.nn.functional.gelu(self.up(self.between(x)))))


class _Chain(torch.nn.Module):
    def __init__(self, layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layers(x)).sum()


def _synchronised(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    if device.type == "cpu":
        return work

    def waiting() -> None:
        work()
        torch.cuda.synchronize()

    return waiting


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return processor_name()
