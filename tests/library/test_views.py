"""``diff`` and ``estimate`` as a program calls them: with plans, manifests and places."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import LlamaConfig

from layerlens import diff, estimate
from layerlens.exceptions import ConfigurationError, ManifestError
from layerlens.library.plan import Plan
from layerlens.manifest import write_manifest
from layerlens.methods import trainable_params
from layerlens.models import (
    RESOURCES,
    LayerSpec,
    LoraSettings,
    Manifest,
    ManifestRow,
    ModelFacts,
    Provenance,
    ResourceUse,
)

LAYERS = [f"model.layers.{block}.self_attn.{name}_proj" for block in range(2) for name in ("q", "v")]
CONFIG = {
    "model": {"name_or_path": "llama", "task": "causal-lm"},
    "data": {"source": "d.jsonl", "max_length": 32},
    "optimization": {"max_trainable_params": 1000, "latency_profile": {"batch_size": 2, "sequence_length": 32}},
}


def made(rank: int, reference: str = "llama") -> Manifest:
    spec = LayerSpec("x", 16, n_in=16, n_out=16)
    cost = {"q": trainable_params(spec, "lora", rank), "v": rank * (16 + 8)}
    rows = tuple(ManifestRow(name, "lora", rank, 1.0, cost[name[-6]], 0.0, 0.0, 0.0, 1.0) for name in LAYERS)
    used = float(sum(row.cost for row in rows))
    uses = [ResourceUse("trainable_params", None, 0.0, used, used, 0.0, "exact")]
    uses += [ResourceUse(name, None, 1.0, 0.0, 1.0, 0.0, "") for name in RESOURCES[1:]]
    return Manifest(
        ModelFacts(name_or_path=reference, task="causal-lm", fingerprint="ab" * 32, dtype="float32"),
        rows, tuple(uses), 4.0, 4.0, 0.0, "optimal", "by hand", "gradient", "energy",
        lora=LoraSettings(alpha_over_r=2.0), provenance=Provenance(seed=0, config=CONFIG),
    )  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> str:
    LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        num_key_value_heads=2, max_position_embeddings=256, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "llama")  # fmt: skip
    return str(tmp_path / "llama")


def test_plans_manifests_and_places_are_compared_alike(tmp_path: Path):
    write_manifest(made(4), tmp_path / "a", created_at="2026-01-31T12:00:00Z")
    found = diff(made(2), Plan(made(4)))
    assert [(one.layer, one.first, one.second) for one in found.layers] == [
        (name, ("lora", 2), ("lora", 4)) for name in LAYERS
    ]
    by_place = diff(made(2), tmp_path / "a")
    assert by_place.names == ("first", str(tmp_path / "a"))
    assert dataclasses.replace(by_place, names=found.names) == found
    assert not diff(tmp_path / "a", str(tmp_path / "a/manifest.yaml"))
    with pytest.raises(ManifestError, match="no such file"):
        diff(made(2), tmp_path / "b")


def test_a_choice_and_the_same_uniform_lora_cost_the_same(llama: str):
    chosen = estimate(Plan(made(4, llama)))
    uniform = estimate(llama, rank=4, targets=["q_proj", "v_proj"], batch_size=2, sequence_length=32)
    assert chosen.resources == uniform.resources
    assert estimate(llama, rank=4, targets="q_proj,v_proj").trainable_params == chosen.trainable_params
    assert chosen.trainable_params == made(4).trainable_params
    assert estimate(made(4), model=llama, batch_size=4).base_flops == 2 * chosen.base_flops
    assert estimate(llama, rank=4).trainable_params > chosen.trainable_params
    with pytest.raises(ConfigurationError, match="a manifest has its own ranks"):
        estimate(made(4, llama), rank=4)
