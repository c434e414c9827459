"""``layerlens train`` on tasks with samples or losses of their own: what it learns, and what it is judged by."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from typer.testing import CliRunner, Result

from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.manifest import read_manifest
from layerlens.pipeline import run_config
from layerlens.tuning import load
from layerlens.tuning.base_model import load_base

TRAINING = {"epochs": 8, "batch_size": 4, "learning_rate": 2e-2, "seed": 0}
BERT = hf.BertConfig(
    hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24, max_position_embeddings=32
)
PLACES = ["oslo", "rome", "lima"]
WORDS = [  # every sample differs, since the test split goes by content
    {"tokens": [f"{n}", "in", "new", PLACES[n % 3]], "tags": ["O", "O", "B-LOC", "I-LOC"]} for n in range(60)
]
QUESTIONS = [
    {
        "question": "which town?",
        "context": f"today we saw {PLACES[n % 3]} again {n}",
        "answers": {"text": [PLACES[n % 3]], "answer_start": [13]},
    }
    for n in range(60)
]
VIT = hf.ViTConfig(
    hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=24, image_size=8, patch_size=4
)
CASES: dict[str, tuple[str, list[dict[str, Any]] | None, set[str]]] = {
    "token-classification": ("BertModel", WORDS, {"entity_f1", "entity_precision", "entity_recall", "f1_macro"}),
    "question-answering": ("BertModel", QUESTIONS, {"exact_match", "f1"}),
    "image-classification": ("ViTModel", None, {"top1", "top5", "f1_macro", "mcc"}),
}


def prepare(settings: dict[str, Any], folder: Path) -> Path:
    """A finished run of the settings and its configuration in a file."""
    settings |= {"training": TRAINING}
    settings["optimization"] |= {"max_flops": None, "max_vram_gb": None, "latency_target_ms": None, "methods": ["lora"]}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    run_config(RunConfig(**settings), base_dir=folder)
    return path


def train(config: Path, *more: str) -> Result:
    manifest = config.parent / "out/manifest.json"
    return CliRunner().invoke(app, ["train", str(manifest), "-c", str(config), "--json", *more])


@pytest.mark.parametrize("task", list(CASES))
def test_learns_and_is_judged_by_its_own_metrics(settings: dict[str, Any], tmp_path: Path, minilm_path: str, task: str):
    kind, rows, metrics = CASES[task]
    torch.manual_seed(0)
    if rows is None:
        hf.ViTModel(VIT, add_pooling_layer=False).save_pretrained(tmp_path / "model")
        hf.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
        settings["data"]["source"] = "builtin:digits"
        settings["training"] = {"train_samples": 64}
    else:
        getattr(hf, kind)(BERT).save_pretrained(tmp_path / "model")
        hf.AutoTokenizer.from_pretrained(minilm_path).save_pretrained(tmp_path / "model")
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings["data"]["source"] = "d.jsonl"
    settings["model"] |= {"name_or_path": "model", "task": task}
    config = prepare(settings, tmp_path)
    done = train(config, "--set", "training.train_samples=48", "--set", "training.eval_samples=12")
    assert done.exit_code == 0, done.stderr
    facts = json.loads((tmp_path / "out/tuned/metrics.json").read_text())
    assert metrics <= facts["after"].keys()
    assert facts["after"]["loss"] < facts["before"]["loss"]
    best = {"token-classification": "entity_f1", "question-answering": "f1", "image-classification": "top1"}[task]
    kept = [each[best] for each in facts["training"]["evaluations"] if each["step"] == facts["training"]["best_step"]]
    assert kept == [max(each[best] for each in facts["training"]["evaluations"])] == [facts["after"][best]]
    if rows is not None:  # three towns in one place: what this model can learn
        assert facts["after"][best] > 0.9
    manifest = read_manifest(tmp_path / "out/tuned/manifest.json")
    again = load(load_base(manifest, base_dir=tmp_path).model, tmp_path / "out/tuned")
    assert sum(parameter.requires_grad for parameter in again.parameters()) > 0


OWN = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.middle = torch.nn.Linear(4 * 36, 8)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, image):
        hidden = torch.tanh(self.middle(torch.tanh(self.conv(image)).flatten(1)))
        return {"centre": self.head(hidden)}

def build():
    return Net()

class Spots(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        image = torch.zeros(1, 6, 6)
        image[0, index % 6, index // 6 % 6] = 1.0
        return image, {"centre": torch.tensor([index % 6, index // 6 % 6]).float(), "name": f"spot {index}"}

def spots():
    return Spots()

def loss(output, targets):
    return (output["centre"] - targets["centre"]).square().sum(dim=1)
"""


@pytest.fixture
def own(settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    module = f"own_training_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(OWN)
    settings["model"] = {"factory": f"{module}:build", "task": "custom", "loss": f"{module}:loss"}
    settings["data"] |= {"source": f"{module}:spots", "calibration_samples": 12}
    settings["optimization"]["max_trainable_params"] = 200
    yield prepare(settings, tmp_path), module
    sys.modules.pop(module, None)


def test_a_loss_of_ones_own_is_trained_and_judged(own: tuple[Path, str]):
    config, module = own
    done = train(config)
    assert done.exit_code == 0, done.stderr
    facts = json.loads((config.parent / "out/tuned/metrics.json").read_text())
    assert facts["after"].keys() == {"loss"}
    assert facts["after"]["loss"] < facts["before"]["loss"]
    # The loss that is told is that of the user's function on the test split, by the model as it is loaded again.
    manifest = read_manifest(config.parent / "out/tuned/manifest.json")
    model = load(
        load_base(manifest, f"factory:{module}:build", config.parent).model, config.parent / "out/tuned"
    ).eval()
    from layerlens.config import DataConfig
    from layerlens.data import load_dataset

    dataset = load_dataset(DataConfig(source=f"{module}:spots"), config.parent, "custom")
    _, test = dataset.split_test()
    samples = [sample.read() for sample in test.columns["sample"]]
    with torch.no_grad():
        centres = model(torch.stack([image for image, _ in samples]))["centre"]
    errors = [(c - target["centre"]).square().sum() for c, (_, target) in zip(centres, samples, strict=True)]
    assert facts["after"]["loss"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    checkpointed = train(config, "-o", str(config.parent / "t"), "--set", "training.gradient_checkpointing=true")
    assert checkpointed.exit_code == 2
    assert "gradient_checkpointing: a PeftModel does not support it (transformers' models do)" in checkpointed.stderr


@pytest.mark.parametrize("baseline", ["gora", "uniform-lora", "eva"])
def test_baselines_train_it_too(own: tuple[Path, str], baseline: str):
    done = train(own[0], "--baseline", baseline, "--set", "training.max_steps=4")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["after"].keys() == {"loss"}


def test_a_manifest_does_not_bring_its_own_code(own: tuple[Path, str]):
    config, module = own
    done = CliRunner().invoke(app, ["train", str(config.parent / "out/manifest.json")])
    assert done.exit_code == 2
    assert f"names Python code (model.factory: {module}:build)" in " ".join(done.stderr.split())
