"""Names of registered things, as configuration fields take them: checked against the registry, listed in the schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from layerlens.registry import METHODS, STATISTICS, TASKS, UTILITY_MODELS, Registry


@dataclass(frozen=True)
class RegisteredName:
    """A text that must be a name in ``registry`` or one of ``others``, and fails as a ``Literal`` of them would."""

    registry: Registry[Any]
    others: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every text that is allowed."""
        return (*self.others, *self.registry)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.names), "type": "string"}

    def _check(self, name: str) -> str:
        if name not in self.others and name not in self.registry:
            *first, last = [repr(known) for known in self.names]
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}" if first else last})
        return name


ChosenMethod = Annotated[str, RegisteredName(METHODS, ("none",))]
MethodName = Annotated[str, RegisteredName(METHODS)]
StatisticName = Annotated[str, RegisteredName(STATISTICS)]
TaskName = Annotated[str, RegisteredName(TASKS)]
UtilityName = Annotated[str, RegisteredName(UTILITY_MODELS)]
