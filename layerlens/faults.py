"""What can be wrong with a file that LayerLens reads: one enum for each file format.

An error about a file has one of these members as its ``fault``, so that a program can tell the errors apart.
docs/formats.md describes the formats. Files that only save work (cache, journals, saved proxies) have no faults: if
such a file is damaged, LayerLens measures again.
"""

from __future__ import annotations

from enum import Enum


class ManifestFault(Enum):
    """Of manifest.json and manifest.yaml."""

    MISSING = "there is no such file, or it is a directory"
    UNREADABLE = "the system or the store cannot read it"
    TOO_LARGE = "it is larger than any manifest"
    NOT_TEXT = "it is not UTF-8, or it contains an incomplete character"
    SYNTAX = (
        "it is not JSON or YAML, or it uses features that manifests do not allow: aliases, duplicate keys, deep nesting"
    )
    VERSION = "it has no schema_version that this LayerLens reads"
    FIELD = "a field is missing, unknown or has an invalid value; or fields contradict each other"


class StatisticsFault(Enum):
    """Of statistics.safetensors and of the cache's blobs."""

    MISSING = "there is no such file"
    UNREADABLE = "it is not a safetensors file, or it is cut short"
    FORMAT = "it has another version, or comes from another program"
    HEADER = "a field of the header is missing, unknown, or of another type"
    CONTENT = "a tensor or value contradicts the header or the arithmetic, or parts do not belong together"


class ModulesFault(Enum):
    """Of layerlens_modules.safetensors."""

    MISSING = "there is no such file"
    UNREADABLE = "it is not a safetensors file with a description of LayerLens, or it is cut short"
    DESCRIPTION = "its description has another version, or is damaged"
    FIT = "a module or tensor has no place in this model, or another shape"


class SweepFault(Enum):
    """Of tasks.jsonl."""

    MISSING = "there is no such file"
    DAMAGED = "a line is not a task"


class DeviceFault(Enum):
    """Of device-*.json, the rates of this machine."""

    DAMAGED = "it is not a device profile"


class StudyFault(Enum):
    """Of results.jsonl, the runs of an evaluation."""

    DAMAGED = "a line other than the last is not a JSON object"


class CheckpointFault(Enum):
    """Of a training's checkpoints."""

    UNREADABLE = "a file of it is damaged or cut short"
    FIT = "a tensor has no place in this model"
    OTHER_JOB = "it belongs to another job"


FORMATS: dict[str, type[Enum]] = {
    "manifest.json, manifest.yaml": ManifestFault,
    "statistics.safetensors": StatisticsFault,
    "layerlens_modules.safetensors": ModulesFault,
    "tasks.jsonl": SweepFault,
    "device-*.json": DeviceFault,
    "results.jsonl": StudyFault,
    "checkpoints": CheckpointFault,
}
"""The enum of every format whose faults are errors."""
