"""The weighted, normalised combination of metrics: the twin's bits, and every wrong value refused by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from layerlens.kernels import aggregate_scores, reference

METRICS = {"energy": [0.5, 2.0, 1.0], "fisher": [3.0, 0.0, 1.5]}
WEIGHTS = {"energy": 1.0, "fisher": 3.0}


def test_scores_by_hand() -> None:
    np.testing.assert_allclose(aggregate_scores(METRICS, WEIGHTS), [0.0625 + 0.75, 0.25, 0.125 + 0.375], rtol=1e-15)


def test_a_metric_of_zeros_and_one_without_weight_count_nothing() -> None:
    metrics = {**METRICS, "proxy": [0.0, 0.0, 0.0], "noise": [math.nan] * 3}
    scores = aggregate_scores(metrics, {"energy": 1.0, "proxy": 1.0, "noise": 0.0})
    assert scores.tolist() == [0.125, 0.5, 0.25]


@pytest.mark.parametrize(
    ("metrics", "weights", "message"),
    [
        ({**METRICS, "fisher": [3.0, math.nan, 1.0]}, WEIGHTS, "fisher of encoder.1 is nan"),
        ({**METRICS, "energy": [1.0, 1.0, -math.inf]}, WEIGHTS, "energy of encoder.2 is -inf"),
        (
            {**METRICS, "fisher": [3.0]},
            WEIGHTS,
            r"metric fisher must have one value for each of 3 layers, got shape \(1,\)",
        ),
        (METRICS, {"energy": math.inf}, "the weight of energy must be finite and not negative, got inf"),
        (METRICS, {"energy": -1.0}, "the weight of energy must be finite and not negative, got -1.0"),
        (METRICS, {"energy": 1.0, "loss": 1.0}, "weights names 'loss', which is no metric; there are: energy, fisher"),
        (METRICS, {"energy": 0.0}, "no metric has a positive weight"),
    ],
)
def test_wrong_values_are_refused_by_name(metrics: dict, weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate_scores(metrics, weights, layers=[f"encoder.{i}" for i in range(3)])


def test_without_layer_names_the_index_is_named_and_no_layers_give_no_scores() -> None:
    with pytest.raises(ValueError, match="energy of layer 0 is inf"):
        aggregate_scores({"energy": [math.inf]}, {"energy": 1.0})
    assert aggregate_scores({"energy": []}, {"energy": 1.0}).shape == (0,)


@given(
    hnp.arrays(np.float64, (3, 7), elements=st.floats(-1e6, 1e6)),
    st.lists(st.floats(0.0, 10.0), min_size=3, max_size=3).filter(any),
)
def test_the_same_bits_as_the_twin(values: np.ndarray, weights: list[float]) -> None:
    metrics = dict(zip("abc", values, strict=True))
    named = dict(zip("abc", weights, strict=True))
    assert aggregate_scores(metrics, named).tobytes() == reference.aggregate_scores(metrics, named).tobytes()
