"""Reading labelled texts, and every way in which a file can be unusable."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlens.config import DataConfig
from layerlens.data import TextDataset, load_dataset
from layerlens.data.stdlib_docstrings import MIN_CHARACTERS, PACKAGES, docstrings_of
from layerlens.exceptions import DataError, DataNotFoundError


def read(tmp_path: Path, name: str, content: str | bytes, **options: str) -> TextDataset:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_dataset(DataConfig(source=name, **options), tmp_path)


def test_jsonl_and_csv_give_the_same(tmp_path: Path):
    jsonl = '{"text": "one, two", "label": "b"}\n\n{"text": "three", "label": "a"}\n'
    csv = 'text,label\n"one, two",b\nthree,a\n'
    for dataset in (read(tmp_path, "d.jsonl", jsonl), read(tmp_path, "d.csv", csv)):
        assert dataset.texts == ("one, two", "three")
        assert dataset.label_names == ("a", "b")
        assert dataset.labels == (1, 0)


def test_integer_labels_keep_their_order(tmp_path: Path):
    rows = "".join(f'{{"text": "t{label}", "label": {label}}}\n' for label in (10, 2, 0))
    assert read(tmp_path, "d.jsonl", rows).label_names == ("0", "2", "10")


def test_the_only_text_column_is_found(tmp_path: Path):
    assert read(tmp_path, "d.csv", "body,target\nhello,x\nbye,y\n").texts == ("hello", "bye")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("d.txt", "x", {}, r"not \.jsonl or \.csv"),
        ("d.jsonl", "", {}, "has no samples"),
        ("d.jsonl", '{"text": "a"\n', {}, r"d\.jsonl:1:\d+: not JSON"),
        ("d.jsonl", "[1]\n", {}, "must be a JSON object, got list"),
        ("d.jsonl", '{"a": 1, "b": 2}\n', {}, r"data\.label_column: found no usable column in .*, which has a, b"),
        ("d.jsonl", '{"label": "x", "n": 2}\n', {}, r"data\.text_column: found no usable column"),
        ("d.csv", "text,label\na,x\n", {"text_column": "txet"}, "has no column 'txet'.*did you mean 'text'"),
        ("d.csv", "text,label\na,x\nb\n", {}, "record 3 has not the 2 fields"),
        ("d.csv", "text,label\na,x,z\n", {}, "record 2 has not the 2 fields"),
        ("d.jsonl", '{"text": "a", "label": "x"}\n{"text": " ", "label": "y"}\n', {}, "sample 2 has no text"),
        ("d.jsonl", '{"text": "a", "label": 1.5}\n', {}, "sample 1 has no class in column 'label', got 1.5"),
        ("d.jsonl", '{"text": "a", "label": "x"}\n' * 3, {}, "has one class only"),
        ("d.jsonl", b'{"text": "\xff", "label": "x"}', {}, "is not UTF-8"),
    ],
)
def test_unusable_files_are_refused_with_place_and_advice(tmp_path: Path, name, content, options, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, name, content, **options)


def test_missing_sources_are_not_found(tmp_path: Path):
    with pytest.raises(DataNotFoundError, match="no file at"):
        load_dataset(DataConfig(source="nowhere.jsonl"), tmp_path)
    with pytest.raises(DataNotFoundError, match="built in: builtin:stdlib-docstrings"):
        load_dataset(DataConfig(source="builtin:nothing"))


def test_stdlib_docstrings_are_real_labelled_and_repeatable():
    dataset = load_dataset(DataConfig(source="builtin:stdlib-docstrings"))
    assert len(dataset) > 1000
    assert set(dataset.labels) == set(range(len(PACKAGES)))
    assert len(set(dataset.texts)) == len(dataset)
    assert min(map(len, dataset.texts)) >= MIN_CHARACTERS
    import asyncio

    asyncio_texts = {t for t, label in zip(dataset.texts, dataset.labels, strict=True) if PACKAGES[label] == "asyncio"}
    assert asyncio.Queue.__doc__ is not None
    assert inspect.cleandoc(asyncio.Queue.__doc__) in asyncio_texts
    assert load_dataset(DataConfig(source="builtin:stdlib-docstrings")).fingerprint == dataset.fingerprint


def test_docstrings_come_in_source_order():
    source = '"""Module."""\ndef f():\n    """F\n    two."""\nclass C:\n    """C."""\n    def g(self): pass\n'
    assert docstrings_of(source) == ["Module.", "F\ntwo.", "C."]


@given(st.integers(2, 200), st.integers(0, 80), st.integers(0, 80), st.integers(0, 5))
def test_splits_are_disjoint_deterministic_and_leave_the_test_texts_alone(size, n_calibration, n_head, seed):
    texts = tuple(f"text {index}" for index in range(size))
    dataset = TextDataset(texts, tuple(index % 2 for index in range(size)), ("a", "b"), "test")
    try:
        calibration, head = dataset.split(n_calibration, n_head, seed)
    except DataError:
        return
    assert dataset.split(n_calibration, n_head, seed) == (calibration, head)
    assert not set(calibration.texts) & set(head.texts)
    assert len(calibration) <= n_calibration
    everything = dataset.split(size, 0, seed)[0].texts
    other_seed = dataset.split(size, 0, seed + 1)[0].texts
    assert set(everything) == set(other_seed)  # the test split does not depend on the seed
    assert set(calibration.texts) | set(head.texts) <= set(everything)
