"""The LoRA of a choice in the words of Hugging Face PEFT: a LoraConfig, and the tensors of a zero-step adapter.

How PEFT matches names decides what is written here:

- a ``target_modules`` list takes a module whose path equals an entry or ends in "." + entry; a string is a regular
  expression for the whole path;
- ``rank_pattern`` and ``alpha_pattern`` keys are tried one after the other as ``(.*\\.)?(KEY)$``, the first match wins,
  and saving sorts the keys. A key that begins with ``^`` cannot be reached through the prefix, so each of ours is
  anchored on both sides, escaped, and fits exactly one module: the order does not matter.

``r`` and ``lora_alpha`` hold the largest rank and patterns only lower it; alpha/r is the same everywhere. A tool that
reads neither pattern and scales the file by lora_alpha/r (vLLM before 0.33) then scales every layer right, and one that
reserves memory for ``r`` rows reserves enough. One that divides lora_alpha by each tensor's own rank (TensorRT-LLM,
llama.cpp) scales layers of lower rank too strongly, and SGLang asserts that every layer has the rank ``r``: for those
``layerlens export --serve`` writes a directory of one rank (``layerlens.engines``).

What is no module, the stacked experts of a block, goes into ``target_parameters``. So do dense layers whose names PEFT
would rewrite into those of routed experts (``experts.rewritten_by_peft``): told the layer's ``.weight``, it adapts the
layer itself, with the same tensors. PEFT nests its modules around a module, the last of its parameters outermost.

With ``lora.use_rslora`` a layer is scaled by alpha/√r instead (Kalajdzievski 2023, arXiv:2312.03732). There alpha is
the constant, alpha_over_r times the largest rank, so ``r`` and ``lora_alpha`` are the same as without, and there is no
``alpha_pattern``. PEFT, vLLM since 0.33 and TensorRT-LLM read the layer's own rank then, and scale right; vLLM before
0.33 and LoRAX take √ of the largest for all, SGLang and llama.cpp do not read rsLoRA at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from layerlens.exceptions import ManifestError
from layerlens.integrations.experts import BASE_LAYER, Stack, rewritten_by_peft, stack_at
from layerlens.integrations.torch_modules import find_module
from layerlens.integrations.transformers import dense_shape, is_dense
from layerlens.models import DORA, Choice, Option
from layerlens.registry import TASKS

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
"""What PEFT's files call the trained rows of a module."""
BASE_PREFIX = "base_model.model."
"""What PEFT puts before the base model's names in its files."""


def task_type(task: str | None) -> str | None:
    """PEFT's name for a task, where it has one by which it finds the head; None for what is not a task, too."""
    found = TASKS.get(task)
    return None if found is None else found.peft_type


def lora_config(
    choice: Choice, model: torch.nn.Module, *, train_head: bool = True, base: str | None = None
) -> LoraConfig:
    """The LoRA of a choice as a PEFT configuration; layers without it are not in it.

    Args:
        choice: has LoRA on at least one layer.
        model: the base model, for its module names and shapes; it is not changed.
        train_head: let PEFT train and save the task head too. PEFT then refuses to load an adapter file that has no
            head weights (a KeyError), which is why the zero-step export is made without.
        base: name or path of the base model, for the file.

    Raises:
        ManifestError: no LoRA, an unknown module, or a module that cannot take LoRA.
    """
    from peft import LoraConfig

    ranks = choice.lora_ranks()
    if not ranks and not choice.token_indices:
        raise ManifestError("no layer gets LoRA, so there is nothing for PEFT to configure")
    modules = [lora_module(model, option) for option in choice.lora_options]
    scale, rslora = float(choice.lora.alpha_over_r or 1.0), choice.lora.use_rslora
    largest = max(ranks.values(), default=1)
    parameters = _parameters(model, ranks)
    names = {parameters.get(layer, layer): rank for layer, rank in ranks.items()}
    lowered = {f"^{re.escape(name)}": rank for name, rank in names.items() if rank < largest}
    shared = shared_fields(choice, model, [x for x in ranks if x not in parameters], train_head=train_head, base=base)
    return LoraConfig(
        **(shared | _token_fields(choice, train_head=train_head)),
        target_parameters=sorted(parameters.values()) or None,
        r=largest,
        lora_alpha=_alpha(scale, largest),
        rank_pattern=dict(sorted(lowered.items())),
        alpha_pattern={} if rslora else {key: _alpha(scale, rank) for key, rank in sorted(lowered.items())},
        use_rslora=rslora,
        use_dora=any(option.method == DORA for option in choice.lora_options),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(hasattr(module, "nf") for module in modules),  # transformers' Conv1D
    )


def _token_fields(choice: Choice, *, train_head: bool) -> dict[str, Any]:
    """What a LoraConfig has of rows of embeddings, and of embeddings that are trained whole and share their weight."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    tokens = choice.tokens
    if tokens is None:
        return {}
    if tokens.whole_modules:
        return {"ensure_weight_tying": True} if tokens.tied and train_head else {}
    alone = {} if choice.lora_options else {"target_modules": DUMMY_TARGET_MODULES}
    return {"trainable_token_indices": tokens.peft_indices, **alone}


def shared_fields(
    choice: Choice, model: torch.nn.Module, names: list[str], *, train_head: bool, base: str | None
) -> dict[str, Any]:
    """What every PEFT configuration has: the base model, the task and its head, and the layers by ``names``."""
    whole = [*(choice.head_modules if train_head else ()), *(option.layer for option in choice.copied_options)]
    return {
        "base_model_name_or_path": base,
        "task_type": task_type(choice.task) if train_head else None,
        "modules_to_save": whole or None,
        "target_modules": target_modules(model, names),
    }


def zero_step_tensors(
    choice: Choice, model: torch.nn.Module, factors: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of adapter_model.safetensors before the first step: B = 0, so no logit changes.

    Args:
        choice: its LoRA is initialised.
        model: the base model, for its shapes.
        factors: A [r, n_in] of every LoRA layer by name, where ``lora.initialization`` is not "default".

    Returns:
        float32 ``base_model.model.<layer>.lora_A.weight`` [r, n_in] and ``....lora_B.weight`` [n_out, r], zero; of an
        embedding ``....lora_embedding_A`` [r, rows], zero, and ``....lora_embedding_B`` [features, r], normal; of a
        convolution [r, channels, height, width] and [n_out, r, 1, 1], of stacked experts as many rows of A and columns
        of B for each (``Stack``); of DoRA ``....lora_magnitude_vector`` [n_out], the norms of the weight's rows. By
        default A is uniform in ±1/√n_in as PEFT
        initialises it (Kaiming with a = √5), and depends only on the choice's seed and the layer's name.

    Raises:
        ManifestError: see ``lora_config``; or factors are needed and not given, or have another shape.
    """
    if choice.lora.is_measured and factors is None:
        raise ManifestError(
            f"lora.initialization: {choice.lora.initialization!r} needs factors measured on data; give them "
            "(layerlens.tuning.read_factors of the run's peft directory, or initial_factors of your batches)"
        )
    places = peft_places(model, choice.lora_ranks())
    tensors = {}
    for row in choice.lora_options:
        site = lora_module(model, row)
        of_a, of_b = tensor_shapes(site, row.rank)
        width = math.prod(of_a[1:])
        if choice.lora.is_measured and not isinstance(site, Stack) and not is_embedding(site):
            a = _given_factor(row, width, factors or {})
        else:
            a = default_factor(Option(row.layer, row.method, of_a[0]), width, choice.seed)
        key = BASE_PREFIX + places[row.layer]
        if is_embedding(site):
            tensors[f"{key}.lora_embedding_A"] = a.new_zeros(of_a)
            tensors[f"{key}.lora_embedding_B"] = _normal(of_b, choice.seed, row.layer)
            continue
        tensors[f"{key}.lora_A.weight"] = a.reshape(of_a)
        tensors[f"{key}.lora_B.weight"] = a.new_zeros(of_b)
        if row.method == DORA:
            tensors[f"{key}.lora_magnitude_vector"] = row_norms(site)
    for name, indices in choice.token_indices.items():
        module: Any = find_module(model, name)
        if module.weight.is_meta:
            raise ManifestError(f"{name}: rows of tokens start from its weights, which are not in memory")
        if (rows := len(module.weight)) <= max(indices):
            raise ManifestError(
                f"{name}: has {rows} rows, and the row of token {max(indices)} should be trained; call "
                f"model.resize_token_embeddings({choice.tokens.rows if choice.tokens else max(indices) + 1}) first"
            )
        tensors[f"{BASE_PREFIX}{name}{TOKEN_ROWS}"] = module.weight.detach()[indices].clone()
    return tensors | copied_tensors(choice, model)


def copied_tensors(choice: Choice, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of modules that are trained as copies beside the method that the directory is of.

    Raises:
        ManifestError: there is no such module, or its weights are not in memory.
    """
    found = {}
    for option in choice.copied_options:
        for name, parameter in find_module(model, option.layer).named_parameters():
            if parameter.is_meta:
                raise ManifestError(f"{option.layer}: its copy starts from its weights, which are not in memory")
            found[f"{BASE_PREFIX}{option.layer}.{name}"] = parameter.detach().clone()
    return found


def default_factor(row: Option, n_in: int, seed: int) -> torch.Tensor:
    """A of one layer as PEFT draws it, float32 [r, n_in]."""
    import torch

    bound = 1.0 / math.sqrt(n_in)
    generator = torch.Generator().manual_seed(name_seed(seed, row.layer))
    return torch.empty(row.rank, n_in).uniform_(-bound, bound, generator=generator)


def _normal(shape: tuple[int, ...], seed: int, layer: str) -> torch.Tensor:
    """B of an embedding as PEFT draws it, float32."""
    import torch

    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(name_seed(seed, layer)))


def is_embedding(site: Any) -> bool:
    """Whether a module is looked up, so that PEFT's tensors have names of their own and A, not B, begins at zero."""
    import torch

    return isinstance(site, torch.nn.Embedding)


def _given_factor(row: Option, n_in: int, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if row.layer not in factors:
        raise ManifestError(f"{row.layer}: no initial factor given; there are factors of {len(factors)} layers")
    factor = factors[row.layer].detach().float().cpu().contiguous()
    if tuple(factor.shape) != (row.rank, n_in):
        raise ManifestError(f"{row.layer}: the initial factor is {tuple(factor.shape)}, needed is {(row.rank, n_in)}")
    return factor


def adapter_config_json(config: LoraConfig) -> str:
    """The text of adapter_config.json: what PEFT's save_pretrained writes, with its sets in a fixed order."""
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def base_of(model: Any) -> torch.nn.Module:
    """The model inside a PEFT model, else the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_trained_rows(model: Any) -> bool:
    """Whether PEFT trains rows of an embedding in ``model``."""
    from peft.utils.other import TrainableTokensWrapper

    return any(isinstance(module, TrainableTokensWrapper) for module in base_of(model).modules())


def injected_ranks(model: Any, *, dora: bool | None = None) -> dict[str, int]:
    """Rank of every LoRA layer that PEFT put into ``model``, by the layer's name in the base model.

    ``dora`` restricts them to those with trained magnitudes (True) or without (False).
    """
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in base_of(model).named_modules():
        if isinstance(layer, LoraLayer) and layer.active_adapters:
            adapter = layer.active_adapters[0]
            if dora is None or (adapter in layer.lora_magnitude_vector) == dora:
                found[layer_of(name, layer)] = layer.r[adapter]
    return found


def row_norms(module: Any) -> torch.Tensor:
    """‖w‖ of every output's row of a Linear or Conv1D, [n_out], at least float32, with the bits that PEFT divides by.

    PEFT's forward pass computes it in the adapter's precision, from a sum with B·A in the layout that this zero has.
    (What PEFT itself begins with has the weight's precision, so stock DoRA changes the outputs of a bfloat16 model.)
    """
    import torch
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(module).detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = weight.T if hasattr(module, "nf") else weight
    weight = weight + weight.new_zeros(weight.shape[1], weight.shape[0]).T
    norms: torch.Tensor = torch.linalg.norm(weight, dim=1)
    return norms


def layer_of(path: str, layer: Any) -> str:
    """The layer that a module of PEFT's at ``path`` adapts."""
    path = path.replace(BASE_LAYER, "")
    name = getattr(layer, "parameter_name", None) or "weight"
    return path if name == "weight" else f"{path}.{name}"


def peft_places(model: torch.nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Layer -> path of the module that PEFT puts in for it, where these layers have LoRA."""
    stacks = {layer: stack for layer in layers if (stack := stack_at(model, layer)) is not None}
    places = {layer: layer for layer in layers}
    for layer, stack in stacks.items():
        path = layer.rpartition(".")[0]
        own = [name for name, _ in stack.module.named_parameters(recurse=False) if f"{path}.{name}" in stacks]
        places[layer] = path + BASE_LAYER * (len(own) - 1 - own.index(stack.name))
    return places


def _parameters(model: torch.nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Layer -> parameter name passed to PEFT, for the layers that it adapts by their parameters."""
    stacks = [layer for layer in layers if stack_at(model, layer) is not None]
    rewritten = rewritten_by_peft(model, [layer for layer in layers if layer not in stacks])
    return {layer: layer for layer in stacks} | {layer: f"{layer}.weight" for layer in rewritten}


def name_seed(seed: int, name: str) -> int:
    """A seed for one layer: it does not depend on which other layers were chosen, nor on their order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def lora_module(model: torch.nn.Module, row: Option) -> torch.nn.Module | Stack:
    """The module, or the stacked weight, that gets the LoRA of ``row``.

    Raises:
        ManifestError: there is no such module, it cannot take LoRA, or not of this rank.
    """
    stack = stack_at(model, row.layer)
    if stack is not None:
        return stack
    module = find_module(model, row.layer)
    if reason := why_not_adaptable(row.layer, module):
        raise ManifestError(f"{row.layer}: {reason}")
    groups = lora_shape(module)[2]
    if row.rank % groups:
        raise ManifestError(
            f"{row.layer}: LoRA rank {row.rank} is not a multiple of the {groups} groups of this convolution, as PEFT "
            "requires"
        )
    return module


def why_not_adaptable(name: str, module: Any) -> str:
    """Why PEFT's LoRA cannot go on this module; "" where it can. Any kind of Linear can take it, measurable or not."""
    from layerlens.integrations.weight_matrices import is_convolution, why_no_lora

    if is_convolution(module):
        return why_no_lora(name, module)
    if is_dense(module) or is_embedding(module):
        return ""
    return (
        f"LoRA goes on a Linear, Conv1D, convolution or Embedding, this is a {type(module).__name__}; "
        "profile the model with module granularity"
    )


def lora_shape(module: Any) -> tuple[int, int, int]:
    """(n_in, n_out, groups): A is [r, n_in], B is [n_out, r / groups]; of a convolution n_in is a patch, of an
    embedding the number of its rows.
    """
    from layerlens.integrations.weight_matrices import is_convolution

    if isinstance(module, Stack):
        return module.n_in, module.n_out, 1
    if is_convolution(module):
        patch = module.in_channels * math.prod(module.kernel_size)
        return patch, module.out_channels, module.groups
    if is_embedding(module):
        return module.num_embeddings, module.embedding_dim, 1
    return (*dense_shape(module), 1)


def tensor_shapes(site: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of PEFT's A and B on a module or a stacked weight."""
    if isinstance(site, Stack):
        return (rank * site.experts, site.columns), (site.rows, rank * site.experts)
    n_in, n_out, groups = lora_shape(site)
    kernel = tuple(getattr(site, "kernel_size", ()))
    first = (rank, site.in_channels, *kernel) if kernel else (rank, n_in)
    return first, (n_out, rank // groups, *(1 for _ in kernel))


def target_modules(model: torch.nn.Module, names: list[str]) -> list[str] | str:
    """Full names; one regular expression instead where a name is also the ending of a longer one."""
    endings = tuple("." + name for name in names)
    if any(known.endswith(endings) for known, _ in model.named_modules() if known not in names):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted(names)


def _alpha(scale: float, rank: int) -> Any:  # PEFT declares int and takes any number
    alpha = scale * rank
    return int(alpha) if alpha.is_integer() else alpha  # most tools read lora_alpha as an integer
