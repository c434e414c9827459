"""The tasks of a sweep on a Ray cluster, one remote call each.

    layerlens sweep sweep.yaml
    python ray_sweep.py sweep.yaml --directory sweep --cpus 4
    layerlens sweep sweep.yaml --collect

The folder of the sweep's file must be the same on all nodes (a shared file system), and LayerLens installed there;
--python names its interpreter where Ray has an environment of its own. Run it again for what is not finished.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import ray


@ray.remote(max_retries=2)
def run(python: str, sweep: str, number: int) -> tuple[int, int, str]:
    """(task, exit code, what it said last)."""
    command = [python, "-m", "layerlens", "sweep", sweep, "--task", str(number)]
    done = subprocess.run(command, cwd=Path(sweep).parent, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.strip()] or [""]
    return number, done.returncode, said[-1]


def main() -> int:
    """Start all tasks, tell of each that ends; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--directory", type=Path, required=True, help="the sweep's directory, with tasks.jsonl")
    parser.add_argument("--cpus", type=int, default=1, help="cores of a task")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has LayerLens")
    arguments = parser.parse_args()
    count = sum(1 for line in (arguments.directory / "tasks.jsonl").read_text().splitlines() if json.loads(line))
    ray.init(log_to_driver=False)
    task = run.options(num_cpus=arguments.cpus)
    waiting = [task.remote(arguments.python, str(arguments.sweep.absolute()), number) for number in range(count)]
    failed = 0
    while waiting:
        (ended,), waiting = ray.wait(waiting)
        number, code, said = ray.get(ended)
        failed += code != 0
        print(f"task {number}: exit code {code}: {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
