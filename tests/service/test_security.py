"""What strangers and mistakes may send, and what a server never does with it."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import OTHER_TOKEN, TOKEN, Serving, run_config_of
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.exceptions import ConfigurationError
from layerlens.service.client import Client
from layerlens.service.guard import Buckets, Guard
from layerlens.service.settings import ServiceSettings, Tokens, is_loopback, load_tokens

BEARER = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


def ask(
    server: Serving, method: str, path: str, body: Any = None, headers: dict[str, str] | None = BEARER, **more: Any
) -> tuple[int, str]:
    """Status and body of one request, by a client that refuses nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, body=body, headers=headers or {}, **more)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def submit(server: Serving, config: Any, **more: Any) -> tuple[int, str]:
    status, text = ask(server, "POST", "/v1/jobs", json.dumps({"kind": "run", "config": config, **more}))
    return status, json.loads(text).get("detail", "")


def changed(section: str, **fields: Any) -> dict[str, Any]:
    config = run_config_of()
    return {**config, section: {**config.get(section, {}), **fields}}


# --- who may ---


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", f"Bearer {OTHER_TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", TOKEN,
     f"Basic {TOKEN}", f"Bearer {TOKEN.upper()}", "Bearer \xff\xfe"],
)  # fmt: skip
def test_without_the_right_token_no_route_answers(server: Serving, authorization: str | None):
    headers = {} if authorization is None else {"Authorization": authorization}
    _, document = ask(server, "GET", "/openapi.json", headers={})
    secured = [
        (verb.upper(), path.replace("{job_id}", "0" * 32).replace("{path}", "manifest.json"))
        for path, operations in json.loads(document)["paths"].items()
        for verb, operation in operations.items()
        if "security" in operation
    ]
    assert len(secured) == 10
    for verb, path in secured:
        status, text = ask(server, verb, path, headers=headers)
        assert status == 401, (verb, path)
        assert TOKEN not in text
    for path in ("/healthz", "/readyz", "/docs"):
        assert ask(server, "GET", path, headers={})[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.invalid", ""])
def test_a_public_address_needs_a_token(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LAYERLENS_SERVE_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["serve", "--host", host, "--port", "0"])
    assert done.exit_code == 2
    assert "no token is set" in done.output
    assert not is_loopback(host)


def test_tokens_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LAYERLENS_SERVE_TOKEN", raising=False)
    path = tmp_path / "tokens"
    path.write_text(f"# two\n{TOKEN}\n\n{OTHER_TOKEN}\n")
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        load_tokens(path)
    path.chmod(0o600)
    tokens = load_tokens(path)
    assert {tokens.holder(f"bearer {token}") is not None for token in (TOKEN, OTHER_TOKEN)} == {True}
    assert tokens.holder(f"Bearer {TOKEN}") != tokens.holder(f"Bearer {OTHER_TOKEN}")
    assert TOKEN not in repr(tokens) + repr(vars(tokens))
    path.write_text("short")
    with pytest.raises(ConfigurationError, match="16 or more") as caught:
        load_tokens(path)
    assert "'short'" not in str(caught.value)
    path.write_text("# none\n")
    with pytest.raises(ConfigurationError, match="has no token"):
        load_tokens(path)


def test_a_client_sends_no_token_over_the_network_in_the_clear():
    with pytest.raises(ConfigurationError, match="unencrypted"):
        Client("http://layerlens.example:8642", TOKEN)
    Client("https://layerlens.example", TOKEN)
    with pytest.raises(ConfigurationError, match="no address") as caught:
        Client(f"http://user:{TOKEN}@127.0.0.1:8642")
    assert TOKEN not in str(caught.value)


def guarded(settings: ServiceSettings, requests: list[dict[str, str]], path: str = "/v1/jobs") -> list[int]:
    """Statuses that the guard gives to requests with these headers."""
    statuses: list[int] = []

    async def behind(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def all_of_them() -> None:
        guard = Guard(behind, settings)
        for headers in requests:
            encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
            scope = {"type": "http", "path": path, "headers": encoded, "client": ("127.0.0.1", 5)}
            await guard(scope, None, send)  # type: ignore[arg-type]

    asyncio.run(all_of_them())
    return statuses


def test_without_tokens_only_local_names_are_answered(tmp_path: Path):
    """A page in a browser that resolves its own name to 127.0.0.1 (DNS rebinding) gets nothing."""
    hosts = [
        "evil.example",
        "evil.example:8642",
        "localhost.evil.example",
        "",
        "localhost:8642",
        "127.0.0.1:1",
        "[::1]:9",
    ]
    found = guarded(ServiceSettings(tmp_path, (tmp_path,)), [{"host": host} for host in hosts])
    assert found == [403] * 4 + [200] * 3


def test_each_token_has_its_own_rate(tmp_path: Path):
    limited = ServiceSettings(tmp_path, (tmp_path,), tokens=Tokens([TOKEN, OTHER_TOKEN]), rate_per_s=0.001, burst=2)
    first, other = {"authorization": f"Bearer {TOKEN}"}, {"authorization": f"Bearer {OTHER_TOKEN}"}
    assert guarded(limited, [first, first, first, other]) == [200, 200, 429, 200]
    guesses = [{"authorization": f"Bearer guess-{number}"} for number in range(4)]
    assert guarded(limited, [*guesses, first]) == [401, 401, 429, 429, 200]


def test_rates_recover_and_do_not_follow_the_wall_clock(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("layerlens.service.guard.time.monotonic", lambda: now)
    monkeypatch.setattr("layerlens.service.guard.time.time", lambda: pytest.fail("a wall clock was asked"))
    buckets = Buckets(rate=2.0, burst=1)
    assert buckets.take("a") == 0.0
    assert buckets.take("a") == pytest.approx(0.5)
    now += 0.5
    assert buckets.take("a") == 0.0


# --- where they may go ---


@pytest.mark.parametrize(
    "place",
    ["../../../etc", "/etc", "model/../../..", "~/model", "nowhere", "model\0x", "link-out", "file:///etc", "./s3:/x"],
)
def test_models_and_data_stay_below_the_roots(server: Serving, place: str):
    link = server.folder / "link-out"
    if not link.is_symlink():
        link.symlink_to("/etc")
    for section, key in (("model", "name_or_path"), ("data", "source")):
        status, detail = submit(server, changed(section, **{key: place}))
        assert status == 422, detail
        assert f"{section}.{key}: " in detail
        assert "root:x:" not in detail
    status, detail = submit(server, run_config_of(), kind="optimize", statistics=place)
    assert status == 422


@pytest.mark.parametrize(
    ("section", "fields", "said"),
    [
        ("model", {"name_or_path": "package:os"}, "does not import 'package:os'"),
        ("model", {"name_or_path": "bert-base-uncased"}, "not below a root"),
        ("model", {"name_or_path": "factory:os:getcwd"}, "not below a root"),
        ("model", {"name_or_path": "timm:vit_tiny_patch16_224"}, "not below a root"),
        ("model", {"name_or_path": "timm:x", "weights": "/etc/passwd"}, "model.weights: "),
        ("data", {"source": "os:getcwd"}, "does not run 'os:getcwd'"),
        ("model", {"name_or_path": "s3://bucket/model"}, "not below a URL that this server allows"),
        ("model", {"name_or_path": "http://169.254.169.254/latest/meta-data"}, "not below a URL"),
        ("data", {"source": "hf:imdb"}, "loads nothing from the hub"),
        ("data", {"source": "http://127.0.0.1:1/x.jsonl"}, "not below a URL"),
        ("output", {"directory": "/tmp/x"}, "writes to its own folder"),
        ("output", {"directory": "s3://bucket/x"}, "not below a URL"),
        ("runtime", {"cache_dir": "/tmp/x"}, "has its own cache"),
        ("model", {"device_map": "auto", "offload_folder": "/tmp/x"}, "decides where models lie"),
        ("model", {"trust_remote_code": True}, "model.trust_remote_code: this server runs no code of models"),
        ("distributed", {"sharding": "fsdp"}, "is one process"),
        ("telemetry", {"push_gateway": "http://169.254.169.254"}, "the operator of the server decides"),
        ("tracking", {"trackers": ["mlflow"], "uri": "http://evil.example"}, "the operator of the server decides"),
    ],
)
def test_what_only_the_operator_may_allow(server: Serving, section: str, fields: dict[str, Any], said: str):
    status, detail = submit(server, changed(section, **fields))
    assert status == 422
    assert said in detail


@pytest.mark.parametrize(
    "url", ["s3://good/x/../../bad/y", "s3://good-bad/x", "s3://good/x?y", "s3://good/*", "s3://good/%2e%2e/b"]
)
def test_allowed_urls_are_not_left(url: str, tmp_path: Path):
    from layerlens.service.confinement import confined_path

    allowing = ServiceSettings(tmp_path, (tmp_path,), allow_urls=("s3://good",))
    assert confined_path("data.source", "s3://good/x/y.jsonl", allowing) == "s3://good/x/y.jsonl"
    with pytest.raises(ConfigurationError, match="not below a URL"):
        confined_path("data.source", url, allowing)


@pytest.mark.parametrize(
    ("name", "said"),
    [("pytorch_model.bin", "can run code"), ("modeling_x.py", "has code"), ("linked.json", "leads out")],
)
def test_models_with_pickles_code_or_links_out_are_refused(server: Serving, name: str, said: str):
    folder = server.folder / f"model-{name}"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if name == "linked.json":
        (folder / name).symlink_to("/etc/hostname")
    else:
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n")
    status, detail = submit(server, changed("model", name_or_path=folder.name))
    assert status == 422
    assert said in detail


@pytest.mark.parametrize(
    "path",
    ["../lock", "..%2flock", "%2e%2e/%2e%2e/%2e%2e/jobs.sqlite", "/etc/passwd", "%2fetc%2fpasswd", "peft", "", "link",
     "folder-link/passwd", "a%00b", "x" * 5000],
)  # fmt: skip
def test_only_files_of_a_result_are_given(server: Serving, finished_run: dict[str, Any], path: str):
    results = server.folder / "state/jobs" / finished_run["id"] / "results"
    for name, target in (("link", "/etc/passwd"), ("folder-link", "/etc")):
        if not (results / name).is_symlink():
            (results / name).symlink_to(target)
    status, text = ask(server, "GET", f"/v1/jobs/{finished_run['id']}/files/{path}")
    assert status in (404, 307), text[:200]
    assert "root:" not in text
    listed = json.loads(ask(server, "GET", f"/v1/jobs/{finished_run['id']}/result")[1])["files"]
    assert not {"link", "folder-link", "folder-link/passwd"} & set(listed)


# --- what they send ---


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
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("PUT", f"/v1/jobs/{'0' * 32}", headers=BEARER)
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Allow"]) == (405, "DELETE, GET")
    answer.read()
    connection.close()


# --- code, which only the operator may allow ---


def confined(folder: Path, model: dict[str, Any] | None = None, source: str = "builtin:digits", **allowed: Any) -> Any:
    """The confined configuration of a model in ``folder``, which is the server's root."""
    from layerlens.config import RunConfig
    from layerlens.service.confinement import confine

    config = run_config_of()
    config = {**config, "model": model or config["model"], "data": {**config["data"], "source": source}}
    return confine(RunConfig.model_validate(config), ServiceSettings(folder, (folder,), **allowed))


OWN = {"task": "custom", "loss": "own.losses:loss", "factory": "own:build"}


@pytest.mark.parametrize(
    ("model", "source", "key"),
    [
        ({**OWN}, "own:rows", "model.factory"),
        ({**OWN, "factory": "own:build", "loss": "os.path:join"}, "own:rows", "model.loss"),
        ({"factory": "own:build"}, "owner:rows", "data.source"),
    ],
)
def test_functions_run_only_from_modules_that_the_operator_allows(
    model: dict[str, Any], source: str, key: str, tmp_path: Path
):
    with pytest.raises(ConfigurationError, match=r"this server does not run .*--allow-code"):
        confined(tmp_path, model, source, allow_hub=True)
    if key != "model.factory":  # allowing "own" allows "own.losses", but neither "os" nor "owner"
        with pytest.raises(ConfigurationError, match=f"{key}: this server does not run"):
            confined(tmp_path, model, source, allow_code=("own",))


def test_allowed_functions_stay_as_they_were_named(tmp_path: Path):
    found = confined(tmp_path, OWN, "own:rows", allow_code=("own",))
    assert (found.model.factory, found.model.loss, found.data.source) == ("own:build", "own.losses:loss", "own:rows")


def test_a_factory_is_not_smuggled_in_as_a_name(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="not below a root"):
        confined(tmp_path, {"name_or_path": "factory:os:getcwd"}, allow_hub=True, allow_code=("os",))


def test_detectors_are_pickles_that_the_operator_must_allow(tmp_path: Path):
    model = {"name_or_path": "ultralytics:weights.pt", "task": "object-detection"}
    (tmp_path / "weights.pt").write_bytes(b"pickle")
    with pytest.raises(ConfigurationError, match=r"runs code when it is loaded.*--allow-pickles"):
        confined(tmp_path, model, allow_hub=True)
    found = confined(tmp_path, model, allow_pickles=True)
    assert found.model.name_or_path == f"ultralytics:{tmp_path / 'weights.pt'}"
    for name in ("ultralytics:../weights.pt", "ultralytics:/etc/passwd", "ultralytics:yolo11n.pt"):
        with pytest.raises(ConfigurationError, match="not below a root"):
            confined(tmp_path, {**model, "name_or_path": name}, allow_pickles=True)


def test_pickles_beside_a_model_may_be_allowed_and_code_may_not(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="can run code"):
        confined(tmp_path)
    assert confined(tmp_path, allow_pickles=True).model.name_or_path == str(tmp_path / "model")
    (tmp_path / "model/modeling_x.py").write_text("")
    with pytest.raises(ConfigurationError, match="has code"):
        confined(tmp_path, allow_pickles=True)


def test_what_a_job_does_not_use_on_the_server_stays(tmp_path: Path):
    """Sections that run nothing and name no place are handed through: what is new there must be looked at here."""
    from layerlens.config import RunConfig, StudyConfig, TrainingConfig

    places = ("directory", "path", "file", "uri", "url", "module", "factory", "source", "function")
    for section in (TrainingConfig, StudyConfig):
        assert not [name for name in section.model_fields if any(place in name for place in places)]
    (tmp_path / "model").mkdir()
    known = {"model", "data", "profiling", "optimization", "training", "output", "runtime", "distributed", "study",
             "telemetry", "tracking"}  # fmt: skip
    assert RunConfig.model_fields.keys() == known
    assert confined(tmp_path).runtime.device == "cpu"


# --- what data may name ---


def test_images_that_a_table_names_stay_below_the_roots(tmp_path: Path):
    from layerlens.data.images import stored_image
    from layerlens.exceptions import DataError
    from layerlens.utils.places import readable_below

    root = tmp_path / "root"
    root.mkdir()
    for place in (tmp_path / "outside.png", root / "inside.png"):
        place.write_bytes(b"")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    table = root / "table.jsonl"
    assert stored_image("../outside.png", table, 0, 100) is not None  # on one's own machine
    with readable_below([root]):
        assert stored_image("inside.png", table, 0, 100) is not None
        for name in ("../outside.png", str(tmp_path / "outside.png"), "link.png", "../absent.png"):
            with pytest.raises(DataError, match="not below a root"):
                stored_image(name, table, 0, 100)


def test_folders_that_a_yolo_data_set_names_stay_below_the_roots(tmp_path: Path):
    from layerlens.config import DataConfig
    from layerlens.exceptions import DataError
    from layerlens.tasks.object_detection import load
    from layerlens.utils.places import readable_below

    root = tmp_path / "root"
    for folder in (root / "images/train", root / "labels/train", tmp_path / "images/train"):
        folder.mkdir(parents=True)
    (root / "images/train/a.png").write_bytes(b"")
    (tmp_path / "images/train/a.png").write_bytes(b"")
    (tmp_path / "secret.txt").write_text("0 0.5 0.5 0.1 0.1")
    (root / "labels/train/a.txt").symlink_to(tmp_path / "secret.txt")
    for described in ("path: ..", f"path: {tmp_path}", "path: ."):
        (root / "set.yaml").write_text(f"{described}\ntrain: images/train\nnames: [a]\n")
        with readable_below([root]), pytest.raises(DataError, match="not below a root"):
            load(DataConfig(source="set.yaml", max_image_pixels=100), root)
    (root / "labels/train/a.txt").unlink()
    with readable_below([root]):
        assert len(load(DataConfig(source="set.yaml", max_image_pixels=100), root)) == 1
