"""Damaged files, and values that Python cannot hold: an error of ours or a row left out, whatever the bytes are."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from layerlens.config import DataConfig
from layerlens.data import load_dataset
from layerlens.exceptions import DataError, ModelNotFoundError
from layerlens.integrations.safetensors_files import INDEX, checkpoint_tensors, load_weights

ROWS = [{"text": f"text {number}", "label": number % 2} for number in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
DEEP, LONG = "[" * 100_000, "9" * 5000


def load(path: Path, task: str = "sequence-classification", **keys: Any) -> Any:
    return load_dataset(DataConfig(source=str(path), **keys), task=task)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("how", ["cut", "changed", "nothing", "no gzip"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, how: str, folder: bool):
    whole = gzip.compress(LINES)
    damaged = {
        "cut": whole[:-12],
        "changed": whole[:14] + b"\xff\xff" + whole[16:],
        "nothing": whole[:5],
        "no gzip": LINES,
    }
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damaged[how])
    with pytest.raises(DataError, match=r"data\.source: cannot read .*rows\.jsonl\.gz: "):
        load(tmp_path if folder else path)


@pytest.mark.parametrize("odd", [DEEP, LONG, '{"text": ' + LONG + "}", '{"text": ' + DEEP])
def test_json_that_python_does_not_read_is_a_row_left_out_or_a_refusal(tmp_path: Path, odd: str):
    lines, array, whole = tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.json"
    lines.write_bytes(LINES + odd.encode() + b"\n")
    found = load(lines)
    assert len(found.texts) == 6
    assert list(found.reading.left_out) == [7]
    array.write_text(f"[{json.dumps(ROWS)[1:-1]}, {odd}]")
    with pytest.raises(DataError, match="is not a JSON array"):
        load(array)
    whole.write_text(odd)
    with pytest.raises(DataError, match=r"data\.source: .*c\.json"):
        load(whole)


def test_a_value_of_parquet_that_python_cannot_hold_is_a_row_left_out(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    dates = pyarrow.array([0, 2**31 - 1, 1, 2, 3, 4], pyarrow.int32()).cast(pyarrow.date32())
    columns = {name: [row[name] for row in ROWS] for name in ("text", "label")}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "day": dates}), tmp_path / "rows.parquet")
    found = load(tmp_path / "rows.parquet")
    assert len(found.texts) == 5
    assert list(found.reading.left_out) == [2]
    assert "has a value that Python cannot hold: " in found.reading.left_out[2]
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(whole.replace(b"text", b"\xff\xfext"))
    with pytest.raises(DataError, match="is not a Parquet file"):
        load(tmp_path / "rows.parquet")

    import datasets

    datasets.Dataset(pyarrow.table({**columns, "day": dates})).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="row 2 of the data set has a value that Python cannot hold"):
        load(tmp_path / "saved")


def test_a_turn_that_is_none_is_a_row_left_out(tmp_path: Path):
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "a"}, ["b"]],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    assert list(load(path, "causal-lm").reading.left_out) == [2]
    with pytest.raises(DataError, match="has no images; its columns are messages"):
        load(path, "image-text")
    tools = ["[]", "", '[{"name": }]', DEEP]
    path.write_text("".join(json.dumps({"messages": chats[0], "tools": one}) + "\n" for one in tools), encoding="utf-8")
    with pytest.raises(DataError, match=r"2 of 4 samples cannot.*"):
        load(path, "causal-lm")


INDICES = (
    "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1.5}}', '{"weight_map": {"a": ["x"]}}',
    '{"weight_map": {"a": ""}}', '{"weight_map": {"a": "\\u0000"}}', '{"weight_map": {"a": "\\ud800"}}', DEEP,
    f'{{"weight_map": {LONG}}}',
)  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=range(len(INDICES)))
def test_what_is_no_index_of_shards_is_refused_by_its_name(tmp_path: Path, index: str):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ModelNotFoundError, match=r"model\.name_or_path: "):
        checkpoint_tensors(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"model\.weights: "):
        load_weights(torch.nn.Linear(1, 1), str(tmp_path), None)


@pytest.mark.parametrize(
    "header",
    [DEEP, '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [Infinity, 8]}}',
     '{"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}',
     '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}'],
)  # fmt: skip
def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path, header: str):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    with pytest.raises(ModelNotFoundError, match="its header is not a table of tensors"):
        checkpoint_tensors(tmp_path)
