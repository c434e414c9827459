"""Non-maximum suppression where torchvision's compiled part cannot be loaded (see ``torchvision_import``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def make_suppression_work() -> None:
    """Let ``torchvision.ops.nms``, which ultralytics calls, be computed with torch where it refuses to work."""
    import torchvision

    if not torchvision.extension._has_ops():
        module: Any = torchvision.ops
        module.nms = module.boxes.nms = nms


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression, as ``torchvision.ops.nms`` defines it.

    Args:
        boxes: [n, 4], x1 y1 x2 y2.
        scores: [n].
        iou_threshold: a box goes when its intersection over union with a better one is above this.

    Returns:
        int64 indices of the boxes that stay, by falling score.
    """
    import torch

    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    order, kept = scores.argsort(descending=True, stable=True), []
    while order.numel():
        best, rest = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = (high - low).clamp_(min=0).prod(dim=1)
        order = rest[shared <= iou_threshold * (areas[best] + areas[rest] - shared)]
    return torch.stack(kept) if kept else order
