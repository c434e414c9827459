"""Functions of the user, named as ``module:function``: nothing else makes LayerLens run user code."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerlens.exceptions import ConfigurationError

REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def load_function(reference: str, key: str, base_dir: Path | None = None) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    The module is imported as Python finds it: installed, on PYTHONPATH, or a file in the configuration's folder.

    Args:
        reference: ``module:function``.
        key: the configuration's key, for messages.
        base_dir: folder of the configuration file.

    Raises:
        ConfigurationError: no such module or function, or importing it fails.

    >>> load_function("math:sqrt", "model.loss")(9.0)
    3.0
    """
    if not REFERENCE.fullmatch(reference):
        raise ConfigurationError(f"{key}: must be module:function, such as my_project.models:build, got {reference!r}")
    module_name, _, name = reference.partition(":")
    folder = str((base_dir or Path()).resolve())
    sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigurationError(f"{key}: importing {module_name} fails: {error}") from error
        raise ConfigurationError(
            f"{key}: found no module {module_name!r}; install it, put it on PYTHONPATH, or beside the configuration in "
            f"{folder}"
        ) from error
    except Exception as error:
        raise ConfigurationError(f"{key}: importing {module_name} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [found for found, value in vars(module).items() if callable(value) and not found.startswith("_")]
        raise ConfigurationError(
            f"{key}: {module_name} has no function {name!r}; it has {', '.join(functions) or 'none'}"
        )
    return function
