"""Fitting a new head, and cutting samples into batches."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from layerlens.config import DataConfig
from layerlens.data import Dataset
from layerlens.exceptions import ProfilingError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.transformers import task_heads
from layerlens.profiling import ridge
from layerlens.profiling.head import fit_head
from layerlens.sources import load_pretrained
from layerlens.tasks import TASKS, Batch, make_batches
from layerlens.utils.progress import silent

TEXTS = ["a fine day", "a grim and broken thing", "lovely", "awful " * 9, "great and bright", "dull"] * 4
LABELS = [1, 0, 1, 0, 1, 0] * 4


def batches_of(loaded: PretrainedModel, *, max_length: int = 16, batch_size: int = 8) -> list[Batch]:
    dataset = Dataset({"text": tuple(TEXTS)}, tuple(LABELS), ("bad", "good"))
    config = DataConfig(source="unused", max_length=max_length)
    return list(make_batches(TASKS["sequence-classification"], loaded, dataset, config, batch_size=batch_size))


def test_batches_hold_every_sample_once_and_mask_the_padding(tiny_bert_dir):
    loaded = load_pretrained(str(tiny_bert_dir), "sequence-classification", ["a", "b"])
    tokenizer, batches = loaded.tokenizer, batches_of(loaded, max_length=8, batch_size=5)
    assert [len(batch.labels) for batch in batches] == [5, 5, 5, 5, 4]
    assert sorted(int(index) for batch in batches for index in batch.index) == list(range(len(TEXTS)))
    for batch in batches:
        assert batch.mask.shape[1] <= 8
        for row, index in enumerate(batch.index):
            ids = batch.inputs["input_ids"][row][batch.mask[row].bool()].tolist()
            assert ids == tokenizer(TEXTS[index], truncation=True, max_length=8)["input_ids"]
            assert int(batch.labels[row]) == LABELS[index]


RIDGE = ridge.RIDGES[0]


def test_the_head_reaches_the_optimum_and_nothing_else_changes(tiny_bert_dir, monkeypatch):
    monkeypatch.setattr(ridge, "RIDGES", (RIDGE,))
    loaded = load_pretrained(str(tiny_bert_dir), "sequence-classification", ["bad", "good"])
    batches = batches_of(loaded)
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


def distilbert() -> torch.nn.Module:
    config = DistilBertConfig(
        vocab_size=30522, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32
    )
    return DistilBertForSequenceClassification(config)


def roberta() -> torch.nn.Module:
    config = RobertaConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=0,
    )
    return RobertaForSequenceClassification(config)


def bert() -> torch.nn.Module:
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return BertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("make", "new", "heads"),
    [
        (distilbert, ("pre_classifier", "classifier"), ("pre_classifier", "classifier")),
        (roberta, ("classifier.dense", "classifier.out_proj"), ("classifier",)),
        (bert, ("bert.pooler.dense", "classifier"), ("classifier",)),  # an encoder saved without its pooler
    ],
    ids=["distilbert", "roberta", "bert-without-pooler"],
)
def test_heads_of_several_modules_are_fitted_as_the_whole_model_computes_them(
    tiny_bert_dir, make, new, heads, monkeypatch
):
    monkeypatch.setattr(ridge, "RIDGES", (RIDGE,))
    batches = batches_of(load_pretrained(str(tiny_bert_dir), "sequence-classification", ["a", "b"]))
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    names = [f"{module}.{part}" for module in new for part in ("weight", "bias")]

    def mean_loss() -> float:
        losses = [
            torch.nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels, reduction="sum")
            for batch in batches
        ]
        return float(sum(losses)) / len(TEXTS)

    for batch in batches:
        batch.inputs.pop("token_type_ids", None)
    before, others = mean_loss(), {n: p.clone() for n, p in model.named_parameters() if n not in names}
    fitted = fit_head(model, names, batches, silent)
    penalty = RIDGE * sum(float((model.get_parameter(name) ** 2).sum()) for name in names)
    assert mean_loss() + penalty == pytest.approx(fitted, rel=1e-5)  # float32: the replay computes the same numbers
    assert mean_loss() < before
    assert all(torch.equal(model.get_parameter(name), value) for name, value in others.items())
    assert task_heads(model) == heads


def test_weights_missing_all_over_the_model_are_refused(tiny_bert_dir):
    loaded = load_pretrained(str(tiny_bert_dir), "sequence-classification", ["bad", "good"])
    batches = batches_of(loaded)
    with pytest.raises(ProfilingError, match="lacks 1 parameters of the transformer blocks"):
        fit_head(loaded.model, ["bert.encoder.layer.0.output.dense.weight", "classifier.bias"], batches, silent)
