"""Wishes about single layers and about the choice as a whole, beyond the four budgets."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from layerlens.config.base import ConfigModel
from layerlens.config.names import MethodName


class LayerRule(ConfigModel):
    """What some layers may choose. Rules are applied in order; each one narrows what the ones before it left."""

    layers: str = Field(
        min_length=1,
        description="Which layers: a pattern for their whole names with `*` and `?` (`*.value`, `*.layer.11.*`), or a "
        "role such as `query`, `value`, `ffn_down`.",
    )
    methods: tuple[MethodName, ...] | None = Field(
        default=None, description="Only these methods (or none, unless `require`)."
    )
    forbid: tuple[MethodName, ...] = Field(default=(), description="Not these methods.")
    ranks: tuple[int, ...] | None = Field(default=None, min_length=1, description="Only these ranks.")
    max_rank: int | None = Field(default=None, ge=0, description="No rank above this; 0 leaves the layers alone.")
    require: bool = Field(default=False, description="The layers must be adapted.")

    @model_validator(mode="after")
    def _says_something(self) -> LayerRule:
        if not (self.methods is not None or self.forbid or self.ranks or self.max_rank is not None or self.require):
            raise ValueError("the rule changes nothing; give methods, forbid, ranks, max_rank or require")
        if self.require and (self.max_rank == 0 or self.methods == ()):
            raise ValueError("require contradicts a rule that leaves no option but none")
        return self


class LinearResource(ConfigModel):
    """A resource of your own: every option uses an amount that is linear in what it adds."""

    budget: float = Field(gt=0, description="What all options may use together.")
    per_parameter: float = Field(default=0.0, ge=0, description="Used for each trainable parameter.")
    per_layer: float = Field(default=0.0, ge=0, description="Used for each layer that is adapted.")
    per_rank: float = Field(default=0.0, ge=0, description="Used for each unit of rank.")

    @model_validator(mode="after")
    def _uses_something(self) -> LinearResource:
        if self.per_parameter == self.per_layer == self.per_rank == 0.0:
            raise ValueError("the resource is never used; give per_parameter, per_layer or per_rank")
        return self


class ConstraintConfig(ConfigModel):
    """What the choice must keep beyond the four budgets."""

    max_rank: int | None = Field(default=None, ge=1, description="No rank, adapter width or prefix length above this.")
    rules: tuple[LayerRule, ...] = Field(default=(), description="What single layers may choose.")
    choose_alike: tuple[tuple[str, ...], ...] = Field(
        default=(),
        description="Each entry lists patterns or roles, as in `rules`; of the layers they name, those of one block "
        "choose the same method and rank. `[[query, value]]` gives q and v the same LoRA.",
    )
    min_layers: dict[MethodName, int] = Field(
        default_factory=dict, description="At least so many layers must choose the method."
    )
    resources: dict[str, LinearResource] = Field(
        default_factory=dict, description="Resources of your own with their budgets, such as adapter bytes on disk."
    )

    @field_validator("min_layers")
    @classmethod
    def _not_negative(cls, least: dict[str, int]) -> dict[str, int]:
        for method, count in least.items():
            if count < 1:
                raise ValueError(f"min_layers of {method!r} must be at least 1, got {count}")
        return least

    @field_validator("choose_alike")
    @classmethod
    def _not_empty(cls, entries: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        if any(not entry for entry in entries):
            raise ValueError("an entry of choose_alike lists no layers")
        return entries

    @field_validator("resources")
    @classmethod
    def _new_names(cls, resources: dict[str, LinearResource]) -> dict[str, LinearResource]:
        for name in resources:
            if name in ("trainable_params", "flops", "vram_gb", "latency_ms") or name.startswith("layers_without_"):
                raise ValueError(f"{name!r} is a resource that LayerLens has already; choose another name")
        return resources
