"""A tuned model in one directory: PEFT's own files for LoRA and the task head, one safetensors file for the rest.

``adapter_config.json`` and ``adapter_model.safetensors`` are what PEFT writes, so ``PeftModel.from_pretrained`` reads
the directory too, and gets the LoRA part. What is saved and loaded again computes the same bits.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.experts import Stack, stack_at
from layerlens.integrations.peft import (
    BASE_PREFIX,
    TOKEN_ROWS,
    base_of,
    is_embedding,
    lora_shape,
    peft_places,
    tensor_shapes,
    why_not_adaptable,
)
from layerlens.integrations.peft_calls import take_keywords
from layerlens.integrations.torch_modules import find_module
from layerlens.methods import injected_sizes
from layerlens.methods.peft_method import VectorMethod
from layerlens.models import ModelFacts
from layerlens.registry import METHODS
from layerlens.tuning.generators.generator import ordinary_lora
from layerlens.tuning.initialization import ADAPTER_WEIGHTS
from layerlens.tuning.inject import before_of, keep_statistics, note_before
from layerlens.tuning.storage import MODULES_FILE, SavedModules, model_bytes, read_modules
from layerlens.utils.atomic import settle, staged_directory

if TYPE_CHECKING:
    import torch

SETS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "feedforward_modules")
"""Fields of PEFT's configuration that are sets in memory, where they are no pattern, and lists in its file."""
ADAPTER_CONFIG, CARD = "adapter_config.json", "README.md"
LORA_TYPE = "LORA"
EXPORTED = "peft"  # where a run puts the PEFT files, beside its manifest


def save(model: torch.nn.Module, directory: Path) -> dict[str, Path]:
    """Write everything in ``model`` that is trained to ``directory``, without the base model's weights.

    LoRA that a generator computes is written as ordinary LoRA with its present values.

    Args:
        model: the result of ``apply`` or ``load``, or a fully fine-tuned model.
        directory: where to write; created if missing. Other files in it stay.

    Returns:
        the path of each file, by its name.

    Raises:
        ManifestError: the model has nothing that is trained or added.
        OutputError: the directory cannot be written. Earlier files in it are unchanged.
    """
    directory = Path(directory)
    content = model_bytes(model)
    if content is None and base_of(model) is model:
        raise ManifestError(
            f"this {type(model).__name__} has no added or trained parameters, so there is nothing to save"
        )
    with staged_directory(directory, owned=(ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODULES_FILE)) as staging:
        if base_of(model) is not model:
            peft_model: Any = model
            # "auto" would ask the hub for the base model's vocabulary; embeddings are never trained here.
            with ordinary_lora(model):
                peft_model.save_pretrained(staging, save_embedding_layers=False)
            _in_fixed_order(staging / ADAPTER_CONFIG)
            if (directory / CARD).exists():
                (staging / CARD).unlink(missing_ok=True)
        if content is not None:
            (staging / MODULES_FILE).write_bytes(content)
        names = sorted(path.name for path in staging.iterdir())
    return {name: directory / name for name in names}


def load(
    base: torch.nn.Module, directory: Path, *, trainable: bool = True, check_fingerprint: bool = True
) -> torch.nn.Module:
    """Load what ``save`` or ``layerlens run`` wrote to ``directory`` into a freshly loaded base model.

    Args:
        base: the base model, changed in place.
        directory: a directory that holds ``adapter_config.json`` (itself or in its folder ``peft``),
            ``layerlens_modules.safetensors``, or both.
        trainable: True if the loaded parameters shall require gradients.
        check_fingerprint: refuse base weights that differ from those that the directory was made for, if it records
            them.

    Returns:
        a PEFT model around ``base`` if the directory has a PEFT part, else ``base`` itself. Its logits are the same as
        when it was saved.

    Raises:
        ManifestError: not such a directory, a damaged file, an unknown module (the message gives the nearest names),
            tensors of another shape, or another base model. ``base`` is then unchanged.
    """
    directory = Path(directory)
    settle(directory)
    peft_directory = directory if (directory / ADAPTER_CONFIG).is_file() else directory / EXPORTED
    has_peft, has_modules = (peft_directory / ADAPTER_CONFIG).is_file(), (directory / MODULES_FILE).is_file()
    if not has_peft and not has_modules:
        raise ManifestError(
            f"{directory}: has neither {ADAPTER_CONFIG} nor {MODULES_FILE}; give a directory that `layerlens run` or "
            "layerlens.tuning.save wrote"
        )
    if injected_sizes(base):
        raise ManifestError("the model already has LoRA layers, adapters or prefixes; load the base model afresh")
    saved = SavedModules((), {}, ModelFacts())
    if has_modules:
        saved = read_modules(base, directory / MODULES_FILE, check_fingerprint=check_fingerprint)
    if not has_peft:
        return saved.put_into(base, trainable=trainable)
    _check_peft_files(base, peft_directory)
    return saved.put_into(_with_peft(base, peft_directory, saved.facts, trainable), trainable=trainable)


def _in_fixed_order(path: Path) -> None:
    """Write PEFT's configuration again with its sets in one order: theirs differs from one process to the next."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    for name in SETS:
        if isinstance(fields.get(name), list):
            fields[name] = sorted(fields[name])
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_peft(base: torch.nn.Module, directory: Path, facts: ModelFacts, trainable: bool) -> torch.nn.Module:
    from peft import PeftModel
    from peft.utils.other import ModulesToSaveWrapper

    note_before(base, facts)
    base.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 still reads a name of gradient checkpointing that transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            # It looks for the ranks of parameters among modules, too.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern", category=RuntimeWarning)
            model: torch.nn.Module = PeftModel.from_pretrained(base, str(directory), is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ManifestError(f"{directory}: PEFT cannot load this onto {type(base).__name__}: {first}") from error
    take_keywords(model)
    keep_statistics(base, [module for module in base.modules() if isinstance(module, ModulesToSaveWrapper)])
    assert before_of(model) is not None
    return model


def _check_peft_files(base: torch.nn.Module, directory: Path) -> None:
    """Names and shapes of PEFT's tensors against the base model, before PEFT changes anything."""
    from safetensors import SafetensorError, safe_open

    config_path, path = directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(f"{config_path}: not a PEFT configuration ({error})") from error
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise ManifestError(f"{path}: is damaged or cut short ({error})") from error
    known = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    if kind != LORA_TYPE:
        _check_vectors(path, base, known, kind, shapes)
        return
    stacked = [name for name in config.get("target_parameters") or () if stack_at(base, name) is not None]
    layers = {place: layer for layer, place in peft_places(base, stacked).items()}
    for key, shape in shapes.items():
        name = key.removeprefix(BASE_PREFIX)
        layer, mark, part = name.partition(".lora_")
        if name.endswith(TOKEN_ROWS):
            _check_rows(path, base, name.removesuffix(TOKEN_ROWS), config, shape)
            continue
        if not mark:
            _check_tensor(path, known, name, shape)
            continue
        layer = layers.get(layer, layer)
        module = stack_at(base, layer) or find_module(base, layer)
        if isinstance(module, Stack):
            _check_stack(path, layer, module, part, shape)
            continue
        if reason := why_not_adaptable(layer, module):
            raise ManifestError(f"{path}: {layer}: {reason}")
        n_in, n_out, _ = lora_shape(module)
        count = 1
        for size in shape:
            count *= size
        if is_embedding(module) != part.startswith("embedding_"):
            raise ManifestError(f"{path}: {layer}: lora_{part} does not belong on a {type(module).__name__}")
        if part == "magnitude_vector":
            if count != n_out:
                raise ManifestError(f"{path}: {layer}: {key} is {shape}, which does not fit {n_out} outputs")
            continue
        first = part.removeprefix("embedding_")[0]
        if count % (n_in if first == "A" else n_out) or (
            shape[0] != n_out if first == "B" else count // shape[0] != n_in
        ):
            raise ManifestError(
                f"{path}: {layer}: lora_{part} is {shape}, which does not fit this {n_in} → {n_out} "
                f"{type(module).__name__}; it was made for a model of another shape"
            )


def rows_needed(base: Any, directory: Path) -> int:
    """Rows of the input embedding that PEFT's files in ``directory`` need at least; 0 where they have none of it."""
    from safetensors import safe_open

    config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    given = config.get("trainable_token_indices") or ()
    indices = [index for each in given.values() for index in each] if isinstance(given, Mapping) else list(given)
    embedding = next((name for name, one in base.named_modules() if one is base.get_input_embeddings()), "")
    with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as file:
        whole = f"{BASE_PREFIX}{embedding}.weight"
        rows = file.get_slice(whole).get_shape()[0] if whole in file.keys() else 0  # noqa: SIM118
    return max(rows, max(indices, default=-1) + 1)


def _check_rows(
    path: Path, base: torch.nn.Module, name: str, config: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    """Trained rows of an embedding or output layer."""
    weight: Any = find_module(base, name).weight
    given = config.get("trainable_token_indices")
    indices = given.get(name, next(iter(given.values()), ())) if isinstance(given, Mapping) else given or ()
    if indices and max(indices) >= len(weight):
        raise ManifestError(
            f"{path}: has the rows of token {max(indices)}, and {name} has {len(weight)}; call "
            f"model.resize_token_embeddings({max(indices) + 1}) first, or with the number of tokens of the tokenizer "
            "that it was trained with"
        )
    if shape != (len(indices), weight.shape[1]):
        raise ManifestError(
            f"{path}: has rows {shape} of {name}, where {len(indices)} tokens have rows of {weight.shape[1]} features"
        )


def _check_vectors(
    path: Path,
    base: torch.nn.Module,
    known: dict[str, tuple[int, ...]],
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """The tensors of another method of PEFT that LayerLens has; of any other kind nothing is known here."""
    methods = [one for one in METHODS.values() if isinstance(one, VectorMethod) and one.peft_type == kind]
    for method in methods:
        mark = f".{method.holder}"
        for key, shape in shapes.items():
            layer, found, end = key.removeprefix(BASE_PREFIX).partition(mark)
            if not found:
                _check_tensor(path, known, layer, shape)
                continue
            module = find_module(base, layer)
            reason = method.why_not(layer, module)
            if reason:
                raise ManifestError(f"{path}: {layer}: {reason}")
            fitting = {name: tuple(tensor.shape) for name, tensor in method.layer_tensors(layer, module).items()}
            name = f"{method.holder}{end}"
            if fitting.get(name) != shape:
                raise ManifestError(f"{path}: {layer}: {name} is {shape}, where this model has {fitting.get(name)}")


def _check_stack(path: Path, layer: str, stack: Stack, part: str, shape: tuple[int, ...]) -> None:
    """A or B of stacked experts."""
    side = 0 if part.startswith("A") else 1
    rank = shape[side] // stack.experts if len(shape) == 2 else 0
    if rank < 1 or shape != tensor_shapes(stack, rank)[side]:
        raise ManifestError(
            f"{path}: {layer}: lora_{part} is {shape}, which does not fit {stack.experts} experts of "
            f"{stack.n_in} → {stack.n_out}; it was made for a model of another shape"
        )


def _check_tensor(path: Path, known: dict[str, tuple[int, ...]], name: str, shape: tuple[int, ...]) -> None:
    """A tensor of the task head."""
    if name not in known:
        raise ManifestError(f"{path}: tensor {name} {shape} has no place in the base model")
    if known[name] != shape:
        raise ManifestError(
            f"{path}: {name} is {shape}, in the base model {known[name]}; load it with the same number of labels and "
            "of token embeddings as in training (model.resize_token_embeddings)"
        )
