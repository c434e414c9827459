"""What checkpointing some blocks saves and costs, predicted for any choice, against the step that really does it."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from step_cases import (
    DEVICE,
    MODELS,
    SAMPLES,
    SIZES,
    TOKENS,
    batch_of,
    case,
    some_choices,
)

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.cost import cost_table
from layerlens.cost.measure import peak_bytes, training_step
from layerlens.cost.trace import trace_step
from layerlens.exceptions import ManifestError
from layerlens.integrations.checkpointing import checkpoint_blocks
from layerlens.integrations.transformers import blocks_to_checkpoint, without_cache
from layerlens.jobs.recorded_step import StepOf, recorded
from layerlens.models import Choice, CostTable, Footprint, LoraSettings
from layerlens.models.step import StepRecord
from layerlens.registry import TASKS
from layerlens.tuning import apply


@functools.cache
def record(name: str) -> StepRecord:
    build, task, heads = MODELS[name]
    torch.manual_seed(0)
    batch = batch_of(name)
    labels = batch.pop("labels")
    step = recorded(StepOf(build().requires_grad_(False), TASKS[task], batch, labels, heads), case(name).spec)
    return replace(step, rates=asdict(DEVICE))


def table_with(name: str, blocks: tuple[str, ...]) -> CostTable:
    profile = LatencyProfile(batch_size=SAMPLES, sequence_length=TOKENS)
    config = OptimizationConfig(max_trainable_params=1, latency_profile=profile, methods=tuple(SIZES))
    return cost_table(
        case(name).spec, Footprint(0.0, 0.0, record(name)), case(name).table.options, config, checkpointed=blocks
    )


def tuned_with(name: str, entries: list[int], blocks: tuple[str, ...]) -> Any:
    build, task, heads = MODELS[name]
    options = [case(name).table.options[entry] for entry in entries]
    choice = Choice.of(
        {option.layer: (option.method, option.rank) for option in options},
        lora=LoraSettings(2.0), head_modules=heads, task=task,
    )  # fmt: skip
    torch.manual_seed(0)
    tuned = apply(build(), choice).train()
    checkpoint_blocks(tuned, blocks)
    return tuned


@pytest.mark.parametrize("name", MODELS)
def test_memory_and_time_with_checkpoints_are_what_the_step_does(name: str):
    blocks = record(name).blocks
    assert blocks == tuple(blocks_to_checkpoint(MODELS[name][0]()))
    choices = some_choices(case(name), 6, seed=3)[::3]
    for chosen in (blocks[:1], blocks)[name != "qwen3" :]:
        table = table_with(name, chosen)
        rows = []
        for entries in choices:
            tuned = tuned_with(name, entries, chosen)
            batch = batch_of(name)
            with without_cache(tuned):
                step, state = training_step(tuned, lambda tuned=tuned, batch=batch: tuned(**batch).loss)
                step()
                weights = sum(parameter.numel() * 4 for parameter in tuned.parameters())
                measured = 1e-9 * (weights + state + peak_bytes(step))
                trace = trace_step(tuned, batch)
            trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
            traced_ms = DEVICE.step_ms(trace, len(trained), sum(parameter.numel() for parameter in trained))
            predicted, bound = table.total(np.array(entries)), table.bound(np.array(entries))
            rows.append((predicted["vram_gb"] / measured, predicted["step_ms"] / traced_ms))
            assert predicted["step_ms"] <= bound["step_ms"] * (1 + 1e-12)
        gb, ms = np.array(rows).T
        assert (gb >= 1.0).all()
        assert (gb <= 1.05).all()
        # A checkpoint detaches each tensor that is kept once more: a view, for which these tiny models take time.
        assert np.abs(ms - 1.0).max() <= 0.12


def test_all_blocks_checkpointed_need_less_memory_and_more_time_and_those_below_the_lowest_layer_cost_nothing():
    for name in ("qwen3", "vit"):
        blocks = record(name).blocks
        everything = np.array([layer[0] for layer in case(name).chain])
        plain, last = table_with(name, ()), table_with(name, blocks)
        assert last.total(everything)["vram_gb"] < 0.9 * plain.total(everything)["vram_gb"]
        assert last.total(everything)["step_ms"] > 1.15 * plain.total(everything)["step_ms"]
        top = np.array([entry for entry in everything if f".{len(blocks) - 1}." in plain.options[entry].layer])
        low = table_with(name, blocks[:-1])
        for resource in ("vram_gb", "step_ms"):
            assert low.total(top)[resource] == plain.total(top)[resource]


def test_an_unknown_block_is_refused_and_nothing_changes():
    model = MODELS["bert"][0]()
    with pytest.raises(ManifestError, match=r"checkpointed: bert\.encoder\.layer\.7 is not a block"):
        checkpoint_blocks(model, ["bert.encoder.layer.0", "bert.encoder.layer.7"])
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
