"""Modules of a torch model by name, devices to run it on, and the modes and flags that it is measured with."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError, ManifestError

if TYPE_CHECKING:
    import torch


def find_module(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module of ``model`` with this path.

    Raises:
        ManifestError: there is none; the message has the nearest known names.
    """
    found: torch.nn.Module | None = model
    for part in name.split("."):  # all modules of a deep model for each of its layers would be a square
        found = None if found is None else found._modules.get(part)
    if found is not None:
        return found
    modules = dict(model.named_modules(remove_duplicate=False))
    near = difflib.get_close_matches(name, modules, n=3, cutoff=0.6)
    near += [known for known in modules if known.endswith("." + name) and known not in near][:3]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ManifestError(f"{type(model).__name__} has no module {name!r}{hint}. Was the manifest made for this model?")


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module is called with first, by place or by keyword (``linear(input=x)``); None if there is none."""
    import torch

    if args:
        return args[0]
    return next((value for value in kwargs.values() if isinstance(value, torch.Tensor)), None)


def in_precision(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model with its weights and buffers with a point in ``dtype``; complex ones stay, which ``.to`` makes real."""
    moved: torch.nn.Module = model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return moved


def precision_of(model: torch.nn.Module) -> torch.dtype:
    """That of the first weight with a point: what inputs with a point must be in."""
    import torch

    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)


def without_compilation(model: Any) -> tuple[Any, tuple[str, ...]]:
    """The model that ``torch.compile`` was called with, called by Python again; and what to say of it.

    ``torch.compile(model)`` is a module around the model, which then has ``_orig_mod.`` before all names;
    ``model.compile()`` changes how the model is called. Both may be done to modules inside it too. Replicas over
    devices (``DataParallel``) are taken off as well.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        return model, ()
    found: list[str] = []
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while isinstance(model, parallel) or hasattr(model, "_orig_mod"):
        found.append("" if hasattr(model, "_orig_mod") else type(model).__name__)
        model = getattr(model, "_orig_mod", None) or model.module
    for path, module in list(model.named_modules()):
        for name, child in module.named_children():
            if hasattr(child, "_orig_mod"):
                found.append(f"{path}.{name}".lstrip("."))
                setattr(module, name, child._orig_mod)
        if getattr(module, "_compiled_call_impl", None) is not None:
            found.append(path)
            module._compiled_call_impl = None
    if not found:
        return model, ()
    what = ", ".join(name or "the whole of it" for name in dict.fromkeys(found))
    return model, (
        f"model: is compiled or replicated ({what}); LayerLens measures and adapts the original model. The adapter has "
        "the original names: load the adapter first, and compile afterwards",
    )


def usable_device(name: str) -> torch.device:
    """The device called ``name`` ("cpu" or "cuda"), which is there.

    Raises:
        ConfigurationError: torch sees no such device.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "sees no CUDA device; check the driver"
        raise ConfigurationError(
            f"runtime.device: cuda was asked for, but torch {torch.__version__} {built}; set runtime.device: cpu, or "
            "install a build of torch for your GPU"
        )
    return torch.device(name)


def without_dropout(model: torch.nn.Module) -> None:
    """Let no dropout module of ``model`` drop anything any more."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@contextmanager
def in_evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """While open, every module is in evaluation mode; each has its own mode back after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen_without_dropout(model: torch.nn.Module, *, checkpointing: bool = False) -> Iterator[None]:
    """While open, no weight requires a gradient and no module is in training mode; modes and flags come back after,
    also where they are changed meanwhile (weights whose gradients are wanted are told so inside).

    A module that checkpoints its activations does so in training mode only (transformers), so with ``checkpointing`` it
    alone has that mode, while what is inside it, dropout included, has not. Without it nothing checkpoints.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    checkpoints: list[Any] = [x for x in model.modules() if getattr(x, "gradient_checkpointing", False) is True]
    with in_evaluation_mode(model):
        try:
            model.requires_grad_(False)
            for module in checkpoints:
                module.gradient_checkpointing = module.training = checkpointing
            yield
        finally:
            for parameter, required in flags:
                parameter.requires_grad_(required)
            for module in checkpoints:
                module.gradient_checkpointing = True


def learns_in_forward(module: torch.nn.Module) -> bool:
    """Whether a forward pass in training mode changes buffers of the module: running statistics of batch and instance
    normalisation, and the vectors with which spectral normalisation finds the largest singular value.
    """
    import torch
    from torch.nn.utils import parametrizations
    from torch.nn.utils.spectral_norm import SpectralNorm

    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm | parametrizations._SpectralNorm):
        return True
    if isinstance(module, torch.nn.modules.instancenorm._InstanceNorm):
        return bool(module.track_running_stats)
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
