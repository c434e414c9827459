"""Training a small detector with ultralytics' own detection loss, and its mean average precision by its validator."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.integrations.ultralytics import import_ultralytics
from layerlens.models import LabelledImage
from layerlens.utils.atomic import atomic_write_bytes
from layerlens.utils.progress import Progress, silent

_LARGEST_GRADIENT = 10.0
_AVERAGED_STEPS = 100
"""The averaged weights that are kept reach back over about so many steps."""


def train_detector(
    architecture: dict[str, Any],
    names: Sequence[str],
    samples: Sequence[LabelledImage],
    path: Path,
    *,
    epochs: int,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    seed: int = 0,
    progress: Progress = silent,
) -> Path:
    """Train a detector from random weights on square images of one size; same arguments, same weights on one machine.

    AdamW with one cycle of the learning rate, random flips, exponentially averaged weights.

    Args:
        architecture: ultralytics' model description (``nc``, ``backbone``, ``head``).
        names: the classes.
        samples: training images, all of one square size.
        path: where the checkpoint goes, atomically; ``YOLO(path)`` loads it.
        epochs, batch_size, learning_rate, seed: of the training.
        progress: called after every step.
    """
    import_ultralytics()
    import torch
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    side = samples[0].pixels.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = DetectionModel(copy.deepcopy(architecture), ch=3, nc=len(names), verbose=False)
    model.args = get_cfg()
    averaged = copy.deepcopy(model).eval()
    steps = epochs * (len(samples) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.15)
    random = np.random.default_rng(seed)
    model.train()
    with progress.stage("Training the detector", total=steps) as advance:
        for step in range(steps):
            place = step % (len(samples) // batch_size)
            if place == 0:
                order = random.permutation(len(samples))
            chosen = [samples[index] for index in order[place * batch_size : (place + 1) * batch_size]]
            loss, _ = model.loss(detection_batch(chosen, random))
            optimizer.zero_grad()
            loss.sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            _average(averaged, model, min(1 - 1 / _AVERAGED_STEPS, (1 + step) / (10 + step)))
            advance(1)
    averaged.names = dict(enumerate(names))
    return save_checkpoint(averaged, path, side)


def detection_batch(samples: Sequence[LabelledImage], random: np.random.Generator | None = None) -> dict[str, Any]:
    """The batch that ultralytics' loss reads.

    Args:
        samples: n images of one size.
        random: flips images at random when given.

    Returns:
        ``img`` float32 [n, 3, height, width] in 0 to 1; for each of m objects ``batch_idx`` [m], ``cls`` [m, 1] and
        ``bboxes`` [m, 4] as centre x, centre y, width, height in shares of the image.
    """
    import torch

    images, classes, boxes, owners = [], [], [], []
    for index, sample in enumerate(samples):
        pixels = sample.pixels if sample.pixels.ndim == 3 else np.repeat(sample.pixels[:, :, None], 3, axis=2)
        height, width = pixels.shape[:2]
        flip_x, flip_y = (random.random(2) < 0.5) if random is not None else (False, False)
        pixels = pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
        images.append(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        for label, (x1, y1, x2, y2) in zip(sample.labels, sample.boxes, strict=True):
            x, y = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
            classes.append([float(label)])
            boxes.append([1 - x if flip_x else x, 1 - y if flip_y else y, (x2 - x1) / width, (y2 - y1) / height])
            owners.append(float(index))
    return {
        "img": torch.from_numpy(np.stack(images)).float() / 255.0,
        "cls": torch.tensor(classes).reshape(-1, 1),
        "bboxes": torch.tensor(boxes).reshape(-1, 4),
        "batch_idx": torch.tensor(owners),
    }


def mean_average_precision(weights: Path, names: Sequence[str], samples: Sequence[LabelledImage]) -> dict[str, float]:
    """mAP of a checkpoint on ``samples``, by ultralytics' validator.

    Returns:
        ``map50`` (at an intersection over union of 0.5) and ``map50_95`` (mean over 0.5 to 0.95), from 0 to 1.
    """
    import_ultralytics()
    from PIL import Image
    from ultralytics import YOLO

    with tempfile.TemporaryDirectory(prefix="layerlens-validation-") as name:
        root = Path(name)
        for folder in ("images", "labels"):
            (root / folder).mkdir()
        for index, sample in enumerate(samples):
            height, width = sample.pixels.shape[:2]
            Image.fromarray(sample.pixels).save(root / "images" / f"{index:05}.png")
            lines = [
                f"{label} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} {(x2 - x1) / width} {(y2 - y1) / height}\n"
                for label, (x1, y1, x2, y2) in zip(sample.labels, sample.boxes, strict=True)
            ]
            (root / "labels" / f"{index:05}.txt").write_text("".join(lines), encoding="utf-8")
        described = "".join(f"  {index}: {label}\n" for index, label in enumerate(names))
        (root / "data.yaml").write_text(
            f"path: {root}\ntrain: images\nval: images\nnames:\n{described}", encoding="utf-8"
        )
        done = YOLO(str(weights), verbose=False).val(
            data=str(root / "data.yaml"), imgsz=samples[0].pixels.shape[0], batch=16, workers=0, plots=False,
            verbose=False, device="cpu", project=str(root / "runs"),
        )  # fmt: skip
    return {"map50": float(done.box.map50), "map50_95": float(done.box.map)}


def _average(averaged: Any, model: Any, keep: float) -> None:
    import torch

    with torch.no_grad():
        for mean, new in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
            if mean.dtype.is_floating_point:
                mean.mul_(keep).add_(new, alpha=1.0 - keep)
            else:
                mean.copy_(new)


def save_checkpoint(model: Any, path: Path, image_size: int) -> Path:
    """Write a detection model, adapters merged before, so that ``YOLO(path)`` loads it.

    Args:
        model: ultralytics' DetectionModel.
        path: where it goes, atomically.
        image_size: side of the images it was trained with.
    """
    import torch

    base = copy.deepcopy(model)
    for attribute in ("criterion", "layerlens_criterion"):  # they hold tensors that belong to training
        base.__dict__.pop(attribute, None)
        base._modules.pop(attribute, None)
    buffer = io.BytesIO()
    torch.save({"epoch": -1, "model": base, "train_args": {"imgsz": image_size, "task": "detect"}}, buffer)
    return atomic_write_bytes(path, buffer.getvalue())
