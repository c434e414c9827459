"""A model source that a program registers: it runs, is validated, confined by the server, and comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, ModelNotFoundError, ModelSpecError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.manifest import read_manifest
from layerlens.registry import SOURCES
from layerlens.service.confinement import confine
from layerlens.service.settings import ServiceSettings
from layerlens.sources import LoadRequest, ModelSource, Trust, load_pretrained
from layerlens.sources.transformers import TRANSFORMERS
from layerlens.tuning.base_model import load_base
from layerlens.tuning.recipes import python_snippet


class Shelf(ModelSource):
    """``mine:NAME`` is the folder NAME of a shelf."""

    def __init__(self, shelf: Path) -> None:
        self.shelf, self.loaded = shelf, 0

    def load(self, request: LoadRequest) -> PretrainedModel:
        self.loaded += 1
        folder = self.shelf / request.place
        if not folder.is_dir():
            raise ModelNotFoundError(f"model.name_or_path: {request.reference} is not on the shelf")
        return TRANSFORMERS.load(dataclasses.replace(request, reference=str(folder)))

    def snippet(self, request: LoadRequest) -> tuple[list[str], str]:
        return ["import shelf"], f"shelf.take({request.place!r})"


@pytest.fixture
def shelf(tiny_bert_dir: Path) -> Iterator[Shelf]:
    source = SOURCES.register("mine", Shelf(tiny_bert_dir.parent))
    yield source
    SOURCES.unregister("mine")


@pytest.fixture
def mine(settings: dict[str, Any], tiny_bert_dir: Path, shelf: Shelf) -> dict[str, Any]:
    """The settings with the same model from the shelf."""
    settings["model"]["name_or_path"] = f"mine:{tiny_bert_dir.name}"
    return settings | {"training": {"epochs": 1, "batch_size": 8}}


def invoke(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_model_of_it_is_measured_loaded_again_applied_and_trained(mine: dict[str, Any], shelf: Shelf, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(mine), encoding="utf-8")
    invoke("validate", config)
    invoke("run", config, "--quiet")
    manifest = read_manifest(tmp_path / "out/manifest.json")
    assert manifest.model.name_or_path == mine["model"]["name_or_path"]
    assert shelf.loaded == 1
    base = load_base(manifest).model
    assert isinstance(base, torch.nn.Module)
    invoke("apply", tmp_path / "out/manifest.json", "--output", tmp_path / "applied")
    invoke("train", tmp_path / "out/manifest.json", "-c", config, "-o", tmp_path / "tuned", "--quiet")
    assert (tmp_path / "tuned/adapter_config.json").is_file()
    assert shelf.loaded == 4
    assert "shelf.take(" in python_snippet(manifest, tmp_path / "out/manifest.json", None)


def test_what_it_does_not_say_it_can_is_refused(mine: dict[str, Any]):
    for key, value in (("device_map", "auto"), ("weights", "weights.safetensors")):
        with pytest.raises(ConfigurationError, match=key):
            RunConfig(**{**mine, "model": {**mine["model"], key: value}})
    with pytest.raises(ModelSpecError, match="is built in memory by your code, so it cannot be streamed"):
        load_pretrained(mine["model"]["name_or_path"], "causal-lm", [], streamed=True)


def test_the_server_allows_what_its_trust_says(
    mine: dict[str, Any], shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    del mine["runtime"]["cache_dir"]
    (tmp_path / "reviews.jsonl").write_text("{}\n")
    mine["data"]["source"] = "reviews.jsonl"
    config, name = RunConfig.model_validate(mine), mine["model"]["name_or_path"]
    package = Shelf.__module__.partition(".")[0]  # what holds of a source that says nothing
    with pytest.raises(ConfigurationError, match=rf"does not import '{name}'; its operator can pass --allow-package"):
        confine(config, ServiceSettings(tmp_path, (tmp_path,), allow_hub=True, allow_pickles=True))
    allowing = ServiceSettings(tmp_path, (tmp_path,), allow_packages=(package,))
    assert confine(config, allowing).model.name_or_path == name
    needs = {
        Trust(code="shelf.models"): {"allow_code": ("shelf",)},
        Trust(pickle=True): {"allow_pickles": True},
        Trust(hub=True): {"allow_hub": True},
        Trust(): {},
    }
    for trust, allowed in needs.items():
        monkeypatch.setattr(shelf, "trust", lambda request, trust=trust: trust)
        if allowed:
            with pytest.raises(ConfigurationError, match=r"model\.name_or_path: "):
                confine(config, ServiceSettings(tmp_path, (tmp_path,)))
        assert confine(config, ServiceSettings(tmp_path, (tmp_path,), **allowed)).model.name_or_path == name
