"""``layerlens run``: a model and its data in; manifest, adapter directory, statistics and report out.

``optimize_statistics`` is ``layerlens optimize``: the same from saved statistics, without the model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from layerlens.config import RunConfig
from layerlens.config.compatibility import refuse_conflicts
from layerlens.exceptions import ActivationCacheError
from layerlens.jobs.checks import check
from layerlens.jobs.choose import Decision, choose, compare, solve_stage, train_jointly, train_proxies
from layerlens.jobs.hours import told_in_hours, with_hours
from layerlens.jobs.inputs import data_facts
from layerlens.jobs.job import Job, Warn, job_with_model, job_without_model, unheard
from layerlens.jobs.load import load
from layerlens.jobs.measure import measure
from layerlens.jobs.own_code import usable_cache
from layerlens.jobs.result import CHOICE_FILES, STATISTICS_FILE, RunResult, observed, published
from layerlens.jobs.solve import make_manifest, run_provenance
from layerlens.jobs.write import export, report, result_of, writing
from layerlens.manifest import write_manifest
from layerlens.models import ModelFacts
from layerlens.profiling.measure import refuse_non_finite
from layerlens.profiling.statistics_file import load_statistics
from layerlens.registry import TASKS
from layerlens.tasks.guess import with_task
from layerlens.tuning.task_head import write_head
from layerlens.utils.processes import joined
from layerlens.utils.progress import Progress, silent

RUN_FILES = (*CHOICE_FILES, STATISTICS_FILE)


def run_config(
    config: RunConfig,
    *,
    base_dir: Path,
    use_cache: bool = True,
    progress: Progress = silent,
    warn: Warn = unheard,
) -> RunResult:
    """Profile the model, choose, check and write everything; nothing is written unless all of it is.

    Where a launcher such as torchrun has started several processes, all of them call this. Each measures its share of
    the calibration data, process 0 alone chooses, writes and tells about it, and all return the same result.

    Args:
        config: the whole job.
        base_dir: folder that relative paths in the configuration start from.
        use_cache: take statistics from the sensitivity cache, and keep new ones there.
        progress: reports the long steps.
        warn: called with each warning for the user, one line at a time.

    Raises:
        LayerLensError: with one line that says what to do; its class has the exit code.
    """
    with (
        observed("run", config) as outcome,
        published(config.output.directory, base_dir, RUN_FILES) as place,
    ):
        with joined(config.distributed.backend, config.runtime.device, config.distributed.timeout_s) as processes:
            if not processes.first:
                progress, warn = silent, unheard
            refuse_conflicts(config, "run", processes.size)
            guess = None
            if not config.model.task or TASKS[config.model.task].of_images:
                config, guess = with_task(config, base_dir)
            if guess is not None:
                refuse_conflicts(config, "run", processes.size)
            job = job_with_model(config, base_dir, place.directory, progress, warn, processes, use_cache)
            if guess is not None:
                job.warnings.add(str(guess))
            result = _run(job)
        outcome.result = place.publish(result)
    return outcome.result


def _run(job: Job) -> RunResult:
    loaded = load(job)
    data = loaded.summary(job.config.data)
    job = replace(job, cache=usable_cache(job.cache, loaded, job.warnings.add))
    measured = measure(job, loaded)
    if measured is None:  # this process's share is handed in; process 0 goes on
        result: RunResult = job.processes.from_first("result")
        return result
    given = job.config
    job = replace(job, config=with_hours(given, measured.statistics))
    measured, trainings = train_proxies(job, loaded, measured)
    with told_in_hours(given, measured.statistics):
        decision = choose(job, loaded, measured)
    decision = compare(job, loaded, measured, decision)
    decision = train_jointly(job, loaded, measured, decision, trainings)
    with writing(job, RUN_FILES) as written:
        factors = export(job, loaded, measured, decision, written)
        checked = check(job, loaded, decision, factors)
        report(decision, measured.statistics, checked, written, data, given.output.directory)
    result = result_of(job, decision, written, checked, from_cache=measured.from_cache, data=data)
    job.processes.from_first("result", result)
    return result


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
        report(decision, statistics, {}, written, output=job.config.output.directory)
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
