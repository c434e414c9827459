"""The zero-step adapter directory: what any PEFT trainer starts from, without LayerLens and without changing a logit.

``peft/`` holds the LoRA rows (or those of another method of PEFT) in PEFT's own files,
``layerlens_modules.safetensors`` the adapters and prefixes, which PEFT does not have. ``peft/`` has no weights of the
task head on purpose: the head of a freshly loaded base model is random, so any head written here would change its
logits, and PEFT refuses a file that lacks the head when its configuration trains one (a KeyError in 0.21). The README
beside the files says how to train the head too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from layerlens.integrations.peft import adapter_config_json
from layerlens.models import Choice, Manifest
from layerlens.registry import METHODS
from layerlens.tuning.base_model import check_weights, fitting_choice, load_base
from layerlens.tuning.card import zero_step_card
from layerlens.tuning.initialization import read_factors
from layerlens.tuning.storage import MODULES_FILE, modules_bytes
from layerlens.utils.atomic import staged_directory

if TYPE_CHECKING:
    import torch

PEFT_DIRECTORY = "peft"


def export_adapter(
    given: Choice | Manifest,
    model: torch.nn.Module,
    directory: Path,
    factors: Mapping[str, torch.Tensor] | None = None,
    base: str | None = None,
) -> dict[str, Path]:
    """Write the zero-step adapter of a choice below ``directory``; the same choice gives the same bytes.

    What an earlier export left there is replaced, or removed where this choice has none of that kind.

    Args:
        given: its LoRA goes to ``directory``/peft, its adapters and prefixes to
            ``directory``/layerlens_modules.safetensors.
        model: the base model, for its module names and shapes; it is not changed.
        directory: created if it is not there.
        factors: LoRA's first A by layer, where ``lora.initialization`` is not "default" (see ``apply``).
        base: name or path of the base model; the one that a manifest names when None.

    Returns:
        The path of each thing written, under "peft" and "modules".

    Raises:
        ManifestError: the choice does not fit the model; nothing is then written.
        OutputError: the directory cannot be written.
    """
    choice, facts = fitting_choice(model, given, check_fingerprint=False)
    directory = Path(directory)
    peft_files = _peft_files(choice, model, factors, base or facts.place)
    modules = _modules(choice, model)
    written: dict[str, Path] = {}
    with staged_directory(directory, owned=(PEFT_DIRECTORY, MODULES_FILE)) as staging:
        if peft_files:
            (staging / PEFT_DIRECTORY).mkdir()
            for name, content in peft_files.items():
                (staging / PEFT_DIRECTORY / name).write_bytes(content)
            written["peft"] = directory / PEFT_DIRECTORY
        if modules:
            (staging / MODULES_FILE).write_bytes(modules_bytes(modules, {}))
            written["modules"] = directory / MODULES_FILE
    return written


def apply_to_directory(
    manifest: Manifest, model: str | None, output: Path, measured: Path | None = None, *,
    trust_remote_code: bool = False,
) -> dict[str, Path]:  # fmt: skip
    """Load the manifest's base model and write its zero-step adapter below ``output``.

    Args:
        manifest: what to export.
        model: name or path of the base model; the one that the manifest names when None.
        output: directory, created if it is not there.
        measured: the run's peft directory, which has LoRA's first A where the initialisation comes from data.
        trust_remote_code: whether Python code beside the base model's weights may run.

    Returns:
        See ``export_adapter``.

    Raises:
        ManifestError: the manifest does not say which model, or was made for other weights or another shape.
        ModelNotFoundError: the model cannot be found or read.
        OutputError: the directory cannot be written.
    """
    base = load_base(manifest, model, trust_remote_code=trust_remote_code).model
    check_weights(base, manifest.model)
    factors = read_factors(measured or Path(PEFT_DIRECTORY), manifest)
    return export_adapter(manifest, base, output, factors)


def _peft_files(
    choice: Choice, model: torch.nn.Module, factors: Mapping[str, torch.Tensor] | None, base: str | None
) -> dict[str, bytes]:
    from safetensors.torch import save

    if not choice.peft_method:
        return {}
    method = METHODS[choice.peft_method]
    tensors = method.tensors(choice, model, factors)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return {
        "adapter_config.json": adapter_config_json(method.config(choice, model, train_head=False, base=base)).encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
        "README.md": zero_step_card(choice, parameters, base or "the base model").encode(),
    }


def _modules(choice: Choice, model: torch.nn.Module) -> dict[str, tuple[str, torch.nn.Module]]:
    return {
        option.layer: (option.method, METHODS[option.method].new_module(model, option, choice.seed))
        for option in choice.other_options
    }
