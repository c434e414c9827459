"""The classes of the data as the outputs of a model: what is matched, and what is an error that shows both lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as hf

from layerlens.config import DataConfig
from layerlens.data import Dataset, load_dataset
from layerlens.data.labels import by_hand, in_order_of, outputs_of
from layerlens.exceptions import DataError
from layerlens.sources import load_pretrained

GRADES = ["negative", "neutral", "positive"]


@pytest.mark.parametrize(
    ("classes", "names", "expected"),
    [
        (["neg", "pos"], GRADES, [0, 2]),
        (["POSITIVE", "Negative"], GRADES, [2, 0]),
        (["not entailment"], ["entailment", "not_entailment"], [1]),
        (["0", "2"], GRADES, [0, 2]),
        (["LABEL_0", "LABEL_2"], GRADES, [0, 2]),
        (["B-PERSON", "O"], ["O", "B-PER", "I-PER"], [1, 0]),
        (["1", "5"], ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], [0, 4]),
        (["6"], ["1 star", "2 stars"], None),
        (["ham", "spam"], ["LABEL_0", "LABEL_1"], [0, 1]),
        (["ham", "spam"], ["LABEL_0", "LABEL_1", "LABEL_2"], None),
        (["neg", "spam"], GRADES, None),
        (["neg", "negative"], GRADES, None),  # two classes of the data cannot be one of the model
        (["a", "A"], ["A", "a"], [1, 0]),
        (["-1", "1"], GRADES, None),
        (["3"], GRADES, None),
    ],
)
def test_classes_are_matched_with_outputs(classes: list[str], names: list[str], expected: list[int] | None):
    assert outputs_of(classes, names) == expected


def dataset(names: tuple[str, ...], labels: tuple[int, ...]) -> Dataset:
    return Dataset({"text": tuple(f"t{n}" for n in range(len(labels)))}, labels, names)


def test_samples_get_the_numbers_of_their_outputs():
    ordered = in_order_of(dataset(("neg", "pos"), (0, 1, 1)), GRADES, advice="rename them")
    assert ordered.label_names == tuple(GRADES)
    assert ordered.labels == (0, 2, 2)
    with pytest.raises(
        DataError, match=r"classes \(ham, spam\) cannot be .* of the model \(negative, .*\); rename them"
    ):
        in_order_of(dataset(("ham", "spam"), (0, 1)), GRADES, advice="rename them")


def test_classes_are_named_by_hand():
    numbered = dataset(("0", "2"), (0, 1, 1))
    assert by_hand(numbered, GRADES).labels == (0, 2, 2)
    words = by_hand(dataset(("ham", "spam"), (0, 1)), {"ham": "neutral", "spam": "negative"})
    assert in_order_of(words, GRADES, advice="").labels == (1, 0)
    merged = by_hand(dataset(("a", "b", "c"), (0, 1, 2)), {"a": "x", "c": "x"})
    assert merged.label_names == ("x", "b")
    assert merged.labels == (0, 1, 0)
    with pytest.raises(DataError, match="none of the labels hma; it has ham, spam"):
        by_hand(dataset(("ham", "spam"), (0, 1)), {"hma": "neutral"})
    with pytest.raises(DataError, match=r"\(ham, spam\) cannot be matched with the 2 of data\.label_names \(a, b\)"):
        by_hand(dataset(("ham", "spam"), (0, 1)), ["a", "b"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, minilm_path: str) -> str:
    """A classifier with three trained and named outputs."""
    config = hf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30522,
        id2label=dict(enumerate(GRADES)), label2id={name: index for index, name in enumerate(GRADES)},
    )  # fmt: skip
    place = tmp_path_factory.mktemp("trained")
    hf.BertForSequenceClassification(config).save_pretrained(place)
    hf.AutoTokenizer.from_pretrained(minilm_path).save_pretrained(place)
    return str(place)


def test_a_trained_head_is_kept_where_the_sample_lacks_a_class(trained: str):
    kept = load_pretrained(trained, "sequence-classification", ["neg", "pos"], new_head=False)
    assert kept.labels == tuple(GRADES)
    assert kept.new_parameters == ()
    with pytest.raises(DataError, match=r"\(ham, spam\) cannot be matched with the 3 of the trained head .*new_head"):
        load_pretrained(trained, "sequence-classification", ["ham", "spam"], new_head=False)
    anew = load_pretrained(trained, "sequence-classification", ["ham", "spam"], new_head=True)
    assert anew.labels == ("ham", "spam")
    assert anew.new_parameters == ("classifier.bias", "classifier.weight")


def test_names_by_hand_are_part_of_reading(tmp_path: Path):
    (tmp_path / "d.csv").write_text("text,label\na,0\nb,2\nc,2\n")
    read = load_dataset(DataConfig(source="d.csv", label_names=GRADES), tmp_path)
    assert read.label_names == tuple(GRADES)
    assert read.labels == (0, 2, 2)
    assert read.reading is not None
    assert any("no sample has: neutral" in note for note in read.reading.notes)
