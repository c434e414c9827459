"""Models that a function of the user builds: ``factory:module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.image_input import ImageInput
from layerlens.integrations.transformers import PretrainedModel
from layerlens.integrations.weight_files import load_weights
from layerlens.utils.user_code import load_function

if TYPE_CHECKING:
    import torch

PREFIX = "factory:"


def load_factory(
    reference: str, task: str, labels: Sequence[str], *, weights: str | None, seed: int, base_dir: Path | None
) -> PretrainedModel:
    """Call the factory, with torch's random state set from ``seed``; the model is frozen and in evaluation mode.

    No part of it is taken to be new: the factory returns the model as it is to be measured.

    Raises:
        ConfigurationError: no such function, it fails, or it returns no model.
        ModelNotFoundError: the weights cannot be read, or are another model's.
    """
    import torch

    name = reference.removeprefix(PREFIX)
    function: Callable[[], Any] = load_function(name, "model.factory", base_dir)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            returned = function()
        except Exception as error:
            raise ConfigurationError(f"model.factory: {name} fails: {type(error).__name__}: {error}") from error
    model, processor = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if not isinstance(model, torch.nn.Module):
        raise ConfigurationError(
            f"model.factory: {name} must return a torch.nn.Module, or (module, tokenizer or image transform), got "
            f"{type(model).__name__}"
        )
    if weights is not None:
        load_weights(model, weights, base_dir)
    model.eval().requires_grad_(False)
    tokenizer = processor if hasattr(processor, "pad") else None
    images = None
    if processor is not None and tokenizer is None:
        images = ImageInput(processor, first_argument(model), "RGB")
    return PretrainedModel(model, tokenizer, reference, (), tuple(labels), images)


def first_argument(model: torch.nn.Module) -> str:
    """Name of the first argument of the model's ``forward``."""
    return next(iter(inspect.signature(model.forward).parameters))
