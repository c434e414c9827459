"""Statistics over all passes: every step, tokens, totals, by variant, warm-up apart from the measured passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from layerlens.vision_language.results import DONE, STEPS, Item, Outcome, Run


def statistics(values: Sequence[float]) -> dict[str, float] | None:
    """Count, mean, median (p50), p95, least and largest; None for no values. Percentiles interpolate linearly."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    return {
        "n": len(values),
        "mean": float(array.mean()),
        "p50": float(np.quantile(array, 0.5)),
        "p95": float(np.quantile(array, 0.95)),
        "min": float(array.min()),
        "max": float(array.max()),
    }


def summarize(items: Sequence[Item], variant: str) -> dict[str, Any]:
    """What one variant did: counts, and the timings of its finished passes in milliseconds.

    ``per_token_ms`` pools the intervals of all answers; tokens that came several to a chunk are in ``per_chunk_ms``.
    """
    passes = [outcome for item in items for outcome in item.outcomes.get(variant, [])]
    measured = [outcome for outcome in passes if not outcome.run.warmup]
    latest = [outcome for item in items if (outcome := item.latest(variant)) is not None]
    return {
        "variant": variant,
        "images": len(latest),
        "done": sum(outcome.status == DONE for outcome in latest),
        "failed": sum(outcome.status != DONE for outcome in latest),
        "without_findings": sum(outcome.report_source == "no detections" for outcome in latest),
        "detections": sum(len(outcome.detections or ()) for outcome in latest),
        "tokens": _usage(measured),
        "steady": _timings([outcome.run for outcome in measured if outcome.status == DONE]),
        "warmup": _timings([outcome.run for outcome in passes if outcome.run.warmup and outcome.status == DONE]),
    }


def _timings(runs: Sequence[Run]) -> dict[str, Any]:
    known = [step for step in STEPS if any(step in run.steps_ms for run in runs)]
    asked = [run for run in runs if run.time_to_first_token_ms is not None]
    intervals = statistics([ms for run in runs if run.token_unit == "token" for ms in run.token_ms])
    return {
        "passes": len(runs),
        "total_ms": statistics([run.total_ms for run in runs]),
        "total_with_language_model_ms": statistics([run.total_ms for run in asked]),
        "steps_ms": {step: statistics([run.steps_ms[step] for run in runs if step in run.steps_ms]) for step in known},
        "unattributed_ms": statistics([run.unattributed_ms for run in runs]),
        "unattributed_share": _share(runs),
        "batch_ms": statistics([run.batch_ms for run in runs]),
        "time_to_first_token_ms": statistics(_present(run.time_to_first_token_ms for run in asked)),
        "per_token_ms": intervals,
        "per_chunk_ms": statistics([ms for run in runs if run.token_unit == "chunk" for ms in run.token_ms]),
        "tokens_per_s": 1e3 / intervals["mean"] if intervals and intervals["mean"] else None,
        "communication": _communication(runs),
    }


def _share(runs: Sequence[Run]) -> float | None:
    total = sum(run.total_ms for run in runs)
    return sum(run.unattributed_ms for run in runs) / total if total else None


def _communication(runs: Sequence[Run]) -> dict[str, Any] | None:
    found = [run.communication for run in runs if run.communication is not None]
    if not found:
        return None
    return {
        "method": found[-1]["method"],
        "note": found[-1]["note"],
        "ms": statistics(_present(entry["ms"] for entry in found)),
        "lower_ms": statistics([entry["lower_ms"] for entry in found]),
        "upper_ms": statistics([entry["upper_ms"] for entry in found]),
    }


def _usage(outcomes: Sequence[Outcome]) -> dict[str, int]:
    counted = [outcome.usage or {} for outcome in outcomes]
    return {
        "prompt": sum(entry.get("prompt_tokens") or 0 for entry in counted),
        "completion": sum(entry.get("completion_tokens") or 0 for entry in counted),
        "requests": sum(entry.get("attempts") or 0 for entry in counted),
    }


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
