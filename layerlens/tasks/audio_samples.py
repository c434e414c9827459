"""What tasks on sound share: which rows have clips, and clips as inputs of the model, read batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.class_folders import some
from layerlens.data.dataset import Dataset
from layerlens.data.sounds import StoredSound, is_sound, told_of_rates
from layerlens.data.table import SOUNDS, Table
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.audio_input import AudioInput
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import LENGTH, Features, Inputs
from layerlens.tasks.encoded import Encoded

CLIP, MOST = "clip", "most"
"""Under these names an encoded sample has its clip, and how many samples of it are taken."""


def has_sounds(table: Table, config: DataConfig) -> bool:
    """Whether the rows have a column of clips: encoded, names of files of sound, or samples with their rate."""
    column = table.named(config.audio_column, SOUNDS)
    return column is not None and any(is_sound(value) for value in table.peek(column) if value is not None)


def sound_column(table: Table, config: DataConfig) -> str:
    """What a claim calls the column of clips."""
    return f"audio clips in column {table.named(config.audio_column, SOUNDS)!r}"


def way_in(pretrained: PretrainedModel, task: str) -> AudioInput:
    """How clips become inputs of the model.

    Raises:
        ConfigurationError: nobody says.
    """
    if pretrained.audio is None:
        raise ConfigurationError(
            f"model.factory: {task} needs a way to turn sound into the model's inputs; return (model, feature "
            "extractor or processor of transformers), or (model, transform) from the factory, with transform: list of "
            "arrays of samples at 16,000 Hz -> tensor [batch, ...]"
        )
    return pretrained.audio


def with_sounds(
    pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, task: str, labels: Sequence[Any], *, cut: bool
) -> Encoded:
    """Clips that are still encoded, with their labels; those that the model cannot take are left out.

    Args:
        pretrained: says which rate and how long clips must be.
        dataset: has the clips.
        config: how long they may be.
        task: its name, for messages.
        labels: of each clip; None for one that is left out already.
        cut: whether of a longer clip the beginning is taken; else it is left out.
    """
    audio = way_in(pretrained, task)
    rate, seconds = audio.rate, min(config.max_seconds, audio.longest)
    longest = round(seconds * rate)
    limit = "data.max_seconds" if seconds == config.max_seconds else "what the model sees of one"
    shortest = audio.shortest(pretrained.model)
    found = Encoded(len(dataset), config.max_length)
    headers = [clip.header() for clip in dataset.columns["audio"]]
    found.said |= dict.fromkeys(told_of_rates(headers, rate))
    short = f"shorter than the {1000 * shortest / rate:g} ms that the model's first layers need"
    long = f"longer than {limit} ({seconds:g} s)"
    left_out: dict[str, list[str]] = {}
    n_cut = 0
    for clip, header, label in zip(dataset.columns["audio"], headers, labels, strict=True):
        length = header.samples_at(rate)
        if length < shortest or (length > longest and not cut):
            left_out.setdefault(short if length < shortest else long, []).append(clip.name)
            continue
        n_cut += length > longest
        found.append({CLIP: clip, MOST: longest, LENGTH: min(length, longest), "labels": label})
    leave_out(found, left_out)
    if n_cut:
        found.said[
            f"{n_cut} of {len(dataset)} clips are longer than {limit} ({seconds:g} s); the model sees their beginning"
        ] = None
    return found


def leave_out(found: Encoded, names: Mapping[str, Sequence[str]]) -> None:
    """Note samples that cannot be used: what their clips are -> the names of these."""
    for reason, of_reason in names.items():
        found.left_out[f"{some(of_reason)} {'is' if len(of_reason) == 1 else 'are'} {reason}"] += len(of_reason)


def sound_inputs(pretrained: PretrainedModel, rows: Sequence[Features]) -> Inputs:
    """The clips of some samples as inputs of the model."""
    audio = pretrained.audio
    assert audio is not None
    clips: list[StoredSound] = [row[CLIP] for row in rows]
    read = [clip.read(audio.rate, row[MOST]) for clip, row in zip(clips, rows, strict=True)]
    return audio.inputs(pretrained.model, read)
