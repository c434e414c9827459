"""One merged checkpoint, in plain transformers, and the adapter as GGUF, read back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_served import RANKS, base, by_peft, export, logits_of, tuned

__all__ = ["base"]


def test_plain_transformers_loads_the_merged_checkpoint(tmp_path: Path, base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original, out = tuned(base, tmp_path / "tuned", use_rslora=True, alpha_pattern={}), tmp_path / "merged"
    (tmp_path / "merged").mkdir()
    (out / "model-00002-of-00002.safetensors").write_bytes(b"of an earlier export")
    result = export(original, "--merge", "-o", out)
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    # W + (alpha/√r)·B·A is rounded once in float32.
    assert (logits_of(model) - by_peft(base, original)).abs().max() < 1e-4
    assert not any("lora" in name for name in model.state_dict())
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer_config.json"} <= names
    assert "model-00002-of-00002.safetensors" not in names
    ids = [AutoTokenizer.from_pretrained(path)("a b").input_ids for path in (base, out)]
    assert ids[0] == ids[1]


def test_the_merged_checkpoint_is_in_the_precision_of_the_base_checkpoint(tmp_path: Path, base: Path) -> None:
    import shutil

    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    half = tmp_path / "half"
    shutil.copytree(base, half)
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(half)
    original = tuned(half, tmp_path / "tuned")
    result = export(original, "--merge", "-o", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "The merged weights are in bfloat16" in result.output
    found, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", half))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"model.layers.{name}.weight" for name in RANKS}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    for arguments in (["--merge", "--serve", "any"], ["--merge", "--to", "peft"], ["--merge", "--lora-part"]):
        assert export(tmp_path, *arguments).exit_code == 2


def test_the_adapter_as_gguf_has_llama_cpps_names_and_scale(tmp_path: Path, base: Path) -> None:
    gguf: Any = pytest.importorskip("gguf")
    from layerlens.tuning.gguf import reordered

    original, out = tuned(base, tmp_path / "tuned", use_rslora=True, alpha_pattern={}), tmp_path / "out"
    assert export(original, "--to", "gguf", "-o", out).exit_code == 0
    assert export(original, "--serve", "llama.cpp", "-o", tmp_path / "served").exit_code == 0
    reader = gguf.GGUFReader(out / "adapter.gguf")
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    fields = {
        name: reader.get_field(name).contents() for name in ("general.type", "adapter.type", "general.architecture")
    }
    assert fields == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    assert reader.get_field("adapter.lora.alpha").contents() == pytest.approx(config["lora_alpha"])
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "served" / "adapter_model.safetensors")
    b = kept["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(found["blk.0.attn_q.weight.lora_b"], reordered(b, 4))
    assert not torch.equal(reordered(b, 4), b)
    gate = kept["base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"]
    assert torch.equal(found["blk.0.ffn_gate.weight.lora_a"], gate)
    assert len(found) == len(kept)


def test_a_merged_gguf_needs_llama_cpps_converter(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tuned(base, tmp_path / "tuned")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    result = export(original, "--merge", "--to", "gguf", "-o", tmp_path / "out")
    assert result.exit_code
    assert "convert_hf_to_gguf.py" in " ".join(result.output.split())
    # A stand-in for the converter: it gets the merged checkpoint and a name to write to.
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import pathlib, sys\nassert (pathlib.Path(sys.argv[1]) / 'model.safetensors').is_file()\n"
        "pathlib.Path(sys.argv[3]).write_bytes(b'GGUF')\n"
    )
    assert export(original, "--merge", "--to", "gguf", "-o", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "model.gguf").read_bytes() == b"GGUF"
