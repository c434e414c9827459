"""X-ray-like greyscale plates with planted findings, drawn from a seed: pictures for detectors without a download.

A plate shows soft tissue with ribs on a dark ground, and none to three findings of three kinds: bright round nodules,
fractures (a dark jagged line across a bone) and devices (a bright case with a battery in it). Bones without a fracture
and vessels are there too, so that brightness alone does not give a finding away. They are made for testing software
and have no medical meaning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from layerlens.models import LabelledImage

CLASSES = ("nodule", "fracture", "device")
SIZE = 128
"""Width and height of a plate, in pixels."""
_SCALE = 3  # drawn larger and scaled down: smooth edges
_MOST_FINDINGS = 3


def draw_plates(count: int, seed: int, *, empty_share: float = 0.1) -> list[LabelledImage]:
    """``count`` plates of SIZE x SIZE pixels, with indices into CLASSES as labels.

    The same seed gives the same pixels, and plate i does not depend on ``count``.

    Args:
        count: how many.
        seed: starts the random numbers.
        empty_share: share of plates without a finding.
    """
    return [_draw_plate(np.random.default_rng((seed, index)), empty_share) for index in range(count)]


def write_dataset(folder: Path, plates: Sequence[LabelledImage]) -> Path:
    """Write ``plates`` as a data set in YOLO's layout below ``folder`` and return its YAML file."""
    for part in ("images/train", "labels/train"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index, plate in enumerate(plates):
        Image.fromarray(plate.pixels).save(folder / f"images/train/{index:04}.png")
        lines = (
            f"{label} {(x1 + x2) / 2 / SIZE} {(y1 + y2) / 2 / SIZE} {(x2 - x1) / SIZE} {(y2 - y1) / SIZE}\n"
            for label, (x1, y1, x2, y2) in zip(plate.labels, plate.boxes, strict=True)
        )
        (folder / f"labels/train/{index:04}.txt").write_text("".join(lines), encoding="utf-8")
    described = {"path": ".", "train": "images/train", "names": list(CLASSES)}
    (folder / "data.yaml").write_text(json.dumps(described), encoding="utf-8")  # JSON is YAML
    return folder / "data.yaml"


def _draw_plate(random: np.random.Generator, empty_share: float) -> LabelledImage:
    side = SIZE * _SCALE
    canvas = _background(random, side)
    labels: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    wanted = 0 if random.random() < empty_share else int(random.integers(1, _MOST_FINDINGS + 1))
    for _ in range(wanted):
        label = int(random.integers(len(CLASSES)))
        size = _size(random, label)
        place = _free_place(random, size, boxes)
        if place is None:
            continue
        _PAINTERS[label](canvas, random, place, size)
        labels.append(label)
        boxes.append((place[0] - size[0] / 2, place[1] - size[1] / 2, place[0] + size[0] / 2, place[1] + size[1] / 2))
    picture = canvas.filter(ImageFilter.GaussianBlur(0.6 * _SCALE)).resize((SIZE, SIZE), Image.Resampling.BOX)
    noisy = np.asarray(picture, dtype=np.float64) + random.normal(0.0, 4.0, (SIZE, SIZE))
    return LabelledImage(np.clip(noisy, 0, 255).astype(np.uint8), tuple(labels), tuple(boxes))


def _background(random: np.random.Generator, side: int) -> Image.Image:
    coarse = Image.fromarray(random.uniform(30, 90, (5, 5)).astype(np.uint8))
    canvas = coarse.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for rib in range(4):  # arcs of ribs, fainter than any finding
        top = side * (0.08 + 0.26 * rib + random.uniform(-0.03, 0.03))
        box = (-0.2 * side, top, 1.2 * side, top + side * random.uniform(0.5, 0.7))
        draw.arc(box, 190, 350, fill=int(random.integers(85, 110)), width=int(side * 0.035))
    for _ in range(int(random.integers(0, 3))):  # whole bones and vessels
        ends = random.uniform(0, side, 4)
        draw.line(list(ends), fill=int(random.integers(95, 125)), width=int(side * random.uniform(0.02, 0.06)))
    return canvas.filter(ImageFilter.GaussianBlur(1.2 * _SCALE))


def _size(random: np.random.Generator, label: int) -> tuple[float, float]:
    """Width and height of a finding, in pixels of the plate."""
    if CLASSES[label] == "nodule":
        diameter = random.uniform(12, 24)
        return diameter, diameter * random.uniform(0.85, 1.15)
    if CLASSES[label] == "fracture":
        return random.uniform(20, 34), random.uniform(20, 34)
    return random.uniform(22, 34), random.uniform(16, 26)


def _free_place(random: np.random.Generator, size: tuple[float, float], boxes: list[Any]) -> tuple[float, float] | None:
    for _ in range(20):
        x = random.uniform(size[0] / 2 + 2, SIZE - size[0] / 2 - 2)
        y = random.uniform(size[1] / 2 + 2, SIZE - size[1] / 2 - 2)
        apart = all(
            x + size[0] / 2 + 4 < box[0] or x - size[0] / 2 - 4 > box[2]
            or y + size[1] / 2 + 4 < box[1] or y - size[1] / 2 - 4 > box[3]
            for box in boxes
        )  # fmt: skip
        if apart:
            return x, y
    return None


def _nodule(canvas: Image.Image, random: np.random.Generator, place: Any, size: Any) -> None:
    draw, bright = ImageDraw.Draw(canvas), int(random.integers(165, 225))
    draw.ellipse(_corners(place, size), fill=bright)


def _fracture(canvas: Image.Image, random: np.random.Generator, place: Any, size: Any) -> None:
    """A bone through the box from corner to corner, and a dark zigzag across its middle."""
    draw, bright = ImageDraw.Draw(canvas), int(random.integers(140, 180))
    left, top, right, bottom = _corners(place, size)
    falling = random.random() < 0.5
    start, end = ((left, top), (right, bottom)) if falling else ((left, bottom), (right, top))
    width = 0.42 * min(right - left, bottom - top)
    draw.line([start, end], fill=bright, width=int(width))
    across = np.array([-(end[1] - start[1]), end[0] - start[0]]) / np.hypot(end[0] - start[0], end[1] - start[1])
    along = np.array([end[0] - start[0], end[1] - start[1]]) / np.hypot(end[0] - start[0], end[1] - start[1])
    middle = np.array([left + right, top + bottom]) / 2
    points = [
        tuple(middle + across * step * width * 0.32 + along * jump * width * 0.14)
        for step, jump in zip(range(-2, 3), (-1, 1, -1, 1, -1), strict=True)
    ]
    draw.line(points, fill=15, width=int(2.6 * _SCALE), joint="curve")


def _device(canvas: Image.Image, random: np.random.Generator, place: Any, size: Any) -> None:
    draw, bright = ImageDraw.Draw(canvas), int(random.integers(225, 256))
    left, top, right, bottom = _corners(place, size)
    draw.rounded_rectangle((left, top, right, bottom), radius=3 * _SCALE, outline=bright, width=int(2.2 * _SCALE))
    inset = 0.28 * (right - left)
    draw.rectangle(
        (left + inset, top + 0.3 * (bottom - top), right - inset, bottom - 0.3 * (bottom - top)), fill=bright
    )


def _corners(place: tuple[float, float], size: tuple[float, float]) -> tuple[float, float, float, float]:
    x, y, width, height = place[0] * _SCALE, place[1] * _SCALE, size[0] * _SCALE / 2, size[1] * _SCALE / 2
    return x - width, y - height, x + width, y + height


_PAINTERS = (_nodule, _fracture, _device)
