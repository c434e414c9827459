"""What the pipeline hands back: what was found and said of every image, where time went, statistics over all passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.models import Detection

DONE, FAILED = "done", "failed"
STEPS = {
    "load": "load the image",
    "preprocess": "preprocess",
    "detect": "detector inference",
    "nms": "non-maximum suppression",
    "prompt": "format the prompt",
    "llm_prepare": "prepare the request, retries",
    "llm_encode": "tokenize",
    "llm_connect": "connect",
    "llm_send": "send the request",
    "llm_first_token": "wait for the first token",
    "llm_decode": "further tokens",
    "llm_finish": "end of the answer",
    "llm_failed": "failed attempts",
    "check": "check the report",
}
"""Every step in the order of time, with the words that tables use."""


@dataclass(frozen=True)
class Run:
    """The timings of one pass of one image.

    Args:
        repeat: from 0; warm-up passes count for themselves.
        warmup: it was a warm-up pass.
        steps_ms: consecutive steps; of steps that a batch does at once, this image's equal share.
        total_ms: this image's share of the wall time of its batch.
        unattributed_ms: ``total_ms`` minus the sum of the steps.
        batch_size, batch_ms: images of the batch, and its wall time: how long this image waited.
        time_to_first_token_ms, token_ms, token_unit: see ``Generation``; None and empty where no model was asked.
        communication: see ``Communication``, as a mapping.
    """

    repeat: int
    warmup: bool
    steps_ms: dict[str, float]
    total_ms: float
    unattributed_ms: float
    batch_size: int
    batch_ms: float
    time_to_first_token_ms: float | None = None
    token_ms: tuple[float, ...] = ()
    token_unit: str = "token"
    communication: dict[str, Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """What one pass made of one image.

    Args:
        status: "done" or "failed".
        failed_step, reason: where it failed and why, in a line.
        size: width and height of the image; None where it could not be loaded.
        detections: best first; None where the detector did not get to it.
        messages: what the language model was asked.
        report: its answer, or the sentence that nothing was found.
        report_source: "language model" or "no detections".
        partial_report: what had arrived of an answer that broke off.
        check: what of the report is wrong, see ``prompt.check_report``; None where there is none to check.
        usage: prompt and completion tokens, finish reason, attempts and why earlier ones failed.
        run: the timings.
    """

    status: str
    run: Run
    failed_step: str | None = None
    reason: str | None = None
    size: tuple[int, int] | None = None
    detections: tuple[Detection, ...] | None = None
    messages: list[dict[str, str]] | None = None
    report: str | None = None
    report_source: str | None = None
    partial_report: str | None = None
    check: dict[str, list[Any]] | None = None
    usage: dict[str, Any] | None = None

    @property
    def is_wrong(self) -> bool | None:
        """Whether the report says something else than the boxes; None where it was not checked."""
        return None if self.check is None else any(self.check.values())


@dataclass
class Item:
    """One image and all its passes, by variant.

    Args:
        path: the file.
        outcomes: variant -> passes in the order of time.
    """

    path: Path
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)

    def latest(self, variant: str) -> Outcome | None:
        """The last measured pass, or the last warm-up pass if there was no other."""
        passes = self.outcomes.get(variant, [])
        measured = [outcome for outcome in passes if not outcome.run.warmup]
        found = measured or passes
        return found[-1] if found else None

    @property
    def failed(self) -> bool:
        """The last measured pass of some variant failed."""
        last = [self.latest(variant) for variant in self.outcomes]
        return any(outcome is not None and outcome.status == FAILED for outcome in last)


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
        "reports_checked": sum(outcome.check is not None for outcome in latest),
        "reports_wrong": sum(bool(outcome.is_wrong) for outcome in latest),
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
