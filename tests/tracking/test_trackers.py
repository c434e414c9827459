"""What trackers are told, with real ones: TensorBoard's files, a tracker of one's own, a server that is down."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from layerlens.config import TrackingConfig
from layerlens.exceptions import ConfigurationError, TrackingError
from layerlens.tracking.observer import tracking_observers


def test_tensorboard_has_figures_parameters_and_the_plan(tiny_run, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tiny_run(
        tmp_path, tracking={"trackers": ["tensorboard"], "log_dir": str(tmp_path / "logs"), "run_name": "one"}
    )
    found = EventAccumulator(str(tmp_path / "logs/layerlens/one")).Reload()
    (score,) = found.Scalars("score")
    assert score.value == pytest.approx(result.manifest.score, rel=1e-6)  # TensorBoard keeps float32
    (share,) = found.Scalars("use/trainable_params.share")
    assert 0 < share.value <= 1
    assert len(found.Scalars("solver/upper_bound")) == len(result.files["solver_log"].read_text().splitlines())
    text = found.Tensors("manifest/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "schema_version" in text


OURS = {"group": "layerlens.trackers"}


class Recording:
    """A tracker of one's own."""

    runs: list[Recording] = []  # noqa: RUF012

    def __init__(self, config: TrackingConfig) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.runs.append(self)

    def start(self, kind: str, parameters: Any) -> None:
        self.calls.append(("start", (kind, dict(parameters))))

    def log_metrics(self, metrics: Any, step: int = 0) -> None:
        self.calls.append(("metrics", {"step": step, **metrics}))

    def log_files(self, files: Any) -> None:
        self.calls.append(("files", {name: path.read_bytes() for name, path in files.items()}))

    def log_adapter(self, files: Any, manifest: Any) -> None:
        self.calls.append(("adapter", {name: path.read_bytes() for name, path in files.items()}))

    def finish(self, status: str) -> None:
        self.calls.append(("finish", status))


class Broken(Recording):
    def log_metrics(self, metrics: Any, step: int = 0) -> None:
        raise OSError("the disk of the tracker is full")


@pytest.fixture(autouse=True)
def _entry_points(monkeypatch: pytest.MonkeyPatch):
    """As a package's metadata would register them."""
    Recording.runs.clear()
    monkeypatch.setitem(__import__("sys").modules, "own_trackers", type("own_trackers", (), globals()))
    names = ("Recording", "Broken")
    points = [metadata.EntryPoint(name.lower(), f"own_trackers:{name}", "layerlens.trackers") for name in names]
    real = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **asked: points if asked == OURS else real(**asked))


def test_a_tracker_of_ones_own_is_told_everything(tiny_run, tmp_path: Path):
    result = tiny_run(tmp_path, tracking={"trackers": ["recording"]})
    (run,) = Recording.runs
    told = dict(run.calls)
    kind, parameters = told["start"]
    assert kind == "run"
    assert parameters["optimization.max_trainable_params"] == 1500
    assert not [name for name in parameters if name.startswith(("tracking", "telemetry", "output"))]
    assert {"manifest_json", "report"} <= told["files"].keys()
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    adapter |= {"layerlens_modules.safetensors"} if "modules" in result.files else set()
    assert told["adapter"].keys() == adapter
    assert run.calls[-1] == ("finish", "finished")


def test_a_training_is_told_step_by_step(tiny_run, tiny_settings, tmp_path: Path):
    from layerlens.jobs.train import train_manifest

    manifest = tiny_run(tmp_path).files["manifest_json"]
    training = {"max_steps": 3, "eval_every": 2, "batch_size": 4, "eval_samples": 8}
    config = tiny_settings(tracking={"trackers": ["recording"]}, training=training)
    result = train_manifest(manifest, config, base_dir=tmp_path, output=tmp_path / "tuned")
    (run,) = Recording.runs
    assert run.calls[0][1][0] == "train"
    metrics = [call[1] for call in run.calls if call[0] == "metrics"]
    losses = {told["step"]: told["train.loss"] for told in metrics if "train.loss" in told}
    assert losses == dict(enumerate(result.training.losses, start=1))
    assert {told["step"] for told in metrics if "eval.accuracy" in told} == {2, 3}
    assert metrics[0]["after.accuracy"] == result.after["accuracy"]
    told = dict(run.calls)
    for name, content in told["adapter"].items():
        assert content == (result.directory / name).read_bytes()
    assert "metrics" in told["files"]
    assert run.calls[-1] == ("finish", "finished")


def test_of_several_processes_one_is_tracked(tiny_optimize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    tiny_optimize(tmp_path, tracking={"trackers": ["recording"]})
    assert not Recording.runs


def test_a_tracker_that_breaks_costs_a_warning(tiny_run, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tiny_run(tmp_path, tracking={"trackers": ["broken", "recording"]})
    assert (tmp_path / "out/manifest.json").is_file()
    assert "the disk of the tracker is full; the run goes on without it" in caplog.text
    assert Recording.runs[1].calls[-1] == ("finish", "finished")


def test_a_failed_job_is_a_failed_run(tiny_optimize, tmp_path: Path):
    with pytest.raises(Exception, match="max_vram_gb"):
        tiny_optimize(
            tmp_path,
            tracking={"trackers": ["recording"]},
            optimization={"max_vram_gb": 1e-9, "latency_profile": {"batch_size": 2, "sequence_length": 12}},
        )
    assert Recording.runs[0].calls[-1] == ("finish", "failed")


def test_a_server_that_is_down_is_said_before_the_work(tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("layerlens.jobs.load.load_dataset", lambda *_: pytest.fail("work has begun"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"the MLflow server at http://127\.0\.0\.1:9 cannot be used"):
        tiny_run(tmp_path, tracking={"trackers": ["mlflow"], "uri": "http://127.0.0.1:9"})


def test_unknown_trackers_and_addresses_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigurationError, match="known: mlflow, tensorboard, broken, recording"):
        tracking_observers(TrackingConfig(trackers=("wandb",)))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match="no MLflow server is named"):
        tracking_observers(TrackingConfig(trackers=("mlflow",)))
    with pytest.raises(ConfigurationError, match="must not hold a user or password") as caught:
        TrackingConfig(uri="http://me:sesame@host")
    assert "sesame" not in str(caught.value)
