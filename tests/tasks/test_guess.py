"""The guessed task: from classes of models, and from the columns of data."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from layerlens.config import DataConfig
from layerlens.data.read import dataset_of
from layerlens.data.rows import SourceRows
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.registry import TASKS
from layerlens.tasks.guess import guess_task, task_of_class


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BertForSequenceClassification", "sequence-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("XLNetForQuestionAnsweringSimple", "question-answering"),
        ("LlamaForCausalLM", "causal-lm"),
        ("GPT2LMHeadModel", "causal-lm"),
        ("XLMWithLMHeadModel", "masked-lm"),
        ("BertForMaskedLM", "masked-lm"),
        ("T5ForConditionalGeneration", "seq2seq"),
        ("MarianMTModel", "seq2seq"),
        ("PeftModelForSeq2SeqLM", "seq2seq"),
        ("DeiTForImageClassificationWithTeacher", "image-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("DetectionModel", "object-detection"),
        ("BertModel", None),
        ("BertForMultipleChoice", None),
        ("Sequential", None),
    ],
)
def test_a_class_of_models_names_its_task(name: str, task: str | None) -> None:
    assert task_of_class(name) == task


def test_asking_every_task_what_it_is_loads_no_torch() -> None:
    """Guessing a task and checking data against it take a fraction of a second where torch alone takes seconds."""
    asked = "import sys; from layerlens.registry import TASKS; TASKS.values(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0


ENCODER, LLAMA, T5, VIT, ROBERTA = (
    "BertModel", "LlamaForCausalLM", "T5ForConditionalGeneration", "ViTForImageClassification", "RobertaForMaskedLM"
)  # fmt: skip
SENTENCES = [f"so {how} a film {number}" for number in range(12) for how in ("good", "bad")]
CHAT = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "Ada"}]
SQUAD = {"question": "who?", "context": "Ada", "answers": {"text": ["Ada"], "answer_start": [0]}, "title": "Ada"}


def rows(**columns: Any) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("architecture", "data", "task"),
    [
        (ENCODER, rows(text=SENTENCES, label=["a", "b"] * 12), "sequence-classification"),
        (ROBERTA, rows(review=SENTENCES, sentiment=["pos", "neg"] * 12), "sequence-classification"),
        (LLAMA, rows(text=SENTENCES, label=[0, 1] * 12), "sequence-classification"),
        (ENCODER, rows(utterance_txt=SENTENCES, cls=["a", "b"] * 12, id=range(24)), "sequence-classification"),
        ("", rows(text=SENTENCES, label=["a", "b"] * 12), "sequence-classification"),
        (ENCODER, rows(text=SENTENCES, label=[0.5, 1.25] * 12), "regression"),
        (ENCODER, rows(text=SENTENCES, score=["0.5", "1.25"] * 12), "regression"),
        (LLAMA, rows(text=SENTENCES), "causal-lm"),
        (LLAMA, rows(text=SENTENCES, source=["web", "books"] * 12), "causal-lm"),
        (ROBERTA, rows(text=SENTENCES), "masked-lm"),
        (LLAMA, rows(prompt=SENTENCES, completion=SENTENCES), "causal-lm"),
        (
            T5,
            rows(document=SENTENCES, summary=SENTENCES),
            "seq2seq",
        ),
        (ENCODER, rows(tokens=[["a", "b"]] * 8, ner_tags=[["O", "B-X"]] * 8), "token-classification"),
        (ENCODER, [SQUAD] * 8, "question-answering"),
        (VIT, rows(image=["a.png", "b.png"] * 8, label=["cat", "dog"] * 8), "image-classification"),
        (LLAMA, rows(messages=[CHAT] * 8), "causal-lm"),
        ("", rows(conversations=[CHAT] * 8), "causal-lm"),
        (LLAMA, rows(instruction=SENTENCES, input=[""] * 24, output=SENTENCES), "causal-lm"),
        (T5, rows(instruction=SENTENCES, input=[""] * 24, output=SENTENCES), "seq2seq"),
        (LLAMA, rows(question=SENTENCES, answer=["yes", "no"] * 12), "causal-lm"),
        (LLAMA, rows(prompt=SENTENCES, chosen=SENTENCES, rejected=SENTENCES[::-1]), "dpo"),
        ("", rows(chosen=[CHAT] * 8, rejected=[CHAT] * 8), "dpo"),
        (ENCODER, rows(question=SENTENCES, passage=SENTENCES, label=[True, False] * 12), "sequence-classification"),
        (ENCODER, rows(premise=SENTENCES, hypothesis=SENTENCES, label=[0, 1] * 12), "sequence-classification"),
        (ENCODER, rows(text=SENTENCES, labels=[["a"], ["a", "b"]] * 12), "sequence-classification"),
        (ENCODER, rows(text=SENTENCES, toxic=[0, 1] * 12, rude=[1, 1] * 12), "sequence-classification"),
        (ENCODER, rows(text=SENTENCES, label=["1.0", None, "0.0"] * 8), "sequence-classification"),
        (ENCODER, [{"id": 0}, *rows(text=SENTENCES, label=["a", "b"] * 12)], "sequence-classification"),
        (VIT, rows(image=[b"jpeg", None] * 8, cat=[0, 1] * 8, dog=[1, 0] * 8), "image-classification"),
    ],
)
def test_columns_and_classes_say_the_task(architecture: str, data: list[dict[str, Any]], task: str) -> None:
    guess = guess_task(
        [architecture] if architecture else [], Table(data, "rows.jsonl"), DataConfig(source="rows.jsonl")
    )
    assert guess.task == task
    assert guess.reason


@pytest.mark.parametrize(
    ("architecture", "data", "said"),
    [
        ("", rows(text=SENTENCES), r"rows.jsonl has causal-lm \(texts in column 'text'\); masked-lm"),
        (ENCODER, rows(text=SENTENCES), r"and the checkpoint is a BertModel; give --task or model.task, one of"),
        (VIT, rows(text=SENTENCES, label=["a", "b"] * 12), r"sequence-classification \(2 classes \(a, b\) in column"),
        ("", rows(height=range(24), width=range(24)), r"rows.jsonl has height, width; give --task"),
    ],
)
def test_what_cannot_be_guessed_names_what_would_do(architecture: str, data: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        guess_task([architecture] if architecture else [], Table(data, "rows.jsonl"), DataConfig(source="rows.jsonl"))


def test_a_column_that_is_named_counts_and_one_that_was_not_read_is_said() -> None:
    data = rows(a=SENTENCES, b=["x", "y"] * 12, c=["u", "v"] * 12)
    config = DataConfig(source="rows.csv", label_column="c")
    table = Table(data, "rows.csv")
    assert guess_task([ENCODER], table, config).task == "sequence-classification"
    read = TASKS["sequence-classification"].read
    reading = dataset_of(SourceRows.of(data), "rows.csv", config, read).reading
    assert reading is not None
    assert reading.columns == "text from 'a', label from 'c'; not read: b"
    with pytest.raises(DataError, match=r"several columns that may be labels: b, c; name one in data.label_column"):
        dataset_of(SourceRows.of(data), "rows.csv", DataConfig(source="rows.csv"), read)


def test_a_column_that_is_named_and_not_there_is_said_before_anything_is_guessed() -> None:
    for column in ("text_column", "label_column"):
        config = DataConfig(source="rows.csv", **{column: "txt"})
        with pytest.raises(DataError, match=rf"data\.{column}: rows.csv has no column 'txt'.*did you mean 'text'"):
            guess_task([ENCODER], Table(rows(text=SENTENCES), "rows.csv"), config)
