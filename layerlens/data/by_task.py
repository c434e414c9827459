"""What each task reads from the rows of a source: its inputs, its targets, and the columns where they usually stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from layerlens.config import DataConfig
from layerlens.data.columns import Table
from layerlens.data.dataset import Dataset
from layerlens.data.images import stored_image
from layerlens.exceptions import DataError

LABELS = ("label", "labels", "class", "target")
TEXTS = ("text", "sentence", "content", "document", "review", "question")
WORDS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels")
SOURCES = ("source", "text", "document", "article", "dialogue", "input")
IMAGES = ("image", "img", "file_name", "path")
TARGETS = ("target", "summary", "highlights", "translation", "output")


def classified_texts(table: Table, config: DataConfig) -> Dataset:
    """Texts or pairs, and their classes."""
    label_column = table.find(config.label_column, "label_column", LABELS)
    columns = _texts(table, config, TEXTS, label_column)
    labels, names = table.classes(label_column)
    return Dataset(columns, labels, names, table.place)


def rated_texts(table: Table, config: DataConfig) -> Dataset:
    """Texts or pairs, and a number for each."""
    label_column = table.find(config.label_column, "label_column", (*LABELS, "score"))
    return Dataset(_texts(table, config, TEXTS, label_column), table.numbers(label_column), (), table.place)


def plain_texts(table: Table, config: DataConfig) -> Dataset:
    """Texts that are their own targets."""
    columns = _texts(table, config, TEXTS, None)
    return Dataset(columns, (None,) * len(table.rows), (), table.place)


def tagged_words(table: Table, config: DataConfig) -> Dataset:
    """Lists of words, and a tag for each word."""
    words = table.words(table.find(config.text_column, "text_column", WORDS))
    tags, names = table.tags(table.find(config.label_column, "label_column", TAGS), words)
    return Dataset({"words": words}, tags, names, table.place)


def sequence_pairs(table: Table, config: DataConfig) -> Dataset:
    """Source texts and target texts."""
    source = table.find(config.text_column, "text_column", SOURCES)
    target = table.find(config.label_column, "label_column", TARGETS)
    return Dataset({"text": table.texts(source)}, table.texts(target), (), table.place)


def answered_questions(table: Table, config: DataConfig) -> Dataset:
    """Questions, their contexts, and the answers in them."""
    questions = table.texts(table.find(config.text_column, "text_column", ("question",)))
    contexts = table.texts(table.find(config.pair_column, "pair_column", ("context",)))
    answers = table.answers(table.find(config.label_column, "label_column", ("answers",)), contexts)
    return Dataset({"text": questions, "pair": contexts}, answers, (), table.place)


def classified_images(table: Table, config: DataConfig) -> Dataset:
    """Images (paths or encoded bytes) and their classes."""
    column = table.find(config.image_column, "image_column", IMAGES)
    labels, names = table.classes(table.find(config.label_column, "label_column", LABELS))
    images = []
    for number, value in enumerate(table.values(column), start=1):
        image = stored_image(value, Path(table.place), number, config.max_image_pixels)
        if image is None:
            raise DataError(
                f"data.source: {table.place}: sample {number} has no image in column {column!r}; give the path of a "
                "file, or encoded bytes"
            )
        images.append(image)
    return Dataset({"image": tuple(images)}, labels, names, table.place)


def _texts(
    table: Table, config: DataConfig, guesses: Sequence[str], label_column: str | None
) -> dict[str, tuple[str, ...]]:
    """The text column and, where one is named, that of second sentences; the only column of texts needs no name."""
    first = table.rows[0]
    taken = (label_column, config.pair_column)
    only = [name for name in first if name not in taken and isinstance(first[name], str)]
    more = tuple(only) if len(only) == 1 else ()
    columns = {"text": table.texts(table.find(config.text_column, "text_column", (*guesses, *more)))}
    if config.pair_column is not None:
        columns["pair"] = table.texts(table.find(config.pair_column, "pair_column", ()))
    return columns


READ: dict[str, Callable[[Table, DataConfig], Dataset]] = {
    "sequence-classification": classified_texts,
    "regression": rated_texts,
    "token-classification": tagged_words,
    "question-answering": answered_questions,
    "causal-lm": plain_texts,
    "masked-lm": plain_texts,
    "seq2seq": sequence_pairs,
    "image-classification": classified_images,
}
"""Task -> how its samples are read from a table."""
