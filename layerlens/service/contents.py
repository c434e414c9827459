"""What the files below an allowed folder are and what they name: pickles, code, and files that lie elsewhere.

A model directory or a saved data set is a set of files of which some name others: indices of shards, configurations of
tokenizers and adapters, the state of a data set. These are read here as the libraries read them.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from layerlens.exceptions import ConfigurationError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".joblib", ".dill", ".npz", ".pt2")
CODE = (".py", ".so", ".pyc", ".pyd", ".dll")
INDEX, WEIGHT_MAP = ".index.json", "weight_map"
ADAPTER = "adapter_config.json"
NAMES_A_FILE = re.compile(r"(^|_)(file|files|filename|path|paths|dir|directory|folder)$")
ONLY_NOTED = ("_name_or_path", "name_or_path")
"""Where a model was when it was saved; nothing is read from there."""
LARGEST_JSON = 64 << 20
DEEPEST = 50
_PICKLE = re.compile(rb"\x80[\x00-\x05]")
_ZIPPED = (b"PK\x03\x04", b"PK\x05\x06")
_HDF5 = b"\x89HDF\r\n\x1a\n"

MODULES = "modules.json"
ST_MODULES = "sentence_transformers."

Below = Callable[[Path], bool]
"""Whether a path, links followed, is below a root, or would be."""


def refuse_model_folder(key: str, name: str, folder: Path, below: Below, *, allow_pickles: bool) -> None:
    """Weights as safetensors only, no code, and nothing that lies elsewhere or is named there.

    Raises:
        ConfigurationError: a file in ``folder`` is not allowed; names it.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{key}: {name!r} is not a model directory")
    for path in _files(key, name, folder, below):
        shown = path.relative_to(folder)
        if path.suffix.lower() in CODE:
            raise ConfigurationError(f"{key}: {name!r} has code ({shown}); this server runs no code of models")
        if path.is_file() and not allow_pickles and (path.suffix.lower() in PICKLES or is_pickle(path)):
            raise ConfigurationError(
                f"{key}: {name!r} has {shown}, which can run code when it is loaded; convert it to safetensors"
            )
        if path.suffix.lower() == ".json" and path.is_file():
            _refuse_named(key, name, folder, path, below, allow_pickles=allow_pickles)


def refuse_data(key: str, name: str, place: Path, below: Below) -> None:
    """No file of a folder of data lies elsewhere, and none that a saved data set names.

    Raises:
        ConfigurationError: one does; names it.
    """
    if place.is_dir():
        for path in _files(key, name, place, below):
            if path.name in ("state.json", "dataset_dict.json", "dataset_info.json") and path.is_file():
                _refuse_named(key, name, place, path, below)


def is_pickle(path: Path) -> bool:
    """Whether the content is what unpickles, whatever the name says: a pickle, torch's archive of one, or HDF5."""
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(_ZIPPED):
            try:
                with zipfile.ZipFile(file) as archive:
                    return any(name.endswith((".pkl", ".npy")) or "/data/" in name for name in archive.namelist())
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
                return True
    return _PICKLE.match(start) is not None or start == _HDF5


def _files(key: str, name: str, folder: Path, below: Below) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if not below(path):
            raise ConfigurationError(
                f"{key}: {path.relative_to(folder)} in {name!r} leads out of the roots of this server"
            )
        if not path.is_dir() and not path.is_file():
            raise ConfigurationError(f"{key}: {path.relative_to(folder)} in {name!r} is not a regular file")
        yield path


def _refuse_named(key: str, name: str, folder: Path, path: Path, below: Below, *, allow_pickles: bool = True) -> None:
    """Refuse what a JSON file of the folder names, if it leads out, or is a pickle among the shards of an index."""
    shown = path.relative_to(folder)
    if path.stat().st_size > LARGEST_JSON:
        if path.name != "tokenizer.json":  # a vocabulary, which names no files
            raise ConfigurationError(f"{key}: {shown} in {name!r} is larger than {LARGEST_JSON >> 20} MiB")
        return
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return  # whoever needs it says what is wrong with it
    except OSError as error:
        raise ConfigurationError(f"{key}: {shown} in {name!r} cannot be read: {error.strerror}") from error
    if path.name == MODULES:
        _refuse_modules(key, name, content)
    if path.name == ADAPTER and not (_base_of(content).startswith("/") and below(Path(_base_of(content)))):
        raise ConfigurationError(
            f"{key}: {name!r} is an adapter of {_base_of(content)!r} ({shown}), which is not below a root of this "
            "server; give the base model itself"
        )
    for told, place in named_files(path.name, content):
        found = path.parent / place
        elsewhere_long_ago = place.startswith("/") and told != WEIGHT_MAP and not os.path.lexists(found)
        if not below(found) and not elsewhere_long_ago:
            raise ConfigurationError(
                f"{key}: {shown} in {name!r} names {place!r} ({told}), which is not below a root of this server"
            )
        if told == WEIGHT_MAP and not allow_pickles and _is_file(found) and is_pickle(found):
            raise ConfigurationError(
                f"{key}: {shown} in {name!r} names {place}, which can run code when it is loaded; convert it to "
                "safetensors"
            )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no file can have such a name
        return False


def _refuse_modules(key: str, name: str, content: Any) -> None:
    """The list of classes of sentence-transformers, which imports what it names."""
    for one in content if isinstance(content, list) else ():
        kind = str(one.get("type", "")) if isinstance(one, dict) else ""
        if kind and not kind.startswith(ST_MODULES):
            raise ConfigurationError(
                f"{key}: {name!r} names code ({kind} in {MODULES}); this server runs no code of models"
            )


def _base_of(content: Any) -> str:
    return str(content.get("base_model_name_or_path") or "") if isinstance(content, dict) else ""


def named_files(file_name: str, content: Any) -> list[tuple[str, str]]:
    """(key, place) of all files that a JSON file of this name names; relative to its folder.

    >>> named_files("model.safetensors.index.json", {"weight_map": {"w": "../x.safetensors"}})
    [('weight_map', '../x.safetensors')]
    >>> named_files("tokenizer_config.json", {"vocab_file": "/etc/hostname", "name_or_path": "/home/me"})
    [('vocab_file', '/etc/hostname')]
    """
    if file_name.endswith(INDEX):
        mapping = content.get(WEIGHT_MAP) if isinstance(content, dict) else None
        shards = mapping.values() if isinstance(mapping, dict) else ()
        return [(WEIGHT_MAP, shard) for shard in sorted({str(one) for one in shards})]
    if file_name == "dataset_dict.json":
        splits = content.get("splits") if isinstance(content, dict) else None
        return [("splits", str(one)) for one in splits] if isinstance(splits, list) else []
    return list(_by_key(content, 0)) if file_name != "tokenizer.json" else []


def _by_key(content: Any, depth: int) -> Iterator[tuple[str, str]]:
    if depth > DEEPEST:
        return
    if isinstance(content, list):
        for one in content:
            yield from _by_key(one, depth + 1)
    elif isinstance(content, dict):
        for key, value in content.items():
            if NAMES_A_FILE.search(key) and key not in ONLY_NOTED:
                values = value if isinstance(value, list) else [value]
                yield from ((key, one) for one in values if isinstance(one, str) and one)
            yield from _by_key(value, depth + 1)
