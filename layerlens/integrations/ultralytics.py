"""What LayerLens knows of ultralytics: loading detection weights, and the three steps of one detection apart.

ultralytics is under the AGPL-3.0 (or a licence bought from its authors): whoever ships or serves software that uses it
must heed that. LayerLens itself does not contain it; the extra ``vision`` installs it.

Weights (``.pt``) are pickled Python objects: loading them runs what they say, so load only those you trust.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ConfigurationError, ModelNotFoundError, ModelSpecError
from layerlens.integrations.torchvision_import import make_suppression_work, make_torchvision_importable
from layerlens.models import Detection

if TYPE_CHECKING:
    import torch
    from PIL import Image

PUBLISHED = re.compile(r"yolo(v?\d+|_nas)[\w-]*\.pt")
"""Names of weights that ultralytics publishes, and downloads when they are asked for."""
INSTALL = "pip install 'layerlens[vision]' (ultralytics, AGPL-3.0)"
MOST_BOXES = 300
DEFAULT_SIZE = 640


def import_ultralytics(*, offline: bool = True) -> None:
    """Make ``import ultralytics`` safe: no network, no installing of packages, no settings in the user's folder.

    What the user has set in the environment stays. Has no effect once ultralytics was imported.

    Args:
        offline: False where published weights may be downloaded.

    Raises:
        ModelNotFoundError: ultralytics is not installed.
    """
    if importlib.util.find_spec("ultralytics") is None:
        raise ModelNotFoundError(f"detector: ultralytics is not installed; run: {INSTALL}")
    if "ultralytics" in sys.modules:
        return
    if offline:
        os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    os.environ.setdefault("YOLO_CONFIG_DIR", str(Path(tempfile.gettempdir()) / f"layerlens-ultralytics-{os.getuid()}"))
    make_torchvision_importable()
    make_suppression_work()
    from PIL import Image

    opener = Image.open
    importlib.import_module("ultralytics.utils")
    Image.open = opener  # ultralytics puts one there that fails on what is not an image for want of a reader for HEIF


def find_weights(name: str, base_dir: Path | None = None) -> Path:
    """The local file that ``name`` means; published weights are downloaded into the working directory if need be.

    Raises:
        ModelNotFoundError: there is no such file, and none by that name can be had.
    """
    path = (base_dir or Path()) / Path(name).expanduser()
    if path.is_file():
        return path
    advice = "give a local .pt file, or the name of published weights such as yolo11n.pt"
    if not PUBLISHED.fullmatch(name):
        raise ModelNotFoundError(f"detector: no weights at {path}; {advice}")
    import_ultralytics(offline=False)
    from ultralytics.utils import ONLINE
    from ultralytics.utils.downloads import attempt_download_asset

    reason = "this machine is offline"
    try:
        found = Path(attempt_download_asset(name)) if ONLINE else path
        if found.is_file():
            return found
    except Exception as error:  # ultralytics passes on whatever its downloader raises
        reason = " ".join(str(error).split()) or type(error).__name__
    raise ModelNotFoundError(f"detector: {name} is not here and cannot be downloaded ({reason}); {advice}")


def load_detector(
    weights: Path,
    *,
    image_size: int | None = None,
    confidence: float = 0.25,
    iou: float = 0.5,
    device: str = "cpu",
    fuse: bool = False,
) -> YoloDetector:
    """A detection model in evaluation mode, in float32.

    Args:
        weights: a checkpoint of ultralytics.
        image_size: side of the square input, rounded up to the model's stride; what it was trained with when None.
        confidence, iou: see ``YoloDetector``.
        device: such as "cpu" or "cuda:0".
        fuse: fold batch normalisation into the convolutions, as ultralytics does for prediction.

    Raises:
        ModelNotFoundError: the file is not a checkpoint of ultralytics.
        ModelSpecError: it is a model of another task (segmentation, pose ...), or RT-DETR.
        ConfigurationError: there is no such device.
    """
    import_ultralytics()
    from ultralytics import YOLO
    from ultralytics.nn.modules.head import Detect

    where = torch_device(device)
    try:
        loaded: Any = YOLO(str(weights), verbose=False)
        module = loaded.model.float().eval().requires_grad_(False).to(where)
    except Exception as error:  # unpickling can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelNotFoundError(f"detector: {weights} is not a checkpoint of ultralytics: {reason}") from error
    if loaded.task != "detect":
        raise ModelSpecError(f"detector: {weights} is for the task {loaded.task!r}; give a model for detection")
    if not isinstance(module.model[-1], Detect):  # RT-DETR has boxes, losses and no suppression of its own
        raise ModelSpecError(
            f"detector: {weights} ends in a {type(module.model[-1]).__name__}, which is not a YOLO head; give a YOLO "
            "detector (RT-DETR is not supported)"
        )
    size = image_size or int(getattr(loaded, "overrides", {}).get("imgsz") or DEFAULT_SIZE)
    stride = int(module.stride.max())
    detector = YoloDetector(module, -(-size // stride) * stride, confidence, iou, where, str(weights))
    if fuse:
        _fuse(detector)
    return detector


def fuse(detector: YoloDetector) -> None:
    """Fold batch normalisation into the convolutions; a model with LoRA layers beside its weights must not be fused."""
    detector.module.fuse(verbose=False)


_fuse = fuse


def torch_device(name: str) -> torch.device:
    """``torch.device(name)`` of a device that is there.

    Raises:
        ConfigurationError: with what there is.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise ConfigurationError(f"device: {name!r} cannot be used; this machine has {there}") from error
    return device


class YoloDetector:
    """A detection model whose steps can be timed one by one.

    Args:
        module: ultralytics' DetectionModel, or that with PEFT layers in it.
        image_size: side of its square input; a multiple of its stride.
        confidence: boxes below are left out.
        iou: of boxes of one class that overlap more than this, the best stays.
        device: where it computes.
        source: where the weights came from.
    """

    def __init__(
        self, module: Any, image_size: int, confidence: float, iou: float, device: torch.device, source: str
    ) -> None:
        self.module, self.image_size, self.device, self.source = module, image_size, device, source
        self.confidence, self.iou = confidence, iou
        names = module.names
        self.names: tuple[str, ...] = tuple(names[index] for index in sorted(names))

    def describe(self) -> dict[str, Any]:
        """What the result records of it."""
        return {
            "source": self.source,
            "classes": list(self.names),
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "image_size": self.image_size,
            "confidence": self.confidence,
            "iou": self.iou,
            "device": str(self.device),
            "fused": bool(self.module.is_fused()) if hasattr(self.module, "is_fused") else False,
            "software": "ultralytics (AGPL-3.0)",
        }

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """``image`` (RGB) scaled into the square input, the rest grey: float32 [3, size, size] in 0 to 1."""
        import numpy as np
        import torch
        from ultralytics.data.augment import LetterBox

        side = self.image_size
        boxed: Any = LetterBox((side, side), auto=False)(image=np.asarray(image))
        tensor = torch.from_numpy(np.ascontiguousarray(boxed.transpose(2, 0, 1)))
        return tensor.to(self.device).float() / 255.0

    def infer(self, batch: torch.Tensor) -> Any:
        """The raw output for [n, 3, size, size]; it is computed when this returns."""
        import torch

        with torch.inference_mode():
            raw = self.module(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return raw

    def suppress(self, raw: Any, sizes: Sequence[tuple[int, int]]) -> list[list[Detection]]:
        """Non-maximum suppression, and boxes in pixels of the images as loaded.

        Args:
            raw: what ``infer`` returned.
            sizes: width and height of every image of the batch.

        Returns:
            For every image its detections, best first.
        """
        import torch
        from ultralytics.utils.nms import non_max_suppression
        from ultralytics.utils.ops import scale_boxes

        with torch.inference_mode():
            kept = non_max_suppression(
                raw, self.confidence, self.iou, max_det=MOST_BOXES, nc=len(self.names),
                end2end=bool(getattr(self.module, "end2end", False)),
            )  # fmt: skip
            found = []
            for rows, (width, height) in zip(kept, sizes, strict=True):
                boxes = scale_boxes((self.image_size, self.image_size), rows[:, :4].clone(), (height, width))
                scored = sorted(
                    zip(boxes.tolist(), rows[:, 4].tolist(), rows[:, 5].tolist(), strict=True), key=lambda row: -row[1]
                )
                found.append([Detection(self.names[int(c)], score, tuple(box)) for box, score, c in scored])
        return found
