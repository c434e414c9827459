"""Layers that a model calls by keyword, ``linear(input=x)``: PEFT's own take their input by place alone.

Models of transformers call their layers by place, or PEFT would not work with them. In other models a hook on PEFT's
layers puts the keyword in its place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from layerlens.integrations.torch_modules import in_evaluation_mode

if TYPE_CHECKING:
    import torch


def called_by_keyword(model: torch.nn.Module, layers: Collection[str], inputs: Mapping[str, Any]) -> list[str]:
    """Those of the layers that one forward pass on ``inputs`` calls by keyword."""
    import torch

    found: dict[str, None] = {}
    handles = []
    modules = dict(model.named_modules())
    for name in (name for name in layers if name in modules):

        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            if not args and kwargs:
                found[name] = None

        handles.append(modules[name].register_forward_pre_hook(look, with_kwargs=True))
    try:
        with torch.no_grad(), in_evaluation_mode(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(found)


def told_of_keywords(model: torch.nn.Module, layers: Collection[str], inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """A line that names the layers that are called by keyword; none where there are none."""
    found = called_by_keyword(model, layers, inputs)
    if not found:
        return ()
    some = f"{', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}"
    return (
        f"model: its code calls {some} by keyword (input=x), which PEFT's own layers do not accept. LayerLens handles "
        "this when it applies, trains or loads the adapter. For PEFT alone, write the call as layer(x)",
    )


def take_keywords(tuned: Any) -> Any:
    """Let PEFT's layers in a model of the user's own be called by keyword too; the model itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

    base = tuned.get_base_model() if hasattr(tuned, "get_base_model") else tuned
    if not isinstance(base, PreTrainedModel):
        for module in base.modules():
            if isinstance(module, BaseTunerLayer):
                layer: Any = module
                layer.register_forward_pre_hook(_by_place, with_kwargs=True)
    return tuned


def _by_place(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``input=x`` as the first argument; the parameter of every Linear, convolution and Embedding of torch."""
    if args or "input" not in kwargs:
        return None
    others = dict(kwargs)
    return (others.pop("input"),), others
