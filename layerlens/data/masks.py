"""Images with masks: a number for the class of every pixel, in folders beside each other or named by a table."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.data.class_folders import some
from layerlens.data.images import Check, StoredImage
from layerlens.data.pixels import looks_like_image, upright
from layerlens.data.rows import Reading
from layerlens.exceptions import DataError
from layerlens.utils.places import check_readable

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
MASK_FOLDERS = ("masks", "mask", "annotations", "annotation", "labels", "segmentationclass", "segmentation", "gt")
"""What the folders of images and of masks are called, in lower case."""
ENDINGS = re.compile(r"[-_](mask|gt|seg|label|labels)$")
UNLABELLED = 255
"""Value of pixels without a class, as in Pascal VOC and the models of transformers."""
INDEXED = ("P", "L", "1", "I", "I;16")
NO_CLASS = "has a mask without a class"


def mask_folders(root: Path) -> tuple[Path, Path] | None:
    """The folders of images and of masks below ``root``; None where it has not both."""
    found = {folder.name.lower(): folder for folder in sorted(root.iterdir()) if folder.is_dir()}
    images = next((found[name] for name in IMAGE_FOLDERS if name in found), None)
    masks = next((found[name] for name in MASK_FOLDERS if name in found), None)
    return None if images is None or masks is None else (images, masks)


def read_mask(mask: StoredImage, image: StoredImage) -> np.ndarray:
    """The classes of the pixels of the upright image, int64 [height, width].

    A mask has the size of the upright image, or that of the pixels as they are stored, and is then turned with them.

    Raises:
        DataError: as the end of a sentence that begins with its name: it has colours, or cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if mask.pixels is not None:
        pixels = np.asarray(mask.pixels)
    else:
        mask.header()  # refuses what is too large
        try:
            encoded: Any = mask.path if mask.data is None else io.BytesIO(mask.data)
            with Image.open(encoded) as opened:
                if opened.format == "JPEG":
                    raise DataError("is a JPEG, and JPEG compression changes class numbers; save it as a PNG")
                mode = opened.mode
                pixels = np.asarray(ImageOps.exif_transpose(opened))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise DataError(f"cannot be read as a mask ({error})") from error
        if mode not in INDEXED:
            if pixels.ndim != 3 or (pixels.shape[2] > 2 and np.ptp(pixels[:, :, :3], axis=2).any()):
                raise DataError(f"is a colour mask ({mode}); give one number for each pixel (PNG, L or P)")
            pixels = pixels[:, :, 0]  # grey, saved as a colour
    if pixels.ndim != 2:
        raise DataError(f"is a mask of the shape {list(pixels.shape)}; give one number for each pixel")
    header, size = image.header(), pixels.shape[::-1]
    if size != (header.width, header.height):
        if size != header.stored_size:
            raise DataError(f"has {size[0]} × {size[1]} pixels, and its image {header.width} × {header.height}")
        pixels = upright(pixels, header.orientation)
    return pixels.astype(np.int64)


def values_of(
    masks: Sequence[StoredImage | None], images: Sequence[StoredImage | None]
) -> tuple[list[tuple[int, ...]], list[str]]:
    """The classes that are in each mask, without the pixels that have none; and what the user should know.

    255 is no class, but where the masks have nothing but 0 and 255: there it is the foreground.
    """
    found = [
        set[int]() if mask is None or image is None else set(map(int, np.unique(read_mask(mask, image))))
        for mask, image in zip(masks, images, strict=True)
    ]
    numbers = sorted(set().union(*found))
    binary = numbers in ([0, UNLABELLED], [UNLABELLED])
    values = [tuple(sorted(one if binary else one - {UNLABELLED})) for one in found]
    notes = []
    if binary:
        notes.append(f"the masks have the numbers 0 and {UNLABELLED} only, so {UNLABELLED} is the second class")
    classes = [number for number in numbers if number != UNLABELLED]
    if not binary and classes and 2 * len(classes) <= classes[-1]:
        shown = ", ".join(map(str, classes[:6])) + (" ..." if len(classes) > 6 else "")
        notes.append(
            f"the masks have {len(classes)} of the classes 0 to {classes[-1]} ({shown}); if these are grey levels, "
            "number the classes from 0 on"
        )
    return values, notes


def masked_images(
    root: Path, max_pixels: int
) -> tuple[tuple[StoredImage, ...], tuple[StoredImage, ...], list[tuple[int, ...]], Reading]:
    """The images below ``root``, their masks, the classes in each mask, and what was not read.

    Raises:
        DataError: there are no two folders of images and masks, or no image has a mask.
    """
    folders = mask_folders(root)
    if folders is None:
        raise DataError(
            f"data.source: {root} has no folder of images ({', '.join(IMAGE_FOLDERS[:3])} ...) beside one of masks "
            f"({', '.join(MASK_FOLDERS[:3])} ...); a mask has the name of its image and one number for each pixel"
        )
    images, masks = (_by_stem(folder) for folder in folders)
    check = Check()
    kept: dict[int, tuple[StoredImage, StoredImage]] = {}
    left_out: dict[int, str] = {}
    names: dict[int, str] = {}
    for number, (stem, path) in enumerate(images.items(), 1):
        names[number] = path.relative_to(root).as_posix()
        if stem not in masks:
            left_out[number] = "has no mask"
            continue
        check_readable(path, root)
        check_readable(masks[stem], root)
        image, mask = (
            StoredImage(x.relative_to(root).as_posix(), x, max_pixels=max_pixels) for x in (path, masks[stem])
        )
        if fault := check.fault(image) or mask_fault(image, mask):
            left_out[number] = fault
        else:
            kept[number] = (image, mask)
    values, said = values_of([mask for _, mask in kept.values()], [image for image, _ in kept.values()])
    left_out |= {number: NO_CLASS for number, found in zip(kept, values, strict=True) if not found}
    kept = {number: pair for number, pair in kept.items() if number not in left_out}
    left_out = dict(sorted(left_out.items()))
    if not kept:
        why = f"the first {next(iter(left_out.values()))}" if left_out else "there are none"
        raise DataError(f"data.source: none of the {len(images)} images of {folders[0]} can be used: {why}")
    notes = [*check.notes, *said]
    if spare := [path.relative_to(root).as_posix() for stem, path in masks.items() if stem not in images]:
        notes.append(f"{len(spare)} masks without an image not read: {some(spare)}")
    reading = Reading(
        len(images), ("image", "mask"), left_out=left_out, names={n: names[n] for n in left_out}, notes=tuple(notes)
    )
    pairs = kept.values()
    return tuple(image for image, _ in pairs), tuple(mask for _, mask in pairs), [v for v in values if v], reading


def mask_fault(image: StoredImage, mask: StoredImage) -> str:
    """Why a mask cannot be used for its image, as the end of a sentence; "" where it can."""
    try:
        read_mask(mask, image)
    except DataError as error:
        return f"has a mask that {error}" if str(error).startswith(("is", "cannot", "has")) else str(error)
    return ""


def _by_stem(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and looks_like_image(path))
    return {ENDINGS.sub("", path.relative_to(folder).with_suffix("").as_posix()): path for path in paths}
