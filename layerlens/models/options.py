"""The choices of one layer: a PEFT method and its size."""

from __future__ import annotations

from dataclasses import dataclass

NONE, LORA, ADAPTER, PREFIX = "none", "lora", "adapter", "prefix"


@dataclass(frozen=True)
class Option:
    """One choice for one layer.

    ``rank`` is the size of the method: the LoRA rank r, the adapter bottleneck width k, the number of prefix pairs p;
    0 exactly for "none".
    """

    layer: str
    method: str
    rank: int
