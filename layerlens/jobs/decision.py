"""The certified choice from statistics and a configuration; neither a model nor torch is needed for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from layerlens.jobs.checkpointed import certified_choice
from layerlens.jobs.job import Job
from layerlens.jobs.offers import told_of_offers
from layerlens.jobs.solve import Solution, option_tables
from layerlens.models import Manifest, ModelSpec, ModelStatistics


@dataclass(frozen=True)
class Decision:
    """What was chosen.

    Args:
        solution: with the certificate, and why each layer got its option.
        manifest: what is written of it.
        trained: figures of trainings that the choice was compared in.
    """

    solution: Solution
    manifest: Manifest
    trained: dict[str, Any] = field(default_factory=dict)


def solve_stage(job: Job, spec: ModelSpec, statistics: ModelStatistics) -> Solution:
    """``solved`` as a stage of its own; says when nothing is adapted because no option has a gain."""
    with job.clock.stage("solve"), job.progress.stage("Solving"):
        solution = solved(job, spec, statistics)
        if note := _not_checkpointed(job, statistics):
            job.warnings.add(note)
        for line in told_of_offers(spec, job.config.optimization.ranks(), solution.problem):
            job.warnings.add(line)
        if not (solution.utilities.utility > 0.0).any():
            job.warnings.add(
                f"no layer is adapted: by profiling.utility_model {solution.utilities.model!r} no option has a gain "
                "above its sampling noise; raise data.calibration_samples, offer more methods, or choose 'gradient' "
                "or 'uniform'"
            )
    return solution


def _not_checkpointed(job: Job, statistics: ModelStatistics) -> str:
    """Why the configuration's checkpointing changes nothing; "" where it does, or none is asked for."""
    wanted, step = job.config.training.gradient_checkpointing, statistics.step
    if not wanted or step is None:  # that no step is recorded is said already
        return ""
    if not step.blocks:
        return (
            "training.gradient_checkpointing: transformers cannot checkpoint single blocks of this model, so memory "
            "and time of a step are predicted without checkpoints"
        )
    if wanted == "auto" and job.config.optimization.max_vram_gb is None:
        return (
            "training.gradient_checkpointing: auto checkpoints nothing without a memory budget; set "
            "optimization.max_vram_gb"
        )
    return ""


def solved(
    job: Job,
    spec: ModelSpec,
    statistics: ModelStatistics,
    utility_model: str | None = None,
    kept: float | None = None,
) -> Solution:
    """Utilities and costs of every option, and the certified choice; by another utility model where one is given.

    ``kept`` is the share of uniform LoRA's improvement to keep, of ``find_allocation``.
    """
    utilities, costs = option_tables(spec, statistics, job.config, utility_model)
    return certified_choice(spec, statistics, utilities, costs, job.config, job.threads, kept)
