"""Custom models with their own heads and samples: what is trained in full, and how batches are made."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open

from layerlens.config import RunConfig
from layerlens.exceptions import DataError, ModelSpecError
from layerlens.integrations.named_heads import note_of_fresh
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.train import train_manifest
from layerlens.pipeline import run_config
from layerlens.registry import TASKS
from layerlens.sources import load_pretrained
from layerlens.tuning import load

NUMBERS = itertools.count()
MODULE = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3))
        self.fc = nn.Linear(16, 1000)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))

def build():
    model = Small()
    model.fc = nn.Linear(16, 3)
    return model, lambda images: torch.stack(
        [torch.tensor(list(i.resize((8, 8)).tobytes())).reshape(8, 8, 3).permute(2, 0, 1) / 255 for i in images])

class Clash(Small):
    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(2, 2)

def clashing():
    return Clash()

class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        nn.init.normal_(self.down.weight, std=0.4)  # as if trained

    def forward(self, x):
        return self.down(torch.relu(self.middle(torch.relu(self.up(x))))).log_softmax(-1)

def speech():
    return Speech()

class Sounds(torch.utils.data.Dataset):
    def __init__(self):
        g = torch.Generator().manual_seed(1)
        self.rows = [(torch.randn(6 + i % 2, 6, generator=g), torch.arange(1, 2 + i % 3)) for i in range(48)]
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, i):
        return self.rows[i]

def sounds():
    return Sounds()

def padded(samples):
    pad = lambda rows: nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = [torch.tensor([len(sample[part]) for sample in samples]) for part in (0, 1)]
    x, y = (pad([sample[part] for sample in samples]) for part in (0, 1))
    return {"x": x, "speaker": lengths[0], "labels": (y, *lengths)}

def flat(samples):
    return {"x": torch.cat([x for x, _ in samples]), "labels": torch.zeros(len(samples))}

def ctc(output, targets):
    words, n_frames, n_words = targets
    return nn.functional.ctc_loss(output.transpose(0, 1), words, n_frames, n_words, reduction="none")
"""


@pytest.fixture
def own(settings: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], str]:
    """Settings without a model, and the name of a module of the user's beside the configuration."""
    module = f"own_heads_{next(NUMBERS)}"
    (tmp_path / f"{module}.py").write_text(MODULE)
    settings["profiling"] = {}
    settings["optimization"] = {"max_trainable_params": 100, "methods": ["lora"], "latency_profile": {"batch_size": 2}}
    settings["training"] = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-2}
    return settings, module


def _images(folder: Path) -> str:
    rng = np.random.default_rng(0)
    for place, kind in enumerate("abc"):
        (folder / "images" / kind).mkdir(parents=True)
        for number in range(16):
            pixels = rng.integers(0, 120, (8, 8, 3), dtype=np.uint8)
            pixels[..., place] += 130
            Image.fromarray(pixels).save(folder / f"images/{kind}/{number}.png")
    return "images"


def test_a_fresh_head_of_a_factory_is_trained_saved_and_loaded_where_it_is_named(own, tmp_path: Path):
    settings, module = own
    settings["model"] = {"factory": f"{module}:build", "task": "image-classification"}
    settings["data"] = {"source": _images(tmp_path), "calibration_samples": 12, "batch_size": 6}
    said = note_of_fresh(load_pretrained(f"factory:{module}:build", "image-classification", "abc", base_dir=tmp_path))
    assert "fc, look freshly initialised" in said
    assert "model.head: [fc]" in said

    settings["model"]["head"] = ["f?"]
    settings["model"]["head_fit_samples"] = 24
    config = RunConfig.model_validate(settings)
    done = run_config(config, base_dir=tmp_path)
    assert not any("look freshly initialised" in line for line in done.warnings)
    manifest = done.manifest
    assert manifest.model.head_modules == ("fc",)
    assert {row.layer for row in manifest.allocations} == {"features.0", "features.3"}
    sys.path.insert(0, str(tmp_path))
    try:
        built = __import__(module)
    finally:
        sys.path.remove(str(tmp_path))
    with safe_open(tmp_path / "out/head.safetensors", "pt") as file:
        fitted = file.get_tensor("fc.weight")
    pixels = torch.rand(2, 3, 8, 8)

    path = tmp_path / "out/manifest.json"
    trained = train_manifest(path, config, base_dir=tmp_path, output=tmp_path / "tuned")
    assert trained.training.trained_parameters == manifest.trainable_params + 16 * 3 + 3
    assert trained.after["top1"] >= trained.before["top1"]
    with safe_open(tmp_path / "tuned/adapter_model.safetensors", "pt") as file:
        head = file.get_tensor("base_model.model.fc.weight")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base, plain = built.build()[0], None
        torch.manual_seed(0)
        plain = built.build()[0]
    assert not torch.equal(head, plain.fc.weight)
    assert not torch.equal(fitted, plain.fc.weight)
    ours = load(base.eval().requires_grad_(False), tmp_path / "tuned", check_fingerprint=False)
    theirs = PeftModel.from_pretrained(plain.eval(), str(tmp_path / "tuned")).eval()
    assert torch.equal(ours(pixels), theirs(pixels))


@pytest.mark.parametrize(
    ("factory", "head", "said"),
    [
        ("build", ["classifier"], r"model\.head: 'classifier' names no module of Small; it has features, fc"),
        ("build", ["features.2"], r"model\.head: 'features.2' names a module without parameters"),
        ("clashing", ["fc"], r"by the ends of their names, so it would confuse c_fc with fc"),
    ],
)
def test_a_head_that_is_none_is_refused(own, tmp_path: Path, factory: str, head: list[str], said: str):
    settings, module = own
    settings["model"] = {"factory": f"{module}:{factory}", "task": "custom", "loss": f"{module}:ctc", "head": head}
    settings["data"] = {"source": f"{module}:sounds", "calibration_samples": 8}
    with pytest.raises(ModelSpecError, match=said):
        run_config(RunConfig.model_validate(settings), base_dir=tmp_path)


def test_sequences_with_targets_of_their_own_lengths_are_joined_by_the_users_function(own, tmp_path: Path):
    settings, module = own
    settings["model"] = {"factory": f"{module}:speech", "task": "custom", "loss": f"{module}:ctc", "head": ["down"]}
    settings["model"]["head_fit_samples"] = 0
    settings["data"] = {"source": f"{module}:sounds", "calibration_samples": 16, "batch_size": 8}
    settings["data"]["collate"] = f"{module}:flat"
    with pytest.raises(DataError, match=r"data\.collate: x must have the samples along the first axis"):
        run_config(RunConfig.model_validate(settings), base_dir=tmp_path)

    settings["data"]["collate"] = f"{module}:padded"
    config = RunConfig.model_validate(settings)
    done = run_config(config, base_dir=tmp_path)
    assert any("Speech.forward takes no speaker" in line for line in done.warnings)
    assert done.manifest.model.head_modules == ("down",)  # trained, though its weights are no fresh ones
    trained = train_manifest(tmp_path / "out/manifest.json", config, base_dir=tmp_path, output=tmp_path / "tuned")
    assert trained.after["loss"] < trained.before["loss"]


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"x": torch.zeros(3, 6), "labels": 0}, {"x": torch.zeros(4, 6), "labels": 0}, r"'x' of the shapes \[3, 6\]"),
        ({"x": torch.zeros(3), "labels": [1]}, {"x": torch.zeros(3), "labels": [1, 2]}, r"targets .* combined"),
    ],
)
def test_samples_of_several_shapes_are_refused_with_the_key_to_set(one: Any, other: Any, said: str):
    model = PretrainedModel(torch.nn.Linear(6, 2), None, "", ())
    with pytest.raises(DataError, match=rf"data\.source: .*{said}.*data\.collate: module:function"):
        TASKS["custom"].collate(model, [one, other])
