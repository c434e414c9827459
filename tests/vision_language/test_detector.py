"""The trained detector: how good it is, its steps against ultralytics' own predict, and weights that cannot be had."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import detector as detector_module
from toys import language_model as language_module
from toys.plates import CLASSES, draw_plates

from layerlens.exceptions import ConfigurationError, ModelNotFoundError, ModelSpecError
from layerlens.integrations.torchvision_import import make_suppression_work, make_torchvision_importable, nms
from layerlens.integrations.ultralytics import find_weights, load_detector
from layerlens.sources import load_pretrained
from layerlens.vision_language.images import load_image

ROOT = Path(__file__).parents[2]


def test_the_demos_models_are_trained_and_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """For a few steps; how good they become, benchmarks/toy_models.py says."""
    monkeypatch.setattr(detector_module, "TRAINING_PLATES", 32)
    monkeypatch.setattr(detector_module, "EPOCHS", 1)
    monkeypatch.setattr(language_module, "_STEPS", 2)
    weights = detector_module.cached_detector(tmp_path)
    assert load_detector(weights).names == CLASSES
    assert detector_module.cached_detector(tmp_path) == weights  # kept
    directory = language_module.cached_language_model(tmp_path)
    assert load_pretrained(str(directory), "causal-lm", []).tokenizer.chat_template


def test_plates_depend_on_seed_and_place_only():
    few, many = draw_plates(2, 5), draw_plates(4, 5)
    assert all(np.array_equal(a.pixels, b.pixels) and a.boxes == b.boxes for a, b in zip(few, many[:2], strict=True))
    assert not np.array_equal(draw_plates(1, 6)[0].pixels, few[0].pixels)


def test_steps_find_what_ultralytics_predict_finds(detector_weights: Path, plates: Path):
    from ultralytics import YOLO

    detector = load_detector(detector_weights, confidence=0.3, iou=0.5, fuse=True)
    paths = sorted(plates.iterdir())
    images = [load_image(path, 10) for path in paths]
    batch = torch.stack([detector.preprocess(image) for image in images])
    found = detector.suppress(detector.infer(batch), [image.size for image in images])
    # 16-bit rounding inside oneDNN convolutions aside, the same numbers: float32, same letterbox, same suppression.
    expected = YOLO(str(detector_weights)).predict(
        [str(path) for path in paths], conf=0.3, iou=0.5, imgsz=128, rect=False, verbose=False, device="cpu"
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert [detection.label for detection in ours] == [theirs.names[int(c)] for c in theirs.boxes.cls]
        assert np.allclose([detection.box for detection in ours], theirs.boxes.xyxy.numpy(), atol=0.05)
        assert np.allclose([detection.confidence for detection in ours], theirs.boxes.conf.numpy(), atol=1e-3)
    assert sum(map(len, found)) > 0


def test_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ModelNotFoundError, match=r"detector: no weights at .*mine.pt; give a local .pt file, or the"):
        find_weights("mine.pt", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ultralytics.utils.ONLINE", False)
    with pytest.raises(
        ModelNotFoundError, match=r"yolo11n.pt is not here and cannot be downloaded \(this machine is off"
    ):
        find_weights("yolo11n.pt", tmp_path)


@pytest.mark.parametrize("kind", ["text", "tensor"])
def test_files_that_are_no_detector(tmp_path: Path, kind: str):
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, buffer)
    (tmp_path / "bad.pt").write_bytes(b"hello" if kind == "text" else buffer.getvalue())
    with pytest.raises(ModelNotFoundError, match=r"bad.pt is not a checkpoint of ultralytics"):
        load_detector(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ("yolo11n-seg", "is for the task 'segment'; give a model for detection"),
        ("yolo11n-pose", "is for the task 'pose'"),
        ("yolo11n-obb", "is for the task 'obb'"),
        ("yolo11n-cls", "is for the task 'classify'"),
        ("yolov8n-rtdetr", r"ends in a RTDETRDecoder, .* give a YOLO detector \(RT-DETR is not supported\)"),
    ],
)
def test_models_of_ultralytics_that_are_no_yolo_detectors_are_refused_by_name(
    described: str, reason: str, tmp_path: Path
):
    from ultralytics import RTDETR, YOLO

    made = RTDETR(f"{described}.yaml") if "rtdetr" in described else YOLO(f"{described}.yaml", verbose=False)
    torch.save({"epoch": -1, "model": made.model, "train_args": {"imgsz": 64, "task": made.task}}, tmp_path / "m.pt")
    with pytest.raises(ModelSpecError, match=reason):
        load_detector(tmp_path / "m.pt")


def test_a_device_that_is_not_there(detector_weights: Path):
    with pytest.raises(ConfigurationError, match=r"device: 'cuda:7' cannot be used; this machine has cpu"):
        load_detector(detector_weights, device="cuda:7")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 30), st.floats(0.05, 0.95))
def test_suppression_without_torchvisions_compiled_part(seed: int, count: int, threshold: float):
    """Against the definition: by falling score, a box stays unless a better one that stays overlaps it too much."""
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 50, (count, 2))
    boxes = np.concatenate([corners, corners + random.uniform(1, 30, (count, 2))], axis=1)
    scores = random.permutation(count).astype(np.float64)  # no ties
    stay: list[int] = []
    for index in np.argsort(-scores):
        box = boxes[index]
        for other in boxes[stay]:
            sides = np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None)
            union = np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]) - np.prod(sides)
            if np.prod(sides) / union > threshold:
                break
        else:
            stay.append(int(index))
    assert nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold).tolist() == stay


def test_plain_imports_work_beside_any_torch():
    """What scripts/install.sh does for the test environment, and LayerLens for every other: without the first (-S)."""
    folders = [path for path in sys.path if path.endswith("site-packages")]
    fitted = (
        f"import sys; sys.path += {folders}; import layerlens.integrations.torchvision_import as fitting; "
        "assert fitting.make_torchvision_importable(); assert 'torchvision' not in sys.modules; "
    )
    for options in (["-c", "import peft, torchvision"], ["-S", "-c", f"{fitted}import torchvision"]):
        done = subprocess.run([sys.executable, *options], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_torchvision_can_be_imported_whatever_torch_is_there():
    assert make_torchvision_importable()
    import torchvision

    make_suppression_work()
    assert torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1.0]), 0.5).tolist() == [0]
