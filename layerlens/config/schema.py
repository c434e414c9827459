"""What the configuration models say about themselves: JSON Schema, type of the value at a location, summaries.

Messages, ``layerlens init`` and the documentation are made from this, so that they cannot say something else.
"""

from __future__ import annotations

import types
import typing
from typing import Any

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
        annotation = next((kind for kind in alternatives(annotation) if _has_parts(kind)), None)
        section = as_model(annotation)
        if section is not None:
            known = section.model_fields.get(str(part))
            annotation = known.annotation if known is not None else None
        elif typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1]
        elif typing.get_origin(annotation) in (tuple, list):
            annotation = typing.get_args(annotation)[0]
        else:
            return None
    return annotation


def _has_parts(kind: Any) -> bool:
    """Whether a value of this type has keys or places of its own."""
    return as_model(kind) is not None or typing.get_origin(kind) in (dict, tuple, list)


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
