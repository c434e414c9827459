"""A BERT that was saved from masked language modelling has no pooler: it is new like the head, and trained with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import layerlens
from layerlens.config import RunConfig
from layerlens.jobs.train import train_manifest
from layerlens.manifest import read_manifest
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained
from layerlens.tuning import load

HEADS = ["classifier", "bert.pooler"]


@pytest.fixture
def without_pooler(tiny_bert_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "dapt"
    shutil.copytree(tiny_bert_dir, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_it_is_fitted_trained_saved_and_loaded(settings: dict[str, Any], without_pooler: Path, tmp_path: Path):
    settings["model"] |= {"name_or_path": str(without_pooler), "task": "sequence-classification"}
    settings["training"] = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2}
    config = RunConfig(**settings)
    done = run_config(config, base_dir=tmp_path)
    assert list(read_manifest(done.files["manifest_json"]).model.heads) == HEADS
    trained = train_manifest(done.files["manifest_json"], config, base_dir=tmp_path, output=tmp_path / "trained")
    manifest = read_manifest(done.files["manifest_json"])
    base = load_pretrained(
        str(without_pooler), "sequence-classification", manifest.model.labels or (), seed=manifest.choice.seed
    )
    before = base.model.get_parameter("bert.pooler.dense.weight").clone()
    loaded = load(base.model, trained.directory)
    assert not torch.equal(loaded.get_parameter("bert.pooler.dense.weight"), before)


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
    assert "data: classes of the data taken for those of the model: grim as LABEL_0, fine as LABEL_1" in plan.notes
