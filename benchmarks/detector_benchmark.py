"""A YOLO detector that knows other classes, tuned to own ones: mAP50 on drawn plates, by ultralytics' validator.

There is no network here for COCO's weights. So YOLO11n, as ultralytics describes it, is first trained on drawn shapes
(ring, square, star ...). Then come `layerlens run` and `train` on plates with other classes (nodule, fracture, device),
and the result is judged on plates that nothing was trained on::

    python -m benchmarks.detector_benchmark --out benchmarks/results/detector.json

`--weights FILE` starts from your own detector, or keeps the one that is trained here for the next call.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "demos"))

from toys.detector_training import mean_average_precision, save_checkpoint, train_detector
from toys.plates import CLASSES, SIZE, draw_plates, write_dataset

from layerlens.models import LabelledImage

SHAPES = ("ring", "square", "triangle", "cross", "star", "diamond", "bar", "arrow", "disc", "frame")
"""What the detector knows at the start; none of them is a class of the plates."""
PRETRAINING, PRETRAINING_EPOCHS = 960, 10
PLATES, TRAINING_SEED, HELD_OUT, HELD_OUT_SEED = 400, 20_002, 100, 10_001


def draw_scenes(count: int, seed: int) -> list[LabelledImage]:
    """Coloured scenes with one to four shapes each, on a ground of blurred noise."""
    return [_scene(np.random.default_rng((seed, index))) for index in range(count)]


def _scene(random: np.random.Generator) -> LabelledImage:
    from PIL import Image, ImageDraw, ImageFilter

    side = 3 * SIZE
    coarse = Image.fromarray(random.integers(20, 130, (6, 6, 3), dtype=np.uint8))
    canvas = coarse.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    labels: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    for _ in range(int(random.integers(1, 5))):
        width, height = random.uniform(14, 40), random.uniform(14, 40)
        x, y = random.uniform(width / 2, SIZE - width / 2), random.uniform(height / 2, SIZE - height / 2)
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        if any(box[0] < b[2] + 3 and b[0] < box[2] + 3 and box[1] < b[3] + 3 and b[1] < box[3] + 3 for b in boxes):
            continue
        label = int(random.integers(len(SHAPES)))
        colour = tuple(int(value) for value in random.integers(140, 256, 3))
        _shape(draw, SHAPES[label], tuple(3 * value for value in box), colour)
        labels.append(label)
        boxes.append(box)
    small = canvas.filter(ImageFilter.GaussianBlur(1.5)).resize((SIZE, SIZE), Image.Resampling.BOX)
    noisy = np.asarray(small, dtype=np.float64) + random.normal(0.0, 4.0, (SIZE, SIZE, 3))
    return LabelledImage(np.clip(noisy, 0, 255).astype(np.uint8), tuple(labels), tuple(boxes))


def _shape(draw: Any, name: str, box: Any, colour: Any) -> None:
    left, top, right, bottom = box
    x, y, width, height = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    line = int(max(6, 0.16 * min(width, height)))
    if name == "ring":
        draw.ellipse(box, outline=colour, width=line)
    elif name == "disc":
        draw.ellipse(box, fill=colour)
    elif name == "square":
        draw.rectangle(box, fill=colour)
    elif name == "frame":
        draw.rectangle(box, outline=colour, width=line)
    elif name == "triangle":
        draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=colour)
    elif name == "diamond":
        draw.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=colour)
    elif name == "cross":
        draw.line([(left, top), (right, bottom)], fill=colour, width=line)
        draw.line([(left, bottom), (right, top)], fill=colour, width=line)
    elif name == "bar":
        draw.line([(left, bottom), (right, top)], fill=colour, width=2 * line)
    elif name == "arrow":
        draw.polygon([(left, top), (right, y), (left, bottom), (x, y)], fill=colour)
    else:
        turns, reaches = (math.pi * (0.2 * number - 0.5) for number in range(10)), (1.0, 0.4) * 5
        half = [(0.5 * r * width, 0.5 * r * height) for r in reaches]
        star = [(x + w * math.cos(a), y + h * math.sin(a)) for a, (w, h) in zip(turns, half, strict=True)]
        draw.polygon(star, fill=colour)


def pretrained(weights: Path) -> Path:
    """The detector at ``weights``, trained on drawn shapes where there is none."""
    if not weights.is_file():
        from rich.console import Console

        from layerlens.cli.progress import shown_progress
        from layerlens.integrations.ultralytics import import_ultralytics

        import_ultralytics()
        from ultralytics.nn.tasks import yaml_model_load

        described = yaml_model_load("yolo11n.yaml")
        with shown_progress(Console(stderr=True)) as progress:
            train_detector(
                described, SHAPES, draw_scenes(PRETRAINING, 1), weights, epochs=PRETRAINING_EPOCHS, learning_rate=2e-3,
                progress=progress,
            )  # fmt: skip
    return weights


def measure(weights: Path, folder: Path, *, budget: int, epochs: int, rate: float) -> dict[str, Any]:
    """Precision on shapes, then `run` and `train` on plates, and precision on plates."""
    from layerlens.config import RunConfig
    from layerlens.integrations.ultralytics import load_detector
    from layerlens.jobs.adapted_models import adapted_detector
    from layerlens.jobs.train import train_manifest
    from layerlens.pipeline import run_config

    started, kept = time.perf_counter(), weights.is_file()
    pretrained(weights)
    seconds = None if kept else round(time.perf_counter() - started)
    shapes = mean_average_precision(weights, SHAPES, draw_scenes(HELD_OUT, 2))
    data = write_dataset(folder / "plates", draw_plates(PLATES, TRAINING_SEED))
    config = RunConfig.model_validate({
        "model": {"name_or_path": f"ultralytics:{weights.resolve()}", "task": "object-detection"},
        "data": {"source": str(data), "calibration_samples": 64, "batch_size": 16},
        "optimization": {"max_trainable_params": budget, "methods": ["lora"]},
        "training": {"epochs": epochs, "batch_size": 16, "learning_rate": rate, "eval_samples": 60},
        "runtime": {"threads": 1, "cache_dir": str(folder / "cache")},
    })  # fmt: skip
    started = time.perf_counter()
    chosen = run_config(config, base_dir=folder)
    chosen_s = time.perf_counter() - started
    done = train_manifest(folder / "out/manifest.json", config, base_dir=folder, output=folder / "tuned")
    trained_s = time.perf_counter() - started - chosen_s
    tuned = adapted_detector(load_detector(weights, image_size=SIZE), folder / "tuned", merge=True)
    merged = save_checkpoint(tuned.module, folder / "tuned.pt", SIZE)
    return {
        "detector": "YOLO11n (ultralytics' description), trained on drawn shapes",
        "shapes": {"classes": list(SHAPES), "images": PRETRAINING, "epochs": PRETRAINING_EPOCHS,
                   "seconds": seconds, **_rounded(shapes)},
        "plates": {"classes": list(CLASSES), "images": PLATES, "held_out": HELD_OUT},
        "trainable_params": chosen.manifest.trainable_params,
        "head_params": done.training.trained_parameters - chosen.manifest.trainable_params,
        "epochs": epochs,
        "learning_rate": rate,
        "before": _rounded(done.before),
        "own_test_split": _rounded(done.after),
        "held_out": _rounded(mean_average_precision(merged, CLASSES, draw_plates(HELD_OUT, HELD_OUT_SEED))),
        "seconds": {"run": round(chosen_s), "train": round(trained_s)},
        "machine": f"{platform.machine()}, 1 thread, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in ("torch", "peft", "ultralytics-opencv-headless", "numpy")},
    }  # fmt: skip


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in figures.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", type=Path, help="of the detector; trained here and kept where there is no such file"
    )
    parser.add_argument("--budget", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = given.weights or folder / "shapes.pt"
        found = measure(weights, folder, budget=given.budget, epochs=given.epochs, rate=given.rate)
    text = json.dumps(found, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")
    if found["held_out"]["map50"] < 0.9:
        raise SystemExit("mAP50 stays below 0.9")


if __name__ == "__main__":
    main()
