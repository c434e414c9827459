"""What factories return that torch's users have: transforms of one image, tuples, complex weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, ModelSpecError
from layerlens.jobs.train import train_manifest
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained
from layerlens.tasks.losses import logits_of

MODULE = "own_factories_of_a_test"
CODE = '''
import numpy as np
import torch
from torch import nn

def one(image):
    """As torchvision's weights.transforms(): of one image."""
    return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32) / 255).permute(2, 0, 1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.spectrum = nn.Parameter(torch.view_as_complex(torch.randn(8, 4, 3, 2) * 0.3))
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.features(x)
        mixed = torch.fft.irfft2(torch.fft.rfft2(hidden) * self.spectrum, s=hidden.shape[-2:])
        hidden = (hidden + mixed).mean((2, 3))
        return self.fc(hidden), hidden

class Unnamed(Net):
    def forward(self, *args):
        return super().forward(*args)

def build():
    return Net(), one

def scripted():
    return torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), one

def lazy():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(3)), one

def unnamed():
    return Unnamed(), one

def unresized():
    return Net(), lambda image: torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)

def failing():
    return Net(), lambda image: image.nothing

def detector():
    from layerlens.integrations.torchvision_import import make_torchvision_importable
    make_torchvision_importable()
    from torchvision.models.detection import fcos_resnet50_fpn
    return fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3), one

class Misfit(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.fc = nn.Linear(9, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.hidden(x.flatten(1)))

def misfit():
    return Misfit(), one

def packed():
    model = Misfit()
    part = nn.Sequential(nn.Linear(192, 8))
    model.hidden = torch.ao.quantization.quantize_dynamic(part, {nn.Linear}, dtype=torch.qint8)
    return model, one

class Mixed(Misfit):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(192, 8).bfloat16()

    def forward(self, x):
        return self.fc(self.hidden(x.flatten(1).bfloat16()).float())

class Phases(Misfit):
    def __init__(self):
        super().__init__()
        self.phases, self.hidden = nn.Linear(192, 8, dtype=torch.complex64), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.hidden(self.phases(torch.fft.fft(x.flatten(1))).abs()))

def phases():
    return Phases(), one

def mixed():
    return Mixed(), one

def double():
    return Net().double(), one
'''


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / f"{MODULE}.py").write_text(CODE)
    rng = np.random.default_rng(0)
    for place, kind in enumerate("abc"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 100, (8, 8 + number % 2, 3), dtype=np.uint8)
            pixels[..., place] += 140
            Image.fromarray(pixels).save(tmp_path / f"images/{kind}/{number}.png")
    yield tmp_path
    sys.modules.pop(MODULE, None)


def config_of(factory: str) -> RunConfig:
    settings: dict[str, Any] = {
        "model": {"factory": f"{MODULE}:{factory}", "task": "image-classification", "head": ["fc"]},
        "data": {"source": "images", "calibration_samples": 8, "batch_size": 4},
        "optimization": {"max_trainable_params": 300, "methods": ["lora"], "latency_profile": {"batch_size": 2}},
        "training": {"max_steps": 20, "batch_size": 8, "learning_rate": 3e-2},
        "runtime": {"threads": 1},
    }
    return RunConfig.model_validate(settings)


def test_a_transform_of_one_image_a_tuple_and_complex_weights(folder: Path):
    loaded = load_pretrained(f"factory:{MODULE}:build", "image-classification", "abc", base_dir=folder)
    spectrum = loaded.model.spectrum
    assert spectrum.is_complex()  # `.to(torch.float32)` would have taken its imaginary part away
    assert spectrum.imag.abs().min() > 0
    config = config_of("build")
    done = run_config(config, base_dir=folder)
    assert {row.layer for row in done.manifest.allocations} == {"features.0", "features.2"}
    assert "a parameter of Net" in done.manifest.model.left_out["spectrum"]
    trained = train_manifest(folder / "out/manifest.json", config, base_dir=folder, output=folder / "tuned")
    assert trained.after["loss"] < trained.before["loss"]
    assert trained.after["top1"] == 1.0


def test_layers_of_complex_numbers_are_left_out_and_not_taken_for_quantized_ones(folder: Path):
    done = run_config(config_of("phases"), base_dir=folder, use_cache=False)
    assert [row.layer for row in done.manifest.allocations] == ["hidden"]
    assert done.manifest.model.left_out["phases"] == "its weight is complex, and PEFT's LoRA is real"
    assert any(use.resource == "step_ms" for use in done.manifest.resources)  # its step is recorded


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "scripted",
            r"returns a torch\.jit ScriptModule \(the model itself\), .* return the module that it was made",
        ),
        ("lazy", r"returns layers without weights \(lazy: 2\.weight, 2\.bias\); call the model once"),
        ("unnamed", r"forward of Unnamed names no argument \(\*args\); name the one"),
        ("unresized", r"gives images of several sizes \(\[3, 8, 8\], \[3, 8, 9\]\); resize in it"),
        (
            "failing",
            r"fails on one image \(AttributeError: .*nothing.*\) and on a list of images \(AttributeError: 'list'",
        ),
        ("detector", r"returns a FCOS, a detector of torchvision, .* not supported; use a YOLO detector"),
        ("packed", r"that can take LoRA .*; hidden\.0: its weight is packed for kernels of torch\.ao"),
        (
            "misfit",
            r"Misfit fails on a batch of this data: RuntimeError: mat1 and mat2 .* \(own_factories_of_a_test\.py, line "
            r"\d+\); it got x: float32 \[4, 3, 8, 8\]\. Check data\.source, or try another model\.dtype",
        ),
    ],
)
def test_what_cannot_be_is_said(folder: Path, factory: str, message: str):
    with pytest.raises((ConfigurationError, ModelSpecError), match=message):
        run_config(config_of(factory), base_dir=folder)


def test_weights_in_several_precisions_stay_as_the_factory_made_them(folder: Path):
    def loaded(factory: str, **more: Any) -> Any:
        return load_pretrained(f"factory:{MODULE}:{factory}", "image-classification", "abc", base_dir=folder, **more)

    mixed = loaded("mixed")
    assert (mixed.model.hidden.weight.dtype, mixed.model.fc.weight.dtype) == (torch.bfloat16, torch.float32)
    assert mixed.notes == (
        "model: its weights are in bfloat16 and float32, and stay so; set model.dtype to bring all into another",
    )
    half = loaded("mixed", dtype="bfloat16")
    assert {one.dtype for one in half.model.parameters()} == {torch.bfloat16}
    double = loaded("double")
    assert double.model.fc.weight.dtype == torch.float32
    assert double.notes == ("model: its weights are in float64, and are measured in float32 (model.dtype)",)
    done = run_config(config_of("mixed"), base_dir=folder, use_cache=False)
    assert [row.layer for row in done.manifest.allocations] == ["hidden"]


def test_logits_stand_in_one_of_four_places():
    scores = torch.ones(2, 3)
    for output in (scores, (scores, None), [scores], {"logits": scores, "aux": None}, {"out": scores}):
        assert logits_of(output) is scores
    with pytest.raises(
        ModelSpecError, match=r"its output is a dict of 'centre', 'size'; return the scores as a tensor"
    ):
        logits_of({"centre": scores, "size": scores})
