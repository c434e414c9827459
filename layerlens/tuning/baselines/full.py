"""Full fine-tuning: every weight is trained. It has no budget; other methods are held against it."""

from __future__ import annotations

from layerlens.tuning.baselines.interface import BaselineRequest, Finished, Prepared
from layerlens.tuning.baselines.plans import trained_params
from layerlens.tuning.undo import note_before


def full_fine_tuning(request: BaselineRequest) -> Prepared:
    """Every parameter requires gradients."""
    note_before(request.model, request.facts, whole=True)
    request.model.requires_grad_(True)
    params = trained_params(request.model, request.facts)
    return Prepared(
        request.model, params, None, lambda model: Finished(model, params, None), note="trains all weights, no budget"
    )
