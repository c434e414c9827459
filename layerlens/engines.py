"""Serving engines, and how each reads a LoRA directory: the ranks it supports, its scale, and the projections it fuses.

PEFT scales layer i by alpha_i / r_i, or by alpha_i / √r_i with rsLoRA. ``rank_pattern`` and ``alpha_pattern`` give the
values of each layer. Few engines read these patterns. Each ``Engine`` here holds the formula of the engine's loading
code, and the file with that code. ``layerlens.registry.ENGINES`` lists them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Scale = Callable[[Mapping[str, Any], str, int], float]
"""(adapter_config.json, a layer's name, the rank of its tensors) -> what B·A is multiplied by."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Projections of one module, by the last part of their names, that engines compute as one matrix."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def pattern_value(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """What ``rank_pattern`` or ``alpha_pattern`` says of a layer: the first key that matches, as in PEFT."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(found, default)


def peft_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha_i / r_i, with rsLoRA alpha_i / √r_i; the patterns say which."""
    alpha = pattern_value(config.get("alpha_pattern"), layer, config["lora_alpha"])
    own = pattern_value(config.get("rank_pattern"), layer, config["r"])
    return float(alpha) / (math.sqrt(own) if config.get("use_rslora") else own)


def file_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """lora_alpha / r for the whole file, with rsLoRA lora_alpha / √r."""
    return float(config["lora_alpha"]) / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def plain_file_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """lora_alpha / r for the whole file; rsLoRA is not read."""
    return float(config["lora_alpha"]) / float(config["r"])


def tensor_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """lora_alpha / the tensors' own rank; neither patterns nor rsLoRA are read."""
    return float(config["lora_alpha"]) / rank


def tensor_or_root_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """lora_alpha / the tensors' own rank, with rsLoRA lora_alpha / its root; patterns are not read."""
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


@dataclass(frozen=True)
class Engine:
    """One engine.

    Args:
        title: name and version of the engine, as people write it.
        scale: formula of the engine's loading code.
        source: file with this formula.
        command: command that starts the server, with the fields ``{base}``, ``{directory}`` and ``{rank}``.
        as_peft: True if the engine reads every layer's rank and alpha, and rsLoRA, as PEFT does. Nothing is then
            padded.
        holds_all: True if the engine reads everything that PEFT writes, including task heads and DoRA.
        ranks: ranks that the engine's command line accepts. Adapters are padded to one of them. Empty if any rank
            works.
        fuses: True if the engine needs all projections of a fused group, or none.
        every_block: True if each kind of projection must be in every block, because the engine drops it otherwise.
        last_names: True if the engine compares ``target_modules`` with the last part of a module's name.
        note: one sentence for the README of the exported directory; "" for none.
    """

    title: str
    scale: Scale
    source: str
    command: str
    as_peft: bool = False
    holds_all: bool = False
    ranks: tuple[int, ...] = ()
    fuses: bool = False
    every_block: bool = False
    last_names: bool = False
    note: str = ""

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The fused groups that must be complete."""
        return FUSED if self.fuses else ()

    def allows(self, rank: int) -> bool:
        """Whether the engine supports this rank without padding."""
        return not self.ranks or (rank <= max(self.ranks) if self.as_peft else rank in self.ranks)

    def rank_for(self, rank: int) -> int | None:
        """The smallest rank of the command line that is at least ``rank``; None if there is none."""
        return min((allowed for allowed in self.ranks if allowed >= rank), default=None) if self.ranks else rank


PEFT = Engine(
    "PEFT",
    peft_scale,
    "peft/tuners/lora/layer.py",
    'python: peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{directory}")',
    as_peft=True,
    holds_all=True,
)
VLLM = Engine(
    "vLLM 0.33 or newer",
    peft_scale,
    "vllm/lora/peft_helper.py of 0.33.0",
    "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={directory}",
    as_peft=True,
    ranks=VLLM_RANKS,
)
VLLM_LEGACY = Engine(
    "vLLM before 0.33",
    file_scale,
    "vllm/lora/peft_helper.py of 0.8",
    VLLM.command,
    ranks=VLLM_RANKS[1:],
)
SGLANG = Engine(
    "SGLang",
    plain_file_scale,
    "sglang/srt/lora/lora.py of 0.5.23",
    "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
    "--lora-paths tuned={directory}",
    fuses=True,
)
TENSORRT_LLM = Engine(
    "TensorRT-LLM",
    tensor_or_root_scale,
    "tensorrt_llm/lora_manager.py",
    'python: LLM("{base}", lora_config=LoraConfig(lora_dir=["{directory}"], max_lora_rank={rank})), and '
    'LoRARequest("tuned", 1, "{directory}") with every prompt',
    fuses=True,
    last_names=True,
)
LLAMA_CPP = Engine(
    "llama.cpp",
    tensor_scale,
    "convert_lora_to_gguf.py and src/llama-adapter.h",
    "python convert_lora_to_gguf.py {directory} --base {base} --outfile tuned.gguf, then "
    "llama-server -m BASE.gguf --lora tuned.gguf",
    note="`layerlens export --to gguf` writes the adapter's GGUF without llama.cpp, for the commonest architectures.",
)
OLLAMA = Engine(
    "Ollama",
    tensor_scale,
    "convert/convert_adapter.go, and llama.cpp's src/llama-adapter.h",
    "ollama create tuned -f Modelfile, where Modelfile says: FROM BASE.gguf, and: ADAPTER ./adapter.gguf",
    note="Give Ollama the adapter as GGUF (`layerlens export --to gguf`, or llama.cpp's convert_lora_to_gguf.py): the "
    "rows of Llama's q and k are in another order there, and the file has them so.",
)
LORAX = Engine(
    "LoRAX",
    file_scale,
    "server/lorax_server/adapters/lora.py",
    "lorax-launcher --model-id {base} --adapter-source local, and adapter_id {directory} with every request",
    ranks=(8, 16, 32, 64, 128),
    every_block=True,
)
ANY = Engine(
    "any engine",
    plain_file_scale,
    "all of the others",
    VLLM.command,
    ranks=(8, 16, 32, 64, 128, 256, 320, 512),
    fuses=True,
    every_block=True,
    last_names=True,
    note="LoRAX holds ranks up to 128; Ollama and llama.cpp take the adapter as GGUF (`layerlens export --to gguf`).",
)


def read_otherwise(alpha_over_r: float, ranks: Mapping[str, int], *, rslora: bool) -> list[str]:
    """Titles of the engines that scale a layer of a run's own ``peft`` directory otherwise than PEFT.

    Args:
        alpha_over_r: of the choice.
        ranks: rank of each layer that has LoRA.
        rslora: whether it is scaled by alpha/√r.
    """
    from layerlens.registry import ENGINES

    largest = max(ranks.values(), default=1)
    keys = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items()}
    alphas = {} if rslora else {key: alpha_over_r * rank for key, rank in keys.items()}
    config = {
        "r": largest, "lora_alpha": alpha_over_r * largest, "rank_pattern": keys, "alpha_pattern": alphas,
        "use_rslora": rslora,
    }  # fmt: skip

    def same(engine: Engine) -> bool:
        return all(
            math.isclose(engine.scale(config, layer, rank), peft_scale(config, layer, rank), rel_tol=1e-6)
            for layer, rank in ranks.items()
        )

    return [ENGINES[name].title for name in ENGINES if name != "any" and not same(ENGINES[name])]
