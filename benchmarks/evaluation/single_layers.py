"""The calibration study: predicted utilities against measured gains of single layers, and how stable they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from layerlens.evaluation.results import Record
from layerlens.evaluation.stacks import Arm
from layerlens.evaluation.study_task import StudyTask
from layerlens.evaluation.training import train
from layerlens.models import UtilityTable

RANK = 2
N_BOOTSTRAP = 2000


def single_layer_records(
    task: StudyTask, layers: Sequence[str], *, steps: int, seed: int, rates: Sequence[float]
) -> list[Record]:
    """Gains with one layer adapted (rank 2) over none, all else equal: ``validation_gain`` on validation samples, and
    ``gain`` on validation and test samples together.

    ``gain`` is what predictions are compared with; nothing else may be chosen by it.
    """
    counts = [float(task.label_count(part.labels).sum()) for part in (task.validation, task.test)]
    arms = [Arm({layer: RANK}, seed, rate) for rate in rates for layer in layers] + [Arm({}, seed, rates[0])]
    runs = train(task, arms, steps=steps)
    losses = np.array([[run.validation_loss, run.test_loss] for run in runs])
    gains = losses[-1] - losses[:-1]
    together = gains @ counts / sum(counts)
    return [
        {"kind": "single", "task": task.name, "layer": next(iter(arm.ranks)), "lr": arm.learning_rate, "seed": seed,
         "steps": steps, "gain": float(f"{gain:.6g}"), "validation_gain": float(f"{own[0]:.6g}")}
        for arm, own, gain in zip(arms[:-1], gains, together, strict=True)
    ]  # fmt: skip


def single_layer_gains(records: Sequence[Record]) -> dict[str, float]:
    """Layer -> gain, averaged over seeds, at the layer's best learning rate."""
    by_layer: dict[str, dict[float, list[float]]] = {}
    for record in records:
        by_layer.setdefault(record["layer"], {}).setdefault(record["lr"], []).append(record["gain"])
    return {layer: max(float(np.mean(gains)) for gains in rates.values()) for layer, rates in by_layer.items()}


def reliability(records: Sequence[Record]) -> float:
    """Spearman between the gains that two seeds measured, stepped up to their mean by the Spearman-Brown formula: no
    prediction can be expected to correlate with the mean by more than its square root. NaN for fewer than two seeds.
    """
    by_seed = {
        seed: single_layer_gains([record for record in records if record["seed"] == seed])
        for seed in sorted({record["seed"] for record in records})
    }
    if len(by_seed) < 2:
        return float("nan")
    first, second, *_ = by_seed.values()
    found = rank_correlation(first, second)[0]
    return 2.0 * found / (1.0 + found) if found > 0.0 else found


def predicted_gains(table: UtilityTable, rank: int = RANK) -> dict[str, float]:
    """Layer -> utility of LoRA with ``rank``."""
    pairs = zip(table.options, table.utility, strict=True)
    return {option.layer: float(utility) for option, utility in pairs if option.rank == rank}


def rank_correlation(first: dict[str, float], second: dict[str, float]) -> tuple[float, float, float]:
    """Spearman's coefficient over layers and its 95 % bootstrap interval (layers resampled); NaN for constants."""
    names = sorted(first)
    a, b = np.array([first[name] for name in names]), np.array([second[name] for name in names])
    if not (np.ptp(a) > 0.0 and np.ptp(b) > 0.0):
        return (float("nan"),) * 3
    generator = np.random.default_rng(0)
    resampled = []
    for _ in range(N_BOOTSTRAP):
        rows = generator.integers(len(names), size=len(names))
        if np.ptp(a[rows]) > 0.0 and np.ptp(b[rows]) > 0.0:
            resampled.append(spearmanr(a[rows], b[rows]).statistic)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(spearmanr(a, b).statistic), float(low), float(high)
