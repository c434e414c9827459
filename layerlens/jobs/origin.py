"""The origin's library interface: scalar statistics for every layer in, a manifest out, no model needed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from layerlens.config import OptimizationConfig, ProfilingConfig
from layerlens.cost import cost_table
from layerlens.jobs.find import find_allocation
from layerlens.jobs.result import CHOICE_FILES
from layerlens.jobs.solve import make_manifest, versions
from layerlens.manifest import write_manifest
from layerlens.methods import enumerate_options
from layerlens.models import ModelFacts, ModelSpec, Provenance
from layerlens.utility import metrics_from_cache, weighted_table
from layerlens.utils.atomic import staged_directory
from layerlens.utils.validation import validate_activation_cache, validate_config, validate_model_spec


def run_pipeline(
    model_spec: ModelSpec,
    profiling_cfg: ProfilingConfig,
    optimization_cfg: OptimizationConfig,
    activation_cache: Mapping[str, Mapping[str, float]],
    output_dir: Path | str,
) -> Path:
    """Choose methods and ranks from scalar statistics, and write ``manifest.json`` and ``manifest.yaml``.

    Args:
        model_spec: the layers.
        profiling_cfg: its ``metric_weights`` are the weights of the metrics (formula in ``utility.weighted``).
        optimization_cfg: budgets and options.
        activation_cache: layer -> metrics: ``grad_norm`` (norm of the mean gradient), ``fisher_trace`` and, if it was
            measured, ``proxy_gain``.
        output_dir: directory for the manifest; created if missing.

    Returns:
        path of ``manifest.json``.

    Raises:
        ModelSpecError, ActivationCacheError, ConfigurationError: an argument is wrong; the message names the field.
        InfeasibleError: no choice fits the budgets.
    """
    validate_model_spec(model_spec)
    validate_activation_cache(activation_cache, model_spec)
    validate_config(profiling_cfg, optimization_cfg)
    options = enumerate_options(model_spec, optimization_cfg.ranks())
    metrics = metrics_from_cache(activation_cache)
    utilities = weighted_table(model_spec, metrics, options, profiling_cfg.metric_weights)
    costs = cost_table(model_spec, None, options, optimization_cfg)
    solution = find_allocation(model_spec, utilities, costs, optimization_cfg, seed=0, threads=1)
    manifest = make_manifest(
        model_spec,
        solution,
        optimization_cfg,
        model=ModelFacts(task="", num_labels=0, labels=(), head_modules=(), model_type=""),
        provenance=Provenance(
            seed=0,
            config={
                "profiling": profiling_cfg.model_dump(mode="json"),
                "optimization": optimization_cfg.model_dump(mode="json"),
            },
            statistics={"source": "activation cache given by the caller"},
            versions=versions(),
        ),
    )
    created_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with staged_directory(Path(output_dir), owned=CHOICE_FILES) as staging:
        written = write_manifest(manifest, staging, created_at=created_at)
        names = {key: path.relative_to(staging) for key, path in written.items()}
    return Path(output_dir) / names["manifest_json"]
