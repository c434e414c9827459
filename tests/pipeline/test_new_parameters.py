"""What a checkpoint lacks is one thing for profiling, training and loading: a pooler, a part of the head, one bias."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import layerlens
from layerlens.config import RunConfig
from layerlens.exceptions import ModelSpecError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.train import train_manifest
from layerlens.manifest import read_manifest
from layerlens.models import Manifest
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained
from layerlens.tuning import load

HEADS = ["classifier", "bert.pooler"]


def without(folder: Path, source: Path, *lacking: str) -> Path:
    """A copy of a checkpoint without the tensors of these names."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if name not in lacking}
    assert len(kept) == len(weights) - len(lacking)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def without_pooler(tiny_bert_dir: Path, tmp_path: Path) -> Path:
    return without(tmp_path / "dapt", tiny_bert_dir, "pooler.dense.weight", "pooler.dense.bias")


def run_and_train(settings: dict[str, Any], model: Path, tmp_path: Path) -> tuple[Manifest, PretrainedModel, Any]:
    """The manifest, the base model loaded again with other random numbers, and what was trained on it."""
    settings["model"] |= {"name_or_path": str(model), "task": "sequence-classification"}
    settings["training"] = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2}
    config = RunConfig(**settings)
    done = run_config(config, base_dir=tmp_path)
    manifest = read_manifest(done.files["manifest_json"])
    trained = train_manifest(done.files["manifest_json"], config, base_dir=tmp_path, output=tmp_path / "trained")
    labels = manifest.model.labels or ()
    base = load_pretrained(str(model), "sequence-classification", labels, seed=manifest.choice.seed + 1)
    return manifest, base, trained.directory


def test_a_pooler_is_fitted_trained_saved_and_loaded(settings: dict[str, Any], without_pooler: Path, tmp_path: Path):
    manifest, base, directory = run_and_train(settings, without_pooler, tmp_path)
    assert list(manifest.model.heads) == HEADS
    before = base.model.get_parameter("bert.pooler.dense.weight").clone()
    loaded = load(base.model, directory)
    assert not torch.equal(loaded.get_parameter("bert.pooler.dense.weight"), before)


def test_a_head_that_the_checkpoint_has_in_part(settings: dict[str, Any], tiny_bert_dir: Path, tmp_path: Path):
    """ModernBERT is published with ``head.dense`` and ``head.norm`` of its language model, without a classifier."""
    from transformers import AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM

    tokenizer, folder = AutoTokenizer.from_pretrained(tiny_bert_dir), tmp_path / "modernbert"
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = ModernBertConfig(**shape, num_attention_heads=2, pad_token_id=0, max_position_embeddings=64)
    ModernBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest, base, directory = run_and_train(settings, folder, tmp_path)
    assert base.new_parameters == ("classifier.bias", "classifier.weight")
    assert list(manifest.model.heads) == ["head", "classifier"]
    assert manifest.model.fingerprint == base.fingerprint
    before = base.model.get_parameter("head.dense.weight").clone()
    loaded = load(base.model, directory)
    assert not torch.equal(loaded.get_parameter("base_model.model.head.modules_to_save.default.dense.weight"), before)


def test_a_parameter_that_nothing_trains_stays_as_it_is_drawn(
    settings: dict[str, Any], tiny_bert_dir: Path, tmp_path: Path
):
    names = ("embeddings.LayerNorm.bias", "embeddings.token_type_embeddings.weight")
    lacking = without(tmp_path / "old", tiny_bert_dir, *names)
    manifest, base, directory = run_and_train(settings, lacking, tmp_path)
    assert manifest.model.new_parameters == base.drawn == tuple(f"bert.{name}" for name in names)
    with torch.no_grad():
        base.model.get_parameter("bert.embeddings.LayerNorm.bias").fill_(0.5)
    load(base.model, directory)


def test_a_parameter_of_a_block_that_is_not_there_is_refused(tiny_bert_dir: Path, tmp_path: Path):
    lacking = without(tmp_path / "other", tiny_bert_dir, "encoder.layer.0.output.dense.bias")
    with pytest.raises(ModelSpecError, match="lacks 1 parameters of the transformer blocks"):
        load_pretrained(str(lacking), "sequence-classification", ("a", "b"))


def test_in_memory_it_is_part_of_the_new_head(without_pooler: Path):
    from transformers import AutoTokenizer, BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(without_pooler)
    rows = [{"text": f"a {word} thing", "label": word} for word in ("fine", "grim") * 12]
    plan = layerlens.plan(
        model, rows, tokenizer=AutoTokenizer.from_pretrained(without_pooler), max_trainable_params=500,
        label_names=["grim", "fine"], latency_profile={"sequence_length": 16}, head_fit_samples=8,
    )  # fmt: skip
    assert list(plan.manifest.model.heads) == HEADS
    assert set(plan.lora_config().modules_to_save) == set(HEADS)
    assert "data: columns used: text, label" in plan.notes
    assert "data: classes LABEL_0 12, LABEL_1 12" in plan.notes
    assert "data: classes of the data matched with those of the model: grim as LABEL_0, fine as LABEL_1" in plan.notes
