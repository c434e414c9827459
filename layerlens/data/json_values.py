"""JSON as rows: arrays item by item, objects that hold an array or a list for each column, keys that stand twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from layerlens.data.rows import SourceRows
from layerlens.data.text_files import Line
from layerlens.exceptions import DataError

SPACE = " \t\r\n"


class BeyondParser(json.JSONDecodeError):
    """JSON that Python does not read, however much of it comes: nested too deep, or a number of too many digits."""


def parsed(text: str, decode: Callable[[str], Any] = json.loads) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is none, or (``BeyondParser``) none that Python reads.
    """
    try:
        return decode(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise BeyondParser("it is nested too deep", text, 0) from error
    except ValueError as error:
        raise BeyondParser("a number has more digits than can be read", text, 0) from error


def object_of(text: str, found: SourceRows) -> Any:
    """The value of a JSON text; a key that an object has twice is noted, and the last of them is taken.

    Raises:
        json.JSONDecodeError: see ``parsed``.
    """
    return parsed(text, json.JSONDecoder(object_pairs_hook=_noting(found)).decode)


def _noting(found: SourceRows) -> Any:
    def pairs_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            found.note(f"an object has the key {twice!r} twice; the last of them is taken")
        return value

    return pairs_of


def array_items(path: Path, lines: Iterator[Line], found: SourceRows) -> Iterator[tuple[Any, int]]:
    """The items of a JSON array and about how many bytes each takes, without the whole of it in memory.

    Raises:
        DataError: what follows is not JSON, with its line.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_noting(found))
    buffer, line_number, opened, separated = "", 0, False, True

    def more(at_least: int) -> bool:
        nonlocal buffer, line_number
        parts, size = [buffer], 0
        for line in lines:
            if line.fault:
                raise DataError(f"data.source: {path}: line {line.number} is not text: {line.fault}; set data.encoding")
            parts.append(line.text)
            size, line_number = size + len(line.text), line.number
            if size >= at_least:
                break
        buffer = "".join(parts)
        return size > 0

    def refused(why: str) -> DataError:
        return DataError(f"data.source: {path}: at or before line {line_number} is not a JSON array: {why}")

    while True:
        buffer = buffer.lstrip(SPACE)
        while not buffer:
            if not more(2**16):
                raise refused("it ends before its closing bracket")
            buffer = buffer.lstrip(SPACE)
        if not opened:
            buffer, opened = buffer.removeprefix("["), True
        elif buffer[0] == "]":
            if buffer[1:].strip(SPACE) or more(1):
                rest = buffer[1:].strip(SPACE)
                if rest:
                    raise refused(f"{rest[:40]!r} follows it")
            return
        elif buffer[0] == "," and not separated:
            buffer, separated = buffer[1:], True
        elif not separated:
            raise refused(f"a comma is missing before {buffer[:40]!r}")
        else:
            try:
                value, end = parsed(buffer, decoder.raw_decode)
            except json.JSONDecodeError as error:
                if not isinstance(error, BeyondParser) and more(len(buffer)):
                    continue
                raise refused(error.msg) from error
            if end == len(buffer) and not isinstance(value, (dict, list)) and more(64):
                continue  # a number may go on
            yield value, end
            buffer, separated = buffer[end:], False


def columns_as_rows(value: Any, path: Path, found: SourceRows) -> list[Any]:
    """The rows of one JSON object: of the array of objects in it, or of a list (or mapping) for each column.

    Raises:
        DataError: it has neither.
    """
    if isinstance(value, dict):
        arrays = {name: part for name, part in value.items() if isinstance(part, list) and _of_objects(part)}
        if len(arrays) == 1:
            ((name, rows),) = arrays.items()
            found.note(f"the rows are those of its key {name!r}")
            return rows
        if len(arrays) > 1:
            raise DataError(
                f"data.source: {path} has rows under {', '.join(arrays)}; write the ones that you want into a separate "
                "file"
            )
        lists = [list(part.values()) if isinstance(part, dict) else part for part in value.values()]
        if lists and all(isinstance(part, list) for part in lists) and len({len(part) for part in lists}) == 1:
            found.note("it has a list for each column")
            return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]
        return [value]
    raise DataError(f"data.source: {path} must have rows: a JSON array of objects, got {type(value).__name__}")


def squad_rows(item: Any) -> list[dict[str, Any]] | None:
    """The questions of an item of SQuAD's own files, as rows; None where it is no article (``paragraphs``) and no
    paragraph (``context`` and ``qas``).
    """
    if not isinstance(item, dict):
        return None
    paragraphs = item.get("paragraphs", [item])
    if not isinstance(paragraphs, list) or not paragraphs or not all(map(_is_paragraph, paragraphs)):
        return None
    title = {"title": item["title"]} if "title" in item else {}
    return [
        {**title, "context": paragraph["context"], **question, "answers": question.get("answers", [])}
        for paragraph in paragraphs
        for question in paragraph["qas"]
    ]


def _is_paragraph(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("context"), str):
        return False
    return isinstance(value.get("qas"), list) and all(isinstance(one, dict) for one in value["qas"])


def _of_objects(part: list[Any]) -> bool:
    return bool(part) and all(isinstance(one, dict) for one in part)
