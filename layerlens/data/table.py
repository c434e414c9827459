"""From rows to columns: which column, and what stands in it, with the sample that has something else.

A column inside a mapping has a dotted name: ``translation.en``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from layerlens.config import DataConfig
from layerlens.data.images import Check, StoredImage, stored_image
from layerlens.data.rows import FIRST, Rows
from layerlens.data.sounds import SoundCheck, StoredSound, folders_beside, stored_sound
from layerlens.data.values import (
    NO_CLASS,
    Answers,
    answers_of,
    as_list,
    class_names,
    is_bit,
    is_class,
    is_gap,
    is_number,
    names_of,
    separator_of,
    short,
)
from layerlens.exceptions import DataError, DataNotFoundError

LABELS = ("label", "labels", "class", "target", "sentiment", "category", "intent", "topic", "emotion")
TEXTS = (
    "text", "sentence", "content", "document", "review", "question", "comment", "tweet", "message", "body", "utterance",
)  # fmt: skip
IMAGES = ("image", "img", "file_name", "path")
SOUNDS = (
    "audio",
    "sound",
    "audio_path",
    "audio_file",
    "audio_filepath",
    "wav",
    "file",
    "filename",
    "file_name",
    "path",
)
"""Where labels, texts, images and clips of sound usually stand."""

MOST_CLASSES, LONGEST_CLASS = 100, 60
"""A column of another name is taken for labels if its values repeat, and are neither many nor long."""

INDEX = re.compile(r"Unnamed: \d+|__index_level_\d+__|index")
"""Names of the columns that pandas writes its index to."""


@dataclass(frozen=True)
class Table:
    """The rows of a source. A row that has not what is asked of it is left out, with its reason (``dataset_of``).

    Args:
        rows: at least one.
        place: the source, for messages.
        numbers: the place of each row in the source, counted from 1.
        left_out: place in ``rows`` of those that cannot be used, with the reason.
        used: the columns that were read.
        parts: by the name of a column, what ``find`` took it for.
        notes: what the user should know.
        whole: whether these are all rows of the source, or the first ones.
    """

    rows: Rows
    place: str
    numbers: Sequence[int] = ()
    left_out: dict[int, str] = field(default_factory=dict)
    used: dict[str, None] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict, compare=False)
    notes: list[str] = field(default_factory=list)
    whole: bool = True

    @cached_property
    def counts(self) -> dict[str, int]:
        """Columns of all rows, those inside of mappings too, each with how many rows have something in it."""
        found: dict[str, int] = {}
        for row in self.rows:
            for name, value in row.items():
                found[name] = found.get(name, 0) + (value is not None)
                if isinstance(value, dict):
                    for inner, part in value.items():
                        dotted = f"{name}.{inner}"
                        found[dotted] = found.get(dotted, 0) + (part is not None)
        return found

    @property
    def columns(self) -> list[str]:
        """Names of the columns of all rows, those inside of mappings too."""
        return list(self.counts)

    @property
    def unused(self) -> list[str]:
        """Columns that nothing was read of; of a mapping of which parts were read, the other parts."""
        unread = [name for name in self.columns if name not in self.used]
        outside = [name for name in unread if name.partition(".")[0] not in self.used or name in self._top]
        whole = [name for name in outside if not any(one.startswith(f"{name}.") for one in self.used)]
        return [name for name in whole if name in self._top or name.partition(".")[0] not in whole]

    @cached_property
    def _top(self) -> dict[str, None]:
        return {name: None for row in self.rows for name in row}

    def filled(self, column: str) -> bool:
        """Whether at least half of the rows have something in this column."""
        return 2 * self.counts.get(column, 0) >= len(self.rows)

    def find(self, given: str | list[str] | None, key: str, guesses: Sequence[str]) -> str:
        """The column that the user named in ``data.<key>``, or the first of ``guesses`` that is there: in most rows,
        else in some.

        Raises:
            DataError: it is not there; the message has the columns that are.
        """
        columns = self.columns
        if isinstance(given, list):
            if len(given) != 1:
                raise DataError(f"data.{key}: names {len(given)} columns ({', '.join(given)}); this task takes one")
            given = given[0]
        if given is not None:
            if given in columns:
                self.parts[given] = key.removesuffix("_column")
                return given
            near = difflib.get_close_matches(given, columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"data.{key}: {self.place} has no column {given!r}; it has {', '.join(columns)}{hint}")
        for guess in sorted(guesses, key=lambda name: not self.filled(name)):
            if guess in columns:
                self.parts[guess] = key.removesuffix("_column")
                return guess
        raise DataError(
            f"data.{key}: found no usable column in {self.place}, which has {', '.join(columns)}; name one in "
            f"data.{key}"
        )

    def find_labels(self, config: DataConfig) -> str:
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
        return self.find(config.label_column, "label_column", (*LABELS, *repeating))

    def named(self, given: str | list[str] | None, usual: Sequence[str]) -> str | None:
        """The column that ``find`` would take; None where it would refuse."""
        names = [given] if isinstance(given, str) else given or sorted(usual, key=lambda name: not self.filled(name))
        return next((name for name in names if name in self.columns), None)

    def labelled(self, config: DataConfig) -> str | None:
        """The column of labels that is named, or has a usual name; None where there is none."""
        return self.named(config.label_column, LABELS)

    def repeating(self, config: DataConfig) -> tuple[str, ...]:
        """Columns of single words or whole numbers whose values repeat, other than texts and images that are known."""
        named = {config.text_column, config.pair_column, config.image_column, config.audio_column}
        named |= {*TEXTS, *IMAGES, *SOUNDS}
        found = []
        for name in self._top:
            values = [row[name] for row in self.rows[:FIRST] if row.get(name) is not None]
            short_ones = name not in named and all(
                is_class(value) and len(str(value)) <= LONGEST_CLASS and "\n" not in str(value) for value in values
            )
            if short_ones and 2 <= len(set(map(str, values))) <= min(MOST_CLASSES, len(values) // 2):
                found.append(name)
        return tuple(found)

    def values(self, column: str) -> list[Any]:
        """What the rows have in this column, which is then one that is used; None where a row lacks it."""
        self.used[column] = None
        return self.peek(column)

    def peek(self, column: str) -> list[Any]:
        """The same of a column that need not be used."""
        if column in self._top:
            return [row.get(column) for row in self.rows]
        outer, _, inner = column.partition(".")
        outers = [row.get(outer) for row in self.rows]
        return [value.get(inner) if isinstance(value, dict) else None for value in outers]

    def texts(self, column: str) -> tuple[str, ...]:
        """Texts, none of them empty."""
        return tuple(self._checked(column, "text", lambda value: isinstance(value, str) and bool(value.strip()), ""))

    def text_columns(self, config: DataConfig, label_column: str | None) -> dict[str, tuple[str, ...]]:
        """The text column and, where one is named, that of second sentences; the only column of texts needs no name."""
        likely = self.text_like(config, label_column)
        more = likely if len(likely) == 1 else ()
        columns = {"text": self.texts(self.find(config.text_column, "text_column", (*TEXTS, *more)))}
        if config.pair_column is not None:
            columns["pair"] = self.texts(self.find(config.pair_column, "pair_column", ()))
        return columns

    def text_like(self, config: DataConfig, label_column: str | None) -> tuple[str, ...]:
        """Columns that may be the text: the only one of texts, or those with sentences."""
        taken = {label_column, config.pair_column, *IMAGES, *SOUNDS}
        texts = [name for name in self._top if name not in taken and self._is_text(name)]
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
        return found if found is not None and self._is_text(found) else None

    def _is_text(self, column: str) -> bool:
        """Whether most of what stands in a column is text; an index that pandas wrote is none."""
        n = sum(isinstance(value, str) for value in self.peek(column))
        return n > 0 and 2 * n >= self.counts[column] and INDEX.fullmatch(column) is None

    def images(self, config: DataConfig) -> tuple[StoredImage | None, ...]:
        """Images: paths of files (relative ones from the table's folder), encoded bytes, or pixels."""
        column = self.find(config.image_column, "image_column", IMAGES)
        images: list[StoredImage | None] = []
        check = Check()
        for place, value in enumerate(self.values(column)):
            image, reason = None, f"has no image in column {column!r}, got {short(value)}"
            try:
                image = stored_image(value, Path(self.place), self.number(place), config.max_image_pixels)
            except DataNotFoundError as error:
                reason = str(error)
            if image is None:
                self.leave_out(place, f"{reason}; give the path of a file, or encoded bytes")
            elif fault := check.fault(image):
                self.leave_out(place, f"has an image that {fault}, got {image.name}")
            images.append(image)
        self.notes.extend(check.notes)
        return tuple(images)

    def sounds(self, config: DataConfig) -> tuple[StoredSound | None, ...]:
        """Clips of sound: paths of files (relative ones from the table's folder), encoded bytes, or samples."""
        column = self.find(config.audio_column, "audio_column", SOUNDS)
        clips: list[StoredSound | None] = []
        check, folders = SoundCheck(), folders_beside(Path(self.place))
        for place, value in enumerate(self.values(column)):
            clip, reason = None, f"has no clip of sound in column {column!r}, got {short(value)}"
            try:
                clip = stored_sound(value, folders, Path(self.place), self.number(place))
            except DataNotFoundError as error:
                reason = str(error)
            if clip is None:
                self.leave_out(place, f"{reason}; give the path of a file, encoded bytes, or samples with their rate")
            elif fault := check.fault(clip):
                self.leave_out(place, f"has a clip that {fault}, got {clip.name}")
            clips.append(clip)
        self.notes.extend(check.notes)
        return tuple(clips)

    def numbers_of(self, column: str) -> tuple[float, ...]:
        """Finite numbers."""
        advice = "; regression needs one for each sample"
        return tuple(float(value) for value in self._checked(column, "finite number", is_number, 0.0, advice))

    def classes(self, column: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Indices of classes, and the names that they are indices into."""
        values = self._checked(column, "class", is_class, None, "; classes are strings or whole numbers")
        as_names = names_of(values)
        names = class_names(name for name in as_names if name is not None)
        self._check_several(column, names)
        if unsure := [name for name in names if name.casefold() in NO_CLASS]:
            self.notes.append(
                f"{unsure[0]!r} in column {column!r} is a class; if it means that a row has none, leave these rows out"
            )
        index = {name: position for position, name in enumerate(names)}
        return tuple(index.get(name or "", 0) for name in as_names), names

    def _check_several(self, column: str, names: Sequence[str]) -> None:
        if len(names) < 2 and self.whole and not self.left_out:
            raise DataError(
                f"data.source: {self.place}: column {column!r} has one class only ({names[0]!r}); two are needed"
            )

    def is_multi_label(self, column: str) -> bool:
        """Whether most of what stands in a column is lists, or texts with a separator between classes."""
        values = self.peek(column)
        listed = 2 * sum(as_list(value) is not None for value in values) > len(values)
        return listed or separator_of(values) is not None

    def label_sets(self, column: str) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
        """The classes of each sample, and all of their names: from lists of names, from texts such as ``cat;dog``, or
        from one 0 or 1 for each class.

        A list of nothing but 0 and 1, as long as all others, is of the last kind; its classes are 0, 1, 2 ...
        """
        values = self.values(column)
        separator = separator_of(values)
        if separator is not None:
            self.notes.append(f"multi-label: {separator!r} separates the classes of a sample in column {column!r}")
        lists = [as_list(value, separator) for value in values]
        sound = [one for one in lists if one is not None]
        width = len(sound[0]) if sound else 0
        if width > 1 and all(len(one) == width and all(map(is_bit, one)) for one in sound):
            names: tuple[str, ...] = tuple(map(str, range(width)))
            lists = [None if one is None else [i for i, bit in enumerate(one) if float(bit)] for one in lists]
        else:
            names = ()
        for place, one in enumerate(lists):
            if one is None or not all(map(is_class, one)):
                lists[place] = []
                self.leave_out(place, f"has no list of classes in column {column!r}, got {short(values[place])}")
        if names:
            return tuple(tuple(one or ()) for one in lists), names
        flat = iter(names_of([value for one in lists for value in one or ()]))
        as_names = [[next(flat) for _ in one or ()] for one in lists]
        names = class_names(name for one in as_names for name in one)
        self._check_several(column, names or ("",))
        index = {name: position for position, name in enumerate(names)}
        return tuple(tuple(sorted({index[str(name)] for name in one})) for one in as_names), names

    def bit_columns(self) -> list[str]:
        """The columns that have nothing but 0 and 1, and gaps."""
        cells = {n: [row.get(n) for row in self.rows] for n in self._top if self.filled(n)}
        return [n for n, values in cells.items() if all(is_gap(value) or is_bit(value) for value in values)]

    def bits(self, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """For each sample the places in ``names`` of the columns that have a 1."""
        advice = "; a column for each class says whether a sample is of it"
        columns = [self._checked(name, "0 or 1", is_bit, 0, advice) for name in names]
        return tuple(tuple(i for i, bit in enumerate(row) if float(bit)) for row in zip(*columns, strict=True))

    def words(self, column: str) -> tuple[tuple[str, ...], ...]:
        """Lists of words, none of them empty."""

        def is_words(value: Any) -> bool:
            words = as_list(value)
            return bool(words) and all(isinstance(word, str) for word in words or ())

        advice = "; token classification needs lists, which .jsonl and .parquet have, or a .conll file"
        values = self._checked(column, "list of words", is_words, [], advice)
        return tuple(tuple(as_list(value) or ()) for value in values)

    def tags(
        self, column: str, words: Sequence[tuple[str, ...]]
    ) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
        """For each sample the class of each of its words, and the names of the classes."""

        def is_tags(value: Any) -> bool:
            tags = as_list(value)
            return tags is not None and all(map(is_class, tags))

        advice = "; tags are strings or whole numbers"
        values = [as_list(value) or [] for value in self._checked(column, "list of tags", is_tags, [], advice)]
        for place, (tags, sample) in enumerate(zip(values, words, strict=True)):
            if len(tags) != len(sample):
                self.leave_out(place, f"has {len(sample)} words and {len(tags)} tags; every word needs one")
        flat = iter(names_of([tag for tags in values for tag in tags]))
        as_names = [[next(flat) for _ in tags] for tags in values]
        names = class_names(name for one in as_names for name in one)
        index = {name: position for position, name in enumerate(names)}
        return tuple(tuple(index[str(name)] for name in one) for one in as_names), names

    def answers(self, column: str, contexts: Sequence[str]) -> tuple[Answers, ...]:
        """For each sample its answers as (first character, text), from what SQuAD has: ``{"text": [...],
        "answer_start": [...]}``, or from a list of ``{"text", "answer_start"}``; empty lists where there is no answer.
        """
        found = []
        for place, (value, context) in enumerate(zip(self.values(column), contexts, strict=True)):
            answers = answers_of(value)
            if answers is None:
                self.leave_out(
                    place, f"has no answers in column {column!r}, got {short(value)}; give "
                    '{"text": ["..."], "answer_start": [0]}, with empty lists where there is no answer',
                )  # fmt: skip
            for start, text in answers or ():
                if not text or context[start : start + len(text)] != text:
                    self.leave_out(
                        place, f"is not right: the context has "
                        f"{context[max(0, start) : max(0, start) + len(text)]!r} at character {start}, not the answer "
                        f"{text!r}; answer_start counts characters from 0",
                    )  # fmt: skip
            found.append(answers or ())
        return tuple(found)

    def number(self, place: int) -> int:
        """The place in the source, counted from 1, of a row of this table."""
        return self.numbers[place] if self.numbers else place + 1

    def leave_out(self, place: int, reason: str) -> None:
        """The row at this place cannot be used; the first reason is kept. It reads on after ``sample 7``."""
        self.left_out.setdefault(place, reason)

    def without_left_out(self) -> Table:
        """The rows that can be used."""
        kept = [place for place in range(len(self.rows)) if place not in self.left_out]
        numbers = [self.number(place) for place in kept]
        return Table([self.rows[place] for place in kept], self.place, numbers, whole=self.whole)

    def _checked(
        self, column: str, kind: str, fits: Callable[[Any], bool], instead: Any, advice: str = ""
    ) -> list[Any]:
        """The values, with ``instead`` where one does not fit and its row is left out."""
        values = self.values(column)
        for place, value in enumerate(values):
            if not fits(value):
                self.leave_out(place, f"has no {kind} in column {column!r}, got {short(value)}{advice}")
                values[place] = instead
        return values
