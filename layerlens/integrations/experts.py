"""Mixtures of experts: weights that are no module's ``weight``, and what PEFT makes of names that look like experts.

transformers 5 keeps the experts of a block in three-dimensional parameters of one module, and most routers in a module
of their own class. No Linear shows them, and nothing here may pass over them in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from layerlens.integrations.transformers import is_dense

if TYPE_CHECKING:
    import torch

ROUTERS = ("gate", "router")
"""What blocks with experts call the module that says which experts a token goes to."""
EXPERTS = "experts"


def other_weights(
    modules: Mapping[str, torch.nn.Module], blocks: Iterable[str], layers: Collection[str]
) -> dict[str, str]:
    """Parameter name -> what it is, of the matrices and stacks in ``blocks`` that are not the weight of a layer.

    Embeddings are left alone here: they are said elsewhere.
    """
    import torch

    inside = tuple(f"{block}." for block in blocks)
    found = {}
    for path, module in modules.items():
        if not f"{path}.".startswith(inside) or path in layers or is_dense(module):
            continue
        if isinstance(module, torch.nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                found[f"{path}.{name}"] = _described(path, module, name, parameter)
    return found


def _described(path: str, module: torch.nn.Module, name: str, parameter: torch.Tensor) -> str:
    kind, size = type(module).__name__, _size(parameter)
    if "router" in kind.lower() or path.rpartition(".")[2] in ROUTERS:
        return f"a router ({size}), and a choice leaves routers alone"
    if "expert" in f"{kind}{path}".lower():
        what = "the experts of a block in one parameter" if parameter.dim() > 2 else "a bias for each expert"
        return f"{what} ({size})"
    return f"a parameter of {kind} ({size}), not the weight of a Linear, Conv1D or Conv2d"


def _size(parameter: torch.Tensor) -> str:
    return f"{' × '.join(map(str, parameter.shape))} = {parameter.numel():,} parameters"


def why_router(path: str, modules: Mapping[str, Any]) -> str:
    """That a Linear says which expert a token goes to, and is left alone; "" where it is no router."""
    block, _, name = path.rpartition(".")
    if block.rpartition(".")[2] in ROUTERS:
        block, _, name = block.rpartition(".")
    if name not in ROUTERS or f"{block}.{EXPERTS}" not in modules:
        return ""
    return f"a router ({_size(modules[path].weight)}), and a choice leaves routers alone"


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
    found = {}
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
