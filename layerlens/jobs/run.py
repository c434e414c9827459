"""``layerlens run``: a model and its data in; manifest, adapter directory, statistics and report out."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cache as once
from pathlib import Path
from typing import Any

from layerlens.config import RunConfig
from layerlens.cost import cost_table
from layerlens.data import load_dataset
from layerlens.exceptions import ActivationCacheError
from layerlens.integrations.placement import offloaded, placed, placement_arguments, shard, sharded
from layerlens.integrations.torch_modules import usable_device
from layerlens.integrations.transformers import blocks_of
from layerlens.jobs.checks import check_manifest
from layerlens.jobs.clock import Clock
from layerlens.jobs.frontier import hull_rows
from layerlens.jobs.inputs import (
    check_identity,
    data_facts,
    model_facts,
    proxy_identity,
    statistics_identity,
)
from layerlens.jobs.memory_mode import CHECKPOINTED, memory_facts
from layerlens.jobs.messages import Warnings, warn_of_calibration, warn_of_no_gain, warn_of_overrun
from layerlens.jobs.observed import observed
from layerlens.jobs.prepare import prepare
from layerlens.jobs.profile import fit_new_head, profile
from layerlens.jobs.proxies import ProxyTrainer, joint_gains, measure_proxies
from layerlens.jobs.proxy_check import check_samples, checked_solution
from layerlens.jobs.publishing import published
from layerlens.jobs.result import CHOICE_FILES, REPORT_FILE, SOLVER_LOG_FILE, STATISTICS_FILE, RunResult
from layerlens.jobs.solve import Solution, find_allocation, make_manifest, run_provenance
from layerlens.jobs.together import (
    refuse_unshardable,
    same_configuration,
    same_measurement,
    shared_directory,
)
from layerlens.manifest import write_manifest, write_report
from layerlens.models import Manifest, ModelFacts, ModelSpec, ModelStatistics, enumerate_options
from layerlens.optimization import frontier
from layerlens.profiling.cache import cache_key
from layerlens.profiling.measure import refuse_non_finite
from layerlens.profiling.shared_cache import open_cache
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.tasks import task_for
from layerlens.tuning import export_adapter
from layerlens.tuning.initialization import measured_factors
from layerlens.utility import calibrated_table, model_for
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text, check_writable, staged_directory
from layerlens.utils.processes import Processes, joined
from layerlens.utils.progress import Progress, silent
from layerlens.utils.threads import resolve_threads, set_threads


@observed("run")
@published(owned=(*CHOICE_FILES, STATISTICS_FILE))
def run_config(
    config: RunConfig,
    *,
    base_dir: Path,
    use_cache: bool = True,
    progress: Progress = silent,
    warn: Callable[[str], None] = lambda line: None,
) -> RunResult:
    """Profile the model, choose, check and write everything; nothing is written unless all of it is.

    Where a launcher such as torchrun has started several processes, all of them call this. Each measures its share of
    the calibration data, process 0 alone chooses, writes and tells about it, and all return the same result.

    Args:
        config: the whole job.
        base_dir: folder that relative paths in the configuration start from.
        use_cache: take statistics from the sensitivity cache, and keep new ones there.
        progress: told of the long steps.
        warn: told of what the user should know, a line at a time.

    Raises:
        LayerLensError: with one line that says what to do; its class has the exit code.
    """
    with joined(config.distributed.backend, config.runtime.device, config.distributed.timeout_s) as processes:
        if not processes.first:
            progress, warn = silent, _unheard
        return _run(config, base_dir, use_cache, progress, Warnings(warn), processes)


def _run(
    config: RunConfig, base_dir: Path, use_cache: bool, progress: Progress, warnings: Warnings, processes: Processes
) -> RunResult:
    clock = Clock()
    same_configuration(processes, config)
    output = base_dir / Path(config.output.directory).expanduser()
    if processes.first:
        check_writable(output)
    cache = open_cache(config.runtime.cache_dir, base_dir) if use_cache else None
    if cache:
        shared_directory(processes, cache.directory)
    threads = resolve_threads(config.runtime.threads, processes.place.local_size)
    set_threads(threads)
    device = usable_device(config.runtime.device)
    refuse_unshardable(config, processes)
    placement = placement_arguments(config.model.device_map, config.model.max_memory, config.model.offload_folder)
    with clock.stage("load"), progress.stage("Loading model and data"):
        dataset = load_dataset(config.data, base_dir, config.model.task)
        task = task_for(config.model, base_dir)
        prepared = prepare(config, base_dir, dataset, task, device, warnings, processes, placement)
    pretrained, batches, spec = prepared.pretrained, prepared.batches, prepared.spec
    dataset, held_out, batches_of = prepared.dataset, prepared.held_out, prepared.batches_of
    streams: Path | None = None

    @once
    def fit() -> None:
        """Fit the head where it is new."""
        fit_new_head(prepared, progress, device, streams)

    with clock.stage("profile"):
        identity = statistics_identity(config, spec, prepared.calibration, prepared.head_data, threads)
        if prepared.plan.mode == CHECKPOINTED:  # the bytes that BERT keeps for a backward pass are counted otherwise
            identity["settings"]["checkpointed"] = True
        key = cache_key(identity)
        streams = cache.stream_directory(key) if cache else None
        same_measurement(processes, identity)
        found = cache.get(key) if cache and processes.first else None
        if not processes.from_first("statistics in the cache", found is not None):
            saved = cache.saved_pass(key, config.runtime.saving_time_share) if cache else None
            fit()
            for name in pretrained.new_parameters:
                processes.copy_from_first(pretrained.model.get_parameter(name).data)
            if config.distributed.sharding == "fsdp":
                shard(pretrained.model, blocks_of(pretrained.model), processes)
            measured_now = profile(prepared, threads, progress, device, saved, streams, processes)
        if not processes.first:  # its share is handed in
            if not placed(pretrained.model) and not sharded(pretrained.model):
                with suppress(RuntimeError, NotImplementedError, ValueError):  # memory that is only held while it waits
                    pretrained.model.to("meta")
            result: RunResult = processes.from_first("result")
            return result
        statistics = found[1] if found is not None else measured_now
        assert statistics is not None
        facts = model_facts(pretrained, config, dataset, spec)
        made_of = {"identity": identity, "model": facts.fields()}
        statistics = replace(
            statistics, provenance=made_of | ({} if processes.alone else {"processes": processes.size})
        )
        if cache and found is None:
            cache.put(key, spec, statistics)

    @once
    def trainer() -> ProxyTrainer:
        fit()
        return ProxyTrainer(pretrained.model, spec, batches, batches_of(held_out), task.loss, config)

    saved_proxies = None
    if config.profiling.proxies.options:
        with clock.stage("proxies"):
            if cache:
                proxies_key = cache_key(proxy_identity(identity, held_out, config))
                saved_proxies = cache.saved_proxies(proxies_key, spec.model_name, len(held_out))
            study = measure_proxies(trainer, spec, config, saved_proxies, progress)
            statistics = replace(statistics, proxies=study)
    with clock.stage("solve"), progress.stage("Solving"):
        solution = _solve(config, spec, statistics, threads)
        warn_of_no_gain(solution, config, warnings)
    provenance = memory_facts(run_provenance(config, threads, data_facts(statistics)), prepared.plan, config)

    def manifest_of(found: Solution) -> Manifest:
        return make_manifest(spec, found, config.optimization, model=facts, provenance=provenance)

    manifest = manifest_of(solution)
    joint: dict[str, Any] = {}
    check = config.optimization.proxy_check
    if check.steps:
        with clock.stage("proxy check"):
            parts = check_samples(dataset, config, len(prepared.calibration) + len(held_out), len(prepared.head_data))
            saved_check = None
            if cache:
                check_key = cache_key(check_identity(identity, *parts, config))
                saved_check = cache.saved_proxies(check_key, spec.model_name, len(parts[1]))

            @once
            def check_trainer() -> ProxyTrainer:
                fit()
                train, judged = (batches_of(part) for part in parts)
                return ProxyTrainer(pretrained.model, spec, train, judged, task.loss, config, check.steps)

            solution, checked = checked_solution(
                check_trainer, solution, lambda name: _solve(config, spec, statistics, threads, utility_model=name),
                manifest_of, config, saved_check, progress, warnings,
            )  # fmt: skip
        provenance = replace(provenance, proxy_check=checked.facts)
        manifest = manifest_of(solution)
        joint |= checked.measured
    if statistics.proxies:
        with clock.stage("joint proxies"):
            alike = _solve(config, spec, statistics, threads, utility_model="uniform")
            joint |= joint_gains(trainer, manifest, manifest_of(alike), saved_proxies, progress)
    with staged_directory(output, owned=(*CHOICE_FILES, STATISTICS_FILE)) as staging:
        with clock.stage("export"):
            factors = measured_factors(pretrained.model, manifest.choice, batches, task.loss, fit)
            written = write_manifest(manifest, staging, created_at=_now())
            written |= export_adapter(manifest, pretrained.model, staging, factors)
            written["statistics"] = atomic_write_bytes(staging / STATISTICS_FILE, statistics_to_bytes(spec, statistics))
        with clock.stage("check"):
            measured: dict[str, Any] = {}
            if pretrained.streamed is not None:
                warnings.add(
                    "predictions are not held against the model, which was never in memory whole; `layerlens evaluate "
                    "MANIFEST --costs` does it on a machine that holds it"
                )
            elif sharded(pretrained.model) or offloaded(pretrained.model):
                warnings.add("the model's weights are spread (shards or disk), so predictions were not checked on it")
            else:
                longest = batches[-1].inputs
                measured = check_manifest(pretrained.model, manifest, longest, config.optimization, progress, factors)
                warn_of_overrun(manifest, measured, warnings)
            measured |= joint
            if statistics.proxies:
                warn_of_calibration(manifest, joint, warnings)
        written |= _write_report(staging, manifest, solution, statistics, measured)
        files = {name: output / path.relative_to(staging) for name, path in written.items()}
    result = RunResult(
        manifest,
        output,
        files,
        statistics_from_cache=found is not None,
        seconds=clock.seconds,
        measured=measured,
        explanations=solution.explanations,
        warnings=tuple(warnings.lines),
    )
    processes.from_first("result", result)
    return result


@observed("optimize")
@published(owned=CHOICE_FILES)
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
    clock, warnings = Clock(), Warnings(warn)
    output = base_dir / Path(config.output.directory).expanduser()
    check_writable(output)
    threads = resolve_threads(config.runtime.threads)
    spec, statistics = load_statistics(statistics_path)
    refuse_non_finite(statistics)
    with clock.stage("solve"), progress.stage("Solving"):
        solution = _solve(config, spec, statistics, threads)
        warn_of_no_gain(solution, config, warnings)
    if config.optimization.proxy_check.steps:
        warnings.add("optimization.proxy_check: needs the model, so it is made by `layerlens run` only")
    if config.optimization.lora_initialization != "default":
        warnings.add(
            f"optimization.lora_initialization: {config.optimization.lora_initialization!r} is measured on the model; "
            "this manifest can be trained only after `layerlens run` has written its peft directory"
        )
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
        model=ModelFacts.of(facts["model"]),
        provenance=run_provenance(config, threads, data_facts(statistics)),
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
    report, problem = staging / REPORT_FILE, solution.problem
    write_report(
        report,
        manifest=manifest,
        utilities=solution.utilities,
        costs=solution.costs,
        statistics=statistics,
        measured=measured,
        explanations=solution.explanations,
        events=solution.events,
        hulls={resource: hull_rows(problem, frontier(problem, resource)) for resource in problem.resources},
    )
    lines = "".join(json.dumps(asdict(event)) + "\n" for event in solution.events)
    return {"report": report, "solver_log": atomic_write_text(staging / SOLVER_LOG_FILE, lines)}


def _unheard(_line: str) -> None:
    """Warnings of all processes but the first, which has the same."""


def _solve(
    config: RunConfig, spec: ModelSpec, statistics: ModelStatistics, threads: int, *, utility_model: str | None = None
) -> Solution:
    """Utilities and costs of every option, and the certified choice."""
    options = enumerate_options(spec, config.optimization.ranks())
    model = model_for(utility_model or config.profiling.utility_model, spec, config.optimization.max_trainable_params)
    utilities = calibrated_table(
        model, spec, statistics, options, config.profiling.metric_weights, seed=config.runtime.seed
    )
    costs = cost_table(spec, statistics, options, config.optimization)
    return find_allocation(spec, utilities, costs, config.optimization, seed=config.runtime.seed, threads=threads)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
