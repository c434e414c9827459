"""A folder with a sub-folder of files for each class: images, or clips of sound."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerlens.data.rows import MOST_NAMED, Reading
from layerlens.exceptions import DataError
from layerlens.utils.places import check_readable

TRAIN = ("train", "training")
OTHER_SPLITS = ("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation")
"""Folders of splits, each with a sub-folder for every class."""


class FileKind(ABC):
    """Files of one kind, checked one after the other.

    Attributes:
        column: what the data set calls them.
        one, many: what messages call one of them, with its article, and several.
        endings: what their names end with, for messages.
    """

    column: str
    one: str
    many: str
    endings: str

    @abstractmethod
    def looks_right(self, path: Path) -> bool:
        """Whether a file is called as those of this kind are, or begins as they do."""

    @abstractmethod
    def stored(self, name: str, path: Path) -> Any:
        """The file, as what the data set has of it; it has that ``name``."""

    @abstractmethod
    def fault(self, item: Any) -> str:
        """Why one cannot be read, as the end of a sentence; "" where it can."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What becomes of those that can be read, a line each."""
        return ()


def some(names: Sequence[str]) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"


def class_folders(root: Path, kind: FileKind) -> tuple[tuple[Any, ...], tuple[str, ...], Reading]:
    """The files below ``root``, the name of each one's class (the sub-folder it is in), and what was not read.

    Raises:
        DataError: there are fewer than two classes, or none of the files of one can be read.
    """
    classes, notes = _folders(root), []
    if train := next((folder for folder in classes if folder.name.lower() in TRAIN), None):
        others = [folder.name for folder in classes if folder is not train]
        if _folders(train) and all(name.lower() in OTHER_SPLITS for name in others):
            notes = [f"of the folders {', '.join(folder.name for folder in classes)}, LayerLens reads {train.name}"]
            root, classes = train, _folders(train)
    items: list[Any] = []
    labels: list[str] = []
    left_out: dict[int, str] = {}
    names: dict[int, str] = {}
    for folder in classes:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
        found = [path for path in paths if kind.looks_right(path)]
        if len(found) < len(paths):
            others = [path.relative_to(root).as_posix() for path in paths if path not in set(found)]
            notes.append(f"{_count(others, 'file', 'files')} not read (not {kind.one}): {some(others)}")
        if not found:
            notes.append(f"the folder {folder.name} has no {kind.many}, so it is not a class")
        faults: list[str] = []
        for path in found:
            check_readable(path, root)
            item = kind.stored(path.relative_to(root).as_posix(), path)
            fault = kind.fault(item)
            if fault:
                number = len(items) + len(left_out) + 1
                left_out[number], names[number] = fault, item.name
                faults.append(fault)
            else:
                items.append(item)
                labels.append(folder.name)
        if found and len(faults) == len(found):
            raise DataError(
                f"data.source: none of the {len(found)} {kind.many} of the class {folder.name} can be read; "
                f"{found[0].relative_to(root)} {faults[0]}; or move the folder away if it is not a class"
            )
    outside = [path.name for path in sorted(root.iterdir()) if path.is_file() and kind.looks_right(path)]
    if len(set(labels)) < 2:
        known = f"has {kind.many} of {len(set(labels))} class" if labels else f"has no {kind.many} in sub-folders"
        raise DataError(
            f"data.source: {root} {known}; {kind.one.partition(' ')[0]} {kind.column} folder has one sub-folder for "
            f"each of two or more classes ({kind.endings} ...). If it has train and test folders, give the train folder"
        )
    if outside:
        word = kind.one.partition(" ")[2]
        notes.append(f"{_count(outside, word, kind.many)} outside the classes' folders not read: {some(outside)}")
    total = len(items) + len(left_out)
    reading = Reading(total, (kind.column,), left_out=left_out, names=names, notes=(*notes, *kind.notes))
    return tuple(items), tuple(labels), reading


def _folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _count(names: Sequence[str], one: str, many: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else many}"


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
