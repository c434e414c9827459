"""Every kernel is called by the product: not by benchmarks and tests alone."""

from __future__ import annotations

import ast
from pathlib import Path

import layerlens
from layerlens import kernels

PACKAGE = Path(layerlens.__file__).parent
# Another shape of arguments of a function in cpp/ that the product calls.
SAME_FUNCTION = {
    "matrix_traces": "ragged_statistics",
    "ragged_sum_of_squares": "gradient_energy",
    "row_moments": "row_statistics",
}


def test_every_kernel_is_called_by_the_product() -> None:
    called = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("kernels", "bench"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kernels":
                called.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module == "layerlens.kernels":
                called |= {alias.name for alias in node.names}
    functions = {name for name in kernels.__all__ if name[0].islower()}
    assert {SAME_FUNCTION.get(name, name) for name in functions} - called == set()
