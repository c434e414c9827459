"""A module that is imported when something of it is first used.

For files whose objects are also read where no model is: ``layerlens optimize`` asks a statistic for its fields and
needs no torch, whose import takes a second. ``torch = ImportedWhenUsed("torch")`` stands for the module in functions;
type checkers see the module itself.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class ImportedWhenUsed(ModuleType):
    """Stands for the module ``name``."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.__name__), attribute)
