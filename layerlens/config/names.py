"""Names that several sections share."""

from __future__ import annotations

from typing import Literal

MethodName = Literal["lora", "adapter", "prefix"]
UtilityName = Literal[
    "auto", "tempered_log", "tempered", "tempered_energy", "signal", "whitened", "gradient", "weighted", "uniform"
]
