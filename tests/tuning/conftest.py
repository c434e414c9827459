"""Tiny random models of three shapes (BERT, GPT-2 with Conv1D, Llama with grouped queries) and manifests for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.methods import trainable_params
from layerlens.models import LoraSettings, Manifest, ManifestRow, ModelFacts, Provenance

sys.path.insert(0, str(Path(__file__).parent))  # shapes.py, which pytest's importlib mode does not find

LABELS = ["a", "b", "c"]
ARCHITECTURES = ("bert", "gpt2", "llama")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Tiny:
    """A model in evaluation mode, its layers, and token ids to feed it."""

    model: Any
    spec: Any
    tokens: torch.Tensor

    def logits(self, model: Any = None) -> torch.Tensor:
        with torch.no_grad():
            return (self.model if model is None else model)(self.tokens).logits

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def build(architecture: str, attention: str = "sdpa", seed: int = 0) -> Tiny:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    # Wide initial weights: with the usual 0.02 nothing that attention does would show in the logits.
    common: dict[str, Any] = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0, "initializer_range": 0.2}
    common["attn_implementation"] = attention
    torch.manual_seed(seed)
    model: Any
    if architecture == "bert":
        wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model, head = BertForSequenceClassification(BertConfig(**wide, **common)), "classifier"
    elif architecture == "gpt2":
        model, head = GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=2, n_head=4, **common)), "score"
    else:
        wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForSequenceClassification(LlamaConfig(**wide, num_key_value_heads=2, **common))
        head = "score"
    model.eval()
    new = tuple(name for name, _ in model.named_parameters() if name.startswith(head))
    spec = model_spec(PretrainedModel(model, None, "", new), f"tiny-{architecture}")
    return Tiny(model, spec, torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def tiny() -> Callable[..., Tiny]:
    return build


def manifest_for(spec: Any, choose: Mapping[str, tuple[str, int]], **model_fields: Any) -> Manifest:
    """A manifest in which ``choose`` gives (method, rank) by layer name, none elsewhere."""
    layers = {layer.name: layer for layer in spec.layers}
    assert choose.keys() <= layers.keys()
    rows = []
    for name, layer in layers.items():
        method, rank = choose.get(name, ("none", 0))
        rows.append(ManifestRow(name, method, rank, 0.0, trainable_params(layer, method, rank), 0.0, 0.0, 0.0, 0.0))
    head = "score" if spec.model_name in ("tiny-gpt2", "tiny-llama") else "classifier"
    model = {
        "name_or_path": spec.model_name,
        "fingerprint": spec.fingerprint,
        "total_params": spec.total_params,
        "task": "sequence-classification",
        "num_labels": 3,
        "labels": tuple(LABELS),
        "head_modules": (head,),
    }
    return Manifest(
        model=ModelFacts.of({**model, **model_fields}),
        allocations=tuple(rows),
        resources=(),
        score=0.0,
        upper_bound=0.0,
        gap=0.0,
        status="optimal",
        solver="test",
        utility_model="uniform",
        utility_unit="share",
        lora=LoraSettings(2.0),
        provenance=Provenance(seed=7),
    )


@pytest.fixture
def manifest_of() -> Callable[..., Manifest]:
    return manifest_for


def mixed_choice(spec: Any) -> dict[str, tuple[str, int]]:
    """LoRA of two ranks, an adapter and two prefixes in one model; some layers left alone."""
    by_role: dict[str, list[str]] = {}
    for layer in spec.layers:
        by_role.setdefault(layer.role, []).append(layer.name)
    query = by_role.get("query") or by_role["query_key_value"]
    first, second = by_role["attention"]
    return {
        query[0]: ("lora", 2),
        by_role["ffn_up"][1]: ("lora", 4),
        by_role["ffn_down"][0]: ("adapter", 3),
        first: ("prefix", 2),
        second: ("prefix", 5),
    }


@pytest.fixture
def mixed() -> Callable[..., dict[str, tuple[str, int]]]:
    return mixed_choice
