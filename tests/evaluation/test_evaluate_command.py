"""``layerlens evaluate`` on a small model directory and a file, as a user would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.config import load_run_config
from layerlens.evaluation.from_config import evaluate_config
from layerlens.exceptions import ConfigurationError

WORDS = ("red", "green", "blue", "cat", "dog", "runs", "sleeps", "fast")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two blocks with a word tokenizer, and 160 texts labelled by their animal."""
    folder = tmp_path_factory.mktemp("study")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(160):
        drawn = [WORDS[i] for i in torch.randint(0, 3, (4,), generator=generator).tolist()]
        animal = WORDS[3 + index % 2]
        rows.append({"text": " ".join([*drawn, animal, str(index)]), "label": animal})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "study.yaml").write_text(
        """model: {name_or_path: model, head_fit_samples: 16}
data: {source: data.jsonl, max_length: 8}
optimization: {max_trainable_params: 200, lora_ranks: [1, 2, 4], latency_profile: {sequence_length: 8}}
study:
  arms: [signal, eva, adalora]
  learning_rates: [0.001, 0.01]
  seeds: 2
  steps: 4
  batch_size: 4
  train_samples: 32
  validation_samples: 16
  test_samples: 16
runtime: {threads: 1}
output: {directory: out}
""",
        encoding="utf-8",
    )
    return folder


def test_a_study_writes_its_runs_table_and_plot_and_goes_on(folder: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(folder / "study.yaml"), "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert {row["arm"] for row in told["arms"]} == {"uniform", "signal", "eva", "adalora"}
    assert all(row["params"] <= 200 for row in told["arms"])
    table = (folder / "out" / "study.md").read_text(encoding="utf-8")
    assert "| signal |" in table
    assert (folder / "out" / "gain-200.svg").is_file()
    runs = (folder / "out" / "runs.jsonl").read_text(encoding="utf-8")

    again = CliRunner().invoke(app, ["evaluate", str(folder / "study.yaml"), "--json", "--quiet"])
    assert again.exit_code == 0
    assert (folder / "out" / "runs.jsonl").read_text(encoding="utf-8") == runs


def test_another_studys_runs_are_not_mixed_in(folder: Path) -> None:
    output = ["output.directory=elsewhere", "study.arms=[uniform]"]
    evaluate_config(load_run_config(folder / "study.yaml", output), base_dir=folder)
    changed = load_run_config(folder / "study.yaml", [*output, "study.steps=5"])
    with pytest.raises(ConfigurationError, match=r"runs of another study \(study differ\)"):
        evaluate_config(changed, base_dir=folder)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("study.arms=[sginal]", "unknown arm 'sginal'"),
        ("study.budgets=[0]", "must be above 0"),
        ("study.budgets=[1]", "rank 1 on the smallest layer takes 32"),
        ("study.seeds=1", "study.seeds"),
    ],
)
def test_mistakes_are_told_by_key(folder: Path, setting: str, told: str) -> None:
    command = ["evaluate", str(folder / "study.yaml"), "--set", setting, "--output", str(folder / "bad"), "--quiet"]
    result = CliRunner().invoke(app, command)
    assert told in result.output or told in str(result.exception), (result.output, result.exception)
    assert isinstance(result.exception, (ConfigurationError, SystemExit))
