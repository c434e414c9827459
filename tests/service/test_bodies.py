"""What strangers and mistakes may send, and what a server answers."""

from __future__ import annotations

import http.client
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import BEARER, TOKEN, Serving, ask, changed, submit

from layerlens.models import LayerSpec, LayerStatistics, MethodStatistics, ModelSpec, ModelStatistics
from layerlens.profiling.statistics_file import statistics_to_bytes
from layerlens.service.store import JobStore


def test_bodies_that_are_too_large_are_refused_early(server: Serving):
    assert ask(server, "POST", "/v1/jobs", b"x" * (65 * 1024))[0] == 413
    pieces = (b"x" * 1024 for _ in range(100))
    assert ask(server, "POST", "/v1/jobs", pieces, encode_chunked=True,
               headers={**BEARER, "Transfer-Encoding": "chunked"})[0] == 413  # fmt: skip
    assert ask(server, "POST", "/v1/jobs", b"", {**BEARER, "Content-Length": "999999999999"})[0] == 413


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"[" * 60_000, b'{"a":' * 10_000, b'{"kind": "run"}',
     b'{"kind": "run", "config": 1}', b'{"kind": "run", "config": {"model": null}}', b'{"kind": "x", "config": {}}',
     b'{"kind": "run", "config": {}, "more": 1}', b'{"kind": "run", "config": ' + b"9" * 5000 + b"}",
     b'{"kind": "run", "config": {"model": {"name_or_path": "\\ud800"}}}', b'{"kind": "run", "config": NaN}'],
)  # fmt: skip
def test_malformed_bodies_are_answered_with_what_is_wrong(server: Serving, body: bytes):
    status, text = ask(server, "POST", "/v1/jobs", body)
    assert status in (400, 422)
    assert json.loads(text)["detail"]
    assert "Traceback" not in text


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "more than 10000 values"),
        ("model: !!python/object/apply:os.system ['touch pwned']\n", "is not allowed"),
        ("model: !!python/name:os.system\n", "is not allowed"),
        ("model: !include /etc/passwd\n", "is not allowed"),
        ("a: " + "[" * 500 + "]" * 500, "nested deeper"),
        ("a: &a [*a]\n", "nested deeper"),
        ("model: {name_or_path: x}\nmodel: {name_or_path: y}\n", "duplicate key"),
    ],
)
def test_yaml_bombs_and_tags_are_refused(server: Serving, text: str, said: str):
    status, detail = submit(server, text)
    assert status == 422
    assert said in detail


def header(content: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        header(b"{}", length=2**63),
        header(b"{}", length=2**64 - 1),
        header(b"{}", length=100_000_001),
        header(b"[" * 50_000),
        header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', data=b"\0" * 4),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}', data=b"\0" * 4),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', data=b"\0" * 4),
        header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', data=b"\0" * 4),
        header(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            data=b"\0" * 4,
        ),
        header(b'{"__metadata__":{"layerlens":"' + b"[" * 30_000 + b'"}}'),
        header(b'{"__metadata__":{"layerlens":"{\\"format\\": \\"layerlens-statistics-2\\"}"}}'),
        header(b'{"__metadata__":{"layerlens":"null"}}'),
        b"\x80\x04cposix\nsystem\n",
    ],
)
def test_hostile_statistics_files_are_refused(server: Serving, content: bytes):
    status, text = ask(server, "POST", "/v1/statistics", content)
    assert status == 422, text
    detail = json.loads(text)["detail"]
    assert str(server.folder) not in detail
    assert "unexpected" not in detail
    assert not [name for name in os.listdir(server.folder / "state/uploads") if name.startswith(".new-")]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)
sections = st.sampled_from(["model", "data", "optimization", "output", "runtime", "profiling", "telemetry", "tracking"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.dictionaries(sections | st.text(max_size=8), json_values, max_size=4),
    kind=st.sampled_from(["run", "optimize"]),
)
def test_no_body_whatsoever_makes_the_server_fail(server: Serving, config: dict[str, Any], kind: str):
    """A small relative of scripts/check_api.sh, which lets schemathesis try every operation."""
    body = json.dumps({"kind": kind, "config": config, "statistics": "job:" + "0" * 32})
    assert ask(server, "POST", "/v1/jobs", body)[0] == 422


def test_no_token_is_ever_logged_or_kept(server: Serving, finished_run: dict[str, Any]):
    for path in [server.folder / "server.log", *(server.folder / "state").rglob("*")]:
        if path.is_file() and not path.is_symlink():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_a_wrong_method_is_told_the_right_ones(server: Serving):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    connection.request("PUT", f"/v1/jobs/{'0' * 32}", headers=BEARER)
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Allow"]) == (405, "DELETE, GET")
    answer.read()
    connection.close()


def of_one_layer(model_name: str = "m") -> tuple[dict[str, Any], bytes]:
    """Header and data of a statistics file with one tensor."""
    values = MethodStatistics(energy=1.0, trace=2.0, signal=0.5, spectrum=np.array([2.0, 1.0]))
    layers = (LayerStatistics("a", {"lora": values}),)
    spec = ModelSpec(model_name, 10, [LayerSpec("a", 4, "linear", methods=("lora",))])
    content = statistics_to_bytes(spec, ModelStatistics(layers, 8, 80, 1.0, 1.0, 1.0))
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "BF16", "F4", "U8", "BOOL", "I64", "C64", "F32", "F64"])
def test_tensors_of_another_dtype_are_refused_by_name(server: Serving, dtype: str):
    """The same bytes, with the shape that they make."""
    head, data = of_one_layer()
    bits = {"F4": 4, "BF16": 16, "F32": 32, "F64": 64, "I64": 64, "C64": 64}.get(dtype, 8)
    head["a|lora|spectrum"] |= {"dtype": dtype, "shape": [len(data) * 8 // bits]}
    status, text = ask(server, "POST", "/v1/statistics", header(json.dumps(head).encode(), data=data))
    if dtype == "F64":
        assert status == 201, text
        return
    assert status == 422, text
    assert f"the file: tensor 'a|lora|spectrum' has dtype {dtype} and must have F64" in json.loads(text)["detail"]


def test_a_half_character_in_statistics_is_refused(server: Serving):
    head, data = of_one_layer("a\ud800")
    status, text = ask(server, "POST", "/v1/statistics", header(json.dumps(head).encode(), data=data))
    assert (status, "half a character" in text) == (422, True), text


def test_names_of_files_that_are_no_text_are_shown_with_escapes(server: Serving, tmp_path: Path):
    """Python has their bytes as lone surrogates, which no JSON and no SQLite takes."""
    folder = server.folder / "odd-names"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.py")).write_text("")
    status, detail = submit(server, changed("model", name_or_path=folder.name))
    assert (status, "\\udcff.py" in detail) == (422, True), detail
    store = JobStore(tmp_path / "jobs.sqlite")
    job = store.add("run", {})
    store.claim()
    store.tell(job.id, "warning", {"message": "cannot read \udcff.txt"})
    store.finish(job.id, "failed", error="cannot read \udcff.txt", outcome={"warnings": ["\udcff"]})
    found = store.get(job.id)
    texts = [found.error, found.outcome["warnings"][0], store.events(job.id)[2].data["message"]]
    said = "cannot read \\udcff.txt"
    assert [text.encode().decode() for text in texts] == [said, "\\udcff", said]
