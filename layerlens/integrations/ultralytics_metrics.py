"""Mean average precision of a detection model of ultralytics, from its raw outputs, by ultralytics' own functions."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from layerlens.integrations.ultralytics_loss import DetectionTargets

CONFIDENCE, OVERLAP, MOST_BOXES = 0.001, 0.7, 300
"""What ultralytics' validator keeps of a model's boxes."""

Matched = dict[str, np.ndarray]
"""Of one image: ``right`` [boxes, 10] at overlaps of 0.5 to 0.95, ``confidence`` and ``kind`` [boxes], and its objects'
classes in ``true``."""


def matched(output: Any, targets: DetectionTargets) -> list[Matched]:
    """The boxes that the model finds in every image, and which of them are right.

    Args:
        output: what the model returned in evaluation mode.
        targets: of the same images.
    """
    import torch
    from ultralytics.engine.validator import BaseValidator
    from ultralytics.utils.metrics import box_iou
    from ultralytics.utils.nms import non_max_suppression
    from ultralytics.utils.ops import xywh2xyxy

    overlaps: Any = SimpleNamespace(iouv=torch.linspace(0.5, 0.95, 10))
    kept = non_max_suppression(
        output, CONFIDENCE, OVERLAP, max_det=MOST_BOXES, multi_label=True, nc=targets.classes, end2end=targets.end2end
    )
    found = []
    for boxes, sample in zip(kept, targets.samples, strict=True):
        true, kinds = sample["cls"].reshape(-1).cpu(), boxes[:, 5].cpu()
        right = np.zeros((len(boxes), len(overlaps.iouv)), dtype=bool)
        if len(true) and len(boxes):
            corners = xywh2xyxy(sample["bboxes"]) * targets.side
            overlap = box_iou(corners.cpu().float(), boxes[:, :4].cpu().float())
            right = BaseValidator.match_predictions(overlaps, kinds, true, overlap).numpy()
        found.append(
            {"right": right, "confidence": boxes[:, 4].cpu().numpy(), "kind": kinds.numpy(), "true": true.numpy()}
        )
    return found


def average_precision(images: Sequence[Matched]) -> dict[str, float]:
    """``map50`` (at an overlap of 0.5) and ``map50_95`` (mean over 0.5 to 0.95), from 0 to 1; 0 without objects."""
    from ultralytics.utils.metrics import ap_per_class

    right, confidence, kind, true = (
        np.concatenate([image[name] for image in images]) for name in ("right", "confidence", "kind", "true")
    )
    if not len(true) or not len(kind):
        return {"map50_95": 0.0, "map50": 0.0}
    ap = ap_per_class(right, confidence, kind, true)[5]
    return {"map50_95": float(ap.mean()), "map50": float(ap[:, 0].mean())}
