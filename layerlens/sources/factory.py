"""Models that a function of the user builds: ``factory:module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import ImageInput, PretrainedModel
from layerlens.integrations.safetensors_files import load_weights
from layerlens.integrations.torch_modules import without_compilation
from layerlens.sources.source import LoadRequest, ModelSource, Trust
from layerlens.utils.user_code import load_function

if TYPE_CHECKING:
    import torch


class FactorySource(ModelSource):
    """What a function returns: a module, or (module, tokenizer or image transform).

    No part of the model is taken to be new: the factory returns it as it is to be measured, but for its weights with a
    point, which become those of the wanted dtype. torch's random state is set from the seed while it runs.
    """

    key = "factory"
    takes_weights = True

    def trust(self, request: LoadRequest) -> Trust:
        return Trust(code=request.place.partition(":")[0])

    def load(self, request: LoadRequest) -> PretrainedModel:
        import torch

        name = request.place
        function: Callable[[], Any] = load_function(name, "model.factory", request.base_dir)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            try:
                returned = function()
            except Exception as error:
                raise ConfigurationError(f"model.factory: {name} fails: {type(error).__name__}: {error}") from error
        model, processor = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        model, notes = without_compilation(model)
        if not isinstance(model, torch.nn.Module):
            raise ConfigurationError(
                f"model.factory: {name} must return a torch.nn.Module, or (module, tokenizer or image transform), got "
                f"{type(model).__name__}"
            )
        if request.weights is not None:
            load_weights(model, request.weights, request.base_dir)
        model.to(getattr(torch, request.dtype)).eval().requires_grad_(False)
        tokenizer = processor if hasattr(processor, "pad") else None
        images = None
        if processor is not None and tokenizer is None:
            images = ImageInput(processor, first_argument(model), "RGB")
        return PretrainedModel(model, tokenizer, request.reference, (), tuple(request.labels), images, notes=notes)


SOURCE = FactorySource()


def first_argument(model: torch.nn.Module) -> str:
    """Name of the first argument of the model's ``forward``."""
    return next(iter(inspect.signature(model.forward).parameters))
