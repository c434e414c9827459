"""What LayerLens knows of the modules of transformers (and timm): layers by their role, blocks, heads, attention.

Nothing else in the package knows how such a model is built inside.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ModelSpecError, ProfilingError
from layerlens.integrations.quantized import is_quantized

if TYPE_CHECKING:
    import torch

# The end of a module's path inside its block -> its role. Longer endings are tried first.
ROLES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "attention.attention.query": "query",
    "attention.attention.key": "key",
    "attention.attention.value": "value",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "q_lin": "query",
    "k_lin": "key",
    "v_lin": "value",
    "out_lin": "attention_output",
    "ffn.lin1": "ffn_up",
    "ffn.lin2": "ffn_down",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention_output",
    "out_proj": "attention_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
    "attn.c_proj": "attention_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "SelfAttention.q": "query",
    "SelfAttention.k": "key",
    "SelfAttention.v": "value",
    "SelfAttention.o": "attention_output",
    "EncDecAttention.q": "query",
    "EncDecAttention.k": "key",
    "EncDecAttention.v": "value",
    "EncDecAttention.o": "attention_output",
    "DenseReluDense.wi": "ffn_up",
    "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wo": "ffn_down",
    "query_proj": "query",
    "key_proj": "key",
    "value_proj": "value",
    "attention.query": "query",
    "attention.key": "key",
    "attention.value": "value",
    "attention.dense": "attention_output",
    "self_attention.dense": "attention_output",
    "self_attn.dense": "attention_output",
    "qkv_proj": "query_key_value",
    "query_key_value": "query_key_value",
    "gate_up_proj": "ffn_gate_up",
    "dense_h_to_4h": "ffn_up",
    "dense_4h_to_h": "ffn_down",
    "mlp.fc_in": "ffn_up",
    "mlp.fc_out": "ffn_down",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "ffn_output": "ffn_down",
    "c_attn": "query_key_value",
    "Wqkv": "query_key_value",
    "attn.Wo": "attention_output",
    "mlp.Wi": "ffn_up",
    "mlp.Wo": "ffn_down",
    "attn.qkv": "query_key_value",
    "attn.proj": "attention_output",
    "projection_layer": "attention_output",
    "pwconv1": "ffn_up",
    "pwconv2": "ffn_down",
}
RESIDUAL_WRITERS = ("attention_output", "ffn_down")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
"""What attention modules call the width of one head; the first that a module has counts."""


def output_names(config: Any) -> list[str]:
    """The names of a model's classes in the order of its outputs, from its configuration; none where it has none."""
    own = getattr(config, "id2label", None) or {}
    return [str(own[index]) for index in sorted(own)]


@contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
    """While open, decoders keep no keys and values for generation, which some would copy for the backward pass."""
    configs: dict[int, Any] = {id(x.config): x.config for x in model.modules() if hasattr(x, "config")}
    before = {key: config.use_cache for key, config in configs.items() if hasattr(config, "use_cache")}
    try:
        for key in before:
            configs[key].use_cache = False
        yield
    finally:
        for key, value in before.items():
            configs[key].use_cache = value


PACKED = "find_packed_sequence_indices"
"""What transformers finds several sequences in one row by."""


@contextmanager
def full_batches() -> Iterator[None]:
    """While open, attention takes a mask to hide no token where it could not look: on tensors without data.

    It takes positions to count up, too: a row holds one sequence. With numbers at hand transformers leaves such masks
    out, and attention keeps less for the backward pass.
    """
    from transformers import masking_utils
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    usual, packed = MASKS["sdpa"], getattr(masking_utils, PACKED, None)

    def full(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None and usual(*args, attention_mask=None, **kwargs) is None:
            return None
        return usual(*args, attention_mask=attention_mask, **kwargs)

    MASKS.register("sdpa", full)
    if packed is not None:
        setattr(masking_utils, PACKED, lambda position_ids: None)
    try:
        yield
    finally:
        MASKS.register("sdpa", usual)
        if packed is not None:
            setattr(masking_utils, PACKED, packed)


def is_dense(module: torch.nn.Module) -> bool:
    """Linear, quantized or not, or transformers' Conv1D (a Linear with a transposed weight)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D)) or is_quantized(module)


def dense_shape(module: Any) -> tuple[int, int]:
    """(n_in, n_out) of a Linear or Conv1D."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return module.nx, module.nf


def role_of(path: str) -> str:
    """The role of a module from the end of its path, "" when no known ending fits."""
    for ending in sorted(ROLES, key=len, reverse=True):
        if path == ending or path.endswith("." + ending):
            return ROLES[ending]
    return ""


def blocks_of(model: torch.nn.Module) -> tuple[str, ...]:
    """Paths of the transformer blocks: the members of every outermost ModuleList that holds attention.

    In models that keep their blocks in a Sequential (timm), those of every innermost Sequential that holds attention.
    """
    import torch

    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not any(path.startswith(block + ".") for block in found):
            found += [f"{path}.{name}" for name, block in module.named_children() if _holds_attention(block)]
    if found:
        return tuple(found)
    holding = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Sequential) and _holds_attention(module)
    }
    for path, module in holding.items():
        if not any(other.startswith(f"{path}." if path else "") and other != path for other in holding):
            children = [name for name, block in module.named_children() if _holds_attention(block)]
            found += [f"{path}.{name}" if path else name for name in children]
    return tuple(found)


def blocks_to_checkpoint(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules whose activations transformers can checkpoint each by itself, by name; not those inside others."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, torch.nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{block}.") for block in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[path] = module
    return found


def _holds_attention(module: torch.nn.Module) -> bool:
    return any(role_of(name) == "attention_output" for name, _ in module.named_modules())


def longest_sequence(model: torch.nn.Module) -> int | None:
    """Tokens that the model has positions for; None where it sets no limit.

    RoBERTa and its kin (MPNet, Longformer, ESM ...) number their positions from the padding token's id on: their table
    of positions has a padding row, and the rows up to it are no token's.
    """
    import torch

    for name, module in model.named_modules():
        table = name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
        if table and module.padding_idx is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def text_config(model: Any) -> Any:
    """The configuration of the model, of several towers that of the one that reads tokens; None where it has none."""
    config: Any = getattr(model, "config", None)
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # an encoder and a decoder, each with a configuration of its own
        return config


def embedding_rows(model: Any) -> int | None:
    """How many tokens the model has embeddings for; None where it has no one table of them."""
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None
    return None if rows is None else int(rows)


def task_heads(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the modules beside the base model that have parameters (timm: the classifier): the task head.

    Models without a named base (a user's own) have none.
    """
    if hasattr(model, "get_classifier"):
        return (timm_head(model),)
    base = getattr(model, "base_model_prefix", "")
    if not base or (not hasattr(model, base) and type(model).__name__.endswith("Model")):  # the base itself
        return ()
    blocks = () if hasattr(model, base) else blocks_of(model)  # WhisperForAudioClassification has the encoder alone
    return tuple(
        name
        for name, child in model.named_children()
        if name != base
        and any(True for _ in child.parameters())
        and not any(block.startswith(f"{name}.") for block in blocks)
    )


def new_modules(model: torch.nn.Module, new_parameters: Sequence[str]) -> tuple[str, ...]:
    """Names of the modules that are trained in full: the task head, and what else above the blocks the checkpoint lacks
    whole, such as the pooler of a BERT that was saved from masked language modelling.
    """
    heads = task_heads(model)
    inside = tuple(f"{head}." for head in heads)
    new = set(new_parameters)
    found: dict[str, None] = dict.fromkeys(heads)
    below = _below_blocks(model)
    for name in new_parameters:
        if name.startswith(inside) or name in below:
            continue
        path = name.rpartition(".")[0]
        while path and _only(model, path.rpartition(".")[0], new):
            path = path.rpartition(".")[0]
        if path and _only(model, path, new):
            found[path] = None
    return tuple(found)


def _below_blocks(model: torch.nn.Module) -> set[str]:
    """Parameters that come before the first block, which what the blocks put out depends on: embeddings."""
    blocks = blocks_of(model)[:1]
    names = [name for name, _ in model.named_parameters()]
    first = next((index for index, name in enumerate(names) if name.startswith(tuple(f"{x}." for x in blocks))), 0)
    return set(names[:first])


def trained_and_drawn(model: torch.nn.Module, lacking: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parameters that a checkpoint lacks: those of modules that are trained in full, and the others.

    Raises:
        ModelSpecError: one of the others is in a transformer block.
    """
    inside = tuple(f"{module}." for module in new_modules(model, lacking)) if lacking else ()
    new = tuple(name for name in lacking if name.startswith(inside))
    drawn = tuple(name for name in lacking if name not in new)
    base = f"{getattr(model, 'base_model_prefix', '') or '?'}."  # which a checkpoint of other names lacks as a whole
    pretrained = [name for name in lacking if name in drawn or name.startswith(base)]
    if in_blocks := [name for name in pretrained if name.startswith(tuple(f"{block}." for block in blocks_of(model)))]:
        raise ModelSpecError(f"model.name_or_path: {_lacks(in_blocks)}")
    return new, drawn


def _lacks(names: Sequence[str]) -> str:
    return (
        f"the checkpoint lacks {len(names)} parameters of the transformer blocks ({names[0]} ...); it is not a "
        "checkpoint of this architecture"
    )


def _only(model: torch.nn.Module, path: str, names: Collection[str]) -> bool:
    """Whether all parameters of the module at ``path`` are among ``names``."""
    return bool(path) and all(f"{path}.{name}" in names for name, _ in model.get_submodule(path).named_parameters())


def timm_head(model: Any) -> str:
    """Path of a timm model's classifier."""
    classifier = model.get_classifier()
    return next((name for name, module in model.named_modules() if module is classifier and name), "")


def frozen_part(model: torch.nn.Module, new_parameters: Sequence[str]) -> tuple[str, ...]:
    """The largest modules whose outputs do not depend on ``new_parameters``: the base model, else its blocks.

    Raises:
        ProfilingError: a block has new parameters, so nothing in the model can be trusted to be pretrained.
    """
    base, blocks = getattr(model, "base_model_prefix", ""), blocks_of(model)
    inside = [name for name in new_parameters if name.startswith(tuple(f"{block}." for block in blocks))]
    if inside:
        raise ProfilingError(_lacks(inside))
    in_base = any(name.startswith(f"{base}.") for name in new_parameters)
    return blocks if in_base or not hasattr(model, base) else (base,)


def attention_heads(attention: Any, config: Any, query: Any = None) -> tuple[int, int, int | None]:
    """(query heads, key/value heads, width of one) of an attention module; None for a width that it does not tell.

    Models with stages (Swin, SegFormer) have other heads in each, and a list of them in their configuration.

    Args:
        attention: the module.
        config: of the tower around it.
        query: the module that makes the queries, where neither of them counts the heads.
    """
    width = next((width for name in HEAD_WIDTHS if (width := getattr(attention, name, None))), None)
    names = ("num_attention_heads", "num_heads", "n_heads")
    counts = [
        count for one in (config, attention) for name in names if isinstance(count := getattr(one, name, None), int)
    ]
    if counts:
        heads = counts[0]
    elif query is not None and width:
        heads = dense_shape(query)[1] // width
    else:
        heads = 1
    shared = getattr(config, "num_key_value_heads", None)
    return heads, shared if isinstance(shared, int) and shared else heads, width


def takes_prefix(attention: torch.nn.Module) -> bool:
    """Whether the attention module goes through transformers' AttentionInterface, where prefixes are added."""
    return hasattr(sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS")
