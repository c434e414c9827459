"""A choice of upper layers saves in stock trainers what is predicted: Trainer and SFTTrainer on the exported directory.

Arithmetic stands for time here: it is counted, so that no load of the machine changes it.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset as Rows
from language_support import language_model, tokenizer
from peft import PeftModel
from transformers import Trainer, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.cost import cost_table
from layerlens.cost.measure import peak_bytes
from layerlens.cost.trace import trace_step
from layerlens.integrations.flops import plain_counter
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.transformers import without_cache
from layerlens.jobs.recorded_step import StepOf, recorded
from layerlens.methods import enumerate_options
from layerlens.models import Choice, Footprint, LoraSettings
from layerlens.registry import TASKS
from layerlens.tuning import apply, export_adapter, unapply

SAMPLES, TOKENS = 3, 64
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": SAMPLES, "max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no",
    "disable_tqdm": True, "logging_strategy": "no", "bf16": False,
}  # fmt: skip
SPARING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
ROWS = [{"input_ids": [5 + (i + j) % 40 for j in range(TOKENS)], "labels": [5 + j % 40 for j in range(TOKENS)]}
        for i in range(2 * SAMPLES)]  # fmt: skip


@functools.cache
def written_by() -> Any:
    return tokenizer()


class Measured:
    """(bytes at the peak, FLOPs) of the last step of a trainer."""

    def __init__(self, trainer: Any, before: Any = None) -> None:
        step = trainer.training_step
        self.peak, self.flops = 0, 0

        def watched(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(trainer.model)
            done: list[Any] = []
            with plain_counter() as counter:
                self.peak = peak_bytes(lambda: done.append(step(*args, **kwargs)))
            self.flops = counter.get_total_flops()
            return done[0]

        trainer.training_step = watched
        trainer.train()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Adapter directories of LoRA on all layers and on the last block's, with what is predicted and traced of each."""
    model = language_model(written_by()).model.requires_grad_(False)
    spec = model_spec(PretrainedModel(model, None, "", ()), "tiny", methods=("lora",))
    ids = torch.tensor([row["input_ids"] for row in ROWS[:SAMPLES]])
    step = recorded(StepOf(model, TASKS["causal-lm"], {"input_ids": ids}, ids), spec)
    options = enumerate_options(spec, {"lora": (4,)})
    profile = LatencyProfile(batch_size=SAMPLES, sequence_length=TOKENS)
    config = OptimizationConfig(max_trainable_params=1, latency_profile=profile, methods=("lora",))
    table = cost_table(spec, Footprint(0.0, 0.0, step), options, config)
    last = max(layer.block for layer in spec.layers if layer.block is not None)
    found: dict[str, Any] = {}
    for name in ("full", "upper"):
        layers = {layer.name for layer in spec.layers if layer.block == last or name == "full"}
        entries = [e for e, option in enumerate(options) if option.rank and option.layer in layers]
        choice = Choice.of(
            {options[e].layer: ("lora", options[e].rank) for e in entries}, lora=LoraSettings(2.0), task="causal-lm"
        )
        directory = tmp_path_factory.mktemp(name)
        export_adapter(choice, model, directory)
        tuned = apply(model, choice).train()
        with without_cache(tuned):
            trace = trace_step(tuned, {"input_ids": ids, "labels": ids})
        unapply(tuned)
        found[name] = (directory, table.total(np.array(entries)), trace)
    return found


def tuned(directory: Path) -> Any:
    model = language_model(written_by()).model
    model.config.use_cache = False  # else the keys and values of frozen blocks live as long as the logits
    return PeftModel.from_pretrained(model, directory / "peft", is_trainable=True)


def trained(directory: Path, folder: Path, before: Any = None, **options: Any) -> Measured:
    """The last of two steps of transformers' Trainer."""
    arguments = TrainingArguments(output_dir=str(folder), **ARGUMENTS, **options)
    trainer = Trainer(tuned(directory), arguments, train_dataset=ROWS, data_collator=default_data_collator)
    return Measured(trainer, before)


def fine_tuned(directory: Path, folder: Path) -> Measured:
    """The last of two steps of TRL's SFTTrainer."""
    rows = Rows.from_list([{"input_ids": row["input_ids"]} for row in copy.deepcopy(ROWS)])
    # transformers checkpoints by default in TRL, which is another prediction
    arguments = SFTConfig(output_dir=str(folder), **ARGUMENTS, max_length=TOKENS, gradient_checkpointing=False)
    return Measured(SFTTrainer(tuned(directory), args=arguments, train_dataset=rows, processing_class=written_by()))


def test_trainers_save_what_is_predicted_of_upper_layers(exported, tmp_path):
    (full_at, full, full_trace), (upper_at, upper, upper_trace) = exported["full"], exported["upper"]
    predicted = 1e9 * (full["vram_gb"] - upper["vram_gb"]) - (full["trainable_params"] - upper["trainable_params"]) * 12
    one, other = trained(full_at, tmp_path), trained(upper_at, tmp_path)
    assert (one.flops, other.flops) == (full_trace.flops, upper_trace.flops)  # nothing below is computed
    assert other.flops < 0.8 * one.flops
    assert one.peak - other.peak == pytest.approx(predicted, rel=0.01)
    for measured, said, directory in ((one, full, full_at), (other, upper, upper_at)):
        there = sum(4 * weight.numel() for weight in tuned(directory).parameters()) + 8 * said["trainable_params"]
        assert measured.peak <= 1e9 * said["vram_gb"] - there <= 1.05 * measured.peak
    sft, upper_sft = fine_tuned(full_at, tmp_path), fine_tuned(upper_at, tmp_path)
    assert sft.flops - upper_sft.flops == one.flops - other.flops  # its head reads one token less
    assert upper_sft.peak < sft.peak - 0.5 * predicted


def test_what_undoes_it_and_how_to_keep_it(exported, tmp_path):
    """The guide's list: reentrant checkpointing, and embeddings that ask for gradients."""
    directory = exported["upper"][0]
    plain = trained(directory, tmp_path)

    def as_the_guide_says(model: Any) -> None:
        model.get_base_model().disable_input_require_grads()

    kept = trained(directory, tmp_path, as_the_guide_says, **SPARING)
    undone, reentrant = trained(directory, tmp_path, **SPARING), trained(directory, tmp_path, **REENTRANT)
    assert kept.flops < undone.flops
    assert kept.flops < reentrant.flops
    assert plain.flops < kept.flops  # checkpoints compute forward passes again
    assert kept.peak <= plain.peak
