"""AdaLoRA's budget (Zhang et al. 2023, arXiv:2303.10512, section 3): how many rank-one parts are left at each step.

Training begins with one and a half times the final ranks. After a warm-up the number of parts falls by a cubic law to
the final one, and the last steps train what is left. What goes at each cut are the parts with the least importance: the
smoothed sensitivity |w·∂L/∂w| of their weights times its smoothed uncertainty, of λ plus the means over a and b.
PEFT's ``AdaLoraModel`` has the same law; its names are tinit, tfinal and deltaT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from layerlens.models import LayerSpec
from layerlens.rank_rules.rule import rank_cost

START = 1.5
"""Ranks at the beginning, in final ranks; the paper's choice."""
WARMUP, FINAL = 0.1, 0.3
"""Shares of the steps before the first cut and after the last one."""
CUTS = 50
"""How many times parts are taken away, at most."""
SMOOTHING = 0.85
"""β₁ and β₂ of sensitivity and uncertainty."""
ORTHOGONALITY = 0.5
"""PEFT's default weight of ‖A Aᵀ − I‖² and ‖BᵀB − I‖²."""


@dataclass(frozen=True)
class Schedule:
    """When parts are taken away, over ``steps`` optimiser steps."""

    steps: int

    @property
    def warmup(self) -> int:
        """Steps before the first cut."""
        return int(WARMUP * self.steps)

    @property
    def final(self) -> int:
        """Steps after the last cut, which train what is left."""
        return max(1, int(FINAL * self.steps))

    @property
    def interval(self) -> int:
        """Steps from one cut to the next."""
        return max(1, (self.steps - self.warmup - self.final) // CUTS)

    def share(self, step: int) -> float | None:
        """Share of what lies between the first and the final budget that is kept in the cut after ``step`` steps.

        None where nothing is cut. From the last cut on it is 0.
        """
        last = self.steps - self.final
        if step >= last:
            return 0.0
        if step <= self.warmup or step % self.interval:
            return None
        return (1.0 - (step - self.warmup) / (last - self.warmup)) ** 3


def final_ranks(layers: Sequence[LayerSpec], budget: int) -> int:
    """Ranks of all layers together that ``budget`` parameters buy on average, at least one for each layer."""
    return max(len(layers), budget * len(layers) // sum(map(rank_cost, layers)))


def first_rank(layers: Sequence[LayerSpec], ranks: int) -> int:
    """Rank of every layer when training begins, for ``ranks`` at the end."""
    return max(ranks // len(layers) + 1, math.ceil(START * ranks / len(layers)))
