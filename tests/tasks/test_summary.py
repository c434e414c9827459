"""What a run says of its data: figures counted by hand, for each kind of samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from layerlens.config import DataConfig
from layerlens.data import load_dataset
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models.data_summary import DataSummary
from layerlens.tasks import TASKS, make_batches
from layerlens.tasks.summary import summarise


@pytest.fixture(scope="module")
def loaded(minilm_path: str) -> PretrainedModel:
    tokenizer = hf.AutoTokenizer.from_pretrained(minilm_path)
    config = hf.T5Config(
        vocab_size=30522, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return PretrainedModel(hf.T5ForConditionalGeneration(config), tokenizer, "tiny", ())


def summary(place: Path, rows: list[dict[str, Any]], task: str, loaded: PretrainedModel, **options: Any) -> DataSummary:
    path = place / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source=str(path), **options)
    dataset = load_dataset(config, None, task)
    batches = make_batches(TASKS[task], loaded, dataset, config, batch_size=3)
    return summarise(TASKS[task], loaded, dataset, dataset, batches, config)


def test_rows_columns_tokens_and_classes_are_counted(tmp_path: Path, loaded: PretrainedModel):
    rows = [{"text": "one " * (n + 1), "label": "yes" if n < 3 else "no", "id": n} for n in range(5)]
    rows[4]["label"] = None
    found = summary(tmp_path, rows, "sequence-classification", loaded, max_length=5)
    assert (found.rows, found.samples, found.encoded) == (5, 4, 4)
    assert (found.used, found.unused) == (("text", "label"), ("id",))
    assert found.classes == {"no": 1, "yes": 3}
    assert found.tokens is not None
    # [CLS] one [SEP], and a token more for each further word: 3, 4, 5, and 6 that are cut to 5.
    assert (found.tokens.median, found.tokens.longest, found.tokens.total) == (4.5, 5, 17)
    assert found.tokens.truncated == 1
    assert found.tokens.with_loss is None
    assert found.shown == {"input": "[CLS] one [SEP]", "class": "yes"}
    lines = dict(found.facts())
    assert lines["columns"] == "used: text, label; not used: id"
    assert lines["classes"] == "no 1, yes 3"
    assert "1 truncated" in lines["tokens"]
    assert lines["left out"].startswith("1: sample 5 has no class")
    assert json.loads(json.dumps(found.fields()))["tokens"]["longest"] == 5


def test_tokens_with_loss_are_those_of_the_labels(tmp_path: Path, loaded: PretrainedModel):
    words = [{"tokens": ["Anna", "lives"], "tags": ["B", "O"]}, {"tokens": ["Oslo"], "tags": ["B"]}]
    tagged = summary(tmp_path, words, "token-classification", loaded)
    assert tagged.tokens is not None
    assert tagged.tokens.with_loss == 3
    assert tagged.classes == {"B": 2, "O": 1}
    assert tagged.shown["loss on"] == "Anna/B lives/O"
    pairs = [{"source": f"one two {n}", "target": "three"} for n in range(3)]
    written = summary(tmp_path, pairs, "seq2seq", loaded)
    assert written.tokens is not None
    assert written.tokens.with_loss == written.tokens.total == 9  # [CLS] three [SEP], three times
    assert written.shown == {"input": "[CLS] one two 0 [SEP]", "loss on": "[CLS] three [SEP]"}
    answered = [{"prompt": "one two", "completion": " three"} for _ in range(3)]
    causal = summary(tmp_path, answered, "causal-lm", loaded)
    assert causal.tokens is not None
    assert causal.tokens.with_loss is not None
    assert 0 < causal.tokens.with_loss < causal.tokens.total
    assert "three" in causal.shown["loss on"]
    assert "one" not in causal.shown["loss on"]


def test_many_classes_and_reasons_are_shortened(tmp_path: Path, loaded: PretrainedModel):
    rows = [{"text": "t", "label": str(n)} for n in range(40)]
    found = summary(tmp_path, rows, "sequence-classification", loaded)
    assert dict(found.facts())["classes"].endswith("and 28 more")
    many = replace(found, left_out=tuple((1, f"reason {n}") for n in range(9)))
    assert [value for name, value in many.facts() if name == "left out"][-1] == "4 for 4 other reasons"
