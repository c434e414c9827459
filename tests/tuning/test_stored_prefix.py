"""Stored activations below the lowest adapted block: the same losses, skipped blocks, refusals with their reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layerlens.config import TrainingConfig
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.peft import base_of
from layerlens.integrations.transformers import blocks_of
from layerlens.models import Choice, LoraSettings, Option
from layerlens.tuning import apply
from layerlens.tuning.fine_tune import TrainingHook, TrainingResult
from layerlens.tuning.prefix_file import Given, PrefixFile, PrefixRefused
from layerlens.tuning.samples import TrainingData
from layerlens.tuning.stored_prefix import DIRECTORY, StoredPrefix
from layerlens.tuning.training import fine_tune

TASK = "sequence-classification"
CONFIG: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-2, "batch_size": 4, "store_prefix": True}


def samples(n: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 50, (3 + index % 5,), generator=generator) for index in range(n)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in rows]


def adapted(tiny: Any, architecture: str, block: int = 1) -> torch.nn.Module:
    """A model with LoRA in one block alone."""
    made = tiny(architecture)
    layers = [layer.name for layer in made.spec.layers if layer.block == block and "lora" in layer.methods]
    heads = tuple(name for name, _ in made.model.named_children() if name in ("classifier", "score"))
    return apply(made.model, Choice(tuple(Option(name, "lora", 2) for name in layers), 0, LoraSettings(
        alpha_over_r=2.0), head_modules=heads, task=TASK))  # fmt: skip


class Counting(TrainingHook):
    """Forward passes of the first and of the last block in training mode."""

    def __init__(self, model: torch.nn.Module, stop_at: int | None = None) -> None:
        self.calls, self.stop_at = {0: 0, 1: 0}, stop_at
        blocks = [base_of(model).get_submodule(name) for name in blocks_of(base_of(model))]
        for place, block in enumerate(blocks):
            # its attention is not run where the block is skipped
            inner = next(module for name, module in block.named_modules() if name.split(".")[-1].startswith(
                ("attention", "attn", "self_attn")))  # fmt: skip
            inner.register_forward_hook(lambda *_, place=place: self._count(place))
        self.counting = True

    def _count(self, place: int) -> None:
        self.calls[place] += torch.is_grad_enabled()

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        if step == self.stop_at:
            raise KeyboardInterrupt


def train(
    tiny: Any, architecture: str, folder: Path, told: list[str] | None = None, *, left: bool = False,
    stop_at: int | None = None, block: int = 1, **settings: Any,
) -> tuple[TrainingResult, dict[int, int]]:  # fmt: skip
    model = adapted(tiny, architecture, block)
    counting = Counting(model, stop_at)
    data = TrainingData(samples(), samples(4, seed=1), fingerprint="f", left=left, padding={"input_ids": 0})
    result = fine_tune(
        model, data, TrainingConfig(**{**CONFIG, **settings}), task=TASK, checkpoints=folder, hooks=[counting],
        tell=(told if told is not None else []).append,
    )  # fmt: skip
    return result, counting.calls


@pytest.mark.parametrize(
    ("architecture", "left", "more"),
    [
        ("llama", True, {}),
        ("bert", False, {"gradient_checkpointing": True, "gradient_accumulation": 2}),
        ("gpt2", False, {}),
    ],
)
def test_the_same_losses_and_the_block_below_is_skipped(tiny, tmp_path, architecture, left, more):
    told: list[str] = []
    stored, calls = train(tiny, architecture, tmp_path / "stored", told, left=left, **more)
    # The run without: dropout off below by hand, as store_prefix: true says.
    model = adapted(tiny, architecture)
    first = base_of(model).get_submodule(blocks_of(base_of(model))[0])
    below = [first, *(m for name, m in base_of(model).named_modules() if name.endswith(("embeddings", ".drop", "wte")))]
    for module in (inner for outer in below for inner in outer.modules()):
        module.register_forward_pre_hook(lambda module, _: setattr(module, "training", False))
    data = TrainingData(samples(), samples(4, seed=1), fingerprint="f", left=left, padding={"input_ids": 0})
    plain = fine_tune(model, data, TrainingConfig(**{**CONFIG, **more, "store_prefix": False}), task=TASK,
                      checkpoints=tmp_path / "plain")  # fmt: skip
    # Other batches pad to another length: sums of some tens of float32 terms in another order, 2 blocks, a few steps.
    assert np.allclose(stored.losses, plain.losses, rtol=2e-4, atol=0)
    assert plain.stored_prefix is None
    facts = stored.stored_prefix
    tokens = sum(len(sample["input_ids"]) for sample in samples())
    assert facts == {"blocks_skipped": 1, "blocks": 2, "bytes": 4 * 32 * tokens}
    assert calls[0] == 3 < 9 <= calls[1]  # the batches of the first epoch, against all
    assert any("1 of 2 blocks lie below the lowest adapted one; about" in line for line in told)
    assert any("dropout is off" in line for line in told) == (architecture != "llama")
    assert not (tmp_path / "stored" / DIRECTORY).exists()


def test_bfloat16_takes_half_the_disk(tiny, tmp_path):
    half, _ = train(tiny, "llama", tmp_path, epochs=2, prefix_precision="bfloat16")
    assert half.stored_prefix["bytes"] == 2 * 32 * sum(len(sample["input_ids"]) for sample in samples())


def test_a_killed_run_ends_with_the_same_bits(tiny, tmp_path):
    whole, _ = train(tiny, "bert", tmp_path / "whole", epochs=2, save_every=2)
    for stop_at, lost in ((3, False), (5, False), (5, True)):
        folder = tmp_path / f"killed {stop_at} {lost}"
        with pytest.raises(KeyboardInterrupt):
            train(tiny, "bert", folder, epochs=2, save_every=2, stop_at=stop_at)
        store = folder / DIRECTORY
        assert (store / "activations.bin").exists()
        if lost:
            (store / "index.npz").unlink()
        resumed, _ = train(tiny, "bert", folder, epochs=2, save_every=2)
        assert resumed.resumed_from == stop_at - 1
        assert resumed.losses == whole.losses
        assert resumed.metrics == whole.metrics
        assert resumed.stored_prefix == whole.stored_prefix


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("bert", {}, "random in training"),
        ("llama", {"block": 0}, "layers.0, the lowest block, is adapted"),
        ("llama", {"epochs": 1}, "one epoch"),
        ("gpt2", {"left": True, "store_prefix": True}, "depend on how far its batch is padded"),
    ],
)
def test_refusals_say_why(tiny, tmp_path, architecture, settings, reason):
    settings = {"store_prefix": "auto", **settings}
    if settings["store_prefix"] == "auto":
        told: list[str] = []
        result, calls = train(tiny, architecture, tmp_path, told, **settings)
        assert result.stored_prefix is None
        assert calls[0] == calls[1]
        assert any(reason in line for line in told)
        settings["store_prefix"] = True
        if architecture == "bert":
            return
    with pytest.raises(ConfigurationError, match=reason):
        train(tiny, architecture, tmp_path / "required", **settings)


def test_a_full_disk_goes_on_without(tiny, tmp_path, monkeypatch):
    def full(self: PrefixFile, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PrefixFile, "add", full)
    told: list[str] = []
    result, _ = train(tiny, "llama", tmp_path, told, store_prefix="auto")
    assert result.stored_prefix is None
    assert any("cannot be written: No space left" in line for line in told)


def test_inputs_that_change_are_never_taken_for_others(tiny, tmp_path):
    """Augmented samples have other contents in every epoch, so they are computed, and losses are right."""
    model, plain = adapted(tiny, "llama"), adapted(tiny, "llama")
    with StoredPrefix(model, tmp_path) as prefix:
        for seed in range(3):
            ids = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(seed))
            batch = {"input_ids": ids, "labels": torch.tensor([0, 1])}
            for each in (model, plain):
                each.train()
            assert torch.equal(model(**batch).loss, plain(**batch).loss)
        assert prefix.reused == 0
        assert torch.allclose(model(**batch).loss, plain(**batch).loss, rtol=1e-6)
        assert prefix.reused == 1
    assert torch.equal(model(**batch).loss, plain(**batch).loss)  # as it was before


def test_a_stock_trainer_with_its_own_order(tiny, tmp_path):
    from transformers import Trainer, TrainingArguments

    losses = []
    for stores in (False, True):
        model = adapted(tiny, "llama")
        data = TrainingData(samples(), [], padding={"input_ids": 0})
        arguments = TrainingArguments(
            str(tmp_path / "out"), num_train_epochs=2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            logging_steps=1, save_strategy="no", disable_tqdm=True, learning_rate=1e-2, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, data_collator=data.collate, train_dataset=data.train)
        if stores:
            with StoredPrefix(trainer.model, tmp_path / "stored", samples=12) as prefix:
                trainer.train()
            assert prefix.reused == 3
            prefix.file.remove()
            assert not (tmp_path / "stored").exists()
        else:
            trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert np.allclose(losses[0], losses[1], rtol=2e-4, atol=1e-4)  # as above, and logged with four digits


def test_what_flows_past_the_blocks_is_found(tiny, tmp_path):
    """A skip from below the blocks to above them: the first use is held against a full pass."""
    model = adapted(tiny, "llama")
    base = base_of(model)
    first, last = (base.get_submodule(name) for name in blocks_of(base))
    seen: list[torch.Tensor] = []
    base.register_forward_pre_hook(lambda *_: seen.clear())
    first.mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    last.register_forward_hook(lambda module, args, output: output + 0.1 * seen.pop() if seen else output)
    told: list[str] = []
    model.train()
    batch = {"input_ids": torch.randint(1, 50, (2, 6)), "labels": torch.tensor([0, 1])}
    with StoredPrefix(model, tmp_path, tell=told.append) as prefix:
        losses = [model(**batch).loss for _ in range(3)]
    assert torch.equal(losses[0], losses[2])
    assert "something bypasses the blocks" in prefix.reason
    assert any("nothing is stored" in line for line in told)


def test_keys_are_of_content_without_padding():
    ids, mask = torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    short = Given.of((), {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)})
    left = Given.of((), {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])})
    both = Given.of((), {"input_ids": ids, "attention_mask": mask, "num_items_in_batch": torch.tensor(7)})
    assert both.keys[0] == short.keys[0] == left.keys[0] != both.keys[1]
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    again = both.together(both.rows(hidden))
    assert torch.equal(again[mask.bool()], hidden[mask.bool()])
    assert not again[~mask.bool()].any()
    with pytest.raises(PrefixRefused, match="3 rows for 2 samples"):
        Given.of((), {"input_ids": ids, "pixel_values": torch.zeros(3, 4)})
