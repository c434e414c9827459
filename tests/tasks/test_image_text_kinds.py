"""Chats about images through the processors that people have, and what is said where one refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from layerlens.integrations.torchvision_import import make_torchvision_importable

make_torchvision_importable()
from image_text_kinds import KINDS  # noqa: E402

from layerlens.config import DataConfig  # noqa: E402
from layerlens.data import load_dataset  # noqa: E402
from layerlens.exceptions import ConfigurationError, DataError, ModelSpecError  # noqa: E402
from layerlens.integrations.layers import model_spec  # noqa: E402
from layerlens.integrations.pretrained import PretrainedModel  # noqa: E402
from layerlens.sources import load_pretrained  # noqa: E402
from layerlens.tasks import IGNORED, TASKS, make_batches  # noqa: E402
from layerlens.tasks.image_text import collate  # noqa: E402

RIGHT = [name for name in KINDS if name not in ("llama4", "smolvlm")]
NEEDS_IMAGES = ("mllama", "paligemma")


def turn(role: str, *parts: str) -> dict[str, Any]:
    content = [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


ROWS: list[dict[str, Any]] = [
    {"messages": [turn("user", "image", "which colour?"), turn("assistant", "red")], "images": ["0.png"]},
    {
        "messages": [turn("user", "a ", "image", "and ", "image", "the same, or another?"), turn("assistant", "no"),
                     turn("user", "image", "now?"), turn("assistant", "they are alike")],
        "images": ["1.png", "2.png", "0.png"],
    },
    {"messages": [turn("user", "no image here, how are you?"), turn("assistant", "fine")], "images": []},
]  # fmt: skip
SAID = ["red</s>", "no</s>they are alike</s>", "fine</s>"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for number, size in enumerate([(12, 8), (8, 16), (10, 10)]):
        Image.new("RGB", size, (60 * number, 200 - 50 * number, 9)).save(folder / f"{number}.png")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def batches_of(pretrained: PretrainedModel, rows: Path) -> Any:
    dataset = load_dataset(DataConfig(source=str(rows)), None, "causal-lm")
    return make_batches(TASKS["image-text"], pretrained, dataset, DataConfig(source="x"), batch_size=4)


@pytest.mark.parametrize("name", RIGHT)
def test_each_kind_takes_chats_with_any_number_of_images(name: str, rows: Path, tmp_path: Path):
    pretrained = load_pretrained(str(KINDS[name].save(tmp_path)), "causal-lm", [])
    batches = batches_of(pretrained, rows)
    expected = [one for one, row in zip(SAID, ROWS, strict=True) if row["images"] or name not in NEEDS_IMAGES]
    assert len(batches.features) == len(expected)
    assert bool(batches.features.left_out) is (name in NEEDS_IMAGES)
    alone = {int(batch.index): batch for batch in batches}
    assert set(KINDS[name].takes) <= set(alone[0].inputs)
    assert all("labels" not in batch.inputs for batch in alone.values())
    together, labels__bt = collate(pretrained, batches.features)
    with torch.no_grad():
        logits__btc = pretrained.model(**together).logits
        for row, answer in enumerate(expected):
            one, kept = alone[row], together["attention_mask"][row].bool()
            labels = one.labels[0]
            assert pretrained.tokenizer.decode(labels[labels != IGNORED]) == answer
            assert torch.equal(labels__bt[row][kept], labels)
            logits__tc = pretrained.model(**one.inputs).logits[0]
            torch.testing.assert_close(logits__btc[row][kept], logits__tc, rtol=1e-4, atol=1e-4)
            spoken = int((labels != IGNORED).nonzero()[-1])
            changed = {**one.inputs, "input_ids": one.inputs["input_ids"].clone()}
            changed["input_ids"][0, spoken] = 40  # no token is predicted from itself
            after = pretrained.model(**changed).logits[0, :spoken]
            torch.testing.assert_close(after, logits__tc[:spoken], rtol=1e-4, atol=1e-4)


def test_a_processor_that_lacks_a_package_is_named_with_it(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", print)
    folder = KINDS["smolvlm"].save(tmp_path)
    assert len(batches_of(load_pretrained(str(folder), "causal-lm", []), rows)) == len(ROWS)
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ConfigurationError, match="cannot be loaded: Package `num2words` is required"):
        batches_of(load_pretrained(str(folder), "causal-lm", []), rows)


def test_a_model_whose_own_code_fails_is_named(rows: Path, tmp_path: Path):
    pretrained = load_pretrained(str(KINDS["llama4"].save(tmp_path)), "causal-lm", [])
    inputs = batches_of(pretrained, rows)[0].inputs

    def fails(**_: Any) -> None:
        raise AttributeError("no image_outputs")

    pretrained.model.forward = fails
    with pytest.raises(ModelSpecError, match=r"Llama4ForConditionalGeneration fails on a batch .* no image_out"):
        model_spec(pretrained, "x", inputs=inputs)


def test_what_a_processor_refuses_is_one_line(rows: Path, tmp_path: Path):
    pretrained = load_pretrained(str(KINDS["qwen2_vl"].save(tmp_path)), "causal-lm", [])
    features = batches_of(pretrained, rows).features
    Image.new("RGB", (900, 2), (9, 9, 9)).save(tmp_path / "thin.png")
    row = {**ROWS[0], "images": [str(tmp_path / "thin.png")]}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"no chat can be used: Qwen2VLProcessor refuses .* aspect ratio"):
        batches_of(pretrained, path)
    odd = [
        {**features[0], "images": load_dataset(DataConfig(source=str(path)), None, "causal-lm").columns["images"][0]}
    ]
    with pytest.raises(DataError, match="refuses a chat with 1 images: ValueError: absolute aspect ratio"):
        collate(pretrained, odd)
