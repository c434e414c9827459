"""The file of `layerlens sweep`: one configuration, and what is varied in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from layerlens.config.base import ConfigModel, describe
from layerlens.config.loader import read_text
from layerlens.config.yaml_source import read_yaml
from layerlens.exceptions import ConfigurationError

MAX_TASKS = 100_000
Settings = dict[str, Any]
"""Dotted key -> value, as `--set` takes them."""


class SweepConfig(ConfigModel):
    """A grid: every model with every budget, every seed and every combination of the other settings."""

    base: str = Field(
        default="config.yaml",
        min_length=1,
        description="The configuration that every task starts from, relative to the sweep's file.",
    )
    directory: str = Field(
        default="sweep",
        min_length=1,
        description="Directory for the task list, results, logs and the tables, relative to the sweep's file.",
    )
    models: tuple[str | dict[str, Any], ...] = Field(
        default=(), description="Models: values of `model.name_or_path`, or mappings of keys of `model`."
    )
    budgets: tuple[dict[str, Any], ...] = Field(
        default=(), description="Budgets: mappings of keys of `optimization`, such as `{max_trainable_params: 1000}`."
    )
    seeds: tuple[int, ...] = Field(default=(), description="Values of `runtime.seed`.")
    grid: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="Other keys with their values, such as `data.calibration_samples: [64, 256]`."
    )

    @field_validator("grid")
    @classmethod
    def _dotted_keys(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in grid.items():
            if "." not in key:
                raise ValueError(f"{key!r}: must be a section and a key, such as data.calibration_samples")
            if key.startswith("output."):
                raise ValueError(f"{key!r}: every task has an output directory of its own")
            if not values:
                raise ValueError(f"{key!r}: has no values")
        return grid

    @model_validator(mode="after")
    def _something_to_vary(self) -> SweepConfig:
        if not (self.models or self.budgets or self.seeds or self.grid):
            raise ValueError("nothing is varied; give models, budgets, seeds or grid")
        size = 1
        for axis in self._axes():
            size *= len(axis)
        if size > MAX_TASKS:
            raise ValueError(f"the grid has {size:,} tasks; at most {MAX_TASKS:,} are listed")
        return self

    def combinations(self) -> Iterator[Settings]:
        """The settings of every task; models vary slowest, then the grid, seeds, and budgets fastest."""
        for parts in itertools.product(*self._axes()):
            yield {key: value for part in parts for key, value in part.items()}

    def _axes(self) -> list[list[Settings]]:
        models: list[Settings] = [
            {"model.name_or_path": one} if isinstance(one, str) else {f"model.{key}": v for key, v in one.items()}
            for one in self.models
        ]
        others: list[list[Settings]] = [[{key: value} for value in values] for key, values in self.grid.items()]
        seeds: list[Settings] = [{"runtime.seed": seed} for seed in self.seeds]
        budgets: list[Settings] = [{f"optimization.{key}": v for key, v in one.items()} for one in self.budgets]
        return [axis for axis in (models, *others, seeds, budgets) if axis]


def load_sweep(path: Path) -> SweepConfig:
    """Read and check a sweep's file.

    Raises:
        ConfigurationError: the file cannot be read, or what is wrong in it.
    """
    if not path.exists():
        raise ConfigurationError(
            f"no sweep file at {path}; write one with base, directory, and models, budgets, seeds or grid"
        )
    document = read_yaml(read_text(path), str(path))
    if document.problems:
        raise ConfigurationError("\n".join(map(str, document.problems)))
    if not isinstance(document.data, dict):
        raise ConfigurationError(f"{path}: must be a mapping with base, directory, and models, budgets, seeds or grid")
    try:
        return SweepConfig.model_validate(document.data)
    except ValidationError as error:
        lines = []
        for detail in error.errors(include_url=False):
            location = tuple(part for part in detail["loc"] if part in document.data or not isinstance(part, str))
            place = document.place(location[:1])
            unknown = f"unknown key; known: {', '.join(SweepConfig.model_fields)}"
            message = unknown if detail["type"] == "extra_forbidden" else detail["msg"].removeprefix("Value error, ")
            name = ".".join(map(str, detail["loc"]))
            lines.append(f"{place}: {name}: {message}" if name else f"{place}: {message}")
        raise ConfigurationError("\n".join(dict.fromkeys(lines)) or describe(error, "sweep")) from error
