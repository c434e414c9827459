"""What to say of a model whose own code fails on a batch."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

OURS = (Path(__file__).parents[1], Path(torch.__file__).parent)
"""Folders of code that is not the model's."""


def told_of_failure(model: torch.nn.Module, inputs: Mapping[str, Any], error: Exception) -> str:
    """Where and why a model fails on a batch, and what the batch was."""
    whole = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in whole if set(OURS).isdisjoint(Path(frame.filename).parents)]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    said = (str(error).strip() or "no reason given").splitlines()[0]
    given = ", ".join(f"{name}: {str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for name, x in inputs.items())
    package = type(model).__module__.partition(".")[0]
    installed = "site-packages" in Path(getattr(sys.modules.get(package), "__file__", None) or "").parts
    other = f"another version of {package}, " if installed and package != "torch" else ""
    return (
        f"model.name_or_path: {type(model).__name__} fails on a batch of this data: {type(error).__name__}: {said}"
        f"{where}; it got {given}. Check data.source, or try {other}another model.dtype"
    )
