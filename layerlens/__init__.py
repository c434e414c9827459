"""LayerLens: which layers of a pretrained model to adapt, with which PEFT method and rank, under hard budgets.

``plan`` measures a model in memory on your data and chooses within your budgets. ``profile`` and ``choose`` are its two
steps. ``adapt`` plans on a trainer and adds the chosen LoRA to its model. ``load``, ``diff`` and ``estimate`` need no
model. Importing this package does not import torch or any other slow package.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "Plan": "layerlens.library.plan",
    "Profile": "layerlens.library.profile",
    "adapt": "layerlens.library.adapt",
    "choose": "layerlens.library.api",
    "diff": "layerlens.library.views",
    "estimate": "layerlens.library.views",
    "load": "layerlens.library.api",
    "plan": "layerlens.library.api",
    "profile": "layerlens.library.api",
}
"""Module of each public name; imported on first use."""
__all__ = ["Plan", "Profile", "__version__", "adapt", "choose", "diff", "estimate", "load", "plan", "profile"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
