"""One odd row never ends a run: it is left out, counted and named; columns are those of all rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerlens.config import DataConfig
from layerlens.data import Dataset, load_dataset
from layerlens.exceptions import DataError


def load(tmp_path: Path, rows: list[Any], task: str = "sequence-classification", **options: Any) -> Dataset:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_dataset(DataConfig(source=str(path), **options), None, task)


GOOD = [{"text": f"text {n}", "label": n % 2} for n in range(6)]


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({}, "has no text in column 'text', got None"),
        ({"label": 1}, "has no text in column 'text', got None"),
        ({"text": "x"}, "has no class in column 'label', got None"),
        ({"text": "x", "label": None}, "has no class in column 'label', got None"),
        ({"text": "x", "label": float("nan")}, "has no class in column 'label', got nan"),
        ({"text": "x", "label": 0.5}, "has no class in column 'label', got 0.5"),
        ({"text": "x", "label": [1]}, "has no class in column 'label', got [1]"),
        ({"text": "x", "label": " "}, "has no class in column 'label', got ' '"),
        ({"text": ["x"], "label": 1}, "has no text in column 'text', got ['x']"),
        ({"text": "\n ", "label": 1}, "has no text in column 'text'"),
        ('{"text": "x", \n', "(line 3, column 14) is not JSON"),
        ("[1, 2]\n", "(line 3) must be a JSON object, got list"),
        ("[" * 5000 + "]" * 5000 + "\n", "(line 3)"),
    ],
)
def test_an_odd_row_is_left_out_and_named(tmp_path: Path, odd: Any, reason: str):
    dataset = load(tmp_path, [*GOOD[:2], odd, *GOOD[2:]])
    assert dataset.texts == tuple(row["text"] for row in GOOD)
    assert dataset.label_names == ("0", "1")
    assert dataset.labels == (0, 1) * 3
    assert dataset.reading is not None
    assert dataset.reading.total == 7
    assert list(dataset.reading.left_out) == [3]
    assert reason in dataset.reading.left_out[3]
    assert dataset.notes[0].startswith("data: left out 1 of 7 rows: sample 3 ")


def test_reasons_of_one_kind_are_counted_together_and_too_many_are_an_error(tmp_path: Path):
    odd = [{"text": "x", "label": value} for value in (0.25, 0.75)]
    dataset = load(tmp_path, [*GOOD, *odd, {"text": ""}])
    assert dataset.reading is not None
    assert [n for n, _ in dataset.reading.reasons] == [2, 1]
    with pytest.raises(DataError, match=r"sample 1 has no class in column 'label', got 0\.25.*2 of 4 samples cannot"):
        load(tmp_path, [*odd, *GOOD[:2]])
    with pytest.raises(DataError, match="has no samples"):
        load(tmp_path, [])


def test_the_first_row_does_not_decide_the_columns(tmp_path: Path):
    rows = [{"id": "0", "split": "train"}, *({"id": str(n), "text": f"t {n}", "split": "train"} for n in range(1, 6))]
    dataset = load(tmp_path, rows, "causal-lm")
    assert dataset.texts == tuple(f"t {n}" for n in range(1, 6))
    assert dataset.reading is not None
    assert dataset.reading.used == ("text",)
    assert dataset.reading.unused == ("id", "split")
    assert list(dataset.reading.left_out) == [1]
    rare = [{"text": None, "sentence": f"s {n}", "label": n % 2} for n in range(6)]
    rare[5] = {"text": "t", "label": 1}
    assert load(tmp_path, rare).texts == tuple(f"s {n}" for n in range(5))  # the column that most rows have


def test_columns_that_are_not_used_are_named_also_inside_of_mappings(tmp_path: Path):
    rows = [{"translation": {"en": f"e {n}", "de": f"d {n}", "fr": "f"}, "meta": {"id": n}} for n in range(4)]
    columns = {"text_column": "translation.en", "label_column": "translation.de"}
    dataset = load(tmp_path, rows, "seq2seq", **columns)
    assert dataset.reading is not None
    assert dataset.reading.used == ("translation.en", "translation.de")
    assert dataset.reading.unused == ("translation.fr", "meta")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0.0, 1.0, 0.0], ("0", "1")),
        (["0.0", "1.0", "0"], ("0", "1")),
        ([10, 9.0, 9], ("9", "10")),
        (["v1.0", "1.0", "1.0"], ("1.0", "v1.0")),
        ([True, False, True], ("False", "True")),
    ],
)
def test_floats_that_are_whole_numbers_are_classes(tmp_path: Path, values: list[Any], names: tuple[str, ...]):
    assert load(tmp_path, [{"text": "a", "label": value} for value in values]).label_names == names


def test_lists_of_words_that_a_csv_file_holds_as_text_are_read(tmp_path: Path):
    rows = [{"tokens": "['it', \"isn't\"]", "tags": "['O', 'B']"}, {"tokens": ["a"], "tags": ["O"]},
            {"tokens": ["a", "b"], "tags": ["O"]}, {"tokens": ["c"], "tags": ["O"]}]  # fmt: skip
    dataset = load(tmp_path, rows, "token-classification")
    assert dataset.columns["words"] == (("it", "isn't"), ("a",), ("c",))
    assert dataset.reading is not None
    assert "has 2 words and 1 tags" in dataset.reading.left_out[3]


def test_an_answer_that_is_not_in_its_context_is_left_out(tmp_path: Path):
    right = {"question": "q", "context": "the town", "answers": {"text": ["town"], "answer_start": [4]}}
    wrong = {**right, "answers": {"text": ["town"], "answer_start": [0]}}
    dataset = load(tmp_path, [right, wrong, right], "question-answering")
    assert len(dataset) == 2
    assert dataset.reading is not None
    assert "the context has 'the ' at character 0, not the answer 'town'" in dataset.reading.left_out[2]
