"""The configurations for public benchmarks are valid, and read data of the benchmarks' formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerlens.config import load_run_config
from layerlens.data import load_dataset

CONFIGS = sorted((Path(__file__).parents[2] / "benchmarks" / "evaluation" / "configs").glob("*.yaml"))
ROWS = {  # two rows of each data set, columns and types as on the hub
    "SetFit/rte": [
        {"text1": "No weapons were found.", "text2": "Weapons were found.", "label": 1, "idx": 0},
        {"text1": "A place of sorrow.", "text2": "A place.", "label": 0, "idx": 1},
    ],
    "SetFit/mrpc": [
        {"text1": "He accused his brother.", "text2": "His brother was accused.", "label": 1, "idx": 0},
        {"text1": "They sold it in May.", "text2": "It was bought in 1996.", "label": 0, "idx": 1},
    ],
    "stanfordnlp/sst2": [
        {"idx": 0, "sentence": "hide new secretions", "label": "negative"},
        {"idx": 1, "sentence": "that loves its characters", "label": "positive"},
    ],
    "google/boolq": [
        {"question": "is it a word", "answer": True, "passage": "It is one."},
        {"question": "is it blue", "answer": False, "passage": "It is red."},
    ],
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_reads_data_of_its_format(path: Path, tmp_path: Path) -> None:
    name = load_run_config(path).data.source.removeprefix("hf:").rpartition(":")[0]
    local = tmp_path / "rows.jsonl"
    local.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]), encoding="utf-8")
    config = load_run_config(path, [f"data.source={local}"])
    dataset = load_dataset(config.data, tmp_path, config.model.task)
    assert len(dataset) == 2
    assert len(dataset.label_names) == 2
    assert bool(dataset.pairs) == (config.data.pair_column is not None)
    assert len(config.study.learning_rates) >= 5
    assert config.study.seeds >= 5


def test_there_are_configurations_for_both_models() -> None:
    assert {path.stem.split("-")[0] for path in CONFIGS} == {"bert", "llama2"}
