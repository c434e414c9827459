"""A user's way from images to pixels: of a list of images, of one image as torchvision has it, or transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError

if TYPE_CHECKING:
    import torch


class ImageTransform:
    """What turns images into a batch, whichever of these a function is.

    Args:
        function: the transform, or an image processor of transformers.
        name: the factory that returned it, for messages.
    """

    def __init__(self, function: Any, name: str) -> None:
        self.function, self.name = function, name
        self.of_one = False

    def __call__(self, images: Sequence[Any]) -> torch.Tensor:
        """Pixels [batch, channels, height, width] of PIL images.

        Raises:
            ConfigurationError: it can do neither, or gives images of several sizes.
        """
        import torch

        failure = ""
        if not self.of_one:
            try:
                return self._of_many(images)
            except Exception as error:  # a user's code, which may be for one image
                failure = f" and on a list of images ({type(error).__name__}: {error})"
        try:
            each = [torch.as_tensor(self.function(image)) for image in images]
        except Exception as error:
            raise ConfigurationError(
                f"model.factory: the image transform of {self.name} fails on one image ({type(error).__name__}: "
                f"{error}){failure}"
            ) from error
        self.of_one = True
        shapes = sorted({tuple(one.shape) for one in each})
        if len(shapes) > 1:
            raise ConfigurationError(
                f"model.factory: the image transform of {self.name} gives images of several sizes "
                f"({', '.join(str(list(shape)) for shape in shapes[:3])}); resize in it"
            )
        return torch.stack(each)

    def _of_many(self, images: Sequence[Any]) -> torch.Tensor:
        import torch

        if hasattr(self.function, "preprocess"):  # an image processor of transformers
            return torch.as_tensor(self.function(images=list(images), return_tensors="pt")["pixel_values"])
        made = self.function(list(images))
        if not isinstance(made, torch.Tensor) or len(made) != len(images):
            raise TypeError(f"returns a {type(made).__name__}")
        return made
