"""Turns keyword arguments into a configuration. Each key of a section is an argument of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from layerlens.config import RunConfig
from layerlens.config.base import ConfigModel, nearest_key
from layerlens.config.model_and_data import DataConfig, ModelConfig
from layerlens.config.optimization import OptimizationConfig
from layerlens.config.profiling import ProfilingConfig
from layerlens.config.sections import RuntimeConfig
from layerlens.config.training import TrainingConfig
from layerlens.exceptions import ConfigurationError
from layerlens.models import LORA
from layerlens.vocabulary import RESOURCES

SECTIONS: dict[str, type[ConfigModel]] = {
    "optimization": OptimizationConfig, "profiling": ProfilingConfig, "data": DataConfig, "model": ModelConfig,
    "runtime": RuntimeConfig, "training": TrainingConfig,
}  # fmt: skip
"""Sections whose keys are keyword arguments; where two have the same key, the first."""
NOT_OFFERED = {
    "source", "name_or_path", "factory", "weights", "dtype", "device_map", "max_memory", "offload_folder", "cache_dir",
    "saving_time_share", "device",
}  # fmt: skip
"""Keys that the objects themselves say: where the model and the data are, and in which precision."""
OTHER_NAMES = {"max_latency_ms": "latency_target_ms"}
METHODS = (LORA,)
"""On offer unless ``methods`` says otherwise: what every trainer and serving engine can use."""
NO_BUDGET = 2**62
"""A budget of parameters that nothing reaches, where nothing is chosen yet."""


def by_section(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort keyword arguments by the section that they belong to. None counts as not given.

    Raises:
        ConfigurationError: no section has a key of this name; the message gives the nearest key.
    """
    keys = {key: name for name, section in reversed(SECTIONS.items()) for key in section.model_fields}
    found: dict[str, dict[str, Any]] = {}
    for given, value in settings.items():
        key = OTHER_NAMES.get(given, given)
        if key not in keys or key in NOT_OFFERED:
            near = nearest_key(given, [*sorted(keys.keys() - NOT_OFFERED), *OTHER_NAMES])
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigurationError(
                f"{given}: there is no such argument{hint} The keys of docs/configuration.md are arguments by their "
                "own names, without their section"
            )
        if value is not None:
            found.setdefault(keys[key], {})[key] = value
    return found


def configuration(
    settings: Mapping[str, Any], *, model: Mapping[str, Any], data: Mapping[str, Any], length: int | None = None,
    budget_needed: bool = True,
) -> RunConfig:  # fmt: skip
    """The configuration of a job on objects in memory.

    Args:
        settings: keyword arguments.
        model: values of the section ``model`` that follow from the model itself.
        data: values of the section ``data`` that follow from the data. Keyword arguments of the same name replace them.
        length: tokens in a sequence, for the measurement and the predicted costs, unless ``settings`` set it; None: the
            defaults of the configuration.
        budget_needed: True: refuse settings without a budget.

    Raises:
        ConfigurationError: an unknown name, or an invalid value.
    """
    given = by_section(settings)
    optimization = {"methods": METHODS, **given.get("optimization", {})}
    budgets = tuple(resource.budget for resource in RESOURCES.values())
    if not budget_needed and not any(name in optimization for name in budgets):
        optimization["max_trainable_params"] = NO_BUDGET
    if length is not None:
        data = {**data, "max_length": length}
        optimization["latency_profile"] = {"sequence_length": length, **dict(optimization.get("latency_profile", {}))}
    given["optimization"] = optimization
    given["model"] = {**given.get("model", {}), **model}
    given["data"] = {**data, **given.get("data", {})}
    return RunConfig(**cast("dict[str, Any]", given))


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The same configuration with other options and budgets.

    Raises:
        ConfigurationError: an unknown name, an invalid value, or a setting that needs a new measurement.
    """
    given = by_section(settings)
    chosen = {"profiling": {"utility_model", "metric_weights"}, "runtime": {"seed", "threads"}}
    for section, values in given.items():
        fixed = set(values) - chosen.get(section, set())
        if section != "optimization" and fixed:
            raise ConfigurationError(
                f"{sorted(fixed)[0]}: applies when the model is measured; give it to layerlens.profile"
            )
    fields = config.model_dump()
    before = {name: getattr(config.optimization, name) for name in ("latency_profile", "optimizer")}
    fields["optimization"] = {"methods": METHODS, **before, **given.pop("optimization", {})}
    for section, values in given.items():
        fields[section] = {**fields[section], **values}
    return RunConfig(**fields)
