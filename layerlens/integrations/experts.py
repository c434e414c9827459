"""Mixtures of experts: weights that are no module's ``weight``, and what PEFT makes of names that look like experts.

transformers 5 keeps the experts of a block in three-dimensional parameters of one module, and most routers in a module
of their own class. No Linear shows them, and nothing here may pass over them in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerlens.integrations.transformers import is_dense

if TYPE_CHECKING:
    import torch

ROUTERS = ("gate", "router")
"""What blocks with experts call the module that says which experts a token goes to."""
EXPERTS = "experts"

IN_MULTIHEAD = (
    "torch.nn.MultiheadAttention uses it without calling a module, so its products cannot be measured; PEFT adapts "
    "in_proj_weight and out_proj only together"
)
BASE_LAYER = ".base_layer"
"""What PEFT calls the module that it has put one of its own around."""


@dataclass(frozen=True)
class Stack:
    """One weight of all experts of a block.

    Args:
        module: the experts.
        name: the parameter's name in it.
        experts, n_in, n_out: matrices, and the shape of each.
        columns, rows: of PEFT's A [rank · experts, columns] and B [rows, rank · experts]: inputs and outputs, or the
            other way round where PEFT does not know how the parameter is stored.
    """

    module: torch.nn.Module
    name: str
    experts: int
    n_in: int
    n_out: int
    columns: int
    rows: int


def stacks_of(path: str, module: Any) -> dict[str, Stack]:
    """Layer name -> stacked weight of an experts module that statistics and PEFT can take; empty for all others."""
    from layerlens.integrations.expert_products import is_transposed, weight_names

    found = {}
    for name in weight_names(module):
        weight = getattr(module, name, None)
        if weight is None or weight.dim() != 3 or not weight.is_floating_point() or weight.element_size() < 2:
            continue
        count, first, second = weight.shape
        n_in, n_out = (first, second) if is_transposed(module) else (second, first)
        columns, rows = (first, second) if getattr(module, "is_transposed", False) else (second, first)
        found[f"{path}.{name}"] = Stack(module, name, count, n_in, n_out, columns, rows)
    return found


def stack_at(model: torch.nn.Module, layer: str) -> Stack | None:
    """The stacked weight that the layer is; None where it is no such weight."""
    path, _, name = layer.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return stacks_of(path, module).get(layer) if name in module._parameters else None


def experts_per_token(config: Any, experts: int) -> int:
    """Through how many experts a token goes; all of them where the configuration does not say it."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k")
    given = next((value for name in names if isinstance(value := getattr(config, name, None), int)), experts)
    return min(given, experts)


def other_weights(
    modules: Mapping[str, torch.nn.Module], blocks: Iterable[str] | None, layers: Collection[str]
) -> dict[str, str]:
    """Parameter name -> what it is, of the matrices and stacks that are not the weight of a layer.

    Those in ``blocks``, or in the whole model if that is None.

    Where no block is known (JetMoE's attention is a mixture too), those of experts.
    Embeddings are left alone here: they are said elsewhere.
    """
    import torch

    from layerlens.integrations.weight_matrices import is_convolution

    blocks = None if blocks is None else tuple(blocks)
    inside = "" if blocks is None else tuple(f"{block}." for block in blocks)
    found = {}
    for path, module in modules.items():
        of_experts = blocks == () and "expert" in f"{type(module).__name__}{path}".lower()
        if not (of_experts or f"{path}.".startswith(inside)) or path in layers or is_dense(module):
            continue
        if isinstance(module, torch.nn.Embedding) or is_convolution(module):  # which the account names
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and f"{path}.{name}" not in layers:
                found[f"{path}.{name}".lstrip(".")] = _described(path, module, name, parameter)
    return found


def _described(path: str, module: torch.nn.Module, name: str, parameter: torch.Tensor) -> str:
    import torch

    kind, size = type(module).__name__, _size(parameter)
    if "router" in kind.lower() or path.rpartition(".")[2] in ROUTERS:
        return f"a router ({size}); routers are never adapted"
    if "expert" in f"{kind}{path}".lower() and "bias" not in name:
        return f"the experts of a block in one parameter of {kind} ({size}), whose products cannot be measured"
    if "expert" in f"{kind}{path}".lower():
        return f"a bias for each expert ({size})"
    if isinstance(module, torch.nn.MultiheadAttention) and name.endswith("proj_weight"):
        return f"queries, keys and values in one parameter ({size}): {IN_MULTIHEAD}"
    return f"a parameter of {kind} ({size}), not the weight of a Linear, Conv1D or convolution"


def _size(parameter: torch.Tensor) -> str:
    return f"{' × '.join(map(str, parameter.shape))} = {parameter.numel():,} parameters"


def why_router(path: str, modules: Mapping[str, Any]) -> str:
    """That a Linear says which expert a token goes to, and is left alone; "" where it is no router."""
    block, _, name = path.rpartition(".")
    if block.rpartition(".")[2] in ROUTERS:
        block, _, name = block.rpartition(".")
    # "gate" is also the name of other things; nothing but a router is called so (JetMoE has router.layer alone).
    if name not in ROUTERS or (name != "router" and f"{block}.{EXPERTS}" not in modules):
        return ""
    return f"a router ({_size(modules[path].weight)}); routers are never adapted"


def rewritten_by_peft(model: Any, paths: Iterable[str]) -> dict[str, str]:
    """Path -> why PEFT would adapt something else, for target modules whose names PEFT takes for routed experts.

    PEFT rewrites configurations of adapters that were trained with transformers 4, where every expert was a Linear. It
    goes by the ends of names, so it takes dense layers and shared experts of the same names for routed ones
    (github.com/huggingface/peft/issues/3711). What it does with a name is asked of PEFT itself.
    """
    from peft import LoraConfig, __version__

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a PEFT that rewrites nothing
        return {}
    by_end: dict[str, list[str]] = {}
    for path in paths:
        by_end.setdefault(path.rpartition(".")[2], []).append(path)
    found: dict[str, str] = {}
    for end, same in by_end.items():
        config = LoraConfig(target_modules=[same[0]])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # one of a pair that is fused alone
            instead = "the experts"
        else:
            if same[0] in (config.target_modules or ()):
                continue
            instead = ", ".join(sorted(config.target_parameters or ()))
        kind = model.config.model_type
        reason = f"PEFT {__version__} takes names that end in .{end} for routed experts of {kind} and adapts {instead}"
        found |= dict.fromkeys(same, reason)
    return found
