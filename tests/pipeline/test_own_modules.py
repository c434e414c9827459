"""Modules of a user's own through whole jobs: what real models have inside, from a Python factory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from layerlens.config import RunConfig
from layerlens.exceptions import ModelSpecError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.peft import injected_ranks
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.torch_modules import without_compilation
from layerlens.jobs.run import run_config
from layerlens.tuning import load

PROJECT = '''
import torch
from torch import nn


class Own(nn.Module):
    """A wave, a volume and a text: convolutions with activations in place, keywords, attention of PyTorch."""

    def __init__(self):
        super().__init__()
        self.waves = nn.Sequential(nn.Conv1d(1, 8, 5, stride=2), nn.ReLU(inplace=True), nn.Conv1d(8, 8, 3))
        self.volumes = nn.Sequential(nn.Conv3d(1, 8, 2), nn.ReLU(inplace=True))
        self.words = nn.Embedding(20, 8)
        self.mixed = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 1, enable_nested_tensor=False)
        self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, waves, volumes, input_ids):
        h = self.waves(waves).mT + self.volumes(volumes).flatten(2).mean(-1)[:, None]
        h = torch.cat([h, self.words(input_ids)], dim=1).transpose(0, 1)
        return {"logits": self.head(input=torch.relu(self.up(input=self.mixed(h).mean(0))))}


def plain():
    torch.manual_seed(0)
    return Own()


def build():
    model = plain()
    model.waves = torch.compile(model.waves, backend="eager")
    return torch.compile(model, backend="eager")


def dataset():
    g = torch.Generator().manual_seed(1)
    inputs = {
        "waves": torch.randn(24, 1, 16, generator=g), "volumes": torch.randn(24, 1, 3, 3, 3, generator=g),
        "input_ids": torch.randint(0, 20, (24, 5), generator=g),
    }
    return [(inputs, torch.randint(0, 3, (24,), generator=g))]


def loss(output, y):
    return nn.functional.cross_entropy(output["logits"], y, reduction="none")
'''


def test_a_model_of_own_modules_is_measured_adapted_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_modules.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    config = RunConfig.model_validate(
        {
            "model": {"factory": "own_modules:build", "task": "custom", "loss": "own_modules:loss"},
            "data": {"source": "own_modules:dataset", "calibration_samples": 8, "batch_size": 4},
            "optimization": {
                "max_trainable_params": 400,
                "methods": ["lora"],
                "refine": False,
                "latency_profile": {"batch_size": 2},
                "constraints": {"rules": [{"layers": "mixed.*linear2", "max_rank": 0}]},
            },
        }
    )
    result = run_config(config, base_dir=tmp_path, use_cache=False)
    left_out = result.manifest.model.left_out or {}
    offered = [row.layer for row in result.manifest.allocations]
    assert offered == ["waves.0", "waves.2", "volumes.0", "mixed.layers.0.linear1", "up", "head"]
    assert "rules[0] leaves it alone" in left_out["mixed.layers.0.linear2"]
    assert "MultiheadAttention" in left_out["mixed.layers.0.self_attn.out_proj"]
    assert "queries, keys and values" in left_out["mixed.layers.0.self_attn.in_proj_weight"]
    told = " ".join(result.warnings)
    assert "calls up, head by keyword" in told
    assert "is compiled or replicated" in told

    import own_modules

    ranks = {row.layer: row.rank for row in result.manifest.allocations if row.rank}
    assert ranks
    inputs = own_modules.dataset()[0][0]
    with torch.no_grad():
        before = own_modules.plain().eval()(**inputs)["logits"]
        tuned = load(own_modules.plain(), result.directory / "peft").eval()
        assert torch.equal(tuned(**inputs)["logits"], before)
    assert injected_ranks(tuned) == ranks
    assert injected_ranks(PeftModel.from_pretrained(own_modules.plain(), result.directory / "peft")) == ranks


def test_stages_of_several_widths_and_no_hidden_size():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    spec = model_spec(PretrainedModel(model, None, "", ()), "test", inputs=inputs)
    attention = [layer for layer in spec.layers if layer.layer_type == "attention"]
    assert [(x.hidden_size, x.n_in, x.num_heads, x.d_kv) for x in attention] == [(8, 8, 1, 8), (16, 16, 2, 16)]


def test_what_was_compiled_is_called_by_python_again():
    inner = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    inner[0].compile(backend="eager")
    inner[1] = torch.compile(inner[1], backend="eager")
    model, notes = without_compilation(torch.nn.DataParallel(torch.compile(inner, backend="eager")))
    assert model is inner
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert model[0]._compiled_call_impl is None
    assert "DataParallel, the whole of it, 0, 1" in notes[0] or "DataParallel, the whole of it, 1, 0" in notes[0]
    assert without_compilation(inner) == (inner, ())


def test_a_model_that_loads_nothing_but_its_own_files_is_left_out_with_the_reason():
    class Versioned(torch.nn.Sequential):
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
            if local_metadata.get("version") != 2:
                raise ValueError("version should be 2")

    model = Versioned(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with pytest.raises(ModelSpecError, match="cannot load an adapter onto Versioned: version should be 2"):
        model_spec(PretrainedModel(model, None, "", ()), "test")


class Counting(torch.nn.Module):
    """A forward pass changes a buffer, and renormalises rows of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(9, 8, max_norm=0.5)
        self.up, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.head(torch.relu(self.up(self.words(words).mean(1))))


def test_the_fingerprint_is_of_the_weights_before_any_forward_pass():
    model = Counting()
    spec = model_spec(PretrainedModel(model, None, "", ()), "own", inputs={"words": torch.arange(8).view(2, 4)})
    assert model.passes > 0
    assert spec.fingerprint == PretrainedModel(Counting(), None, "", ()).fingerprint
