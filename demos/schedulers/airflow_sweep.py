"""A sweep as an Airflow DAG: list the tasks, run each as a mapped task of its own, collect the table.

    airflow dags trigger layerlens_sweep --conf '{"sweep": "/shared/sweep.yaml", "directory": "/shared/sweep"}'

LAYERLENS_PYTHON (default: python) is an interpreter that has LayerLens, on every worker; the paths are on storage that
all workers share. A mapped task that fails is tried again by itself; those that are finished are skipped at once.
"""

from __future__ import annotations

import json
import os
import subprocess
from datetime import timedelta
from pathlib import Path

from airflow.sdk import Param, dag, get_current_context, task

PYTHON = os.environ.get("LAYERLENS_PYTHON", "python")


def layerlens(*arguments: str) -> None:
    """Run one command; its failure is the task's."""
    sweep = str(get_current_context()["params"]["sweep"])
    subprocess.run([PYTHON, "-m", "layerlens", "sweep", sweep, *arguments], check=True, cwd=Path(sweep).parent)


@dag(
    dag_id="layerlens_sweep",
    schedule=None,
    params={"sweep": Param("sweep.yaml", type="string"), "directory": Param("sweep", type="string")},
    default_args={"retries": 1, "retry_delay": timedelta(seconds=30)},
)
def layerlens_sweep() -> None:
    """List, run, collect."""

    @task
    def numbers() -> list[int]:
        layerlens()
        lines = (Path(get_current_context()["params"]["directory"]) / "tasks.jsonl").read_text().splitlines()
        return [json.loads(line)["task"] for line in lines]

    @task
    def run(number: int) -> None:
        layerlens("--task", str(number))

    @task
    def collect() -> None:
        layerlens("--collect")

    run.expand(number=numbers()) >> collect()


layerlens_sweep()
