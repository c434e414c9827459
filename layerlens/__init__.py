"""LayerLens: which layers of a pretrained model to adapt, with which PEFT method and rank, under hard budgets.

The verbs work on objects: ``plan`` (measure and choose), its parts ``profile`` and ``choose``; ``load``, ``diff`` and
``estimate`` need no model. Importing this imports neither torch nor anything else that is slow.
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
"""Where each public name is; imported when it is first asked for."""
__all__ = ["Plan", "Profile", "__version__", "adapt", "choose", "diff", "estimate", "load", "plan", "profile"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
