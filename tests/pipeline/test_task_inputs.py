"""The whole job for every task that has inputs of its own: a tiny random model in, a zero-step adapter out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, ManifestError, ModelNotFoundError, ProfilingError
from layerlens.manifest import read_manifest
from layerlens.pipeline import run_config
from layerlens.profiling.statistics_file import load_statistics
from layerlens.tuning import apply_to_directory

SMALL = {"vocab_size": 30522, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
BERT = hf.BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=64)
T5 = hf.T5Config(vocab_size=30522, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
VIT = hf.ViTConfig(
    hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=24, image_size=8, patch_size=4
)
CONVNEXT = hf.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2)

WORDS = [{"tokens": ["in", f"town{n % 3}", "now"], "tags": ["O", "B" if n % 2 else "I", "O"]} for n in range(60)]
TEXTS = [{"text": f"a tale of {n} and {n % 7} more things"} for n in range(60)]
PAIRS = [{"source": f"count {n}", "target": f"it is {n} and no more"} for n in range(60)]
QUESTIONS = [
    {
        "question": f"who is number {n}?",
        "context": f"they say that person{n} won",
        "answers": {"text": [f"person{n}"], "answer_start": [14]},
    }
    for n in range(60)
]
CASES: dict[str, tuple[str, Callable[[], Any], list[dict[str, Any]] | None]] = {
    "token-classification": ("token-classification", lambda: hf.BertModel(BERT), WORDS),
    "question-answering": ("question-answering", lambda: hf.BertModel(BERT), QUESTIONS),
    "masked-lm": ("masked-lm", lambda: hf.BertForMaskedLM(BERT), TEXTS),
    "seq2seq": ("seq2seq", lambda: hf.T5ForConditionalGeneration(T5), PAIRS),
    "vit": ("image-classification", lambda: hf.ViTModel(VIT, add_pooling_layer=False), None),
    "convnext": ("image-classification", lambda: hf.ConvNextModel(CONVNEXT), None),
}


def prepare(settings: dict[str, Any], tmp_path: Path, minilm_path: str, name: str) -> None:
    """Save the model and data of a case, and name them in ``settings``."""
    task, make, made = CASES[name]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    if made is None:
        hf.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
        settings["data"]["source"] = "builtin:digits"
    else:
        hf.AutoTokenizer.from_pretrained(minilm_path).save_pretrained(tmp_path / "model")
        lines = "".join(json.dumps(row) + "\n" for row in made)
        (tmp_path / "d.jsonl").write_text(lines, encoding="utf-8")
        settings["data"]["source"] = "d.jsonl"
    settings["model"] |= {"name_or_path": "model", "task": task}
    settings["optimization"] |= {"max_flops": None, "methods": ["lora"]}  # several, whatever the noise


@pytest.mark.parametrize("name", list(CASES))
def test_every_task_ends_in_an_adapter_that_changes_nothing(settings, tmp_path, minilm_path, name):
    prepare(settings, tmp_path, minilm_path, name)
    settings["profiling"]["utility_model"] = "gradient"
    settings["profiling"] |= {"all_weights": True, "statistics": ["ntk"], "ntk_samples": 4}
    result = run_config(RunConfig.model_validate(settings), base_dir=tmp_path)
    assert result.measured["step_zero_max_abs_delta"] == 0.0
    for resource in ("trainable_params", "flops"):
        assert result.measured[resource]["predicted"] == result.measured[resource]["measured"], resource
    assert any(row.method == "lora" for row in result.manifest.allocations)
    _, statistics = load_statistics(result.files["statistics"])
    assert statistics.n_samples == 24
    # Loaded again from what the manifest says, and the head beside it, the adapter comes out the same.
    manifest = read_manifest(result.directory / "manifest.json")
    again = apply_to_directory(manifest, str(tmp_path / "model"), tmp_path / "again", result.directory / "peft")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = ((folder / "peft" / file).read_bytes() for folder in (result.directory, tmp_path / "again"))
        assert first == second
    assert again["peft"].is_dir()


@pytest.mark.parametrize("name", list(CASES))
def test_every_task_trains_proxies_in_half_precision(settings, tmp_path, minilm_path, name):
    prepare(settings, tmp_path, minilm_path, name)
    settings["model"]["dtype"] = "bfloat16"
    settings["profiling"]["proxies"] = {"options": 4, "steps": 2, "held_out_samples": 12}
    settings["profiling"]["statistics"] = ["sketched_spectrum", "sketched_factors", "activation_memory", "flops"]
    result = run(settings, tmp_path)
    assert result.measured["step_zero_max_abs_delta"] == 0.0
    assert result.manifest.model.dtype == "bfloat16"
    _, statistics = load_statistics(result.files["statistics"])
    assert statistics.proxies.held_out_samples == 12
    assert len(statistics.proxies.gains) == 4
    assert any(gain.gain != 0.0 for gain in statistics.proxies.gains)
    assert statistics.modules


OWN = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.head = torch.nn.Linear(4 * 36, 2)

    def forward(self, image):
        hidden = torch.tanh(self.conv(image))
        return {"centre": self.head(hidden.flatten(1)), "hidden": hidden}

def build():
    return Net()

def failing():
    raise ValueError("no weights today")

class Spots(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        image = torch.zeros(1, 6, 6)
        image[0, index % 6, index // 6 % 6] = 1.0
        return image, torch.tensor([index % 6, index // 6 % 6]).float()

def spots():
    return Spots()

def batches():
    rows = [Spots()[index] for index in range(40)]
    for start in range(0, 40, 7):
        part = rows[start : start + 7]
        yield torch.stack([image for image, _ in part]), torch.stack([centre for _, centre in part])

def loss(output, targets):
    return (output["centre"] - targets).square().sum(dim=1)

def mean_loss(output, targets):
    return loss(output, targets).mean()
"""


@pytest.fixture
def own(settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest):
    """Settings for a model, data and loss in a module beside the configuration."""
    module = f"own_model_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(OWN)
    settings["model"] = {"factory": f"{module}:build", "task": "custom", "loss": f"{module}:loss"}
    settings["data"] |= {"source": f"{module}:spots"}
    settings["optimization"] |= {"max_trainable_params": 200, "max_flops": None}
    yield settings, module
    sys.modules.pop(module, None)


def run(settings: dict[str, Any], folder: Path):
    return run_config(RunConfig.model_validate(settings), base_dir=folder)


def test_a_model_of_ones_own_with_ones_own_loss_and_data(own, tmp_path):
    settings, module = own
    result = run(settings, tmp_path)
    assert {row.layer for row in result.manifest.allocations} == {"conv", "head"}
    assert result.measured["step_zero_max_abs_delta"] == 0.0
    assert result.measured["flops"]["relative_error"] == 0.0
    settings["data"]["source"] = f"{module}:batches"
    settings["output"] = {"directory": "batches"}
    cut = run(settings, tmp_path)
    _, one = load_statistics(result.files["statistics"])
    _, other = load_statistics(cut.files["statistics"])
    assert one.n_samples == other.n_samples == 24
    # A manifest of someone else's does not make their code run.
    manifest = read_manifest(result.directory / "manifest.json")
    with pytest.raises(ManifestError, match=rf"Python code that the manifest names .*--model factory:{module}:build"):
        apply_to_directory(manifest, None, tmp_path / "again")


def test_proxies_train_ones_own_loss_on_ones_own_samples(own, tmp_path):
    settings, _ = own
    settings["model"]["dtype"] = "bfloat16"
    settings["profiling"]["proxies"] = {"options": 4, "steps": 8, "learning_rate": 0.01, "held_out_samples": 8}
    result = run(settings, tmp_path)
    spec, statistics = load_statistics(result.files["statistics"])
    assert statistics.n_samples == 24
    assert statistics.proxies.held_out_samples == 8
    # The head reads all that there is of a spot, so a few steps on it lower the loss; weights are in two bytes.
    assert max(gain.gain for gain in statistics.proxies.gains if gain.option.layer == "head") > 0.0
    assert spec.weight_bytes == 2 * spec.total_params


def test_weights_of_a_factory_come_from_a_safetensors_file(own, tmp_path):
    from safetensors.torch import save_file

    settings, _ = own
    shapes = {"conv.weight": (4, 1, 3, 3), "conv.bias": (4,), "head.weight": (2, 144), "head.bias": (2,)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "zero.safetensors")
    settings["model"]["weights"] = "zero.safetensors"
    _, statistics = load_statistics(run(settings, tmp_path).files["statistics"])
    # The model says (0, 0): its mean loss is that of the centres, 0² to 5² in both directions.
    assert 10.0 < statistics.mean_loss < 30.0
    save_file({"conv.weight": torch.zeros(4, 1, 3, 3)}, tmp_path / "zero.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"zero.safetensors lacks conv\.bias \(3 tensors do not fit\)"):
        run(settings, tmp_path)


@pytest.mark.parametrize(
    ("key", "function", "error", "message"),
    [
        ("loss", "mean_loss", ProfilingError, r"must return the loss of each sample, a tensor \[8\], got \[\]"),
        ("loss", "nothing", ConfigurationError, "has no function 'nothing'; it has "),
        ("factory", "failing", ConfigurationError, "fails: ValueError: no weights today"),
        ("factory", "spots", ConfigurationError, "must return a torch.nn.Module, .* got Spots"),
    ],
)
def test_what_is_wrong_with_ones_own_functions_is_said(own, tmp_path, key, function, error, message):
    settings, module = own
    settings["model"][key] = f"{module}:{function}"
    with pytest.raises(error, match=message):
        run(settings, tmp_path)


def test_modules_that_are_not_there_are_said(own, tmp_path):
    settings, _ = own
    settings["model"]["factory"] = "no_such_module_at_all:build"
    with pytest.raises(
        ConfigurationError, match=r"model\.factory: found no module 'no_such_module_at_all'; install it"
    ):
        run(settings, tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype"), [("timm:test_vit", "float32"), ("timm:test_vit", "bfloat16"), ("timm:test_resnet", "float32")]
)
def test_timm_models_end_in_an_adapter_too(settings, tmp_path, name, dtype):
    pytest.importorskip("timm", exc_type=Exception)
    settings["model"]["dtype"] = dtype
    settings["model"] |= {"name_or_path": name, "task": "image-classification", "weights": "random"}
    settings["data"] |= {"source": "builtin:digits", "calibration_samples": 6}
    settings["model"]["head_fit_samples"] = 8
    settings["optimization"] |= {"max_flops": None, "max_vram_gb": 1.0, "latency_target_ms": None}
    result = run(settings, tmp_path)
    assert result.measured["step_zero_max_abs_delta"] == 0.0
    assert result.measured["flops"]["relative_error"] == 0.0
    assert result.manifest.model.weights == "random"
    settings["model"]["name_or_path"] = "timm:test_vot"
    with pytest.raises(ModelNotFoundError, match="timm has no model 'test_vot'; nearest: test_vit"):
        run(settings, tmp_path)
