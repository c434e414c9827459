"""The base of every configuration model: closed to unknown keys, frozen, and failing with ConfigurationError."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from layerlens.exceptions import ConfigurationError

_PASSWORD = re.compile(r"://[^/\s]*@")


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
