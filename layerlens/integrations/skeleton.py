"""A transformers model without its weights: built from the configuration on the meta device, its weights left on disk
or never looked for.

What no checkpoint holds is there and right: a new task head has the numbers that ``from_pretrained`` would have drawn,
and buffers such as rotary frequencies and position ids are computed by the model's own initialisation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ModelNotFoundError, ModelSpecError
from layerlens.integrations.safetensors_files import TensorPlace, checkpoint_tensors, pieces, read_tensor
from layerlens.integrations.transformers import blocks_of

if TYPE_CHECKING:
    import torch

PLAIN = "set profiling.memory_mode: plain"


@dataclass(frozen=True)
class StreamedWeights:
    """Where the weights of a skeleton are.

    Args:
        places: name in the model's ``state_dict`` -> place on disk. Of tied parameters one name may suffice.
        aliases: every parameter's name -> the name in ``places`` that has its values (the same, or the one it is tied
            to); parameters that are new are missing.
    """

    places: Mapping[str, TensorPlace]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str, out: torch.Tensor) -> None:
        """Fill ``out`` with the parameter of this name.

        Raises:
            ModelNotFoundError: the checkpoint became unreadable.
        """
        read_tensor(self.places[self.aliases[name]], out)

    def fingerprint(self, model: torch.nn.Module, leave_out: Collection[str] = ()) -> str:
        """What ``weights_fingerprint`` says of the loaded model, from the files, some megabytes at a time."""
        import torch

        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            if name in leave_out:
                continue
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            found = pieces(self.places[self.aliases[name]]) if tensor.is_meta else iter([tensor.detach().reshape(-1)])
            for piece in found:
                flat = piece.to(tensor.dtype).cpu().contiguous().view(torch.uint8)
                digest.update(flat.numpy().data)
        return digest.hexdigest()


class NoWeights(StreamedWeights):
    """Of a model that was built from a configuration alone."""

    def fingerprint(self, model: torch.nn.Module, leave_out: Collection[str] = ()) -> str:
        return ""


def from_configuration(
    auto_class: Any, config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> tuple[Any, StreamedWeights]:
    """(model, weights): frozen, on the meta device, with the buffers that its own initialisation computes.

    The caller has seeded torch.

    Args:
        auto_class: of transformers, the class for the task.
        config: of transformers.
        dtype: that the weights would have.
        trust_remote_code: whether code beside the weights may run.
    """
    import torch

    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    _initialize(model, set())
    return model.eval().requires_grad_(False), NoWeights({})


def load_skeleton(
    auto_class: Any, directory: Path, settings: Mapping[str, Any], dtype: torch.dtype, *,
    trust_remote_code: bool = False,
) -> tuple[Any, dict[str, Any], StreamedWeights]:  # fmt: skip
    """(model, loading info, weights): what ``from_pretrained`` gives, with the weights left on disk.

    The caller has seeded torch: new parameters are drawn in the order in which ``from_pretrained`` draws them.

    Args:
        auto_class: of transformers, the class for the task.
        directory: of the checkpoint.
        settings: changes to its configuration.
        dtype: that the weights are to have.
        trust_remote_code: whether code beside the weights may run.

    Raises:
        ModelNotFoundError: see ``checkpoint_tensors``.
        ModelSpecError: the weights cannot be used as they lie on disk.
    """
    import torch
    from transformers import AutoConfig

    places = checkpoint_tensors(directory)
    config = AutoConfig.from_pretrained(
        directory, **settings, local_files_only=True, trust_remote_code=trust_remote_code
    )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelSpecError(f"model.name_or_path: quantised weights cannot be streamed; {PLAIN}")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelSpecError(
            f"model.name_or_path: {config.model_type} has an encoder and a decoder, and all decoder blocks read the "
            f"encoder's output; only single stacks can be streamed: {PLAIN} or checkpointed"
        )
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    towers = {path.rpartition(".")[0] for path in blocks_of(model)}
    if len(towers) > 1:
        raise ModelSpecError(
            f"model.name_or_path: {type(model).__name__} has {len(towers)} stacks of blocks; only single stacks can be "
            f"streamed: {PLAIN} or checkpointed"
        )
    if dtype != torch.float32 and model._get_dtype_plan(dtype):
        raise ModelSpecError(f"model.dtype: {config.model_type} keeps some weights in float32; {PLAIN}")
    model.tie_weights()
    named = renamed(model, places)
    own = model.state_dict()
    mismatched = [name for name, place in named.items() if place.shape != tuple(own[name].shape)]
    usable = {name: place for name, place in named.items() if name not in mismatched}
    missing = set(own) - set(usable) - set(_tied(model, usable))
    _initialize(model, missing)
    _read_buffers(model, usable)
    info = {"missing_keys": missing - set(mismatched), "mismatched_keys": [(name,) for name in mismatched]}
    return model, info, StreamedWeights(usable, {**{name: name for name in usable}, **_tied(model, usable)})


def renamed(model: Any, places: Mapping[str, TensorPlace]) -> dict[str, TensorPlace]:
    """The places by the model's own names, renamed as transformers does when it loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own = model.state_dict()
    named: dict[str, TensorPlace] = {}
    for key, place in places.items():
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if name not in own and key in own:
            name, converted = key, None
        if converted is not None and name in own:
            raise ModelSpecError(
                f"model.name_or_path: {key} is not used in its layout on disk ({model.config.model_type} merges or "
                f"splits weights while it loads, as mixtures of experts do), so it cannot be streamed; {PLAIN}, or "
                "save the model in the layout of this version of transformers"
            )
        if name in own:
            named[name] = place
    if not named:
        raise ModelNotFoundError(
            f"model.name_or_path: no tensor of the checkpoint belongs to {type(model).__name__}; the checkpoint "
            "belongs to another model"
        )
    return named


def _tied(model: Any, usable: Mapping[str, TensorPlace]) -> dict[str, str]:
    """Parameters that are not on disk under their own name but tied to one that is."""
    on_disk: dict[int, str] = {}
    names = dict(model.named_parameters(remove_duplicate=False))
    for name in usable:
        if name in names:
            on_disk.setdefault(id(names[name]), name)
    return {name: on_disk[id(x)] for name, x in names.items() if name not in usable and id(x) in on_disk}


def _initialize(model: Any, missing: set[str]) -> None:
    """Draw what the checkpoint lacks, and compute the buffers that no checkpoint holds."""
    import torch

    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        new = torch.empty_like(tensor, device="cpu")
        if attribute in module._buffers:
            module._buffers[attribute] = new
        elif name in missing:
            module._parameters[attribute] = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
        else:
            tensor._is_hf_initialized = True
    model.initialize_weights()


def _read_buffers(model: Any, usable: Mapping[str, TensorPlace]) -> None:
    """Buffers that are in the checkpoint (running statistics) are small, and read at once."""
    for name, buffer in model.named_buffers():
        if name in usable:
            read_tensor(usable[name], buffer)
