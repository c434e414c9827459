"""A whole run logged to a real MLflow server, and its adapter loaded back from there.

The server is the full MLflow, in an environment of its own: scripts/check_monitoring.sh makes it and insists on it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MLFLOW = Path(os.environ.get("LAYERLENS_MLFLOW", ROOT / ".venv-mlflow/bin/mlflow"))


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not MLFLOW.is_file():
        if os.environ.get("LAYERLENS_REQUIRE_SERVERS"):
            pytest.fail(f"there is no {MLFLOW}")
        pytest.skip("the full MLflow is not installed; scripts/check_monitoring.sh installs it")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(MLFLOW), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    log = (folder / "log").open("w")
    environment = {**os.environ, "PATH": f"{MLFLOW.parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 1800
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=2):
                    break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        log.close()


def test_a_run_is_logged_whole_and_its_adapter_loads(
    mlflow_server: str, tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import mlflow
    from mlflow.tracking import MlflowClient

    result = tiny_run(
        tmp_path,
        optimization={
            "max_trainable_params": 1500, "methods": ["lora"], "lora_ranks": [1, 2],
            "latency_profile": {"batch_size": 2, "sequence_length": 12},
        },
        tracking={
            "trackers": ["mlflow"], "uri": mlflow_server, "experiment": "tests", "run_name": "one",
            "register_model": "tiny-adapter", "tags": {"team": "us"},
        },
    )  # fmt: skip
    client = MlflowClient(mlflow_server, mlflow_server)
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["score"] == result.manifest.score
    assert run.data.metrics["gap"] == result.manifest.gap
    assert run.data.params["optimization.max_trainable_params"] == "1500"
    assert run.data.tags["team"] == "us"
    steps = client.get_metric_history(run.info.run_id, "solver.upper_bound")
    assert len(steps) == len(result.files["solver_log"].read_text().splitlines())
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"manifest.json", "manifest.yaml", "report.html", "solver_log.jsonl", "adapter"} <= names
    fetched = Path(client.download_artifacts(run.info.run_id, "manifest.json", str(tmp_path)))
    assert fetched.read_bytes() == result.files["manifest_json"].read_bytes()
    (version,) = client.search_model_versions("name='tiny-adapter'")
    assert version.run_id == run.info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    mlflow.set_tracking_uri(mlflow_server)
    loaded = mlflow.pyfunc.load_model(f"models:/tiny-adapter/{version.version}")
    logits = loaded.predict(["a lovely thing", "a dull thing"])
    assert [len(row) for row in logits] == [2, 2]
