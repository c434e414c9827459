"""Sentence embeddings: what a directory of sentence-transformers says, the library's losses, and the whole job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from sentence_transformers import SentenceTransformer

from layerlens.config import RunConfig
from layerlens.data import load_dataset
from layerlens.exceptions import ConfigurationError, DataError, ModelSpecError
from layerlens.integrations.sentence_models import sentence_model, transformer_folder
from layerlens.jobs.train import train_manifest
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained
from layerlens.tasks import TASKS, make_batches, task_for

WORDS = ["error", "restart", "weather", "rain", "table", "query", "index", "sun", "cloud", "server"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, minilm_path: str) -> Path:
    """A tiny directory as older releases saved one: the transformer in 0_Transformer, prompts, a Dense module."""
    folder = tmp_path_factory.mktemp("st") / "st"
    inner = folder / "0_Transformer"
    torch.manual_seed(0)
    hf.BertModel(
        hf.BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24,
                      max_position_embeddings=32)
    ).save_pretrained(inner)  # fmt: skip
    hf.AutoTokenizer.from_pretrained(minilm_path).save_pretrained(inner)
    (inner / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": true}')
    kinds = {"0_Transformer": "models.Transformer", "1_Pooling": "models.Pooling", "2_Dense": "models.Dense"}
    listed = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.{kind}"}
        for n, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    from sentence_transformers.models import Dense, Pooling

    for name, module in {"1_Pooling": Pooling(16, "mean", include_prompt=False), "2_Dense": Dense(16, 8)}.items():
        (folder / name).mkdir()
        module.save(str(folder / name))
    prompts = {"query": "query: ", "passage": "passage: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


def rows(tmp_path: Path, kind: str) -> str:
    found = []
    for number in range(60):
        one = WORDS[number % len(WORDS)]
        row: dict[str, Any] = {"anchor": f"how about {one} {number}", "positive": f"The {one} of case {number}"}
        if kind == "triplets":
            row["negative"] = f"nothing of number {number + 1}"
        if kind == "scored":
            row["score"] = (number % 5) / 4
        found.append(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("\n".join(found))
    return "rows.jsonl"


def settings_of(model: Path, source: str, **more: Any) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(model), "task": "sentence-embedding", **more},
        "data": {"source": source, "calibration_samples": 24, "max_length": 16, "batch_size": 8},
        "optimization": {
            "max_trainable_params": 400, "methods": ["lora"], "latency_profile": {"batch_size": 2, "sequence_length": 8}
        },
        "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 5e-2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "loss", "name"),
    [
        ("pairs", "auto", "MultipleNegativesRankingLoss"),
        ("triplets", "auto", "MultipleNegativesRankingLoss"),
        ("triplets", "triplet", "TripletLoss"),
        ("scored", "auto", "CoSENTLoss"),
    ],
)
def test_embeddings_and_losses_are_those_of_the_library(
    directory: Path, tmp_path: Path, kind: str, loss: str, name: str
):
    from sentence_transformers import losses

    config = RunConfig.model_validate(settings_of(directory, rows(tmp_path, kind), embedding_loss=loss))
    dataset = load_dataset(config.data, tmp_path, "sentence-embedding")
    task = task_for(config.model, tmp_path, dataset)
    pretrained = load_pretrained(str(directory), task.name, ())
    whole = SentenceTransformer(str(directory))
    assert list(pretrained.model.state_dict()) == list(whole.transformers_model.state_dict())  # names that PEFT sees
    batch = make_batches(task, pretrained, dataset, config.data, batch_size=8)[0]
    ours = task.loss(pretrained.model(**batch.inputs), batch)

    prompts = {"text": "query: "}
    columns = []
    with torch.no_grad():
        for column in [one for one in dataset.columns if one != "scored"]:
            texts = [dataset.columns[column][int(place)] for place in batch.index]
            prompt = prompts.get(column, "passage: ")
            columns.append(whole.encode(texts, prompt=prompt, convert_to_tensor=True, show_progress_bar=False))
    theirs = getattr(losses, name)(whole).compute_loss_from_embeddings(columns, batch.labels.scores)
    # Hidden states of 16 features in float32, padded to another length: sums differ by about 1e-6, times a scale of 20.
    assert torch.allclose(ours.mean(), theirs, atol=1e-4)
    assert task.coupled is (name != "TripletLoss")
    if name == "TripletLoss":
        one = batch.taken(torch.tensor([3]))
        assert torch.allclose(task.loss(pretrained.model(**one.inputs), one)[0], ours[3], atol=1e-5)


def test_the_whole_job_loads_in_sentence_transformers_and_goes_on_in_its_trainer(directory: Path, tmp_path: Path):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses

    source = rows(tmp_path, "pairs")
    config = RunConfig.model_validate(settings_of(directory, source))
    done = run_config(config, base_dir=tmp_path)
    assert any("each batch counts as one sample" in line for line in done.warnings)
    trained = train_manifest(tmp_path / "out/manifest.json", config, base_dir=tmp_path, output=tmp_path / "tuned")
    assert {"ndcg_at_10", "mrr", "loss"} <= set(trained.after)
    assert trained.training.losses[-1] < trained.training.losses[0]

    whole = SentenceTransformer(str(directory))
    before = whole.encode(["error"], prompt_name="query")
    whole.load_adapter(str(tmp_path / "tuned"), is_trainable=True)
    assert abs(whole.encode(["error"], prompt_name="query") - before).max() > 0
    pairs = [json.loads(line) for line in (tmp_path / source).read_text().splitlines()[:16]]
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "more"), max_steps=1, per_device_train_batch_size=8, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    adapted = {name: value.clone() for name, value in whole.named_parameters() if "lora_B" in name}
    assert adapted
    loss = losses.MultipleNegativesRankingLoss(whole)
    SentenceTransformerTrainer(model=whole, args=arguments, train_dataset=Dataset.from_list(pairs), loss=loss).train()
    assert any(not torch.equal(value, whole.get_parameter(name)) for name, value in adapted.items())


def test_what_is_no_set_of_texts_or_no_directory_is_refused(directory: Path, tmp_path: Path):
    assert transformer_folder(directory).name == "0_Transformer"
    for loss, kind, said in (("triplet", "pairs", "one negative"), ("cosent", "pairs", "a score"),
                             ("multiple-negatives", "scored", "without scores")):  # fmt: skip
        config = RunConfig.model_validate(settings_of(directory, rows(tmp_path, kind), embedding_loss=loss))
        with pytest.raises(ConfigurationError, match=rf"model\.embedding_loss: {loss} needs .*{said}"):
            run_config(config, base_dir=tmp_path)
    both = json.dumps({"anchor": "a", "positive": "b", "negative": "c", "score": 0.5})
    (tmp_path / "rows.jsonl").write_text("\n".join([both] * 9))
    with pytest.raises(DataError, match=r"has negatives \(negative\) and scores \(score\)"):
        run_config(RunConfig.model_validate(settings_of(directory, "rows.jsonl")), base_dir=tmp_path)

    other = tmp_path / "other"
    shutil.copytree(directory, other)
    listed = json.loads((other / "modules.json").read_text())
    listed[1]["path"] = "../elsewhere"
    (other / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ModelSpecError, match=r"names '\.\./elsewhere', which is outside"):
        sentence_model(str(other / "0_Transformer"), 16)
    listed[0]["type"] = "sentence_transformers.models.StaticEmbedding"
    (other / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ModelSpecError, match=r"first module of .* is .*StaticEmbedding"):
        transformer_folder(other)


def test_rankings_and_correlations_are_judged():
    record = {"loss": 1.0, "items": 3, "scored": False}
    vectors = torch.eye(3)[:, None].repeat(1, 2, 1)
    texts = torch.tensor([[1, 11], [2, 12], [3, 13]]).numpy()
    perfect = record | {"embeddings": vectors.numpy(), "texts": texts, "scores": torch.zeros(3).numpy()}
    finish = TASKS["sentence-embedding"].metrics.finish
    assert finish([perfect], ()) == {"ndcg_at_10": 1.0, "mrr": 1.0}
    shared = texts.copy()
    shared[:, 1] = [11, 11, 13]  # two anchors have the same positive, which is one document
    vectors[1, 0, 2] = 0.1  # the second is a little nearer to another document than to its own
    found = finish([perfect | {"texts": shared, "embeddings": vectors.numpy()}], ())
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1) / 3)
