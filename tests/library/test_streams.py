"""Data that a program has as a stream or as plain texts, and a model whose weights are partly on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import layerlens

TEXTS = [f"item {n} is here" for n in range(12)]
SETTINGS: dict[str, Any] = {"max_trainable_params": 500, "calibration_samples": 4, "max_length": 8, "lora_ranks": [1]}


@pytest.fixture(scope="module")
def words() -> Any:
    known = {"[PAD]": 0, "[UNK]": 1, "item": 2, "is": 3, "here": 4} | {str(n): 5 + n for n in range(12)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def test_streams_of_rows_and_plain_texts_are_as_rows(llama: torch.nn.Module, words: Any):
    rows = [{"text": text} for text in TEXTS]
    wanted = layerlens.plan(llama, rows, tokenizer=words, **SETTINGS)
    streamed = Dataset.from_list(rows).to_iterable_dataset()
    for data in (streamed, iter(TEXTS)):
        found = layerlens.plan(llama, data, tokenizer=words, **SETTINGS)
        assert found.manifest.score == wanted.manifest.score
        lost = [note for note in found.notes if "cannot be rewound: the 12 rows" in note]
        assert len(lost) == hasattr(data, "__next__")
    tokens = [{"input_ids": one} for one in words(TEXTS)["input_ids"]]
    made = layerlens.plan(llama, Dataset.from_list(tokens).to_iterable_dataset(), tokenizer=words, **SETTINGS)
    assert made.trainable_params == wanted.trainable_params


def test_a_stream_keeps_the_names_of_its_classes(bert: torch.nn.Module, words: Any):
    bert.config.id2label = {0: "bad", 1: "good", 2: "odd"}  # type: ignore[union-attr]
    names = ["odd", "good", "bad"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = Dataset.from_list([{"text": text, "label": n % 3} for n, text in enumerate(TEXTS)], features=features)
    plans = [layerlens.plan(bert, data, tokenizer=words, **SETTINGS) for data in (rows, rows.to_iterable_dataset())]
    assert plans[0].manifest.score == plans[1].manifest.score


def test_weights_on_disk_give_the_same_plan(llama: torch.nn.Module, words: Any, tmp_path: Path):
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    half = LlamaForCausalLM.from_pretrained(
        tmp_path, device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "disk"
    )
    assert any(parameter.is_meta for parameter in half.parameters())
    plans = [
        layerlens.plan(model, TEXTS, tokenizer=words, **SETTINGS)
        for model in (LlamaForCausalLM.from_pretrained(tmp_path), half)
    ]
    assert plans[0].ranks == plans[1].ranks
    assert plans[0].manifest.score == plans[1].manifest.score
    assert any(parameter.is_meta for parameter in half.parameters())
