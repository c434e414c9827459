"""Does this manifest fit this model? Asked before anything is changed, so that a refusal leaves the model as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.torch_modules import find_module
from layerlens.integrations.transformers import weights_fingerprint
from layerlens.models import Manifest

if TYPE_CHECKING:
    import torch


def head_modules(manifest: Manifest) -> tuple[str, ...]:
    """Names of the task head's modules; see ``heads_of``."""
    return heads_of(manifest.model)


def heads_of(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the task head's modules, which are trained beside the chosen options.

    Raises:
        ManifestError: the field is not a list of names.
    """
    names = facts.get("head_modules") or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ManifestError(f"model.head_modules: must be a list of module names, got {names!r}")
    return tuple(names)


def check_names(model: torch.nn.Module, manifest: Manifest) -> None:
    """Refuse a manifest that names a module the model does not have, be it of a layer that is left alone.

    Raises:
        ManifestError: with the nearest known names; or a layer is part of the task head, which is trained anyway.
    """
    heads = head_modules(manifest)
    for name in (*heads, *(row.layer for row in manifest.allocations)):
        find_module(model, name)
    inside = tuple(name + "." for name in heads)
    for row in manifest.allocations:
        if row.method != "none" and (row.layer in heads or row.layer.startswith(inside)):
            raise ManifestError(f"{row.layer}: is in the task head, which is trained whole; its method must be none")


def check_weights(model: torch.nn.Module, manifest: Manifest) -> None:
    """Refuse a model whose weights are not those that the manifest was measured on; see ``check_facts``."""
    check_facts(model, manifest.model)


def check_facts(model: torch.nn.Module, facts: Mapping[str, Any], source: str = "the manifest") -> None:
    """Refuse a model whose weights are not those that ``facts``, a manifest's ``model`` section, describes.

    The task head is left out when it was new then: it is random in every freshly loaded model. Facts without a
    fingerprint (written without the model at hand) fit any weights.

    Raises:
        ManifestError: the number of parameters or the fingerprint differs.
    """
    expected = facts.get("fingerprint")
    if not expected:
        return
    counted, total = facts.get("total_params"), sum(parameter.numel() for parameter in model.parameters())
    if counted and counted != total:
        raise ManifestError(f"{source} was made for a model of {counted:,} parameters, this one has {total:,}")
    heads = tuple(name + "." for name in heads_of(facts))
    head_parameters = [name for name in model.state_dict() if heads and name.startswith(heads)]
    if expected not in (weights_fingerprint(model, head_parameters), weights_fingerprint(model)):
        raise ManifestError(
            f"these are not the weights that {source} was made for: fingerprint "
            f"{weights_fingerprint(model, head_parameters)[:12]}… instead of {str(expected)[:12]}…; load "
            f"{facts.get('name_or_path')!r} in the precision it was profiled in, or profile this model"
        )
