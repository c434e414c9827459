"""The module of a prefix, and the attention functions that add it to a block's output."""

from __future__ import annotations

import math
from typing import Any

import torch

from layerlens.exceptions import ManifestError
from layerlens.integrations.attention import attention_function
from layerlens.integrations.torchvision_import import make_torchvision_importable
from layerlens.integrations.transformers import attention_heads, takes_prefix
from layerlens.methods.added_module import CHILD_START
from layerlens.models import PREFIX

make_torchvision_importable()
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402

# Attention functions that a prefix can be added to; flash attention needs its own name in the configuration.
PREFIX_BASES = ("sdpa", "eager")
CHILD = CHILD_START + PREFIX
ROUTE = CHILD + "_{}"


class GatedPrefix(torch.nn.Module):
    """output + tanh(gate)·softmax(q·Pkᵀ/√d)·Pv with gate = 0 at the start.

    The p pairs have a softmax of their own beside the layer's, with one gate for each query head, as in LLaMA-Adapter
    (Zhang et al. 2023, arXiv:2303.16199); pairs inside the layer's softmax (Li & Liang 2021) would take attention mass
    from the first step on. 2·p·kv_heads·head_dim + heads parameters. Keys and values are normal with standard
    deviation 1/√head_dim. At the first step only the gates have a gradient; keys and values have one as soon as the
    gates have moved. With a single pair the softmax is always 1, so its key is never trained.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, rank: int, seed: int) -> None:
        super().__init__()
        generator, std = torch.Generator().manual_seed(seed), 1.0 / math.sqrt(head_dim)
        shape = (kv_heads, rank, head_dim)
        self.keys = torch.nn.Parameter(torch.empty(shape).normal_(0.0, std, generator=generator))
        self.values = torch.nn.Parameter(torch.empty(shape).normal_(0.0, std, generator=generator))
        self.gate = torch.nn.Parameter(torch.zeros(heads))

    @property
    def rank(self) -> int:
        """Number of key/value pairs."""
        return self.keys.shape[1]

    def forward(self, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The attention output with the prefix added.

        Args:
            query: [batch, heads, tokens, head_dim], after rotary embeddings.
            output: [batch, tokens, heads, head_dim].
        """
        groups = self.gate.shape[0] // self.keys.shape[0]  # query heads that share a key/value head
        keys, values = (part.repeat_interleave(groups, dim=0) for part in (self.keys, self.values))
        scores = torch.einsum("bhtd,hpd->bhtp", query.to(keys.dtype), keys) / math.sqrt(keys.shape[-1])
        added = torch.einsum("bhtp,hpd->bthd", scores.softmax(dim=-1), values)
        return output + (torch.tanh(self.gate)[:, None] * added).to(output.dtype)


def attention_config(model: torch.nn.Module, target: torch.nn.Module) -> Any:
    if hasattr(target, "config"):
        return target.config
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attention_shape(model: torch.nn.Module, target: Any, name: str) -> tuple[int, int, int]:
    """(query heads, key/value heads, head width) of an attention block that can take a prefix."""
    if not takes_prefix(target):
        raise ManifestError(
            f"{name}: {type(target).__name__} does not use transformers' AttentionInterface, where a prefix is added; "
            f"{type(model).__name__} can take lora and adapter"
        )
    heads, kv_heads, head_dim = attention_heads(target, attention_config(model, target))
    if head_dim is None:
        raise ManifestError(f"{name}: a prefix goes on an attention block, this is a {type(target).__name__}")
    return heads, kv_heads, head_dim


def check_attention(config: Any) -> None:
    """Refuse attention functions that a prefix cannot be added to."""
    current = config._attn_implementation
    if current in map(ROUTE.format, PREFIX_BASES):
        return  # another block's prefix came first
    if current not in PREFIX_BASES:
        raise ManifestError(
            f"prefixes work with {' and '.join(PREFIX_BASES)} attention, this model uses {current!r}; load it with "
            'attn_implementation="sdpa"'
        )
    if current == "eager" and getattr(config, "reorder_and_upcast_attn", False):
        raise ManifestError("prefixes do not work with reorder_and_upcast_attn; set it to False in the model's config")


def route_attention(config: Any) -> None:
    """Send every attention block that has this configuration through the function that adds prefixes."""
    if config._attn_implementation in PREFIX_BASES:
        config._attn_implementation_internal = ROUTE.format(config._attn_implementation)


def unroute_attention(model: torch.nn.Module) -> None:
    """Undo ``route_attention`` in the whole model."""
    names = {ROUTE.format(name): name for name in PREFIX_BASES}
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    for config in configs:
        routed = getattr(config, "_attn_implementation", None)
        if routed in names:
            config._attn_implementation_internal = names[routed]


def _register(base: str) -> None:
    def attention(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        output, weights = attention_function(base, module)(module, query, *args, **kwargs)
        prefix = getattr(module, CHILD, None)
        return output if prefix is None else prefix(query, output), weights

    AttentionInterface.register(ROUTE.format(base), attention)
    AttentionMaskInterface.register(ROUTE.format(base), ALL_MASK_ATTENTION_FUNCTIONS[base])


for _base in PREFIX_BASES:
    _register(_base)
