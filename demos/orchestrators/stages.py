"""The four stages of a pipeline, each a process that reads from and writes to one place: a folder or a URL.

    python stages.py profile   --config config.yaml --work s3://bucket/run-7
    python stages.py optimize  --config config.yaml --work s3://bucket/run-7
    python stages.py fine-tune --config config.yaml --work s3://bucket/run-7
    python stages.py register  --config config.yaml --work s3://bucket/run-7

Orchestrators only put them in a row. Below the place: ``profile/`` (statistics, first manifest), ``plan/`` (manifest
and adapter directory), ``tuned/`` (trained adapter and its figures), ``registered.json``. A stage that is run again
replaces its own result. MLFLOW_TRACKING_URI names a tracking server, OTEL_EXPORTER_OTLP_ENDPOINT a collector.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from layerlens.cli.places import base_dir_of, output_directory, read_config
from layerlens.config import OutputConfig, RunConfig, TrackingConfig
from layerlens.data import load_dataset
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
    """Train the chosen LoRA layers with stock PEFT and Trainer; test accuracy before and after."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    config = config_for(arguments, place(arguments.work, "tuned"))
    manifest = read_manifest(Path(place(arguments.work, "plan", "manifest.json")))
    adapter = local_file(place(arguments.work, "plan", "peft"))
    from layerlens.integrations.transformers import resolve_model_path

    torch.manual_seed(config.runtime.seed)
    base_dir = base_dir_of(Path(arguments.config))
    name = resolve_model_path(manifest.model["name_or_path"], base_dir)
    dataset = load_dataset(config.data, base_dir, config.model.task)
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(dataset.label_names))
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    for part in manifest.model["head_modules"]:
        model.get_submodule(f"base_model.model.{part}").requires_grad_(True)
    encoded = tokenizer(list(dataset.texts), truncation=True, max_length=config.data.max_length)
    rows = [{**{k: encoded[k][i] for k in encoded}, "labels": int(label)} for i, label in enumerate(dataset.labels)]
    random.Random(config.runtime.seed).shuffle(rows)
    rows = rows[: arguments.samples]
    train, test = rows[len(rows) // 5 :], rows[: len(rows) // 5]

    def accuracy(outcome: Any) -> dict[str, float]:
        return {"accuracy": float((outcome.predictions.argmax(-1) == outcome.label_ids).mean())}

    with tempfile.TemporaryDirectory() as checkpoints:
        trainer = Trainer(
            model,
            TrainingArguments(
                checkpoints, max_steps=arguments.steps, learning_rate=5e-3, per_device_train_batch_size=16,
                report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(), seed=config.runtime.seed,
                disable_tqdm=True,
            ),
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
            compute_metrics=accuracy,
        )  # fmt: skip
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        found = {"accuracy_before": before, "accuracy": trainer.evaluate()["eval_accuracy"], "steps": arguments.steps}
    with output_directory(Path(place(arguments.work, "tuned"))) as local:
        model.save_pretrained(str(local / "peft"))
        (local / "figures.json").write_text(json.dumps(found), encoding="utf-8")
    track(arguments, config, found)
    return found


def track(arguments: argparse.Namespace, config: RunConfig, found: dict[str, Any]) -> None:
    """Log the fine-tune to the tracking server, if one is named."""
    if not config.tracking.trackers:
        return
    from layerlens.tracking.mlflow_tracker import MlflowTracker

    tracker = MlflowTracker(config.tracking)
    tracker.start("fine-tune", {"steps": arguments.steps, "work": arguments.work})
    tracker.log_metrics(found)
    tracker.finish("finished")


def register(arguments: argparse.Namespace) -> dict[str, Any]:
    """Say what was made, with its hash, where a deployment looks for it; refuse what is no better than before."""
    figures = json.loads(local_file(place(arguments.work, "tuned", "figures.json")).read_text(encoding="utf-8"))
    if figures["accuracy"] < figures["accuracy_before"]:
        sys.exit(f"not registered: accuracy fell from {figures['accuracy_before']:.3f} to {figures['accuracy']:.3f}")
    weights = local_file(place(arguments.work, "tuned", "peft", "adapter_model.safetensors"))
    entry = {
        "adapter": place(arguments.work, "tuned", "peft"),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "manifest": place(arguments.work, "plan", "manifest.json"),
        **figures,
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
    parser.add_argument("--steps", type=int, default=60, help="training steps of the fine-tune")
    parser.add_argument("--samples", type=int, default=750, help="samples of the fine-tune; a fifth is the test")
    arguments = parser.parse_args()
    print(json.dumps(STAGES[arguments.stage](arguments)))


if __name__ == "__main__":
    main()
