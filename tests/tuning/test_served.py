"""Exports for serving engines: each engine's own formula gives PEFT's logits, and what it cannot hold is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.engines import FUSED, Engine, read_otherwise
from layerlens.exceptions import ManifestError
from layerlens.registry import ENGINES

RANKS = {"0.self_attn.q_proj": 1, "0.mlp.gate_proj": 8, "0.mlp.down_proj": 2, "1.self_attn.v_proj": 3}
RSLORA = [False, True]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, minilm_path: str) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(minilm_path).save_pretrained(path)
    return path


def tuned(base: Path, directory: Path, ranks: dict[str, int] = RANKS, **settings: Any) -> Path:
    """An adapter that PEFT made, with a B that is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    names = {f"model.layers.{name}": rank for name, rank in ranks.items()}
    largest = max(names.values())
    patterns = {f"^{re.escape(name)}": rank for name, rank in names.items() if rank < largest}
    fields: dict[str, Any] = {
        "r": largest, "lora_alpha": 2 * largest, "target_modules": list(names), "rank_pattern": patterns,
        "alpha_pattern": {key: 2 * rank for key, rank in patterns.items()}, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**fields, **settings}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(1, 15).reshape(2, 7)).logits
    return found


def by_peft(base: Path, directory: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(directory)))


def by_formula(engine: Engine, base: Path, directory: Path) -> torch.Tensor:
    """The logits of weights to which the engine's scale times B·A was added."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            model.get_submodule(layer).weight.data += engine.scale(config, layer, a.shape[0]) * (b @ a)
    return logits_of(model)


def export(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize("rslora", RSLORA)
@pytest.mark.parametrize("name", list(ENGINES))
def test_every_engine_computes_what_peft_computes(tmp_path: Path, base: Path, name: str, rslora: bool) -> None:
    settings = {"use_rslora": True, "alpha_pattern": {}} if rslora else {}
    original, out = tuned(base, tmp_path / "tuned", **settings), tmp_path / "out"
    result = export(original, "--serve", name, "-o", out)
    assert result.exit_code == 0, result.output
    wanted = by_peft(base, original)
    assert (wanted - logits_of(_plain(base))).abs().max() > 0.1  # so that a wrong scale shows
    # Weights with the change added in float32 against PEFT's own sum: rounding alone.
    assert (by_formula(ENGINES[name], base, out) - wanted).abs().max() < 1e-3
    assert (by_peft(base, out) - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("name", [name for name in ENGINES if name not in ("peft", "vllm", "any")])
def test_what_is_exported_for_any_is_right_in_each_of_them(tmp_path: Path, base: Path, name: str) -> None:
    original = tuned(base, tmp_path / "tuned", use_rslora=True, alpha_pattern={})
    assert export(original, "--serve", "any", "-o", tmp_path / "out").exit_code == 0
    found = by_formula(ENGINES[name], base, tmp_path / "out")
    assert (found - by_peft(base, original)).abs().max() < 1e-3


def test_the_original_is_wrong_where_an_engine_reads_no_patterns(tmp_path: Path, base: Path) -> None:
    original = tuned(base, tmp_path / "tuned", use_rslora=True, alpha_pattern={})
    wanted = by_peft(base, original)
    for name in ("vllm-legacy", "sglang", "tensorrt-llm", "llama.cpp", "lorax"):
        wrong = (by_formula(ENGINES[name], base, original) - wanted).abs().max()
        assert (wrong < 1e-3) == (name == "tensorrt-llm"), name  # it reads rsLoRA, with the tensors' own rank


def _plain(base: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("name", ["sglang", "tensorrt-llm", "lorax", "any"])
def test_one_rank_and_whole_groups(tmp_path: Path, base: Path, name: str) -> None:
    out, engine = tmp_path / "out", ENGINES[name]
    assert export(tuned(base, tmp_path / "tuned"), "--serve", name, "-o", out).exit_code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    assert {tensor.shape[0 if "lora_A" in key else 1] for key, tensor in tensors.items()} == {config["r"]} == {8}
    assert not any(config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora"))
    layers = {key.split(".lora_")[0].removeprefix("base_model.model.model.layers.") for key in tensors}
    if engine.fuses:
        for layer in layers:
            parent, _, last = layer.rpartition(".")
            for group in FUSED:
                assert last not in group or {f"{parent}.{other}" for other in group} <= layers
    if engine.every_block:
        assert {layer[1:] for layer in layers if layer[0] == "0"} == {layer[1:] for layer in layers if layer[0] == "1"}
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape[0] == 32
    card = (out / "README.md").read_text()
    assert all(part in card for part in ("to rank 8", engine.title, str(base)))


def test_ranks_are_padded_to_those_that_a_server_can_be_told_of(tmp_path: Path, base: Path) -> None:
    ranks = {**RANKS, "0.self_attn.q_proj": 9}
    original = tuned(base, tmp_path / "tuned", ranks)
    for name, rank in {"any": 16, "sglang": 9, "vllm-legacy": 16}.items():
        assert export(original, "--serve", name, "-o", tmp_path / name).exit_code == 0
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == rank
    assert export(original, "--serve", "vllm", "-o", tmp_path / "vllm").exit_code == 0
    assert "--max-lora-rank 16" in (tmp_path / "vllm" / "README.md").read_text()
    assert "--max-lora-rank 9 " in (tmp_path / "sglang" / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "fully trained modules, lm_head"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias: lora_only"),
    ],
)
def test_what_an_engine_cannot_hold_is_refused_by_name(
    tmp_path: Path, base: Path, settings: dict[str, Any], named: str
) -> None:
    result = export(tuned(base, tmp_path / "tuned", **settings), "--serve", "any", "-o", tmp_path / "out")
    assert result.exit_code
    assert not (tmp_path / "out").exists()
    assert all(part in " ".join(result.output.split()) for part in (named, "--merge"))


def test_damaged_directories_are_refused(tmp_path: Path, base: Path) -> None:
    assert "has neither" in " ".join(export(tmp_path, "--serve", "any").output.split())
    original = tuned(base, tmp_path / "tuned")
    weights = original / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, weights)
    assert "only one of lora_A and lora_B" in " ".join(export(original, "--serve", "any").output.split())
    weights.write_bytes(b"no")
    assert "damaged" in " ".join(export(original, "--serve", "any").output.split())
    (original / "adapter_config.json").write_text('{"peft_type": "IA3", "r": 1, "lora_alpha": 1}')
    assert "IA3" in " ".join(export(original, "--serve", "any").output.split())


def test_one_of_to_and_serve_is_to_be_said(tmp_path: Path) -> None:
    assert "--serve ENGINE and --merge" in " ".join(export(tmp_path).output.split())
    assert export(tmp_path, "--serve", "any", "--to", "peft").exit_code == 2


def test_a_manifest_without_an_adapter(tmp_path: Path, base: Path, manifest_of: Callable[..., Any]) -> None:
    from layerlens.integrations.layers import model_spec
    from layerlens.integrations.pretrained import PretrainedModel
    from layerlens.tuning.serving import export_served

    spec = model_spec(PretrainedModel(_plain(base), None, "", ()), str(base))
    chosen = {f"model.layers.{name}": ("lora", rank) for name, rank in RANKS.items()}
    manifest = manifest_of(spec, chosen, task="causal-lm", labels=[], head_modules=[])
    export_served("any", tmp_path, manifest, None, tmp_path / "out")
    assert torch.equal(by_peft(base, tmp_path / "out"), logits_of(_plain(base)))
    with_head = manifest_of(spec, chosen, task="causal-lm", labels=[], head_modules=["lm_head"])
    with pytest.raises(ManifestError, match="task head lm_head"):
        export_served("any", tmp_path, with_head, None, tmp_path / "out")
    export_served("peft", tmp_path, with_head, None, tmp_path / "out")


def test_a_run_says_who_scales_rslora_of_several_ranks_otherwise() -> None:
    ranks = {"a.b": 8, "a.c": 2}
    assert read_otherwise(2.0, ranks, rslora=True) == ["vLLM before 0.33", "SGLang", "llama.cpp", "Ollama", "LoRAX"]
    assert read_otherwise(2.0, ranks, rslora=False) == ["TensorRT-LLM", "llama.cpp", "Ollama"]
    assert not read_otherwise(2.0, {"a.b": 8, "a.c": 8}, rslora=False)
