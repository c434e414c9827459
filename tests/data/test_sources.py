"""Reading labelled texts, and every way in which a file can be unusable."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlens.config import DataConfig
from layerlens.data import Dataset, load_dataset
from layerlens.data.load import MIN_CHARACTERS, PACKAGES, docstrings_of
from layerlens.exceptions import DataError, DataNotFoundError


def read(tmp_path: Path, name: str, content: str | bytes, **options: str) -> Dataset:
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
        ("d.docx", "x", {}, r"d\.docx is not \.jsonl, \.json, \.csv, \.tsv, \.parquet, \.arrow, \.txt or \.conll"),
        ("d.jsonl", "", {}, "has no samples"),
        ("d.jsonl", '{"text": "a"\n', {}, r"sample 1 \(line 1, column \d+\) is not JSON"),
        ("d.jsonl", "[1]\n", {}, "must be a JSON object, got int"),
        ("d.jsonl", '{"a": 1, "b": 2}\n', {}, r"data\.label_column: found no usable column in .*, which has a, b"),
        ("d.jsonl", '{"label": "x", "n": 2}\n', {}, r"data\.text_column: found no usable column"),
        ("d.csv", "text,label\na,x\n", {"text_column": "txet"}, "has no column 'txet'.*did you mean 'text'"),
        ("d.csv", "text,label\na,x\nb\n", {}, r"sample 2 \(line 3\) has 1 fields, and the header has 2"),
        ("d.csv", "text,label\na,x,z\n", {}, r"sample 1 \(line 2\) has 3 fields, and the header has 2"),
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
    with pytest.raises(DataNotFoundError, match=r"no file at .*/nowhere\.jsonl; give .*stdlib-docstrings$"):
        load_dataset(DataConfig(source="nowhere.jsonl"), tmp_path)
    (tmp_path / "reviews.csv").touch()
    with pytest.raises(DataNotFoundError, match=r"no file at .*/revews\.csv; give .*; did you mean reviews\.csv\?$"):
        load_dataset(DataConfig(source="revews.csv"), tmp_path)
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
    dataset = Dataset({"text": texts}, tuple(index % 2 for index in range(size)), ("a", "b"), "test")
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


def test_parquet_and_saved_data_sets_give_the_same_as_jsonl(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    content = {"text": ["one, two", "three"], "label": ["b", "a"]}
    rows = datasets.Dataset.from_dict(content)
    rows.to_parquet(tmp_path / "d.parquet")
    classes = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    numbered = datasets.Dataset.from_dict({"text": content["text"], "label": [1, 0]}, features=classes)
    numbered.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": numbered, "test": rows}).save_to_disk(tmp_path / "splits")
    for source in ("d.parquet", "saved", "splits"):
        dataset = load_dataset(DataConfig(source=source), tmp_path)
        assert dataset.texts == ("one, two", "three"), source
        assert dataset.label_names == ("a", "b"), source
        assert dataset.labels == (1, 0), source


def test_unusable_tables_and_directories_are_refused(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "d.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="is not a Parquet file"):
        load_dataset(DataConfig(source="d.parquet"), tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="not one that datasets' save_to_disk wrote"):
        load_dataset(DataConfig(source="folder"), tmp_path)
    only = datasets.Dataset.from_dict({"text": ["a"], "label": ["x"]})
    datasets.DatasetDict({"test": only}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="has the splits test and none named 'train'"):
        load_dataset(DataConfig(source="splits"), tmp_path)


def test_hub_names_that_cannot_be_loaded_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    datasets = pytest.importorskip("datasets")

    def load(path: str, name: str | None = None, *, split: str) -> object:
        if path == "org/known":
            return datasets.Dataset.from_dict({"text": [f"{split} 1", f"{split} 2"], "label": ["x", "y"]})
        raise FileNotFoundError(f"Couldn't find any data at {path}")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_dataset(DataConfig(source="hf:org/known:test"), tmp_path).texts == ("test 1", "test 2")
    assert load_dataset(DataConfig(source="hf:org/known"), tmp_path).texts == ("train 1", "train 2")
    with pytest.raises(DataNotFoundError, match="cannot load hf:org/none: Couldn't find any data"):
        load_dataset(DataConfig(source="hf:org/none"), tmp_path)


def test_second_sentences_are_part_of_a_sample(tmp_path: Path):
    content = "".join(f'{{"a": "same", "b": "other {n}", "label": {n % 2}}}\n' for n in range(40))
    dataset = read(tmp_path, "d.jsonl", content, text_column="a", pair_column="b")
    assert dataset.pairs[:2] == ("other 0", "other 1")
    calibration, head = dataset.split(10, 10, seed=0)
    assert not set(calibration.pairs) & set(head.pairs)
    alone = read(tmp_path, "e.jsonl", content, text_column="a")
    assert alone.fingerprint != dataset.fingerprint


def test_samples_that_are_all_the_same_are_not_all_test_data():
    same = [Dataset({"text": (text,) * 6}, (None,) * 6) for text in ("train", "valid", "x")]
    sides = [len(dataset.split_test()[0]) for dataset in same]
    assert sides == [6, 6, 6]  # "train" by itself is of the test split: its digest is below 15 %
    assert len(same[0].split(4, 0, seed=0)[0]) == 4
