"""The image with its boxes and labels drawn on it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from layerlens.models import Detection

# Bright hues that stay apart for people who see red and green alike (after Okabe and Ito), on dark and light images.
COLOURS = ("#56B4E9", "#E69F00", "#00C08B", "#F0E442", "#FF7F50", "#CC79A7", "#3D8BFF")
SMALLEST = 480
"""Smaller images are enlarged by a whole number, so that labels can be read."""


def annotate(image: Image.Image, detections: Sequence[Detection], names: Sequence[str]) -> Image.Image:
    """``image`` in RGB with every box, its label and its confidence.

    Args:
        image: as loaded.
        detections: boxes in its pixels.
        names: all classes of the detector; the place of a name decides its colour.
    """
    scale = max(1, -(-SMALLEST // max(image.size)))
    shown = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(shown)
    unit = max(shown.size)
    width, font = max(2, unit // 320), ImageFont.load_default(size=max(12, unit // 36))
    for detection in reversed(detections):  # the best on top
        colour = COLOURS[names.index(detection.label) % len(COLOURS)] if detection.label in names else COLOURS[0]
        box = [scale * value for value in detection.box]
        draw.rectangle(box, outline=colour, width=width)
        text = f"{detection.label} {detection.confidence:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        high, wide = bottom - top + 6, right - left + 8
        y = box[1] - high if box[1] >= high else min(box[3], shown.height - high)
        x = max(0, min(box[0], shown.width - wide))
        draw.rectangle((x, y, x + wide, y + high), fill=colour)
        draw.text((x + 4 - left, y + 3 - top), text, fill="black", font=font)
    return shown
