"""The head that a run fitted is in what it writes, however its statistics came, and in what other verbs make of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import layerlens
from layerlens.config import RunConfig
from layerlens.manifest import read_manifest
from layerlens.pipeline import optimize_statistics, run_config
from layerlens.profiling.cache import SensitivityCache
from layerlens.profiling.statistics_file import load_statistics
from layerlens.tuning import apply_to_directory, unapply
from layerlens.tuning.task_head import read_head

HEAD = ["classifier.bias", "classifier.weight"]
PREFIX = "base_model.model."
GUIDES = Path(__file__).parents[2] / "docs"


def config_of(settings: dict[str, Any], **more: Any) -> RunConfig:
    settings["optimization"] |= {"methods": ["lora"]} | more
    return RunConfig.model_validate(settings)


def head_in(peft: Path) -> dict[str, torch.Tensor]:
    found = load_file(peft / "adapter_model.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items() if ".lora_" not in name}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_writes_the_head_that_it_fitted_also_from_the_cache(settings: dict[str, Any], tmp_path: Path):
    first = run_config(config_of(settings), base_dir=tmp_path)
    config = json.loads((first.files["peft"] / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert config["base_model_name_or_path"] == settings["model"]["name_or_path"]
    head = head_in(first.files["peft"])
    assert sorted(head) == HEAD
    assert head["classifier.bias"].any()  # a drawn one is zero
    assert same(read_head(first.directory), head)
    assert all(
        torch.equal(torch.as_tensor(x), head[name])
        for name, x in load_statistics(first.files["statistics"])[1].head.items()
    )
    files = {path.name: path.read_bytes() for path in first.files["peft"].iterdir()}
    statistics, written = first.files["statistics"].read_bytes(), (first.directory / "head.safetensors").read_bytes()

    again = run_config(config_of(settings), base_dir=tmp_path)
    assert again.statistics_from_cache
    assert {path.name: path.read_bytes() for path in again.files["peft"].iterdir()} == files
    assert again.files["statistics"].read_bytes() == statistics
    assert (again.directory / "head.safetensors").read_bytes() == written


def test_cached_statistics_of_an_earlier_version_get_the_same_head(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = run_config(config_of(settings), base_dir=tmp_path)
    head = head_in(first.files["peft"])
    cache = SensitivityCache(tmp_path / "cache")
    (entry,) = cache.entries()
    found = cache.get(entry.key)
    assert found is not None
    from dataclasses import replace

    cache.put(entry.key, found[0], replace(found[1], head={}))
    again = run_config(config_of(settings), base_dir=tmp_path)
    assert again.statistics_from_cache
    assert same(head_in(again.files["peft"]), head)
    kept = cache.get(entry.key)
    assert kept is not None
    assert sorted(kept[1].head) == HEAD


def test_a_streamed_run_writes_the_same_head(settings: dict[str, Any], tmp_path: Path):
    settings["runtime"] = {"threads": 1}
    plain = run_config(config_of(settings), base_dir=tmp_path, use_cache=False)
    head = head_in(plain.files["peft"])
    settings["profiling"]["memory_mode"] = "streamed"
    streamed = run_config(config_of(settings), base_dir=tmp_path, use_cache=False)
    assert same(head_in(streamed.files["peft"]), head)


def test_what_is_made_of_a_run_begins_from_its_head(settings: dict[str, Any], tmp_path: Path):
    done = run_config(config_of(settings), base_dir=tmp_path)
    head, manifest = head_in(done.files["peft"]), read_manifest(done.files["manifest_json"])
    applied = apply_to_directory(manifest, None, tmp_path / "applied", done.files["peft"])
    assert same(head_in(applied["peft"]), head)
    assert same(read_head(tmp_path / "applied"), head)
    other = optimize_statistics(
        done.files["statistics"], config_of(settings, max_trainable_params=700), base_dir=tmp_path / "other"
    )
    assert same(read_head(other.directory), head)

    base = AutoModelForSequenceClassification.from_pretrained(settings["model"]["name_or_path"], num_labels=2)
    own = base.classifier.weight.detach().clone()
    for place in (done.directory, other.directory):
        tuned = layerlens.load(place).apply(base)
        assert torch.equal(
            tuned.base_model.model.classifier.modules_to_save["default"].weight, head["classifier.weight"]
        )
        base = unapply(tuned)
        assert torch.equal(base.classifier.weight, own)


def test_adapters_alone_have_the_head_beside_them(settings: dict[str, Any], tmp_path: Path):
    settings["optimization"] |= {"methods": ["adapter"]}
    done = run_config(RunConfig.model_validate(settings), base_dir=tmp_path)
    assert "peft" not in done.files
    from layerlens.tuning import load

    base = AutoModelForSequenceClassification.from_pretrained(settings["model"]["name_or_path"], num_labels=2)
    tuned = load(base, done.directory)
    assert same({name: tuned.get_parameter(name).detach() for name in HEAD}, read_head(done.directory))
    assert all(tuned.get_parameter(name).requires_grad for name in HEAD)


def test_a_head_that_is_not_fitted_is_the_one_that_was_measured_with(settings: dict[str, Any], tmp_path: Path):
    settings["model"]["head_fit_samples"] = 0
    done = run_config(config_of(settings), base_dir=tmp_path)
    head = head_in(done.files["peft"])
    assert not head["classifier.bias"].any()
    assert same(read_head(done.directory), head)


def test_a_head_that_the_checkpoint_has_is_trained_from_there(
    settings: dict[str, Any], tiny_bert_dir: Path, tmp_path: Path
):
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    trained = AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=2, **names)
    trained.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(tiny_bert_dir).save_pretrained(tmp_path / "trained")
    settings["model"] = {"name_or_path": str(tmp_path / "trained")}
    done = run_config(config_of(settings), base_dir=tmp_path)
    assert json.loads((done.files["peft"] / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    assert same(head_in(done.files["peft"]), {name: trained.get_parameter(name).detach() for name in HEAD})
    assert "is in this directory too, as it is in the base model" in (done.files["peft"] / "README.md").read_text(
        encoding="utf-8"
    )
    assert not (done.directory / "head.safetensors").exists()


GUIDE = """
import sys
class NoLayerLens:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "layerlens":
            raise ModuleNotFoundError("layerlens is not installed here")
assert "layerlens" not in sys.modules
sys.meta_path.insert(0, NoLayerLens())
def total(model):
    return sum(x.detach().double().sum().item() for name, x in model.named_parameters() if ".modules_to_save." in name)
"""


def test_the_guide_s_trainer_saves_the_head_and_gets_it_back(
    settings: dict[str, Any], warm_python: Any, tmp_path: Path
):
    """docs/how-to/my-trainer.md, word for word, in a Python without layerlens."""
    page = (GUIDES / "how-to" / "my-trainer.md").read_text(encoding="utf-8")
    blocks = [one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if '"out/peft"' in one]
    assert len(blocks) == 1
    Path(tmp_path / "my-model").symlink_to(settings["model"]["name_or_path"])
    settings["model"]["name_or_path"] = "./my-model"
    done = run_config(config_of(settings), base_dir=tmp_path)
    assert done.directory == tmp_path / "out"
    head = head_in(done.files["peft"])
    begun = sum(x.double().sum().item() for x in head.values())
    begin = 'model = PeftModel.from_pretrained(base, "out/peft", is_trainable=True)\n'
    assert begin in blocks[0]
    code = blocks[0].replace(begin, f"{begin}begun = total(model)\n")
    end = f"assert abs(begun - {begun!r}) < 1e-9\nassert total(model) != begun\nassert total(again) == total(model)\n"
    run = warm_python.run("-c", GUIDE + code + end, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
