"""Loads one export in its own tool and holds what the tool made of it against the manifest: check.py TOOL DIRECTORY."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import torch
import yaml

from layerlens.integrations.torchvision_import import make_torchvision_importable

make_torchvision_importable()  # before any tool imports transformers, which imports it


def ranks_of(model) -> dict[str, int]:
    """Rank of every LoRA layer of a PEFT model, by its name in the base model."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in getattr(module, "r", {}):
            found[name] = module.r["default"]
            assert module.scaling["default"] == 2.0, (name, module.scaling)
    return found


def base_model(directory: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory / "base").eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 21).reshape(2, 10)).logits


def check_peft(directory: Path, export: Path):
    from peft import PeftModel

    before = logits(base_model(directory))
    model = PeftModel.from_pretrained(base_model(directory), str(export / "peft"), is_trainable=True)
    assert torch.equal(before, logits(model.eval()))
    return ranks_of(model)


def check_trl(directory: Path, export: Path):
    from datasets import Dataset

    script = runpy.run_path(str(export / "train_trl.py"))
    data = Dataset.from_dict({"text": ["a short text", "and another one"] * 4})
    trainer = script["trainer"](
        data, str(directory / "trl-out"), max_steps=1, use_cpu=True, report_to=[], bf16=False, max_length=16
    )
    frozen = {name: tensor.clone() for name, tensor in trainer.model.named_parameters() if not tensor.requires_grad}
    trainer.train()
    assert all(torch.equal(tensor, dict(trainer.model.named_parameters())[name]) for name, tensor in frozen.items())
    return ranks_of(trainer.model)


def check_axolotl(directory: Path, export: Path):
    from axolotl.utils.schemas.peft import LoraConfig

    fields = yaml.safe_load((export / "axolotl.yaml").read_text())
    checked = LoraConfig(**fields).model_dump(exclude_none=True)
    lost = {key for key in fields if key.startswith(("lora_", "peft_")) and checked.get(key) != fields[key]}
    assert not lost, f"axolotl reads other values for {lost}"
    from axolotl.loaders.adapter import _build_peft_lora_config
    from axolotl.utils.dict import DictDefault
    from peft import get_peft_model

    model = base_model(directory)
    made = ranks_of(get_peft_model(model, _build_peft_lora_config(model, DictDefault(checked))))
    check_axolotl_plugin(directory)
    return made


def check_axolotl_plugin(directory: Path):
    """The plugin, loaded and called by axolotl's own manager, sets what axolotl's own LoraConfig is made from."""
    from types import ModuleType, SimpleNamespace

    from axolotl.integrations.base import PluginManager
    from axolotl.loaders.adapter import _build_peft_lora_config
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset
    from peft import get_peft_model

    rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8, "labels": [[1, 2, 3, 4]] * 8})
    data = sys.modules["axolotl.common.datasets"] = ModuleType("axolotl.common.datasets")  # its own imports numba
    data.load_datasets = lambda *, cfg: SimpleNamespace(train_dataset=rows)
    manager = PluginManager.get_instance()
    manager.register("layerlens.library.axolotl.LayerLensPlugin")
    assert manager.get_input_args() == ["layerlens.library.axolotl.LayerLensArgs"]
    cfg = DictDefault({"adapter": "lora", "lora_dropout": 0.0, "layerlens": {"max_trainable_params": "1k"}})
    model = base_model(directory)
    manager.pre_lora_load(cfg, model)
    assert ranks_of(get_peft_model(model, _build_peft_lora_config(model, cfg)))


def check_llama_factory(directory: Path, export: Path):
    import os

    os.chdir(export)
    from llamafactory.hparams import get_train_args
    from llamafactory.model.adapter import init_adapter

    fields = yaml.safe_load(Path("llama_factory.yaml").read_text())
    fields |= {"dataset": "identity", "template": "default", "report_to": "none", "use_cpu": True}
    model_args, _, _, finetuning_args, _ = get_train_args(fields)
    model = base_model(directory)
    before = logits(model)
    model = init_adapter(model.config, model, model_args, finetuning_args, is_trainable=True)
    assert torch.equal(before, logits(model.eval()))
    assert any(parameter.requires_grad for parameter in model.parameters())
    return ranks_of(model)


def check_adapterhub(directory: Path, export: Path):
    """One adapter for the whole model, so its parameters are counted instead of its ranks."""
    import adapters
    from adapters import AdapterConfig
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "base").eval()
    before = logits(model)
    adapters.init(model)
    model.add_adapter("chosen", config=AdapterConfig.load(json.loads((export / "adapterhub_config.json").read_text())))
    model.train_adapter("chosen")
    assert torch.equal(before, logits(model.eval()))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def main(tool: str, directory: Path) -> None:
    """Check every export of the tool that is there."""
    for name in ("varied", "uniform"):
        export = directory / name / tool
        if export.is_dir():
            expected = json.loads((directory / name / "expected.json").read_text())
            made = globals()[f"check_{tool.replace('-', '_')}"](directory, export)
            assert made == expected["parameters" if tool == "adapterhub" else "ranks"], (made, expected)
            print(f"{tool}: {name}: as the manifest says")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).absolute())
