"""Models that a function of the user builds: ``factory:module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.audio_input import AudioInput, audio_input, extractor_in
from layerlens.integrations.pretrained import ImageInput, PretrainedModel, tokenizer_of
from layerlens.integrations.safetensors_files import load_weights
from layerlens.integrations.torch_modules import in_precision, without_compilation
from layerlens.sources.image_transform import ImageTransform
from layerlens.sources.source import LoadRequest, ModelSource, Trust
from layerlens.utils.user_code import load_function

if TYPE_CHECKING:
    import torch


class FactorySource(ModelSource):
    """What a function returns: a module, or (module, tokenizer, image transform, or feature extractor or transform of
    sound).

    No part of the model is taken to be new: the factory returns it as it is to be measured, but for its weights with a
    point, which become those of the wanted dtype, and a note says so where they had another. Weights in several
    precisions stay as they are: the model's code fits them together. torch's random state is set from the seed.
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
        _refuse_unfinished(model, name)
        if request.weights is not None:
            load_weights(model, request.weights, request.base_dir)
        notes += _in_precision_wanted(model, request.dtype)
        model.eval().requires_grad_(False)
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
            images = ImageInput(ImageTransform(of_images, name), processor=of_images)
            whole = tokenizer_of(processor)
            return PretrainedModel(model, whole, reference, (), labels, images, notes=notes, processor=processor)
        tokenizer = processor if hasattr(processor, "pad") and not hasattr(processor, "preprocess") else None
        if processor is not None and tokenizer is None:
            own = processor if hasattr(processor, "preprocess") else None
            images = ImageInput(ImageTransform(processor, name), first_argument(model), "RGB", own)
        return PretrainedModel(model, tokenizer, reference, (), labels, images, notes=notes)


SOURCE = FactorySource()
USUAL = LoadRequest.dtype


def _in_precision_wanted(model: torch.nn.Module, wanted: str) -> tuple[str, ...]:
    """Bring the model into the wanted precision; what there is to say of it."""
    import torch

    kinds = sorted({str(one.dtype).removeprefix("torch.") for one in model.parameters() if one.is_floating_point()})
    if len(kinds) > 1 and wanted == USUAL:
        return (
            f"model: its weights are in {' and '.join(kinds)}, and stay so; set model.dtype to bring all into another",
        )
    in_precision(model, getattr(torch, wanted))
    if kinds in ([], [wanted]):
        return ()
    return (f"model: its weights are in {' and '.join(kinds)}, and are measured in {wanted} (model.dtype)",)


def _refuse_unfinished(model: torch.nn.Module, name: str) -> None:
    """Refuse modules whose layers cannot be adapted, or have no weights yet.

    Raises:
        ConfigurationError: says what to return instead.
    """
    import torch

    scripted = [path for path, one in model.named_modules() if isinstance(one, torch.jit.ScriptModule)]
    if scripted:
        raise ConfigurationError(
            f"model.factory: {name} returns a torch.jit ScriptModule ({scripted[0] or 'the model itself'}), whose "
            "layers cannot be adapted; return the module that it was made from"
        )
    if type(model).__module__.startswith("torchvision.models.detection"):
        raise ConfigurationError(
            f"model.factory: {name} returns a {type(model).__name__}, a detector of torchvision, which gives its "
            "losses in training mode only. It is not supported; use a YOLO detector (ultralytics:WEIGHTS.pt), or "
            "return the part of it that you adapt, such as its backbone"
        )
    lazy = [path for path, one in model.named_parameters() if torch.nn.parameter.is_lazy(one)]
    if lazy:
        raise ConfigurationError(
            f"model.factory: {name} returns layers without weights (lazy: {', '.join(lazy[:3])}); call the model once "
            "on a batch in the factory"
        )


def first_argument(model: torch.nn.Module) -> str:
    """Name of the first argument of the model's ``forward``.

    Raises:
        ConfigurationError: it names none.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    found = next((one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)), None)
    if found is None:
        raise ConfigurationError(
            f"model: forward of {type(model).__name__} names no argument ({', '.join(map(str, parameters))}); name the "
            "one that takes the inputs: def forward(self, x)"
        )
    return found
