"""Exports for other trainers: what they write, read back through PEFT, and what they refuse by name.

scripts/check_exports.sh loads them in the tools themselves.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.exceptions import ManifestError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.peft import injected_ranks
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import LoraSettings, Manifest
from layerlens.sources import load_model
from layerlens.tuning.peft_comparison import SUITE_MODEL, comparison_files
from layerlens.tuning.tools import TOOLS, export_for

VARIED = {"0.self_attn.q_proj": 4, "0.mlp.down_proj": 2, "1.self_attn.v_proj": 8}
UNIFORM = {f"1.self_attn.{name}": 4 for name in ("q_proj", "v_proj")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, minilm_path: str) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(minilm_path).save_pretrained(path)
    return path


@pytest.fixture
def plan(base: Path, manifest_of: Any) -> Callable[..., Manifest]:
    def make(ranks: dict[str, int], **choose: tuple[str, int]) -> Manifest:
        spec = model_spec(PretrainedModel(load_model(str(base), "causal-lm", []), None, "", ()), str(base))
        chosen: dict[str, tuple[str, int]] = {f"model.layers.{name}": ("lora", rank) for name, rank in ranks.items()}
        chosen |= {f"model.layers.{name.replace('__', '.')}": option for name, option in choose.items()}
        return manifest_of(spec, chosen, task="causal-lm", labels=[], head_modules=[])

    return make


def ranks_of(manifest: Manifest) -> dict[str, int]:
    return {row.layer: row.rank for row in manifest.allocations if row.method == "lora"}


@pytest.mark.parametrize("tool", ["peft", "trl", "llama-factory"])
def test_directories_have_every_rank_and_change_no_logit(tool: str, plan: Any, base: Path, tmp_path: Path):
    from peft import PeftModel

    manifest = plan(VARIED)
    files = export_for(tool, manifest, None, tmp_path / "out", measured=tmp_path)
    tokens = torch.arange(1, 13).reshape(2, 6)
    model = load_model(str(base), "causal-lm", [])
    before = model(tokens).logits
    model = PeftModel.from_pretrained(model, str(files["peft"]), is_trainable=True).eval()
    assert injected_ranks(model) == ranks_of(manifest)
    assert torch.equal(before, model(tokens).logits)


def test_axolotl_fields_make_the_same_lora(plan: Any, base: Path, tmp_path: Path):
    """As axolotl 0.19's loaders/adapter.py hands its fields on to PEFT."""
    from peft import LoraConfig, get_peft_model

    manifest = plan(VARIED)
    files = export_for("axolotl", manifest, None, tmp_path, measured=tmp_path)
    fields = yaml.safe_load(files["axolotl.yaml"].read_text())
    assert (fields.pop("base_model"), fields.pop("adapter")) == (str(base), "lora")
    names = {
        "lora_r": "r", "lora_rank_pattern": "rank_pattern", "lora_alpha_pattern": "alpha_pattern",
        "lora_target_modules": "target_modules",
    }  # fmt: skip
    config = LoraConfig(bias="none", **{names.get(name, name): value for name, value in fields.items()})
    model = get_peft_model(load_model(str(base), "causal-lm", []), config)
    assert injected_ranks(model) == ranks_of(manifest)
    scales = {layer.scaling["default"] for layer in model.modules() if hasattr(layer, "lora_A")}
    assert scales == {2.0}


def test_llama_factory_goes_on_from_the_directory(plan: Any, base: Path, tmp_path: Path):
    files = export_for("llama-factory", plan(VARIED), None, tmp_path, measured=tmp_path)
    fields = yaml.safe_load(files["llama_factory.yaml"].read_text())
    assert fields["model_name_or_path"] == str(base)
    assert (tmp_path / fields["adapter_name_or_path"] / "adapter_config.json").is_file()
    assert fields["create_new_adapter"] is False


def test_the_script_for_trl_reads_files_folders_and_the_hub(plan: Any, tmp_path: Path, monkeypatch):
    from layerlens.integrations.torchvision_import import make_torchvision_importable

    make_torchvision_importable()
    export_for("trl", plan(VARIED), None, tmp_path / "out", measured=tmp_path)
    script = runpy.run_path(str(tmp_path / "out/train_trl.py"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "a.csv").write_text("text\none\ntwo\n")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    for place in (folder / "a.jsonl", tmp_path / "a.csv", tmp_path / "a.txt", folder):
        assert script["data_set"](str(place))["text"][:] == ["one", "two"]


def test_files_say_which_version_they_need(plan: Any, tmp_path: Path):
    needs = {"trl": ("train_trl.py", "TRL 1.0"), "axolotl": ("axolotl.yaml", "axolotl 0.18")}
    for tool, (name, version) in needs.items():
        files = export_for(tool, plan(VARIED), None, tmp_path / tool, measured=tmp_path)
        assert f"Needs {version} or newer" in files[name].read_text()


def test_an_entry_of_pefts_comparison_makes_the_same_lora(plan: Any, base: Path, tmp_path: Path):
    """As run.py of method_comparison/MetaMathQA reads it: PeftConfig.from_pretrained, get_peft_model."""
    from peft import PeftConfig, get_peft_model

    manifest = plan(VARIED)
    files = export_for("peft-comparison", manifest, None, tmp_path / "local", measured=tmp_path)
    config = PeftConfig.from_pretrained(tmp_path / "local")
    assert (config.task_type, config.base_model_name_or_path, config.inference_mode) == ("CAUSAL_LM", None, False)
    assert len(config.rank_pattern) == len(config.alpha_pattern) == 2
    model = get_peft_model(load_model(str(base), "causal-lm", []), config)
    assert injected_ranks(model) == ranks_of(manifest)
    assert model.get_nb_trainable_parameters()[0] == sum(row.cost for row in manifest.allocations)
    assert json.loads(files["training_params.json"].read_text()) == {"model_id": str(base)}
    text = files["README.md"].read_text()
    assert "| 8 | 1 |\n| 4 | 1 |\n| 2 | 1 |" in text
    assert f"python run.py -v experiments/lora/{base.name}-layerlens-3-layers" in text

    texts = comparison_files(manifest.choice, load_model(str(base), "causal-lm", []), SUITE_MODEL)
    assert "training_params.json" not in texts  # the suite's own defaults
    assert "experiments/lora/llama-3.2-3B-layerlens-3-layers" in texts["README.md"]
    measured = dataclasses.replace(manifest, lora=LoraSettings(2.0, initialization="pca"))
    with pytest.raises(ManifestError, match=r"and the manifest has lora.initialization 'pca'"):
        export_for("peft-comparison", measured, None, tmp_path / "pca", measured=tmp_path)


def test_adapterhub_configuration(plan: Any, tmp_path: Path):
    files = export_for("adapterhub", plan(UNIFORM), None, tmp_path, measured=tmp_path)
    fields = json.loads(files["adapterhub_config.json"].read_text())
    assert fields == {
        "architecture": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "attn_matrices": ["q", "v"],
        "selfattn_lora": True, "intermediate_lora": False, "output_lora": False, "leave_out": [0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tool", "ranks", "changes", "words"),
    [
        *(
            (tool, VARIED, {"1__mlp__down_proj": ("adapter", 3), "0__self_attn": ("prefix", 2)},
             r"holds LoRA only, and the manifest has prefix on 1 layer \(model.layers.0.self_attn ...\) and adapter on")
            for tool in TOOLS
        ),
        ("adapterhub", VARIED, {}, "one LoRA rank for all layers, and the manifest has 2, 4, 8"),
        ("adapterhub", {**UNIFORM, "0.mlp.up_proj": 4}, {}, "same matrices in every block .*block 0: ffn_up; block 1"),
        ("adapterhub", {"0.mlp.gate_proj": 4}, {}, "gate_proj: AdapterHub puts LoRA on a block's query, key"),
        ("peft", {}, {}, "no LoRA layer, so there is nothing for PEFT to train"),
    ],
)  # fmt: skip
def test_refusals_name_what_a_tool_cannot_hold(
    tool: str, ranks: Any, changes: Any, words: str, plan: Any, tmp_path: Path
):
    with pytest.raises(ManifestError, match=words):
        export_for(tool, plan(ranks, **changes), None, tmp_path / "out", measured=tmp_path)
    assert not (tmp_path / "out").exists()


def test_other_refusals(plan: Any, tmp_path: Path):
    manifest = plan(VARIED)
    half = dataclasses.replace(manifest, lora=LoraSettings(1.25))
    with pytest.raises(ManifestError, match=r"whole numbers for alpha, and alpha/r = 1.25 gives 2.5"):
        export_for("axolotl", half, None, tmp_path, measured=tmp_path)
    facts = dataclasses.replace(manifest.model, task="sequence-classification")
    classifier = dataclasses.replace(manifest, model=facts)
    for tool in ("trl", "axolotl", "llama-factory"):
        with pytest.raises(ManifestError, match="trains causal-lm, but the manifest is for sequence-classification"):
            export_for(tool, classifier, None, tmp_path, measured=tmp_path)


def test_lora_part_of_a_mixture(plan: Any, base: Path, tmp_path: Path):
    manifest = plan(VARIED, **{"1__mlp__down_proj": ("adapter", 3)})
    files = export_for("peft", manifest, None, tmp_path, lora_part=True, measured=tmp_path)
    assert sorted(files) == ["peft"]


def test_command(plan: Any, tmp_path: Path):
    from layerlens.manifest import write_manifest
    from layerlens.models import ResourceUse

    uses = [ResourceUse(name, None, 0.0, 0.0, 0.0, 0.0, "") for name in ("flops", "vram_gb", "latency_ms")]
    manifest = plan(VARIED)
    total = float(sum(row.cost for row in manifest.allocations))
    uses.append(ResourceUse("trainable_params", None, 0.0, total, total, 0.0, ""))
    path = write_manifest(
        dataclasses.replace(manifest, resources=tuple(uses)), tmp_path, created_at="2026-01-31T12:00:00Z"
    )["manifest_json"]
    done = CliRunner().invoke(app, ["export", str(path), "--to", "axolotl"])
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "axolotl/axolotl.yaml").is_file()
    refused = CliRunner().invoke(app, ["export", str(path), "--to", "adapterhub"])
    assert refused.exit_code == 2
    assert "AdapterHub has one LoRA rank for all layers" in refused.stderr
    assert CliRunner().invoke(app, ["export", str(path), "--to", "megatron"]).exit_code == 2
