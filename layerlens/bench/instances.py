"""Instances to measure the solver on: layers of a transformer with their PEFT options, plain random ones, and files.

Published instances of the multiple-choice multidimensional knapsack problem (MMKP) come in three layouts, all of them
numbers in plain text:

- Khan et al. (2002), I01-I13 and Hifi's INST01-INST20: ``n l m``, m capacities, then for each of the n groups its
  number and l lines of one value and m costs. Solutions of old heuristics may follow and are not read.
- The same without a number before each group, as some mirrors keep it.
- Irregular groups (INST21-INST30, the "standard" files): ``n m``, m capacities, then for each group the number of its
  options and so many lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layerlens.exceptions import OptimizationError
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


def read_mmkp(path: Path) -> AllocationProblem:
    """The instance in ``path``: group ``group 1`` ..., resources ``resource 1`` ..., options ``item`` 0, 1, ...

    Raises:
        OptimizationError: the file cannot be read or is no such instance; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise OptimizationError(f"{path}: {reason}; expected an MMKP instance") from None
    tokens = _Tokens(str(path), text)
    header = tokens.line("the header: groups, options of each and resources, or groups and resources")
    if len(header) not in (2, 3):
        raise tokens.error(f"the header has {len(header)} numbers; expected `n l m` or `n m`")
    n_groups, n_resources = tokens.count(header[0], "groups"), tokens.count(header[-1], "resources")
    fixed_size = tokens.count(header[1], "options of each group") if len(header) == 3 else None
    capacity = tokens.take(n_resources, "capacities")
    sizes: list[int] = []
    rows: list[list[float]] = []
    for group in range(1, n_groups + 1):
        size = fixed_size
        if size is None:
            size = tokens.count(tokens.line(f"the number of options of group {group}")[0], f"options of group {group}")
        elif len(tokens.peek()) == 1:  # a number of its own before the group, whatever it is counted from
            tokens.line(f"group {group}")
        rows += [tokens.take(1 + n_resources, f"value and costs of group {group}") for _ in range(size)]
        sizes.append(size)
    table = np.array(rows, dtype=np.float64)
    if np.any(table[:, 1:] < 0.0) or np.any(np.array(capacity) < 0.0):
        raise OptimizationError(f"{path}: costs and capacities must be at least 0")
    groups = tuple(f"group {group + 1}" for group in range(n_groups))
    return AllocationProblem(
        layers=groups,
        options=tuple(
            Option(name, "item", item) for name, size in zip(groups, sizes, strict=True) for item in range(size)
        ),
        offset=np.concatenate(([0], np.cumsum(sizes))).astype(np.int64),
        value=np.ascontiguousarray(table[:, 0]),
        cost__ro=np.ascontiguousarray(table[:, 1:].T),
        resources=tuple(f"resource {r + 1}" for r in range(n_resources)),
        capacity=np.array(capacity),
        budget=np.array(capacity),
        base=np.zeros(n_resources),
    )


@dataclass
class _Tokens:
    """Numbers of a file, line by line; blank lines do not count."""

    path: str
    text: str

    def __post_init__(self) -> None:
        numbered = enumerate(self.text.splitlines(), 1)
        self.lines = [(number, line.split()) for number, line in numbered if line.strip()]
        self.at = 0

    def error(self, problem: str) -> OptimizationError:
        number = self.lines[min(max(self.at - 1, 0), len(self.lines) - 1)][0] if self.lines else 1
        return OptimizationError(f"{self.path}:{number}: {problem}")

    def peek(self) -> list[str]:
        return self.lines[self.at][1] if self.at < len(self.lines) else []

    def line(self, what: str) -> list[str]:
        if self.at == len(self.lines):
            raise self.error(f"the file ends before {what}")
        self.at += 1
        return self.lines[self.at - 1][1]

    def take(self, count: int, what: str) -> list[float]:
        """``count`` numbers, on one line or, where they do not fit one, on several."""
        words: list[str] = []
        while len(words) < count:
            words += self.line(what)
        if len(words) > count:
            raise self.error(f"{what}: expected {count} numbers, got {len(words)}")
        numbers = [self._number(word, what) for word in words]
        return numbers

    def count(self, word: str, what: str) -> int:
        number = self._number(word, what)
        if number < 1 or number != int(number):
            raise self.error(f"{what}: expected a whole number above 0, got {word}")
        return int(number)

    def _number(self, word: str, what: str) -> float:
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.error(f"{what}: expected a number, got {word!r}")
        return number
