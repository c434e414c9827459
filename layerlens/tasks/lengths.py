"""Lengths of sequences: defaults are lowered to the positions that the model has; longer ones asked for are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from layerlens.config import DataConfig, ModelConfig, OptimizationConfig
from layerlens.exceptions import ConfigurationError
from layerlens.registry import TASKS
from layerlens.tasks.guess import model_description

MAX_LENGTH, SEQUENCE_LENGTH = "data.max_length", "optimization.latency_profile.sequence_length"
LENGTHS = {
    MAX_LENGTH: lambda config: config.data.max_length,
    SEQUENCE_LENGTH: lambda config: config.optimization.latency_profile.sequence_length,
}
PADDED_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "esm")
"""Model types that number their positions from the padding token's id on; ``longest_sequence`` asks the model."""

Section = TypeVar("Section", bound=BaseModel)


def lowered(
    model: ModelConfig, data: DataConfig, optimization: OptimizationConfig, base_dir: Path | None = None
) -> tuple[dict[str, Any], str]:
    """Sections in which every length that is a default is lowered to the model's positions, and what to say of it.

    Opens the model's ``config.json``, nothing else. Lengths that the configuration gives stay as they are.

    Args:
        model, data, optimization: sections of the configuration.
        base_dir: folder that relative places in them start from.

    Returns:
        The changed sections by name, for ``model_copy(update=...)``, and one line; neither where nothing changes.

    Raises:
        ModelNotFoundError: there is no such model.
    """
    if not model.task or TASKS[model.task].inputs in ("image", "audio"):
        return {}, ""
    limit = positions(model_description(model, base_dir))
    profile = optimization.latency_profile
    sections: dict[str, Any] = {}
    keys: list[str] = []
    if limit is not None and data.max_length > limit and "max_length" not in data.model_fields_set:
        sections["data"] = _with(data, "max_length", limit)
        keys.append(MAX_LENGTH)
    if limit is not None and profile.sequence_length > limit and "sequence_length" not in profile.model_fields_set:
        sections["optimization"] = _with(optimization, "latency_profile", _with(profile, "sequence_length", limit))
        keys.append(SEQUENCE_LENGTH)
    return sections, f"{' and '.join(keys)}: {limit}, since the model has {limit} positions" if keys else ""


def refuse_longer(asked: Mapping[str, int], limit: int) -> None:
    """Refuse sequences that are longer than the model's positions, at which torch would fail with an index error.

    Raises:
        ConfigurationError: names all keys to change, and the limit.
    """
    too_long = [key for key, length in asked.items() if length > limit]
    if too_long:
        key, *others = too_long
        also = f", and for {' and '.join(others)} too" if others else ""
        raise ConfigurationError(
            f"{key}: {asked[key]} tokens, but the model has {limit} positions; use at most {limit}{also}"
        )


def positions(description: Mapping[str, Any]) -> int | None:
    """The longest sequence that the model of a ``config.json`` takes; None where it does not say, or has no limit."""
    limit = description.get("max_position_embeddings")
    if not isinstance(limit, int):
        return None
    padded = description.get("model_type") in PADDED_POSITIONS
    return limit - int(description.get("pad_token_id") or 0) - 1 if padded else limit


def _with(section: Section, name: str, value: Any) -> Section:
    """A copy with the value, which does not count as given by the configuration."""
    found = section.model_copy(update={name: value})
    if name not in section.model_fields_set:
        found.model_fields_set.discard(name)
    return found
