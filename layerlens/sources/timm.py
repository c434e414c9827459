"""Models of timm (PyTorch Image Models): ``timm:NAME``, with the hub's, local or random weights."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ModelNotFoundError
from layerlens.integrations.pretrained import ImageInput, PretrainedModel, mode_for
from layerlens.integrations.safetensors_files import load_weights
from layerlens.integrations.torchvision_import import make_torchvision_importable
from layerlens.integrations.transformers import timm_head
from layerlens.sources.source import LoadRequest, ModelSource, Trust

if TYPE_CHECKING:
    import torch

RANDOM = "random"


class TimmSource(ModelSource):
    """A model that timm builds, for image classification.

    A head that the weights do not have for so many classes is new, drawn from the seed; timm does not say which classes
    its own heads mean, so the head of the hub's weights is always replaced.
    """

    default_task = "image-classification"
    purpose = "classifies images"
    takes_weights = True
    built_by = "timm"

    def fits(self, kind: Any) -> bool:
        return bool(kind.inputs == "image" and kind.auto_class == "AutoModelForImageClassification")

    def trust(self, request: LoadRequest) -> Trust:
        return Trust(hub=request.weights is None)

    def snippet(self, request: LoadRequest) -> tuple[list[str], str]:
        known = f", pretrained={request.weights is None}, num_classes={_outputs(request)}"
        return ["import timm"], f"timm.create_model({request.place!r}{known})"

    def load(self, request: LoadRequest) -> PretrainedModel:
        timm = _library()
        import torch

        name, weights = request.place, request.weights
        if not timm.is_model(name):
            near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ModelNotFoundError(f"model.name_or_path: timm has no model {name!r}{hint}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            try:
                model: Any = timm.create_model(name, pretrained=weights is None, num_classes=_outputs(request))
            except Exception as error:  # hub errors and unknown tags share no narrower base class
                raise ModelNotFoundError(
                    f"model.name_or_path: cannot load the weights of {request.reference}: "
                    f"{str(error).strip().splitlines()[0]}; give model.weights: a local .safetensors file, or random"
                ) from error
        in_head = tuple(name for name, _ in model.named_parameters() if name.startswith(f"{timm_head(model)}."))
        new = set(in_head)
        if weights not in (None, RANDOM):
            new = load_weights(model, str(weights), request.base_dir, in_head)
        settings = timm.data.resolve_model_data_config(model)
        one_image = timm.data.create_transform(**settings, is_training=False)

        def transform(images: Sequence[Any]) -> torch.Tensor:
            return torch.stack([one_image(image) for image in images])

        model.to(getattr(torch, request.dtype)).eval().requires_grad_(False)
        images = ImageInput(transform, "x", mode_for(settings["input_size"][0]))
        return PretrainedModel(model, None, request.reference, tuple(sorted(new)), tuple(request.labels), images)


SOURCE = TimmSource()


def _outputs(request: LoadRequest) -> int:
    return len(request.labels) if request.kind is None else int(request.kind.n_outputs(request.labels))


def _library() -> Any:
    if not make_torchvision_importable():
        raise ModelNotFoundError(
            "model.name_or_path: timm models need timm and torchvision; run: pip install 'layerlens[vision]'"
        )
    try:
        import timm
        import timm.data
    except ModuleNotFoundError as error:
        raise ModelNotFoundError(
            "model.name_or_path: timm is not installed; run: pip install 'layerlens[vision]'"
        ) from error
    return timm
