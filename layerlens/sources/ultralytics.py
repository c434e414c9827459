"""Detection models of ultralytics: ``ultralytics:WEIGHTS.pt``, with their own loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from layerlens.integrations.pretrained import ImageInput, PretrainedModel
from layerlens.integrations.ultralytics import find_weights, load_detector
from layerlens.integrations.ultralytics_head import knows, take_classes
from layerlens.sources.source import LoadRequest, ModelSource, Trust

if TYPE_CHECKING:
    import torch


class UltralyticsSource(ModelSource):
    """A detector, not fused; with a head for the data's classes where it does not know all of them.

    Batch normalisation uses its running statistics, so that no sample's loss depends on the others in its batch.
    """

    default_task = "object-detection"
    purpose = "finds objects in images"
    dtypes = ("float32",)
    built_by = "ultralytics"
    why_not_sharded = "an ultralytics model cannot be sharded"

    def fits(self, kind: Any) -> bool:
        return bool(kind.inputs == "image" and not kind.classes)

    def trust(self, request: LoadRequest) -> Trust:
        return Trust(path=request.place, pickle=True)

    def load(self, request: LoadRequest) -> PretrainedModel:
        import torch

        detector = load_detector(find_weights(request.place, request.base_dir))
        model = detector.module
        new: tuple[str, ...] = ()
        if request.labels and (request.new_head or not knows(detector.names, request.labels)):
            new = take_classes(model, request.labels, request.seed)
        for name, module in model.named_modules():
            if name.endswith(".dfl.conv"):
                module.layerlens_left_out = "its weights are the numbers 0, 1, 2 ..., which only decode boxes"

        def transform(images: Sequence[Any]) -> torch.Tensor:
            return torch.stack([detector.preprocess(image) for image in images])

        images = ImageInput(transform, "x", "RGB")
        if not new:
            return PretrainedModel(model, None, request.reference, (), detector.names, images)
        note = (
            f"model: the detector was trained on {len(detector.names)} other classes; the last convolutions of its "
            f"head are new, with an output for {', '.join(request.labels)}, and are trained with the choice"
        )
        return PretrainedModel(model, None, request.reference, new, tuple(request.labels), images, notes=(note,))


SOURCE = UltralyticsSource()
