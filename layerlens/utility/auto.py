"""The utility model that depends on the budget: narrow layers for small budgets, even ranks for large ones."""

from __future__ import annotations

from dataclasses import dataclass

from layerlens.models import LORA, ModelSpec
from layerlens.utility.model import UtilityModel
from layerlens.utility.signal import marginal_parameters
from layerlens.utility.tempered import TEMPERED_ENERGY, TEMPERED_LOG

SPREAD_FROM = 2.0
"""Ranks on every layer that a budget must pay for before it is spread by ``tempered_log``."""


@dataclass(frozen=True)
class Auto(UtilityModel):
    """``tempered_energy`` (parameters go to few, mostly narrow layers) for budgets below rank 2 on every layer.

    ``tempered_log`` (ranks become alike) for larger budgets, and where parameters are not limited at all. Which law is
    right where was measured at one and four ranks for each layer (docs/decisions/utility.md).
    """

    def for_budget(self, spec: ModelSpec, max_trainable_params: float | None) -> UtilityModel:
        """The one of the two that the budget asks for."""
        taking = [layer for layer in spec.layers if LORA in layer.methods] or [x for x in spec.layers if x.methods]
        methods = [LORA if LORA in layer.methods else layer.methods[0] for layer in taking]
        unit = sum(marginal_parameters(layer, method) for layer, method in zip(taking, methods, strict=True))
        tight = max_trainable_params is not None and max_trainable_params < SPREAD_FROM * unit
        return TEMPERED_ENERGY if tight else TEMPERED_LOG


MODEL = Auto(
    "auto",
    TEMPERED_LOG.function,
    TEMPERED_LOG.unit,
    tuple(dict.fromkeys(TEMPERED_ENERGY.needs + TEMPERED_LOG.needs)),
)
