"""The guessed task: from classes of models, and from the columns of data."""

from __future__ import annotations

import subprocess
import sys

import pytest

from layerlens.tasks.guess import task_of_class


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
