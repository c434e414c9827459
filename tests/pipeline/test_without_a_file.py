"""``init``, ``validate`` and ``run`` on checkpoints and data as people have them, and a run that is said in options."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from layerlens.cli.main import app

SENTENCES = [f"{how} {what} {number}" for number in range(12) for how in ("good", "bad") for what in ("film", "music")]
POSITIONS = 32
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def _texts(folder: Path, kind: str) -> None:
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "</s>", *sorted({word for text in SENTENCES for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    settings: dict[str, Any] = {**SMALL, "vocab_size": len(words), "max_position_embeddings": POSITIONS}
    if kind == "llama":
        hf.LlamaForCausalLM(hf.LlamaConfig(**settings)).save_pretrained(folder)
    else:
        hf.BertModel(hf.BertConfig(**settings)).save_pretrained(folder)


def llama_and_jsonl(folder: Path) -> str:
    _texts(folder / "model", "llama")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    return "corpus.jsonl"


def encoder_and_reviews(folder: Path) -> str:
    _texts(folder / "model", "bert")
    lines = [f"{text},{'positive' if 'good' in text else 'negative'}" for text in SENTENCES]
    (folder / "reviews.csv").write_text("\n".join(["review,sentiment", *lines]) + "\n")
    return "reviews.csv"


def vit_and_folder(folder: Path) -> str:
    import layerlens.sources  # noqa: F401
    from layerlens.integrations.torchvision_import import make_torchvision_importable

    make_torchvision_importable()
    import transformers as hf

    hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=8, patch_size=4)).save_pretrained(folder / "model")
    hf.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{number}.png")
    return "pictures"


@pytest.mark.parametrize(
    ("make", "task", "read"),
    [
        (llama_and_jsonl, "causal-lm", "corpus.jsonl (text from 'text')"),
        (encoder_and_reviews, "sequence-classification", "reviews.csv (text from 'review', label from 'sentiment')"),
        (vit_and_folder, "image-classification", "pictures: 24 images of 2 classes"),
    ],
)
def test_init_writes_a_file_that_runs(
    make: Any, task: str, read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAYERLENS_CACHE", str(tmp_path / "cache"))
    data = make(tmp_path)
    assert invoke("init", "--model", "model", "--data", data, "--max-params", "1k").exit_code == 0
    checked = invoke("validate", "config.yaml")
    assert (checked.exit_code, f"Data: {read}" in checked.stderr) == (0, True), checked.stderr
    ran = invoke("run", "config.yaml", "--quiet", "--set", "runtime.threads=1")
    assert ran.exit_code == 0, ran.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"]["task"] == manifest["provenance"]["config"]["model"]["task"] == task


def test_options_and_a_file_with_the_same_settings_have_one_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one says the task and the lengths; for the other the task is guessed, and default lengths are lowered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAYERLENS_CACHE", str(tmp_path / "cache"))
    model, data = "model", encoder_and_reviews(tmp_path)
    (tmp_path / "config.yaml").write_text(
        f"model: {{name_or_path: {model}, task: sequence-classification}}\ndata: {{source: {data}}}\n"
        "optimization: {max_trainable_params: 1000}\n",
        encoding="utf-8",
    )
    said = ["--model", model, "--data", data, "--max-params", "1k", "--output", "said", "--json"]
    less = ["--set", "data.max_length=32", "--set", "optimization.latency_profile.sequence_length=32"]
    by_options, by_file = invoke("run", *said), invoke("run", "config.yaml", "--json", *less)
    assert (by_options.exit_code, by_file.exit_code) == (0, 0), by_options.stderr + by_file.stderr
    one, other = json.loads(by_options.stdout), json.loads(by_file.stdout)
    assert one["guess"]["task"] == "sequence-classification"
    assert "guess" not in other
    assert [one[name] for name in ("allocations", "resources", "score")] == [
        other[name] for name in ("allocations", "resources", "score")
    ]
    lowered = "data.max_length and optimization.latency_profile.sequence_length: 32, since the model has 32 positions"
    assert lowered in one["warnings"]
    assert lowered not in other["warnings"]
    peft = "peft/adapter_config.json"
    assert (tmp_path / "said" / peft).read_bytes() == (tmp_path / "out" / peft).read_bytes()
    weights = "peft/adapter_model.safetensors"
    assert (tmp_path / "said" / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        (["--model", "./nowhere/model"], 4, "model.name_or_path: no model directory at"),
        (["--data", "nowhere.csv"], 4, "data.source: no file at"),
        (["--set", "data.label_column=sentimant"], 4, "has no column 'sentimant'; it has review, sentiment; did you"),
        (["--set", "data.max_length=33"], 2, "data.max_length: 33 tokens, but the model has 32 positions"),
        (["--task", "causal-lm"], 2, "model.task: 'model' is a BertModel, which has no head for causal-lm"),
        (["--task", "regression"], 4, "sample 1 has no finite number in column 'sentiment'"),
    ],
)
def test_validate_says_what_run_would_say(
    changed: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = encoder_and_reviews(tmp_path)
    assert invoke("init", "--model", "model", "--data", data, "--max-params", "1k").exit_code == 0
    result = invoke("validate", "config.yaml", *changed)
    assert result.exit_code == code
    assert said in result.stderr
    assert "unexpected" not in result.stderr


def test_validate_loads_neither_weights_nor_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = encoder_and_reviews(tmp_path)
    assert invoke("init", "--model", "model", "--data", data, "--max-params", "1k").exit_code == 0
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    script = (
        "import sys; sys.argv = ['layerlens', 'validate', 'config.yaml']\n"
        "from layerlens.cli.main import app\n"
        "try: app()\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    shutil.rmtree(tmp_path / "model")
