"""Everything that objects hold, as plain values that can be compared: before against after."""

from __future__ import annotations

import hashlib
import random
import types
from typing import Any

import numpy as np
import torch


def picture(value: Any, seen: dict[int, int] | None = None) -> Any:
    """Plain values that are equal where the object has not changed; cycles end where they close."""
    seen = {} if seen is None else seen
    if isinstance(value, (str, bytes, int, float, bool, type(None))):
        return value
    if isinstance(value, torch.Tensor):
        data = (
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        )
        gradient = None if not value.is_leaf or value.grad is None else picture(value.grad)
        return ("tensor", id(value), str(value.dtype), tuple(value.shape), value.requires_grad, gradient, digest(data))
    if isinstance(value, torch.Generator):
        return digest(value.get_state().numpy().tobytes())
    if id(value) in seen:
        return ("seen", seen[id(value)])
    seen[id(value)] = len(seen)
    if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type)):
        return ("code", id(value) if isinstance(value, type) else getattr(value, "__qualname__", repr(value)))
    if isinstance(value, dict):
        return (type(value).__name__, [(picture(key, seen), picture(part, seen)) for key, part in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [picture(part, seen) for part in value])
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, sorted(map(repr, value)))
    if type(value).__module__ == "tokenizers" and hasattr(value, "to_str"):
        return value.to_str()
    if hasattr(value, "__dict__") and not type(value).__module__.startswith(("pyarrow", "pandas")):
        return (type(value).__name__, id(value), picture(vars(value), seen))
    return (type(value).__name__, id(value))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def random_state() -> tuple[str, ...]:
    states = (repr(random.getstate()), repr(np.random.get_state()), repr(torch.get_rng_state().tolist()))
    return tuple(digest(state.encode()) for state in states)


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Where two pictures differ; [] where they do not."""
    if before == after:
        return []
    if type(before) is type(after) and isinstance(before, (list, tuple)) and len(before) == len(after):
        parts = zip(before, after, strict=True)
        return [line for i, (a, b) in enumerate(parts) for line in differences(a, b, f"{path}/{_name(a, i)}")][:20]
    return [f"{path}: {before!r:.200} -> {after!r:.200}"]


def _name(part: Any, position: int) -> Any:
    return part[0] if isinstance(part, tuple) and part and isinstance(part[0], str) else position
