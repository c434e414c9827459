"""Chats about images: the forms that rows have, the tokens that have a loss, and statistics of every tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_text_support import PATCHES, save_llava, write_rows
from language_support import language_model, tokenizer

from layerlens.config import DataConfig, RunConfig
from layerlens.data import load_dataset
from layerlens.data.dataset import Dataset
from layerlens.exceptions import ConfigurationError, DataError, ModelSpecError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.train import train_manifest
from layerlens.manifest import read_manifest
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained
from layerlens.tasks import IGNORED, TASKS, make_batches
from layerlens.tasks.image_text import collate, spread_labels


@pytest.fixture(scope="session")
def llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def rows_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="session")
def llava(llava_dir: Path) -> PretrainedModel:
    return load_pretrained(str(llava_dir), "causal-lm", [])


def read(path: Path, rows: list[dict[str, Any]], **options: Any) -> Dataset:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_dataset(DataConfig(source=str(path), **options), None, "causal-lm")


def of(pretrained: PretrainedModel, dataset: Dataset) -> Any:
    return make_batches(TASKS["image-text"], pretrained, dataset, DataConfig(source="x"), batch_size=4)


def said(pretrained: PretrainedModel, batch: Any, row: int = 0) -> str:
    labels = batch.labels[row]
    return str(pretrained.tokenizer.decode(labels[labels != IGNORED]))


def test_every_form_of_a_row_becomes_the_same_sample(rows_jsonl: Path):
    folder = rows_jsonl.parent
    answer = {"role": "assistant", "content": "red"}
    parts = [{"type": "image"}, {"type": "text", "text": "which?"}]
    forms: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": parts}, answer], "images": ["0.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "0.png"}, parts[1]]}, answer]},
        {"messages": [{"role": "user", "content": "which?"}, answer], "image": {"path": "0.png"}},
        {"conversations": [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "red"}],
         "image": "0.png"},
        {"question": "which?", "answer": "red", "image": "0.png"},
    ]  # fmt: skip
    found = [read(folder / "form.jsonl", [form] * 4) for form in forms]
    assert {dataset.task for dataset in found} == {"image-text"}
    asked = {"role": "user", "content": parts}
    assert all(dataset.columns["messages"][0] == [asked, answer] for dataset in found)
    assert {dataset.columns["images"][0][0].name for dataset in found} == {"0.png"}
    assert len({dataset.fingerprint for dataset in found}) == 1


def test_rows_whose_images_are_not_there_are_left_out_and_counted(rows_jsonl: Path):
    good = {"question": "which?", "answer": "red", "image": "0.png"}
    two = {"messages": [{"role": "user", "content": "<image><image> same?"}, {"role": "assistant", "content": "no"}]}
    rows = [good, good | {"image": "gone.png"}, two | {"image": "1.png"}, good]
    dataset = read(rows_jsonl.parent / "odd.jsonl", [rows[0], rows[1], rows[3]])
    assert len(dataset) == 2
    assert "gone.png" in dataset.notes[0]
    with pytest.raises(DataError, match="has 1 images and 2 placeholders for them"):
        read(rows_jsonl.parent / "odd.jsonl", [rows[2]] * 3)


def test_what_the_assistant_says_has_the_loss(llava: PretrainedModel, rows_jsonl: Path):
    one = [{"role": "user", "content": "<image>which?"}, {"role": "assistant", "content": "red"}]
    more = [*one, {"role": "user", "content": "and <image>?"}, {"role": "assistant", "content": "blue"}]
    rows = [{"messages": one, "images": ["0.png"]}, {"messages": more, "images": ["0.png", "2.png"]}]
    batches = of(llava, read(rows_jsonl.parent / "two.jsonl", rows * 2))
    assert [len(batch.index) for batch in batches] == [1] * 4
    assert {said(llava, batch) for batch in batches} == {"red</s>", "red</s>blue</s>"}
    token = llava.tokenizer.convert_tokens_to_ids("<image>")
    assert [int((batch.inputs["input_ids"] == token).sum()) for batch in batches] == [PATCHES] * 2 + [2 * PATCHES] * 2
    assert [len(batch.inputs["pixel_values"]) for batch in batches] == [1, 1, 2, 2]


def test_samples_that_are_trained_together_are_those_that_are_alone(llava: PretrainedModel, rows_jsonl: Path):
    dataset = load_dataset(DataConfig(source=str(rows_jsonl)), None, "causal-lm")
    batches = of(llava, dataset.select(range(3)))
    inputs, labels = collate(llava, batches.features)
    with torch.no_grad():
        together = llava.model(**inputs).logits
        for row in range(3):
            alone = next(one for one in batches if one.index.tolist() == [row])
            kept = inputs["attention_mask"][row].bool()
            assert torch.equal(labels[row][kept], alone.labels[0])
            torch.testing.assert_close(together[row][kept], llava.model(**alone.inputs).logits[0], rtol=1e-4, atol=1e-4)


def test_labels_go_where_the_tokens_go():
    assert spread_labels([7, 9, 1, 2], [IGNORED, IGNORED, 1, 2], [7, 9, 9, 9, 1, 2])[-2:] == [1, 2]
    after = spread_labels([1, 2, 9, 3], [1, 2, IGNORED, IGNORED], [1, 2, 9, 9, 9, 3])
    assert after == [1, 2, IGNORED, IGNORED, IGNORED, IGNORED]


def test_a_model_of_texts_refuses_images(rows_jsonl: Path):
    dataset = load_dataset(DataConfig(source=str(rows_jsonl)), None, "causal-lm")
    with pytest.raises(ConfigurationError, match="rows have images, and tiny-llama has no processor"):
        of(language_model(tokenizer()), dataset)


@pytest.mark.parametrize("images", [True, False])
def test_the_whole_job_and_stock_peft(llava_dir: Path, rows_jsonl: Path, tmp_path: Path, images: bool):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    source = rows_jsonl
    if not images:
        source = tmp_path / "texts.jsonl"
        source.write_text("".join(json.dumps({"text": f"number {n} is even"}) + "\n" for n in range(40)))
    config = RunConfig(
        model={"name_or_path": str(llava_dir), "task": "causal-lm"},
        data={"source": str(source), "calibration_samples": 6, "max_length": 48, "batch_size": 2},
        optimization={
            "max_trainable_params": 600, "latency_profile": {"batch_size": 2, "sequence_length": 16},
            "constraints": {"rules": [{"layers": "*vision_tower*", "max_rank": 1}]},
        },
        training={"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2, "eval_samples": 4},
        runtime={"threads": 1, "cache_dir": "cache"},
    )  # fmt: skip
    done = run_config(config, base_dir=tmp_path)
    manifest = read_manifest(done.files["manifest_json"])
    left_out = manifest.model.left_out or {}
    unread = [name for name in left_out if "vision_tower.encoder.layers.0" in name]
    assert bool(unread) is not images
    assert any("vision_tower.encoder.layers.1" in name for name in left_out)
    chosen = [row.layer for row in manifest.allocations if row.method == "lora"]
    assert any("language_model" in name for name in chosen)
    assert any("vision_tower" in name for name in chosen) is images
    trained = train_manifest(done.files["manifest_json"], config, base_dir=tmp_path, output=tmp_path / "trained")
    for folder in (done.files["peft"], trained.directory):
        base = AutoModelForImageTextToText.from_pretrained(llava_dir)
        tuned = PeftModel.from_pretrained(base, str(folder))
        assert {name for name in chosen if hasattr(tuned.get_base_model().get_submodule(name), "lora_A")} == set(chosen)


def test_it_is_known_before_the_model_is_loaded(llava_dir: Path, rows_jsonl: Path):
    from layerlens.tasks.guess import with_task
    from layerlens.tasks.look import look

    given: dict[str, Any] = {"data": {"source": str(rows_jsonl)}, "optimization": {"max_vram_gb": 1}}
    for named in ("", "causal-lm", "image-text"):
        config = RunConfig(model={"name_or_path": str(llava_dir), "task": named}, **given)
        assert look(config)[0].model.task == with_task(config)[0].model.task == (named or "causal-lm")


def test_two_stacks_of_blocks_are_not_streamed(llava_dir: Path):
    with pytest.raises(ModelSpecError, match="LlavaForConditionalGeneration has 2 stacks of blocks"):
        load_pretrained(str(llava_dir), "causal-lm", [], streamed=True)
