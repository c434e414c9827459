"""Ranks that a layer cannot have are not offered, and that is said; so is a budget that cannot bind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerlens.config import RunConfig
from layerlens.jobs.offers import sizes_not_offered
from layerlens.methods import enumerate_options
from layerlens.models import LayerSpec, ModelSpec
from layerlens.pipeline import run_config
from layerlens.registry import METHODS

SPEC = ModelSpec(
    "m", 1000,
    [
        LayerSpec("wide", 96, "linear", n_in=96, n_out=64, methods=("lora", "adapter")),
        LayerSpec("narrow", 96, "linear", n_in=96, n_out=2, methods=("lora",)),
        LayerSpec("grouped", 8, "conv", n_in=72, n_out=8, methods=("lora",), groups=4),
    ],
)  # fmt: skip


def test_no_rank_is_offered_above_the_smaller_side():
    options = enumerate_options(SPEC, {"lora": (1, 2, 4, 8, 64, 128, 512), "adapter": (128,)})
    ranks = {
        layer.name: [x.rank for x in options if x.layer == layer.name and x.method == "lora"] for layer in SPEC.layers
    }
    assert ranks == {"wide": [1, 2, 4, 8, 64], "narrow": [1, 2], "grouped": [4, 8]}
    assert [x.rank for x in options if x.method == "adapter"] == [128]  # not a rank: it has a nonlinearity in it


def test_what_is_not_offered_is_said():
    lines = list(sizes_not_offered(SPEC, {"lora": (4, 512), "adapter": (128,)}))
    assert lines == [
        "LoRA: not offered: rank 4 in 1 of 3 layers, 512 in 3 of 3 layers, such as narrow: rank 4 is above "
        "min(n_in, n_out) = 2",
        "LoRA: no rank on offer fits narrow",
    ]
    assert not list(sizes_not_offered(SPEC, {"lora": ()}))
    assert METHODS["lora"].why_not_size(SPEC.layers[2], 6) == "rank 6 is not a multiple of its 4 groups"


@pytest.mark.parametrize("too_much", [False, True])
def test_a_run_says_it(settings: dict[str, Any], tmp_path: Path, too_much: bool):
    settings["optimization"] |= {"methods": ["lora"], "lora_ranks": [1, 2, 512]}
    settings["optimization"]["max_trainable_params"] = 10**7 if too_much else 600
    result = run_config(RunConfig.model_validate(settings), base_dir=tmp_path)
    assert all(row.rank <= 2 for row in result.manifest.allocations)
    assert any(line.startswith("LoRA: not offered: rank 512 in") for line in result.warnings)
    bound = [line for line in result.warnings if "max_trainable_params" in line and "cannot bind" in line]
    assert len(bound) == too_much
