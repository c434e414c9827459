"""The two PEFT methods that Hugging Face PEFT does not have: a bottleneck adapter and a gated prefix, per layer.

Each lives as a child of the module it adapts (``<layer>.layerlens_adapter``, ``<attention>.layerlens_prefix``), so no
module is renamed or replaced and the base model's state dict keeps its keys. At the start both add exactly zero: the
adapter's second matrix and the prefix's gates are zero. New weights are float32 whatever the base model's precision,
as PEFT does for LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from layerlens.integrations import torchvision_ready  # noqa: F401 isort: skip (before transformers)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from layerlens.exceptions import ManifestError
from layerlens.integrations.attention import attention_function
from layerlens.integrations.peft import name_seed
from layerlens.integrations.transformers import HEAD_WIDTHS, dense_shape, is_dense, takes_prefix
from layerlens.models import Option

ADAPTER_CHILD, PREFIX_CHILD = "layerlens_adapter", "layerlens_prefix"
CHILDREN = {"adapter": ADAPTER_CHILD, "prefix": PREFIX_CHILD}

# Attention functions that a prefix can be added to; flash attention needs its own name in the configuration.
PREFIX_BASES = ("sdpa", "eager")
# What transformers' attention blocks call the width of one head.
_PREFIX_NAME = "layerlens_prefix_{}"


class BottleneckAdapter(torch.nn.Module):
    """y + U·GELU(D·y + b) + c with U = 0, b = c = 0 at the start (Houlsby et al. 2019, arXiv:1902.00751).

    2·width·rank + rank + width parameters. D is uniform in ±1/√width.
    """

    def __init__(self, width: int, rank: int, seed: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(width)
        weight = torch.empty(rank, width).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self.down_weight = torch.nn.Parameter(weight)
        self.down_bias = torch.nn.Parameter(torch.zeros(rank))
        self.up_weight = torch.nn.Parameter(torch.zeros(width, rank))
        self.up_bias = torch.nn.Parameter(torch.zeros(width))

    @property
    def rank(self) -> int:
        """Width of the bottleneck."""
        return self.down_weight.shape[0]

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """The adapted output, of the shape and dtype of ``y`` [..., width]."""
        linear = torch.nn.functional.linear
        inner = linear(y.to(self.down_weight.dtype), self.down_weight, self.down_bias)
        return y + linear(torch.nn.functional.gelu(inner), self.up_weight, self.up_bias).to(y.dtype)


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


def new_module(
    model: torch.nn.Module, target: torch.nn.Module, row: Option, seed: int, expected: int | None = None
) -> torch.nn.Module:
    """The adapter or prefix of ``row`` at its zero step, for ``target``, not yet attached to it.

    Args:
        model: the base model that ``target`` belongs to.
        target: the module that the row names.
        row: method "adapter" or "prefix".
        seed: seed of the whole choice.
        expected: parameters that it is to have, where a manifest says so.

    Raises:
        ManifestError: the module cannot take the method, or has another shape than the manifest counted with.
    """
    made: torch.nn.Module
    if row.method == "adapter":
        if not is_dense(target):
            raise ManifestError(
                f"{row.layer}: an adapter follows a Linear or Conv1D, this is a {type(target).__name__}"
            )
        width = dense_shape(target)[1]
        made, shape = BottleneckAdapter(width, row.rank, name_seed(seed, row.layer)), f"output width {width}"
    else:
        heads, kv_heads, head_dim = _attention_shape(model, target, row.layer)
        _check_attention(_attention_config(model, target))
        made = GatedPrefix(heads, kv_heads, head_dim, row.rank, name_seed(seed, row.layer))
        shape = f"{heads} heads, {kv_heads} key/value heads of {head_dim}"
    count = sum(parameter.numel() for parameter in made.parameters())
    if expected is not None and count != expected:
        raise ManifestError(
            f"{row.layer}: {row.method} {row.rank} on this module ({shape}) trains {count} parameters, the manifest "
            f"says {expected}; it was made for a model of another shape"
        )
    return made


def attach(model: torch.nn.Module, target: torch.nn.Module, added: torch.nn.Module) -> None:
    """Make ``added`` part of ``target``, on its device, and let its output through."""
    parameter = next(target.parameters())
    added.to(parameter.device)
    if isinstance(added, BottleneckAdapter):
        target.add_module(ADAPTER_CHILD, added)
        target.register_forward_hook(_through_adapter)
    else:
        target.add_module(PREFIX_CHILD, added)
        _route_attention(_attention_config(model, target))


def detach_all(base: torch.nn.Module) -> None:
    """Take every adapter and prefix out of ``base`` again; what it computes is as before ``attach``."""
    for layer, (method, _) in attached(base).items():
        target = base.get_submodule(layer)
        delattr(target, CHILDREN[method])
        drop_hooks(target, _through_adapter)
    names = {_PREFIX_NAME.format(name): name for name in PREFIX_BASES}
    configs: list[Any] = [module.config for module in base.modules() if hasattr(module, "config")]
    for config in configs:
        routed = getattr(config, "_attn_implementation", None)
        if routed in names:
            config._attn_implementation_internal = names[routed]


def drop_hooks(module: torch.nn.Module, function: Callable[..., Any]) -> None:
    """Remove ``function`` from the forward hooks of ``module``; found by identity, so that copies of models work."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]


def keep_statistics(base: torch.nn.Module, heads: Sequence[torch.nn.Module] = ()) -> None:
    """Let frozen batch normalisation use its running statistics in training too, and leave them as they are.

    They are weights of the frozen model; updated, they would be in no adapter file.
    """
    trained = {id(module) for head in heads for module in head.modules()}
    for module in base.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and id(module) not in trained:
            module.register_forward_pre_hook(_in_evaluation_mode)


def release_statistics(base: torch.nn.Module) -> None:
    """Undo ``keep_statistics``."""
    for module in base.modules():
        drop_hooks(module, _in_evaluation_mode)


def _in_evaluation_mode(module: torch.nn.Module, args: Any) -> None:
    module.training = False


def attached(model: torch.nn.Module) -> dict[str, tuple[str, torch.nn.Module]]:
    """(method, module) of every adapter and prefix in ``model``, by the name of the layer it belongs to."""
    found = {}
    for name, module in model.named_modules():
        for method, child in CHILDREN.items():
            if name.endswith("." + child):
                found[name.removesuffix("." + child)] = (method, module)
    return found


def _through_adapter(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return getattr(module, ADAPTER_CHILD)(output)


def _attention_config(model: torch.nn.Module, target: torch.nn.Module) -> Any:
    if hasattr(target, "config"):
        return target.config
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _attention_shape(model: torch.nn.Module, target: Any, name: str) -> tuple[int, int, int]:
    """(query heads, key/value heads, head width) of an attention block that can take a prefix."""
    if not takes_prefix(target):
        raise ManifestError(
            f"{name}: {type(target).__name__} does not go through transformers' AttentionInterface, where a prefix is "
            f"added; {type(model).__name__} can take lora and adapter"
        )
    widths = (getattr(target, key, None) for key in HEAD_WIDTHS)
    head_dim = next((width for width in widths if width), None)
    if head_dim is None:
        raise ManifestError(f"{name}: a prefix goes on an attention block, this is a {type(target).__name__}")
    config = _attention_config(model, target)
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


def _check_attention(config: Any) -> None:
    """Refuse attention functions that a prefix cannot be added to."""
    current = config._attn_implementation
    if current in map(_PREFIX_NAME.format, PREFIX_BASES):
        return  # another block's prefix came first
    if current not in PREFIX_BASES:
        raise ManifestError(
            f"prefixes work with {' and '.join(PREFIX_BASES)} attention, this model uses {current!r}; load it with "
            'attn_implementation="sdpa"'
        )
    if current == "eager" and getattr(config, "reorder_and_upcast_attn", False):
        raise ManifestError("prefixes do not work with reorder_and_upcast_attn; set it to False in the model's config")


def _route_attention(config: Any) -> None:
    """Send every attention block that has this configuration through the function that adds prefixes."""
    if config._attn_implementation in PREFIX_BASES:
        config._attn_implementation_internal = _PREFIX_NAME.format(config._attn_implementation)


def _register(base: str) -> None:
    def attention(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        output, weights = attention_function(base, module)(module, query, *args, **kwargs)
        prefix = getattr(module, PREFIX_CHILD, None)
        return output if prefix is None else prefix(query, output), weights

    AttentionInterface.register(_PREFIX_NAME.format(base), attention)
    AttentionMaskInterface.register(_PREFIX_NAME.format(base), ALL_MASK_ATTENTION_FUNCTIONS[base])


for _base in PREFIX_BASES:
    _register(_base)
