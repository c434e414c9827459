"""Importing torchvision beside a torch that it was not compiled for.

PyPI's torchvision expects PyPI's torch. Beside a CPU build its compiled operators do not load, and the import then ends
in ``operator torchvision::nms does not exist``, because their Python parts are registered on operators that are not
there. Their names are all that the import needs: transforms and models, which LayerLens uses, do not call them.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_defined: list[Any] = []  # a library's operators vanish with it


def make_torchvision_importable() -> bool:
    """Whether torchvision can be imported now; nothing changes where it already could."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _define_operators()
        import torchvision  # noqa: F401
    return True


def _define_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in OPERATORS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _defined.append(library)
