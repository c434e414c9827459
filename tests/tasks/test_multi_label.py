"""Several classes for a sample: how they are read, their loss against transformers' own, and their metrics."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from layerlens.config import DataConfig
from layerlens.data import Dataset, load_dataset
from layerlens.exceptions import DataError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks import TASKS, make_batches
from layerlens.tasks.class_targets import multi_label_metrics

TASK = TASKS["sequence-classification"]
SETS = [["joy"], ["joy", "anger"], [], ["fear"]]
BITS = [[0, 0, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]]
NAMES = ("anger", "fear", "joy")


def load(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> Dataset:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(DataConfig(source="d.jsonl", **options), tmp_path)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ([{"labels": one} for one in SETS], {}),
        ([{"labels": str(one)} for one in SETS], {}),
        ([{"labels": [float(bit) for bit in one]} for one in BITS], {"label_names": list(NAMES)}),
        ([dict(zip(NAMES, one, strict=True)) for one in BITS], {}),
        ([{"n": 1, **dict(zip(NAMES, map(str, one), strict=True))} for one in BITS], {"label_column": list(NAMES)}),
    ],
)
def test_lists_and_columns_of_bits_give_the_same(tmp_path: Path, labels: list[dict[str, Any]], options: dict[str, Any]):
    dataset = load(tmp_path, [{"text": f"t {n}", **row} for n, row in enumerate(labels)], **options)
    assert dataset.label_names == NAMES
    assert dataset.labels == ((2,), (0, 2), (), (1,))
    assert dataset.with_label_order(("joy", "fear", "anger")).labels == ((0,), (2, 0), (), (1,))


def test_a_row_without_a_list_is_left_out(tmp_path: Path):
    rows = [{"text": f"t {n}", "labels": one} for n, one in enumerate([*SETS, None])]
    dataset = load(tmp_path, rows)
    assert len(dataset) == 4
    assert dataset.reading is not None
    assert "has no list of classes in column 'labels', got None" in dataset.reading.left_out[5]
    with pytest.raises(DataError, match="has no column 'sad'"):
        load(tmp_path, rows, label_column=["text", "sad"])


def test_gaps_as_pandas_writes_them_are_no_class_and_no_bit(tmp_path: Path):
    """Text "nan" was a class, and of columns of bits with gaps one became the label."""
    gaps = ["", "nan", "NaN", None, float("nan")]
    single = [{"text": f"t {n}", "label": one} for n, one in enumerate([*["x", "y", "None"] * 4, *gaps])]
    dataset = load(tmp_path, single)
    assert dataset.label_names == ("None", "x", "y")
    assert dataset.reading is not None
    assert list(dataset.reading.left_out) == [13, 14, 15, 16, 17]
    assert "'None' in column 'label' is a class; if it means that a row has none" in " ".join(dataset.reading.notes)
    bits = [{"text": f"t {n}", "cat": one, "dog": n % 2} for n, one in enumerate([*[0, 1] * 6, *gaps])]
    dataset = load(tmp_path, bits)
    assert dataset.label_names == ("cat", "dog")
    assert dataset.labels == ((), (0, 1)) * 6
    assert dataset.reading is not None
    assert list(dataset.reading.left_out) == [13, 14, 15, 16, 17]


def test_the_loss_is_that_of_transformers_and_its_mean_the_models_own(tmp_path: Path, minilm_path: str):
    tokenizer = hf.AutoTokenizer.from_pretrained(minilm_path)
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=len(tokenizer),
        num_labels=3,
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config).eval()
    dataset = load(tmp_path, [{"text": f"t {n}", "labels": one} for n, one in enumerate(SETS)])
    pretrained = PretrainedModel(model, tokenizer, "tiny", ())
    (batch,) = make_batches(TASK, pretrained, dataset, DataConfig(source="unused"), batch_size=9)
    assert batch.labels.tolist() == [[float(bit) for bit in BITS[n]] for n in batch.index.tolist()]
    own = model(**batch.inputs, labels=batch.labels)
    losses = TASK.loss(own, batch)
    assert losses.shape == (4,)
    assert torch.allclose(losses.mean(), own.loss, atol=1e-6)  # the same sums in another order, in float32
    assert model.config.problem_type == "multi_label_classification"
    record = TASK.metrics.record(own, {"labels": batch.labels}, None)
    found = TASK.metrics.finish([record], dataset.label_names)
    assert TASK.metrics.primary[0] in found
    assert found["accuracy"] == float(((own.logits > 0).float() == batch.labels).all(dim=1).float().mean())


def test_metrics_by_hand():
    predicted, actual = np.array([[1, 0], [1, 1], [0, 0]]), np.array([[1, 0], [0, 1], [0, 1]])
    found = multi_label_metrics(predicted, actual)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["label_accuracy"] == pytest.approx(4 / 6)
    assert found["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))  # 2 right, 1 too many, 1 missed
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    single = TASK.metrics.record(
        SimpleNamespace(loss=0.5, logits=torch.tensor([[1.0, 0.0]])), {"labels": torch.tensor([0])}, None
    )
    assert TASK.metrics.finish([single], NAMES)["accuracy"] == 1.0
