"""``layerlens run``: a model and its data in; manifest, adapter directory, statistics and report out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from layerlens.config import RunConfig
from layerlens.config.compatibility import refuse_conflicts
from layerlens.jobs.checks import check
from layerlens.jobs.choose import choose, compare, train_jointly, train_proxies
from layerlens.jobs.files import report, result_of, writing
from layerlens.jobs.frontier import hulls_around
from layerlens.jobs.hours import told_in_hours, with_hours
from layerlens.jobs.job import Job, Warn, job_with_model, unheard
from layerlens.jobs.load import load
from layerlens.jobs.measure import measure
from layerlens.jobs.own_code import usable_cache
from layerlens.jobs.result import CHOICE_FILES, STATISTICS_FILE, RunResult, observed, published
from layerlens.jobs.write import export
from layerlens.registry import TASKS
from layerlens.tasks.guess import with_task
from layerlens.tasks.lengths import lowered
from layerlens.utils.grad_mode import gradients_on
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
    """Run the whole job: measure the model, choose, check, and write all results or none.

    If a launcher such as torchrun started several processes, call this in all of them. Each process measures its share
    of the calibration data. Only process 0 chooses, writes and reports progress. All processes return the same result.

    Args:
        config: the whole job.
        base_dir: folder that relative paths in the configuration start from.
        use_cache: read statistics from the cache, and write new ones to it.
        progress: called with the progress of long steps.
        warn: called with each warning, one line at a time.

    Returns:
        the manifest, the paths of the written files, and the measured figures.

    Raises:
        LayerLensError: one line that says what to do. Its ``exit_code`` is that of the command line.
    """
    with (
        gradients_on(),
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
            shorter, lengths = lowered(config.model, config.data, config.optimization, base_dir)
            config = config.model_copy(update=shorter)
            job = job_with_model(config, base_dir, place.directory, progress, warn, processes, use_cache)
            if guess is not None:
                job.warnings.add(str(guess))
            if lengths:
                job.warnings.add(lengths)
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
        hulls = hulls_around(measured.spec, job.config.optimization, decision.solution)
        report(decision, measured.statistics, checked, written, hulls, data, given.output.directory)
    result = result_of(job, decision, written, checked, from_cache=measured.from_cache, data=data)
    job.processes.from_first("result", result)
    return result
