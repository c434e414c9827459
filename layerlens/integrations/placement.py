"""Models whose weights are spread: over devices, main memory and disk by accelerate, or over processes by FSDP2."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError, ModelSpecError
from layerlens.utils.processes import Processes

if TYPE_CHECKING:
    import torch


def placement_arguments(
    device_map: str | Mapping[str, str | int] | None, max_memory: Mapping[str, str] | None, offload_folder: str | None
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that place a model's modules.

    Raises:
        ConfigurationError: accelerate, which places them, is not installed; or a device does not exist.
    """
    import torch

    if device_map is None:
        return {}
    try:
        import accelerate  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigurationError("model.device_map: needs accelerate; run: pip install 'layerlens[hf]'") from error
    wanted = [] if isinstance(device_map, str) else [str(place) for place in device_map.values()]
    wanted += [str(place) for place in max_memory or ()]
    for place in wanted:
        number = place.removeprefix("cuda:")
        if number.isdecimal() and int(number) >= torch.cuda.device_count():
            raise ConfigurationError(
                f"model.device_map: there is no GPU {number}; torch sees {torch.cuda.device_count()}"
            )
        if not number.isdecimal() and place not in ("cpu", "disk"):
            raise ConfigurationError(
                f"model.device_map: must be a GPU's number, cuda:NUMBER, cpu or disk, got {place!r}"
            )
    devices = {int(place) if place.isdecimal() else place: size for place, size in (max_memory or {}).items()}
    found: dict[str, Any] = {"device_map": device_map if isinstance(device_map, str) else dict(device_map)}
    found |= {"max_memory": devices} if devices else {}
    return found | ({"offload_folder": offload_folder} if offload_folder else {})


def finish_placement(model: Any, new_parameters: tuple[str, ...]) -> None:
    """Prepare a placed model for backward passes; does nothing for one that lies in one place.

    Weights that are loaded for a forward pass would be kept for the backward pass, so blocks are computed again there.

    Raises:
        ModelSpecError: a new head lies on the disk, where it cannot be fitted.
    """
    if not offloaded(model):
        return
    for name in new_parameters:
        if model.get_parameter(name).device.type == "meta":
            raise ModelSpecError(
                f"model.device_map: puts the new task head {name} on the disk; give it a device or cpu"
            )
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with suppress(AttributeError):  # what it adds for parameters that train below the blocks, where there are none
            model.disable_input_require_grads()


def placed(model: torch.nn.Module) -> bool:
    """Whether accelerate has placed the model, which must then not be moved."""
    return getattr(model, "hf_device_map", None) is not None


def offloaded(model: torch.nn.Module) -> bool:
    """Whether some weights are loaded only while they are used."""
    return placed(model) and any(parameter.device.type == "meta" for parameter in model.parameters())


def input_device(model: torch.nn.Module) -> torch.device:
    """Where the model takes its inputs."""
    import torch

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.device.type != "meta":
                return parameter.device
            hook = getattr(module, "_hf_hook", None)
            if hook is not None:
                return torch.device(hook.execution_device)
    return torch.device("cpu")


def present(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, the entry ``name`` of the model's state, from where its bytes are."""
    if tensor.device.type != "meta":
        return tensor
    path, _, part = name.rpartition(".")
    hook: Any = model.get_submodule(path)._hf_hook
    found: torch.Tensor = hook.weights_map[part]
    return found.to(tensor.dtype)


def shard(model: torch.nn.Module, blocks: tuple[str, ...], processes: Processes) -> None:
    """Spread every block's weights over the processes (FSDP2); each then holds its share, and gathers one at a time.

    Raises:
        ConfigurationError: the model has no blocks to gather one at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not blocks:
        raise ConfigurationError(
            f"distributed.sharding: {type(model).__name__} has no transformer blocks to gather one at a time"
        )
    mesh = init_device_mesh(input_device(model).type, (processes.size,))
    for path in blocks:
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has spread the model over processes: a forward pass is then one of all of them."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)
