"""Importing torchvision beside a torch that it was not compiled for.

PyPI's torchvision expects PyPI's torch. Beside a CPU build its compiled operators do not load, and the import then ends
in ``operator torchvision::nms does not exist``, because their Python parts are registered on operators that are not
there. Their names are all that the import needs: transforms and models, which LayerLens uses, do not call them. What
ultralytics does call, non-maximum suppression, is computed with torch instead.

``scripts/install.sh`` lets every Python of the test environment do the same, where no torchvision fits its torch.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
MISSING = "does not exist"
_defined: list[Any] = []  # a library's operators vanish with it


def make_torchvision_importable() -> bool:
    """Let ``import torchvision`` work beside any torch from now on; nothing changes where it works already.

    Returns:
        whether torchvision is installed.
    """
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return importlib.util.find_spec("torchvision") is not None


class _Finder(MetaPathFinder):
    """Finds torchvision as Python does; when it is loaded and its operators are not there, they are defined."""

    looking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torchvision" or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def with_operators(module: ModuleType) -> None:
            try:
                execute(module)
            except RuntimeError as error:
                if MISSING not in str(error):
                    raise
                for part in [part for part in sys.modules if part.startswith("torchvision.")]:
                    del sys.modules[part]
                _define_operators()
                execute(module)

        spec.loader.exec_module = with_operators  # type: ignore[method-assign]
        return spec


def _define_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in OPERATORS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _defined.append(library)


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
