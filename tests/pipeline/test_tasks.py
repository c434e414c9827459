"""The whole job on other tasks than the classification of single texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from layerlens.config import RunConfig
from layerlens.exceptions import DataError, ModelSpecError
from layerlens.pipeline import run_config
from layerlens.profiling.statistics_file import load_statistics


@pytest.fixture(scope="module")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory, minilm_path: str) -> Path:
    """A 2-block random GPT-2 (hidden 32) with MiniLM's tokenizer, whose padding token it has."""
    directory = tmp_path_factory.mktemp("tiny-gpt2")
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=101, eos_token_id=102,
        pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def rows(path: Path, made: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(path)


def test_causal_language_models_need_no_labels(settings, tmp_path, tiny_gpt2_dir):
    source = rows(tmp_path / "d.jsonl", [{"text": f"a tale of {n} {'and more ' * (n % 5)}"} for n in range(60)])
    settings["model"] = {"name_or_path": str(tiny_gpt2_dir), "task": "causal-lm"}
    settings["data"]["source"] = source
    result = run_config(RunConfig.model_validate(settings), base_dir=tmp_path)
    assert result.manifest.model.task == "causal-lm"
    assert result.manifest.model.head_modules == ()
    # Timings of a model this small are noise on a busy machine, of which the run then rightly warns.
    told = [line for line in result.warnings if not line.startswith("latency") and "cannot bind" not in line]
    assert told == ["data: the tokenizer has no end-of-text token (eos_token), so no sample ends with one"]  # BERT's
    _, statistics = load_statistics(result.files["statistics"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir)
    assert statistics.n_samples == 24
    # A random model's loss is about log(vocabulary) for each predicted token, one fewer than a text has.
    predicted = statistics.n_tokens / statistics.n_samples - 1
    assert statistics.mean_loss == pytest.approx(predicted * torch.log(torch.tensor(len(tokenizer))).item(), rel=0.1)


def test_an_encoder_is_no_language_model(settings, tmp_path, tiny_bert_dir):
    settings["model"] = {"name_or_path": str(tiny_bert_dir), "task": "causal-lm"}
    settings["data"]["source"] = rows(tmp_path / "d.jsonl", [{"text": f"text {n}"} for n in range(60)])
    with pytest.raises(ModelSpecError, match="cannot predict tokens"):
        run_config(RunConfig.model_validate(settings), base_dir=tmp_path)


def test_regression_fits_one_number_for_each_sentence_pair(settings, tmp_path):
    made = [{"a": f"thing {n % 7}", "b": f"other {n % 5}", "score": (n % 7) / 7 - 0.5} for n in range(200)]
    settings["model"]["task"] = "regression"
    settings["data"] |= {
        "source": rows(tmp_path / "d.jsonl", made), "text_column": "a", "pair_column": "b", "label_column": "score"
    }  # fmt: skip
    result = run_config(RunConfig.model_validate(settings), base_dir=tmp_path)
    assert result.manifest.model.num_labels == 1
    _, statistics = load_statistics(result.files["statistics"])
    variance = sum(row["score"] ** 2 for row in made) / len(made)
    assert 0.0 < statistics.mean_loss < variance  # the fitted head does better than the mean


def test_labels_that_are_no_numbers_are_refused_for_regression(settings, tmp_path):
    settings["model"]["task"] = "regression"
    settings["data"]["source"] = rows(tmp_path / "d.jsonl", [{"text": "a", "label": "high"}] * 40)
    with pytest.raises(DataError, match="sample 1 has no finite number in column 'label', got 'high'"):
        run_config(RunConfig.model_validate(settings), base_dir=tmp_path)


def test_the_whole_model_can_be_measured_with_its_kernel(settings, tmp_path):
    settings["profiling"] |= {"statistics": ["ntk", "spectrum"], "all_weights": True, "ntk_samples": 16}
    result = run_config(RunConfig.model_validate(settings), base_dir=tmp_path)
    _, statistics = load_statistics(result.files["statistics"])
    assert statistics.coverage > 0.99
    assert "bert.embeddings.word_embeddings.weight" in statistics.other_weights
    assert "bert.embeddings.LayerNorm.weight" in statistics.left_out
    told = result.manifest.provenance.statistics["neural_tangent_kernel"]
    assert told["samples"] == 16
    assert 1.0 <= told["effective_rank"] <= 16.0
    assert -1.0 <= told["target_alignment"] <= 1.0
