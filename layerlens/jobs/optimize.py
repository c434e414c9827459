"""``layerlens optimize``: choose again from saved statistics. Neither the model nor torch is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from layerlens.config import RunConfig
from layerlens.exceptions import ActivationCacheError
from layerlens.jobs.data_facts import data_facts
from layerlens.jobs.decision import Decision, solve_stage
from layerlens.jobs.files import report, result_of, writing
from layerlens.jobs.frontier import hulls_around
from layerlens.jobs.hours import told_in_hours, with_hours
from layerlens.jobs.job import Job, Warn, job_without_model, unheard
from layerlens.jobs.result import CHOICE_FILES, RunResult, observed, published
from layerlens.jobs.solve import make_manifest, run_provenance
from layerlens.manifest import write_manifest
from layerlens.models import ModelFacts
from layerlens.profiling.finite import refuse_non_finite
from layerlens.profiling.statistics_file import load_statistics
from layerlens.tuning.task_head import write_head
from layerlens.utils.progress import Progress, silent


def optimize_statistics(
    statistics_path: Path,
    config: RunConfig,
    *,
    base_dir: Path,
    progress: Progress = silent,
    warn: Warn = unheard,
) -> RunResult:
    """Choose again from saved statistics, with the budgets and options of ``config``; the model is not loaded.

    Writes the manifest and the report; ``layerlens show --output`` makes the adapter directory from the manifest.

    Raises:
        ActivationCacheError: the statistics file cannot be used.
        ConfigurationError: the configuration asks for what the statistics do not have.
        InfeasibleError: the budgets allow nothing.
    """
    with (
        observed("optimize", config) as outcome,
        published(config.output.directory, base_dir, CHOICE_FILES) as place,
    ):
        job = job_without_model(config, base_dir, place.directory, progress, warn)
        outcome.result = place.publish(_optimize(job, statistics_path))
    return outcome.result


def _optimize(job: Job, statistics_path: Path) -> RunResult:
    spec, statistics = load_statistics(statistics_path)
    refuse_non_finite(statistics)
    given = job.config
    job = replace(job, config=with_hours(given, statistics))
    with told_in_hours(given, statistics):
        solution = solve_stage(job, spec, statistics)
    _warn_of_the_model_missing(job)
    facts = statistics.provenance
    if "model" not in facts or "data" not in facts.get("identity", {}):
        raise ActivationCacheError(
            f"{statistics_path} does not say which model and data it was measured on; use a file that `layerlens run` "
            "wrote"
        )
    task = job.config.model.task or facts["model"].get("task") or ""
    config = job.config.model_copy(update={"model": job.config.model.model_copy(update={"task": task})})
    provenance = run_provenance(config, job.threads, data_facts(statistics))
    manifest = make_manifest(
        spec, solution, job.config.optimization, model=ModelFacts.of(facts["model"]), provenance=provenance
    )
    decision = Decision(solution, manifest)
    with writing(job, CHOICE_FILES) as written:
        written.files |= write_manifest(manifest, written.directory, created_at=written.created_at)
        written.files |= write_head(statistics.head, written.directory)
        hulls = hulls_around(spec, job.config.optimization, solution)
        report(decision, statistics, {}, written, hulls, output=job.config.output.directory)
    return result_of(job, decision, written, {}, from_cache=True)


def _warn_of_the_model_missing(job: Job) -> None:
    """Say what the configuration asks for that only a run with the model can do."""
    optimization = job.config.optimization
    if optimization.proxy_check.steps:
        job.warnings.add("optimization.proxy_check: needs the model, so it is made by `layerlens run` only")
    if optimization.lora_initialization != "default":
        job.warnings.add(
            f"optimization.lora_initialization: {optimization.lora_initialization!r} needs factors measured on the "
            "model; this manifest can be trained only after `layerlens run` has written its peft directory"
        )
