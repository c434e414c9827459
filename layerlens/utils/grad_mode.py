"""Gradients where a program calls LayerLens inside of ``torch.no_grad`` or ``torch.inference_mode``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def gradients_on() -> Iterator[None]:
    """Record gradients in the block, whatever mode the caller is in; afterwards the mode is as before."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
