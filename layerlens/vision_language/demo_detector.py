"""A small real detector for machines without a hub: ultralytics' blocks, trained here on plates drawn from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerlens.data.plates import CLASSES, draw_plates
from layerlens.models import LabelledImage
from layerlens.utils.progress import Progress, silent

TRAINING_PLATES, EPOCHS = 400, 10
HELD_OUT_PLATES, HELD_OUT_SEED = 100, 10_001
"""The plates whose mAP is told; no training seed draws them."""

ARCHITECTURE: dict[str, Any] = {
    "nc": len(CLASSES),
    "scales": {"n": [1.0, 1.0, 1024]},
    "backbone": [
        [-1, 1, "Conv", [12, 3, 2]],
        [-1, 1, "Conv", [24, 3, 2]],
        [-1, 1, "C2f", [24, True]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, True]],  # 4: stride 8
        [-1, 1, "Conv", [48, 3, 2]],
        [-1, 1, "C2f", [48, True]],
        [-1, 1, "SPPF", [48, 5]],  # 7: stride 16
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],
        [-1, 1, "C2f", [32]],  # 10
        [[10, 7], 1, "Detect", ["nc"]],
    ],
}
"""Two scales, 0.24 M parameters: enough for three kinds of shapes, small enough for a minute on a CPU."""


def train_demo_detector(path: Path, *, seed: int = 0, progress: Progress = silent) -> Path:
    """Train the detector on plates drawn from ``seed`` and write its checkpoint to ``path``."""
    from layerlens.integrations.ultralytics_training import train_detector

    plates = draw_plates(TRAINING_PLATES, seed)
    return train_detector(ARCHITECTURE, CLASSES, plates, path, epochs=EPOCHS, seed=seed, progress=progress)


def held_out_plates() -> list[LabelledImage]:
    """The plates that no detector was trained on."""
    return draw_plates(HELD_OUT_PLATES, HELD_OUT_SEED)


def held_out_precision(weights: Path) -> dict[str, float]:
    """``map50`` and ``map50_95`` on the held-out plates, by ultralytics' validator."""
    from layerlens.integrations.ultralytics_training import mean_average_precision

    return mean_average_precision(weights, CLASSES, held_out_plates())
