"""The zero-step adapter directory: what any PEFT trainer starts from, without LayerLens and without changing a logit.

``peft/`` holds the LoRA rows (or those of another method of PEFT) in PEFT's own files,
``layerlens_modules.safetensors`` the adapters and prefixes, which PEFT does not have. A task head that no checkpoint
has is in ``peft/`` too (``modules_to_save``), with the weights that the run fitted: on any freshly loaded base model
``PeftModel.from_pretrained`` gives the outputs of the base model with that head, trains the head, and saves it.
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
from layerlens.tuning.task_head import Head, check_head, head_tensors, like, read_head, write_head
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
    head: Head | None = None,
) -> dict[str, Path]:
    """Write the untrained adapter of a choice below ``directory``. The same choice gives the same bytes.

    The files replace those of an earlier export. Files that this choice does not need are removed.

    Args:
        given: a choice, or the manifest that holds it. Its LoRA goes to ``directory``/peft, its adapters and prefixes
            go to ``directory``/layerlens_modules.safetensors.
        model: the base model, for its module names and shapes. It is not changed.
        directory: where to write; created if missing.
        factors: layer -> LoRA's first A, if ``lora.initialization`` is not "default" (see ``apply``).
        base: name or path of the base model; by default, the one that the manifest names.
        head: name -> weight of the new task head that the choice trains. Weights that are missing here come from
            ``model``.

    Returns:
        the path of each part, under "peft" and "modules".

    Raises:
        ManifestError: the choice does not fit the model; nothing is written.
        OutputError: the directory cannot be written.
    """
    choice, facts = fitting_choice(model, given, check_fingerprint=False)
    directory = Path(directory)
    check_head(model, head or {})
    peft_files = _peft_files(choice, model, factors, base or facts.place, head)
    modules = _modules(choice, model)
    others = {} if peft_files else _head_alone(choice, model, head)
    written: dict[str, Path] = {}
    with staged_directory(directory, owned=(PEFT_DIRECTORY, MODULES_FILE)) as staging:
        if peft_files:
            (staging / PEFT_DIRECTORY).mkdir()
            for name, content in peft_files.items():
                (staging / PEFT_DIRECTORY / name).write_bytes(content)
            written["peft"] = directory / PEFT_DIRECTORY
        if modules:
            (staging / MODULES_FILE).write_bytes(modules_bytes(modules, others))
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
        measured: the run's peft directory, which has LoRA's first A where the initialisation comes from data; the
            fitted task head is read from beside it.
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
    head = {} if measured is None else read_head(measured.parent)
    written = export_adapter(manifest, base, output, factors, head=head)
    return written | write_head(head, Path(output))


def _peft_files(
    choice: Choice, model: torch.nn.Module, factors: Mapping[str, torch.Tensor] | None, base: str | None,
    head: Head | None,
) -> dict[str, bytes]:  # fmt: skip
    from safetensors.torch import save

    if not choice.peft_method:
        return {}
    method = METHODS[choice.peft_method]
    tensors = method.tensors(choice, model, factors)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    config = method.config(choice, model, base=base)
    tied = choice.tokens.tied if choice.tokens is not None and choice.tokens.whole_modules else ()
    tensors |= head_tensors(model, config, head, tied)
    return {
        "adapter_config.json": adapter_config_json(config).encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
        "README.md": zero_step_card(choice, parameters, base or "the base model", fitted=bool(head)).encode(),
    }


def _head_alone(choice: Choice, model: torch.nn.Module, head: Head | None) -> dict[str, torch.Tensor]:
    """The head that is trained beside adapters and prefixes, where there is nothing of PEFT."""
    given, inside = head or {}, tuple(f"{name}." for name in choice.head_modules)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if inside and name.startswith(inside)}
    return {name: like(given[name], tensor) if name in given else tensor for name, tensor in state.items()}


def _modules(choice: Choice, model: torch.nn.Module) -> dict[str, tuple[str, torch.nn.Module]]:
    return {
        option.layer: (option.method, METHODS[option.method].new_module(model, option, choice.seed))
        for option in choice.other_options
    }
