"""Images with their captions, for CLIP, SigLIP and their kin: in a batch each caption is a negative for other images.

The loss compares the samples of a batch, so what is measured is measured batch by batch. It is the one that the model
itself computes with ``return_loss``, which adds nothing to its output in the other passes: softmax over both sides
(Radford et al. 2021, CLIP), or a sigmoid for each pair (Zhai et al. 2023, SigLIP).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import IMAGES, Table
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import ImageInput, PretrainedModel
from layerlens.integrations.torch_modules import precision_of
from layerlens.integrations.transformers import text_config
from layerlens.tasks.batches import Batch, Features, Inputs
from layerlens.tasks.encoded import Encoded
from layerlens.tasks.image_classification import has_images
from layerlens.tasks.metrics import TARGETS, Decode, Judged, Metrics, Record, as_numpy, mean_loss
from layerlens.tasks.task import Claim, Task

if TYPE_CHECKING:
    import torch

CAPTIONS = ("caption", "text", "sentence", "alt_text", "alt", "description", "title", "prompt")
"""Columns that captions usually stand in."""
KINDS = ("CLIP", "Siglip", "Siglip2", "AltCLIP", "ChineseCLIP", "MetaClip2", "Align")
SIGMOID, SMOOTHED, SMOOTHING = "Siglip", "Align", 0.1
"""Models with a sigmoid for each pair, and those whose softmax is smoothed, by how their outputs' names begin."""
TO_THE_END = ("siglip", "siglip2")
"""Types that were trained on captions padded to the longest that they take, without a mask."""
CUTOFFS = (1, 5, 10)
"""Places of a ranking that are judged."""


def read(table: Table, config: DataConfig) -> Dataset:
    """Images (paths or encoded bytes) and their captions."""
    column = table.find(config.text_column or config.label_column, "text_column", CAPTIONS)
    columns = {"image": table.images(config), "text": table.texts(column)}
    return Dataset(columns, (None,) * len(table.rows), (), table.place)


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Images with texts that do not repeat as classes do."""
    column = table.named(config.text_column or config.label_column, CAPTIONS)
    if column is None or not has_images(table, config):
        return None
    values = [value for value in table.peek(column) if value is not None]
    if not values or not all(isinstance(value, str) for value in values):
        return None
    return Claim(2, f"images in column {table.named(config.image_column, IMAGES)!r} and captions in {column!r}")


@dataclass(frozen=True)
class PairTargets:
    """Which images and captions of a batch are the same.

    Args:
        images, texts: int64 [b], a number for each content.
    """

    images: torch.Tensor
    texts: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def each_tensor(self, change: Callable[[torch.Tensor], torch.Tensor], order: Any = None) -> PairTargets:
        """The same with every tensor changed."""
        return replace(self, images=change(self.images), texts=change(self.texts))


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Images that are still encoded, with the tokens of their captions, cut to what the model takes.

    Raises:
        ConfigurationError: there is no tokenizer, or no image processor.
    """
    tokenizer = pretrained.tokenizer
    if tokenizer is None or _images(pretrained) is None:
        lacking = "tokenizer" if tokenizer is None else "image processor"
        raise ConfigurationError(
            f"model.name_or_path: image-text-pairs needs a tokenizer and an image processor; there is no {lacking}; "
            "save the processor of the model beside its weights (of a factory, return (model, processor))"
        )
    longest = min(config.max_length, _positions(pretrained) or config.max_length)
    texts = dataset.columns["text"]
    found = Encoded(len(dataset), longest)
    whole = tokenizer(list(texts), verbose=False)["input_ids"]
    found.truncated = sum(len(ids) > longest for ids in whole)
    cut = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
    for image, text, ids in zip(dataset.columns["image"], texts, cut, strict=True):
        found.append({"input_ids": ids, "image": image, "images": _number(image.identity), "texts": _number(text),
                      "labels": None})  # fmt: skip
    for name, what in (("images", "images have several captions"), ("texts", "captions belong to several images")):
        n = sum(count > 1 for count in Counter(one[name] for one in found).values())
        if n:
            found.said[f"{n} {what}: in one batch they would be negatives of each other"] = None
    return found


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Token ids [b, t], their mask where the model has one, what the image processor makes, and ``PairTargets``."""
    import torch

    config: Any = getattr(pretrained.model, "config", None)
    longest, positions = max(len(row["input_ids"]) for row in rows), _positions(pretrained)
    width = _width(config, longest, positions)
    padded = pretrained.tokenizer.pad(
        {"input_ids": [row["input_ids"] for row in rows]}, padding="max_length", max_length=width, return_tensors="pt"
    )
    inputs: Inputs = {"input_ids": padded["input_ids"]}
    if getattr(config, "model_type", "") not in TO_THE_END:
        inputs["attention_mask"] = padded["attention_mask"]
    images = _images(pretrained)
    assert images is not None
    if images.processor is None:
        inputs |= images.inputs(pretrained.model, [row["image"] for row in rows])
    else:
        dtype = precision_of(pretrained.model)
        made = images.processor([row["image"].open(images.mode) for row in rows], return_tensors="pt")
        inputs |= {name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()}
    return inputs, PairTargets(
        torch.tensor([row["images"] for row in rows]), torch.tensor([row["texts"] for row in rows])
    )


def _images(pretrained: PretrainedModel) -> ImageInput | None:
    """The way from images to pixels: the model's own, or that of its whole processor."""
    processor = getattr(pretrained.processor, "image_processor", None)
    if pretrained.images is not None or processor is None:
        return pretrained.images
    return ImageInput(lambda images: processor(list(images), return_tensors="pt")["pixel_values"], processor=processor)


def _positions(pretrained: PretrainedModel) -> int | None:
    """Tokens of the longest caption that the model takes; None where it does not say."""
    found = getattr(text_config(pretrained.model), "max_position_embeddings", None)
    return None if found is None else int(found)


def _width(config: Any, longest: int, positions: int | None) -> int:
    """Tokens that captions of a batch are padded to: never as many as there are patches, whose mask they have not."""
    if getattr(config, "model_type", "") in TO_THE_END and positions is not None:
        return positions
    vision = getattr(config, "vision_config", None)
    side = (getattr(vision, "image_size", None) or 0) // (getattr(vision, "patch_size", None) or 1)
    width = longest
    while width in (side**2, side**2 + 1):
        width += 1
    return width if positions is None else min(width, positions)


def _number(identity: str) -> int:
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:7], "big")


def loss(output: Any, batch: Batch) -> torch.Tensor:
    """The model's own loss by parts, [b]; their mean is what it returns.

    Raises:
        ConfigurationError: the model compares no images with texts.
    """
    import torch

    if not hasattr(output, "logits_per_text"):
        raise ConfigurationError(
            f"model.task: image-text-pairs needs models that compare images with texts ({', '.join(KINDS)}); what this "
            f"one returned ({type(output).__name__}) has no logits_per_text"
        )
    logits__ti = output.logits_per_text
    own = torch.arange(len(logits__ti), device=logits__ti.device)
    if type(output).__name__.startswith(SIGMOID):
        signs = 2.0 * torch.nn.functional.one_hot(own, len(own)).to(logits__ti.dtype) - 1.0
        return -torch.nn.functional.logsigmoid(signs * logits__ti).sum(dim=1)
    smoothing = SMOOTHING if type(output).__name__.startswith(SMOOTHED) else 0.0
    sides = [
        torch.nn.functional.cross_entropy(one, own, reduction="none", label_smoothing=smoothing)
        for one in (logits__ti, logits__ti.T)
    ]
    return torch.stack(sides).mean(dim=0)


def record(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """The embeddings of both sides, and which of them are of the same content."""
    targets: Any = batch[TARGETS]
    return {
        **mean_loss(output, len(targets)),
        "images": as_numpy(output.output.image_embeds), "texts": as_numpy(output.output.text_embeds),
        "image_numbers": as_numpy(targets.images), "text_numbers": as_numpy(targets.texts),
    }  # fmt: skip


def finish(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Recall at 1, 5 and 10 among all images and captions: how often one that belongs to it is among the first."""
    images, texts, image_numbers, text_numbers = (
        np.concatenate([record[key] for record in records])
        for key in ("images", "texts", "image_numbers", "text_numbers")
    )
    images, texts = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12) for one in (images, texts))
    pairs = set(zip(image_numbers.tolist(), text_numbers.tolist(), strict=True))
    of_text = _ranks(texts, text_numbers, images, image_numbers, {(text, image) for image, text in pairs})
    of_image = _ranks(images, image_numbers, texts, text_numbers, pairs)
    found = {}
    for cutoff in CUTOFFS:
        sides = [float((ranks < cutoff).mean()) for ranks in (of_text, of_image)]
        found[f"recall_at_{cutoff}"] = float(np.mean(sides))
        found |= {f"text_to_image_recall_at_{cutoff}": sides[0], f"image_to_text_recall_at_{cutoff}": sides[1]}
    return found


def _ranks(
    queries: np.ndarray, own: np.ndarray, found: np.ndarray, numbers: np.ndarray, pairs: set[tuple[int, int]]
) -> np.ndarray:
    """For each query how many contents are nearer than the nearest that belongs to it; each content counts once."""
    different, first = np.unique(numbers, return_index=True)
    scores = queries @ found[first].T
    right = np.array([[(query, other) in pairs for other in different.tolist()] for query in own.tolist()])
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    ranks: np.ndarray = (scores > best).sum(axis=1)
    return ranks


TASK = Task(
    name="image-text-pairs",
    description="images with captions for CLIP, SigLIP and related models, with their own contrastive loss; evaluated "
    "by how often the right image or caption ranks first in the test split",
    inputs="image",
    read=read,
    claim=claim,
    encode=encode,
    collate=collate,
    loss=loss,
    metrics=Metrics(record, finish, ("recall_at_1",)),
    auto_class="AutoModel",
    class_endings=tuple(f"{name}Model" for name in KINDS),
    tokens=True,
    model_targets=(),
    coupled=True,
    no_study="the loss of a pair depends on the others in its batch",
)
