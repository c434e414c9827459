"""``layerlens run``: a model and its data in; manifest, adapter directory, statistics and report out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cache as once
from pathlib import Path
from typing import Any

from layerlens.config import RunConfig
from layerlens.cost import cost_table
from layerlens.data import load_dataset
from layerlens.exceptions import ActivationCacheError
from layerlens.integrations.torch_modules import usable_device
from layerlens.manifest import write_manifest, write_report
from layerlens.models import Manifest, ModelSpec, ModelStatistics, enumerate_options
from layerlens.pipeline.checks import check_manifest
from layerlens.pipeline.factors import measured_factors
from layerlens.pipeline.inputs import (
    data_facts,
    model_facts,
    proxy_identity,
    statistics_identity,
)
from layerlens.pipeline.memory_mode import CHECKPOINTED, memory_facts
from layerlens.pipeline.messages import Warnings, warn_of_calibration, warn_of_no_gain, warn_of_overrun
from layerlens.pipeline.prepare import prepare
from layerlens.pipeline.profile import fit_new_head, profile
from layerlens.pipeline.proxies import ProxyTrainer, joint_gains, measure_proxies
from layerlens.pipeline.result import CHOICE_FILES, REPORT_FILE, SOLVER_LOG_FILE, STATISTICS_FILE, RunResult
from layerlens.pipeline.solve import Solution, find_allocation, make_manifest, run_provenance
from layerlens.profiling.cache import SensitivityCache, cache_key, default_cache_dir
from layerlens.profiling.measure import refuse_non_finite
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.tasks import task_for
from layerlens.tuning import export_adapter
from layerlens.utility import calibrated_table
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text, check_writable, staged_directory
from layerlens.utils.progress import Progress, silent
from layerlens.utils.threads import resolve_threads, set_threads


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
    clock, warnings = _Clock(), Warnings(warn)
    output = base_dir / Path(config.output.directory).expanduser()
    check_writable(output)
    cache = SensitivityCache(_cache_dir(config, base_dir)) if use_cache else None
    threads = resolve_threads(config.runtime.threads)
    set_threads(threads)
    device = usable_device(config.runtime.device)
    with clock.stage("load"), progress.stage("Loading model and data"):
        dataset = load_dataset(config.data, base_dir, config.model.task)
        task = task_for(config.model, base_dir)
        prepared = prepare(config, base_dir, dataset, task, device, warnings)
    pretrained, batches, spec = prepared.pretrained, prepared.batches, prepared.spec
    held_out = prepared.held_out
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
        found = cache.get(key) if cache else None
        if found is None:
            saved = cache.saved_pass(key) if cache else None
            fit()
            statistics = profile(prepared, threads, progress, device, saved, streams)
        else:
            statistics = found[1]
        facts = model_facts(pretrained, config, prepared.dataset, spec)
        statistics = replace(statistics, provenance={"identity": identity, "model": facts})
        if cache and found is None:
            cache.put(key, spec, statistics)

    @once
    def trainer() -> ProxyTrainer:
        fit()
        return ProxyTrainer(pretrained.model, spec, batches, prepared.batches_of(held_out), task.loss, config)

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
    manifest = make_manifest(
        spec,
        solution,
        config.optimization,
        model=facts,
        provenance=run_provenance(config, threads, data_facts(statistics)) | memory_facts(prepared.plan, config),
    )
    joint: dict[str, Any] = {}
    if statistics.proxies:
        with clock.stage("joint proxies"):
            alike = _solve(config, spec, statistics, threads, utility_model="uniform")
            uniform = make_manifest(spec, alike, config.optimization, model=facts, provenance=manifest.provenance)
            joint = joint_gains(trainer, manifest, uniform, saved_proxies, progress)
    with staged_directory(output, owned=(*CHOICE_FILES, STATISTICS_FILE)) as staging:
        with clock.stage("export"):
            factors = measured_factors(pretrained.model, manifest, batches, task.loss, fit)
            written = write_manifest(manifest, staging, created_at=_now())
            written |= export_adapter(manifest, pretrained.model, staging, factors)
            written["statistics"] = atomic_write_bytes(staging / STATISTICS_FILE, statistics_to_bytes(spec, statistics))
        measured: dict[str, Any] = {}
        with clock.stage("check"):
            if pretrained.streamed is None:
                longest = batches[-1].inputs
                measured = check_manifest(pretrained.model, manifest, longest, config.optimization, progress, factors)
                warn_of_overrun(manifest, measured, warnings)
            else:
                warnings.add(
                    "predictions are not held against the model, which was never in memory whole; `layerlens evaluate "
                    "MANIFEST --costs` does it on a machine that holds it"
                )
            if statistics.proxies:
                measured |= joint
                warn_of_calibration(manifest, joint, warnings)
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
    clock, warnings = _Clock(), Warnings(warn)
    output = base_dir / Path(config.output.directory).expanduser()
    check_writable(output)
    threads = resolve_threads(config.runtime.threads)
    spec, statistics = load_statistics(statistics_path)
    refuse_non_finite(statistics)
    with clock.stage("solve"), progress.stage("Solving"):
        solution = _solve(config, spec, statistics, threads)
        warn_of_no_gain(solution, config, warnings)
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
        model=facts["model"],
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


def _solve(
    config: RunConfig, spec: ModelSpec, statistics: ModelStatistics, threads: int, *, utility_model: str | None = None
) -> Solution:
    """Utilities and costs of every option, and the certified choice."""
    options = enumerate_options(spec, config.optimization.ranks())
    utilities = calibrated_table(
        utility_model or config.profiling.utility_model, spec, statistics, options, config.profiling.metric_weights,
        seed=config.runtime.seed,
    )  # fmt: skip
    costs = cost_table(spec, statistics, options, config.optimization)
    return find_allocation(spec, utilities, costs, config.optimization, seed=config.runtime.seed, threads=threads)


def _cache_dir(config: RunConfig, base_dir: Path) -> Path:
    given = config.runtime.cache_dir
    return default_cache_dir() if given is None else base_dir / Path(given).expanduser()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
