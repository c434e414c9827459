"""A job of a second: a BERT of two blocks with random weights, 48 rows, a configuration, and a finished run of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from layerlens.integrations.torchvision_import import make_torchvision_importable

WORDS = ("good", "bad", "film", "plot", "fine", "dull", "great", "poor", "the", "a", "was", "is")
SETTINGS: dict[str, Any] = {
    "model": {"name_or_path": "model", "task": "sequence-classification", "head_fit_samples": 16},
    "data": {"source": "rows.jsonl", "calibration_samples": 16, "max_length": 12, "batch_size": 8},
    "optimization": {
        "max_trainable_params": 600,
        "max_flops": 1e6,
        "max_vram_gb": 0.1,
        "latency_target_ms": 50,
        "latency_profile": {"batch_size": 2, "sequence_length": 12},
        "methods": ["lora", "adapter", "prefix"],
        "lora_ranks": [1, 2],
        "adapter_sizes": [1, 2],
        "prefix_lengths": [2],
        "constraints": {"min_layers": {"lora": 1, "adapter": 1}},
    },
    "training": {"epochs": 1, "batch_size": 8, "save_every": 2},
    "output": {"directory": "out"},
    "runtime": {"threads": 1, "cache_dir": "cache"},
}


def write_job(folder: Path) -> Path:
    """``folder`` with model, rows.jsonl and config.yaml."""
    make_torchvision_importable()
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    model = folder / "model"
    model.mkdir(parents=True)
    (model / "vocab.txt").write_text(
        "\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)), encoding="utf-8"
    )
    BertTokenizerFast(str(model / "vocab.txt")).save_pretrained(model)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(model)
    chance = random.Random(0)
    rows = [{"text": " ".join(chance.choices(WORDS, k=6)), "label": ("neg", "pos")[row % 2]} for row in range(48)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False), encoding="utf-8")
    return folder


def make_job(folder: Path) -> Path:
    """The same with ``out``, what ``layerlens run`` wrote."""
    from layerlens.config.loader import load_run_config
    from layerlens.pipeline import run_config

    write_job(folder)
    run_config(load_run_config(folder / "config.yaml"), base_dir=folder)
    return folder
