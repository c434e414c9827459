"""What stands in a cell of a table: classes, lists, zeros and ones, answers, however a file writes them."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

WHOLE = re.compile(r"\s*[+-]?\d+(\.0*)?\s*")
"""A whole number as text: ``1``, or ``1.0`` where pandas had a gap in the column."""

SEPARATORS = (";", "|")
"""What stands between several classes in one text. A comma does not: names of classes have it."""

NO_CLASS = ("none", "nan", "null", "-")
"""What stands alone where a sample that may have several classes has none."""

GAPS = ("", "nan", "<na>")
"""Text that stands for a missing value, in lower case; "None" may be the name of a class."""

Answers = tuple[tuple[int, str], ...]


def class_names(labels: Any) -> tuple[str, ...]:
    """Every name once: whole numbers first, by their size, then words by the alphabet."""

    def place(name: str) -> tuple[bool, int, str, str]:
        digits = name.lstrip("0") if name.isdecimal() else ""  # compared as text: int() has a limit of digits
        return not name.isdecimal(), len(digits), digits, name

    return tuple(sorted(set(labels), key=place))


def separator_of(values: Sequence[Any]) -> str | None:
    """The ``;`` or ``|`` between several classes in one text; None where a text has one class at most."""
    texts = [value for value in values if isinstance(value, str) and as_list(value) is None]
    return next((one for one in SEPARATORS if any(one in text for text in texts)), None)


def as_list(value: Any, separator: str | None = None) -> list[Any] | None:
    """A list, tuple or array as a list, and one that is written as text (``['a', 'b']``), as pandas writes lists into
    .csv files, or as the parts between separators; None for anything else.
    """
    if isinstance(value, str):
        if separator is not None and not value.lstrip().startswith("["):
            parts = [part.strip() for part in value.split(separator) if part.strip()]
            return [] if len(parts) == 1 and parts[0].lower() in NO_CLASS else parts
        if not (value.lstrip().startswith("[") and value.rstrip().endswith("]")):
            return None
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, (list, tuple)) else None


def is_gap(value: Any) -> bool:
    """Whether there is nothing in a cell, or what pandas writes for that."""
    if isinstance(value, str):
        return value.strip().casefold() in GAPS
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_class(value: Any) -> bool:
    """Whether a value names a class: text, or a whole number."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, (str, int)) and not is_gap(value)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, or text that is one."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):  # a whole number beyond float64
        return False


def is_bit(value: Any, *more: Any) -> bool:
    """Whether a value is 0 or 1, false or true, or one of ``more``."""
    if isinstance(value, str):
        return value.strip() in ("0", "1", "0.0", "1.0")
    return value in more or (isinstance(value, (int, float)) and value in (0, 1))


def names_of(values: Sequence[Any]) -> list[str | None]:
    """Classes as names: whole numbers without a point, whether they are numbers or all of them are texts of such."""
    written = [value for value in values if isinstance(value, str)]
    whole = bool(written) and all(map(WHOLE.fullmatch, written))

    def name(value: Any) -> str | None:
        if value is None:
            return None
        if isinstance(value, float):
            return str(int(value))
        if whole and isinstance(value, str):  # digit by digit: numbers of 17 digits and more are no float64
            sign, digits = (
                ("-" if "-" in value else ""),
                value.strip().lstrip("+-").partition(".")[0].lstrip("0") or "0",
            )
            return (sign if digits != "0" else "") + digits
        return str(value)

    return [name(value) for value in values]


def answers_of(value: Any) -> Answers | None:
    """The (first character, text) of answers; None where the value has not the form of any."""
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, (list, tuple)) or not isinstance(starts, (list, tuple)) or len(texts) != len(starts):
            return None
        pairs = list(zip(starts, texts, strict=True))
    elif isinstance(value, (list, tuple)) and all(isinstance(one, dict) for one in value):
        pairs = [(one.get("answer_start"), one.get("text")) for one in value]
    else:
        return None
    sound = all(isinstance(start, int) and isinstance(text, str) for start, text in pairs)
    return tuple(pairs) if sound else None


def without_gaps(value: Any) -> Any:
    """Lists of mappings without keys of other mappings, where Arrow has None: a tool call has its own arguments alone.

    An image keeps its empty path.
    """
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return [_filled(one) for one in value]
    return value


def _filled(value: Any) -> Any:
    if isinstance(value, dict) and not value.keys() <= {"bytes", "path"}:
        return {name: _filled(part) for name, part in value.items() if part is not None}
    return [_filled(one) for one in value] if isinstance(value, list) else value


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
