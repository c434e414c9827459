"""The configurations for public benchmarks are valid, and read data of the benchmarks' formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

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
    "rajpurkar/squad": [
        {"id": "1", "title": "Cats", "context": "The cat sat on a mat.", "question": "Who sat?",
         "answers": {"text": ["The cat"], "answer_start": [0]}},
        {"id": "2", "title": "Cats", "context": "The cat sat on a mat.", "question": "Where?",
         "answers": {"text": ["on a mat"], "answer_start": [12]}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("path", [path for path in CONFIGS if "imagenet" not in path.stem], ids=lambda path: path.stem)
def test_a_configuration_reads_data_of_its_format(path: Path, tmp_path: Path) -> None:
    name = load_run_config(path).data.source.removeprefix("hf:").rpartition(":")[0]
    local = tmp_path / "rows.jsonl"
    local.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]), encoding="utf-8")
    config = load_run_config(path, [f"data.source={local}"])
    dataset = load_dataset(config.data, tmp_path, config.model.task)
    assert len(dataset) == 2
    assert len(dataset.label_names) == (0 if name == "rajpurkar/squad" else 2)
    assert bool(dataset.pairs) == (config.data.pair_column is not None)
    assert len(config.study.learning_rates) >= 5
    assert config.study.seeds >= 5


def test_imagenet_is_read_from_a_folder_for_each_class(tmp_path: Path) -> None:
    for number, folder in enumerate(("n02086240", "n02087394")):
        (tmp_path / "train" / folder).mkdir(parents=True)
        image = Image.new("RGB", (8, 6), (90 * number, 10, 10))
        image.save(tmp_path / "train" / folder / f"{folder}_1.JPEG", format="JPEG")
    path = next(path for path in CONFIGS if "imagenet" in path.stem)
    config = load_run_config(path, [f"data.source={tmp_path / 'train'}"])
    dataset = load_dataset(config.data, tmp_path, config.model.task)
    assert dataset.label_names == ("n02086240", "n02087394")
    assert dataset.columns["image"][0].open("RGB").size == (8, 6)


def test_there_are_configurations_for_all_models() -> None:
    assert {path.stem.split("-")[0] for path in CONFIGS} == {"bert", "llama2", "vit"}
