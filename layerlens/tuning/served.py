"""A LoRA directory for a serving engine: one rank, one scale and whole fused groups, where the engine needs them.

What is served computes what PEFT computes with the original: B is multiplied by what the engine's formula leaves out,
and rows of zeros fill A and B up to one rank. Nothing is trained or loaded for it but the adapter's own tensors; the
base model's shapes are read from its configuration where a module of zeros is to be added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.engines import Engine, peft_scale
from layerlens.exceptions import ManifestError
from layerlens.integrations.peft import BASE_PREFIX
from layerlens.tuning.initialization import ADAPTER_WEIGHTS
from layerlens.tuning.storage import MODULES_FILE

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
PART = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
MERGE = "write a merged checkpoint with `layerlens export --merge`"
ORDINARY_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""``init_lora_weights`` that leave the base model's weights as they are."""

Shape = Callable[[str], tuple[int, int] | None]
"""A module's name -> (inputs, outputs); None where the base model has no such module."""


@dataclass(frozen=True)
class Adapter:
    """A PEFT directory in memory.

    Args:
        config: of adapter_config.json.
        a, b: A [r, n_in] and B [n_out, r] of each layer, as they are stored.
        others: tensors that are no LoRA of a Linear (a task head, DoRA's magnitudes, embeddings).
        modules: adapters and prefixes beside it, as "method on layer".
    """

    config: dict[str, Any]
    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]
    others: dict[str, torch.Tensor]
    modules: tuple[str, ...] = ()

    @property
    def ranks(self) -> dict[str, int]:
        return {layer: int(tensor.shape[0]) for layer, tensor in self.a.items()}

    @property
    def scales(self) -> dict[str, float]:
        """What PEFT multiplies B·A by, of each layer."""
        return {layer: peft_scale(self.config, layer, rank) for layer, rank in self.ranks.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """By their names in adapter_model.safetensors."""
        found = {f"{BASE_PREFIX}{layer}.lora_A.weight": tensor for layer, tensor in self.a.items()}
        found |= {f"{BASE_PREFIX}{layer}.lora_B.weight": tensor for layer, tensor in self.b.items()}
        return found | self.others


def read_adapter(directory: Path) -> Adapter:
    """The adapter in ``directory``: a trained directory, or a run's ``peft`` folder.

    Raises:
        ManifestError: a file is missing or damaged, or it is not LoRA.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, path = read_config(directory), directory / ADAPTER_WEIGHTS
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ManifestError(f"{path}: is missing, damaged or cut short ({error})") from error
    parts: dict[str, dict[str, torch.Tensor]] = {"A": {}, "B": {}}
    others = {}
    for name, tensor in found.items():
        match = PART.fullmatch(name)
        if match is None:
            others[name] = tensor
        else:
            parts[match["part"]][match["layer"].removeprefix(BASE_PREFIX)] = tensor
    if not parts["A"] or parts["A"].keys() != parts["B"].keys():
        odd = sorted(parts["A"].keys() ^ parts["B"].keys())
        raise ManifestError(
            f"{path}: {odd[0]} has only one of lora_A and lora_B" if odd else f"{path}: has no LoRA layer"
        )
    return Adapter(config, parts["A"], parts["B"], others, other_modules(directory))


def read_config(directory: Path) -> dict[str, Any]:
    """The LoRA configuration of ``directory``.

    Raises:
        ManifestError: it is missing or damaged, or of another method.
    """
    path = directory / ADAPTER_CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    except KeyError as error:
        raise ManifestError(f"{path}: has no {error}; give what PEFT's save_pretrained wrote for LoRA") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ManifestError(f"{path}: not a PEFT configuration ({error})") from error
    if kind != "LORA":
        raise ManifestError(f"{path}: peft_type is {kind}, and engines serve only LORA; {MERGE}")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ManifestError(f"{path}: r must be a whole number and lora_alpha a number, got {rank!r} and {alpha!r}")
    return config


def other_modules(directory: Path) -> tuple[str, ...]:
    """Adapters and prefixes in the directory or, of a run's ``peft`` folder, beside it."""
    from safetensors import SafetensorError, safe_open

    places = [directory / MODULES_FILE]
    if not (directory / "manifest.json").is_file() and (directory.parent / "manifest.json").is_file():
        places.append(directory.parent / MODULES_FILE)
    for place in places:
        if place.is_file():
            try:
                with safe_open(place, framework="pt") as file:
                    described = json.loads((file.metadata() or {})["layerlens"])
            except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
                raise ManifestError(f"{place}: damaged, or of another version ({error})") from error
            rows = [f"{entry['method']} on {entry['layer']}" for entry in described["modules"]]
            return tuple(rows + [f"weights of {name}" for name in described.get("others", ())])
    return ()


def why_not_served(engine: Engine, adapter: Adapter) -> list[str]:
    """What the engine cannot hold, each by its name; empty where it holds everything."""
    config, reasons = adapter.config, []
    if adapter.modules:
        more = f" and {len(adapter.modules) - 3} more" if len(adapter.modules) > 3 else ""
        reasons.append(f"{', '.join(adapter.modules[:3])}{more}")
    if engine.holds_all:
        return reasons
    heads = sorted(config.get("modules_to_save") or ())
    reasons += [f"fully trained modules, {', '.join(heads)} (modules_to_save)"] if heads else []
    experts = sorted(config.get("target_parameters") or ()) or [name for name in adapter.a if ".experts" in name]
    reasons += [f"LoRA on experts ({experts[0]})"] if experts else []
    if config.get("use_dora") or any("lora_magnitude" in name for name in adapter.others):
        reasons.append("DoRA (use_dora)")
    for key in ("lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication"):
        reasons += [key] if config.get(key) else []
    reasons += [f"bias: {config['bias']}"] if config.get("bias", "none") != "none" else []
    reasons += ["trained tokens (trainable_token_indices)"] if config.get("trainable_token_indices") else []
    begin = config.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower() not in ORDINARY_BEGINNINGS:
        reasons.append(f"init_lora_weights: {begin}, which changes the base model's weights")
    embeddings = [name for name in adapter.others if ".lora_embedding_" in name]
    for name in embeddings[:1]:
        reasons.append(f"LoRA on an embedding ({name.partition('.lora_')[0].removeprefix(BASE_PREFIX)})")
    wide = [layer for layer, tensor in adapter.a.items() if tensor.dim() != 2]
    reasons += [f"LoRA on a convolution ({wide[0]})"] if wide else []
    known = any((heads, experts, config.get("use_dora"), config.get("trainable_token_indices")))
    reasons += [f"the tensor {min(adapter.others)}"] if adapter.others and not known and not reasons else []
    return reasons


def served(engine: Engine, adapter: Adapter, shape: Shape, blocks: tuple[str, ...] = ()) -> Adapter:
    """The same change of the model in the form that ``engine`` reads.

    Args:
        engine: a row of ``layerlens.engines``.
        adapter: what is to be served.
        shape: of the base model's modules; asked only where an engine wants more modules than there are.
        blocks: paths of the base model's blocks; used where ``engine.every_block``.

    Raises:
        ManifestError: the engine cannot hold it; the message names what, and the way out.
    """
    if reasons := why_not_served(engine, adapter):
        others = [] if engine.holds_all else [MERGE]
        if adapter.modules:
            others = ["leave adapters and prefixes out with --lora-part", "choose LoRA alone (optimization.methods)"]
        elif not others:
            others = [MERGE]
        raise ManifestError(f"{engine.title} cannot hold {'; '.join(reasons)}: {', or '.join(others)}")
    largest = max(adapter.ranks.values())
    rank = engine.rank_for(largest)
    if rank is None:
        raise ManifestError(
            f"{engine.title} holds ranks up to {max(engine.ranks)}, and there is {largest}: {MERGE}, or choose again "
            f"with optimization.constraints.max_rank: {max(engine.ranks)}"
        )
    if engine.as_peft:
        return adapter
    missing = missing_modules(engine, adapter, shape, blocks)
    scales = adapter.scales
    scale = max(scales.values())
    a = {layer: _padded(tensor, rank, 0) for layer, tensor in adapter.a.items()}
    b = {layer: _padded(_times(tensor, scales[layer] / scale), rank, 1) for layer, tensor in adapter.b.items()}
    first = next(iter(adapter.a.values()))
    for layer, (n_in, n_out) in missing.items():
        a[layer], b[layer] = first.new_zeros(rank, n_in), first.new_zeros(n_out, rank)
    names = sorted({layer.rpartition(".")[2] for layer in a} if engine.last_names else a)
    alpha = scale * rank
    config = {
        **adapter.config,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "modules_to_save": None,
        "target_modules": names,
        "inference_mode": True,
    }
    return replace(adapter, config=config, a=a, b=b)


def missing_modules(
    engine: Engine, adapter: Adapter, shape: Shape, blocks: tuple[str, ...]
) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of the modules that ``engine`` wants beside those of ``adapter``."""
    wanted: dict[str, None] = {}
    for layer in adapter.a:
        parent, _, last = layer.rpartition(".")
        for group in engine.groups:
            if last in group:
                wanted |= {f"{parent}.{name}": None for name in group}
    if engine.every_block:
        inside: dict[str, None] = {}
        for layer in (*adapter.a, *wanted):
            block = next((block for block in blocks if layer.startswith(block + ".")), None)
            if block is not None:
                inside[layer[len(block) :]] = None
        wanted |= {block + rest: None for block in blocks for rest in inside}
    shapes = {name: shape(name) for name in wanted if name not in adapter.a}
    return {name: found for name, found in shapes.items() if found is not None}


def _padded(tensor: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    import torch

    missing = rank - tensor.shape[axis]
    if not missing:
        return tensor
    size = list(tensor.shape)
    size[axis] = missing
    return torch.cat([tensor, tensor.new_zeros(size)], axis).contiguous()


def _times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """In float32, so that nothing is rounded that was not."""
    return tensor if factor == 1.0 else tensor.float() * factor


def server_command(engine: Engine, adapter: Adapter, base: str, directory: str) -> str:
    """How the engine's server is started with the adapter."""
    rank = engine.rank_for(max(adapter.ranks.values()))
    return engine.command.format(base=base, directory=directory, rank=rank)
