"""Small models of five kinds, what their choices are predicted to cost, and how to trace one."""

from __future__ import annotations

import functools
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.cost import cost_table
from layerlens.cost.rates import DeviceProfile, Rates
from layerlens.cost.trace import trace_step
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.torchvision_import import make_torchvision_importable
from layerlens.integrations.transformers import without_cache
from layerlens.jobs.recorded_step import StepOf, recorded
from layerlens.methods import enumerate_options
from layerlens.models import NONE, Choice, CostTable, Footprint, LoraSettings, ModelSpec
from layerlens.models.step import KINDS
from layerlens.registry import TASKS
from layerlens.tuning import apply

make_torchvision_importable()
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

SAMPLES, TOKENS = 3, 48
DEVICE = DeviceProfile("made up", 1, {kind: Rates(3.0 if kind == "view" else 6.0, 8.0, 50.0) for kind in KINDS}, 4.0)
SIZES = {"lora": (2, 8), "adapter": (4,), "prefix": (4,)}


def bert() -> Any:
    config = BertConfig(
        vocab_size=80, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
    )
    return BertForSequenceClassification(config)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0))


def qwen3() -> Any:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=200, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, intermediate_size=192,
        )
    )  # fmt: skip


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def vit() -> Any:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, image_size=32,
            patch_size=4, num_labels=5,
        )
    )  # fmt: skip


MODELS = {
    "bert": (bert, "sequence-classification", ("classifier",)),
    "gpt2": (gpt2, "causal-lm", ()),
    "qwen3": (qwen3, "causal-lm", ()),
    "t5": (t5, "seq2seq", ()),
    "vit": (vit, "image-classification", ("classifier",)),
}


@dataclass(frozen=True)
class Case:
    """A model, what its choices are predicted to cost, and how to trace one."""

    name: str
    spec: ModelSpec
    table: CostTable

    @property
    def chain(self) -> list[list[int]]:
        """The entries of each layer's options, "none" left out."""
        by_layer: dict[str, list[int]] = {layer.name: [] for layer in self.spec.layers}
        for entry, option in enumerate(self.table.options):
            if option.method != NONE:
                by_layer[option.layer].append(entry)
        return [entries for entries in by_layer.values() if entries]

    def traced(self, entries: list[int]) -> tuple[float, float]:
        """(GB, ms) of the step of the model with this choice in it."""
        build, task, heads = MODELS[self.name]
        options = [self.table.options[entry] for entry in entries]
        choice = Choice.of(
            {option.layer: (option.method, option.rank) for option in options},
            lora=LoraSettings(2.0), head_modules=heads, task=task,
        )  # fmt: skip
        torch.manual_seed(0)
        model = build()
        tuned = apply(model, choice).train()
        with without_cache(tuned):
            trace = trace_step(tuned, batch_of(self.name))
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        elements = sum(parameter.numel() for parameter in trained)
        weights = sum(4 * parameter.numel() for parameter in tuned.parameters())
        return 1e-9 * (weights + 8 * elements + trace.peak_bytes), DEVICE.step_ms(trace, len(trained), elements)


def batch_of(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.zeros(SAMPLES, 3, 32, 32), "labels": torch.zeros(SAMPLES, dtype=torch.int64)}
    ids = torch.zeros(SAMPLES, TOKENS, dtype=torch.int64)
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids, "labels": ids}
    return {"input_ids": ids, "labels": ids[:, 0] if name == "bert" else ids}


@functools.cache
def case(name: str, methods: tuple[str, ...] = ("lora", "adapter", "prefix"), adapter_sites: str = "residual") -> Case:
    build, task, heads = MODELS[name]
    torch.manual_seed(0)
    model = build().requires_grad_(False)
    batch = batch_of(name)
    labels = batch.pop("labels")
    sites = {"inputs": batch} if name.startswith("vit") else {}
    spec = model_spec(PretrainedModel(model, None, "", ()), name, methods=methods, adapter_sites=adapter_sites, **sites)
    step = recorded(StepOf(model, TASKS[task], batch, labels, heads), spec)
    assert step.rates is None
    profile = LatencyProfile(batch_size=SAMPLES, sequence_length=TOKENS)
    config = OptimizationConfig(max_trainable_params=1, latency_profile=profile, methods=methods)
    step = replace(step, rates=asdict(DEVICE))
    options = enumerate_options(spec, {method: SIZES.get(method, (1,)) for method in methods})
    return Case(name, spec, cost_table(spec, Footprint(0.0, 0.0, step), options, config))


def some_choices(case: Case, count: int, seed: int) -> list[list[int]]:
    """Choices of every depth and density: some above one layer, and single layers."""
    draw, layers, found = random.Random(seed), case.chain, []
    while len(found) < count:
        lowest, share = draw.randrange(len(layers)), draw.choice((0.1, 0.5, 1.0))
        chosen = [draw.choice(layer) for layer in layers[lowest:] if draw.random() < share]
        if chosen:
            found.append(chosen)
    return found
