"""Audio classification: one class for each clip of sound, or several. A clip is read when its batch is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.sounds import has_sound_folder, sound_folder
from layerlens.data.table import Table
from layerlens.data.values import class_names
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.audio_samples import has_sounds, sound_column, sound_inputs, with_sounds
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.class_targets import (
    bits_of_classes,
    classes_loss,
    finish_with,
    label_columns,
    label_tensor,
    label_values,
    read_classes,
    record_class_targets,
)
from layerlens.tasks.metrics import TARGETS, Decode, Judged, Metrics, Record, finish_classes
from layerlens.tasks.task import Claim, Task

if TYPE_CHECKING:
    import torch

OF_SOUND = (
    "Wav2Vec2", "Hubert", "WavLM", "Data2VecAudio", "SEW", "SEWD", "UniSpeech", "UniSpeechSat", "Wav2Vec2Bert",
    "Wav2Vec2Conformer",
)  # fmt: skip
"""Models of sound whose classifiers transformers calls ``ForSequenceClassification``."""


def read(table: Table, config: DataConfig) -> Dataset:
    """Clips (paths or encoded bytes) and their classes."""
    labels, names = read_classes(table, label_columns(table, config))
    return Dataset({"audio": table.sounds(config)}, labels, names, table.place)


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Clips of sound (encoded, or names of files), and their classes."""
    if not has_sounds(table, config):
        return None
    labels = bits_of_classes(table, config) or [table.labelled(config) or "", *table.repeating(config)]
    label = next(filter(None, labels), None)
    return None if label is None else Claim(3, f"{sound_column(table, config)} and classes in {label!r}")


def read_folder(folder: Path, config: DataConfig) -> Dataset:
    """The clips below ``folder``; the sub-folder that a clip is in is its class."""
    clips, labels, reading = sound_folder(folder)
    names = class_names(labels)
    index = {name: position for position, name in enumerate(names)}
    return Dataset({"audio": clips}, tuple(index[label] for label in labels), names, folder.name, reading=reading)


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Clips that are still encoded, with their classes; of a longer clip the beginning."""
    return with_sounds(pretrained, dataset, config, TASK.name, label_values(dataset), cut=True)


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, torch.Tensor]:
    """Waves [b, samples] or spectrograms by the model's own argument; classes int64 [b], or float32 [b, classes]."""
    return sound_inputs(pretrained, rows), label_tensor(rows)


def record(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """Predicted and actual classes of each clip."""
    return record_class_targets(output, {**batch, "labels": batch[TARGETS]}, decode)


TASK = Task(
    name="audio-classification",
    description="one or several classes for each audio clip: a folder with a sub-folder for each class, or a table",
    inputs="audio",
    read=read,
    claim=claim,
    read_folder=read_folder,
    claims_folder=has_sound_folder,
    encode=encode,
    collate=collate,
    loss=classes_loss,
    metrics=Metrics(record, finish_with(finish_classes), ("f1_micro", "accuracy")),
    auto_class="AutoModelForAudioClassification",
    class_endings=tuple(f"{name}ForSequenceClassification" for name in OF_SOUND),
    new_head=True,
    classes=True,
    model_targets=(),
)
