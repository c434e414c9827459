"""Calibration by proxies: monotone, exact where theory is right up to scale, and honest about what it does not know."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from layerlens.models import Option, ProxyGain, ProxyStudy, UtilityTable
from layerlens.utility.calibration import calibrate, monotone_fit, prediction, read_curve

floats = st.floats(-1.0, 1.0).map(lambda x: round(x, 6))


def table_and_study(gains, *, errors=0.01, method=lambda n: "lora", extra=4):
    count = len(gains)
    options = [Option(f"layer{n}", method(n), 1 + n % 3) for n in range(count + extra)]
    none = [Option(f"layer{n}", "none", 0) for n in range(count + extra)]
    utility = np.concatenate([np.arange(1.0, count + extra + 1), np.zeros(count + extra)])
    measured = tuple(ProxyGain(options[n], float(gain), errors) for n, gain in enumerate(gains))
    study = ProxyStudy(measured, count, steps=5, learning_rate=1e-3, held_out_samples=50, base_loss=1.0)
    return UtilityTable((*options, *none), utility, "signal", "relative gain"), study


def test_a_theory_that_is_right_up_to_scale_is_only_scaled():
    table, study = table_and_study([0.1 * n for n in range(1, 7)])
    found = calibrate(table, study)
    # Gains are a tenth of the utilities, on the measured options, on those beyond them (same slope), and on "none".
    np.testing.assert_allclose(found.utility, 0.1 * table.utility, rtol=1e-12)
    calibration = found.calibration
    assert calibration is not None
    assert calibration.overall.spearman == pytest.approx(1.0)
    assert calibration.overall.interval == (pytest.approx(1.0), pytest.approx(1.0))
    assert "5 steps" in found.unit


def test_a_theory_that_is_wrong_gives_one_gain_to_all():
    table, study = table_and_study([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    found = calibrate(table, study)
    calibration = found.calibration
    assert calibration is not None
    assert calibration.overall.spearman == pytest.approx(-1.0)
    assert np.ptp(calibration.fitted[1:]) <= 0.35 * 6  # one pool: a line from the origin through its mean
    assert calibration.curves["lora"] == ((0.0, 0.0), (pytest.approx(3.5), pytest.approx(0.35)))


def test_methods_have_curves_of_their_own_and_few_proxies_take_the_common_one():
    table, study = table_and_study(
        [1.0, 0.02, 2.0, 0.04, 3.0, 0.06, 4.0], method=lambda n: "adapter" if n == 6 else ("lora", "prefix")[n % 2]
    )
    calibration = calibrate(table, study).calibration
    assert calibration is not None
    assert calibration.curves["lora"][-1][1] == pytest.approx(3.0)
    assert calibration.curves["prefix"][-1][1] == pytest.approx(0.06)
    assert calibration.by_method["adapter"].n_options == 1
    assert calibration.by_method["adapter"].spearman is None


@given(st.lists(st.tuples(floats.map(abs), floats), min_size=4, max_size=12), st.lists(floats.map(abs), min_size=2))
def test_curves_never_fall_and_are_never_negative(points, read_at):
    utility, gain = np.array(points).T
    knots = monotone_fit(utility, gain, np.ones(len(gain)))
    at = np.sort(np.array(read_at) * 2.0)
    values = read_curve(knots, at)
    assert (values >= 0.0).all()
    assert (np.diff(values) >= -1e-12).all()


def test_nothing_is_lost_by_pooling():
    """Isotonic regression keeps the weighted mean where nothing is clipped at 0."""
    rng = np.random.default_rng(0)
    utility, weight = np.arange(1.0, 21.0), rng.uniform(0.5, 2.0, 20)
    gain = 1.0 + 0.1 * utility + rng.standard_normal(20)
    values, knots = [], dict(monotone_fit(utility, gain, weight))
    assert min(knots.values()) >= 0.0
    from scipy.optimize import isotonic_regression

    values = isotonic_regression(gain, weights=weight).x
    assert np.average(values, weights=weight) == pytest.approx(np.average(gain, weights=weight))


def test_spearman_and_its_interval():
    rng = np.random.default_rng(1)
    one = rng.standard_normal(30)
    other = one + rng.standard_normal(30)
    found = prediction(one, other, np.random.default_rng(0))
    assert found.spearman == pytest.approx(spearmanr(one, other).statistic)
    assert found.interval is not None
    assert found.interval[0] < found.spearman < found.interval[1]
    # Fisher's z has standard error 1/√(n − 3) ≈ 0.19, so 95 % is about ±0.38 in z; half to twice that is plausible.
    width = np.arctanh(found.interval[1]) - np.arctanh(found.interval[0])
    assert 0.38 < width < 1.5
    assert prediction(one[:3], other[:3], rng).interval is None
    assert prediction(np.ones(5), one[:5], rng).spearman is None


def test_the_interval_of_a_noisy_study_is_wider():
    rng = np.random.default_rng(2)
    truth = 0.1 * np.arange(1.0, 13.0)
    spreads = []
    for noise in (0.01, 0.3):
        table, study = table_and_study(truth + noise * rng.standard_normal(12), errors=noise)
        calibration = calibrate(table, study).calibration
        assert calibration is not None
        spreads.append(calibration.replicates__bo[:, :12].sum(axis=1).std())
    assert spreads[1] > 5 * spreads[0]
