"""From boxes to the words that a language model is asked with, and what its answer is held against."""

from __future__ import annotations

import re
from collections.abc import Sequence

from layerlens.models import Detection

SYSTEM = "You write short factual reports. Describe only the findings that are listed."
TEMPLATE = "Findings in the image ({count}):\n{findings}\nWrite the report."

Messages = list[dict[str, str]]


def build_messages(
    detections: Sequence[Detection], *, image: str, size: tuple[int, int], template: str | None = None
) -> Messages:
    """A chat of a system and a user message that lists every finding with place and confidence.

    Args:
        detections: in the order in which they are listed.
        image: its file name.
        size: width and height in pixels.
        template: the user message instead of TEMPLATE.
    """
    content = (template or TEMPLATE).format(
        findings="\n".join(describe(detection, size) for detection in detections),
        image=image, width=size[0], height=size[1], count=len(detections),
    )  # fmt: skip
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def describe(detection: Detection, size: tuple[int, int]) -> str:
    """``- nodule, upper left, confidence 0.93``."""
    return f"- {detection.label}, {place(detection.box, size)}, confidence {detection.confidence:.2f}"


def place(box: tuple[float, float, float, float], size: tuple[int, int]) -> str:
    """Where the middle of the box lies, by thirds of the image: ``upper left``, ``middle``, ``lower right`` ..."""
    across = min(2, int(3 * (box[0] + box[2]) / 2 / size[0]))
    down = min(2, int(3 * (box[1] + box[3]) / 2 / size[1]))
    words = (("upper", "middle", "lower")[down], ("left", "center", "right")[across])
    return "middle" if words == ("middle", "center") else " ".join(words)


def no_findings(confidence: float) -> str:
    """The report on an image in which nothing was detected; no language model is asked, so that none invents."""
    return f"No findings were detected (confidence {confidence:g} and above)."


def check_report(report: str, detections: Sequence[Detection], known: Sequence[str]) -> dict[str, list[str]]:
    """Names of classes that the report leaves out, and of those it names although nothing of the kind was detected.

    Args:
        report: the text.
        detections: what was handed to the language model.
        known: all class names of the detector.
    """

    def named(label: str) -> bool:
        return re.search(rf"\b{re.escape(label)}(s|es)?\b", report, re.IGNORECASE) is not None

    there = {detection.label for detection in detections}
    return {
        "left_out": sorted(label for label in there if not named(label)),
        "not_detected": sorted(label for label in set(known) - there if named(label)),
    }
