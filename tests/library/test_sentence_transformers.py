"""A SentenceTransformer given as it is: planned on rows, and trained by the library's own trainer with the choice."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import peft
import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from trainer_support import ARGUMENTS, sentence_model, sentences
from transformers.integrations.peft import MIN_PEFT_VERSION

import layerlens
from layerlens.exceptions import ConfigurationError, ModelSpecError
from layerlens.library.sentences import _as_rows

NEW_ENOUGH = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)
"""Whether transformers, and so a SentenceTransformer, holds adapters of this PEFT itself."""
SETTINGS = {"max_trainable_params": 400, "calibration_samples": 8, "batch_size": 4, "max_length": 16, "threads": 1}


def rows(kind: str) -> Dataset:
    texts = sentences(36)
    columns = {"anchor": texts[:12], "positive": texts[12:24]}
    if kind == "triplets":
        columns["negative"] = texts[24:]
    if kind == "scored":
        columns = {"sentence1": texts[:12], "sentence2": texts[12:24], "score": [0.1 * n for n in range(12)]}
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("kind", "loss", "settings"),
    [
        ("pairs", "MultipleNegativesRankingLoss", {}),
        ("triplets", "TripletLoss", {"embedding_loss": "triplet"}),
        ("scored", "CoSENTLoss", {}),
    ],
)
def test_it_is_planned_on_and_trained_in_its_own_trainer(kind: str, loss: str, settings: dict, tmp_path):
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer import losses

    model = sentence_model(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = layerlens.plan(model, rows(kind), **SETTINGS, **settings)
    assert plan.manifest.model.task == "sentence-embedding"
    assert 0 < plan.trainable_params <= 400
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    by_batches = any("each batch counts as one sample" in line for line in plan.notes)
    assert by_batches is (loss != "TripletLoss")

    if NEW_ENOUGH:
        model.add_adapter(plan.lora_config(model))
    else:
        peft.get_peft_model(model.transformers_model, plan.lora_config(model))  # put in in place
    trained = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    assert sum(value.numel() for value in trained.values()) == plan.trainable_params
    embedded = model.encode(["the cat sat"])
    arguments = Arguments(str(tmp_path), **{**ARGUMENTS, "per_device_train_batch_size": 4, "learning_rate": 0.05})
    own = getattr(losses, loss)(model)
    SentenceTransformerTrainer(model, arguments, train_dataset=rows(kind), loss=own).train()
    assert any(not torch.equal(value, model.get_parameter(name)) for name, value in trained.items())
    after = model.encode(["the cat sat"])
    assert (after != embedded).any()
    if not NEW_ENOUGH:
        return
    model.save_pretrained(str(tmp_path / "saved"))
    assert (SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(["the cat sat"]) == after).all()


def test_rows_may_be_examples_or_tuples_of_texts(tmp_path):
    from sentence_transformers import InputExample

    texts = sentences(24)
    pairs = list(zip(texts[:12], texts[12:], strict=True))
    scored = [InputExample(texts=list(pair), label=number / 12) for number, pair in enumerate(pairs)]
    loader = torch.utils.data.DataLoader(scored, batch_size=4, collate_fn=list)
    triplets = [(*pair, "the cat sat") for pair in pairs]
    found = [_as_rows(data) for data in (pairs, [InputExample(texts=list(pair)) for pair in pairs], loader, triplets)]
    assert found[0] == found[1] == [{"anchor": one, "positive": other} for one, other in pairs]
    assert found[2][3] == {"sentence1": pairs[3][0], "sentence2": pairs[3][1], "score": 0.25}
    assert list(found[3][0]) == ["anchor", "positive", "negative"]
    assert _as_rows(rows("pairs")).column_names == ["anchor", "positive"]  # a datasets.Dataset, as it is
    assert layerlens.plan(sentence_model(tmp_path), loader, **SETTINGS).trainable_params > 0


def test_what_is_given_beside_it_is_refused(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    model = sentence_model(tmp_path)
    with pytest.raises(ConfigurationError, match="task: a SentenceTransformer is planned for the task sentence-emb"):
        layerlens.plan(model, rows("pairs"), task="regression", **dict(SETTINGS, batch_size=32))
    with pytest.raises(ConfigurationError, match=r"loss: a SentenceTransformer takes one .* by name: embedding_loss="):
        layerlens.plan(model, rows("scored"), loss=CoSENTLoss(model), **SETTINGS)
    with pytest.raises(ConfigurationError, match=r"model\.embedding_loss: triplet needs an anchor"):
        layerlens.plan(model, rows("pairs"), embedding_loss="triplet", **SETTINGS)
    with pytest.raises(ModelSpecError, match="the first module of this SentenceTransformer is a Pooling"):
        layerlens.plan(SentenceTransformer(modules=[model[1]], device="cpu"), rows("pairs"), **SETTINGS)
