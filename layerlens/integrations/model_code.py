"""What a model computes beside its weights: the classes of its modules and what they hold, as part of a digest.

Weights have a fingerprint of their own. But a module's ``forward``, its numbers (a dropout's share, a temperature), its
configuration (the activation, the number of heads) and its hooks change what is measured just as well. Modules of
installed packages are read by class, version and plain values; those of the user's own classes whole.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from layerlens.utils.code_identity import ATOMS, CodeIdentity, Reader, Walk, code_identity, is_own_class

PLACES = frozenset(
    ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "_is_full_backward_hook",
     "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")
)  # fmt: skip
"""Attributes of every module that are read otherwise, or do not change what it computes."""
PASSING = frozenset(
    ("name_or_path", "warnings_issued", "generation_config", "gradient_checkpointing", "_is_hf_initialized", "_hf_hook",
     "_old_forward", "hf_device_map", "_auto_class", "pt_path", "yaml_file", "ckpt_path", "_compiled_call_impl",
     "_gradient_checkpointing_func", "is_gradient_checkpointing", "_weight_conversions", "_use_kernels")
)  # fmt: skip
"""Attributes that say where a model came from, how it is held in memory, or what was said of it."""
CONFIG_PASSING = frozenset(("_name_or_path", "name_or_path", "transformers_version", "_commit_hash"))
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN = (torch.dtype, torch.device, torch.Size, enum.Enum)


def model_code(model: torch.nn.Module, others: Mapping[str, Any]) -> CodeIdentity:
    """The identity of a model's code and of other objects, by name; weights are not part of it."""
    modules = dict(model.named_modules())
    known = {id(module): name for name, module in modules.items()}
    done: list[bool] = []

    def of_model(walk: Walk, value: Any) -> list[bytes] | None:
        if value is not known:
            return None
        for name, module in modules.items():  # a module that holds another one names it
            walk.known(module, f"module {name}")
        done.append(True)
        return [part for name, module in modules.items() for part in (name.encode(), *_module(walk, module))]

    return code_identity({"the model": known, **others}, (of_model, *READERS))


def _module(walk: Walk, module: torch.nn.Module) -> list[bytes]:
    kind = type(module)
    parts = [walk.digest(kind, kind.__qualname__)]
    if hasattr(module, "code") and isinstance(module.code, str):  # of torch.fx and TorchScript
        parts.append(module.code.encode())
    placed = "_hf_hook" in vars(module)  # accelerate puts a forward of its own before the module's
    left_out = PLACES | PASSING | set(HOOKS) | ({"forward"} if placed else set())
    state = {name: value for name, value in vars(module).items() if name not in left_out}
    if is_own_class(kind):
        parts.append(walk.digest(state, kind.__qualname__))
        loose = {name: module._buffers[name] for name in sorted(module._non_persistent_buffers_set)}
        parts.append(walk.digest(loose, kind.__qualname__))
    else:
        if hasattr(kind, "from_pretrained"):  # how it was loaded; what it computes, its configuration says
            state = {name: value for name, value in state.items() if not name.startswith("_")}
        with walk.tolerant():
            parts += [part for name in sorted(state) for part in (name.encode(), *_plain(walk, state[name]))]
    for name in HOOKS:
        parts += walk.digests(getattr(module, name).values(), name)
    return parts


def _plain(walk: Walk, value: Any) -> list[bytes]:
    """A value where it is plain: numbers, texts, functions, configurations, and containers of such; else its class."""
    if type(value) in ATOMS or isinstance(value, (type, types.FunctionType, types.MethodType, functools.partial)):
        return [walk.digest(value, "")]
    if isinstance(value, PLAIN) or _is_config(value):
        return [walk.digest(value, "")]
    if isinstance(value, (list, tuple)):
        return [part for one in value for part in _plain(walk, one)]
    if isinstance(value, dict):
        return [part for key, one in value.items() for part in (repr(key).encode(), *_plain(walk, one))
                if type(key) in (str, int)]  # fmt: skip
    return [f"{type(value).__module__}.{type(value).__qualname__}".encode()]


def _is_config(value: Any) -> bool:
    return callable(getattr(type(value), "to_dict", None)) and callable(getattr(type(value), "from_pretrained", None))


def _configuration(walk: Walk, value: Any) -> list[bytes] | None:
    """A configuration of transformers by what it says, not by where it was read."""
    if isinstance(value, (type, torch.nn.Module)) or not _is_config(value):
        return None
    try:
        said = value.to_dict()
    except Exception:  # whatever a class of somebody's raises
        return None
    return [walk.digest(type(value), ""), walk.digest(_without(said), "")]


def _without(said: Any) -> Any:
    if isinstance(said, Mapping):
        return {name: _without(value) for name, value in said.items() if name not in CONFIG_PASSING}
    return said


def _values(walk: Walk, value: Any) -> list[bytes] | None:
    """Tensors and arrays by their bytes; what torch has of its own by its name, code or state."""
    if isinstance(value, torch.Tensor):
        return _tensor(walk, value)
    if isinstance(value, np.ndarray):
        facts = f"{value.dtype}{value.shape}".encode()
        return [facts, *walk.digests(value.tolist(), "")] if value.dtype.hasobject else [facts, value.tobytes()]
    if isinstance(value, torch.Generator):
        return [walk.digest(value.get_state(), "")]
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return [str(value).encode()]
    if isinstance(value, torch.jit.ScriptFunction):
        return [str(value.code).encode()]
    if isinstance(value, torch.nn.Module):  # a loss, or a network that a function reads
        parts = [part for name, one in value.named_modules() for part in (name.encode(), *_module(walk, one))]
        tensors = dict(value.named_parameters()) | dict(value.named_buffers())
        return parts + [part for name, one in tensors.items() for part in (name.encode(), walk.digest(one, name))]
    return None


def _tensor(walk: Walk, tensor: torch.Tensor) -> list[bytes]:
    facts = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    if tensor.is_meta:
        return [facts]
    try:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return [facts, flat.view(torch.uint8).numpy().tobytes()]
    except (RuntimeError, TypeError, NotImplementedError):
        return [facts, walk.not_read(tensor)]


READERS: tuple[Reader, ...] = (_values, _configuration)
