"""From rows to columns: which column, and what stands in it, with the sample that has something else.

A column inside a mapping has a dotted name: ``translation.en``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.images import StoredImage, stored_image
from layerlens.data.readers import FIRST, Rows
from layerlens.exceptions import DataError

LABELS = ("label", "labels", "class", "target", "sentiment", "category", "intent", "topic", "emotion")
TEXTS = (
    "text", "sentence", "content", "document", "review", "question", "comment", "tweet", "message", "body", "utterance",
)  # fmt: skip
IMAGES = ("image", "img", "file_name", "path")
"""Where labels, texts and images usually stand."""

MOST_CLASSES, LONGEST_CLASS = 100, 60
"""A column of another name is taken for labels if its values repeat, and are neither many nor long."""

Answers = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Table:
    """The rows of a source.

    Args:
        rows: at least one.
        place: the source, for messages.
        whole: whether these are all rows of the source, or the first ones.
        taken: filled by ``find``: which column was taken for what.
    """

    rows: Rows
    place: str
    whole: bool = True
    taken: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the first row, those inside of mappings too."""
        found = []
        for name, value in self.rows[0].items():
            found.append(name)
            if isinstance(value, dict):
                found += [f"{name}.{inner}" for inner in value]
        return found

    def find(self, given: str | None, key: str, guesses: Sequence[str]) -> str:
        """The column that the user named in ``data.<key>``, or the first of ``guesses`` that is there.

        Raises:
            DataError: it is not there; the message has the columns that are.
        """
        columns = self.columns
        if given is not None:
            if given in columns:
                self.taken[key.removesuffix("_column")] = given
                return given
            near = difflib.get_close_matches(given, columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"data.{key}: {self.place} has no column {given!r}; it has {', '.join(columns)}{hint}")
        for guess in guesses:
            if guess in columns:
                self.taken[key.removesuffix("_column")] = guess
                return guess
        raise DataError(
            f"data.{key}: found no usable column in {self.place}, which has {', '.join(columns)}; name one in "
            f"data.{key}"
        )

    def find_labels(self, config: DataConfig, *others: str) -> str:
        """The column of labels: the one that is named, one of a usual name, or the only one whose values repeat.

        Raises:
            DataError: there is none, or there are several.
        """
        repeating = () if config.label_column or self.labelled(config) else self.repeating(config)
        if len(repeating) > 1:
            raise DataError(
                f"data.label_column: {self.place} has several columns that may be labels: {', '.join(repeating)}; name "
                "one in data.label_column"
            )
        return self.find(config.label_column, "label_column", (*LABELS, *others, *repeating))

    def named(self, given: str | None, usual: Sequence[str]) -> str | None:
        """The column that ``find`` would take; None where it would refuse."""
        return next((name for name in ((given,) if given else usual) if name in self.columns), None)

    def labelled(self, config: DataConfig) -> str | None:
        """The column of labels that is named, or has a usual name; None where there is none."""
        return self.named(config.label_column, LABELS)

    def repeating(self, config: DataConfig) -> tuple[str, ...]:
        """Columns of single words or whole numbers whose values repeat, other than texts and images that are known."""
        named = {config.text_column, config.pair_column, config.image_column, *TEXTS, *IMAGES}
        first, found = self.rows[:FIRST], []
        for name in self.rows[0]:
            values = [row.get(name) for row in first]
            short = name not in named and all(
                _is_class(value) and len(str(value)) <= LONGEST_CLASS and "\n" not in str(value) for value in values
            )
            if short and 2 <= len(set(map(str, values))) <= min(MOST_CLASSES, len(values) // 2):
                found.append(name)
        return tuple(found)

    def told(self) -> str:
        """Which columns were taken for what, and which were not read; "" where none was taken."""
        if not self.taken:
            return ""
        read = {name.partition(".")[0] for name in self.taken.values()}
        rest = [name for name in self.rows[0] if name not in read]
        unread = f"; not read: {', '.join(rest)}" if rest else ""
        return f" ({', '.join(f'{what} from {name!r}' for what, name in self.taken.items())}{unread})"

    def values(self, column: str) -> list[Any]:
        """What the rows have in this column; None where a row lacks it."""
        if column in self.rows[0]:
            return [row.get(column) for row in self.rows]
        outer, _, inner = column.partition(".")
        outers = [row.get(outer) for row in self.rows]
        return [value.get(inner) if isinstance(value, dict) else None for value in outers]

    def texts(self, column: str) -> tuple[str, ...]:
        """Texts, none of them empty."""
        return tuple(self._checked(column, "text", lambda value: isinstance(value, str) and bool(value.strip())))

    def text_columns(self, config: DataConfig, label_column: str | None) -> dict[str, tuple[str, ...]]:
        """The text column and, where one is named, that of second sentences; the only column of texts needs no name."""
        only = self.text_like(config, label_column)
        more = only if len(only) == 1 else ()
        columns = {"text": self.texts(self.find(config.text_column, "text_column", (*TEXTS, *more)))}
        if config.pair_column is not None:
            columns["pair"] = self.texts(self.find(config.pair_column, "pair_column", ()))
        return columns

    def text_like(self, config: DataConfig, label_column: str | None) -> tuple[str, ...]:
        """Columns that may be the text: the only one of texts, or those with sentences."""
        taken = {label_column, config.pair_column, *IMAGES}
        texts = [name for name, value in self.rows[0].items() if name not in taken and isinstance(value, str)]
        if len(texts) < 2:
            return tuple(texts)
        first = self.rows[:FIRST]
        spaced = [name for name in texts if 2 * sum(" " in str(row.get(name)).strip() for row in first) > len(first)]
        repeating = self.repeating(config)
        return tuple(name for name in spaced if name not in repeating)

    def text_column(self, config: DataConfig, label_column: str | None) -> str | None:
        """The column that ``text_columns`` would take; None where it would refuse."""
        likely = self.text_like(config, label_column)
        found = self.named(config.text_column, (*TEXTS, *(likely if len(likely) == 1 else ())))
        texts = found is not None and all(isinstance(value, str) for value in self.values(found)[:FIRST])
        return found if texts else None

    def images(self, config: DataConfig) -> tuple[StoredImage, ...]:
        """Images: paths of files (relative ones from the table's folder), encoded bytes, or pixels."""
        column = self.find(config.image_column, "image_column", IMAGES)
        images = []
        for number, value in enumerate(self.values(column), start=1):
            image = stored_image(value, Path(self.place), number, config.max_image_pixels)
            if image is None:
                raise DataError(
                    f"data.source: {self.place}: sample {number} has no image in column {column!r}; give the path of a "
                    "file, or encoded bytes"
                )
            images.append(image)
        return tuple(images)

    def numbers(self, column: str) -> tuple[float, ...]:
        """Finite numbers."""
        advice = "; regression needs one for each sample"
        return tuple(float(value) for value in self._checked(column, "finite number", is_number, advice))

    def classes(self, column: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Indices of classes, and the names that they are indices into."""
        values = self._checked(column, "class", _is_class, "; classes are strings or integers")
        names = class_names(map(str, values))
        if len(names) < 2 and self.whole:
            raise DataError(
                f"data.source: {self.place}: column {column!r} has one class only ({names[0]!r}); two are needed"
            )
        index = {name: position for position, name in enumerate(names)}
        return tuple(index[str(value)] for value in values), names

    def words(self, column: str) -> tuple[tuple[str, ...], ...]:
        """Lists of words, none of them empty."""

        def is_words(value: Any) -> bool:
            return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(word, str) for word in value)

        advice = "; token classification needs lists, which .jsonl and .parquet have"
        return tuple(map(tuple, self._checked(column, "list of words", is_words, advice)))

    def tags(
        self, column: str, words: Sequence[tuple[str, ...]]
    ) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
        """For each sample the class of each of its words, and the names of the classes."""

        def is_tags(value: Any) -> bool:
            return isinstance(value, (list, tuple)) and all(map(_is_class, value))

        values = self._checked(column, "list of tags", is_tags, "; tags are strings or integers")
        for number, (tags, sample) in enumerate(zip(values, words, strict=True), start=1):
            if len(tags) != len(sample):
                raise DataError(
                    f"data.source: {self.place}: sample {number} has {len(sample)} words and {len(tags)} tags; every "
                    "word needs one"
                )
        names = class_names(str(tag) for tags in values for tag in tags)
        index = {name: position for position, name in enumerate(names)}
        return tuple(tuple(index[str(tag)] for tag in tags) for tags in values), names

    def answers(self, column: str, contexts: Sequence[str]) -> tuple[Answers, ...]:
        """For each sample its answers as (first character, text), from what SQuAD has: ``{"text": [...],
        "answer_start": [...]}``, or from a list of ``{"text", "answer_start"}``; empty lists where there is no answer.
        """
        found = []
        for number, (value, context) in enumerate(zip(self.values(column), contexts, strict=True), start=1):
            answers = _answers(value)
            if answers is None:
                raise DataError(
                    f"data.source: {self.place}: sample {number} has no answers in column {column!r}, got {value!r}; "
                    'give {"text": ["..."], "answer_start": [0]}, with empty lists where there is no answer'
                )
            for start, text in answers:
                if not text or context[start : start + len(text)] != text:
                    raise DataError(
                        f"data.source: {self.place}: sample {number}: the context has "
                        f"{context[max(0, start) : max(0, start) + len(text)]!r} at character {start}, not the answer "
                        f"{text!r}; answer_start counts characters from 0"
                    )
            found.append(answers)
        return tuple(found)

    def _checked(self, column: str, kind: str, fits: Callable[[Any], bool], advice: str = "") -> list[Any]:
        values = self.values(column)
        for number, value in enumerate(values, start=1):
            if not fits(value):
                raise DataError(
                    f"data.source: {self.place}: sample {number} has no {kind} in column {column!r}, got "
                    f"{_short(value)}{advice}"
                )
        return values


def class_names(labels: Any) -> tuple[str, ...]:
    """Every name once: whole numbers first, by their size, then words by the alphabet."""
    names = set(labels)
    return tuple(sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)))


def is_number(value: Any) -> bool:
    """Whether the value is a finite number, or a text that is one."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_class(value: Any) -> bool:
    return isinstance(value, (str, int)) and value != ""


def _answers(value: Any) -> Answers | None:
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
