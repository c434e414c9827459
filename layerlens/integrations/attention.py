"""A seam in transformers' attention: see, or replace, what every attention block puts out.

transformers (since 4.48) calls attention through a table of functions and finds the function by
``config._attn_implementation``. Registering a function that calls the original one gives a place that is the same for
every architecture, after rotary embeddings and before the output projection.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from layerlens.integrations.torchvision_import import make_torchvision_importable

make_torchvision_importable()
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface  # noqa: E402

OutputHook = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""(attention module, query [B, H, T, d_head], output [B, T, H, d_head]) -> output to use instead."""

_NAME = "layerlens_hook|{}"
_hooks: dict[str, OutputHook] = {}
"""Name of an attention function -> the hook that its outputs go through now. transformers' table never forgets a
function, so the functions in it must not hold a hook: that would keep its model in memory.
"""


@contextmanager
def attention_outputs(model: torch.nn.Module, hook: OutputHook) -> Iterator[None]:
    """While open, every attention block's output goes through ``hook``; the model is as before afterwards."""
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    originals = {key: config._attn_implementation for key, config in configs.items()}
    before = dict(_hooks)
    for original in {name for name in originals.values() if name}:
        _register(original)
        _hooks[original] = hook
    try:
        for key, config in configs.items():
            if originals[key]:
                config._attn_implementation_internal = _NAME.format(originals[key])
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = originals[key]
        _hooks.clear()
        _hooks.update(before)


def _register(original: str) -> None:
    def attention(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        output, weights = attention_function(original, module)(module, query, *args, **kwargs)
        hook = _hooks.get(original)
        return output if hook is None else hook(module, query, output), weights

    AttentionInterface.register(_NAME.format(original), attention)
    AttentionMaskInterface.register(_NAME.format(original), ALL_MASK_ATTENTION_FUNCTIONS[original])


def attention_function(implementation: str, module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, Any]]:
    """The function that ``implementation`` names for this module; "eager" lives beside the module's class."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]
