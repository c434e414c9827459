"""LayerLens as an Airflow DAG (Airflow 3): profile → optimize → fine-tune → register.

Put this file into the DAGs folder. LAYERLENS_PYTHON is an interpreter with LayerLens (Airflow's own environment must
not have it), LAYERLENS_STAGES the path of ``stages.py``; configuration and work place are parameters of the run.
"""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from itertools import pairwise

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Param

PYTHON = os.environ.get("LAYERLENS_PYTHON", "python3")
STAGES = os.environ.get("LAYERLENS_STAGES", "/opt/airflow/dags/stages.py")

with DAG(
    "layerlens",
    description="Measure, choose under budgets with a proved gap, fine-tune, register.",
    start_date=datetime(2026, 1, 1),
    schedule=None,
    catchup=False,
    params={
        "config": Param("s3://bucket/config.yaml", type="string", description="Configuration: a file or a URL."),
        "work": Param("s3://bucket/run", type="string", description="Folder or URL of this run."),
    },
    default_args={"retries": 1, "retry_delay": timedelta(seconds=30)},
    tags=["layerlens"],
) as dag:
    # Parameters reach the shell through the environment, never as a part of the command.
    tasks = [
        BashOperator(
            task_id=name.replace("-", "_"),
            bash_command=f'"$PYTHON" "$STAGES" {name} --config "$CONFIG" --work "$WORK"',
            env={"PYTHON": PYTHON, "STAGES": STAGES, "CONFIG": "{{ params.config }}", "WORK": "{{ params.work }}"},
            append_env=True,
        )
        for name in ("profile", "optimize", "fine-tune", "register")
    ]
    for earlier, later in pairwise(tasks):
        earlier >> later
