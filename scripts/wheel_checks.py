#!/usr/bin/env python3
"""What an installed wheel must do wherever it lands; run by scripts/check_wheel.sh with that installation's Python.

    python wheel_checks.py demos/origin_quickstart.py

Prints a line for each check and ends with exit code 1 at the first that fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

FORKED = """
import numpy as np, os
{imports}
x = np.ones((64, 100_000), dtype=np.float32)
assert row_sum_of_squares(x, threads=2)[0] == 100_000
child = os.fork()
if child == 0:
    os._exit(0 if row_sum_of_squares(x, threads=2)[0] == 100_000 else 1)
assert os.waitpid(child, 0)[1] == 0, "the forked child failed"
torch.set_num_threads(2)
torch.ones(512, 512) @ torch.ones(512, 512)
assert row_sum_of_squares(x, threads=2)[0] == 100_000
runtimes = {{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}}
assert len(runtimes) == 1, f"more than one OpenMP runtime: {{runtimes}}"
print(*runtimes)
"""
IMPORT_ORDERS = {
    "layerlens first": "from layerlens.kernels import row_sum_of_squares\nimport torch",
    "torch first": "import torch\nfrom layerlens.kernels import row_sum_of_squares",
}


def kernels_equal_their_twins() -> str:
    import numpy as np

    from layerlens.kernels import available_isas, gradient_energy, reference, row_sum_of_squares

    x = np.random.default_rng(0).normal(size=(37, 1001)).astype(np.float32)
    np.testing.assert_allclose(row_sum_of_squares(x, threads=2), reference.row_sum_of_squares(x), rtol=6e-7)
    np.testing.assert_allclose(gradient_energy(x), (x.astype(np.float64) ** 2).sum(), rtol=6e-7)
    return ", ".join(available_isas())


def command_line_answers() -> str:
    run = subprocess.run([sys.executable, "-m", "layerlens", "doctor", "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return f"{len(run.stdout)} bytes of JSON"


def origin_quickstart(origin: Path) -> str:
    run = subprocess.run([sys.executable, str(origin)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]


def one_openmp_runtime() -> str:
    found = {}
    for order, imports in IMPORT_ORDERS.items():
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", FORKED.format(imports=imports)],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, f"{order}: {run.stderr}"
        found[order] = run.stdout.strip()
    return "; ".join(f"{order}: {path}" for order, path in found.items())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("origin", type=Path, nargs="?", help="the origin's quickstart (demos/origin_quickstart.py)")
    parser.add_argument("--kernels-only", action="store_true", help="only what needs NumPy alone")
    arguments = parser.parse_args()
    if arguments.origin is None and not arguments.kernels_only:
        parser.error("give the origin's quickstart, or --kernels-only")
    checks = {
        "kernels equal their NumPy twins": kernels_equal_their_twins,
        "command line": command_line_answers,
        "origin's quickstart and its solver": lambda: origin_quickstart(arguments.origin),
        "one OpenMP runtime beside torch, safe after fork": one_openmp_runtime,
    }
    for name, check in list(checks.items())[: 1 if arguments.kernels_only else None]:
        try:
            print(f"ok    {name}: {check()}", flush=True)
        except Exception as error:
            print(f"FAIL  {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
