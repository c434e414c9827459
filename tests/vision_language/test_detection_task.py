"""Detectors on the profiling side: their own loss, image by image, statistics against autograd, an adapter in use."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "profiling"))

from brute_force import assert_equal, profile, sample_gradients

from layerlens.config import DataConfig, RunConfig
from layerlens.config.vision_language import PipelineConfig
from layerlens.data import load_dataset
from layerlens.data.labels import in_order_of
from layerlens.exceptions import ConfigurationError, DataNotFoundError, ModelSpecError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.ultralytics_head import take_classes
from layerlens.integrations.ultralytics_loss import average_precision, matched
from layerlens.jobs.vision_language import run_vision_language
from layerlens.pipeline import run_config
from layerlens.profiling.head import fit_head
from layerlens.sources import load_pretrained
from layerlens.tasks import TASKS, make_batches
from layerlens.utils.progress import silent

TASK = "object-detection"


@pytest.fixture
def detector(detector_weights: Path):
    return load_pretrained(f"ultralytics:{detector_weights}", TASK, [])


@pytest.fixture
def batches_of(plates_data: str):
    def make(detector, count: int, batch_size: int):
        dataset = in_order_of(load_dataset(DataConfig(source=plates_data), task=TASK), detector.labels, advice="")
        dataset = dataset.select(range(count))
        return make_batches(TASKS[TASK], detector, dataset, DataConfig(source=plates_data), batch_size=batch_size)

    return make


def test_the_loss_is_ultralytics_own_and_each_images_alone(detector, batches_of):
    (together,) = batches_of(detector, 4, 4)
    losses = TASKS[TASK].loss(detector.model(**together.inputs), together)
    for place, alone in enumerate(batches_of(detector, 4, 1)):
        sample = alone.labels.samples[0]
        # What ultralytics computes when it is given this one image to train on, batch normalisation frozen.
        expected, _ = detector.model.loss({"img": alone.inputs["x"], **sample})
        # float32: the convolutions of a batch of 4 and of 1 may add in another order.
        assert losses[place].item() == pytest.approx(expected.sum().item(), rel=1e-4)


def test_statistics_equal_one_backward_pass_per_image(detector, batches_of):
    detector.model.double()
    batches = [replace(batch, inputs={"x": batch.inputs["x"].double()}) for batch in batches_of(detector, 6, 3)]
    spec = model_spec(detector, "detector", inputs=batches[0].inputs)
    assert sum(layer.layer_type == "conv" for layer in spec.layers) == len(spec.layers) > 20
    assert [name for name in spec.left_out if name.endswith("dfl.conv")]
    loss = TASKS[TASK].loss
    statistics = profile(detector.model, spec, batches, loss, everything=False)
    gradients = [sample_gradients(detector.model, batch, loss) for batch in batches]
    joined = {name: torch.cat([torch.from_numpy(part[name]) for part in gradients]).numpy() for name in gradients[0]}
    # float64, because ultralytics' assignment of boxes to cells is a choice: in float32, a batch of 3 and single images
    # round differently, and where they then choose another cell the gradients differ by percents.
    assert_equal(statistics, joined, 1e-9)


def test_a_detector_is_chosen_for_and_its_adapter_runs_in_the_pipeline(
    detector_weights: Path,
    language_model_dir: Path,
    plates: Path,
    plates_data: str,
    tmp_path: Path,
):
    settings = {
        "model": {"name_or_path": f"ultralytics:{detector_weights}", "task": TASK},
        "data": {"source": plates_data, "calibration_samples": 16, "batch_size": 8},
        "optimization": {"max_trainable_params": 3000, "methods": ["lora"], "lora_ranks": [1, 4]},
        "runtime": {"threads": 1},
        "output": {"directory": "out"},
    }
    result = run_config(RunConfig.model_validate(settings), base_dir=tmp_path, use_cache=False)
    assert result.measured["step_zero_max_abs_delta"] == 0
    assert result.measured["trainable_params"]["relative_error"] == 0
    assert result.measured["flops"]["relative_error"] == pytest.approx(0, abs=1e-9)
    wanted = PipelineConfig(
        images=(str(plates),), detector=str(detector_weights), detector_adapter=str(tmp_path / "out"),
        llm=str(language_model_dir), threads=1,
    )  # fmt: skip
    items = run_vision_language(wanted, tmp_path / "report").items
    for item in items:  # a zero step: the same findings in all three
        found = {variant: item.latest(variant).detections for variant in ("base", "adapted", "merged")}
        assert (
            [d.label for d in found["base"]]
            == [d.label for d in found["adapted"]]
            == [d.label for d in found["merged"]]
        )
    other = PipelineConfig(**{**wanted.model_dump(), "detector_adapter": str(tmp_path / "other")})
    (tmp_path / "out").rename(tmp_path / "other")
    text = (tmp_path / "other" / "manifest.json").read_text(encoding="utf-8")
    print_of = result.manifest.model.fingerprint
    (tmp_path / "other" / "manifest.json").write_text(text.replace(print_of, "0" * 64), encoding="utf-8")
    with pytest.raises(Exception, match="these are not the weights that the manifest was made for"):
        run_vision_language(other, tmp_path / "report")


def yolo_data(folder: Path, label: str = "0 0.5 0.5 0.25 0.5\n", described: str = "") -> DataConfig:
    from PIL import Image

    for name in ("images/train", "labels/train"):
        (folder / name).mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("L", (200, 100)).save(folder / f"images/train/{name}.png")
    (folder / "labels/train/a.txt").write_text(label)
    (folder / "data.yaml").write_text(described or "path: .\ntrain: images/train\nnames: [device]\n")
    return DataConfig(source="data.yaml")


def test_yolo_data_sets(tmp_path: Path, detector):
    dataset = load_dataset(yolo_data(tmp_path), tmp_path, TASK)
    dataset = in_order_of(dataset, detector.labels, advice="")
    assert dataset.labels == ((2,), ())
    assert dataset.columns["boxes"] == (((0.375, 0.25, 0.625, 0.75),), ())
    (batch,) = make_batches(TASKS[TASK], detector, dataset, DataConfig(source="data.yaml"), batch_size=2)
    assert batch.inputs["x"].shape == (2, 3, 128, 128)
    # 200 x 100 is scaled by 0.64 and lies in the middle of the square: the middle stays, heights halve.
    assert batch.labels.samples[0]["bboxes"].tolist() == [[0.5, 0.5, 0.25, 0.25]]
    assert batch.labels.samples[0]["cls"].tolist() == [[2.0]]
    assert len(batch.labels.samples[1]["cls"]) == 0
    assert torch.isfinite(TASKS[TASK].loss(detector.model(**batch.inputs), batch)).all()


def test_what_does_not_go_together(tmp_path: Path, detector, detector_weights: Path):
    with pytest.raises(ModelSpecError, match=r"set model\.task: object-detection"):
        load_pretrained(f"ultralytics:{detector_weights}", "image-classification", ["a", "b"])
    config = yolo_data(tmp_path)
    with pytest.raises(DataNotFoundError, match="give the YAML file of a YOLO data set"):
        load_dataset(DataConfig(source="missing.yaml"), tmp_path, TASK)
    from layerlens.tasks.object_detection import encode as encode_objects

    with pytest.raises(ConfigurationError, match=r"object-detection takes ultralytics:WEIGHTS\.pt"):
        encode_objects(replace(detector, path="timm:resnet18"), load_dataset(config, tmp_path, TASK), config, 0)


def test_a_detector_that_knows_other_classes_gets_a_head_for_those_of_the_data(
    detector_weights: Path, plates_data: str
):
    """The commonest job: a detector trained on other classes. Boxes and features stay; the classes are learnt."""
    described = Path(plates_data).read_text(encoding="utf-8").replace("fracture", "crack").replace("nodule", "spot")
    own = Path(plates_data).with_name("own.yaml")
    own.write_text(described, encoding="utf-8")
    data = DataConfig(source=str(own), batch_size=32)
    dataset = load_dataset(data, task=TASK)
    names = dataset.label_names
    detector = load_pretrained(f"ultralytics:{detector_weights}", TASK, names)
    known = load_pretrained(f"ultralytics:{detector_weights}", TASK, [])
    assert detector.labels == names == ("spot", "crack", "device")
    assert detector.new_parameters == tuple(
        f"model.11.cv3.{level}.2.{part}" for level in (0, 1) for part in ("weight", "bias")
    )
    assert "an output for spot, crack, device" in detector.notes[0]
    old, new = known.model.state_dict(), detector.model.state_dict()
    assert all(torch.equal(value, new[name]) for name, value in old.items() if name not in detector.new_parameters)
    for level in (0, 1):  # the class that both know keeps its weights
        place = f"model.11.cv3.{level}.2.weight"
        assert torch.equal(new[place][2], old[place][2])
        assert not torch.equal(new[place][0], old[place][0])
    head, test = dataset.select(range(320)), dataset.select(range(320, 400))
    batches = list(make_batches(TASKS[TASK], detector, head, data, batch_size=32))
    before = precision(detector, test, data)
    fit_head(detector.model, detector.new_parameters, batches, silent, TASKS[TASK].loss)
    # The frozen features are those of a detector that finds these shapes (mAP50 above 0.9 under their old names).
    assert before < 0.5
    assert precision(detector, test, data) > 0.8
    assert all(torch.equal(value, detector.model.state_dict()[name]) for name, value in new.items()
               if name not in detector.new_parameters and not name.endswith("num_batches_tracked"))  # fmt: skip


def precision(detector, dataset, data: DataConfig) -> float:
    images = []
    for batch in make_batches(TASKS[TASK], detector, dataset, data, batch_size=40):
        with torch.no_grad():
            images += matched(detector.model(**batch.inputs), batch.labels)
    return average_precision(images)["map50"]


def test_a_head_of_another_kind_is_refused(detector, monkeypatch: pytest.MonkeyPatch):
    detector.model.model[-1] = torch.nn.Identity()
    with pytest.raises(ModelSpecError, match="a head of the kind Identity cannot be given other classes"):
        take_classes(detector.model, ["cat"], 0)
