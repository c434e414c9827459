"""axolotl's plugin against its interface: hooks called as its loader calls them, its keys read as it reads them.

axolotl's pins bring another torch, so the package here is a stand-in with the signatures of 0.18;
``scripts/check_exports.sh axolotl`` runs the plugin in the real one.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from picture import differences, picture
from trainer_support import causal_model, sentences, tokenizer

import layerlens
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.peft import injected_ranks


class BasePlugin:
    """``axolotl.integrations.base.BasePlugin``, the hooks around the adapter."""

    def __init__(self):
        pass

    def get_input_args(self) -> str | None:
        pass

    def pre_lora_load(self, cfg, model):
        pass


@dataclass
class TrainDatasetMeta:
    train_dataset: Dataset
    eval_dataset: Dataset | None = None
    total_num_steps: int | None = None


class DictDefault(dict):
    """axolotl's configuration: a missing key is None, keys are attributes too."""

    def __missing__(self, key: str) -> None:
        return None

    __getattr__ = dict.__getitem__


def load_datasets(*, cfg, cli_args=None, debug=False) -> TrainDatasetMeta:
    rows = tokenizer()(sentences())["input_ids"]
    labels = [[-100, *row[1:]] for row in rows]
    return TrainDatasetMeta(Dataset.from_dict({"input_ids": rows, "labels": labels}))


@pytest.fixture
def plugin(monkeypatch):
    for name, content in {
        "axolotl": {}, "axolotl.integrations": {}, "axolotl.integrations.base": {"BasePlugin": BasePlugin},
        "axolotl.common": {}, "axolotl.common.datasets": {"load_datasets": load_datasets},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "layerlens.library.axolotl", raising=False)
    from layerlens.library.axolotl import LayerLensPlugin

    return LayerLensPlugin()


def peft_config_of(cfg: DictDefault) -> LoraConfig:
    """As ``axolotl.loaders.adapter._build_peft_lora_config`` reads it."""
    more: dict[str, Any] = {}
    if cfg.lora_rank_pattern:
        more["rank_pattern"] = cfg.lora_rank_pattern
    if cfg.lora_alpha_pattern:
        more["alpha_pattern"] = cfg.lora_alpha_pattern
    if cfg.peft_use_rslora:
        more["use_rslora"] = cfg.peft_use_rslora
    assert not cfg.lora_target_linear
    return LoraConfig(
        r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=cfg.lora_target_modules, lora_dropout=cfg.lora_dropout,
        fan_in_fan_out=cfg.lora_fan_in_fan_out, bias="none", task_type="CAUSAL_LM", **more,
    )  # fmt: skip


BUDGET = {"max_trainable_params": "1k", "calibration_samples": 8, "threads": 1}


def test_ranks_are_in_the_configuration_before_the_adapter_is_made(plugin):
    model = causal_model()
    cfg = DictDefault(adapter="lora", lora_r=64, lora_dropout=0.1, lora_target_linear=True, layerlens=dict(BUDGET))
    before = picture(model)
    plugin.pre_lora_load(cfg, model)
    assert differences(before, picture(model)) == []
    assert cfg.lora_dropout == 0.1
    ranks = injected_ranks(get_peft_model(model, peft_config_of(cfg)))
    assert len(ranks) > 5
    data = load_datasets(cfg=cfg).train_dataset
    rows = [data[position * 12 // 8] for position in range(8)]
    batches = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in rows]
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert ranks == layerlens.plan(causal_model(), batches, task="causal-lm", **BUDGET).ranks


def test_a_plan_that_was_saved(plugin, tmp_path):
    model = causal_model()
    batches = [{"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[5, 6, 7, 8]])}]
    plan = layerlens.plan(model, batches, **BUDGET)
    plan.save(tmp_path / "out")
    cfg = DictDefault(adapter="qlora", lora_dropout=0.0, layerlens={"plan": str(tmp_path / "out")})
    plugin.pre_lora_load(cfg, model)
    assert injected_ranks(get_peft_model(model, peft_config_of(cfg))) == plan.ranks


def test_its_key_is_declared_to_axolotl(plugin):
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(sys.modules[module], name)
    assert arguments(layerlens={"max_trainable_params": "1M"}).layerlens == {"max_trainable_params": "1M"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adapter": "llama-adapter"}, "adapter: must be lora or qlora"),
        ({"lora_model_dir": "before"}, "lora_model_dir"),
        ({"rl": "dpo"}, "rl: dpo.*plan: DIRECTORY"),
        ({"layerlens": {"plan": "out", "max_vram_gb": 8}}, "max_vram_gb has no effect"),
        ({"layerlens": {}}, "budget"),
    ],
)
def test_what_speaks_against_it_is_refused(plugin, changes, says):
    cfg = DictDefault({"adapter": "lora", "layerlens": dict(BUDGET), **changes})
    with pytest.raises(ConfigurationError, match=says):
        plugin.pre_lora_load(cfg, causal_model())


def test_several_processes_need_a_plan(plugin, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match=r"several processes.*plan: DIRECTORY"):
        plugin.pre_lora_load(DictDefault(adapter="lora", layerlens=dict(BUDGET)), causal_model())
