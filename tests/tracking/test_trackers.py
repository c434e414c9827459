"""What trackers receive, with real ones: TensorBoard's files, a custom tracker, a server that is down."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from wandb_file import OfflineRun

from layerlens.config import TrackingConfig, TrainingConfig
from layerlens.exceptions import ConfigurationError, TrackingError
from layerlens.tracking.observer import tracking_observers
from layerlens.tuning.reporting import Reporter, reporting_names


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
    """A custom tracker."""

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


TRAINING = {"max_steps": 3, "eval_every": 2, "batch_size": 4, "eval_samples": 8}


def test_a_training_is_told_step_by_step(tiny_settings, statistics: Path, tmp_path: Path, monkeypatch):
    """Trackers when it has ended; W&B and TensorBoard, by transformers' callbacks, while it goes on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from layerlens.jobs.train import train_manifest

    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = {"trackers": ["recording", "wandb"], "log_dir": str(tmp_path / "logs"), "run_name": "one"}
    config = tiny_settings(tracking=tracking, training={**TRAINING, "report_to": ["tensorboard", "wandb"]})
    manifest = statistics.with_name("manifest.json")
    result = train_manifest(manifest, config, base_dir=tmp_path, output=tmp_path / "tuned")
    losses, evaluated = dict(enumerate(result.training.losses, start=1)), {2, 3}
    assert not result.warnings

    (events,) = (tmp_path / "tuned/runs").iterdir()
    board = EventAccumulator(str(events)).Reload()
    assert {point.step: point.value for point in board.Scalars("train/loss")} == pytest.approx(losses, rel=1e-6)
    assert {point.step for point in board.Scalars("eval/accuracy")} == evaluated
    assert {"train/learning_rate", "train/grad_norm"} <= set(board.Tags()["scalars"])

    wandb = OfflineRun(tmp_path / "logs")
    assert (wandb.project, wandb.name, wandb.exit_code) == ("layerlens", "one", 0)
    assert wandb.series("train/loss", "train/global_step") == pytest.approx(losses)
    assert wandb.series("eval/accuracy", "train/global_step").keys() == evaluated
    assert wandb.config["optimization.max_trainable_params"] == 1500  # the tracker's
    assert wandb.config["per_device_train_batch_size"] == 4  # the callback's
    figures = next(row for row in wandb.rows if "score" in row)
    assert figures["after/accuracy"] == result.after["accuracy"]
    assert "adapter_config.json" in wandb.artifacts["model"]
    assert {"manifest.json", "metrics.json", "report.html"} <= set(wandb.artifacts["layerlens-files"])

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
    assert "the disk of the tracker is full; the run continues without it" in caplog.text
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
    with pytest.raises(ConfigurationError, match="known: mlflow, tensorboard, wandb, broken, recording"):
        tracking_observers(TrackingConfig(trackers=("neptune",)))
    monkeypatch.setitem(sys.modules, "layerlens.tracking.wandb_tracker", None)
    with pytest.raises(ConfigurationError, match=r"wandb is not installed; run: pip install 'layerlens\[wandb\]'"):
        tracking_observers(TrackingConfig(trackers=("wandb",)))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match="no MLflow server is named"):
        tracking_observers(TrackingConfig(trackers=("mlflow",)))
    with pytest.raises(ConfigurationError, match="must not hold a user or password") as caught:
        TrackingConfig(uri="http://me:sesame@host")
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "names"), [("none", ()), (["none"], ()), ("wandb", ("wandb",)), (["tensorboard", "wandb"] * 2, None)]
)
def test_report_to_is_what_transformers_takes(asked: Any, names: tuple[str, ...] | None):
    config = TrainingConfig(report_to=asked)
    assert reporting_names(config.report_to) == (("tensorboard", "wandb") if names is None else names)
    assert "report_to" in config.model_dump() or not names


def test_wrong_reporters_are_refused_before_the_work(tiny_settings, statistics: Path, tmp_path: Path, monkeypatch):
    from layerlens.jobs.train import train_manifest

    monkeypatch.setattr("layerlens.jobs.train.load_dataset", lambda *_: pytest.fail("work has begun"))
    wrong: dict[str, Any] = {
        "got 'wandbb'; give azure_ml": "wandbb",
        "comet_ml needs a package that is not": "comet_ml",
        "got 'all'; give .* or all or none alone": ["all", "wandb"],
    }
    for words, names in wrong.items():
        config = tiny_settings(training={"report_to": names})
        with pytest.raises(ConfigurationError, match=words):
            train_manifest(statistics.with_name("manifest.json"), config, base_dir=tmp_path, output=tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_a_reporter_that_fails_is_left_out_and_one_that_cannot_begin_refuses():
    class Failing:
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            raise ValueError("log in\nfirst at https://me:sesame@host")

        def on_log(self, *_: Any, **__: Any) -> None:
            raise OSError("the network is down")

    lines: list[str] = []
    reporter = Reporter("wandb", Failing(), lines.append)
    with pytest.raises(TrackingError, match=r"training\.report_to: wandb cannot be used \(log in first") as caught:
        reporter.on_train_begin(None, None, None)
    assert "sesame" not in str(caught.value)
    for _ in range(2):
        reporter.on_log(None, None, None, logs={})
    assert lines == ["training.report_to: wandb failed (the network is down); the training goes on without it"]


def test_a_manifest_does_not_say_where_anything_is_sent(statistics: Path):
    from layerlens.jobs.train import train_config
    from layerlens.manifest import read_manifest

    manifest = read_manifest(statistics.with_name("manifest.json"))
    recorded = dict(manifest.provenance.config or {})
    assert not {"tracking", "telemetry"} & recorded.keys()
    forged = {**recorded, "tracking": {"trackers": ["mlflow"], "uri": "http://elsewhere"},
              "telemetry": {"push_gateway": "http://elsewhere"},
              "training": {**recorded["training"], "report_to": ["wandb"]}}  # fmt: skip
    config = train_config(replace(manifest, provenance=replace(manifest.provenance, config=forged)))
    assert (config.tracking.trackers, config.telemetry.push_gateway, config.training.report_to) == ((), None, ())
