"""Reading the layers that can be adapted off a model's modules, with their shapes and the methods they can take."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from layerlens.exceptions import ModelSpecError
from layerlens.integrations.asked_layers import layers_asked_for
from layerlens.integrations.attributes_read import attributes_read
from layerlens.integrations.experts import (
    IN_MULTIHEAD,
    Stack,
    experts_per_token,
    other_weights,
    rewritten_by_peft,
    stacks_of,
    why_router,
)
from layerlens.integrations.failures import told_of_failure
from layerlens.integrations.norms import norm_layer, norm_layers
from layerlens.integrations.peft_refusals import refused_by_peft
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.quantized import parameter_count, weight_bytes
from layerlens.integrations.torch_modules import first_input
from layerlens.integrations.transformers import (
    RESIDUAL_WRITERS,
    attention_heads,
    blocks_of,
    dense_shape,
    is_dense,
    role_of,
    takes_prefix,
)
from layerlens.integrations.weight_matrices import is_convolution, why_no_lora
from layerlens.models import LayerSpec, ModelSpec
from layerlens.models.model_spec import EMBEDDING
from layerlens.registry import METHODS

SHARE_OF_BLOCKS = 0.5
"""Where fewer of the layers are in transformer blocks, the model is no transformer (YOLO11 has one attention block)."""
PACKING, PACKED = (
    "torch.ao.nn.quantized",
    "its weight is packed for kernels of torch.ao, through which no gradient goes",
)
BLOCK_LAYERS = 2
"""A member of a list of modules is a convolutional block from this many layers on."""


def model_spec(
    pretrained: PretrainedModel,
    name_or_path: str,
    *,
    adapter_sites: str = "residual",
    inputs: Mapping[str, torch.Tensor] | None = None,
    methods: Collection[str] = (),
    only: Sequence[str] = (),
    counted: bool = False,
) -> ModelSpec:
    """The layers of a model in forward order.

    Where most layers are in transformer blocks: every Linear, Conv1D and convolution in them, and every attention block
    that takes prefixes. Else every Linear and convolution that is not the task head's. With ``only``, those of these
    that it names, and what it names outside the blocks (``lm_head``, ``embed_tokens``).

    Args:
        pretrained: the model.
        name_or_path: what the manifest calls it.
        adapter_sites: "residual" or "all": where adapters are considered.
        inputs: one batch of inputs, needed where the inputs are no tokens: layers then have positions of their own
            (patches, pixels), which one forward pass counts.
        methods: what is on offer: a method that is measured on request only is taken where it is named here.
        only: patterns for the names of layers, or for what follows a dot in them; empty for all.

        counted: the layers are counted without weights, and none is measured from disk.

    Raises:
        ModelSpecError: the model has no layer that can take LoRA, or none that ``only`` names.
    """
    model = pretrained.model
    fingerprint = pretrained.fingerprint  # before the forward pass below, which may change buffers
    blocks = blocks_of(model)
    modules = dict(model.named_modules())
    # Tokens of images are counted for each module, which stacked experts are not.
    stacks = {} if inputs is not None else {k: v for path in modules for k, v in stacks_of(path, modules[path]).items()}
    of_block = _transformer_layers(modules, blocks, stacks) if blocks else {}
    around: tuple[str, ...] | None = blocks
    if len(of_block) < SHARE_OF_BLOCKS * sum(map(_is_layer, modules.values())):
        of_block, around = _other_layers(modules, pretrained.trained_modules()), None
    whole = tuple(f"{head}." for head in pretrained.heads or ())
    asked = (
        layers_asked_for(model, of_block, only, streamed=pretrained.streamed is not None and not counted)
        if only
        else None
    )
    of_block = of_block if asked is None else asked.of_block
    of_block = {path: block for path, block in of_block.items() if not (whole and f"{path}.".startswith(whole))}
    dense = [path for path in of_block if path not in stacks]
    reasons = {path: _why_not(path, modules) for path in dense}
    left_out = {path: reason for path, reason in reasons.items() if reason}
    left_out |= {} if asked is None else asked.left_out
    own = pretrained.tokens.modules if pretrained.tokens else ()
    left_out |= {path: "rows of it are trained (model.token_training)" for path in of_block if path in own}
    by_parameter = rewritten_by_peft(model, [path for path in dense if path not in left_out])
    left_out |= {path: reason for path, reason in by_parameter.items() if not _is_formed(modules[path])}
    usual = [path for path in dense if path not in left_out and path not in by_parameter]
    left_out |= refused_by_peft(model, usual)
    norms = norm_layers(model, modules, blocks, methods)
    norms = {path: block for path, block in norms.items() if not (whole and path.startswith(whole))}
    if norms:
        place = {path: number for number, path in enumerate(modules)}
        both = (of_block | norms).items()
        of_block = dict(sorted(both, key=lambda one: place[one[0].rpartition(".")[0] if one[0] in stacks else one[0]]))
    positions: dict[str, tuple[int, int]] = {}
    if inputs is not None:
        positions, read = _count_positions(model, [path for path in of_block if path not in left_out], inputs)
        unseen = [path for path in of_block if path not in left_out and path not in positions]
        left_out |= {
            path: f"the model's code reads its {' and '.join(sorted(names))}, which PEFT's LoRA layer does not have"
            for path, names in read.items()
        }
        left_out |= dict.fromkeys(unseen, "the model does not call it as a module")
    config = _text_config(model)
    outside = {path: block for path, block in of_block.items() if path not in stacks}
    writers = _residual_writers(outside, modules, config)
    layers: list[LayerSpec] = []
    done: set[str] = set()
    for path, block in of_block.items():
        if path in stacks:
            layer = _experts_layer(path, stacks[path], config, block)
            layers += _with_methods(layer, stacks[path].module, adapter_sites, methods)
            continue
        module = modules[path]
        attention = path.rpartition(".")[0]
        is_query = role_of(path) in ("query", "query_key_value") and is_dense(module)
        if config is not None and is_query and attention not in done:
            done.add(attention)
            if takes_prefix(modules[attention]):
                own = _config_around(modules, attention, config)
                layer = _attention_layer(attention, modules[attention], module, own, block, positions.get(path))
                layers += _with_methods(layer, modules[attention], adapter_sites, methods)
        if path in left_out:
            continue
        if is_convolution(module):
            layer = _conv_layer(path, module, block, positions.get(path))
        elif isinstance(module, torch.nn.Embedding):
            layer = _embedding_layer(path, module, block, positions.get(path))
        elif path in norms:
            layer = norm_layer(path, module, block, positions.get(path), config)
        else:
            width = _stream_width(_config_around(modules, path, config)) or dense_shape(module)[1]
            layer = _dense_layer(path, module, width, block, positions.get(path), writes_residual=path in writers)
            layer = replace(layer, by_parameter=path in by_parameter)
        taken, refused = _without_refused(_with_methods(layer, module, adapter_sites, methods), module, methods)
        layers += taken
        left_out |= refused
    left_out |= other_weights(modules, around, of_block)
    packed = [path for path, module in modules.items() if type(module).__module__.startswith(PACKING)]
    left_out |= {path: PACKED for path in packed if path.rpartition(".")[0] not in packed}
    if not layers:
        first = {reason: path for path, reason in reversed(left_out.items())}  # of every reason the first layer
        usual_reasons = Counter(left_out[path] for path in of_block if path in left_out) or Counter(left_out.values())
        some = "; ".join(f"{first[reason]}: {reason}" for reason, _ in usual_reasons.most_common(3))
        raise ModelSpecError(
            f"model.name_or_path: found no layer in {type(model).__name__} that can take LoRA (Linear, Conv1D, "
            "convolutions)" + (f"; {some}" if some else "")
        )
    return ModelSpec(
        model_name=name_or_path,
        total_params=parameter_count(model),
        layers=layers,
        weight_bytes=weight_bytes(model),
        fingerprint=fingerprint,
        per_sample=inputs is not None,
        left_out=left_out,
        tokens=pretrained.tokens,
    )


def of_tokens_alone(inputs: Mapping[str, Any]) -> bool:
    """Whether the inputs are tokens and nothing else, so that every layer has as many positions as there are tokens."""
    others = (name for name, value in inputs.items() if name.startswith("pixel") or _has_point(name, value))
    return "input_ids" in inputs and not any(others)


def _has_point(name: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not name.endswith("mask")


def _transformer_layers(
    modules: Mapping[str, torch.nn.Module], blocks: tuple[str, ...], stacks: Mapping[str, Stack]
) -> dict[str, int | None]:
    """Path -> block of every Linear, Conv1D and convolution of the blocks, and of their stacked experts."""
    found: dict[str, int | None] = {}
    of_module: dict[str, list[str]] = {}
    for name in stacks:
        of_module.setdefault(name.rpartition(".")[0], []).append(name)
    for index, block in enumerate(blocks):
        inside = f"{block}."
        for path, module in modules.items():
            if path.startswith(inside):
                found |= dict.fromkeys([path] if _is_layer(module) else of_module.get(path, []), index)
    return found


def _other_layers(modules: Mapping[str, torch.nn.Module], heads: Sequence[str]) -> dict[str, int | None]:
    """Path -> block of every layer outside ``heads``; a block is the innermost member of a list with several layers."""
    paths = [
        path
        for path, module in modules.items()
        if _is_layer(module) and not any(path == head or path.startswith(f"{head}.") for head in heads)
    ]
    blocks: dict[str, int] = {}
    found: dict[str, int | None] = {}
    for path in paths:
        block = next((outer for outer in _outer_members(path, modules) if _holds_several(outer, paths)), None)
        found[path] = None if block is None else blocks.setdefault(block, len(blocks))
    return found


def _outer_members(path: str, modules: Mapping[str, torch.nn.Module]) -> list[str]:
    """The modules around ``path`` that are members of a ModuleList or Sequential, innermost first."""
    parts = path.split(".")
    outer = [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    return [one for one in outer if "." in one and isinstance(modules[one.rpartition(".")[0]], lists)]


def _holds_several(outer: str, paths: list[str]) -> bool:
    return sum(path.startswith(f"{outer}.") for path in paths) >= BLOCK_LAYERS


def _why_not(path: str, modules: Mapping[str, torch.nn.Module]) -> str:
    """Why a layer can take no LoRA; "" where it can."""
    if isinstance(modules.get(path.rpartition(".")[0]), torch.nn.MultiheadAttention):
        return IN_MULTIHEAD
    return why_router(path, modules) or why_no_lora(path, modules[path])


def _is_layer(module: torch.nn.Module) -> bool:
    return is_dense(module) or is_convolution(module)


def _count_positions(
    model: torch.nn.Module, paths: list[str], inputs: Mapping[str, torch.Tensor]
) -> tuple[dict[str, tuple[int, int]], dict[str, set[str]]]:
    """Path -> (output positions, input elements) of one sample, for every module that a forward pass calls; and what
    its code reads of them that a layer of PEFT does not have.
    """
    found: dict[str, tuple[int, int]] = {}
    n = len(next(iter(inputs.values())))
    if any(parameter.is_meta for parameter in model.parameters()):  # shapes are all that is needed
        model = copy.deepcopy(model).to("meta")
        # Without masks, whose values transformers looks at: they change no shape.
        inputs = {name: tensor.to("meta") for name, tensor in inputs.items() if not name.endswith("mask")}

    def count(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            n_out = module.out_channels if is_convolution(module) else output.shape[-1]
            found[path] = (max(1, output.numel() // (n * n_out)), max(1, first_input(args, kwargs).numel() // n))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(count(path), with_kwargs=True) for path in paths]
    convolutions = {path: module for path in paths if is_convolution(module := model.get_submodule(path))}
    try:
        with torch.no_grad(), attributes_read(convolutions) as read:
            model(**inputs)
    except Exception as error:  # whatever the model's own code raises
        raise ModelSpecError(told_of_failure(model, inputs, error)) from error
    finally:
        for handle in handles:
            handle.remove()
    return found, read


def _residual_writers(
    of_block: Mapping[str, int | None], modules: Mapping[str, torch.nn.Module], config: Any
) -> set[str]:
    """Layers whose outputs are added to the residual stream: by their roles; where no role in the module around them
    says so, the last layer of a block there that is as wide as the stream and no query, key, value or part of a gate.
    """
    writers = {path for path in of_block if role_of(path) in RESIDUAL_WRITERS and is_dense(modules[path])}
    named = {path.rpartition(".")[0] for path in writers}
    last: dict[str, str] = {}
    for path, block in of_block.items():
        around, module = path.rpartition(".")[0], modules[path]
        if block is None or around in named or role_of(path) or not is_dense(module):
            continue
        if dense_shape(module)[1] == _stream_width(_config_around(modules, path, config)):
            last[around] = path
    return writers | set(last.values())


def _config_around(modules: Mapping[str, torch.nn.Module], path: str, default: Any) -> Any:
    """The configuration of the tower that a module is in: the innermost one around it that says how wide it is."""
    while path:
        config: Any = getattr(modules[path], "config", None)
        if getattr(config, "hidden_size", None) and getattr(config, "num_attention_heads", None):
            return config
        path = path.rpartition(".")[0]
    return default


def _stream_width(config: Any) -> int | None:
    """The width of the residual stream; None where the configuration does not say it, or has stages of several."""
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return width if isinstance(width, int) and not isinstance(heads, (list, tuple)) else None


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _with_methods(layer: LayerSpec, module: Any, adapter_sites: str, on_offer: Collection[str]) -> list[LayerSpec]:
    """The layer with the methods that it can take; nothing where it can take none."""
    measured = [name for name in METHODS if name in on_offer or not METHODS[name].on_request]
    methods = tuple(name for name in measured if METHODS[name].takes(layer, module, adapter_sites))
    return [replace(layer, methods=methods)] if methods else []


def _without_refused(
    layers: Sequence[LayerSpec], module: Any, on_offer: Collection[str]
) -> tuple[list[LayerSpec], dict[str, str]]:
    """The layer without the methods on offer that it is refused, and "layer (method)" -> why."""
    kept: list[LayerSpec] = []
    found: dict[str, str] = {}
    for layer in layers:
        asked = {name: METHODS[name].why_refused(layer, module) for name in layer.methods if name in on_offer}
        refused = {name: reason for name, reason in asked.items() if reason}
        found |= {f"{layer.name} ({METHODS[name].label})": reason for name, reason in refused.items()}
        methods = tuple(name for name in layer.methods if name not in refused)
        kept += [replace(layer, methods=methods)] if methods else []
    return kept, found


def _dense_layer(
    path: str, module: Any, hidden_size: int, block: int | None, places: tuple[int, int] | None, *,
    writes_residual: bool,
) -> LayerSpec:  # fmt: skip
    n_in, n_out = dense_shape(module)
    role = role_of(path)
    positions, elements = places or (0, 0)
    return LayerSpec(
        name=path, hidden_size=hidden_size, layer_type="linear", n_in=n_in, n_out=n_out, block=block,
        role=role, writes_residual=writes_residual, positions=positions, input_elements=elements,
    )  # fmt: skip


def _embedding_layer(
    path: str, module: torch.nn.Embedding, block: int | None, places: tuple[int, int] | None
) -> LayerSpec:
    positions, elements = places or (0, 0)
    return LayerSpec(
        name=path, hidden_size=module.embedding_dim, layer_type=EMBEDDING, n_in=module.num_embeddings,
        n_out=module.embedding_dim, block=block, role="embedding", positions=positions, input_elements=elements,
    )  # fmt: skip


def _experts_layer(path: str, stack: Stack, config: Any, block: int | None) -> LayerSpec:
    role = "ffn_down" if stack.name == "down_proj" else "ffn_up"
    width = getattr(config, "hidden_size", None) or stack.n_out
    return LayerSpec(
        name=path, hidden_size=width, layer_type="experts", n_in=stack.n_in, n_out=stack.n_out, block=block, role=role,
        experts=stack.experts, experts_per_token=experts_per_token(config, stack.experts), by_parameter=True,
    )  # fmt: skip


def _is_formed(module: Any) -> bool:
    """Whether W + ΔW can be formed of a Linear: its weight is stored as the numbers that it is."""
    weight = module.weight
    return bool(weight.is_floating_point() and weight.dim() == 2 and weight.element_size() > 1)


def _conv_layer(path: str, module: Any, block: int | None, places: tuple[int, int] | None) -> LayerSpec:
    positions, elements = places or (0, 0)
    patch = module.in_channels * math.prod(module.kernel_size)
    return LayerSpec(
        name=path, hidden_size=module.out_channels, layer_type="conv", n_in=patch, n_out=module.out_channels,
        block=block, role=role_of(path), positions=positions, input_elements=elements, groups=module.groups,
    )  # fmt: skip


def _attention_layer(
    path: str, module: Any, query: Any, config: Any, block: int | None, places: tuple[int, int] | None
) -> LayerSpec:
    hidden_size = dense_shape(query)[0]
    heads, kv_heads, head_dim = attention_heads(module, config, query)
    head_dim = head_dim or hidden_size // heads
    return LayerSpec(
        name=path, hidden_size=hidden_size, layer_type="attention", n_in=heads * head_dim,
        n_out=heads * head_dim, d_kv=kv_heads * head_dim, num_heads=heads, block=block, role="attention",
        positions=places[0] if places else 0,
    )  # fmt: skip
