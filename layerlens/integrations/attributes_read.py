"""What a model's code reads of its layers beside calling them: PEFT's LoRA of a convolution has no ``stride``.

Models that pad as TensorFlow does (MobileNetV1 and V2 of transformers) ask a convolution for its stride and kernel size
before they call it. Of a layer of PEFT that ends in an AttributeError, so such layers are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

MISSING = frozenset(
    ("stride", "kernel_size", "padding", "padding_mode", "output_padding", "dilation", "groups", "in_channels",
     "out_channels", "transposed")
)  # fmt: skip
"""Attributes of torch's convolutions that PEFT's layers around them do not have."""
OURS = ("torch", "layerlens", "peft")
OUTER_FRAMES = 3


@contextmanager
def attributes_read(modules: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, set[str]]]:
    """Path -> which of ``MISSING`` code outside of the module reads of it while this is open."""
    found: dict[str, set[str]] = {}
    paths = {id(module): path for path, module in modules.items()}
    kinds: dict[type, type] = {}
    before = {path: type(module) for path, module in modules.items()}
    for path, module in modules.items():
        kind = before[path]
        if kind not in kinds:
            kinds[kind] = _watching(kind, found, paths)
        module.__class__ = kinds[kind]
    try:
        yield found
    finally:
        for path, module in modules.items():
            module.__class__ = before[path]


def _watching(kind: Any, found: dict[str, set[str]], paths: Mapping[int, str]) -> type:
    def read(self: Any, name: str) -> Any:
        if name in MISSING and not _by_itself(self):
            found.setdefault(paths.get(id(self), ""), set()).add(name)
        return kind.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})


def _by_itself(module: Any) -> bool:
    """Whether torch, PEFT or LayerLens reads it, or code that the module itself has called."""
    frame = sys._getframe(2)
    if str(frame.f_globals.get("__name__", "")).partition(".")[0] in OURS:
        return True
    for _ in range(OUTER_FRAMES):
        if frame.f_locals.get("self") is module:
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False
