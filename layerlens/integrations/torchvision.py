"""Lets ``import torchvision`` work beside a torch that its compiled part was not built for.

PyPI's torchvision is built for PyPI's CUDA torch. Beside a CPU-only torch its compiled operators cannot be loaded, and
importing it ends in ``operator torchvision::nms does not exist``; transformers, timm and ultralytics, which import it
where it is installed, go down with it. Declaring the operators' schemas first is all that the import needs, and
non-maximum suppression is then computed with torch alone. Where torchvision fits, nothing is changed.

``watch`` puts this off until somebody imports torchvision, so that it costs nothing before.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# The operators that torchvision looks up while it is imported (0.20 to 0.29).
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []
"""The library that declares the schemas: they go when it does."""


def watch() -> None:
    """Have torchvision's first import in this process prepared; does nothing when it was imported before."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def fits() -> bool:
    """Whether the installed torch can load the compiled part of the installed torchvision.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchvision is not installed")
    import torch

    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:  # a symbol or a CUDA library is missing
        return False
    return hasattr(torch.ops.torchvision, "nms")


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


class _Watcher(importlib.abc.MetaPathFinder):
    """Comes first when torchvision is looked for; has its loader prepare torch before, and torchvision after."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: _load(load, module)  # type: ignore[method-assign]
        return spec


def _load(load: Any, module: ModuleType) -> None:
    fitting = fits()
    if not fitting and not _declared:
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
    load(module)
    if not fitting:  # torchvision's own refuses to be called without its compiled part
        module.ops.nms = module.ops.boxes.nms = nms
