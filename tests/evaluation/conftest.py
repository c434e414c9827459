"""A tiny BERT with a task that it can learn in a few steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from layerlens.evaluation.study_task import Samples, StudyTask
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.losses import classification_loss

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "evaluation"))  # what only our own study uses

LENGTH, VOCABULARY = 6, 20


def make_task(**changes: Any) -> StudyTask:
    """Whether token 5 is in the text, 96 samples."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval().requires_grad_(False)
    ids = torch.randint(0, VOCABULARY, (96, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = (ids == 5).any(dim=1).long()
    parts = [slice(0, 64), slice(64, 80), slice(80, 96)]
    samples = [
        Samples({"input_ids": ids[part], "attention_mask": torch.ones_like(ids[part])}, labels[part]) for part in parts
    ]
    spec = model_spec(PretrainedModel(model, None, "tiny", ()), "tiny")
    arguments: dict[str, Any] = {"heads": ["classifier"], "steps": 6, "batch_size": 4, "ranks": (1, 2, 4)}
    return StudyTask("tiny", model, spec, *samples, classification_loss, **(arguments | changes))


@pytest.fixture
def task() -> StudyTask:
    """The tiny task."""
    return make_task()


@pytest.fixture(scope="module")
def module_task() -> StudyTask:
    """The tiny task, for fixtures that are made once for a file."""
    return make_task()
