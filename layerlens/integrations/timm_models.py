"""Models of timm (PyTorch Image Models): ``timm:NAME``, with the hub's, local or random weights."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerlens.exceptions import ModelNotFoundError, ModelSpecError
from layerlens.integrations.image_input import ImageInput, mode_for
from layerlens.integrations.torchvision_import import make_torchvision_importable
from layerlens.integrations.transformers import PretrainedModel
from layerlens.integrations.weight_files import load_weights
from layerlens.registry import TASKS

PREFIX, RANDOM = "timm:", "random"
CLASSIFICATION = "image-classification"


def load_timm(
    reference: str,
    task: str,
    labels: Sequence[str],
    *,
    weights: str | None,
    seed: int,
    base_dir: Path | None,
    dtype: str = "float32",
) -> PretrainedModel:
    """Load ``timm:NAME`` for image classification with a head for ``labels``, frozen and in evaluation mode.

    A head that the weights do not have for so many classes is new, drawn from ``seed``; timm does not say which classes
    its own heads mean, so the head of the hub's weights is always replaced.

    Raises:
        ModelNotFoundError: timm is not installed, has no such model, or its weights cannot be read.
        ModelSpecError: another task than image classification.
    """
    kind = TASKS[task]
    if kind.inputs != "image" or not kind.classes:
        raise ModelSpecError(f"model.task: {reference} classifies images; set model.task: {CLASSIFICATION}")
    timm = _library()
    import torch

    name = reference.removeprefix(PREFIX)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ModelNotFoundError(f"model.name_or_path: timm has no model {name!r}{hint}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: Any = timm.create_model(name, pretrained=weights is None, num_classes=len(labels))
        except Exception as error:  # hub errors and unknown tags share no narrower base class
            raise ModelNotFoundError(
                f"model.name_or_path: cannot load the weights of {reference}: {str(error).strip().splitlines()[0]}; "
                "give model.weights: a local .safetensors file, or random"
            ) from error
    head = head_name(model)
    in_head = tuple(name for name, _ in model.named_parameters() if name.startswith(f"{head}."))
    new = set(in_head)
    if weights not in (None, RANDOM):
        new = load_weights(model, str(weights), base_dir, in_head)
    settings = timm.data.resolve_model_data_config(model)
    one_image = timm.data.create_transform(**settings, is_training=False)

    def transform(images: Sequence[Any]) -> torch.Tensor:
        return torch.stack([one_image(image) for image in images])

    model.to(getattr(torch, dtype)).eval().requires_grad_(False)
    images = ImageInput(transform, "x", mode_for(settings["input_size"][0]))
    return PretrainedModel(model, None, reference, tuple(sorted(new)), tuple(labels), images)


def head_name(model: Any) -> str:
    """Path of a timm model's classifier."""
    classifier = model.get_classifier()
    return next((name for name, module in model.named_modules() if module is classifier and name), "")


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
