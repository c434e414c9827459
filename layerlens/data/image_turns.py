"""Images in the turns of a chat: in a column beside them, in the turns' own parts, or where a text says ``<image>``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.conversations import OddRow, Turn, is_conversation, question_turns, turns_of
from layerlens.data.images import StoredImage, stored_image
from layerlens.data.pixels import SUFFIXES
from layerlens.data.table import Table
from layerlens.exceptions import DataError, DataNotFoundError

COLUMNS = ("images", "image", "img")
PLACE = "<image>"
IMAGE = {"type": "image"}
HOLDERS = ("image", "path", "url", "bytes")


class Images:
    """The images of a table's rows, which are chats with them where any row has some.

    Args:
        table: the rows.
        config: which column has the images, if it is given.
    """

    def __init__(self, table: Table, config: DataConfig) -> None:
        self.table, self.config = table, config
        self.column = image_column(table, config)
        self.values = None if self.column is None else table.values(self.column)
        self.anywhere = self.column is not None or any(map(_has_images, table.rows))

    def into(self, sample: dict[str, Any], place: int) -> dict[str, Any]:
        """The sample as a chat with its images; as it is where no row of the table has any.

        Raises:
            OddRow: see ``with_images``; or it is a text alone.
        """
        if not self.anywhere:
            return sample
        turns = chat_of(sample)
        if turns is None:
            raise OddRow("has an image, but is neither a chat nor a question with an answer")
        value = None if self.values is None else self.values[place]
        return with_images(turns, value, self.table, place, self.config)


def _has_images(row: Mapping[str, Any]) -> bool:
    turns = [one for value in row.values() if is_conversation(value) for one in turns_of(value)]
    turns = [one for one in turns if isinstance(one, Mapping)]
    return any(_is_image(part) for turn in turns for part in parts_of(turn.get("content", turn.get("value"))))


def image_column(table: Table, config: DataConfig) -> str | None:
    """The column of the rows' images; None where there is none.

    Raises:
        DataError: ``data.image_column`` names one that is not there.
    """
    if config.image_column is not None:
        return table.find(config.image_column, "image_column", COLUMNS)
    by_name = {column.lower(): column for column in reversed(table.columns)}
    named = [by_name[name] for name in COLUMNS if name in by_name]
    return next((name for name in named if any(map(_looks_like_images, table.peek(name)))), None)


def chat_of(sample: Mapping[str, Any]) -> list[Turn] | None:
    """A language model's row as the turns of a chat; None where it is no chat and no question with its answer."""
    if "messages" in sample:
        return list(sample["messages"])
    if "question" in sample:
        return [*question_turns(sample["question"], sample["system"]), _said(sample["answer"])]
    if "completion" in sample:
        prompt, answer = sample["prompt"], sample["completion"]
        asked = question_turns(prompt) if isinstance(prompt, str) else list(prompt)
        return [*asked, _said(answer)] if isinstance(answer, str) else [*asked, *answer]
    return None


def parts_of(content: Any) -> list[Any]:
    """The parts of a turn's content; of a text what is before, between and after its images."""
    if not isinstance(content, str):
        return list(content) if isinstance(content, (list, tuple)) or hasattr(content, "tolist") else []
    pieces = content.split(PLACE)
    parts: list[Any] = []
    for number, text in enumerate(pieces):
        parts += [dict(IMAGE)] if number else []
        parts += [{"type": "text", "text": text.strip("\n")}] if text.strip("\n") else []
    return parts


def with_images(turns: Sequence[Turn], value: Any, table: Table, place: int, config: DataConfig) -> dict[str, Any]:
    """A sample: its turns, each image in them a part ``{"type": "image"}``, and its images in their order.

    Images of a row whose turns have no place for them come before the first turn of the user.

    Args:
        turns: of the row.
        value: what the row has in the column of images; None where there is no such column.
        table, place: where the row is, for paths that begin at its folder.
        config: how large an image may be.

    Raises:
        OddRow: an image is not there, or there are not as many as places.
    """
    values = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    found: list[Turn] = []
    inside: list[Any] = []
    for turn in turns:
        parts = parts_of(turn["content"])
        inside += [_held(part) for part in parts if _is_image(part)]
        plain = isinstance(turn["content"], str) and PLACE not in turn["content"]
        clean = [dict(IMAGE) if _is_image(part) else part for part in parts]
        found.append(dict(turn) if plain or not parts else {**turn, "content": clean})
    own = [one for one in inside if one is not None]
    if own and not values:
        values = own
    if values and not inside:
        asked = next((turn for turn in found if turn["role"] == "user"), None)
        if asked is None:
            raise OddRow("has images but no user turn")
        asked["content"] = [*(dict(IMAGE) for _ in values), *parts_of(asked["content"])]
    elif len(values) != len(inside):
        raise OddRow(f"has {len(values)} images and {len(inside)} placeholders for them")
    images = tuple(_stored(one, table, place, config) for one in values)
    return {"messages": found, "images": images}


def _stored(value: Any, table: Table, place: int, config: DataConfig) -> StoredImage:
    value = value.removeprefix("file://") if isinstance(value, str) else value
    try:
        found = stored_image(value, Path(table.place), table.number(place), config.max_image_pixels)
    except DataNotFoundError as error:
        raise OddRow(str(error)) from error
    if found is None:
        raise OddRow(f"an image must be a file path or encoded bytes, got a {type(value).__name__}")
    try:
        found.header()
    except DataError as error:
        raise OddRow(f"the image {found.name} {error}") from error
    return found


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and (part.get("type") in ("image", "image_url"))


def _held(part: Mapping[str, Any]) -> Any:
    """The image that a part holds itself; None where it is a place for one."""
    held: Any = part.get("image_url")
    held = held.get("url") if isinstance(held, Mapping) else held
    return held if held is not None else next((part[name] for name in HOLDERS if part.get(name) is not None), None)


def _looks_like_images(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_looks_like_images, value))
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    known = isinstance(value, bytes) or (hasattr(value, "shape") and getattr(value, "ndim", 0) in (2, 3))
    return known or (isinstance(value, str) and Path(value).suffix.lower() in SUFFIXES)


def _said(text: str) -> Turn:
    return {"role": "assistant", "content": text}
