"""Fitting a new head, and cutting samples into batches."""

from __future__ import annotations

import pytest
import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.transformers import load_pretrained
from layerlens.profiling.batches import make_batches
from layerlens.profiling.head import RIDGE, fit_head, head_module_of
from layerlens.utils.progress import silent

TEXTS = ["a fine day", "a grim and broken thing", "lovely", "awful " * 9, "great and bright", "dull"] * 4
LABELS = [1, 0, 1, 0, 1, 0] * 4


def test_batches_hold_every_sample_once_and_mask_the_padding(tiny_bert_dir):
    tokenizer = load_pretrained(str(tiny_bert_dir), "sequence-classification", ["a", "b"]).tokenizer
    batches = make_batches(tokenizer, TEXTS, LABELS, max_length=8, batch_size=5)
    assert [len(batch.labels) for batch in batches] == [5, 5, 5, 5, 4]
    assert sorted(int(index) for batch in batches for index in batch.index) == list(range(len(TEXTS)))
    for batch in batches:
        assert batch.mask.shape[1] <= 8
        for row, index in enumerate(batch.index):
            ids = batch.inputs["input_ids"][row][batch.mask[row].bool()].tolist()
            assert ids == tokenizer(TEXTS[index], truncation=True, max_length=8)["input_ids"]
            assert int(batch.labels[row]) == LABELS[index]


def test_the_head_reaches_the_optimum_and_nothing_else_changes(tiny_bert_dir):
    loaded = load_pretrained(str(tiny_bert_dir), "sequence-classification", ["bad", "good"])
    batches = make_batches(loaded.tokenizer, TEXTS, LABELS, max_length=16, batch_size=8)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    fit_head(loaded.model, loaded.new_parameters, batches, silent)
    changed = {name for name, tensor in loaded.model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == set(loaded.new_parameters) == {"classifier.weight", "classifier.bias"}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    # At the optimum the gradient of the mean loss is minus that of the ridge penalty, 2 · RIDGE · w.
    head = [loaded.model.get_parameter(name).requires_grad_(True) for name in loaded.new_parameters]
    loss = sum(
        torch.nn.functional.cross_entropy(loaded.model(**batch.inputs).logits, batch.labels, reduction="sum")
        for batch in batches
    ) / len(TEXTS)
    for parameter, gradient in zip(head, torch.autograd.grad(loss, head), strict=True):
        assert torch.allclose(gradient, -2 * RIDGE * parameter, atol=1e-4)


def test_the_head_is_found_as_the_smallest_common_module():
    assert head_module_of(["classifier.weight", "classifier.bias"]) == "classifier"
    assert head_module_of(["classifier.dense.weight", "classifier.out_proj.bias"]) == "classifier"
    assert head_module_of(["bert.pooler.dense.weight", "classifier.bias"]) == ""


def test_weights_missing_all_over_the_model_are_refused(tiny_bert_dir):
    loaded = load_pretrained(str(tiny_bert_dir), "sequence-classification", ["bad", "good"])
    batches = make_batches(loaded.tokenizer, TEXTS, LABELS, max_length=16, batch_size=8)
    with pytest.raises(ProfilingError, match="lacks parameters outside one task head"):
        fit_head(loaded.model, ["bert.embeddings.word_embeddings.weight", "classifier.bias"], batches, silent)
