"""A folder of files as one source: the shards of a data set, as the hub and ``datasets`` write them."""

from __future__ import annotations

import re
from pathlib import Path

from layerlens.data.readers import reader_of
from layerlens.exceptions import DataError

SPLIT = re.compile(r"(?:^|[^a-z])(train(?:ing)?|test|dev|eval|valid|validation)(?:[^a-z]|$)")
TRAIN = "train"
ASIDE = ("dataset_infos.json", "dataset_info.json", "state.json", "package.json")
"""Files that lie beside data and are none."""
NOTES = ".txt"
"""Files of this suffix are data where there are no others, else licences and notes."""
SHORT_TEXT = 20_000
"""Bytes that texts of classes have on average at most; files of corpora are longer."""
MOST_SHOWN = 4


def shards(root: Path, of_words: bool) -> list[Path]:
    """The files below ``root`` that are read, by name: those of the split train where their names tell splits apart.

    Raises:
        DataError: they are of several kinds, or of several configurations.
    """
    listed = _listed(root, of_words)
    if listed is not None:
        return listed
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and reader_of(path, of_words) is not None
        and path.name not in ASIDE
        and not any(part.startswith((".", "_")) for part in path.relative_to(root).parts)
    ]
    if any(path.suffix.lower() != NOTES for path in files):
        files = [path for path in files if path.suffix.lower() != NOTES]
    kinds = sorted({path.suffix.lower() for path in files})
    if len(kinds) > 1:
        raise DataError(
            f"data.source: the folder {root} has files of several kinds ({', '.join(kinds)}); give the folder or file "
            "of one"
        )
    of_split = {path: _split(path.relative_to(root)) for path in files}
    if any(of_split.values()):
        train = [path for path in files if of_split[path] == TRAIN]
        if not train:
            splits = sorted(set(filter(None, of_split.values())))
            raise DataError(
                f"data.source: the folder {root} has files of the splits {', '.join(splits)} and none of {TRAIN}; give "
                "the file or folder of one"
            )
        files = train
    return files


def folder_note(root: Path, files: list[Path]) -> str:
    """Which files the rows of a folder come from."""
    shown = [path.relative_to(root).as_posix() for path in files[:MOST_SHOWN]]
    more = f" and {len(files) - MOST_SHOWN} more" if len(files) > MOST_SHOWN else ""
    return f"{len(files)} file{'s' if len(files) > 1 else ''} of the folder: {', '.join(shown)}{more}"


def text_class(root: Path, files: list[Path]) -> dict[Path, str]:
    """The class of each file where there is a folder of short texts for each class, as IMDb's reviews are published;
    empty where the files are anything else.
    """
    places = {path: path.parent for path in files}
    classes = {place: [path for path in files if places[path] == place] for place in places.values()}
    sound = (
        len(classes) > 1
        and all(path.suffix.lower() == NOTES for path in files)
        and len({place.parent for place in classes}) == 1
        and root not in classes
        and min(map(len, classes.values())) > 1
        and sum(path.stat().st_size for path in files) <= SHORT_TEXT * len(files)
    )
    return {path: place.name for path, place in places.items()} if sound else {}


def _listed(root: Path, of_words: bool) -> list[Path] | None:
    """The files that a data set's card lists for the split train; None where it lists none.

    Raises:
        DataError: it lists several configurations, or none of the files of train are there.
    """
    card = root / "README.md"
    if not card.is_file():
        return None
    import yaml

    _, opened, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        facts = yaml.safe_load(rest.partition("\n---")[0]) if opened else None
    except (yaml.YAMLError, RecursionError, ValueError):  # what is no card; ValueError: 2024-99-99 as a date
        return None
    listed = facts.get("configs") if isinstance(facts, dict) else None
    configurations = [one for one in listed or () if isinstance(one, dict) and "config_name" in one]
    names = [str(one["config_name"]) for one in configurations]
    if len(names) > 1:
        raise DataError(
            f"data.source: the folder {root} has the configurations {', '.join(names)}; name one, as in "
            f"hf:{root}/{names[0]}:{TRAIN}"
        )
    splits = configurations[0].get("data_files") if configurations else None
    if not isinstance(splits, list) or not all(isinstance(one, dict) for one in splits):
        return None
    splits = [one for one in splits if {"split", "path"} <= one.keys()]
    patterns = [one["path"] for one in splits if one["split"] == TRAIN]
    each = [str(part) for pattern in patterns for part in (pattern if isinstance(pattern, list) else [pattern])]
    inside = [part for part in each if part and "://" not in part and not part.startswith("/") and ".." not in part]
    files = sorted({path for part in inside for path in root.glob(part) if path.is_file()})
    if splits and not files:
        known = ", ".join(str(one["split"]) for one in splits)
        raise DataError(
            f"data.source: the card of the folder {root} lists the splits {known}, and no file there is of {TRAIN}; "
            "give the file or folder of one"
        )
    return [path for path in files if reader_of(path, of_words) is not None] or None


def _split(path: Path) -> str:
    """The split that a file's name, or that of a folder it is in, speaks of; "" for none."""
    for part in reversed(path.parts):
        named = SPLIT.search(part.lower())
        if named is not None:
            return TRAIN if named[1].startswith(TRAIN) else named[1]
    return ""
