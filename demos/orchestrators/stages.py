"""The four stages of a pipeline, each a process that reads from and writes to one place: a folder or a URL.

    python stages.py profile   --config config.yaml --work s3://bucket/run-7
    python stages.py optimize  --config config.yaml --work s3://bucket/run-7
    python stages.py fine-tune --config config.yaml --work s3://bucket/run-7
    python stages.py register  --config config.yaml --work s3://bucket/run-7

Orchestrators only put them in a row. Below the place: ``profile/`` (statistics, first manifest), ``plan/`` (manifest
and adapter directory), ``tuned/`` (trained adapter and its metrics), ``registered/``. A stage that is run again
replaces its own result. MLFLOW_TRACKING_URI names a tracking server, OTEL_EXPORTER_OTLP_ENDPOINT a collector.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from layerlens.utils.threads import let_idle_threads_sleep

let_idle_threads_sleep()  # before torch is loaded, as the command line does

from layerlens.cli.places import base_dir_of, output_directory, read_config
from layerlens.config import OutputConfig, RunConfig, TrackingConfig
from layerlens.jobs.train import train_manifest
from layerlens.manifest import read_manifest
from layerlens.pipeline import optimize_statistics, run_config
from layerlens.storage import joined, local_file, local_or_url, shown
from layerlens.tuning import apply_to_directory


def place(work: str, *names: str) -> str:
    """Something below the work folder or URL."""
    return joined(shown(work), "/".join(names))


def config_for(arguments: argparse.Namespace, directory: str) -> RunConfig:
    """The configuration, writing to ``directory``, tracked where the environment names a server."""
    _, url = local_or_url(directory)
    output = OutputConfig(directory=directory if url else str(Path(directory).absolute()))
    trackers = ("mlflow",) if os.environ.get("MLFLOW_TRACKING_URI") else ()
    return read_config(Path(arguments.config)).model_copy(
        update={"output": output, "tracking": TrackingConfig(trackers=trackers, experiment=arguments.experiment)}
    )


def profile(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the model; the statistics are what the later stages need."""
    result = run_config(
        config_for(arguments, place(arguments.work, "profile")), base_dir=base_dir_of(Path(arguments.config))
    )
    return {"statistics_from_cache": result.statistics_from_cache, "score": result.manifest.score}


def optimize(arguments: argparse.Namespace) -> dict[str, Any]:
    """Choose under the configuration's budgets, and write the adapter directory of the choice."""
    plan = place(arguments.work, "plan")
    result = optimize_statistics(
        Path(place(arguments.work, "profile", "statistics.safetensors")),
        config_for(arguments, plan),
        base_dir=base_dir_of(Path(arguments.config)),
    )
    with output_directory(Path(plan)) as local:
        apply_to_directory(read_manifest(result.files["manifest_json"]), None, local)
    return {"score": result.manifest.score, "gap": result.manifest.gap, "status": result.manifest.status}


def fine_tune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train what was chosen; metrics of the test split before and after. Killed, it continues from its checkpoint."""
    tuned = place(arguments.work, "tuned")
    result = train_manifest(
        Path(place(arguments.work, "plan", "manifest.json")),
        config_for(arguments, tuned),
        base_dir=base_dir_of(Path(arguments.config)),
        output=Path(tuned),
    )
    return {"before": result.before, "after": result.after, "steps": result.training.steps}


def register(arguments: argparse.Namespace) -> dict[str, Any]:
    """Say what was made, with its hashes, where a deployment looks for it; refuse what is worse than before."""
    tuned = local_file(place(arguments.work, "tuned"))
    metrics = json.loads((tuned / "metrics.json").read_text(encoding="utf-8"))
    before, after = metrics["before"]["loss"], metrics["after"]["loss"]
    if after > before:
        sys.exit(f"not registered: the test loss rose from {before:.3f} to {after:.3f}")
    weights = [path for path in sorted(tuned.iterdir()) if path.suffix == ".safetensors"]
    entry = {
        "adapter": place(arguments.work, "tuned"),
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights},
        "manifest": place(arguments.work, "plan", "manifest.json"),
        "before": metrics["before"],
        "after": metrics["after"],
    }
    with output_directory(Path(place(arguments.work, "registered"))) as local:
        local.mkdir(exist_ok=True)
        (local / "registered.json").write_text(json.dumps(entry, indent=2), encoding="utf-8")
    return entry


STAGES = {"profile": profile, "optimize": optimize, "fine-tune": fine_tune, "register": register}


def main() -> None:
    """Do one stage; what it found goes to stdout as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--config", required=True, help="configuration: a file or a URL")
    parser.add_argument("--work", required=True, help="folder or URL of this pipeline run")
    parser.add_argument("--experiment", default="layerlens", help="experiment of the tracking server")
    arguments = parser.parse_args()
    print(json.dumps(STAGES[arguments.stage](arguments)))


if __name__ == "__main__":
    main()
