"""What a manifest says of the predicted gain: the sum over the chosen options, and what proxies showed of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from layerlens.models import CalibrationSummary, Predicted, Prediction, UtilityTable


def predicted_gain(utilities: UtilityTable, chosen: np.ndarray) -> Predicted:
    """Predicted gain of the chosen options, and what the prediction rests on."""
    gain = float(utilities.utility[chosen].sum())
    found = utilities.calibration
    if found is None:
        return Predicted(gain, unit=utilities.unit, calibrated=False)
    low, high = np.percentile(found.replicates__bo[:, chosen].sum(axis=1), [2.5, 97.5])
    study = found.study
    summary = CalibrationSummary(
        proxies=len(study.gains),
        planned=study.planned,
        steps=study.steps,
        learning_rate=study.learning_rate,
        held_out_samples=study.held_out_samples,
        base_loss=study.base_loss,
        mean_standard_error=float(np.mean([one.standard_error for one in study.gains])),
        leave_one_out_rmse=found.leave_one_out_rmse,
        **_ranking(found.overall),
        by_method={method: _ranking(each) for method, each in found.by_method.items()},
        curves={method: [list(knot) for knot in knots] for method, knots in found.curves.items()},
    )
    return Predicted(gain, (float(low), float(high)), utilities.unit, calibrated=True, calibration=summary)


def _ranking(found: Prediction) -> dict[str, Any]:
    return {
        "options": found.n_options,
        "spearman": found.spearman,
        "spearman_interval": found.interval,
    }
