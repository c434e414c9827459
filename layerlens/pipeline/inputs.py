"""What a run measures and on what: samples, limits of the model, the statistics asked for, and what identifies them."""

from __future__ import annotations

from typing import Any

from layerlens.config import RunConfig
from layerlens.data import Dataset
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.transformers import PretrainedModel, task_heads
from layerlens.models import ModelSpec, ModelStatistics
from layerlens.pipeline.messages import Warnings
from layerlens.pipeline.solve import versions
from layerlens.profiling.cache import cache_key
from layerlens.profiling.request import StatisticsRequest
from layerlens.tasks import TASKS
from layerlens.utility import needed_statistics

PADDING_FIRST = ("roberta", "xlm-roberta", "camembert", "longformer")
"""Models whose positions count from the padding token's id on."""

STATISTICS_VERSION = 2
"""Raise it whenever the same inputs give other statistics: cached ones are then measured again."""


def split_samples(dataset: Dataset, config: RunConfig, warnings: Warnings) -> tuple[Dataset, Dataset]:
    """Calibration and head samples; says so when the data has fewer than were asked for."""
    head_samples = config.model.head_fit_samples if TASKS[config.model.task].new_head else 0
    wanted = config.data.calibration_samples, head_samples
    parts = dataset.split(*wanted, config.runtime.seed)
    names = ("data.calibration_samples", "model.head_fit_samples")
    for name, asked, part in zip(names, wanted, parts, strict=True):
        if len(part) < asked:
            warnings.add(f"{name}: asked for {asked}, the data has {len(part)} left after the test split")
    return parts


def check_lengths(pretrained: PretrainedModel, config: RunConfig) -> None:
    """Refuse sequences longer than the model's positions, before torch fails with an index error."""
    model_config: Any = getattr(pretrained.model, "config", None)
    limit = getattr(model_config, "max_position_embeddings", None)
    if pretrained.tokenizer is None:
        return
    if limit is not None and getattr(model_config, "model_type", "") in PADDING_FIRST:
        limit -= model_config.pad_token_id + 1
    asked = {
        "data.max_length": config.data.max_length,
        "optimization.latency_profile.sequence_length": config.optimization.latency_profile.sequence_length,
    }
    for key, length in asked.items():
        if limit is not None and length > limit:
            raise ConfigurationError(
                f"{key}: {length} tokens, but the model has {limit} positions; use at most {limit}"
            )


def statistics_request(config: RunConfig) -> StatisticsRequest:
    """What the utility model reads, and what the configuration asks for beside that."""
    profiling = config.profiling
    needed = needed_statistics(profiling.utility_model, profiling.metric_weights)
    return StatisticsRequest.of({*needed, *profiling.statistics}, ntk_samples=profiling.ntk_samples)


def statistics_identity(
    config: RunConfig, spec: ModelSpec, calibration: Dataset, head_data: Dataset, threads: int
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
            "loss": config.model.loss,
            "dtype": config.model.dtype,
            "max_length": config.data.max_length,
            "max_target_length": config.data.max_target_length,
            "source_prefix": config.data.source_prefix,
            "mlm_probability": config.data.mlm_probability,
            "batch_size": config.data.batch_size,
            "statistics": list(statistics_request(config).names),
            "ntk_samples": config.profiling.ntk_samples,
            "all_weights": config.profiling.all_weights,
            "seed": config.runtime.seed,
            "threads": threads,
        },
        "versions": versions(),
    }


def model_facts(pretrained: PretrainedModel, config: RunConfig, dataset: Dataset, spec: ModelSpec) -> dict[str, Any]:
    """What the manifest records so that the base model can be loaded again."""
    return {
        "task": config.model.task,
        "num_labels": 1 if config.model.task == "regression" else len(dataset.label_names),
        "labels": list(dataset.label_names),
        "head_modules": list(task_heads(pretrained.model)) if TASKS[config.model.task].new_head else [],
        "model_type": str(getattr(getattr(pretrained.model, "config", None), "model_type", "")),
        **{name: value for name in ("weights", "loss") if (value := getattr(config.model, name)) is not None},
        **({"left_out": dict(spec.left_out)} if spec.left_out else {}),
    }


def data_facts(statistics: ModelStatistics) -> dict[str, Any]:
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
