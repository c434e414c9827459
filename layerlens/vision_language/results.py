"""What the detection-to-report pipeline hands back: what was found and said of every image, and where time went."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        check: classes that the report leaves out, and those it names although nothing of the kind was detected.
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
    check: dict[str, list[str]] | None = None
    usage: dict[str, Any] | None = None


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
