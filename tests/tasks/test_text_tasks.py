"""What each text task makes of its samples: tokens, targets, padding, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from layerlens.config import DataConfig
from layerlens.data import Dataset, load_dataset
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks import IGNORED, TASKS, Batch, make_batches
from layerlens.tasks.losses import logits_of, span_loss

CONFIG = DataConfig(source="unused", max_length=24)


@pytest.fixture(scope="module")
def tokenizer(minilm_path: str) -> Any:
    return hf.AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="module")
def loaded(tokenizer: Any) -> PretrainedModel:
    """A tokenizer, and a model that only says how a decoder's inputs are made."""
    config = hf.T5Config(
        vocab_size=30522, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return PretrainedModel(hf.T5ForConditionalGeneration(config), tokenizer, "tiny", ())


def rows(tmp_path: Path, made: list[dict[str, Any]], task: str, **options: str) -> Dataset:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return load_dataset(DataConfig(source=str(path), **options), None, task)


def single(task: str, loaded: PretrainedModel, dataset: Dataset, config: DataConfig = CONFIG, **options: Any) -> Batch:
    (batch,) = make_batches(TASKS[task], loaded, dataset, config, batch_size=99, **options)
    return batch


def test_tags_go_to_the_first_token_of_their_word(tmp_path, loaded, tokenizer):
    made = [
        {"tokens": ["Aspergillosis", "in", "Reykjavik"], "ner_tags": ["O", "O", "LOC"]},
        {"tokens": ["yes"], "ner_tags": ["O"]},
    ]
    dataset = rows(tmp_path, made, "token-classification")
    assert dataset.label_names == ("LOC", "O")
    batch = single("token-classification", loaded, dataset)
    for row, sample in enumerate(batch.index.tolist()):
        pieces = [tokenizer.tokenize(word) for word in made[sample]["tokens"]]
        assert sample == 1 or max(map(len, pieces)) > 1  # some word has several tokens
        expected = [IGNORED]
        for word, tag in zip(pieces, made[sample]["ner_tags"], strict=True):
            expected += [dataset.label_names.index(tag), *[IGNORED] * (len(word) - 1)]
        padding = batch.labels.shape[1] - len(expected)
        assert batch.labels[row].tolist() == expected + [IGNORED] * padding
    reordered = dataset.with_label_order(("O", "LOC"))
    assert reordered.labels == ((0, 0, 1), (0,))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "sample 1 has 2 words and 1 tags"),
        ({"tokens": "a b", "tags": ["O"]}, "sample 1 has no list of words in column 'tokens', got 'a b'"),
        ({"tokens": ["a"], "tags": [None]}, "sample 1 has no list of tags"),
        ({"tokens": [], "tags": []}, "sample 1 has no list of words"),
    ],
)
def test_words_without_their_tags_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        rows(tmp_path, [row], "token-classification")


def test_masking_depends_on_the_seed_and_the_sample_alone(tmp_path, loaded, tokenizer):
    made = [{"text": f"sample number {n} tells of many small and great things {n}"} for n in range(40)]
    dataset = rows(tmp_path, made, "masked-lm")
    together = single("masked-lm", loaded, dataset)
    alone = single("masked-lm", loaded, dataset.select([7]))
    row = together.index.tolist().index(7)
    assert torch.equal(
        together.inputs["input_ids"][row][: alone.inputs["input_ids"].shape[1]], alone.inputs["input_ids"][0]
    )
    assert not torch.equal(together.labels, single("masked-lm", loaded, dataset, seed=1).labels)
    chosen = together.labels != IGNORED
    plain = single("causal-lm", loaded, dataset).inputs["input_ids"]
    assert torch.equal(together.labels[chosen], plain[chosen])
    assert torch.equal(together.inputs["input_ids"][~chosen], plain[~chosen])
    special = torch.isin(plain, torch.tensor(tokenizer.all_special_ids))
    assert not (chosen & special).any()
    # Of each sample round(0.15 n) of its n tokens, at least one: exactly so, it is no coin for each token.
    count = (~special).sum(dim=1)
    assert torch.equal(chosen.sum(dim=1), (0.15 * count).round().clamp(min=1).long())
    masked = float((together.inputs["input_ids"][chosen] == tokenizer.mask_token_id).float().mean())
    assert 0.6 < masked < 0.95  # 80 % of 80 tokens or more: a standard error of at most 0.045


def test_a_tokenizer_without_a_mask_is_refused(tmp_path, loaded, tokenizer):
    dataset = rows(tmp_path, [{"text": "a"}, {"text": "b"}], "masked-lm")
    without = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    with pytest.raises(ConfigurationError, match="needs a tokenizer with a mask token"):
        single("masked-lm", PretrainedModel(loaded.model, without, "x", ()), dataset)


def test_targets_are_shifted_into_the_decoder_whose_width_is_its_own(tmp_path, loaded, tokenizer):
    made = [{"document": "one two three", "summary": "one two three"}, {"document": "one", "summary": "a b"}]
    dataset = rows(tmp_path, made, "seq2seq")
    batch = single("seq2seq", loaded, dataset)
    assert batch.inputs["input_ids"].shape[1] != batch.labels.shape[1]  # both would be 5 tokens wide
    for row, sample in enumerate(batch.index.tolist()):
        target = tokenizer(text_target=made[sample]["summary"])["input_ids"]
        n = len(target)
        assert batch.labels[row].tolist() == target + [IGNORED] * (batch.labels.shape[1] - n)
        assert batch.inputs["decoder_input_ids"][row, :n].tolist() == [0, *target[:-1]]
        assert batch.inputs["decoder_attention_mask"][row].sum() == n
    short = single("seq2seq", loaded, dataset, DataConfig(source="unused", max_target_length=3, source_prefix="sum: "))
    assert (short.labels != IGNORED).sum(dim=1).max() == 3
    assert tokenizer.decode(short.inputs["input_ids"][0]).startswith("[CLS] sum : one")


def test_columns_inside_of_mappings_have_dotted_names(tmp_path):
    made = [{"translation": {"en": f"word {n}", "de": f"Wort {n}"}} for n in range(3)]
    options = {"text_column": "translation.en", "label_column": "translation.de"}
    dataset = rows(tmp_path, made, "seq2seq", **options)
    assert dataset.texts[1] == "word 1"
    assert dataset.labels[1] == "Wort 1"
    with pytest.raises(DataError, match=r"no column 'translation.fr'; it has translation, translation.en"):
        rows(tmp_path, made, "seq2seq", text_column="translation.fr", label_column="translation.de")


CONTEXT = "A river runs through the old town. " * 6 + "The bridge was built by Anna Berg in 1911, it is said."


@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_are_found_again_in_the_tokens(tmp_path, loaded, side):
    answers = ["Anna Berg", "1911", ""]
    made = [
        {
            "question": f"Who or when {n}?",
            "context": CONTEXT if n != 2 else "Short.",
            "answers": {"text": [a] if a else [], "answer_start": [CONTEXT.index(a)] if a else []},
        }
        for n, a in enumerate(answers)
    ]
    dataset = rows(tmp_path, made, "question-answering")
    tokenizer = hf.AutoTokenizer.from_pretrained(loaded.tokenizer.name_or_path, padding_side=side)
    batch = single("question-answering", PretrainedModel(loaded.model, tokenizer, "tiny", ()), dataset)
    for row, sample in enumerate(batch.index.tolist()):
        start, end = batch.labels[row].tolist()
        ids = batch.inputs["input_ids"][row]
        found = tokenizer.decode(ids[start : end + 1])
        assert found == (answers[sample].lower() or "[CLS]")
    assert batch.inputs["input_ids"].shape[1] == CONFIG.max_length  # the context was cut
    logits = torch.randn(3, CONFIG.max_length, 2)
    output = hf.modeling_outputs.QuestionAnsweringModelOutput(start_logits=logits[..., 0], end_logits=logits[..., 1])
    assert torch.equal(logits_of(output), logits)
    padded = logits.masked_fill(batch.mask[..., None] == 0, -1e9)  # exp(-1e9) is 0
    own = torch.stack(
        [torch.nn.functional.cross_entropy(padded[:, :, k], batch.labels[:, k], reduction="none") for k in (0, 1)]
    )
    assert torch.allclose(span_loss(output, batch), own.mean(dim=0))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["town"], "answer_start": [0]}, "the context has 'A ri' at character 0, not the answer 'town'"),
        ({"text": ["town"]}, "sample 1 has no answers"),
        ("town", "sample 1 has no answers"),
    ],
)
def test_answers_that_are_not_in_their_context_are_refused(tmp_path, answers, message):
    with pytest.raises(DataError, match=message):
        rows(tmp_path, [{"question": "q", "context": CONTEXT, "answers": answers}], "question-answering")


def test_answers_longer_than_a_window_are_refused(tmp_path, loaded):
    made = [{"question": "q", "context": CONTEXT, "answers": {"text": [CONTEXT], "answer_start": [0]}}]
    with pytest.raises(DataError, match="of sample 1 is longer than half"):
        single("question-answering", loaded, rows(tmp_path, made, "question-answering"))
    made[0] |= {"question": "long " * 40}
    with pytest.raises(DataError, match="question leaves no room"):
        single("question-answering", loaded, rows(tmp_path, made, "question-answering"))


def test_hub_features_become_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B"])),
        }
    )
    table = datasets.Dataset.from_dict({"tokens": [["a", "b"], ["c"]], "ner_tags": [[0, 1], [1]]}, features=features)
    table.save_to_disk(tmp_path / "saved")
    dataset = load_dataset(DataConfig(source="saved"), tmp_path, "token-classification")
    assert dataset.columns["words"] == (("a", "b"), ("c",))
    assert dataset.label_names == ("B", "O")
    assert dataset.labels == ((1, 0), (0,))
