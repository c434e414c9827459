"""Short real trainings of single options, and the calibration of a utility model that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from layerlens.models.options import Option


@dataclass(frozen=True)
class ProxyGain:
    """What one option gained when it alone was trained.

    Args:
        option: what was trained.
        gain: mean drop of the held-out loss, per sample (nats where the loss is a log-likelihood); below 0 where
            training made it worse.
        standard_error: of ``gain``, from the paired differences of the held-out samples.
    """

    option: Option
    gain: float
    standard_error: float


@dataclass(frozen=True)
class ProxyStudy:
    """The proxies of one model: all from the same start, on the same batches, judged on the same held-out samples.

    Args:
        gains: one entry for each option that was trained, in the order of the plan.
        planned: options of the plan; more than ``gains`` has where the time limit ended the study.
        steps, learning_rate: of each training (AdamW).
        held_out_samples: samples that the losses are means over; none of them was trained or measured on.
        base_loss: mean loss of the frozen model on them.
    """

    gains: tuple[ProxyGain, ...]
    planned: int
    steps: int
    learning_rate: float
    held_out_samples: int
    base_loss: float


@dataclass(frozen=True)
class Prediction:
    """How well a utility ranks measured gains.

    Args:
        n_options: options compared.
        spearman: rank correlation of utility and gain; None where either is constant.
        interval: 95 % bootstrap interval of it; None with ``spearman``, or for fewer than 4 options.
    """

    n_options: int
    spearman: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Calibration:
    """How theoretical utilities became predicted loss drops, and how well they had ranked the measured ones.

    Args:
        study: the measured gains.
        theoretical: utility of each of the study's options before calibration.
        fitted: predicted loss drop of each of them.
        overall: all options together.
        by_method: each method alone.
        curves: for each method the knots (utility, loss drop) of its monotone fit; linear in between.
        leave_one_out_rmse: root mean square of (measured − predicted from the other proxies), per sample.
        replicates__bo: float64 [n_replicates, n_options], the utilities of the table under fits to resampled proxies.
    """

    study: ProxyStudy
    theoretical: tuple[float, ...]
    fitted: tuple[float, ...]
    overall: Prediction
    by_method: dict[str, Prediction]
    curves: dict[str, tuple[tuple[float, float], ...]]
    leave_one_out_rmse: float
    replicates__bo: np.ndarray
