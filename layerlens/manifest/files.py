"""The manifest on disk, manifest.json and manifest.yaml: the same fields in the same order, read as from a stranger.

Only ``created_at`` tells two runs apart. Floats are written by ``repr``, the shortest text that reads back as the same
double, so reading a manifest again loses nothing. What is read has a largest size, no aliases, and checked fields.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from layerlens.exceptions import ManifestError
from layerlens.faults import ManifestFault
from layerlens.manifest.schema import check_document
from layerlens.models import CalibrationSummary, Manifest, ManifestRow, ResourceUse, Saving
from layerlens.models.manifest import SCHEMA_VERSION, SECTIONS
from layerlens.storage import local_or_url, read_bytes, shown
from layerlens.utils.atomic import atomic_write_text, settle

MAX_BYTES = 64 * 2**20
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")

_YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_manifest(path: Path) -> Manifest:
    """The manifest in ``path``, a file or a URL: JSON if it ends in .json, YAML if it ends in .yaml or .yml.

    Raises:
        StorageError: there is nothing at the URL, or it does not match its checksum.
        ManifestError: the file is missing, too large, not JSON or YAML, or a field is wrong; the message names each
            wrong field.
    """
    return read_document(path)[0]


def read_document(path: Path) -> tuple[Manifest, str]:
    """The manifest in ``path`` and the time at which it was written (``created_at``).

    Raises:
        ManifestError: see ``read_manifest``.
    """
    path = Path(path)
    raw = _parse(path, _text(path))
    document = check_document(raw, shown(path))
    fields = document.model_dump(exclude={"schema_version", "created_at"}, exclude_unset=True)
    fields["allocations"] = tuple(ManifestRow(**row) for row in fields["allocations"])
    fields["resources"] = tuple(ResourceUse(**row) for row in fields["resources"])
    if calibration := fields["predicted"].get("calibration"):
        fields["predicted"]["calibration"] = CalibrationSummary(**calibration)
    if saving := fields["predicted"].get("cheapest"):
        fields["predicted"]["cheapest"] = Saving(**saving)
    for name, kind in SECTIONS.items():
        fields[name] = kind.of(fields[name], order=tuple(raw[name]))
    fields["checkpointed"] = tuple(fields.get("checkpointed", ()))
    return Manifest(**fields), document.created_at


def _text(path: Path) -> str:
    try:
        path, url = local_or_url(path)
        if url is not None:
            content = read_bytes(url, MAX_BYTES)
        else:
            settle(path.parent)
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except IsADirectoryError as error:
        raise ManifestError(f"{path} is a directory; give the manifest.json in it").of(ManifestFault.MISSING) from error
    except FileNotFoundError as error:
        raise ManifestError(
            f"{path}: no such file or directory; give a manifest, or the directory that `layerlens run` wrote"
        ).of(ManifestFault.MISSING) from error
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror or error}").of(
            ManifestFault.UNREADABLE
        ) from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{shown(path)}: not UTF-8 text (byte {error.start})").of(ManifestFault.NOT_TEXT) from error
    if len(content) > MAX_BYTES:
        raise ManifestError(f"{shown(path)}: larger than {MAX_BYTES // 2**20} MiB; this is not a manifest").of(
            ManifestFault.TOO_LARGE
        )
    return text


def _parse(path: Path, text: str) -> Any:
    try:
        if path.suffix == ".json":
            document = json.loads(text, object_pairs_hook=_each_key_once)
            if _HALF_CHARACTER.search(text):  # pairs of them are one character, and pass
                json.dumps(document, ensure_ascii=False).encode()
            return document
        if path.suffix in (".yaml", ".yml"):
            # A few nested aliases can stand for billions of values; manifests have no use for them.
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_YamlLoader)):
                raise ValueError("YAML aliases (*name) are not allowed in a manifest")
            return yaml.load(text, Loader=_YamlLoader)
    except UnicodeEncodeError as error:
        around = error.object[max(0, error.start - 40) : error.end + 10]
        raise ManifestError(f"{shown(path)}: has half a character (a lone surrogate): {around!a}").of(
            ManifestFault.NOT_TEXT
        ) from error
    except json.JSONDecodeError as error:
        raise ManifestError(f"{shown(path)}:{error.lineno}:{error.colno}: not JSON: {error.msg}").of(
            ManifestFault.SYNTAX
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ManifestError(f"{shown(path)}{place}: not YAML: {error.problem or error}").of(
            ManifestFault.SYNTAX
        ) from error
    except yaml.YAMLError as error:
        raise ManifestError(f"{shown(path)}: not YAML: {error}").of(ManifestFault.SYNTAX) from error
    except RecursionError as error:
        raise ManifestError(f"{shown(path)}: nested too deeply for a manifest").of(ManifestFault.SYNTAX) from error
    except ValueError as error:  # an alias, a key twice, a number or date too large
        raise ManifestError(f"{shown(path)}: {error}").of(ManifestFault.SYNTAX) from error
    raise ManifestError(f"{shown(path)}: a manifest ends in .json, .yaml or .yml").of(ManifestFault.SYNTAX)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return fields


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
    fields = plain({"schema_version": SCHEMA_VERSION, "created_at": created_at, **manifest.fields()}, "")
    checked = check_document(fields, "manifest").model_dump(mode="json", exclude_unset=True)
    return checked | {name: {key: checked[name][key] for key in fields[name]} for name in SECTIONS}


def plain(value: Any, place: str) -> Any:
    """NumPy scalars and arrays, tuples and paths as JSON values."""
    if isinstance(value, dict):
        return {str(key): plain(part, f"{place}.{key}" if place else str(key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part, f"{place}[{index}]") for index, part in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), place)
    if isinstance(value, Path):
        return value.as_posix()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ManifestError(f"manifest: {place}: {type(value).__name__} cannot be written; use numbers, text, lists, dicts")
