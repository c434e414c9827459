"""Instances of files to measure the solver on.

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
