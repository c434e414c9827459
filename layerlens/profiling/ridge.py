"""The ridge of a new task head, chosen by cross-validation.

Features have hundreds of columns and samples are a few hundred, so that a fit with a weak ridge follows the samples
that it sees: with 1e-3 a head of two classes had the loss 0.716 on others, where equal odds have 0.693, and all that is
measured behind such a head is its noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Ascending. The next larger one is tried as long as it has been better."""
FOLDS = 4
LEAST_SAMPLES = 4 * FOLDS
"""With fewer, the smallest ridge is taken: folds of less than four samples tell nothing."""
ITERATIONS = 40
"""Of L-BFGS on a fold: losses of held-out samples need less than the head itself."""


def ridge_penalty(ridge: float, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """ridge · Σ w²."""
    return ridge * torch.stack([(parameter**2).sum() for parameter in parameters]).sum()


def ridge_of(losses: Callable[[], torch.Tensor], parameters: Sequence[torch.nn.Parameter]) -> float:
    """The ridge with the least mean loss on samples that a fit has not seen; the parameters are as before afterwards.

    Every sample is in one of ``FOLDS`` folds, which are drawn. A fold's head is fitted on the others.

    Args:
        losses: float [n], of every sample with the parameters as they are.
        parameters: of the head.
    """
    begun = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            count = len(losses())
        if count < LEAST_SAMPLES or len(RIDGES) == 1:
            return RIDGES[0]
        fold = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % FOLDS
        heads = [begun] * FOLDS
        best, least = RIDGES[0], math.inf
        for ridge in RIDGES:
            held_out, fitted = 0.0, []
            for number in range(FOLDS):
                _set(parameters, heads[number])
                held_out += _fit(losses, parameters, ridge, fold == number)
                fitted.append([parameter.detach().clone() for parameter in parameters])
            if not held_out < least:
                break
            best, least, heads = ridge, held_out, fitted
        return best
    finally:
        _set(parameters, begun)


def _fit(
    losses: Callable[[], torch.Tensor], parameters: Sequence[torch.nn.Parameter], ridge: float, held_out: torch.Tensor
) -> float:
    """Fit the parameters on all but some samples; the sum of the losses of those, infinite where that fails."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=ITERATIONS, tolerance_grad=1e-4, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        each = losses()
        value = each[~held_out.to(each.device)].mean() + ridge_penalty(ridge, parameters)
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        each = losses()
        found = float(each[held_out.to(each.device)].sum())
    for parameter in parameters:
        parameter.grad = None
    return found if math.isfinite(found) else math.inf


def _set(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
