"""The README of a trained adapter: what it is, and a way to load it that works as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from layerlens.config import RunConfig
from layerlens.jobs.train import train_manifest
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained


@pytest.fixture
def trained(settings: dict[str, Any], tmp_path: Path) -> Any:
    """(train again into a directory, the manifest's choice)."""
    settings["model"]["task"] = "sequence-classification"
    settings["optimization"]["methods"] = ["lora"]
    settings["training"] = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2}
    config = RunConfig(**settings)
    done = run_config(config, base_dir=tmp_path)

    def train(output: Path) -> Any:
        return train_manifest(done.files["manifest_json"], config, base_dir=tmp_path, output=output)

    return train


def test_it_says_what_was_trained_and_its_code_loads_it(trained: Any, tmp_path: Path) -> None:
    result = trained(tmp_path / "tuned")
    card = (tmp_path / "tuned/README.md").read_text(encoding="utf-8")
    manifest = result.manifest
    assert f"base_model: {manifest.model.place}\n" in card
    assert "| task | sequence-classification |" in card
    assert "| data | reviews.jsonl: " in card
    assert f"LoRA on {len(manifest.choice.lora_options)} modules, rank" in card
    assert "the head classifier |" in card
    for name, value in result.after.items():
        assert f"| {name} | {result.before[name]:.4g} | {value:.4g} |" in card

    base = load_pretrained(manifest.model.place, "sequence-classification", manifest.model.labels, seed=1).model
    tokens = torch.arange(12).reshape(2, 6)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    scope: dict[str, Any] = {"base_model": base}
    exec(code.replace('"this directory"', repr(str(tmp_path / "tuned"))), scope)
    from layerlens.tuning import load

    again = load_pretrained(manifest.model.place, "sequence-classification", manifest.model.labels, seed=1).model
    expected = load(again, tmp_path / "tuned").eval()(input_ids=tokens).logits
    assert torch.allclose(scope["merged"].eval()(input_ids=tokens).logits, expected, atol=1e-5)


def test_a_readme_of_somebody_else_stays_and_an_own_one_is_renewed(trained: Any, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    output.mkdir()
    (output / "README.md").write_text("mine")
    trained(output)
    assert (output / "README.md").read_text() == "mine"
    (output / "README.md").write_text("---\ntags: [lora, layerlens]\n---\nof an earlier training")
    trained(output)
    assert "earlier" not in (output / "README.md").read_text(encoding="utf-8")
