"""Which arguments a model's ``forward`` has: one of the user's own may lack those that tokenizers and tasks give."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any


def untaken(model: Any, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that ``forward`` has no argument for; none where it takes any keyword."""
    parameters = _parameters(model)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [name for name in names if name not in parameters]


def takes_all(model: Any, names: Sequence[str]) -> bool:
    """Whether ``forward`` has an argument of each of these names; transformers' models may take them as keywords."""
    parameters = _parameters(model)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return all(name in parameters for name in names) or (open_ended and hasattr(model, "base_model_prefix"))


def compares_towers(model: Any) -> bool:
    """Whether a model takes images and texts side by side, to compare them (CLIP and its kin, with ``return_loss``)."""
    return "return_loss" in _parameters(model)


def required(model: Any) -> tuple[str, ...]:
    """The arguments of ``forward`` that have no default."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return tuple(name for name, one in _parameters(model).items() if one.default is one.empty and one.kind not in kinds)


def _parameters(model: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(model, "_orig_mod", model).forward).parameters)
