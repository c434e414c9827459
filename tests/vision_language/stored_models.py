"""The demos' models as ``python -m benchmarks.toy_models --write`` trained them: kept in half precision, 1.4 MB."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from toys.detector import ARCHITECTURE, VERSION, detector_place
from toys.detector_training import save_checkpoint
from toys.language_model import VERSION as LANGUAGE_VERSION
from toys.language_model import language_model_place
from toys.plates import CLASSES, SIZE

from layerlens.integrations.ultralytics import import_ultralytics, load_detector

MODELS = Path(__file__).with_name("models")
DETECTOR = MODELS / f"plates-detector-v{VERSION}.safetensors"
LANGUAGE_MODEL = MODELS / f"plates-language-model-v{LANGUAGE_VERSION}"
WEIGHTS = "model.safetensors"


def write_models(weights: Path, language_model: Path) -> None:
    """Keep the two trained models in place of the ones that are here."""
    shutil.rmtree(MODELS, ignore_errors=True)
    MODELS.mkdir()
    save_file(_in(torch.float16, load_detector(weights).module.state_dict()), DETECTOR)
    shutil.copytree(language_model, LANGUAGE_MODEL)
    save_file(_in(torch.float16, load_file(language_model / WEIGHTS)), LANGUAGE_MODEL / WEIGHTS)


def put_models(cache: Path) -> None:
    """Put both into a cache, as training would have left them there."""
    import_ultralytics()
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    model: Any = DetectionModel(copy.deepcopy(ARCHITECTURE), ch=3, nc=len(CLASSES), verbose=False)
    model.load_state_dict(_in(torch.float32, load_file(DETECTOR)))
    model.args, model.names = get_cfg(), dict(enumerate(CLASSES))
    place = language_model_place(cache)
    shutil.copytree(LANGUAGE_MODEL, place)
    save_file(_in(torch.float32, load_file(LANGUAGE_MODEL / WEIGHTS)), place / WEIGHTS, {"format": "pt"})
    save_checkpoint(model.eval(), detector_place(cache), SIZE)


def _in(dtype: torch.dtype, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (one.to(dtype) if one.is_floating_point() else one).contiguous() for name, one in tensors.items()}
