"""Columns as published data sets name them, read without a setting."""

from __future__ import annotations

from typing import Any

import pytest

from layerlens.config import DataConfig
from layerlens.data import Dataset
from layerlens.data.read import dataset_of
from layerlens.data.rows import SourceRows
from layerlens.registry import TASKS

N = 8


def read(task: str, row: dict[str, Any], **settings: Any) -> Dataset:
    config = DataConfig(source="rows.jsonl", **settings)
    return dataset_of(SourceRows.of([row] * N), "rows.jsonl", config, TASKS[task].read)


@pytest.mark.parametrize(
    ("row", "source", "target"),
    [
        ({"translation": {"en": "a day", "de": "ein Tag"}, "id": "7"}, "a day", "ein Tag"),
        ({"id": "7", "eng_Latn": "a day", "fra_Latn": "un jour"}, "a day", "un jour"),
        ({"inputs": "add 1 and 2", "targets": "3"}, "add 1 and 2", "3"),
        ({"article": "long", "highlights": "short", "id": "x"}, "long", "short"),
    ],
)
def test_texts_and_what_is_made_of_them(row: dict[str, Any], source: str, target: str) -> None:
    dataset = read("seq2seq", row)
    assert (dataset.texts[0], dataset.labels[0]) == (source, target)


def test_the_other_way_of_a_translation_is_said_and_can_be_set() -> None:
    row = {"translation": {"en": "a day", "de": "ein Tag"}}
    reading = read("seq2seq", row).reading
    assert reading is not None
    assert "data.text_column: translation.de" in reading.notes[0]
    turned = read("seq2seq", row, text_column="translation.de", label_column="translation.en")
    assert (turned.texts[0], turned.labels[0]) == ("ein Tag", "a day")


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"problem": "2x = 4", "solution": "Halve it: x = 2.", "answer": "2"}, "2x = 4", "Halve it: x = 2."),
        ({"inputs": "add 1 and 2", "targets": "3"}, "add 1 and 2", "3"),
        ({"query": "who?", "response": "Ada"}, "who?", "Ada"),
    ],
)
def test_questions_and_answers(row: dict[str, Any], question: str, answer: str) -> None:
    dataset = read("causal-lm", row)
    assert (dataset.columns["question"][0], dataset.columns["answer"][0]) == (question, answer)


def test_code_goes_on_from_its_prompt() -> None:
    dataset = read("causal-lm", {"task_id": "0", "prompt": "def f():", "canonical_solution": " return 1"})
    assert (dataset.columns["prompt"][0], dataset.columns["completion"][0]) == ("def f():", " return 1")


@pytest.mark.parametrize("separator", [";", "|", "; "])
def test_classes_in_one_text_are_several(separator: str) -> None:
    rows = [{"text": "a film", "genres": one} for one in ("drama", f"drama{separator}crime", "crime", "none") * 2]
    config = DataConfig(source="rows.csv", label_column="genres")
    dataset = dataset_of(SourceRows.of(rows), "rows.csv", config, TASKS["sequence-classification"].read)
    assert dataset.label_names == ("crime", "drama")
    assert dataset.labels[:4] == ((1,), (0, 1), (0,), ())
    assert dataset.reading is not None
    assert "separates the classes of a sample in column 'genres'" in dataset.reading.notes[0]


def test_a_comma_is_part_of_a_class() -> None:
    rows = [{"text": "a", "label": one} for one in ("arts, crafts", "sports") * 4]
    config = DataConfig(source="rows.csv")
    dataset = dataset_of(SourceRows.of(rows), "rows.csv", config, TASKS["sequence-classification"].read)
    assert dataset.label_names == ("arts, crafts", "sports")
