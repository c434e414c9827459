"""Masks as people have them, and models for semantic segmentation beside SegFormer: UPerNet, torchvision's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image, ImageOps

from layerlens.config import DataConfig, RunConfig
from layerlens.data import load_dataset
from layerlens.data.masks import read_mask
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.integrations.pretrained import ImageInput
from layerlens.jobs.train import train_manifest
from layerlens.pipeline import run_config
from layerlens.tasks.semantic_segmentation import refuse_cuts
from layerlens.tuning import load
from layerlens.tuning.base_model import load_base

TASK = "semantic-segmentation"
NUMBERS = itertools.count()
FACTORY = """
import numpy as np
import torch
from layerlens.integrations.torchvision_import import make_torchvision_importable
make_torchvision_importable()
from torchvision.models.segmentation import FCN
from torchvision.models.segmentation.fcn import FCNHead

def pixels(images):
    return torch.stack([torch.from_numpy(np.asarray(i) / 255).permute(2, 0, 1).float() for i in images])

class Stem(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.BatchNorm2d(16), torch.nn.ReLU())
        self.second = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3, 2, 1), torch.nn.ReLU())

    def forward(self, x):
        first = self.first(x)
        return {"out": self.second(first), "aux": first}

def build():
    model = FCN(Stem(), FCNHead(32, 2), FCNHead(16, 2))  # as fcn_resnet50 with aux_loss, of two classes
    return model, pixels
"""


def write(folder: Path, low: int, high: int, mode: str = "L", suffix: str = "png", count: int = 24) -> Path:
    """Bright squares on dark ground, and their masks with these two numbers."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        inside = np.zeros((16, 16), bool)
        top, left = rng.integers(0, 8, 2)
        inside[top : top + 8, left : left + 8] = True
        grey = np.where(inside, 200, 60)[:, :, None] + rng.integers(0, 20, (16, 16, 3))
        Image.fromarray(grey.astype(np.uint8)).save(folder / f"images/{number}.png")
        mask = Image.fromarray(np.where(inside, high, low).astype(np.uint8)).convert(mode)
        mask.save(folder / f"masks/{number}.{suffix}")
    return folder


def read(folder: Path, **more: Any) -> Any:
    return load_dataset(DataConfig(source=str(folder), **more), task=TASK)


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_masks_of_two_numbers_have_two_classes(tmp_path: Path, mode: str):
    """0 and 255, as most tools save a foreground: 255 is no hole in the labels there."""
    found = read(write(tmp_path, 0, 255, mode, count=3))
    assert set(found.labels) == {(0, 1)}
    bits = mode == "1"  # True and False are 1 and 0 already
    assert found.label_names == (("0", "1") if bits else ("0", "255"))
    assert any("so 255 is the second class" in note for note in found.reading.notes) is not bits
    named = read(tmp_path, label_names=["ground", "polyp"])
    assert named.label_names == ("ground", "polyp")
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(tmp_path / "masks/0.png")  # nothing but foreground
    assert read(tmp_path).labels[0] == ((1,) if not bits else (0,)) or bits


def test_a_mask_with_nothing_labelled_is_left_out_where_255_is_no_class(tmp_path: Path):
    write(tmp_path, 0, 1, count=3)
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(tmp_path / "masks/1.png")
    found = read(tmp_path)
    assert found.labels == ((0, 1), (0, 1))
    assert found.reading.left_out == {2: "has a mask without a class"}
    (tmp_path / "rows.csv").write_text("image,mask\n" + "".join(f"images/{n}.png,masks/{n}.png\n" for n in range(3)))
    table = load_dataset(DataConfig(source=str(tmp_path / "rows.csv")), task=TASK)
    assert table.labels == found.labels


def test_grey_levels_and_lossy_masks_are_said(tmp_path: Path):
    grey = read(write(tmp_path / "grey", 0, 128, count=3))
    assert any("have 2 of the classes 0 to 128 (0, 128); if these are grey levels" in x for x in grey.reading.notes)
    with pytest.raises(DataError, match=r"none of the 3 images .* the first has a mask that is a JPEG, and JPEG"):
        read(write(tmp_path / "jpeg", 0, 1, suffix="jpg", count=3))
    with pytest.raises(DataError, match=r"data\.label_names: has 1 names, and a mask has the class 255"):
        read(write(tmp_path / "two", 0, 255, count=3), label_names=["polyp"])


def test_a_mask_is_turned_with_its_photograph_or_has_its_size(tmp_path: Path):
    """Tools that heed Exif save upright masks, others save them as the pixels lie; another size is no mask of it."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = np.zeros((8, 12), np.uint8)
    mask[:3, :4] = 1
    for name, turned, stored in (("a", exif, mask), ("b", exif, np.rot90(mask, -1)), ("c", None, mask.T)):
        Image.new("RGB", (12, 8)).save(tmp_path / f"images/{name}.png", **({"exif": turned} if turned else {}))
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"masks/{name}.png")
    found = read(tmp_path)
    assert found.reading.left_out == {3: "has a mask that has 8 × 12 pixels, and its image 12 × 8"}
    for image, one in zip(found.columns["image"], found.columns["mask"], strict=True):
        assert image.open("RGB").size == (8, 12)
        np.testing.assert_array_equal(read_mask(one, image), np.rot90(mask, -1))


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda image: image, False),
        (lambda image: image.resize((20, 12)), False),
        (lambda image: image.resize((300, 200), Image.Resampling.BICUBIC), False),
        (lambda image: image.crop((4, 4, 60, 36)), True),
        (lambda image: image.resize((72, 48)).crop((4, 4, 68, 44)), True),  # timm: to 1.14 of the size, then the centre
        (lambda image: ImageOps.pad(image, (64, 64)), True),
        (lambda image: ImageOps.mirror(image), True),
    ],
    ids=["nothing", "down", "up", "cut", "centre", "letterbox", "mirror"],
)
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_a_transform_that_moves_the_image_under_its_mask_is_refused(change: Any, refused: bool, scale: float):
    """Masks of such a transform were scaled to its size, and lay beside what they show."""

    def transform(images: Any) -> torch.Tensor:
        arrays = [np.asarray(change(image)) / 255 for image in images]
        return torch.stack([torch.from_numpy(scale * (one - 0.4)).permute(2, 0, 1).float() for one in arrays])

    found = ImageInput(transform, "x")
    if refused:
        with pytest.raises(ConfigurationError, match="cuts, pads or turns images, and masks are only scaled"):
            refuse_cuts(found, (64, 40))
    else:
        refuse_cuts(found, (64, 40))


def upernet(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = hf.ConvNextConfig(
        num_stages=4, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], patch_size=2, out_features=stages
    )
    config = hf.UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[1], auxiliary_in_channels=16, auxiliary_channels=8
    )
    hf.UperNetForSemanticSegmentation(config).save_pretrained(folder / "model")
    hf.SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    return {"name_or_path": "model", "new_head": True}


def torchvision(folder: Path) -> dict[str, Any]:
    module = f"own_segmenter_{next(NUMBERS)}"
    (folder / f"{module}.py").write_text(FACTORY)
    return {"factory": f"{module}:build", "head": ["classifier", "aux_classifier"]}


@pytest.mark.parametrize("make", [upernet, torchvision])
def test_other_models_are_measured_trained_and_loaded(make: Any, tmp_path: Path):
    write(tmp_path / "data", 0, 255)
    settings = {
        "model": {**make(tmp_path), "task": TASK, "head_fit_samples": 8},
        "data": {"source": "data", "label_names": ["ground", "square"], "calibration_samples": 8, "batch_size": 4},
        "optimization": {"max_trainable_params": 900, "methods": ["lora"], "latency_profile": {"batch_size": 2}},
        "training": {"max_steps": 16, "batch_size": 4, "learning_rate": 1e-2, "eval_samples": 6},
        "runtime": {"threads": 1},
    }
    config = RunConfig.model_validate(settings)
    done = run_config(config, base_dir=tmp_path)
    assert done.manifest.model.labels == ("ground", "square")
    assert done.manifest.trainable_params > 0
    tuned = train_manifest(tmp_path / "out/manifest.json", config, base_dir=tmp_path, output=tmp_path / "tuned")
    assert tuned.after["loss"] < tuned.before["loss"]
    assert tuned.after["mean_iou"] > tuned.before["mean_iou"]
    reference = f"factory:{settings['model']['factory']}" if "factory" in settings["model"] else "model"
    base = load_base(done.manifest, reference, tmp_path).model
    load(base, tmp_path / "tuned")
