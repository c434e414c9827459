"""The loss of detection models of ultralytics, image by image, and their mean average precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.integrations.pretrained import PretrainedModel

if TYPE_CHECKING:
    import torch


CONFIDENCE, OVERLAP, MOST_BOXES = 0.001, 0.7, 300
"""What ultralytics' validator keeps of a model's boxes."""

Matched = dict[str, np.ndarray]
"""Of one image: ``right`` [boxes, 10] at overlaps of 0.5 to 0.95, ``confidence`` and ``kind`` [boxes], and its objects'
classes in ``true``."""


@dataclass(frozen=True)
class DetectionTargets:
    """What the loss of a batch needs beside the model's output.

    Args:
        criterion: ultralytics' loss of this model.
        samples: for each image its ``cls``, ``bboxes`` and ``batch_idx`` (all 0), as ultralytics' loss reads them.
        side: of the square input, pixels.
        classes: how many there are.
        end2end: whether the model needs no suppression of boxes.
    """

    criterion: Any
    samples: tuple[dict[str, torch.Tensor], ...]
    side: int = 0
    classes: int = 0
    end2end: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, places: slice) -> DetectionTargets:
        """Those of some images."""
        return replace(self, samples=self.samples[places])

    def each_tensor(
        self, change: Callable[[torch.Tensor], torch.Tensor], order: Sequence[int] | None = None
    ) -> DetectionTargets:
        """The images in another order, or, without one, every tensor changed (moved to a device)."""
        if order is not None:
            return replace(self, samples=tuple(self.samples[place] for place in order))
        moved = ({name: change(tensor) for name, tensor in sample.items()} for sample in self.samples)
        return replace(self, samples=tuple(moved))


def detection_targets(
    pretrained: PretrainedModel, sizes: Sequence[tuple[int, int]], side: int, objects: Sequence[Any]
) -> DetectionTargets:
    """The boxes of every image where they lie in the detector's square input.

    Args:
        pretrained: a detector, as its source loads it.
        sizes: width and height of every image.
        side: side of the square that they were scaled into.
        objects: of every image (class, (x1, y1, x2, y2)) of each object, in shares of its width and height.
    """
    import torch

    samples = []
    for (width, height), found in zip(sizes, objects, strict=True):
        scale = min(side / width, side / height)
        wide, high = max(round(width * scale), 1), max(round(height * scale), 1)
        left, top = round((side - wide) / 2 - 0.1), round((side - high) / 2 - 0.1)  # where ultralytics puts it
        boxes = torch.tensor([box for _, box in found], dtype=torch.float32).reshape(-1, 4)
        corners = boxes * torch.tensor([wide, high, wide, high]) + torch.tensor([left, top, left, top])
        centres, spans = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        samples.append(
            {
                "cls": torch.tensor([[float(kind)] for kind, _ in found]).reshape(-1, 1),
                "bboxes": torch.cat([centres, spans], dim=1) / side,
                "batch_idx": torch.zeros(len(found)),
            }
        )
    base = _base(pretrained.model)
    return DetectionTargets(
        _criterion(base), tuple(samples), side, len(pretrained.labels), bool(getattr(base, "end2end", False))
    )


def sample_losses(output: Any, targets: DetectionTargets) -> torch.Tensor:
    """ultralytics' detection loss (box, class and distribution terms, weighted as it trains) of every image by itself.

    ultralytics divides by the assignment scores of the whole batch; one image at a time, a loss is its own.

    Args:
        output: what the model returned in evaluation mode.
        targets: of the same images.

    Returns:
        [b] losses.
    """
    import torch

    raw = output[1] if isinstance(output, (tuple, list)) else output
    losses = []
    for place, sample in enumerate(targets.samples):
        loss, _ = targets.criterion(_row(raw, place), sample)
        losses.append(loss.sum())
    return torch.stack(losses)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _criterion(base: Any) -> Any:
    from ultralytics.cfg import get_cfg

    if isinstance(base.args, dict):  # as checkpoints have it
        base.args = get_cfg(overrides=base.args)
    kept = base.__dict__.get("layerlens_criterion")
    if kept is None:
        kept = base.init_criterion()
        base.__dict__["layerlens_criterion"] = kept  # no submodule: the loss is not part of the model
    return kept


def _row(value: Any, place: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _row(part, place) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_row(part, place) for part in value]
    return value[place : place + 1]


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
