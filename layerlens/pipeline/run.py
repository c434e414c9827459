"""``layerlens run``: a model and its data in; manifest, adapter directory, statistics and report out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from layerlens.config import RunConfig
from layerlens.cost import cost_table
from layerlens.data import TextDataset, load_dataset
from layerlens.exceptions import ActivationCacheError, ConfigurationError
from layerlens.integrations.transformers import PretrainedModel, load_pretrained, model_spec, task_heads
from layerlens.integrations.weight_matrices import measurable_modules
from layerlens.manifest import write_manifest, write_report
from layerlens.models import Manifest, ModelSpec, ModelStatistics, enumerate_options
from layerlens.pipeline.checks import check_manifest
from layerlens.pipeline.result import CHOICE_FILES, REPORT_FILE, SOLVER_LOG_FILE, STATISTICS_FILE, RunResult
from layerlens.pipeline.solve import Solution, find_allocation, make_manifest, run_provenance, versions
from layerlens.profiling.batches import Batch, make_batches
from layerlens.profiling.cache import SensitivityCache, cache_key, default_cache_dir
from layerlens.profiling.head import fit_head
from layerlens.profiling.measure import measure, refuse_non_finite
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.saved_pass import SavedPass
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.profiling.tasks import TASKS
from layerlens.tuning import export_adapter
from layerlens.utility import needed_statistics, utility_table
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text, check_writable, staged_directory
from layerlens.utils.progress import Progress, silent
from layerlens.utils.threads import resolve_threads, set_threads

STATISTICS_VERSION = 2
"""Raise it whenever the same inputs give other statistics: cached ones are then measured again."""

HEAD_BATCH_SIZE = 32
TIMING_NOISE = 0.05
"""Relative error that two timings of the same thing have on an idle machine."""


@dataclass
class _Clock:
    """Wall time of each stage, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start


def run_config(
    config: RunConfig,
    *,
    base_dir: Path,
    use_cache: bool = True,
    progress: Progress = silent,
    warn: Callable[[str], None] = lambda line: None,
) -> RunResult:
    """Profile the model, choose, check and write everything; nothing is written unless all of it is.

    Args:
        config: the whole job.
        base_dir: folder that relative paths in the configuration start from.
        use_cache: take statistics from the sensitivity cache, and keep new ones there.
        progress: told of the long steps.
        warn: told of what the user should know, a line at a time.

    Raises:
        LayerLensError: with one line that says what to do; its class has the exit code.
    """
    clock, warnings = _Clock(), _Warnings(warn)
    output = base_dir / Path(config.output.directory).expanduser()
    check_writable(output)
    cache = SensitivityCache(_cache_dir(config, base_dir)) if use_cache else None
    threads = resolve_threads(config.runtime.threads)
    set_threads(threads)
    with clock.stage("load"), progress.stage("Loading model and data"):
        dataset = load_dataset(config.data, base_dir, config.model.task)
        calibration, head_data = _split(dataset, config, warnings)
        pretrained = load_pretrained(
            config.model.name_or_path,
            config.model.task,
            dataset.label_names,
            seed=config.runtime.seed,
            base_dir=base_dir,
        )
        _check_lengths(pretrained, config)
        spec = model_spec(pretrained, config.model.name_or_path, adapter_sites=config.profiling.adapter_sites)
        batches = make_batches(
            pretrained.tokenizer,
            calibration.texts,
            calibration.labels,
            max_length=config.data.max_length,
            batch_size=config.data.batch_size,
            pairs=calibration.pairs,
            targets=TASKS[config.model.task].targets,
        )
    with clock.stage("profile"):
        identity = _statistics_identity(config, spec, calibration, head_data, threads)
        key = cache_key(identity)
        found = cache.get(key) if cache else None
        if found is None:
            saved = cache.saved_pass(key) if cache else None
            statistics = _profile(config, pretrained, spec, batches, head_data, threads, progress, saved)
        else:
            statistics = found[1]
        facts = _model_facts(pretrained, config, dataset)
        statistics = replace(statistics, provenance={"identity": identity, "model": facts})
        if cache and found is None:
            cache.put(key, spec, statistics)
    with clock.stage("solve"), progress.stage("Solving"):
        solution = _solve(config, spec, statistics, threads)
        _warn_of_no_gain(solution, config, warnings)
    manifest = make_manifest(
        spec,
        solution,
        config.optimization,
        model=facts,
        provenance=run_provenance(config, threads, _data_facts(statistics)),
    )
    with staged_directory(output, owned=(*CHOICE_FILES, STATISTICS_FILE)) as staging:
        with clock.stage("export"):
            written = write_manifest(manifest, staging, created_at=_now())
            written |= export_adapter(manifest, pretrained.model, staging)
            written["statistics"] = atomic_write_bytes(staging / STATISTICS_FILE, statistics_to_bytes(spec, statistics))
        with clock.stage("check"):
            longest = batches[-1].inputs
            measured = check_manifest(pretrained.model, manifest, longest, config.optimization, progress)
            _warn_of_overrun(manifest, measured, warnings)
        written |= _write_report(staging, manifest, solution, statistics, measured)
        files = {name: output / path.relative_to(staging) for name, path in written.items()}
    return RunResult(
        manifest,
        output,
        files,
        statistics_from_cache=found is not None,
        seconds=clock.seconds,
        measured=measured,
        explanations=solution.explanations,
        warnings=tuple(warnings.lines),
    )


def optimize_statistics(
    statistics_path: Path,
    config: RunConfig,
    *,
    base_dir: Path,
    progress: Progress = silent,
    warn: Callable[[str], None] = lambda line: None,
) -> RunResult:
    """Choose again from saved statistics, with the budgets and options of ``config``; the model is not loaded.

    Writes the manifest and the report; ``layerlens apply`` makes the adapter directory from the manifest.

    Raises:
        ActivationCacheError: the statistics file cannot be used.
        ConfigurationError: the configuration asks for what the statistics do not have.
        InfeasibleError: the budgets allow nothing.
    """
    clock, warnings = _Clock(), _Warnings(warn)
    output = base_dir / Path(config.output.directory).expanduser()
    check_writable(output)
    threads = resolve_threads(config.runtime.threads)
    spec, statistics = load_statistics(statistics_path)
    refuse_non_finite(statistics)
    with clock.stage("solve"), progress.stage("Solving"):
        solution = _solve(config, spec, statistics, threads)
        _warn_of_no_gain(solution, config, warnings)
    facts = statistics.provenance
    if "model" not in facts or "data" not in facts.get("identity", {}):
        raise ActivationCacheError(
            f"{statistics_path} does not say which model and data it was measured on; use a file that `layerlens run` "
            "wrote"
        )
    manifest = make_manifest(
        spec,
        solution,
        config.optimization,
        model=facts["model"],
        provenance=run_provenance(config, threads, _data_facts(statistics)),
    )
    with staged_directory(output, owned=CHOICE_FILES) as staging:
        written = write_manifest(manifest, staging, created_at=_now())
        written |= _write_report(staging, manifest, solution, statistics, {})
        files = {name: output / path.relative_to(staging) for name, path in written.items()}
    return RunResult(
        manifest,
        output,
        files,
        statistics_from_cache=True,
        seconds=clock.seconds,
        explanations=solution.explanations,
        warnings=tuple(warnings.lines),
    )


def _write_report(
    staging: Path, manifest: Manifest, solution: Solution, statistics: ModelStatistics, measured: dict[str, Any]
) -> dict[str, Path]:
    """The report, and the solver's log as JSON lines."""
    report = staging / REPORT_FILE
    write_report(
        report,
        manifest=manifest,
        utilities=solution.utilities,
        costs=solution.costs,
        statistics=statistics,
        measured=measured,
        explanations=solution.explanations,
        events=solution.events,
    )
    lines = "".join(json.dumps(asdict(event)) + "\n" for event in solution.events)
    return {"report": report, "solver_log": atomic_write_text(staging / SOLVER_LOG_FILE, lines)}


def _profile(
    config: RunConfig,
    pretrained: PretrainedModel,
    spec: ModelSpec,
    batches: list[Batch],
    head_data: TextDataset,
    threads: int,
    progress: Progress,
    saved: SavedPass | None,
) -> ModelStatistics:
    """Fit the head if it is new, then measure every layer."""
    task = TASKS[config.model.task]
    if pretrained.new_parameters and len(head_data):
        head_batches = make_batches(
            pretrained.tokenizer,
            head_data.texts,
            head_data.labels,
            max_length=config.data.max_length,
            batch_size=HEAD_BATCH_SIZE,
            pairs=head_data.pairs,
            targets=task.targets,
        )
        fit_head(pretrained.model, pretrained.new_parameters, head_batches, progress, task.loss)
    return measure(
        pretrained.model,
        spec,
        batches,
        request=_request(config),
        other_modules=measurable_modules(pretrained.model, spec) if config.profiling.all_weights else (),
        sequence_length=config.data.max_length,
        threads=threads,
        progress=progress,
        loss=task.loss,
        saved=saved,
    )


def _request(config: RunConfig) -> StatisticsRequest:
    """What the utility model reads, and what the configuration asks for beside that."""
    profiling = config.profiling
    needed = needed_statistics(profiling.utility_model, profiling.metric_weights)
    return StatisticsRequest.of({*needed, *profiling.statistics}, ntk_samples=profiling.ntk_samples)


def _data_facts(statistics: ModelStatistics) -> dict[str, Any]:
    """What the manifest records of the data and of what was measured on it for the whole model."""
    identity = statistics.provenance["identity"]
    facts = {"key": cache_key(identity), **identity["data"]}
    kernel = statistics.kernel
    if kernel is not None:
        facts["neural_tangent_kernel"] = {
            "samples": len(kernel.gram),
            "trace": kernel.trace,
            "effective_rank": kernel.effective_rank,
            "target_alignment": kernel.target_alignment,
        }
    return facts


def _solve(config: RunConfig, spec: ModelSpec, statistics: ModelStatistics, threads: int) -> Solution:
    """Utilities and costs of every option, and the certified choice."""
    options = enumerate_options(spec, config.optimization.ranks())
    utilities = utility_table(
        config.profiling.utility_model, spec, statistics, options, config.profiling.metric_weights
    )
    costs = cost_table(spec, statistics, options, config.optimization)
    return find_allocation(spec, utilities, costs, config.optimization, seed=config.runtime.seed, threads=threads)


def _warn_of_no_gain(solution: Solution, config: RunConfig, warnings: _Warnings) -> None:
    if not (solution.utilities.utility > 0.0).any():
        warnings.add(
            f"nothing is adapted: by profiling.utility_model {config.profiling.utility_model!r} no option has a gain "
            "above its sampling noise; raise data.calibration_samples, offer more methods, or choose 'gradient' or "
            "'uniform'"
        )


def _warn_of_overrun(manifest: Manifest, measured: dict[str, Any], warnings: _Warnings) -> None:
    busy = measured["latency_ms"]["measured"] < (1 - TIMING_NOISE) * measured["base_latency_ms"]["measured"]
    if busy:
        warnings.add(
            "latency: the model was faster with its options than without, so this machine was too busy to time it; run "
            "again when it is idle"
        )
    for use in manifest.resources:
        if use.resource not in measured or (use.resource == "latency_ms" and busy):
            continue
        found = measured[use.resource]["measured"]
        if use.budget is not None and found > use.budget:
            warnings.add(
                f"{use.resource}: measured {found:.4g} on this machine, above the budget of {use.budget:g} that the "
                "predictions keep; if this is the device you budget for, put its own figures in "
                "optimization.latency_profile"
            )


def _split(dataset: TextDataset, config: RunConfig, warnings: _Warnings) -> tuple[TextDataset, TextDataset]:
    """Calibration and head samples; says so when the data has fewer than were asked for."""
    head_samples = config.model.head_fit_samples if TASKS[config.model.task].new_head else 0
    wanted = config.data.calibration_samples, head_samples
    parts = dataset.split(*wanted, config.runtime.seed)
    names = ("data.calibration_samples", "model.head_fit_samples")
    for name, asked, part in zip(names, wanted, parts, strict=True):
        if len(part) < asked:
            warnings.add(f"{name}: asked for {asked}, the data has {len(part)} left after the test split")
    return parts


def _check_lengths(pretrained: PretrainedModel, config: RunConfig) -> None:
    """Refuse sequences longer than the model's positions, before torch fails with an index error."""
    limit = getattr(pretrained.model.config, "max_position_embeddings", None)
    asked = {
        "data.max_length": config.data.max_length,
        "optimization.latency_profile.sequence_length": config.optimization.latency_profile.sequence_length,
    }
    for key, length in asked.items():
        if limit is not None and length > limit:
            raise ConfigurationError(
                f"{key}: {length} tokens, but the model has {limit} positions; use at most {limit}"
            )


def _model_facts(pretrained: PretrainedModel, config: RunConfig, dataset: TextDataset) -> dict[str, Any]:
    """What the manifest records so that the base model can be loaded again."""
    return {
        "task": config.model.task,
        "num_labels": 1 if config.model.task == "regression" else len(dataset.label_names),
        "labels": list(dataset.label_names),
        "head_modules": list(task_heads(pretrained.model)) if TASKS[config.model.task].new_head else [],
        "model_type": str(getattr(pretrained.model.config, "model_type", "")),
    }


def _statistics_identity(
    config: RunConfig, spec: ModelSpec, calibration: TextDataset, head_data: TextDataset, threads: int
) -> dict[str, Any]:
    """Everything that the statistics depend on: the key of the sensitivity cache."""
    return {
        "version": STATISTICS_VERSION,
        "model": {"weights": spec.fingerprint, "layers": [[layer.name, *layer.methods] for layer in spec.layers]},
        "data": {
            "source": config.data.source,
            "calibration": calibration.fingerprint,
            "calibration_samples": len(calibration),
            "head": head_data.fingerprint,
            "head_samples": len(head_data),
        },
        "settings": {
            "task": config.model.task,
            "dtype": config.model.dtype,
            "max_length": config.data.max_length,
            "batch_size": config.data.batch_size,
            "statistics": list(_request(config).names),
            "ntk_samples": config.profiling.ntk_samples,
            "all_weights": config.profiling.all_weights,
            "seed": config.runtime.seed,
            "threads": threads,
        },
        "versions": versions(),
    }


def _cache_dir(config: RunConfig, base_dir: Path) -> Path:
    given = config.runtime.cache_dir
    return default_cache_dir() if given is None else base_dir / Path(given).expanduser()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class _Warnings:
    """Lines for the user, told at once and kept for the result."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)
        self.tell(line)
