"""Files as people find them: packed, without a line of names, joined, nested, in folders that mean something."""

from __future__ import annotations

import bz2
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from layerlens.config import DataConfig
from layerlens.data import Dataset, load_dataset
from layerlens.data.load import first_rows
from layerlens.exceptions import DataError

ROWS = [{"text": f"item {n} is here", "label": ("bad", "good")[n % 2]} for n in range(8)]
LINES = [f"{row['text']},{row['label']}" for row in ROWS]


def load(path: Path, task: str = "sequence-classification", **options: Any) -> Dataset:
    return load_dataset(DataConfig(source=str(path), **options), None, task)


def notes(dataset: Dataset) -> str:
    assert dataset.reading is not None
    return "; ".join((*dataset.reading.notes, *dataset.reading.left_out.values()))


def test_packed_files_are_read_as_what_is_in_them(tmp_path: Path):
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "d.jsonl").write_bytes(content)
    (tmp_path / "d.jsonl.bz2").write_bytes(bz2.compress(content))
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress(content))
    with pyarrow.output_stream(str(tmp_path / "d.jsonl.zst"), compression="zstd") as file:
        file.write(content)
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("inside/d.jsonl", content)
        archive.writestr("__MACOSX/._d.jsonl", b"x")
    wanted = load(tmp_path / "d.jsonl").fingerprint
    for name in ("d.jsonl.bz2", "d.jsonl.xz", "d.jsonl.zst", "d.zip"):
        assert load(tmp_path / name).fingerprint == wanted, name
    for name in ("d.jsonl.bz2", "d.jsonl.xz", "d.jsonl.zst", "d.zip"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
        with pytest.raises(DataError, match=r"cannot read|ends before|is not"):
            load(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.csv", "text,label")
        archive.writestr("b.csv", "text,label")
    with pytest.raises(DataError, match=r"two\.zip has 2 files \(a\.csv, b\.csv\); unpack it"):
        load(tmp_path / "two.zip")


def test_an_arrow_file_of_datasets_has_its_class_names(tmp_path: Path):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    datasets.Dataset.from_list(ROWS, features=features).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert load(file).label_names == ("bad", "good")
    (tmp_path / "other.arrow").write_bytes(b"x" * 64)
    with pytest.raises(DataError, match=r"not an \.arrow file"):
        load(tmp_path / "other.arrow")


def test_keys_that_arrow_adds_to_tool_calls_are_not_there(tmp_path: Path):
    import datasets

    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "find", "arguments": {"city": "Bonn"}}]
    turns = [[{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [call]}] for call in calls]
    rows = datasets.Dataset.from_list([{"messages": one, "images": [{"bytes": None, "path": "a"}]} for one in turns])
    rows.to_parquet(tmp_path / "d.parquet")
    rows.save_to_disk(str(tmp_path / "saved"))
    for place in ("d.parquet", "saved"):
        found = first_rows(DataConfig(source=str(tmp_path / place))).rows
        assert [row["messages"][1]["tool_calls"] for row in found] == [[call] for call in calls]
        assert found[0]["images"] == [{"bytes": None, "path": "a"}]


@pytest.mark.parametrize(
    ("lines", "n", "names", "said"),
    [
        (LINES, 8, ("bad", "good"), "looks like data"),
        (["0,1", *LINES], 8, ("bad", "good"), ""),
        (["text,label", *LINES[:4], "text,label", *LINES[4:]], 8, ("bad", "good"), "repeats the column names"),
        (["what it says,its label", *LINES], 8, ("bad", "good"), ""),
        (["text,label", *LINES, '"he said "so" again",good'], 8, ("bad", "good"), "is not CSV with the delimiter"),
    ],
)
def test_csv_without_names_or_with_them_twice(tmp_path: Path, lines: list[str], n: int, names: Any, said: str):
    (tmp_path / "d.csv").write_text("\n".join(lines) + "\n")
    dataset = load(tmp_path / "d.csv")
    assert (len(dataset), dataset.label_names) == (n, names)
    assert said in notes(dataset)
    assert bool(said) == bool(notes(dataset))


def test_decimal_commas_and_a_quote_that_is_never_closed(tmp_path: Path):
    (tmp_path / "d.csv").write_text("text;score\n" + "".join(f"item {n};{n},250\n" for n in range(8)))
    assert load(tmp_path / "d.csv", "regression").labels == tuple(n + 0.25 for n in range(8))
    (tmp_path / "d.csv").write_text('text,label\na b,good\n"c d,bad\ne f,good\n')
    with pytest.raises(DataError, match=r"d\.csv:3: not CSV .* unexpected end of data"):
        load(tmp_path / "d.csv")


@pytest.mark.parametrize("indent", [None, 1])
def test_squads_own_files(tmp_path: Path, indent: int | None):
    context = "Ada lived in London."
    questions = [
        {"id": "1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]},
        {"id": "2", "question": "When?", "answers": [], "is_impossible": True},
    ]
    articles = [{"title": f"t{n}", "paragraphs": [{"context": context, "qas": questions}]} for n in range(3)]
    (tmp_path / "d.json").write_text(json.dumps({"version": "v2.0", "data": articles}, indent=indent))
    dataset = load(tmp_path / "d.json", "question-answering")
    assert len(dataset) == 6
    assert dataset.labels[:2] == (((0, "Ada"),), ())


def test_a_folder_of_texts_for_each_class(tmp_path: Path):
    for split in ("train", "test"):
        for name in ("neg", "pos"):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(3):
                (tmp_path / split / name / f"{n}.txt").write_text(f"{split} {n}\nis {name}")
    dataset = load(tmp_path)
    assert sorted(set(dataset.texts)) == sorted(f"train {n}\nis {name}" for n in range(3) for name in ("neg", "pos"))
    assert dataset.label_names == ("neg", "pos")
    for n in range(3):
        (tmp_path / "train" / "neg" / f"{n}.txt").write_text("a long book\n" * 20_000)
    assert load(tmp_path, "masked-lm").reading.used == ("text",)  # type: ignore[union-attr]


def test_the_card_of_a_data_set_says_which_files_are_of_train(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for part, n in (("a", 6), ("b", 2)):
        (tmp_path / "data" / f"part_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:n]))
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {}\n    path: data/part_{}.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card.format("train", "a"))
    assert len(load(tmp_path)) == 6
    (tmp_path / "README.md").write_text(card.format("test", "b"))
    with pytest.raises(DataError, match="lists the splits test, and no file there is of train"):
        load(tmp_path)
