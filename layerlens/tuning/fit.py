"""Does this choice fit this model? Asked before anything is changed, so that a refusal leaves the model as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerlens.exceptions import ManifestError
from layerlens.integrations.pretrained import weights_fingerprint
from layerlens.integrations.torch_modules import find_module
from layerlens.models import Choice, Manifest, ModelFacts, Option, choice_of
from layerlens.registry import METHODS

if TYPE_CHECKING:
    import torch


def fitting_choice(
    model: torch.nn.Module, given: Choice | Manifest, *, check_fingerprint: bool = True
) -> tuple[Choice, ModelFacts]:
    """The choice in ``given``, which fits ``model``, and what a manifest says of its base model.

    Raises:
        ManifestError: a layer that the model does not have; of a manifest also: other weights (where
            ``check_fingerprint``), or other numbers of parameters than it counted with.
    """
    choice = choice_of(given)
    check_names(model, choice)
    if not isinstance(given, Manifest):
        return choice, ModelFacts(head_modules=choice.head_modules)
    if check_fingerprint:
        check_weights(model, given.model)
    check_costs(model, given, choice.chosen)
    return choice, given.model


def check_names(model: torch.nn.Module, choice: Choice) -> None:
    """Refuse a choice that names a module the model does not have, be it of a layer that is left alone.

    Raises:
        ManifestError: with the nearest known names; or a layer is part of the task head, which is trained anyway.
    """
    for name in (*choice.head_modules, *(option.layer for option in choice.options)):
        find_module(model, name)
    inside = tuple(name + "." for name in choice.head_modules)
    for option in choice.chosen:
        if option.layer in choice.head_modules or option.layer.startswith(inside):
            raise ManifestError(f"{option.layer}: is in the task head, which is trained whole; its method must be none")


def check_costs(model: torch.nn.Module, manifest: Manifest, options: Sequence[Option]) -> None:
    """Refuse a manifest that was made for a model of another shape: ``options`` would train other numbers there.

    Raises:
        ManifestError: the layer, what it trains here, and what the manifest says.
    """
    costs = {row.layer: row.cost for row in manifest.allocations}
    for option in options:
        trained, words = METHODS[option.method].params_in(model, option)
        if trained != costs[option.layer]:
            raise ManifestError(
                f"{option.layer}: {words} trains {trained} parameters, the manifest says {costs[option.layer]}; it was "
                "made for a model of another shape"
            )


def check_weights(model: torch.nn.Module, facts: ModelFacts, source: str = "the manifest") -> None:
    """Refuse a model whose weights are not those that ``facts`` describes.

    The task head is left out when it was new then: it is random in every freshly loaded model. Facts without a
    fingerprint (written without the model at hand) fit any weights.

    Raises:
        ManifestError: the number of parameters or the fingerprint differs.
    """
    expected = facts.fingerprint
    if not expected:
        return
    counted, total = facts.total_params, sum(parameter.numel() for parameter in model.parameters())
    if counted and counted != total:
        raise ManifestError(f"{source} was made for a model of {counted:,} parameters, this one has {total:,}")
    heads = tuple(name + "." for name in facts.heads)
    head_parameters = [name for name in model.state_dict() if heads and name.startswith(heads)]
    if expected not in (weights_fingerprint(model, head_parameters), weights_fingerprint(model)):
        raise ManifestError(
            f"these are not the weights that {source} was made for: fingerprint "
            f"{weights_fingerprint(model, head_parameters)[:12]}… instead of {expected[:12]}…; load "
            f"{facts.name_or_path!r} in the precision it was profiled in, or profile this model"
        )
