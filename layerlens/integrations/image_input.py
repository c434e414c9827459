"""How PIL images become what a model takes: transformers' image processors, timm's transforms, or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ModelNotFoundError
from layerlens.integrations.torchvision_import import make_torchvision_importable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ImageInput:
    """The way from images to pixels.

    Args:
        transform: from PIL images to float32 [batch, channels, height, width].
        argument: the argument of the model's ``forward`` that takes them.
        mode: PIL's mode that the images are converted to: "RGB", or "L" for models with one channel.
    """

    transform: Callable[[Sequence[Any]], torch.Tensor]
    argument: str = "pixel_values"
    mode: str = "RGB"


def transformers_images(path: str, config: Any, *, local_only: bool) -> ImageInput:
    """The image processor that was saved with a transformers model.

    Raises:
        ModelNotFoundError: there is none.
    """
    make_torchvision_importable()
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(path, local_files_only=local_only)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelNotFoundError(
            f"model.name_or_path: {path} has no usable image processor ({str(error).strip().splitlines()[0]}); save "
            "the one of the model beside its weights (preprocessor_config.json)"
        ) from error

    def transform(images: Sequence[Any]) -> torch.Tensor:
        pixels: torch.Tensor = processor(list(images), return_tensors="pt")["pixel_values"]
        return pixels

    return ImageInput(transform, "pixel_values", mode_for(getattr(config, "num_channels", 3)))


def mode_for(channels: int) -> str:
    """PIL's mode with this number of channels."""
    return {1: "L", 3: "RGB", 4: "RGBA"}.get(channels, "RGB")
