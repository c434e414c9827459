"""From theoretical utilities to predicted loss drops: a monotone curve for each method through measured gains.

The theory ranks options; a few of them were really trained (``ProxyStudy``). For each method, isotonic regression
(Barlow et al. 1972) of the measured gain on the theoretical utility keeps the theory's order and takes the scale from
the measurements. Resampling the measurements gives the uncertainty (Efron 1979).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerlens.models import Calibration, Option, Prediction, ProxyStudy, UtilityTable

REPLICATES = 200
"""Resampled fits; the ends of a 95 % interval then rest on five replicates each."""

SPEARMAN_REPLICATES = 2000
MIN_OPTIONS = 3
"""A method with fewer proxies takes the curve of all methods together."""

Knots = tuple[tuple[float, float], ...]


def calibrated_unit(steps: int) -> str:
    """What calibrated utilities are measured in."""
    return f"predicted loss drop after {steps} steps, per sample"


def calibrate(table: UtilityTable, study: ProxyStudy, *, seed: int = 0) -> UtilityTable:
    """``table`` with every utility replaced by the loss drop that the proxies predict for it; "none" keeps 0.

    Args:
        table: theoretical utilities; they include those of the study's options.
        study: at least one measured gain.
        seed: of the resampling.
    """
    position = {option: index for index, option in enumerate(table.options)}
    utilities = np.array([table.utility[position[one.option]] for one in study.gains])
    gains = np.array([one.gain for one in study.gains])
    weights = _weights(np.array([one.standard_error for one in study.gains]))
    methods = np.array([one.option.method for one in study.gains])
    rng = np.random.default_rng(seed)

    def fits(chosen: np.ndarray) -> dict[str, Knots]:
        """The curve of every method of the table from the chosen proxies."""
        together = monotone_fit(utilities[chosen], gains[chosen], weights[chosen])
        curves = {}
        for method in dict.fromkeys(option.method for option in table.options if option.rank):
            own = chosen[methods[chosen] == method]
            few = len(own) < MIN_OPTIONS
            curves[method] = together if few else monotone_fit(utilities[own], gains[own], weights[own])
        return curves

    everything = np.arange(len(gains))
    curves = fits(everything)
    fitted = _predict(curves, [one.option for one in study.gains], utilities)
    left_out = [
        gains[index] - _predict(fits(np.delete(everything, index)), [study.gains[index].option], utilities[[index]])[0]
        for index in everything
        if len(everything) > 1
    ]
    replicates = [
        _predict(fits(np.sort(rng.integers(len(gains), size=len(gains)))), table.options, table.utility)
        for _ in range(REPLICATES)
    ]
    calibration = Calibration(
        study=study,
        theoretical=tuple(map(float, utilities)),
        fitted=tuple(map(float, fitted)),
        overall=prediction(utilities, gains, rng),
        by_method={
            method: prediction(utilities[methods == method], gains[methods == method], rng)
            for method in dict.fromkeys(map(str, methods))
        },
        curves=curves,
        leave_one_out_rmse=float(np.sqrt(np.mean(np.square(left_out)))) if left_out else float(abs(gains[0])),
        replicates__bo=np.array(replicates),
    )
    utility = _predict(curves, table.options, table.utility)
    return UtilityTable(table.options, utility, table.model, calibrated_unit(study.steps), calibration)


def monotone_fit(utility: np.ndarray, gain: np.ndarray, weight: np.ndarray) -> Knots:
    """Knots of the non-decreasing, non-negative curve nearest to the points in weighted squares, from (0, 0) on.

    Pool-adjacent-violators gives steps; each pool becomes one knot at its mean utility, so that the curve still tells
    utilities within a pool apart. Where some utility is 0, the curve may begin above 0 there.

    >>> monotone_fit(np.array([1.0, 2.0, 3.0]), np.array([0.2, 0.1, 0.5]), np.ones(3))
    ((0.0, 0.0), (1.5, 0.15000000000000002), (3.0, 0.5))
    """
    values, inverse = np.unique(utility, return_inverse=True)  # equal utilities are one point
    total = np.bincount(inverse, weight)
    means = np.bincount(inverse, weight * gain) / total
    from scipy.optimize import isotonic_regression  # slow to import, and few runs calibrate

    found = isotonic_regression(means, weights=total)
    knots = [] if values[0] <= 0.0 else [(0.0, 0.0)]
    for start, end in zip(found.blocks[:-1], found.blocks[1:], strict=True):
        at = float(np.average(values[start:end], weights=total[start:end]))
        knots.append((at, max(0.0, float(found.x[start]))))
    return tuple(knots)


def read_curve(knots: Knots, utility: np.ndarray) -> np.ndarray:
    """The curve at each utility: linear between knots; beyond the last one it goes on as between the last two."""
    at, value = np.array(knots).T
    inside = np.interp(utility, at, value)
    slope = (value[-1] - value[-2]) / (at[-1] - at[-2]) if len(at) > 1 else 0.0
    return inside + slope * np.maximum(utility - at[-1], 0.0)


def prediction(utility: np.ndarray, gain: np.ndarray, rng: np.random.Generator) -> Prediction:
    """Spearman's rank correlation with its 95 % percentile bootstrap interval."""
    n = len(gain)
    found = _spearman(utility, gain)
    if found is None or n < 4:
        return Prediction(n, found, None)
    chosen = rng.integers(n, size=(SPEARMAN_REPLICATES, n))
    from scipy.stats import rankdata  # slow to import, and few runs calibrate

    one, other = (rankdata(values[chosen], axis=1) - (n + 1) / 2 for values in (utility, gain))
    lengths = np.sqrt(np.square(one).sum(axis=1) * np.square(other).sum(axis=1))
    told = lengths > 0.0  # a resample of nothing but ties says nothing
    low, high = np.percentile((one * other).sum(axis=1)[told] / lengths[told], [2.5, 97.5])
    return Prediction(n, found, (float(low), float(high)))


def _spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    if len(one) < 2 or np.ptp(one) == 0.0 or np.ptp(other) == 0.0:
        return None
    from scipy.stats import rankdata  # slow to import, and few runs calibrate

    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def _weights(standard_errors: np.ndarray) -> np.ndarray:
    """1/variance, where every gain has the median variance on top: theory misses by as much as sampling does."""
    variance = np.square(standard_errors)
    floor = float(np.median(variance)) or 1.0
    return 1.0 / (variance + floor)


def _predict(curves: dict[str, Knots], options: Sequence[Option], utility: np.ndarray) -> np.ndarray:
    predicted = np.zeros(len(options))
    methods = np.array([option.method for option in options])
    for method, knots in curves.items():
        of = methods == method
        predicted[of] = read_curve(knots, utility[of])
    return predicted
