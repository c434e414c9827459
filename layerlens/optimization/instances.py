"""Instances to measure the solver on: layers of a transformer with their PEFT options, and plain random ones."""

from __future__ import annotations

import numpy as np

from layerlens.models import AllocationProblem, Option

RANKS = {"lora": 15, "adapter": 10, "prefix": 6}  # with "none": 32 options


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
        efficiency = {"lora": 1.0, "adapter": 0.8, "prefix": 0.6}[method] * rng.uniform(0.7, 1.3, (n_layers, 1))
        values.append(signal * efficiency * np.sqrt(rank) * rng.uniform(0.8, 1.2, (n_layers, count)))
        params = np.round(rank * width * {"lora": 2.0, "adapter": 2.1, "prefix": 1.0}[method])
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


def random_problem(n_layers: int, *, hard: bool, seed: int = 0, n_options: int = 32) -> AllocationProblem:
    """Independent integer costs in 1..1000; values independent of them too, or (hard) close to their mean."""
    rng = np.random.default_rng([seed, n_layers, int(hard)])
    cost = rng.integers(1, 1000, (4, n_layers, n_options)).astype(float)
    cost[:, :, 0] = 0.0
    value = (
        cost.mean(axis=0) + rng.integers(0, 100, (n_layers, n_options))
        if hard
        else (rng.integers(1, 1000, (n_layers, n_options)).astype(float))
    )
    value[:, 0] = 0.0
    return as_problem(value, cost, np.floor(0.15 * cost.max(axis=2).sum(axis=1)), ("a", "b", "c", "d"))


def as_problem(
    value__lk: np.ndarray, cost__rlk: np.ndarray, capacity: np.ndarray, resources: tuple[str, ...]
) -> AllocationProblem:
    """Arrays over layers l and options k to a problem; option 0 is "none"."""
    n_layers, n_options = value__lk.shape
    # All layers share their options' names: millions of strings would take longer to make than the problem to solve.
    names = tuple(Option("layer", "lora" if k else "none", k) for k in range(n_options))
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
