"""Studies of questions, images, sound, masked tokens and tags: data of their formats, from files to a table."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from benchmarks.audio_models import AUDIO
from layerlens.config import RunConfig
from layerlens.evaluation.from_config import evaluate_config
from layerlens.evaluation.study_task import StudyTask
from layerlens.evaluation.training import _right

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
from sounds import tone, write

WORDS = ("who", "where", "is", "red", "green", "blue", "cat", "dog", "runs", "sleeps")
BERT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT and a ViT of one block, and data in the formats of SQuAD, of tagged words, of texts and of ImageNet."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import BertProcessing

    folder = tmp_path_factory.mktemp("tasks")
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {word: index for index, word in enumerate((*special, *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder / "bert")  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(vocabulary), **BERT)
    transformers.BertForMaskedLM(config).save_pretrained(folder / "bert")
    vit = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.ViTForMaskedImageModeling(vit).save_pretrained(folder / "vit")
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(folder / "vit")

    generator = torch.Generator().manual_seed(0)
    squad, tagged, texts = [], [], []
    for number in range(120):
        drawn = [WORDS[3 + i] for i in torch.randint(0, 7, (5,), generator=generator).tolist()]
        context = " ".join([*drawn, str(number)])
        place = number % 5
        start = len(" ".join(drawn[:place])) + (1 if place else 0)
        squad.append({"question": "where is", "context": context,
                      "answers": {"text": [drawn[place]], "answer_start": [start]}})  # fmt: skip
        tagged.append({"tokens": [*drawn, str(number)], "tags": [("O", "X")[w == "cat"] for w in (*drawn, "")]})
        texts.append({"text": context})
        picture = Image.new("RGB", (12, 10), (20 * (number % 10), 100 * (number % 2), 5))
        (folder / "images" / f"n0{number % 2}").mkdir(parents=True, exist_ok=True)
        picture.save(folder / "images" / f"n0{number % 2}" / f"{number}.JPEG", format="JPEG")
    segformer = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=2,
    )  # fmt: skip
    transformers.SegformerForSemanticSegmentation(segformer).save_pretrained(folder / "segformer")
    transformers.SegformerImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "segformer")
    for number in range(60):
        mask = Image.new("L", (16, 16))
        mask.paste(1, (number % 8, 0, number % 8 + 8, 16))
        for kind, picture in (("images", mask.point(lambda value: 200 * value).convert("RGB")), ("masks", mask)):
            (folder / "drawn" / kind).mkdir(parents=True, exist_ok=True)
            picture.save(folder / "drawn" / kind / f"{number}.png")
    AUDIO["wav2vec2"].save(folder / "wav2vec2")  # whose head of classes is two Linears, and that has no vocabulary
    lines = ["file,transcript"]
    for number in range(60):
        kind = ("high", "low")[number % 2]
        write(folder / f"clips/{kind}/{number}.wav", tone(300.0 + 900.0 * (number % 2), 0.15, seed=number))
        lines.append(f"clips/{kind}/{number}.wav,{kind}")
    (folder / "spoken.csv").write_text("\n".join(lines) + "\n")
    for name, rows in (("squad", squad), ("tagged", tagged), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("task", "model", "data"),
    [
        ("question-answering", "bert", {"source": "squad.jsonl"}),
        ("token-classification", "bert", {"source": "tagged.jsonl", "label_column": "tags"}),
        ("masked-lm", "bert", {"source": "texts.jsonl"}),
        ("image-classification", "vit", {"source": "images"}),
        ("audio-classification", "wav2vec2", {"source": "clips"}),
        ("speech-ctc", "wav2vec2", {"source": "spoken.csv"}),
        ("semantic-segmentation", "segformer", {"source": "drawn"}),  # with convolutions in its blocks
    ],
)
def test_a_study_of_the_task(folder: Path, tmp_path: Path, task: str, model: str, data: dict[str, Any]) -> None:
    config = RunConfig.model_validate({
        "model": {"name_or_path": model, "task": task, "head_fit_samples": 16},
        "data": {**data, "max_length": 16},
        "optimization": {"max_trainable_params": 300, "latency_profile": {"sequence_length": 16}},
        "study": {"arms": ["tempered_energy"], "learning_rates": [1e-3, 1e-2], "seeds": 2, "steps": 4, "batch_size": 4,
                  "train_samples": 32, "validation_samples": 12, "test_samples": 12},
        "output": {"directory": str(tmp_path / "out")},
        "runtime": {"threads": 1},
    })  # fmt: skip
    result = evaluate_config(config, base_dir=folder)
    assert {row["arm"] for row in result.arms} == {"uniform", "tempered_energy"}
    assert all(0.0 <= row["test_metric"] <= 1.0 and 0.0 < row["test_loss"] < 40.0 for row in result.arms)


def test_an_answer_is_right_where_both_ends_are(task: StudyTask) -> None:
    task = dataclasses.replace(task, spans=True)
    labels = torch.tensor([[1, 2], [0, 1]])
    logits = torch.zeros(2, 3, 2)
    logits[0, 1, 0] = logits[0, 2, 1] = 1.0  # 1 and 2
    logits[1, 0, 0] = logits[1, 2, 1] = 1.0  # 0 and 2
    assert _right(task, logits, labels).tolist() == [1.0, 0.0]
