"""Finding modules of a torch model by name and devices to run it on, with help for the one who asks for others."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from layerlens.exceptions import ConfigurationError, ManifestError

if TYPE_CHECKING:
    import torch


def find_module(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module of ``model`` with this path.

    Raises:
        ManifestError: there is none; the message has the nearest known names.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name in modules and name:
        return modules[name]
    near = difflib.get_close_matches(name, modules, n=3, cutoff=0.6)
    near += [known for known in modules if known.endswith("." + name) and known not in near][:3]
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ManifestError(f"{type(model).__name__} has no module {name!r}{hint}. Was the manifest made for this model?")


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
