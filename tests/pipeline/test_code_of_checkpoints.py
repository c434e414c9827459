"""Checkpoints with Python code of their own: nothing of it runs unasked, and nobody is asked on the terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, ModelSpecError
from layerlens.jobs.estimate import estimate
from layerlens.jobs.train import train_config
from layerlens.manifest import read_manifest
from layerlens.pipeline import run_config
from layerlens.tuning import apply_to_directory


@pytest.fixture
def own_code(
    settings: dict[str, Any], tiny_bert_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Settings of a run on a checkpoint whose code leaves a file behind, where every question is answered with yes."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_bert_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "ownbert",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class OwnConfig(BertConfig):\n    model_type = 'ownbert'\n"
        "class OwnModel(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return settings | {"model": settings["model"] | {"name_or_path": str(folder)}}


@pytest.mark.parametrize("mode", ["auto", "streamed"])
def test_refused_unless_the_configuration_trusts_it(own_code: dict[str, Any], tmp_path: Path, mode: str):
    own_code["profiling"]["memory_mode"] = mode
    with pytest.raises(ModelSpecError, match=r"model\.trust_remote_code: .*own' contains Python code"):
        run_config(RunConfig.model_validate(own_code), base_dir=tmp_path)
    with pytest.raises(ModelSpecError, match=r"model\.trust_remote_code: "):
        estimate(own_code["model"]["name_or_path"], rank=4, task="sequence-classification")
    assert not (tmp_path / "ran").exists()


def test_trusted_by_the_configuration_and_by_no_manifest(own_code: dict[str, Any], tmp_path: Path):
    own_code["model"]["trust_remote_code"] = True
    result = run_config(RunConfig.model_validate(own_code), base_dir=tmp_path)
    assert (tmp_path / "ran").exists()
    manifest = read_manifest(result.files["manifest_json"])
    assert manifest.model.model_type == "ownbert"
    with pytest.raises(ModelSpecError, match="--trust-remote-code"):
        apply_to_directory(manifest, None, tmp_path / "applied")
    assert apply_to_directory(manifest, None, tmp_path / "applied", trust_remote_code=True)["peft"].is_dir()
    with pytest.raises(ConfigurationError, match=r"--set model\.trust_remote_code=true"):
        train_config(manifest)
    assert train_config(manifest, ["model.trust_remote_code=true"]).model.trust_remote_code
