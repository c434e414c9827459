"""MLflow, through its client only: no global state of the process is changed, and mlflow-skinny is enough."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

# MLflow retries for minutes by default; a job should say in seconds that its server is down.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from layerlens import __version__
from layerlens.config import TrackingConfig
from layerlens.exceptions import TrackingError
from layerlens.integrations.auto_classes import auto_class_for
from layerlens.models import Manifest
from layerlens.registry import TASKS
from layerlens.sources import LoadRequest
from layerlens.storage.filesystem import redacted
from layerlens.tracking.protocol import Parameter, Status

LONGEST_PARAMETER = 6000
BATCH, METRICS_BATCH = 100, 1000
"""Parameters and metrics in one request; more are refused by MLflow."""
ADAPTER_ARTEFACT, LAYERLENS_FILE = "adapter", "layerlens_modules.safetensors"
MODEL_CODE = "adapter_model.py"
SERVED = {"AutoModelForSequenceClassification", "AutoModelForCausalLM"}
"""What ``adapter_model.py`` can load: models that give a text one row of logits, or one for each token."""
logger = logging.getLogger(__name__)
STATUSES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


class MlflowTracker:
    """One MLflow run.

    Raises:
        TrackingError: no server is named, or it cannot be reached.
    """

    def __init__(self, config: TrackingConfig) -> None:
        uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise TrackingError(
                "tracking.uri: no MLflow server is named; set it, or MLFLOW_TRACKING_URI (`mlflow server` starts one)"
            )
        self.uri, self.config = uri, config
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self.run_id = ""
        self.pending: list[Metric] = []

    def start(self, kind: str, parameters: Mapping[str, Parameter]) -> None:
        """Open the run in the configured experiment; logs the parameters."""
        tags = {"layerlens.kind": kind, "layerlens.version": __version__, **self.config.tags}
        try:
            found = self.client.get_experiment_by_name(self.config.experiment)
            experiment = found.experiment_id if found else self.client.create_experiment(self.config.experiment)
            run = self.client.create_run(experiment, run_name=self.config.run_name)
            self.run_id = run.info.run_id
            params = [Param(name, str(value)[:LONGEST_PARAMETER]) for name, value in parameters.items()]
            for first in range(0, len(params), BATCH):
                self.client.log_batch(self.run_id, params=params[first : first + BATCH])
            self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        except (MlflowException, OSError) as error:
            reason = redacted(str(error).strip().splitlines()[0])[:300]
            raise TrackingError(
                f"tracking.uri: the MLflow server at {redacted(self.uri)} cannot be used ({reason}); start it, or "
                "remove mlflow from tracking.trackers"
            ) from error

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Figures at a step; sent together, since a training has thousands of steps."""
        now = int(1000 * time.time())
        self.pending += [Metric(name, float(value), now, step) for name, value in metrics.items()]
        while len(self.pending) >= METRICS_BATCH:
            self._send_metrics()

    def _send_metrics(self) -> None:
        sent, self.pending = self.pending[:METRICS_BATCH], self.pending[METRICS_BATCH:]
        if sent:
            self.client.log_batch(self.run_id, metrics=sent)

    def log_files(self, files: Mapping[str, Path]) -> None:
        """Each file at the top of the run's artefacts."""
        for path in files.values():
            self.client.log_artifact(self.run_id, str(path))

    def log_adapter(self, files: Mapping[str, Path], manifest: Manifest) -> None:
        """The adapter as an MLflow model (pyfunc, models from code: no pickle), and a version of a registered model.

        Of tasks whose input is not a text, the adapter's files alone.
        """
        import mlflow.pyfunc

        task = manifest.model.task or ""
        with tempfile.TemporaryDirectory(prefix="layerlens-") as work:
            adapter, saved = Path(work) / "files", Path(work) / ADAPTER_ARTEFACT
            adapter.mkdir()
            for file, path in files.items():
                shutil.copyfile(path, adapter / file)
            kind = TASKS.get(task)
            if kind is None or kind.auto_class not in SERVED:
                self.client.log_artifacts(self.run_id, str(adapter), ADAPTER_ARTEFACT)
                logger.warning("tracking: a model of the task %s is logged as files, not as an MLflow model", task)
                return
            labels = list(manifest.model.labels or ())
            request = LoadRequest(manifest.model.name_or_path or "", task)
            needs_layerlens = LAYERLENS_FILE in files or not request.source.of_transformers
            facts = {
                "name_or_path": request.reference,
                "package": "" if needs_layerlens else request.source.trust(request).package,
                "task": task,
                "labels": labels,
                "auto_class": auto_class_for(kind.auto_class, manifest.model.model_type or ""),
                "num_labels": kind.n_outputs(labels),
                "dtype": manifest.model.dtype or "float32",
                "seed": manifest.choice.seed,
                "quantization": dict(manifest.model.quantization or {}) or None,
                "tokens": dict(manifest.model.tokens or {}) or None,
            }
            mlflow.pyfunc.save_model(
                str(saved),
                python_model=str(Path(__file__).with_name(MODEL_CODE)),
                artifacts={"adapter": str(adapter)},
                pip_requirements=["peft", "torch", "transformers", *(["layerlens"] if needs_layerlens else [])],
                model_config={"model": facts, "needs_layerlens": needs_layerlens},
            )
            self.client.log_artifacts(self.run_id, str(saved), ADAPTER_ARTEFACT)
        name = self.config.register_model
        if name is not None:
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"{self.client.get_run(self.run_id).info.artifact_uri}/{ADAPTER_ARTEFACT}"
            self.client.create_model_version(name, source, self.run_id)

    def finish(self, status: Status) -> None:
        """Send what is left, and close the run."""
        self._send_metrics()
        self.client.set_terminated(self.run_id, STATUSES[status])
