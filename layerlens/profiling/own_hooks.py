"""Layers whose input or output a hook of the user's changes: PEFT puts its LoRA around the layer and its hooks.

The LoRA gets what the layer is called with, before such a hook, and adds to what comes out after one. So it is no
change of the weight any more: what was measured is of other inputs, and merging would give another model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from layerlens.integrations.torch_modules import first_input


def changed_by_hooks(model: torch.nn.Module, names: Sequence[str], run: Callable[[], object]) -> dict[str, str]:
    """Name -> why, for the layers whose hooks change what goes through them; the model is run where any has hooks.

    Args:
        model: frozen, in evaluation mode.
        names: of the layers.
        run: a forward pass.
    """
    own = {name: model.get_submodule(name) for name in names}
    own = {name: layer for name, layer in own.items() if layer._forward_pre_hooks or layer._forward_hooks}
    if not own:
        return {}
    found: dict[str, str] = {}
    handles: list[Any] = []
    for name, layer in own.items():
        given: list[Any] = []

        def before(_: Any, args: Any, kwargs: Any, given: list[Any] = given) -> None:
            given[:] = [_state(first_input(args, kwargs))]

        def between(_: Any, args: Any, kwargs: Any, name: str = name, given: list[Any] = given) -> None:
            if given != [_state(first_input(args, kwargs))]:
                found[name] = "a hook of its own changes its input, which PEFT's LoRA does not get"

        def after(_: Any, __: Any, output: Any, given: list[Any] = given) -> None:
            given[:] = [_state(output)]

        def last(_: Any, __: Any, output: Any, name: str = name, given: list[Any] = given) -> None:
            if given != [_state(output)]:
                found.setdefault(name, "a hook of its own changes its output, to which PEFT's LoRA adds afterwards")

        handles += [
            layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            layer.register_forward_pre_hook(between, with_kwargs=True),
            layer.register_forward_hook(after, prepend=True),
            layer.register_forward_hook(last),
        ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _state(value: Any) -> Any:
    """What tells whether it is another tensor now, or was changed in place."""
    return (id(value), value._version) if isinstance(value, torch.Tensor) and not value.is_inference() else id(value)
