"""A plugin for axolotl that sets the rank and alpha of each layer before axolotl creates its adapter.

```yaml
plugins: [layerlens.library.axolotl.LayerLensPlugin]
adapter: lora
lora_alpha: 16                        # axolotl asks for one; the plugin sets it
layerlens:
  max_trainable_params: 1M            # as of layerlens.plan; or `plan: DIRECTORY`, which layerlens run wrote
```

Written against axolotl 0.18 and 0.19: ``BasePlugin.pre_lora_load(cfg, model)``, which its ``ModelLoader`` calls with
the loaded model before ``_build_peft_lora_config(model, cfg)`` reads ``lora_r``, ``lora_alpha``,
``lora_target_modules``, ``lora_rank_pattern`` and ``lora_alpha_pattern``. Only axolotl imports this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from layerlens.exceptions import ConfigurationError
from layerlens.library import api
from layerlens.tuning.tools import axolotl_fields

ROWS = 64
"""Rows of the training data that are offered for measuring, unless ``calibration_samples`` says how many."""


class LayerLensArgs(BaseModel):
    """The key that the plugin adds to axolotl's configuration."""

    layerlens: dict[str, Any] | None = None


class LayerLensPlugin(BasePlugin):
    """Plans on the training data, or loads a plan, and writes its ranks into axolotl's configuration."""

    def get_input_args(self) -> str:
        return f"{LayerLensArgs.__module__}.{LayerLensArgs.__qualname__}"

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Set the LoRA keys of ``cfg``. The model does not change.

        Raises:
            ConfigurationError: a key of ``cfg`` contradicts the plugin; the message names it.
            LayerLensError: planning failed, as in ``layerlens.plan``.
        """
        settings = dict(cfg.get("layerlens") or {})
        saved = settings.pop("plan", None)
        _refuse(cfg, settings, saved)
        if saved is None:
            rows = list(_rows(cfg, int(settings.get("calibration_samples") or ROWS), model))
            plan = api.plan(model, rows, task="causal-lm", **settings)
        else:
            plan = api.load(saved)
        fields = axolotl_fields(plan.choice, model)
        cfg.update({"lora_rank_pattern": {}, "lora_alpha_pattern": {}, "lora_target_linear": False, **fields})
        print(plan)


def _refuse(cfg: Any, settings: Mapping[str, Any], saved: Any) -> None:
    if cfg.get("adapter") not in ("lora", "qlora"):
        raise ConfigurationError(f"adapter: must be lora or qlora for the layerlens plugin, got {cfg.get('adapter')!r}")
    if cfg.get("lora_model_dir"):
        raise ConfigurationError(
            "lora_model_dir: an existing adapter already has its ranks; leave out lora_model_dir or the layerlens "
            "plugin"
        )
    if saved is not None:
        if settings:
            raise ConfigurationError(f"layerlens.plan: already names a choice, so {sorted(settings)[0]} has no effect")
        return
    if cfg.get("rl"):
        raise ConfigurationError(
            f"rl: {cfg.get('rl')} has a loss that axolotl creates later; plan beforehand, and give layerlens: "
            "{plan: DIRECTORY}"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError(
            "layerlens: planning is not possible while several processes load the model; plan beforehand with "
            "layerlens run, and give layerlens: {plan: DIRECTORY}"
        )


def _rows(cfg: Any, n_rows: int, model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of the training data as axolotl has tokenized and masked them, each as a batch without padding."""
    from axolotl.common.datasets import load_datasets

    data = load_datasets(cfg=cfg).train_dataset
    device = next(model.parameters()).device
    total = len(data)
    for position in range(min(n_rows, total)):
        row = data[position * total // min(n_rows, total)]
        batch = {name: torch.tensor([list(row[name])], device=device) for name in ("input_ids", "labels")}
        yield {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
