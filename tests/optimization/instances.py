"""Knapsack instances for the tests: plain arrays to problems, and random families with awkward corners."""

from __future__ import annotations

import itertools
import math

import numpy as np

from layerlens.methods import enumerate_options, trainable_params
from layerlens.models import AllocationProblem, CostTable, LayerSpec, ModelSpec, Option, UtilityTable


def problem_of(sizes, value, cost__ro, capacity, *, with_none: bool = True) -> AllocationProblem:
    """A problem from arrays; the first option of each group is "none" unless ``with_none`` is false."""
    offset = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    value = np.asarray(value, dtype=np.float64)
    capacity = np.atleast_1d(np.asarray(capacity, dtype=np.float64))
    layers = tuple(f"layer.{g}" for g in range(len(sizes)))
    options = tuple(
        Option(layer, "none" if k == 0 and with_none else "lora", k)
        for layer, size in zip(layers, sizes, strict=True)
        for k in range(size)
    )
    return AllocationProblem(
        layers=layers,
        options=options,
        offset=offset,
        value=value,
        cost__ro=np.ascontiguousarray(np.asarray(cost__ro, dtype=np.float64).reshape(len(capacity), len(value))),
        resources=tuple(f"resource_{r}" for r in range(len(capacity))),
        capacity=capacity,
        budget=capacity.copy(),
        base=np.zeros(len(capacity)),
    )


def random_problem(seed: int, max_allocations: int = 3000) -> AllocationProblem:
    """A small random instance of one of several families: ties, zero costs, equal options, exact budgets, scales."""
    rng = np.random.default_rng(seed)
    n_resources = int(rng.integers(1, 5))
    sizes: list[int] = []
    while len(sizes) < 8:
        size = int(rng.integers(1, 7))
        if math.prod([*sizes, size]) > max_allocations:
            break
        sizes.append(size)
    n_options = sum(sizes)
    family = int(rng.integers(0, 5))
    if family == 0:  # floats
        value, cost = rng.random(n_options), rng.random((n_resources, n_options))
    elif family == 1:  # few distinct numbers: many exact ties
        value = rng.integers(0, 4, n_options).astype(float)
        cost = rng.integers(0, 4, (n_resources, n_options)).astype(float)
    elif family == 2:  # value follows cost: everything is close
        cost = rng.integers(1, 50, (n_resources, n_options)).astype(float)
        value = cost.mean(axis=0) + rng.integers(0, 3, n_options)
    elif family == 3:  # tenths, whose sums are not representable, and negative values
        value = rng.integers(-5, 20, n_options) * 0.1
        cost = rng.integers(0, 10, (n_resources, n_options)) * 0.1
    else:  # parameters, FLOPs, GB, ms: scales far apart
        scale = np.array([1e3, 1e9, 1e-3, 1.0])[:n_resources, None]
        rank = rng.integers(1, 33, n_options)
        cost = np.round(rank * rng.uniform(0.5, 2.0, (n_resources, 1)) * scale, 6)
        value = np.sqrt(rank) * rng.random(n_options)
    offset = np.concatenate(([0], np.cumsum(sizes)))
    cost[:, offset[:-1]] = 0.0
    value[offset[:-1]] = 0.0
    dearest = np.maximum.reduceat(cost, offset[:-1], axis=1).sum(axis=1)
    capacity = dearest * rng.uniform(0.1, 0.9, n_resources)
    if rng.random() < 0.4:  # budgets at exactly what some allocation uses
        choice = [int(rng.integers(begin, end)) for begin, end in itertools.pairwise(offset)]
        capacity = np.array([math.fsum(row[choice]) for row in cost])
    return problem_of(sizes, value, cost, capacity)


def large_problem(
    n_groups: int, n_options: int, n_resources: int, seed: int = 0, *, correlated: bool = False
) -> AllocationProblem:
    """Integer costs in 1..1000 and values that are independent of them, or follow them (hard)."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(1, 1000, (n_resources, n_groups * n_options)).astype(float)
    noise = rng.integers(1, 1000 if not correlated else 100, n_groups * n_options)
    value = noise.astype(float) + (cost.sum(axis=0) / n_resources if correlated else 0.0)
    first = np.arange(n_groups) * n_options
    cost[:, first] = 0.0
    value[first] = 0.0
    dearest = cost.reshape(n_resources, n_groups, n_options).max(axis=2).sum(axis=1)
    return problem_of([n_options] * n_groups, value, cost, np.floor(0.15 * dearest))


def small_model() -> tuple[ModelSpec, UtilityTable, CostTable]:
    """Three layers × (none, lora 1, lora 4, adapter 2), costs in all five resources and a base of three."""
    layers = [LayerSpec(f"layer.{index}", hidden_size=8, methods=("lora", "adapter")) for index in range(3)]
    spec = ModelSpec("small", total_params=1000, layers=layers)
    options = enumerate_options(spec, {"lora": (1, 4), "adapter": (2,)})
    rank = np.array([option.rank for option in options], dtype=np.float64)
    layer = np.repeat(np.arange(1.0, 4.0), 4)
    params = np.array([trainable_params(spec.layers[i // 4], o.method, o.rank) for i, o in enumerate(options)], float)
    cost__ro = np.stack([params, 1e6 * params, 0.25 * (rank > 0), 0.125 * rank, 0.5 * rank])
    base = {"trainable_params": 0.0, "flops": 0.0, "vram_gb": 0.5, "latency_ms": 4.0, "step_ms": 8.0}
    return spec, UtilityTable(options, layer * np.sqrt(rank), "test", "nats"), CostTable(options, cost__ro, base)
