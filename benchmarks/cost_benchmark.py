"""Predicted against measured costs of a training step: 14 choices on a BERT-shaped and a GPT-2-shaped model.

    python benchmarks/cost_benchmark.py [--cpu-time] [--seconds 2] [--output benchmarks/results/costs.json]

Calibrates first, then measures, one thread. ``--cpu-time`` counts processor time, for a machine that others use.
Demands (median absolute error): parameters exact, FLOPs 2 %, peak memory 10 %, step time 15 %.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerlens.cost.device import calibrate
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.costs import compare_costs
from layerlens.models import Choice, LoraSettings, Option

ATTENTION = ("query", "key", "value", "query_key_value")
CHOICES: dict[str, tuple[dict[str, tuple[str, int]], int]] = {
    "one matrix of the last block": ({"ffn_down": ("lora", 4)}, 5),
    "lora 8, attention": (dict.fromkeys(("query", "value", "query_key_value"), ("lora", 8)), 0),
    "lora 16, all linear": (
        dict.fromkeys((*ATTENTION, "attention_output", "ffn_up", "ffn_down"), ("lora", 16)),
        0,
    ),
    "lora 2, upper half": (dict.fromkeys(("query", "query_key_value", "ffn_up", "ffn_down"), ("lora", 2)), 3),
    "adapter 16": ({"attention_output": ("adapter", 16), "ffn_down": ("adapter", 16)}, 0),
    "prefix 8": ({"attention": ("prefix", 8)}, 0),
    "mixed": ({"ffn_up": ("lora", 4), "ffn_down": ("adapter", 8), "attention": ("prefix", 4)}, 2),
}  # fmt: skip


def build(architecture: str) -> tuple[Any, str, list[str]]:
    """(model, task, head modules) of the shape of MiniLM-L6, or of a GPT-2 of the same width."""
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if architecture == "bert":
        config: Any = BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, num_labels=3
        )
        return BertForSequenceClassification(config), "sequence-classification", ["classifier"]
    config = GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=8000, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), "causal-lm", []


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/costs.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    profile = calibrate(cpu_time=arguments.cpu_time)
    rows = []
    for architecture, batch, tokens in (("bert", 8, 128), ("gpt2", 4, 128)):
        for name, (choice, first) in CHOICES.items():
            model, task, heads = build(architecture)
            model.eval().requires_grad_(False)
            pretrained = PretrainedModel(model, None, "", ())
            options = []
            for layer in model_spec(pretrained, architecture).layers:
                method, rank = choice.get(layer.role, ("none", 0)) if (layer.block or 0) >= first else ("none", 0)
                options.append(Option(layer.name, method, rank))
            plan = Choice(tuple(options), lora=LoraSettings(2.0), head_modules=tuple(heads), task=task)
            found = compare_costs(
                plan, pretrained, profile, batch_size=batch, sequence_length=tokens,
                seconds=arguments.seconds, cpu_time=arguments.cpu_time,
            )  # fmt: skip
            rows.append({"model": architecture, "choice": name, **{key: asdict(each) for key, each in found.items()}})
            errors = {key: f"{100 * each.relative_error:+.2f} %" for key, each in found.items()}
            print(architecture, name, errors, flush=True)
    medians = {
        key: float(np.median([abs(row[key]["predicted"] / row[key]["measured"] - 1.0) for row in rows]))
        for key in rows[0]
        if key not in ("model", "choice")
    }
    print("median absolute error:", {key: f"{100 * value:.2f} %" for key, value in medians.items()})
    result = {"cpu_time": arguments.cpu_time, "device": asdict(profile), "median_error": medians, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
