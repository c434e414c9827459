"""``layerlens run`` on every architecture, each from its own directory with a tokenizer of its own kind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not let test files import neighbours

import tokenizers_of_ones_own as own

from layerlens.cli.main import app
from layerlens.jobs.estimate import estimate
from layerlens.manifest import read_manifest
from layerlens.profiling.statistics_file import load_statistics
from layerlens.tuning.base_model import load_base

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
WIDE = {"initializer_range": 0.2}


def text(make: Callable[[Any], Any], tokenizer: Callable[[], Any]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        made = tokenizer()
        torch.manual_seed(0)
        make(made).save_pretrained(folder)
        made.save_pretrained(folder)

    return save


def vit(folder: Path) -> None:
    torch.manual_seed(0)
    config = hf.ViTConfig(**WIDTHS, **WIDE, image_size=8, patch_size=4)
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)


CASES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "roberta": (
        "sequence-classification",
        text(
            lambda t: hf.RobertaModel(
                hf.RobertaConfig(vocab_size=len(t), **WIDTHS, **WIDE, max_position_embeddings=34, type_vocab_size=1)
            ),
            own.roberta,
        ),
    ),
    "modernbert": (
        "sequence-classification",
        text(
            lambda t: hf.ModernBertModel(
                hf.ModernBertConfig(
                    vocab_size=len(t), **WIDTHS, **WIDE, max_position_embeddings=32, pad_token_id=t.pad_token_id,
                    bos_token_id=t.bos_token_id, eos_token_id=t.eos_token_id, cls_token_id=t.cls_token_id,
                    sep_token_id=t.sep_token_id,
                )
            ),
            own.roberta,
        ),
    ),
    "gpt2": (
        "causal-lm",
        text(
            lambda t: hf.GPT2LMHeadModel(
                hf.GPT2Config(
                    vocab_size=len(t), n_embd=16, n_layer=2, n_head=4, n_positions=32, **WIDE,
                    bos_token_id=t.bos_token_id, eos_token_id=t.eos_token_id,
                )
            ),
            own.gpt2,
        ),
    ),
    "llama": (
        "causal-lm",
        text(
            lambda t: hf.LlamaForCausalLM(
                hf.LlamaConfig(vocab_size=len(t), **WIDTHS, **WIDE, num_key_value_heads=2, max_position_embeddings=32)
            ),
            own.llama,
        ),
    ),
    "llama-classification": (
        "sequence-classification",
        text(
            lambda t: hf.LlamaForCausalLM(
                hf.LlamaConfig(vocab_size=len(t), **WIDTHS, **WIDE, num_key_value_heads=2, max_position_embeddings=32)
            ),
            own.llama,
        ),
    ),
    "qwen": (
        "causal-lm",
        text(
            lambda t: hf.Qwen3ForCausalLM(
                hf.Qwen3Config(
                    vocab_size=len(t), **WIDTHS, **WIDE, num_key_value_heads=2, head_dim=4, tie_word_embeddings=True,
                    max_position_embeddings=32,
                )
            ),
            own.qwen,
        ),
    ),
    "t5": (
        "seq2seq",
        text(
            lambda t: hf.T5ForConditionalGeneration(
                hf.T5Config(vocab_size=len(t), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
                            decoder_start_token_id=0)
            ),
            own.t5,
        ),
    ),
    "vit": ("image-classification", vit),
}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> str:
    rows = []
    for n in range(60):
        label = n % 2
        said = " ".join(own.WORDS[(n + k) % 4 + 4 * label] for k in range(1 + n % 3))
        rows.append({"text": said, "label": ("good", "bad")[label], "target": own.WORDS[n % 8]})
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "d.jsonl"


def configure(settings: dict[str, Any], folder: Path, source: str, name: str) -> Path:
    """The case's model in ``folder``, and a configuration that names it."""
    task, save = CASES[name]
    save(folder / "model")
    settings["model"] = {"name_or_path": "model", "task": task, "head_fit_samples": 16}
    settings["data"] |= {"source": "builtin:digits" if name == "vit" else source, "max_length": 24}
    settings["profiling"] |= {"all_weights": True, "utility_model": "gradient"}
    settings["optimization"] |= {"max_flops": None, "max_trainable_params": 600, "latency_target_ms": None}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def layerlens(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


NOT_MATRICES = ("bias", "cls_token", "position_embeddings")
ELSEWHERE = ("LayerNorm", "RMSNorm", "relative_attention_bias")


@pytest.mark.parametrize("name", list(CASES))
def test_run_from_a_saved_directory(settings: dict[str, Any], tmp_path: Path, source: str, name: str):
    done = layerlens("run", configure(settings, tmp_path, source, name), "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert not [line for line in told["warnings"] if not line.startswith(("latency", "optimization.max_vram_gb: "))]
    assert told["measured"]["step_zero_max_abs_delta"] == 0.0
    for resource in ("trainable_params", "flops"):
        assert told["measured"][resource]["predicted"] == told["measured"][resource]["measured"], resource
    assert {row["method"] for row in told["allocations"]} - {"none"}
    assert list((tmp_path / "out/peft").iterdir()) or (tmp_path / "out/layerlens_modules.safetensors").is_file()

    # Every weight matrix has statistics; what has none is listed by name, and is all that is missing.
    model = load_base(read_manifest(tmp_path / "out/manifest.json"), base_dir=tmp_path).model
    sizes = {path: parameter.numel() for path, parameter in model.named_parameters()}
    _, statistics = load_statistics(tmp_path / "out/statistics.safetensors")
    missing = sum(sizes[path] for path in statistics.left_out)
    assert statistics.coverage == pytest.approx(1.0 - missing / sum(sizes.values()))
    for path, reason in statistics.left_out.items():
        norm_or_bias = path.endswith(NOT_MATRICES) or any(word in reason for word in ELSEWHERE)
        assert norm_or_bias or "relative positions" in reason, (path, reason)

    # The costs follow from the configuration alone: the same without any weights.
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    manifest = read_manifest(tmp_path / "out/manifest.json")
    counted = estimate(manifest, base_dir=tmp_path)
    assert counted.trainable_params == manifest.trainable_params
    for ours, recorded in zip(counted.resources, manifest.resources, strict=True):
        assert ours.resource == recorded.resource
        for part in ("base", "added", "total"):  # sums of up to 40 float64 numbers, in another order
            assert getattr(ours, part) == pytest.approx(getattr(recorded, part), rel=1e-14), (ours, recorded)


def test_roberta_s_positions_begin_behind_its_padding_token(settings: dict[str, Any], tmp_path: Path, source: str):
    """34 positions, of which the padding token and those before it take 2: a text may have 32 tokens, no more."""
    config = configure(settings, tmp_path, source, "roberta")
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"text": "great thing " * 30, "label": n % 2}) + "\n" for n in range(60))
    )
    refused = layerlens("run", config, "--set", "data.max_length=33")
    assert refused.exit_code == 2
    assert "data.max_length: 33 tokens, but the model has 32 positions; use at most 32" in refused.stderr
    done = layerlens("run", config, "--set", "data.max_length=32", "--json")
    assert done.exit_code == 0, done.stderr
    _, statistics = load_statistics(tmp_path / "out/statistics.safetensors")
    assert statistics.n_tokens == 32 * statistics.n_samples  # every text was cut
