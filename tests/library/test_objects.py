"""A user's model comes back as it was, whatever is done with it and however that ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import layerlens
from layerlens.exceptions import LayerLensError

State = Callable[[torch.nn.Module], dict[str, Any]]


class Interrupted:
    """A list of batches whose third ends what is being done."""

    def __init__(self, batches: list[Any], error: BaseException) -> None:
        self.batches, self.error = batches, error

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches[:2]
        raise self.error


@pytest.mark.parametrize("training", [True, False])
def test_nothing_about_a_model_differs_after_a_plan(
    bert: torch.nn.Module, bert_batches: list[Any], state_of: State, training: bool
):
    bert.train(training)
    bert.bert.encoder.layer[0].eval()  # a mode of its own
    bert.bert.embeddings.requires_grad_(False)
    bert.classifier.weight.grad = torch.ones_like(bert.classifier.weight)
    bert.register_forward_hook(lambda module, args, output: None)
    before = state_of(bert)
    plan = layerlens.plan(bert, bert_batches, max_trainable_params=500)
    assert plan.ranks
    assert state_of(bert) == before


def test_nothing_about_a_new_head_differs_either(bert: torch.nn.Module, bert_batches: list[Any], state_of: State):
    before = state_of(bert)
    plan = layerlens.plan(
        bert, bert_batches, new_head=True, calibration_samples=16, head_fit_samples=8, max_trainable_params=500
    )
    assert state_of(bert) == before
    assert plan.lora_config().modules_to_save == ["classifier"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")], ids=["Ctrl-C", "exception"])
def test_nothing_about_a_model_differs_after_an_end_in_the_middle(
    bert: torch.nn.Module, bert_batches: list[Any], state_of: State, error: BaseException
):
    before = state_of(bert)
    with pytest.raises(type(error)):
        layerlens.plan(bert, Interrupted(bert_batches, error), max_trainable_params=500)
    calls = 0

    def loss(output: Any, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls >= 6:  # in the middle of the measurement, with all taps on, and after the trial of half a batch
            raise error
        return torch.nn.functional.cross_entropy(output.logits, labels, reduction="none")

    with pytest.raises(type(error)):
        layerlens.plan(bert, bert_batches, loss=loss, max_trainable_params=500)
    assert state_of(bert) == before


def test_a_budget_that_allows_nothing_leaves_the_model_as_it_was(
    bert: torch.nn.Module, bert_batches: list[Any], state_of: State
):
    before = state_of(bert)
    with pytest.raises(LayerLensError):
        layerlens.plan(bert, bert_batches, max_vram_gb=1e-9)
    assert state_of(bert) == before


def test_proxies_train_on_the_model_and_leave_nothing(bert: torch.nn.Module, state_of: State, minilm_path: str):
    """Options are really trained, which puts modules in and takes them out again."""
    from transformers import AutoTokenizer

    bert.resize_token_embeddings(30522)
    rows = [{"text": f"sample number {n} of the {n % 3}", "label": n % 3} for n in range(80)]
    before = state_of(bert)
    plan = layerlens.plan(
        bert, rows, tokenizer=AutoTokenizer.from_pretrained(minilm_path), task="sequence-classification",
        max_trainable_params=500, max_length=16, calibration_samples=16,
        proxies={"options": 4, "steps": 2, "held_out_samples": 8}, lora_ranks=[1, 2],
        latency_profile={"sequence_length": 16},
    )  # fmt: skip
    assert plan.manifest.predicted.calibrated
    assert state_of(bert) == before


def test_a_loader_begins_where_it_would_have_begun(bert: torch.nn.Module, bert_batches: list[Any]):
    """Its own generator, and torch's, go on as if nobody had drawn from them."""
    samples = [{name: batch[name][n] for name in batch} for batch in bert_batches for n in range(4)]
    loader = torch.utils.data.DataLoader(
        samples, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    expected = [batch["input_ids"].tolist() for batch in loader]
    loader.generator.manual_seed(3)
    layerlens.plan(bert, loader, max_trainable_params=500, calibration_samples=8)
    assert [batch["input_ids"].tolist() for batch in loader] == expected


def test_a_tokenizer_keeps_its_settings(llama: torch.nn.Module, minilm_path: str):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.padding_side = "left"
    llama.resize_token_embeddings(len(tokenizer))
    before = (tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side, tokenizer.init_kwargs.copy(),
              tokenizer.backend_tokenizer.to_str())  # fmt: skip
    rows = [{"text": f"text number {n}, which is not long"} for n in range(30)]
    plan = layerlens.plan(
        llama, rows, tokenizer=tokenizer, max_trainable_params=500, calibration_samples=16, max_length=16
    )
    assert plan.manifest.model.task == "causal-lm"
    after = (tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side, tokenizer.init_kwargs.copy(),
             tokenizer.backend_tokenizer.to_str())  # fmt: skip
    assert after == before
