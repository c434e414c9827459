"""Every example in a docstring of the package does what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import layerlens

PACKAGE = Path(__file__).parents[2] / "layerlens"
MODULES = sorted(
    ".".join(("layerlens", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_there_are_examples():
    assert len(MODULES) > 5


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("layerlens.library.")])
def test_examples_hold(name):
    with np.printoptions(linewidth=75):  # ultralytics, which other tests import, changes NumPy's
        failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    assert tried > 0


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("layerlens.library.")])
def test_examples_on_objects_hold(name, tmp_path, monkeypatch):
    """Those take a model, a data loader and a trainer for granted, and what was measured and planned on them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_attention_heads=4, num_key_value_heads=4, **sizes))
    tokens = torch.randint(1, 60, (16, 8))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    arguments = TrainingArguments("trained", per_device_train_batch_size=4, report_to=[], use_cpu=True)
    statistics = layerlens.profile(model, loader)
    plan = layerlens.choose(statistics, model, max_trainable_params="2k")
    known = {"layerlens": layerlens, "model": model, "loader": loader, "statistics": statistics, "plan": plan}
    known["trainer"] = Trainer(model, arguments, train_dataset=rows)
    failed, tried = doctest.testmod(importlib.import_module(name), extraglobs=known)
    assert failed == 0
    assert tried > 0
