"""Data sets of the ``datasets`` library: of the Hugging Face hub, of a folder like one of the hub's, or saved to disk.

The library keeps them in memory maps; of a large one only the rows that are kept are read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from layerlens.data.rows import Rows, SourceRows, drawn_places
from layerlens.data.values import without_gaps
from layerlens.exceptions import DataError, DataNotFoundError
from layerlens.utils.places import check_readable

DEFAULT_SPLIT = "train"
CONFIGURATIONS = re.compile(r"among the available configs: (\[.*\])|Available: (\[.*\])")


def read_saved_dataset(path: Path, found: SourceRows) -> None:
    """A directory that ``datasets`` wrote with ``save_to_disk``; of several splits the one named train.

    Raises:
        DataError: it is no such directory, or has no split named train.
    """
    datasets = _datasets_library(str(path))
    for file in _named_by(path):
        check_readable(file, path)
    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"data.source: {path} is a directory, but not one that datasets' save_to_disk wrote; give a file in it"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if DEFAULT_SPLIT not in loaded:
            raise DataError(
                f"data.source: {path} has the splits {', '.join(loaded)} and none named {DEFAULT_SPLIT!r}; give the "
                f"directory of one, such as {path / next(iter(loaded))}"
            )
        loaded = loaded[DEFAULT_SPLIT]
    _keep(loaded, found)


def read_arrow_file(path: Path, found: SourceRows) -> None:
    """One .arrow file that ``datasets`` wrote.

    Raises:
        DataError: it is none.
    """
    library = _datasets_library(str(path))
    try:
        loaded = library.Dataset.from_file(str(path))
    except (OSError, ValueError) as error:  # Arrow's own exceptions are ValueErrors
        raise DataError(
            f"data.source: {path} is not an .arrow file: {str(error).splitlines()[0]}; convert it to .parquet"
        ) from error
    _keep(loaded, found)


def _named_by(path: Path) -> list[Path]:
    """The files that a saved data set consists of, by its own account: splits, and the shards of each."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return [file for split in splits for file in [path / str(split), *_named_by(path / str(split))]]
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [path / str(one["filename"]) for one in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []  # the library says what is wrong with it


def read_hub_dataset(name: str, found: SourceRows, base_dir: Path | None = None) -> None:
    """``NAME``, ``NAME:SPLIT`` or ``NAME/CONFIG:SPLIT`` from the Hugging Face hub, its local cache, or a local folder.

    Raises:
        DataNotFoundError: there is no such data set, configuration or split, or the hub cannot be reached and nothing
            is cached.
    """
    library = _datasets_library(f"hf:{name}")
    place, _, split = name.partition(":")
    error: Exception | None = None
    for dataset, configuration in _readings(place, base_dir):
        chosen = {"name": configuration} if configuration else {}
        try:
            loaded = library.load_dataset(dataset, **chosen, split=split or DEFAULT_SPLIT)
        except (OSError, ValueError, RuntimeError) as failed:  # the library's own errors derive from these
            error = error or failed
            continue
        _keep(loaded, found)
        return
    assert error is not None
    raise DataNotFoundError(_told(name, place, split, str(error).strip() or type(error).__name__)) from error


def _readings(place: str, base_dir: Path | None) -> list[tuple[str, str]]:
    """(data set, configuration) that a name may mean, the likeliest first."""
    head, _, last = place.rpartition("/")
    if place.startswith((".", "/", "~")):
        folder = (base_dir or Path()) / Path(place).expanduser()
        is_configuration = not folder.exists() and folder.parent.is_dir()
        return [(str(folder.parent), folder.name)] if is_configuration else [(str(folder), "")]
    if place.count("/") >= 2:
        return [(head, last)]
    return [(place, ""), (head, last)] if head else [(place, "")]


def _told(name: str, place: str, split: str, message: str) -> str:
    named = CONFIGURATIONS.search(message.replace("\n", " "))
    if named is not None:
        names = re.findall(r"'([^']*)'|\"([^\"]*)\"", named[1] or named[2])
        known = [a or b for a, b in names]
        base = place if "Config name is missing" in message else place.rpartition("/")[0]
        which = "has the configurations" if base == place else f"has no configuration {place.rpartition('/')[2]!r}; has"
        example = f"hf:{base}/{known[0] if known else 'NAME'}:{split or DEFAULT_SPLIT}"
        return f"data.source: hf:{base} {which} {', '.join(known)}; name one, as in {example}"
    return f"data.source: cannot load hf:{name}: {message.splitlines()[0]}"


def _keep(dataset: Any, found: SourceRows) -> None:
    """The rows of a data set that are to be kept, drawn where they are not all."""
    if found.first is not None:
        dataset = dataset.select(range(min(found.first, len(dataset))))
    found.total = len(dataset)
    stored = int(getattr(getattr(dataset, "data", None), "nbytes", 0) or 0)
    most = found.max_rows
    if most is None and stored > found.max_bytes:
        most = max(1, found.total * found.max_bytes // stored)
    places = list(range(found.total))
    if most is not None and most < found.total:
        places = drawn_places(found.total, most)
        dataset = dataset.select(places)
    found.rows, found.numbers = dataset_rows(dataset), [place + 1 for place in places]


def with_encoded_media(dataset: Any) -> Any:
    """The same data set with images and clips of sound as they are stored, which its own packages need not decode."""
    from datasets import Audio, Image

    for kind in (Image, Audio):
        for name in [name for name, feature in dataset.features.items() if isinstance(feature, kind)]:
            dataset = dataset.cast_column(name, kind(decode=False))
    return dataset


def dataset_rows(dataset: Any) -> Rows:
    """Rows with the names of classes, single ones or lists of them, in place of their numbers; media encoded.

    Raises:
        DataError: a value has no Python value, such as a date in the year 5881580.
    """
    dataset = with_encoded_media(dataset)
    rows: Rows = []
    try:
        rows.extend({name: without_gaps(value) for name, value in row.items()} for row in dataset)
    except (OverflowError, ValueError) as error:
        raise DataError(
            f"data.source: row {len(rows) + 1} of the data set has a value that Python cannot hold: {error}"
        ) from error
    for name, feature in dataset.features.items():
        inner = getattr(feature, "feature", None)  # of a list
        if hasattr(feature, "int2str"):
            for row in rows:
                row[name] = _class_name(feature, row[name])
        elif hasattr(inner, "int2str"):
            for row in rows:
                row[name] = [_class_name(inner, value) for value in row[name] or ()]
    return rows


def _class_name(feature: Any, value: Any) -> Any:
    """The name of class ``value``; what is no class (-1 where the labels are hidden) as it is."""
    return feature.int2str(value) if isinstance(value, int) and value >= 0 else value


def _datasets_library(source: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(f"data.source: {source} needs the datasets library: pip install 'layerlens[hf]'") from error
    return datasets
