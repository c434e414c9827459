"""Writing manifest.json and manifest.yaml: the same fields in the same order, and the same bytes for the same manifest.

Only ``created_at`` tells two runs apart. Floats are written by ``repr``, the shortest text that reads back as the same
double, so reading a manifest again loses nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from layerlens.exceptions import ManifestError
from layerlens.manifest.schema import check_document
from layerlens.models import Manifest
from layerlens.models.manifest import SCHEMA_VERSION, SECTIONS
from layerlens.utils.atomic import atomic_write_text


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper without anchors, whose text with odd line breaks reads back as it was."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Left alone, PyYAML writes these three as they are and reads them as an ordinary line break.
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_PlainDumper.add_representer(str, _PlainDumper.represent_str)


def write_manifest(manifest: Manifest, directory: Path, *, created_at: str) -> dict[str, Path]:
    """Write ``directory``/manifest.json and manifest.yaml, each atomically.

    Args:
        manifest: what to write.
        directory: created if it is not there.
        created_at: ISO 8601 time in UTC, such as ``2026-01-31T12:00:00Z``.

    Returns:
        The paths under "manifest_json" and "manifest_yaml".

    Raises:
        ManifestError: a field that could not be read back (NaN, a rank without a method, a layer twice ...).
        OutputError: the directory cannot be written.
    """
    document = to_document(manifest, created_at)
    directory = Path(directory)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # One line for each scalar, however long, so that line-based tools can find and compare fields.
    plain = yaml.dump(document, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=2**20)
    return {
        "manifest_json": atomic_write_text(directory / "manifest.json", text),
        "manifest_yaml": atomic_write_text(directory / "manifest.yaml", plain),
    }


def to_document(manifest: Manifest, created_at: str) -> dict[str, Any]:
    """The manifest as the plain, checked values of its file, in the file's order.

    Raises:
        ManifestError: see ``write_manifest``.
    """
    fields = _plain({"schema_version": SCHEMA_VERSION, "created_at": created_at, **manifest.fields()}, "")
    checked = check_document(fields, "manifest").model_dump(mode="json", exclude_unset=True)
    return checked | {name: {key: checked[name][key] for key in fields[name]} for name in SECTIONS}


def _plain(value: Any, place: str) -> Any:
    """NumPy scalars and arrays, tuples and paths as JSON values."""
    if isinstance(value, dict):
        return {str(key): _plain(part, f"{place}.{key}" if place else str(key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, f"{place}[{index}]") for index, part in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), place)
    if isinstance(value, Path):
        return value.as_posix()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ManifestError(f"manifest: {place}: {type(value).__name__} cannot be written; use numbers, text, lists, dicts")
