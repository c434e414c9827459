"""Files as people have them: each kind is read, and what is odd in one is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from layerlens.config import DataConfig
from layerlens.data import Dataset, load_dataset
from layerlens.data.rows import SourceRows
from layerlens.exceptions import DataError, DataNotFoundError

ROWS = [{"text": f"Grüße {n}, naïve café", "label": "b" if n % 2 else "a"} for n in range(8)]
TEXTS = tuple(row["text"] for row in ROWS)


def load(place: Path, task: str = "sequence-classification", **options: Any) -> Dataset:
    return load_dataset(DataConfig(source=place.name, **options), place.parent, task)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(delimiter.join(f'"{cell}"' for cell in row) + "\r\n" for row in cells)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", lines(ROWS)),
        ("d.ndjson", lines(ROWS)),
        ("d.json", lines(ROWS)),
        ("d.json", json.dumps(ROWS)),
        ("d.json", json.dumps(ROWS, indent=1, ensure_ascii=False)),
        ("d.jsonl", json.dumps(ROWS, indent=1)),
        ("d.json", json.dumps({"version": "1", "data": ROWS})),
        ("d.json", json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]})),
        ("d.json", json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]})),
        ("d.csv", table(ROWS)),
        ("d.csv", table(ROWS, ";")),
        ("d.csv", table(ROWS, "|")),
        ("d.tsv", table(ROWS, "\t")),
        ("d.csv", "sep=;\n" + table(ROWS, ";")),
        ("d.csv", table([{"": n, **row} for n, row in enumerate(ROWS)])),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_all_ways_to_write_rows_give_the_same(tmp_path: Path, name: str, content: str, encoding: str):
    (tmp_path / name).write_text(content, encoding=encoding, newline="")
    dataset = load(tmp_path / name)
    assert dataset.texts == TEXTS
    assert dataset.label_names == ("a", "b")
    assert dataset.labels == (0, 1) * 4
    with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
        file.write((tmp_path / name).read_bytes())
    assert load(tmp_path / f"{name}.gz").fingerprint == dataset.fingerprint


def test_encodings_are_named_or_found_and_said(tmp_path: Path):
    path = tmp_path / "d.csv"
    path.write_text(table(ROWS, ";"), encoding="cp1252", newline="")
    named = load(path, encoding="cp1252")
    assert named.texts == TEXTS
    found = load(path)
    assert found.texts == TEXTS
    assert found.reading is not None
    assert any("read as cp1252" in note for note in found.reading.notes)
    path.write_text(table(ROWS), encoding="utf-16-le", newline="")  # without a mark
    assert load(path).texts == TEXTS
    with pytest.raises(DataError, match=r"data\.encoding: Python knows no encoding 'windows'"):
        load(path, encoding="windows")
    path.write_bytes(b"text,label\n" + b"\xe4\xb8,a\n" * 3)
    with pytest.raises(DataError, match=r"data\.encoding: .* is not UTF-8 text: line 2, byte 11 of the file \(0xe4\)"):
        load(path)


def test_a_line_that_is_not_text_is_left_out_with_its_byte(tmp_path: Path):
    content = lines(ROWS).encode().splitlines(keepends=True)
    offset = len(b"".join(content[:2])) + len(b'{"text": "')
    content[2] = b'{"text": "\xff", "label": "a"}\n'
    (tmp_path / "d.jsonl").write_bytes(b"".join(content))
    dataset = load(tmp_path / "d.jsonl")
    assert dataset.texts == TEXTS[:2] + TEXTS[3:]
    assert dataset.reading is not None
    assert f"byte {offset} of the file (0xff) is not UTF-8" in dataset.reading.left_out[3]
    records = table(ROWS).encode().replace("Grüße 4".encode(), b"Gr\xfc\xdfe\n4")  # a record of two lines
    (tmp_path / "d.csv").write_bytes(records)
    assert load(tmp_path / "d.csv").texts == TEXTS[:4] + TEXTS[5:]


def test_columns_that_stand_twice_are_said_and_both_are_there(tmp_path: Path):
    (tmp_path / "d.csv").write_text("text,text,label\na,b,x\nc,d,y\ne,f,x\n")
    dataset = load(tmp_path / "d.csv")
    assert dataset.texts == ("a", "c", "e")
    assert dataset.reading is not None
    assert dataset.reading.notes == ("two columns are named 'text'; the second is text.1 here",)
    assert dataset.reading.unused == ("text.1",)
    assert load(tmp_path / "d.csv", text_column="text.1").texts == ("b", "d", "f")
    (tmp_path / "d.jsonl").write_text('{"text": "a", "text": "b", "label": "x"}\n{"text": "c", "label": "y"}\n')
    twice = load(tmp_path / "d.jsonl")
    assert twice.texts == ("b", "c")
    assert twice.reading is not None
    assert "key 'text' twice" in twice.reading.notes[0]


def test_shards_of_the_split_train_are_one_source(tmp_path: Path):
    folder = tmp_path / "cloned"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    for shard, rows in enumerate((ROWS[:3], ROWS[3:])):
        (folder / f"data/train-0000{shard}-of-00002.jsonl").write_text(lines(rows), encoding="utf-8")
    (folder / "data/test-00000-of-00001.jsonl").write_text(lines([{"text": "unseen", "label": "a"}]))
    dataset = load(folder)
    assert dataset.texts == TEXTS
    assert dataset.reading is not None
    assert "2 files of the folder: data/train-00000-of-00002.jsonl" in dataset.reading.notes[0]
    assert load(folder / "data").texts == TEXTS
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    (tmp_path / "shards").mkdir()
    for shard, rows in enumerate((ROWS[:3], ROWS[3:])):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"shards/train-{shard}.parquet")
    assert load(tmp_path / "shards").texts == TEXTS
    (tmp_path / "shards/more.csv").write_text(table(ROWS))
    with pytest.raises(DataError, match=r"files of several kinds \(\.csv, \.parquet\)"):
        load(tmp_path / "shards")


def test_folders_that_are_not_one_source_are_refused(tmp_path: Path):
    folder = tmp_path / "two"
    (folder / "main").mkdir(parents=True)
    (folder / "main/train.jsonl").write_text(lines(ROWS))
    card = "---\nconfigs:\n- config_name: main\n  data_files: main/train.jsonl\n- config_name: other\n---\n"
    (folder / "README.md").write_text(card)
    with pytest.raises(DataError, match=r"has the configurations main, other; name one, as in hf:.*/main:train"):
        load(folder)
    (tmp_path / "only").mkdir()
    (tmp_path / "only/test.jsonl").write_text(lines(ROWS))
    with pytest.raises(DataError, match="files of the splits test and none of train"):
        load(tmp_path / "only")


def test_configurations_of_the_hub_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[str, str | None, str]] = []

    class Rows(list[dict[str, Any]]):
        features: ClassVar[dict[str, Any]] = {}

        def cast_column(self, *_: Any) -> Rows:
            return self

    def fake(path: str, name: str | None = None, *, split: str) -> Rows:
        asked.append((path, name, split))
        if name is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'other']")
        if name != "main":
            raise ValueError(f"BuilderConfig '{name}' not found. Available: ['main', 'other']")
        return Rows(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_dataset(DataConfig(source="hf:openai/gsm8k/main:test"), tmp_path).texts == TEXTS
    assert asked == [("openai/gsm8k", "main", "test")]
    assert load_dataset(DataConfig(source="hf:gsm8k/main"), tmp_path).texts == TEXTS
    assert asked[-1] == ("gsm8k", "main", "train")
    (tmp_path / "ds").mkdir()
    assert load_dataset(DataConfig(source="hf:./ds/main:train"), tmp_path).texts == TEXTS
    assert asked[-1] == (str(tmp_path / "ds"), "main", "train")
    with pytest.raises(DataNotFoundError, match=r"has the configurations main, other; .* hf:openai/gsm8k/main:train"):
        load_dataset(DataConfig(source="hf:openai/gsm8k"), tmp_path)
    with pytest.raises(DataNotFoundError, match="has no configuration 'mian'; has main, other"):
        load_dataset(DataConfig(source="hf:openai/gsm8k/mian:train"), tmp_path)


CONLL = "-DOCSTART- -X- -X- O\n\nAnna NNP B-NP B-PER\nlives VBZ B-VP O\n\nOslo NNP B-NP B-LOC\n\n\nBergen NNP B-LOC\n"


def test_words_with_their_tags_are_read(tmp_path: Path):
    for name in ("d.conll", "d.txt", "d.bio"):
        (tmp_path / name).write_text(CONLL)
        dataset = load(tmp_path / name, "token-classification")
        assert dataset.columns["words"] == (("Anna", "lives"), ("Oslo",), ("Bergen",))
        assert dataset.label_names == ("B-LOC", "B-PER", "O")
        assert dataset.labels == ((1, 2), (0,), (0,))
    tags = load(tmp_path / "d.conll", "token-classification", label_column="pos_tags")
    assert tags.label_names == ("NNP", "VBZ")
    assert tags.reading is not None
    assert list(tags.reading.left_out) == [3]  # it has another number of columns than the data of 2003
    (tmp_path / "d.tsv").write_text("New York\tB-LOC\nis\tO\n\nOslo\n\nBergen\tB-LOC\n")
    dataset = load(tmp_path / "d.tsv", "token-classification")
    assert dataset.columns["words"] == (("New York", "is"), ("Bergen",))
    assert dataset.reading is not None
    assert "(line 4) has 1 fields where 2 are needed" in dataset.reading.left_out[2]
    word = "1\tAnna\tAnna\tPROPN\tNNP\t_\t2\tnsubj\t_\t_\n"
    (tmp_path / "d.conllu").write_text(f"# text\n1-2\tzum{chr(9) + '_':s}" + "\t_" * 7 + f"\n{word}\n{word}")
    assert load(tmp_path / "d.conllu", "token-classification").columns["words"] == (("Anna",), ("Anna",))


def test_a_large_source_is_drawn_from_and_not_kept_whole(tmp_path: Path):
    found = SourceRows(max_rows=10)
    parsed = 0
    for number in range(10_000):
        if found.wanted():
            parsed += 1
            found.add({"text": str(number)})
        assert len(found.rows) <= 20
    found.finished()
    assert found.total == 10_000
    assert parsed < 250  # about ten more each of the ten times that it was full, and as many again
    places = [int(row["text"]) for row in found.rows]
    assert len(places) == 10
    assert {place % 2 for place in places} == {0, 1}  # rows often alternate between classes
    assert min(places) < 5000 < max(places)
    assert found.numbers == [place + 1 for place in places]
    by_bytes = SourceRows(max_bytes=1000)
    for number in range(1000):
        if by_bytes.wanted():
            by_bytes.add({"text": str(number)}, n_bytes=10)
    assert 25 <= len(by_bytes.finished().rows) <= 100
    assert "of 1,000 rows were drawn" in by_bytes.notes[0]
    (tmp_path / "d.jsonl").write_text(lines(ROWS * 50), encoding="utf-8")
    dataset = load(tmp_path / "d.jsonl", max_rows=40)
    assert len(dataset) == 40
    assert dataset.reading is not None
    assert dataset.reading.total == 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text": "b"', "at or before line 2 is not a JSON array"),
        ('[{"text": "a"}\n {"text": "b"}]', "a comma is missing before"),
        ('[{"text": "a"}] x', "follows it"),
        ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "has rows under train, test"),
        ('"text"', "must have rows: a JSON array of objects, got str"),
    ],
)
def test_json_that_is_no_rows_is_refused(tmp_path: Path, content: str, message: str):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "d.json", "masked-lm")


def test_every_line_of_plain_text_is_a_text(tmp_path: Path):
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfOne day.\r\n\r\n  It rained.\n\xff\xfe\nThen not.")
    dataset = load(tmp_path / "d.txt", "causal-lm")
    assert dataset.texts == ("One day.", "  It rained.", "Then not.")
    assert dataset.reading is not None
    assert "each line is a text" in dataset.reading.notes[0]
    assert [reason for _, reason in dataset.reading.reasons] == [
        "sample 3 (line 4) is not text: byte 28 of the file (0xff) is not UTF-8"
    ]


def test_notes_beside_the_data_of_a_folder_are_not_data(tmp_path: Path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "LICENSE.txt").write_text("free\n")
    (folder / "a.txt").write_text("one\n")
    assert load(folder, "causal-lm").texts == ("free", "one")
    (folder / "train.jsonl").write_text('{"text": "a text"}\n{"text": "another"}\n')
    assert load(folder, "causal-lm").texts == ("a text", "another")
