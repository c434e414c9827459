"""A small real detector for machines without a hub: ultralytics' blocks, trained here on plates drawn from a seed.

    python demos/toys/detector.py [--output detector.pt] [--seed 0]

trains it and prints its mean average precision on plates that it has not seen; under a minute on an idle CPU core.
Without --output it goes to LayerLens's cache, where the demos find it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # `toys`, when this file is run itself

from layerlens.models import LabelledImage
from layerlens.utils.places import default_cache_dir
from layerlens.utils.progress import Progress, silent
from toys.plates import CLASSES, draw_plates

VERSION = 1
"""Raised when plates, architecture or training change, so that older files in a cache are left alone."""

TRAINING_PLATES, EPOCHS = 400, 10
HELD_OUT_PLATES, HELD_OUT_SEED = 100, 10_001
"""The plates for the reported mAP; no training seed draws them."""

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


def cached_detector(cache_dir: Path, *, seed: int = 0, progress: Progress = silent) -> Path:
    """Checkpoint in ``cache_dir``, trained the first time: about half a minute on an idle core.

    Raises:
        ModelNotFoundError: ultralytics is not installed.
        OutputError: the cache cannot be written.
    """
    path = detector_place(cache_dir, seed)
    return path if path.is_file() else train_detector(path, seed=seed, progress=progress)


def detector_place(cache_dir: Path, seed: int = 0) -> Path:
    """Where the checkpoint of a seed is kept."""
    return cache_dir / "models" / f"plates-detector-v{VERSION}-seed{seed}.pt"


def train_detector(path: Path, *, seed: int = 0, progress: Progress = silent) -> Path:
    """Train the detector on plates drawn from ``seed`` and write its checkpoint to ``path``."""
    from toys import detector_training

    plates = draw_plates(TRAINING_PLATES, seed)
    return detector_training.train_detector(
        ARCHITECTURE, CLASSES, plates, path, epochs=EPOCHS, seed=seed, progress=progress
    )


def held_out_plates() -> list[LabelledImage]:
    """The plates that no detector was trained on."""
    return draw_plates(HELD_OUT_PLATES, HELD_OUT_SEED)


def held_out_precision(weights: Path) -> dict[str, float]:
    """``map50`` and ``map50_95`` on the held-out plates, by ultralytics' validator."""
    from toys.detector_training import mean_average_precision

    return mean_average_precision(weights, CLASSES, held_out_plates())


def main() -> None:
    """Train, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=0, help="of the plates, the weights and the order")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.output is None:
        path = cached_detector(default_cache_dir(), seed=arguments.seed)
    else:
        path = train_detector(arguments.output, seed=arguments.seed)
    print(f"{path}: {time.perf_counter() - start:.0f} s (a few mean that it was in the cache)")
    precision = held_out_precision(path)
    print(
        f"mAP50 {precision['map50']:.3f}, mAP50-95 {precision['map50_95']:.3f} on {HELD_OUT_PLATES} held-out plates "
        "(ultralytics' validator)"
    )


if __name__ == "__main__":
    main()
