"""What can be wrong with a file that LayerLens reads: one enum for each of its formats.

An error about a file has one of these as its ``fault``, beside its message, so that a program can tell them apart. The
formats are described in docs/formats.md. Files that only spare work (cache, journals, saved proxies) have none: what is
wrong with them is measured again.
"""

from __future__ import annotations

from enum import Enum


class ManifestFault(Enum):
    """Of manifest.json and manifest.yaml."""

    MISSING = "there is no such file, or it is a directory"
    UNREADABLE = "the system or the store does not give it"
    TOO_LARGE = "it is larger than any manifest"
    NOT_TEXT = "it is not UTF-8, or has half a character"
    SYNTAX = "it is not JSON or YAML, or uses what a manifest has no use for: aliases, a key twice, deep nesting"
    VERSION = "it has no schema_version that this LayerLens reads"
    FIELD = "a field is missing, unknown, or has a value that it cannot have; or fields contradict each other"


class StatisticsFault(Enum):
    """Of statistics.safetensors and of the cache's blobs."""

    MISSING = "there is no such file"
    UNREADABLE = "it is not a safetensors file, or it is cut short"
    FORMAT = "it is of another version, or of somebody else"
    HEADER = "a field of the header is missing, unknown, or of another type"
    CONTENT = "a tensor or a value is not as the header or arithmetic has it, or parts do not belong together"


class ModulesFault(Enum):
    """Of layerlens_modules.safetensors."""

    MISSING = "there is no such file"
    UNREADABLE = "it is not a safetensors file with a description of LayerLens, or it is cut short"
    DESCRIPTION = "its description is of another version, or damaged"
    FIT = "a module or tensor has no place in this model, or another shape"


class SweepFault(Enum):
    """Of tasks.jsonl."""

    MISSING = "there is no such file"
    DAMAGED = "a line is no task"


class DeviceFault(Enum):
    """Of device-*.json, the rates of this machine."""

    DAMAGED = "it is no device profile"


class StudyFault(Enum):
    """Of results.jsonl, the runs of an evaluation."""

    DAMAGED = "a line other than the last is no JSON object"


class CheckpointFault(Enum):
    """Of a training's checkpoints."""

    UNREADABLE = "a file of it is damaged or cut short"
    FIT = "a tensor has no place in this model"
    OTHER_JOB = "it is of another job"


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
