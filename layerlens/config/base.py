"""The base of every configuration model, which fails with ConfigurationError, and the types of registered names.

Unknown keys are refused. Errors use the words of someone who writes YAML or JSON by hand, for manifests too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, PydanticKnownError, core_schema

from layerlens.exceptions import ConfigurationError
from layerlens.quantities import Quantity
from layerlens.registry import METHODS, STATISTICS, TASKS, UTILITY_MODELS, Registry, nearest_name

_PASSWORD = re.compile(r"://[^/\s]*@")
# What to say instead of pydantic's words, which speak of Python's types.
_MUST_BE = {
    "model_type": "must be a section (key: value lines)",
    "model_attributes_type": "must be a section (key: value lines)",
    "dict_type": "must be a mapping such as {name: 0.5}",
    "tuple_type": "must be a list such as [1, 2, 4]",
    "list_type": "must be a list",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "finite_number": "must be a finite number",
}


class ConfigModel(BaseModel):
    """A pydantic model whose direct construction raises ConfigurationError instead of ValidationError."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigurationError(describe(error, type(self).__name__)) from error

    # Pydantic calls a custom __init__ for nested models too, where the raw ValidationError (with its location) is
    # wanted; this mark, which pydantic's own __init__ carries, tells it to validate nested models directly.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def describe(error: ValidationError, owner: str) -> str:
    """One line per problem: the field, what is wrong, what came."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
        message = message.replace("Extra inputs are not permitted", "there is no such field")
        # An object that failed a check of its own, or a required field that is missing, would show the whole input.
        came = "" if problem["type"] == "missing" or not place else f", got {problem['input']!r}"
        came = _PASSWORD.sub("://***@", came)
        lines.append(f"{owner}.{place}: {message}{came}" if place else f"{owner}: {message}")
    return "; ".join(lines)


def must_be(detail: ErrorDetails) -> str:
    """What a value must be, such as "must be a whole number"."""
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    return _MUST_BE.get(detail["type"]) or message


def nearest_choice(detail: ErrorDetails) -> str:
    """The nearest of several allowed texts, as a hint to put at the end; "" where nothing is near."""
    if detail["type"] != "literal_error":
        return ""
    known = re.findall("'([^']*)'", detail["ctx"]["expected"])
    nearest = difflib.get_close_matches(str(detail["input"]).lower(), known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest and len(known) > 1 else ""  # a single one is named already


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The known key that ``key`` is probably meant to be."""
    return nearest_name(key, known)


@dataclass(frozen=True)
class RegisteredName:
    """A text that must be a name in ``registry`` or one of ``others``, and fails as a ``Literal`` of them would."""

    registry: Registry[Any]
    others: tuple[str, ...] = ()
    optional: bool = False
    """Whether "" is allowed, for what is found out later."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every text that is allowed."""
        return (*self.others, *self.registry)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [*self.names, *([""] if self.optional else [])], "type": "string"}

    def _check(self, name: str) -> str:
        if self.optional and not name:
            return name
        if name not in self.others and name not in self.registry:
            if reason := self.registry.left_out.get(name):
                raise ValueError(f"{name!r} is left out: {reason}")
            *first, last = [repr(known) for known in self.names]
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}" if first else last})
        return name


@dataclass(frozen=True)
class Amount:
    """A number that may be written as a text with a unit; it is a plain number from then on."""

    quantity: Quantity

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        inner = handler(schema)
        kinds = inner.get("anyOf", [inner])
        return {"anyOf": [kinds[0], {"type": "string", "pattern": self.quantity.pattern}, *kinds[1:]]}

    def _read(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.quantity.parse(value)
        except ValueError as error:
            raise PydanticCustomError("amount", "{reason}", {"reason": str(error)}) from error


ChosenMethod = Annotated[str, RegisteredName(METHODS, ("none",))]
MethodName = Annotated[str, RegisteredName(METHODS)]
StatisticName = Annotated[str, RegisteredName(STATISTICS)]
TaskName = Annotated[str, RegisteredName(TASKS, optional=True)]
UtilityName = Annotated[str, RegisteredName(UTILITY_MODELS)]
