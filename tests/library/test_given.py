"""Every form in which a program has a model, data and a loss; and what cannot be planned on, in one clear sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import layerlens
from layerlens.exceptions import ConfigurationError, DataError, LayerLensError, ModelSpecError, ProfilingError

Batches = list[dict[str, torch.Tensor]]


class Pairs(Dataset):
    """A map-style data set of images and classes."""

    def __init__(self, n: int = 24) -> None:
        generator = torch.Generator().manual_seed(2)
        self.images = torch.randn(n, 3, 8, 8, generator=generator)
        self.classes = torch.randint(0, 3, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.classes[index])


@pytest.fixture
def network() -> torch.nn.Module:
    """A custom module."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(512, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3),
    )  # fmt: skip


def rows_of(batches: Batches) -> list[dict[str, Any]]:
    """Single samples without padding, as a tokenized data set has them."""
    found = []
    for batch in batches:
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            found.append({"input_ids": ids[: int(mask.sum())].tolist(), "labels": int(label)})
    return found


def energies(profile: layerlens.Profile) -> dict[str, float]:
    return {x.layer: x.by_method["lora"].energy for x in profile.statistics.layers if "lora" in x.by_method}


def test_the_same_batches_in_every_form_are_the_same_statistics(bert: torch.nn.Module, bert_batches: Batches):
    class Once:
        def __iter__(self) -> Iterator[Any]:
            yield from bert_batches

    expected = energies(layerlens.profile(bert, bert_batches))
    forms: dict[str, Any] = {
        "tuple": tuple(bert_batches),
        "generator": (batch for batch in bert_batches),
        "iterable": Once(),
        "loader": DataLoader(bert_batches, batch_size=None),
        "pairs": [({k: v for k, v in batch.items() if k != "labels"}, batch["labels"]) for batch in bert_batches],
        "other name": [{"label" if k == "labels" else k: v for k, v in batch.items()} for batch in bert_batches],
    }
    for name, form in forms.items():
        assert energies(layerlens.profile(bert, form)) == expected, name


def test_keys_that_the_model_does_not_take_are_left_out_and_named(bert: torch.nn.Module, bert_batches: Batches):
    plain = energies(layerlens.profile(bert, bert_batches))
    found = layerlens.profile(
        bert, [{**batch, "idx": torch.arange(4), "text": ["a", "b", "c", "d"]} for batch in bert_batches]
    )
    assert energies(found) == plain
    assert any("does not accept idx" in note for note in found.notes)


def test_a_generator_says_what_it_has_lost(bert: torch.nn.Module, bert_batches: Batches):
    stream = iter(bert_batches)
    found = layerlens.profile(bert, stream, calibration_samples=8)
    assert any("cannot be rewound: the 2 batches taken" in note for note in found.notes)
    assert len(list(stream)) == 4


def test_tokenized_rows_are_padded_as_a_trainer_does(bert: torch.nn.Module, bert_batches: Batches, minilm_path: str):
    """A `datasets.Dataset` without texts, with the tokenizer or a collator."""
    from datasets import Dataset as Rows
    from transformers import AutoTokenizer, DataCollatorWithPadding

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    rows = Rows.from_list(rows_of(bert_batches))
    padded = energies(layerlens.profile(bert, rows, tokenizer=tokenizer, batch_size=4, calibration_samples=24))
    by_hand = energies(
        layerlens.profile(bert, rows, collator=DataCollatorWithPadding(tokenizer), batch_size=4, calibration_samples=24)
    )
    assert padded == by_hand
    expected = energies(layerlens.profile(bert, bert_batches, calibration_samples=24))
    for layer, energy in expected.items():  # float32 sums over other batches: 24 samples, a few 2⁻²³ each
        assert padded[layer] == pytest.approx(energy, rel=1e-4)
    with pytest.raises(DataError, match="give tokenizer="):
        layerlens.profile(bert, rows)


def test_a_module_of_ones_own_with_a_map_style_data_set(network: torch.nn.Module):
    plan = layerlens.plan(network, Pairs(), max_trainable_params=400)
    assert {layer.partition(".")[0] for layer in plan.ranks} <= {"0", "2", "5", "7"}
    assert any("cross-entropy of each sample" in note for note in plan.notes)
    assert plan.manifest.model.name_or_path == "object:torch.nn.modules.container.Sequential"


def test_tensors_and_a_loss_of_ones_own(network: torch.nn.Module):
    data = Pairs()
    loader = DataLoader(TensorDataset(data.images, data.classes.float()), batch_size=6)

    def single(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output[:, 0] - target).square()

    by_samples = layerlens.profile(network, loader, loss=single, calibration_samples=24)
    by_batches = layerlens.profile(
        network, loader, loss=lambda output, target: single(output, target).mean(), calibration_samples=24
    )
    assert any("of each sample, by" in note for note in by_samples.notes)
    assert any("of whole batches, by" in note for note in by_batches.notes)
    for layer, energy in energies(by_samples).items():  # batches of one size: the means are the same
        assert energies(by_batches)[layer] == pytest.approx(energy, rel=1e-4)


def test_the_models_own_loss_is_taken_where_it_is_no_known_one(bert: torch.nn.Module, bert_batches: Batches):
    batches = [{**batch, "labels": torch.nn.functional.one_hot(batch["labels"], 3).float()} for batch in bert_batches]
    bert.config.problem_type = "multi_label_classification"
    several = layerlens.profile(bert, batches, statistics=["fisher"])
    assert any("of each sample, as for sequence-classification" in note for note in several.notes)
    bert.config.problem_type = "regression"  # squared error of numbers that may be classes
    found = layerlens.profile(bert, batches)
    assert any("the model's own, for whole batches" in note for note in found.notes)
    with pytest.raises(ConfigurationError, match="fisher need the loss of each sample"):
        layerlens.profile(bert, batches, statistics=["fisher"])


def test_statistics_of_single_samples_are_measured_where_the_loss_has_them(
    bert: torch.nn.Module, bert_batches: Batches
):
    found = layerlens.profile(bert, bert_batches, statistics=["fisher"])
    assert all(x.by_method["lora"].trace > 0 for x in found.statistics.layers if "lora" in x.by_method)


@pytest.mark.parametrize("wrap", ["DataParallel", "compiled", "distributed"])
def test_wrappers_are_looked_through(bert: torch.nn.Module, bert_batches: Batches, wrap: str, tmp_path: Any):
    expected = layerlens.plan(bert, bert_batches, max_trainable_params=600).choice.rows()
    if wrap == "distributed":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = {
            "DataParallel": torch.nn.DataParallel,
            "compiled": torch.compile,
            "distributed": torch.nn.parallel.DistributedDataParallel,
        }[wrap](bert)
        assert layerlens.plan(wrapped, bert_batches, max_trainable_params=600).choice.rows() == expected
    finally:
        if wrap == "distributed":
            torch.distributed.destroy_process_group()


def test_frozen_weights_and_a_base_made_ready_for_quantized_training(
    llama: torch.nn.Module, state_of: Callable[..., Any]
):
    """As peft.prepare_model_for_kbit_training leaves it: frozen, inputs that require gradients, checkpoints."""
    batches = [{"input_ids": torch.randint(1, 60, (4, 12)), "labels": torch.randint(1, 60, (4, 12))} for _ in range(4)]
    expected = layerlens.plan(llama, batches, max_trainable_params=800).choice.rows()
    llama.requires_grad_(False)
    llama.enable_input_require_grads()
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    llama.train()
    before = state_of(llama)
    assert layerlens.plan(llama, batches, max_trainable_params=800).choice.rows() == expected
    assert state_of(llama) == before


def test_heads_are_what_the_task_or_the_user_says(
    bert: torch.nn.Module, llama: torch.nn.Module, network: torch.nn.Module, bert_batches: Batches
):
    """A language model's own head is no task head, however it looks; any module is one if the user says so."""
    batches = [{"input_ids": torch.randint(1, 60, (4, 12)), "labels": torch.randint(1, 60, (4, 12))} for _ in range(4)]
    assert layerlens.plan(llama, batches, max_trainable_params=800).lora_config().modules_to_save is None
    own = layerlens.plan(network, Pairs(), max_trainable_params=400, new_head=["7"])
    assert own.lora_config().modules_to_save == ["7"]
    assert "7" not in own.ranks
    assert layerlens.plan(bert, bert_batches, max_trainable_params=800, new_head=False).notes
    with pytest.raises(ConfigurationError, match="no module 'head'"):
        layerlens.plan(network, Pairs(), max_trainable_params=400, new_head=["head"])


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["query"]))


def injected(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(target_modules=["query"]), model)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (adapted, ModelSpecError, "holds the PEFT adapters 'default' already"),
        (injected, ModelSpecError, "has adapters inside already"),
        (lambda model: model.to("meta"), ModelSpecError, "meta device"),
        (lambda model: "model", ConfigurationError, "give a file's path"),
        (lambda model: 7, ModelSpecError, "must be a torch.nn.Module.*got int"),
        (lambda model: torch.nn.Sequential(torch.nn.LayerNorm(8)), LayerLensError, "."),
    ],
    ids=["PEFT", "injected", "meta", "name", "number", "no layer"],
)
def test_models_that_cannot_be_planned_on(
    bert: torch.nn.Module, bert_batches: Batches, change: Callable[..., Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        layerlens.plan(change(bert), bert_batches, max_trainable_params=500)


def test_a_module_without_a_layer_that_can_be_adapted():
    model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    batches = [(torch.randn(4, 8), torch.randint(0, 8, (4,))) for _ in range(4)]
    with pytest.raises(ModelSpecError, match="no layer in Sequential that can take LoRA"):
        layerlens.plan(model, batches, max_trainable_params=500)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "this list has no samples"),
        (iter([]), "the iterator is exhausted"),
        ({}, "this dict has no samples"),
        (12, "must be a DataLoader"),
        ([["a", "b"]], "2 texts without names; give rows by columns"),
        ([{"input_ids": [7] * n, "labels": 0} for n in (3, 4)], "^data: the samples are already tokens, of different"),
        ({"a": [1, 2], "b": [1]}, "different lengths"),
    ],
    ids=["empty list", "exhausted", "empty mapping", "number", "texts", "ragged tokens", "ragged columns"],
)
def test_data_that_cannot_be_measured(bert: torch.nn.Module, data: Any, message: str):
    with pytest.raises(DataError, match=message):
        layerlens.plan(bert, data, max_trainable_params=500)


def test_data_sets_with_splits_are_to_be_named(bert: torch.nn.Module):
    from datasets import Dataset as Rows
    from datasets import DatasetDict

    splits = DatasetDict(train=Rows.from_list([{"text": "a", "label": 0}]))
    with pytest.raises(DataError, match="the splits train; give one of them"):
        layerlens.plan(bert, splits, max_trainable_params=500)


def test_rows_without_a_tokenizer_and_batches_without_a_loss(bert: torch.nn.Module, network: torch.nn.Module):
    rows = [{"text": f"text {n}", "label": n % 3} for n in range(30)]
    with pytest.raises(DataError, match="tokenizer: is needed"):
        layerlens.plan(bert, rows, max_trainable_params=500)
    with pytest.raises(ConfigurationError, match="task: cannot be inferred from the class Sequential"):
        layerlens.plan(network, rows, max_trainable_params=500)
    with pytest.raises(DataError, match="there is no loss"):
        layerlens.plan(network, [torch.randn(4, 3, 8, 8) for _ in range(3)], max_trainable_params=500)


def test_losses_that_cannot_be_measured(bert: torch.nn.Module, bert_batches: Batches):
    def detached(output: Any, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output.logits.detach(), labels, reduction="none")

    def failing(output: Any, labels: torch.Tensor) -> torch.Tensor:
        raise ValueError("not today")

    for loss, error, message in (
        (detached, ProfilingError, "has no gradient"),
        (failing, DataError, "failing fails on the first batch: ValueError: not today"),
        (lambda output, labels: output.logits, DataError, r"must return the loss of each sample, a tensor \[4\]"),
    ):
        with pytest.raises(error, match=message):
            layerlens.plan(bert, bert_batches, loss=loss, max_trainable_params=500)


def test_what_is_measured_by_samples_is_refused_by_name_for_a_loss_of_batches(
    bert: torch.nn.Module, bert_batches: Batches
):
    def mean(output: Any, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output.logits, labels)

    for settings, message in (
        (
            {"lora_initialization": "gradient_svd"},
            "lora_initialization: 'gradient_svd' needs a loss of each",
        ),
        ({"proxies": {"options": 4}}, "proxies: needs samples.*the data came as batches"),
        ({"proxy_check": {"steps": 2}}, "proxy_check: needs samples.*the data came as batches"),
        ({"utility_model": "signal"}, "fisher need the loss of each sample"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            layerlens.plan(bert, bert_batches, loss=mean, max_trainable_params=500, **settings)
    assert layerlens.plan(bert, bert_batches, lora_initialization="gradient_svd", max_trainable_params=500).factors


def test_why_the_models_own_loss_cannot_be_taken_is_said(bert: torch.nn.Module, bert_batches: Batches):
    batches = [{**batch, "labels": torch.randn(5, 7)} for batch in bert_batches]
    with pytest.raises(DataError, match=r"there is no loss.*its own fails: \w+Error"):
        layerlens.plan(bert, batches, max_trainable_params=500)


def test_classes_are_matched_by_name_or_refused_with_both_lists(bert: torch.nn.Module, minilm_path: str):
    from transformers import AutoTokenizer

    bert.resize_token_embeddings(30522)
    bert.config.id2label = {0: "Positive", 1: "Neutral", 2: "Negative"}
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)

    def facts(names: list[Any]) -> Any:
        rows = [{"text": f"text number {n}", "label": names[n % len(names)]} for n in range(30)]
        return layerlens.profile(bert, rows, tokenizer=tokenizer, calibration_samples=12, max_length=16)

    by_name = facts(["positive", "neutral", "negative"])
    assert by_name.model.labels == ("Positive", "Neutral", "Negative")
    assert energies(facts([0, 1, 2])) == energies(by_name)
    some = facts(["negative", "positive"])  # a class that is missing from the sample keeps its output
    assert some.model.labels == ("Positive", "Neutral", "Negative")
    with pytest.raises(DataError, match=r"classes \(bad, good\).*of the model \(Positive, Neutral, Negative\)"):
        facts(["good", "bad"])


def test_numbers_of_numpy_and_frames(bert: torch.nn.Module, minilm_path: str):
    import pandas
    import polars
    import pyarrow
    from transformers import AutoTokenizer

    bert.resize_token_embeddings(30522)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    rows = {"text": [f"text number {n}" for n in range(30)], "label": list(np.arange(30) % 3)}
    settings = {"tokenizer": tokenizer, "calibration_samples": 12, "max_length": 16}
    of_frame = energies(layerlens.profile(bert, pandas.DataFrame(rows), **settings))
    texts, targets = rows["text"], rows["label"]
    pairs = list(zip(texts, targets, strict=True))
    table = pyarrow.table({"text": texts, "label": np.array(targets)})
    series = pandas.DataFrame(rows)
    forms = (
        rows, polars.DataFrame(rows), polars.LazyFrame(rows), table, pairs, [list(pair) for pair in pairs],
        (texts, targets),
        (np.array(texts), np.array(targets)), (series["text"], series["label"]), Texts(pairs),
    )  # fmt: skip
    for data in forms:
        assert energies(layerlens.profile(bert, data, **settings)) == of_frame, type(data)


class Texts(Dataset):
    """A map-style data set of texts and classes."""

    def __init__(self, pairs: list[tuple[str, int]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.pairs[index]


def test_tokens_of_one_length_need_no_tokenizer(llama: torch.nn.Module):
    rows = [{"input_ids": [5 + (7 * row + place) % 40 for place in range(6)]} for row in range(8)]
    labelled = [row | {"labels": row["input_ids"]} for row in rows]
    found = layerlens.plan(llama, rows, max_trainable_params="2k")
    assert found.ranks == layerlens.plan(llama, labelled, max_trainable_params="2k").ranks
    tensors = [{name: torch.tensor([value]) for name, value in row.items()} for row in labelled]
    assert energies(layerlens.profile(llama, rows)) == pytest.approx(energies(layerlens.profile(llama, tensors)))


def test_a_classifier_without_a_padding_token_is_measured_with_the_tokenizers(minilm_path: str):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=30522, num_labels=3, pad_token_id=None, **sizes))
    rows = [{"text": f"text number {'one ' * (n % 4)}", "label": n % 3} for n in range(30)]
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    plan = layerlens.plan(model, rows, tokenizer=tokenizer, max_trainable_params="1k", calibration_samples=12)
    assert any("no pad_token_id" in line and "model.config.pad_token_id = 0" in line for line in plan.notes)
    assert model.config.pad_token_id is None
