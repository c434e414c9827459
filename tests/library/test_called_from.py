"""What surrounds a call of ``layerlens.plan``: modes of autograd, accelerate, batches with labels alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

import layerlens
from layerlens.exceptions import ModelSpecError
from layerlens.library.given import as_batch


@pytest.fixture
def t5() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=48, decoder_start_token_id=0, **sizes)).eval()


@pytest.fixture
def bart() -> torch.nn.Module:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=16, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def written(encoder: int, decoder: int, n: int = 8) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    ids, labels = torch.randint(4, 48, (n, encoder)), torch.randint(4, 48, (n, decoder))
    labels[::2, -1] = -100
    return [{"input_ids": ids[i : i + 4], "labels": labels[i : i + 4]} for i in range(0, n, 4)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_of_autograd_changes_nothing(mode: Any, bert: torch.nn.Module, bert_batches: list[Any]):
    expected = layerlens.plan(bert, bert_batches, max_trainable_params="2k")
    with mode():
        batches = [{name: tensor.clone() for name, tensor in batch.items()} for batch in bert_batches]
        found = layerlens.plan(bert, batches, max_trainable_params="2k")
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert found.ranks == expected.ranks
    assert found.manifest.score == expected.manifest.score


def test_a_model_made_without_gradients_is_refused(bert_batches: list[Any]):
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with pytest.raises(ModelSpecError, match=r"inside torch\.inference_mode.*outside"):
        layerlens.plan(model, bert_batches, max_trainable_params="2k")


def test_accelerates_loader_is_as_before(bert: torch.nn.Module, bert_batches: list[Any]):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test's may have other settings
    accelerator = Accelerator(cpu=True)
    rows = [{name: tensor[0] for name, tensor in batch.items()} for batch in bert_batches * 4]
    model, loader = accelerator.prepare(bert, DataLoader(rows, batch_size=4))
    assert layerlens.plan(model, loader, max_trainable_params="2k").trainable_params > 0
    assert accelerator.gradient_state.active_dataloader is None
    assert len(list(loader)) == len(loader)


@pytest.mark.parametrize(("encoder", "decoder"), [(6, 4), (6, 6), (16, 16)])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoders_tokens_come_from_its_labels(name: str, encoder: int, decoder: int, request: pytest.FixtureRequest):
    model = request.getfixturevalue(name)
    for raw in written(encoder, decoder):
        batch = as_batch(model, raw, 0, torch.device("cpu"))
        with torch.no_grad():
            own = model(**raw).loss
            assert torch.allclose(model(**batch.inputs, labels=batch.labels).loss, own, rtol=1e-6, atol=0)
            logits = model(**batch.inputs).logits
        mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        assert torch.allclose(mean, own, rtol=1e-6, atol=0)
        widest = getattr(model.config, "max_position_embeddings", None) == encoder
        assert (batch.labels.shape[1] == encoder) == (encoder == decoder and widest)
        shifted = {**raw, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=raw["labels"])}
        kept = as_batch(model, shifted, 0, torch.device("cpu"))
        assert torch.equal(kept.inputs["decoder_input_ids"][:, :decoder], shifted["decoder_input_ids"])


def test_seq2seq_is_planned_for_by_samples(t5: torch.nn.Module):
    plan = layerlens.plan(t5, written(6, 6), max_trainable_params="2k")
    assert "of each sample, as for seq2seq" in str(plan) or any("of each sample" in line for line in plan.notes)


def test_a_trainer_whose_collator_makes_no_decoder_inputs(t5: torch.nn.Module, tmp_path: Path):
    rows = [{name: tensor[0] for name, tensor in raw.items()} for raw in written(6, 4, n=32)]
    settings = Seq2SeqTrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to=[])
    trainer = Seq2SeqTrainer(t5, settings, train_dataset=rows)
    plan = layerlens.plan(trainer, max_trainable_params="2k")
    assert set(plan.ranks) & {name for name, _ in t5.named_modules() if name.startswith("decoder.")}
