"""Where a configuration may lead: the operator's roots, URLs, packages, code and pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import Serving, ask, changed, run_config_of, submit

from layerlens.exceptions import ConfigurationError
from layerlens.service.settings import ServiceSettings


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
        ("model", {"device_map": "auto", "offload_folder": "/tmp/x"}, "places models"),
        ("model", {"trust_remote_code": True}, "model.trust_remote_code: this server runs no code of models"),
        ("distributed", {"sharding": "fsdp"}, "is one process"),
        ("telemetry", {"push_gateway": "http://169.254.169.254"}, "the operator of the server sets"),
        ("tracking", {"trackers": ["mlflow"], "uri": "http://evil.example"}, "the operator of the server sets"),
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
    Image.new("L", (10, 10)).save(root / "images/train/a.png")
    (tmp_path / "images/train/a.png").write_bytes(b"")
    (tmp_path / "secret.txt").write_text("0 0.5 0.5 0.1 0.1")
    (root / "labels/train/a.txt").symlink_to(tmp_path / "secret.txt")
    for described in ("path: ..", f"path: {tmp_path}", "path: ."):
        (root / "set.yaml").write_text(f"{described}\ntrain: images/train\nnames: [a]\n")
        with readable_below([root]), pytest.raises(DataError, match="not below a root"):
            load(DataConfig(source="set.yaml", max_image_pixels=100), root)
    (root / "labels/train/a.txt").unlink()
    (root / "labels/train/a.txt").write_text("0 0.5 0.5 0.1 0.1")
    with readable_below([root]):
        assert len(load(DataConfig(source="set.yaml", max_image_pixels=100), root)) == 1
