"""What a generator knows about a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GeneratedLayer:
    """One LoRA layer to generate: A is [rank, n_in], B is [n_out, rank]."""

    name: str
    n_in: int
    n_out: int
    rank: int
