"""``layerlens train``: a manifest and the data in; a trained adapter, its metrics and what it took out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from layerlens.config import RunConfig
from layerlens.config.training import REPORTS
from layerlens.cost.measure import forward_ms
from layerlens.data import Dataset, load_dataset
from layerlens.data.labels import in_order_of
from layerlens.exceptions import ConfigurationError, ManifestError, TrainingError
from layerlens.integrations.checkpointing import checkpoint_blocks
from layerlens.integrations.ctc_vocabulary import save_vocabulary
from layerlens.integrations.failures import told_of_failure
from layerlens.integrations.model_code import model_code
from layerlens.integrations.peft import base_of
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.torch_modules import in_evaluation_mode, without_dropout
from layerlens.integrations.torchvision_import import make_torchvision_importable
from layerlens.jobs.baseline import baseline_facts, prepare_baseline
from layerlens.jobs.inputs import check_model
from layerlens.jobs.job import Job, Warn, Warnings, unheard
from layerlens.jobs.own_code import task_parts, told
from layerlens.jobs.recorded import config_of, recorded_settings
from layerlens.jobs.result import REPORT_FILE, observed, published
from layerlens.jobs.solve import versions
from layerlens.jobs.train_report import METRICS_FILE, refresh_run_report, write_training_report
from layerlens.manifest.files import read_document, write_manifest
from layerlens.methods import injected_sizes
from layerlens.models import Manifest
from layerlens.models.data_summary import DataSummary
from layerlens.storage import shown
from layerlens.tasks import Task, make_batches, task_for
from layerlens.tasks.lengths import lowered
from layerlens.tasks.metrics import TARGETS
from layerlens.tasks.summary import summarise
from layerlens.tuning import apply, load, read_factors, save
from layerlens.tuning.base_model import base_reference, load_base
from layerlens.tuning.baselines import Finished, Prepared
from layerlens.tuning.card import is_own_card, tuned_card
from layerlens.tuning.checkpoints import last_checkpoint, remove_checkpoints
from layerlens.tuning.directory import ADAPTER_CONFIG, CARD
from layerlens.tuning.export import PEFT_DIRECTORY
from layerlens.tuning.fine_tune import TrainingResult
from layerlens.tuning.initialization import ADAPTER_WEIGHTS
from layerlens.tuning.reporting import reporting_names
from layerlens.tuning.samples import TrainingData, evaluate, on_device, training_data
from layerlens.tuning.storage import MODULES_FILE
from layerlens.tuning.training import fine_tune
from layerlens.utils.atomic import atomic_write_text, check_writable, staged_directory
from layerlens.utils.code_identity import CodeIdentity
from layerlens.utils.launch import is_main_process
from layerlens.utils.observer import observed_stage
from layerlens.utils.progress import Progress, silent
from layerlens.utils.threads import set_threads
from layerlens.utils.user_code import REFERENCE

CHECKPOINTS = "checkpoints"
OWNED = (METRICS_FILE, "manifest.json", "manifest.yaml", REPORT_FILE)
TRAINED_FILES = (*OWNED, ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODULES_FILE)
TIMING_SECONDS = 0.5
SUMMARISED = 256
"""Training samples that the figures of the data are of."""


@dataclass(frozen=True)
class TrainedModel:
    """A finished ``layerlens train``.

    Args:
        directory: has PEFT's files, layerlens_modules.safetensors, the manifest and metrics.json;
            ``layerlens.tuning.load`` and, for its LoRA part, PEFT read it.
        files: what was written, by name.
        before, after: metrics of the test split, before the first step and with the weights that were kept.
        inference_ms: forward time of one evaluation batch: "before" of the base model, "after" with its options.
        training: what happened in between.
        warnings: what the user should know, a line each.
        baseline: its name, note, and parameters trained and kept; empty where the manifest's choice was trained.
        manifest: what was trained; None where it was a baseline.
        data: what was read, with figures of some of the training samples.
    """

    directory: Path
    files: dict[str, Path]
    before: dict[str, float]
    after: dict[str, float]
    inference_ms: dict[str, float]
    training: TrainingResult
    warnings: tuple[str, ...] = ()
    baseline: dict[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None
    data: DataSummary | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Its figures by name, as experiment trackers have them."""
        training = self.training
        found = {f"before.{name}": value for name, value in self.before.items()}
        found |= {f"after.{name}": value for name, value in self.after.items()}
        found |= {f"inference_ms.{name}": value for name, value in self.inference_ms.items()}
        return found | {
            "best_step": training.best_step,
            "trained_parameters": training.trained_parameters,
            "train_seconds": training.train_seconds,
            "tokens_per_second": training.tokens_per_second,
            "peak_memory_gb": training.peak_memory_gb,
        }

    @property
    def steps(self) -> list[dict[str, float]]:
        """Training loss of every optimiser step, with the evaluation after it where there was one; step 0 is first."""
        rows = [{"train.loss": loss} for loss in self.training.losses]
        for evaluation in self.training.evaluations:
            rows[int(evaluation["step"]) - 1] |= {f"eval.{k}": v for k, v in evaluation.items() if k != "step"}
        return [{}, *rows]


@dataclass(frozen=True)
class Order:
    """What is to be trained; see ``train_manifest``."""

    path: Path
    model: str | None
    baseline: str | None
    restart: bool
    keep_checkpoints: bool
    start: Path | None = None


def train_config(manifest: Manifest, overrides: Sequence[str] = (), origin: str = "provenance.config") -> RunConfig:
    """The configuration of the run that wrote ``manifest``, which training continues with where no other is given.

    Raises:
        ConfigurationError: see ``config_of``; or it names Python code, which runs only when the user's own
            configuration says so.
    """
    recorded = recorded_settings(manifest)
    named = {
        "model.factory": (recorded.get("model") or {}).get("factory"),
        "model.loss": (recorded.get("model") or {}).get("loss"),
        "data.source": (recorded.get("data") or {}).get("source"),
        "data.collate": (recorded.get("data") or {}).get("collate"),
    }
    said = any(str(one).startswith("model.trust_remote_code=") for one in overrides)
    if (recorded.get("model") or {}).get("trust_remote_code") and not said:
        raise ConfigurationError(
            "model.trust_remote_code: the manifest's run ran Python code of the checkpoint; if you trust it, add --set "
            "model.trust_remote_code=true"
        )
    for key, value in named.items():
        if isinstance(value, str) and REFERENCE.fullmatch(value) and not value.startswith("builtin:"):
            raise ConfigurationError(
                f"the manifest's recorded configuration names Python code ({key}: {value}); if you trust it, give a "
                "configuration that says so with -c CONFIG"
            )
    return config_of(manifest, overrides, origin)


def train_manifest(
    path: Path,
    config: RunConfig,
    *,
    base_dir: Path,
    output: Path,
    model: str | None = None,
    baseline: str | None = None,
    restart: bool = False,
    keep_checkpoints: bool = False,
    start: Path | None = None,
    progress: Progress = silent,
    warn: Warn = unheard,
) -> TrainedModel:
    """Put a manifest into its base model, fine-tune it and write the result; see ``fine_tune`` for how.

    A run that was interrupted continues from its last checkpoint in ``output``/checkpoints.

    Args:
        path: the manifest, a file or a URL.
        config: data, training and runtime. Of its model section only the code that may run is read (``factory``,
            ``loss`` and ``trust_remote_code``), since the manifest names the model.
        base_dir: folder that relative paths in the configuration start from.
        output: directory or URL for the result; other files in it stay.
        model: base model to load, if not the one that the manifest names.
        baseline: train this way of spending the same number of parameters instead of the manifest's own choice (a key
            of ``layerlens.tuning.baselines.BASELINES``).
        restart: begin anew, whatever checkpoints are there.
        keep_checkpoints: leave them there when all is done.
        start: directory of an earlier training of the same manifest, whose weights are gone on with.
        progress: reports the long steps.
        warn: called with each warning for the user, one line at a time.

    Raises:
        LayerLensError: with one line that says what to do; its class has the exit code.
    """
    order = Order(Path(path), model, baseline, restart, keep_checkpoints, start)
    reporting_names(config.training.report_to)  # a wrong name is told before anything is loaded
    with (
        observed("train", config) as outcome,
        published(output, Path(), TRAINED_FILES, resumes=True) as place,
    ):
        manifest, created_at = read_document(order.path)
        if is_main_process():
            check_writable(place.directory)
        threads = set_threads(config.runtime.threads)
        job = Job(config, base_dir, place.directory, progress, Warnings(warn), threads=threads)
        outcome.result = place.publish(_train(job, order, manifest, created_at))
    return outcome.result


@dataclass(frozen=True)
class Trainee:
    """A model, its data, and what is trained on it.

    Args:
        manifest: says what the model is, and how many parameters are trained.
        pretrained: the base model, on its device.
        task: what it is trained for.
        data: training and test samples.
        prepared: the model with what trains in it.
        timed: what inference is timed on.
        before_ms: forward time of the base model alone; None in all processes but the first.
        summary: what was read.
        code: what the base model, its loss and its inputs are made of beside weights.
    """

    manifest: Manifest
    pretrained: PretrainedModel
    task: Task
    data: TrainingData
    prepared: Prepared
    timed: dict[str, torch.Tensor]
    before_ms: float | None
    summary: DataSummary
    code: CodeIdentity


def _train(job: Job, order: Order, manifest: Manifest, created_at: str) -> TrainedModel:
    main = is_main_process()
    job, trainee = _load(job, order, manifest)
    judged = bool(len(trainee.data.evaluation)) and main
    before = _judge(job, trainee, trainee.prepared.model) if judged else {}
    result = _fine_tune(job, order, trainee)
    if not main:
        return TrainedModel(job.output, {}, before, result.metrics, {}, result, tuple(job.warnings.lines))
    finished = trainee.prepared.finish(trainee.prepared.model)
    if finished.model is not trainee.prepared.model and judged:  # cut or converted: what is judged is what is kept
        result = replace(result, metrics=_judge(job, trainee, finished.model.eval()))
    inference_ms = {"before": trainee.before_ms or 0.0, "after": _inference_ms(finished.model, trainee.timed)}
    facts, params = _facts(job, trainee, before, result, inference_ms), manifest.trainable_params
    if order.baseline is not None:
        facts["baseline"] = baseline_facts(order.baseline, manifest, trainee.prepared, finished)
    with observed_stage("save"), staged_directory(job.output, owned=OWNED) as staging:
        files = save(finished.model, staging)
        files |= save_vocabulary(trainee.pretrained, staging)
        if order.baseline is None:
            files |= write_manifest(manifest, staging, created_at=created_at)
        if not is_own_card(job.output / CARD):
            files.pop(CARD, None)
            (staging / CARD).unlink(missing_ok=True)
        elif order.baseline is None:
            files[CARD] = atomic_write_text(staging / CARD, _card(job, trainee, before, result))
        files["metrics"] = atomic_write_text(staging / METRICS_FILE, json.dumps(facts, indent=2) + "\n")
        files["report"] = write_training_report(facts, job.output, order.path, params, staging)
        files = {name: job.output / file.relative_to(staging) for name, file in files.items()}
    refresh_run_report(facts, job.output, order.path, params, job.warnings.add)
    if not order.keep_checkpoints:
        remove_checkpoints(job.output / CHECKPOINTS)
    return TrainedModel(
        job.output, files, before, result.metrics, inference_ms, result, tuple(job.warnings.lines),
        baseline=facts.get("baseline", {}), manifest=manifest if order.baseline is None else None,
        data=trainee.summary,
    )  # fmt: skip


def _load(job: Job, order: Order, manifest: Manifest) -> tuple[Job, Trainee]:
    """The job with the manifest's model in its configuration, and what is trained."""
    config, model = job.config, order.model
    if config.model.factory is not None and config.model.reference == manifest.model.name_or_path:
        model = model or config.model.reference  # the user's own configuration says that this code may run
    with observed_stage("load"), job.progress.stage("Loading model and data"):
        named = {"task": manifest.model.task, "name_or_path": base_reference(manifest, model)}
        config = config.model_copy(update={"model": config.model.model_copy(update=named)})
        shorter, lengths = lowered(config.model, config.data, config.optimization, job.base_dir)
        config = config.model_copy(update=shorter)
        if lengths:
            job.warnings.add(lengths)
        make_torchvision_importable()  # before modules of the user are imported, which may ask transformers for a model
        job = replace(job, config=config)
        dataset = load_dataset(config.data, job.base_dir, config.model.task)
        advice = "train on data with the manifest's classes, or name them in data.label_names"
        dataset = in_order_of(dataset, manifest.model.labels or (), of="the manifest", advice=advice)
        pretrained = load_base(manifest, model, job.base_dir, trust_remote_code=config.model.trust_remote_code)
        check_model(pretrained, config)
        task = task_for(config.model, job.base_dir, dataset)
        data = training_data(dataset, pretrained, task, config, job.warnings.add)
        summary = _summary(task, pretrained, dataset, config)
        base = pretrained.model.to("cuda" if torch.cuda.is_available() else "cpu")
    code = model_code(base, {**task_parts(task), **pretrained.transforms})
    timed = _timed_batch(data, config, task, base)
    before_ms = _inference_ms(base, timed) if is_main_process() else None
    prepared = _prepared(job, order, manifest, pretrained, data)
    if task.reference is not None:
        with job.progress.stage("Computing the reference's log-probabilities"):
            samples: Any
            for samples in (data.train, data.evaluation):
                task.reference(prepared.model, pretrained, samples, config.training.eval_batch_size)
        without_dropout(prepared.model)  # as DPOTrainer trains: else a pair would be compared with its own noise
    return job, Trainee(manifest, pretrained, task, data, prepared, timed, before_ms, summary, code)


def _summary(task: Task, pretrained: PretrainedModel, dataset: Dataset, config: RunConfig) -> DataSummary:
    """What was read; tokens are counted on as many training samples as are looked at."""
    train, _ = dataset.split_test()
    some = train.select([place * len(train) // SUMMARISED for place in range(SUMMARISED)] if len(train) > SUMMARISED
                        else range(len(train)))  # fmt: skip
    seed, size = config.runtime.seed, config.data.batch_size
    batches = make_batches(task, pretrained, some, config.data, batch_size=size, seed=seed, limit=SUMMARISED)
    return summarise(task, pretrained, dataset, some, batches, config.data)


def _prepared(job: Job, order: Order, manifest: Manifest, pretrained: PretrainedModel, data: TrainingData) -> Prepared:
    """The base model with the manifest's options in it, or with the baseline's."""
    try:
        wanted = job.config.training.gradient_checkpointing
        if order.baseline is not None and wanted == "auto":
            job.warnings.add(
                "training.gradient_checkpointing: auto applies to the manifest's choice only; this baseline trains "
                "without checkpoints (set true for checkpoints in every block)"
            )
        elif manifest.checkpointed and wanted is False:
            job.warnings.add(
                f"training.gradient_checkpointing: false, so the {len(manifest.checkpointed)} blocks that the manifest "
                "counts as checkpointed keep their activations, and training needs more memory than it says"
            )
        if order.baseline is not None:
            training, seed = job.config.training, job.config.runtime.seed
            seed = seed if training.seed is None else training.seed
            return prepare_baseline(order.baseline, pretrained, manifest, data, job.config, seed)
        checkpointed = manifest.checkpointed if wanted == "auto" else ()
        if order.start is not None:
            started = _started(order.start, pretrained, manifest)
            if checkpointed:
                checkpoint_blocks(started.model, checkpointed)
            return started
        factors = read_factors(order.path.parent / PEFT_DIRECTORY, manifest.choice)
        kept = manifest.trainable_params
        tuned = apply(pretrained.model, replace(manifest, checkpointed=checkpointed), factors=factors)
        return Prepared(tuned, kept, manifest.choice, lambda tuned: Finished(tuned, kept, manifest.choice))
    except ManifestError as error:
        raise type(error)(f"{shown(order.path)}: {error}") from error


def _started(start: Path, pretrained: PretrainedModel, manifest: Manifest) -> Prepared:
    """The base model with the weights of an earlier training in it.

    Raises:
        ManifestError: they are of another choice than the manifest's.
    """
    tuned = load(pretrained.model, start)
    there = injected_sizes(base_of(tuned))
    chosen = {option.layer: (option.method, option.rank) for option in manifest.choice.chosen}
    if there != chosen:
        differs = next(name for name in (*chosen, *there) if there.get(name) != chosen.get(name))
        raise ManifestError(
            f"--from: {start} has {_in_words(there.get(differs))} in {differs} where the manifest has "
            f"{_in_words(chosen.get(differs))}; give the manifest.json that lies in that directory"
        )
    kept = manifest.trainable_params
    return Prepared(tuned, kept, manifest.choice, lambda tuned: Finished(tuned, kept, manifest.choice))


def _in_words(option: tuple[str, int] | None) -> str:
    return "nothing" if option is None else f"{option[0]} of size {option[1]}"


def _weights_digest(start: Path) -> str:
    """SHA-256 of the weights in a directory that training continues from."""
    digest = hashlib.sha256()
    for name in (ADAPTER_WEIGHTS, MODULES_FILE):
        if (start / name).is_file():
            digest.update((start / name).read_bytes())
    return digest.hexdigest()


def _fine_tune(job: Job, order: Order, trainee: Trainee) -> TrainingResult:
    manifest = trainee.manifest
    identity = {
        "model": manifest.model.fingerprint or "",
        "choice": [*manifest.choice.rows(), manifest.lora.fields()],
        "manifest_seed": manifest.choice.seed,
        "method": order.baseline or "manifest",
        "code": trainee.code.digest,
    }
    if trainee.code.unknown and last_checkpoint(job.output / CHECKPOINTS) is not None and not order.restart:
        job.warnings.add(
            f"checkpoints: training continues from one, although {told(trainee.code.unknown)}; if it changed, give "
            "--restart"
        )
    if order.start is not None:
        identity["start"] = _weights_digest(order.start)
    with observed_stage("train"):
        return fine_tune(
            trainee.prepared.model,
            trainee.data,
            job.config.training,
            task=trainee.task.name,
            checkpoints=job.output / CHECKPOINTS,
            seed=job.config.runtime.seed,
            hooks=trainee.prepared.hooks,
            identity=identity,
            restart=order.restart,
            progress=job.progress,
            tell=job.warnings.add,
            tracking=job.config.tracking,
        )


def _judge(job: Job, trainee: Trainee, model: torch.nn.Module) -> dict[str, float]:
    size = job.config.training.eval_batch_size
    task, progress = trainee.task.name, job.progress
    return evaluate(model, trainee.data, task, batch_size=size, shared=False, progress=progress)


def _timed_batch(data: TrainingData, config: RunConfig, task: Task, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What inference is timed on: the first evaluation batch, without labels."""
    samples = data.evaluation if len(data.evaluation) else data.train
    batch = data.collate(samples[: config.training.eval_batch_size])
    targets = (*task.model_targets, TARGETS)
    inputs = {name: value for name, value in batch.items() if name not in targets}
    return on_device(inputs, next(model.parameters()).device)


def _card(job: Job, trainee: Trainee, before: dict[str, float], result: TrainingResult) -> str:
    """README.md of the directory, in place of PEFT's empty one."""
    choice, data, training = trainee.manifest.choice, trainee.data, job.config.training
    facts = {
        "steps": f"{result.steps}, the weights of step {result.best_step} are kept" if result.steps else "0",
        "learning rate": f"{training.learning_rate:g}",
        "batch size": training.batch_size,
    }
    return tuned_card(
        choice, trainee.manifest.model.place or "the base model",
        data=f"{trainee.summary.source}: {len(data.train):,} training and {len(data.evaluation):,} test samples",
        before=before, after=result.metrics, training=facts,
    )  # fmt: skip


def _inference_ms(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    try:
        with in_evaluation_mode(model):
            return forward_ms(model, batch, seconds=TIMING_SECONDS)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise TrainingError(
            f"{told_of_failure(model, batch, error)}; training.eval_batch_size sets how many samples are in a batch"
        ) from error


def _facts(
    job: Job, trainee: Trainee, before: dict[str, float], result: TrainingResult, inference_ms: dict[str, float]
) -> dict[str, Any]:
    """What metrics.json says; all that depends on this machine and its load is under "measured"."""
    config, data, manifest = job.config, trainee.data, trainee.manifest
    training = asdict(result)
    del training["job"]
    measured = ("train_seconds", "wall_seconds", "tokens_per_second", "peak_memory_gb", "peak_memory_of")
    resumed = training.pop("resumed_from")
    return {
        "task": trainee.task.name,
        "model": {"name_or_path": manifest.model.name_or_path, "fingerprint": manifest.model.fingerprint},
        "samples": {"train": len(data.train), "evaluation": len(data.evaluation), "fingerprint": data.fingerprint},
        "before": before,
        "after": result.metrics,
        "training": {name: value for name, value in training.items() if name not in measured},
        "measured": {
            **{name: training[name] for name in measured},
            "inference_ms": inference_ms,
            "resumed_from": resumed,
        },
        "config": config.training.model_dump(mode="json", exclude=REPORTS),
        "versions": versions(),
    }
