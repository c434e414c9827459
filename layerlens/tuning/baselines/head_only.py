"""The task head alone on frozen features."""

from __future__ import annotations

from layerlens.exceptions import ConfigurationError
from layerlens.tuning.baselines.interface import BaselineRequest, Prepared
from layerlens.tuning.baselines.plans import plan, planned


def head_only(request: BaselineRequest) -> Prepared:
    """No layer is adapted.

    Raises:
        ConfigurationError: the model has no task head of its own.
    """
    if not request.facts.heads:
        raise ConfigurationError("baseline head-only: this model has no new task head, so nothing would be trained")
    return planned(request, plan(request, {}), note="adds nothing to the layers")
