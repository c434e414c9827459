"""Prints what the benchmarks measured as one table at the end, and keeps the ratios when asked to."""

from __future__ import annotations

import os

# Before NumPy and torch load: BLAS on one thread, since the limits are per thread. OpenMP keeps its own waiting policy,
# under which users run; layerlens/bench/kernel_cases.py keeps one runtime's spinning workers out of another's time.
os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not let files import their neighbours

from stored_ratios import STORED, missing_ratios, never_met, processor_key, record_ratios

from layerlens.utils.processor import processor_name

ROWS = pytest.StashKey[list[dict]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def report(request: pytest.FixtureRequest) -> list[dict]:
    """Rows of the table at the end; each is column -> text."""
    return request.config.stash[ROWS]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    from layerlens import kernels

    columns = list(dict.fromkeys(column for row in rows for column in row))
    widths = {column: max(len(column), *(len(row.get(column, "")) for row in rows)) for column in columns}
    lines = [
        f"{processor_name()}, {os.cpu_count()} cores, {kernels.isa()}, load {os.getloadavg()[0]:.1f} (1 is this run); "
        "times are medians, ratios medians of paired ratios",
        "  ".join(column.ljust(widths[column]) for column in columns),
        *("  ".join(row.get(column, "").ljust(widths[column]) for column in columns) for row in rows),
    ]
    terminalreporter.write_line("")
    for line in lines:
        terminalreporter.write_line(line.rstrip())
    target = os.environ.get("LAYERLENS_BENCHMARK_RECORD")
    stored = STORED
    if target:
        stored = Path(target) / "kernel_ratios.json"
        stored.parent.mkdir(parents=True, exist_ok=True)
        (stored.parent / "kernels.txt").write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
        compared = [row for row in rows if row.get("best peer")]
        ratios = {row["case"]: float(row["best peer"].split("x")[0]) for row in compared}
        targets = {row["case"]: float(row["wanted"].split("x")[0]) for row in compared}
        record_ratios(stored, processor_key(kernels.isa()), ratios, targets)
    elif missing := missing_ratios(STORED, processor_key(kernels.isa())):
        terminalreporter.write_line(missing)
    for line in never_met(stored):
        terminalreporter.write_line(line)
