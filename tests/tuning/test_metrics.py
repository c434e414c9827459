"""Metrics against scikit-learn's, and answers as SQuAD scores them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from layerlens.tasks.metrics import classification_metrics
from layerlens.tasks.question_answering import answer_scores
from layerlens.tasks.regression import regression_metrics
from layerlens.tasks.token_classification import entity_metrics, marks_entities


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
def test_classification_is_that_of_scikit_learn(pairs: list[tuple[int, int]]):
    predicted, actual = np.array(pairs).T
    found = classification_metrics(predicted, actual)
    assert found["accuracy"] == pytest.approx(accuracy_score(actual, predicted))
    assert found["f1_macro"] == pytest.approx(f1_score(actual, predicted, average="macro"))
    assert found["mcc"] == pytest.approx(matthews_corrcoef(actual, predicted), abs=1e-12)


def test_two_classes_have_the_f1_of_the_second():
    predicted, actual = np.array([1, 1, 0, 0]), np.array([1, 0, 0, 1])
    assert classification_metrics(predicted, actual)["f1"] == f1_score(actual, predicted)


def test_regression():
    found = regression_metrics(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 9.0]))
    assert found["spearman"] == pytest.approx(1.0)
    assert found["mse"] == pytest.approx(26 / 3)
    assert regression_metrics(np.ones(3), np.arange(3.0))["pearson"] == 0.0


def test_answers():
    assert answer_scores("The Eiffel Tower!", "eiffel tower") == (1.0, 1.0)
    assert answer_scores("in Paris", "Paris") == (0.0, pytest.approx(2 / 3))
    assert answer_scores("", "") == (1.0, 1.0)


def test_entities_are_right_as_a_whole():
    """Of four true entities one is found, one has another type, one is cut short, one is missing."""
    actual = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O", "B-LOC", "I-LOC"]]
    said = [["B-PER", "I-PER", "O", "O"], ["B-LOC", "O", "B-LOC", "O"]]
    found = entity_metrics(said, actual)
    assert found["entity_precision"] == pytest.approx(1 / 3)
    assert found["entity_recall"] == pytest.approx(1 / 4)
    assert found["entity_f1"] == pytest.approx(2 / 7)
    assert entity_metrics([["O", "O"]], [["O", "O"]]) == {"entity_f1": 0, "entity_precision": 0, "entity_recall": 0}


def test_last_and_single_words_have_two_names():
    bilou, iobes = ["B-X", "I-X", "L-X", "U-Y", "U-Y"], ["B-X", "I-X", "E-X", "S-Y", "S-Y"]
    assert entity_metrics([bilou], [iobes])["entity_f1"] == 1.0
    assert entity_metrics([bilou], [["B-X", "I-X", "E-X", "B-Y", "I-Y"]])["entity_f1"] == pytest.approx(2 * 1 / (3 + 2))


@pytest.mark.parametrize(
    ("labels", "entities"),
    [
        (["O", "B-PER", "I-PER"], True),
        (["B-PER", "I-PER"], True),
        (["O", "I-PER"], False),  # words alone: nothing says where an entity begins
        (["NOUN", "VERB", "O"], False),
        (["O"], False),
        (["0", "1"], False),
    ],
)
def test_tags_that_mark_entities(labels: list[str], entities: bool):
    assert marks_entities(labels) is entities
