"""Models that a function of the user builds: ``factory:module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.audio_input import AudioInput, audio_input, extractor_in
from layerlens.integrations.pretrained import ImageInput, PretrainedModel, tokenizer_of
from layerlens.integrations.safetensors_files import load_weights
from layerlens.integrations.torch_modules import without_compilation
from layerlens.sources.source import LoadRequest, ModelSource, Trust
from layerlens.utils.user_code import load_function

if TYPE_CHECKING:
    import torch


class FactorySource(ModelSource):
    """What a function returns: a module, or (module, tokenizer, image transform, or feature extractor or transform of
    sound).

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
                f"model.factory: {name} must return a torch.nn.Module, or (module, tokenizer, image transform or "
                f"feature extractor), got "
                f"{type(model).__name__}"
            )
        if request.weights is not None:
            load_weights(model, request.weights, request.base_dir)
        model.to(getattr(torch, request.dtype)).eval().requires_grad_(False)
        images, reference, labels = None, request.reference, tuple(request.labels)
        extractor = extractor_in(processor)
        if extractor is not None:
            own = None if extractor is processor else tokenizer_of(processor)
            way = audio_input(extractor, first_argument(model))
            return PretrainedModel(model, own, reference, (), labels, notes=notes, audio=way)
        if request.kind is not None and request.kind.inputs == "audio" and processor is not None:
            way = AudioInput(processor, argument=first_argument(model))
            return PretrainedModel(model, None, reference, (), labels, notes=notes, audio=way)
        of_images = getattr(processor, "image_processor", None)
        if request.kind is not None and request.kind.inputs == "image" and of_images is not None:
            images = ImageInput(of_images, processor=of_images)
            whole = tokenizer_of(processor)
            return PretrainedModel(model, whole, reference, (), labels, images, notes=notes, processor=processor)
        tokenizer = processor if hasattr(processor, "pad") else None
        if processor is not None and tokenizer is None:
            images = ImageInput(processor, first_argument(model), "RGB")
        return PretrainedModel(model, tokenizer, reference, (), labels, images, notes=notes)


SOURCE = FactorySource()


def first_argument(model: torch.nn.Module) -> str:
    """Name of the first argument of the model's ``forward``."""
    return next(iter(inspect.signature(model.forward).parameters))
