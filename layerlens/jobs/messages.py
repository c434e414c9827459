"""What the user should know about a run that ends well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layerlens.config import RunConfig
from layerlens.jobs.solve import Solution
from layerlens.models import Manifest

TIMING_NOISE = 0.05
"""Relative error that two timings of the same thing have on an idle machine."""


class Warnings:
    """Lines for the user, told at once and kept for the result."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)
        self.tell(line)


def warn_of_no_gain(solution: Solution, config: RunConfig, warnings: Warnings) -> None:
    """Say when nothing is adapted because no option has a gain."""
    if not (solution.utilities.utility > 0.0).any():
        warnings.add(
            f"nothing is adapted: by profiling.utility_model {solution.utilities.model!r} no option has a gain "
            "above its sampling noise; raise data.calibration_samples, offer more methods, or choose 'gradient' or "
            "'uniform'"
        )


def warn_of_overrun(manifest: Manifest, measured: dict[str, Any], warnings: Warnings) -> None:
    """Say which measured figures are above their budgets, and when the machine was too busy to time."""
    busy = measured["latency_ms"]["measured"] < (1 - TIMING_NOISE) * measured["base_latency_ms"]["measured"]
    if busy:
        warnings.add(
            "latency: the model was faster with its options than without, so this machine was too busy to time it; run "
            "again when it is idle"
        )
    for use in manifest.resources:
        if use.resource not in measured or (use.resource == "latency_ms" and busy):
            continue
        found = measured[use.resource]["measured"]
        if use.budget is not None and found > use.budget:
            warnings.add(
                f"{use.resource}: measured {found:.4g} on this machine, above the budget of {use.budget:g} that the "
                "predictions keep; if this is the device you budget for, put its own figures in "
                "optimization.latency_profile"
            )


def warn_of_calibration(manifest: Manifest, joint: dict[str, Any], warnings: Warnings) -> None:
    """Say when the proxies speak against the utility model, or for treating all layers alike."""
    found = manifest.predicted.calibration
    assert found is not None
    if found.proxies < found.planned:
        warnings.add(
            f"profiling.proxies: the time limit ended after {found.proxies} of {found.planned} options; "
            "run it again to go on"
        )
    interval = found.spearman_interval
    if interval is not None and interval[0] <= 0.0:
        warnings.add(
            f"utility model {manifest.utility_model!r} did not clearly rank the {found.proxies} trained options "
            f"(Spearman {found.spearman:.2f}, 95 % from {interval[0]:.2f} to {interval[1]:.2f}); train more "
            "profiling.proxies.options or steps, or try another profiling.utility_model"
        )
    over = joint["loss_drop_over_uniform"]
    if over["measured"] < -2.0 * over["standard_error"]:
        warnings.add(
            f"treating all layers alike gained more in the same steps, by {-over['measured']:.4g} ± "
            f"{over['standard_error']:.2g} per sample; profiling.utility_model: uniform chooses that"
        )
