"""What a training step is predicted to need and to take for any choice, against a trace of that very step."""

from __future__ import annotations

import functools
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
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
from layerlens.jobs.solve import find_allocation
from layerlens.methods import enumerate_options
from layerlens.models import NONE, Choice, CostTable, Footprint, LoraSettings, ModelSpec, UtilityTable
from layerlens.models.step import KINDS, StepRecord
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


@pytest.mark.parametrize("name", MODELS)
def test_the_prediction_of_any_choice_is_what_its_step_does(name: str):
    this = case(name)
    rows = []
    for entries in some_choices(this, 6, seed=3):
        predicted, bound = this.table.total(np.array(entries)), this.table.bound(np.array(entries))
        rows.append((predicted["vram_gb"], predicted["step_ms"], *this.traced(entries), bound["step_ms"]))
    gb, ms, traced_gb, traced_ms, bound_ms = np.array(rows).T
    assert (gb >= traced_gb).all()
    # What is kept is exact. What an option has alive for a moment is counted beside all that the frozen model has alive
    # during that operation: too much by two outputs of the widest layer, at most.
    widest = max(layer.n_out * (layer.positions or TOKENS) for layer in this.spec.layers)
    assert (gb - traced_gb <= 1e-9 * 4 * 2 * SAMPLES * widest).all()
    assert np.median(gb / traced_gb) <= 1.02
    assert np.abs(ms / traced_ms - 1).max() <= 0.20
    assert np.median(np.abs(ms / traced_ms - 1)) <= 0.10
    assert (ms <= bound_ms * (1 + 1e-12)).all()  # causes are widened, never narrowed


def test_what_an_adapter_reads_and_what_others_read_in_its_place_are_two():
    """An adapter after the query keeps the Linear's output, and a prefix in the same block what the adapter made."""
    this = case("bert", adapter_sites="all")
    wanted = {"attention.self": "prefix", "attention.self.query": "adapter", "attention.self.key": "adapter"}
    found = [
        entry
        for entry, option in enumerate(this.table.options)
        if wanted.get(option.layer.partition("layer.1.")[2]) == option.method
    ]
    assert len(found) == len(wanted)
    for entries in (found, *some_choices(this, 3, seed=1)):
        assert 1.0 <= this.table.total(np.array(entries))["vram_gb"] / this.traced(entries)[0] <= 1.02


@pytest.mark.parametrize("method", ["dora", "ia3", "bitfit", "ln_tuning"])
def test_the_memory_of_no_method_is_predicted_below_what_its_step_needs(method: str):
    this = case("bert", (method,))
    for entries in [[layer[-1] for layer in this.chain], some_choices(this, 3, seed=3)[-1]]:
        traced_gb, _ = this.traced(entries)
        assert 1.0 <= this.table.total(np.array(entries))["vram_gb"] / traced_gb <= 1.10


def test_no_choice_of_the_solver_needs_more_than_its_budget_of_memory():
    """Its sums are bounds for many choices; should one not hold, the problem is solved again with a higher base."""
    this = case("qwen3")
    utility = np.array([0.0 if x.method == NONE else 1.0 + x.rank for x in this.table.options])
    utilities = UtilityTable(this.table.options, utility, "made up", "of nothing")
    amount, _ = this.table.least["vram_gb"]
    for share in (1.3, 1.8, 2.5):
        too_low = replace(this.table, base=this.table.base | {"vram_gb": 0.9 * amount})
        for table in (this.table, too_low):
            config = OptimizationConfig(max_vram_gb=share * amount)
            found = find_allocation(this.spec, utilities, table, config, seed=0, threads=1)
            entries = found.problem.entries(found.allocation.choice)
            assert found.allocation.value > 0.0
            assert table.total(entries)["vram_gb"] <= share * amount


def test_a_base_that_is_too_high_costs_no_score():
    """What the answer is counted too much by is given back, so that the budget is used."""
    this = case("bert")
    utility = np.array([0.0 if x.method == NONE else 1.0 + x.rank for x in this.table.options])
    utilities = UtilityTable(this.table.options, utility, "made up", "of nothing")
    amount, _ = this.table.least["vram_gb"]
    config = OptimizationConfig(max_vram_gb=1.8 * amount)
    values = []
    for factor in (1.0, 1.2):
        table = replace(this.table, base=this.table.base | {"vram_gb": factor * this.table.base["vram_gb"]})
        found = find_allocation(this.spec, utilities, table, config, seed=0, threads=1)
        entries = found.problem.entries(found.allocation.choice)
        assert table.total(entries)["vram_gb"] <= 1.8 * amount
        values.append(found.allocation.value)
    assert values[1] == pytest.approx(values[0], rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_what_lies_below_the_lowest_layer_is_free_and_shared_inputs_are_paid_once(name: str):
    this = case(name)
    lora = [entry for layer in this.chain for entry in layer if this.table.options[entry].rank == 2]
    alone = [this.table.total(np.array([entry]))["vram_gb"] for entry in lora]
    together = this.table.total(np.array(lora))["vram_gb"]
    assert max(alone) < together < sum(alone)
    step = [this.table.total(np.array([entry]))["step_ms"] for entry in lora]
    first, last = (step[:4], step[-4:]) if name != "t5" else (step[:4], step[-8:])
    assert min(first) > max(last)


def test_query_key_and_value_keep_one_tensor_and_their_block_is_paid_for_once():
    this = case("bert")
    entry = {(option.layer, option.method, option.rank): number for number, option in enumerate(this.table.options)}
    place = "bert.encoder.layer.2.attention.self."
    q, k, v = (entry[f"{place}{part}", "lora", 2] for part in ("query", "key", "value"))
    assert this.table.step is not None
    use = this.table.step
    own = 1e-9 * (use.fixed__o + use.kept__o)  # its gradient comes after the peak
    all_three, two = (this.table.total(np.array(chosen))["vram_gb"] for chosen in ([q, k, v], [q, k]))
    # v adds its own parameters, A h, and the attention weights, which its gradient alone needs; and no input.
    weights = 1e-9 * 4 * SAMPLES * 4 * TOKENS**2
    assert all_three - two == pytest.approx(own[v] + weights, rel=1e-9)


def test_a_record_is_kept_in_a_statistics_file_bit_for_bit(tmp_path):
    this = case("bert")
    build, task, heads = MODELS["bert"]
    batch = batch_of("bert")
    labels = batch.pop("labels")
    step = recorded(StepOf(build().requires_grad_(False), TASKS[task], batch, labels, heads), this.spec)
    again = StepRecord.of(step.numbers(), {name: x.astype(np.float64) for name, x in step.arrays().items()})
    assert again.numbers() == step.numbers()
    for name, array in step.arrays().items():
        assert np.array_equal(array, getattr(again, name))
        assert array.dtype == getattr(again, name).dtype


def test_recording_changes_nothing_of_the_model():
    torch.manual_seed(0)
    model = bert()
    model.classifier.weight.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    spec = model_spec(PretrainedModel(model, None, "", ()), "bert")
    batch = batch_of("bert")
    recorded(StepOf(model.eval(), TASKS["sequence-classification"], batch, batch.pop("labels"), ("classifier",)), spec)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_could_not_be_measured_change_nothing_for_the_others():
    build, task, heads = MODELS["bert"]
    torch.manual_seed(0)
    model = build().requires_grad_(False)
    batch = batch_of("bert")
    labels = batch.pop("labels")
    spec = model_spec(PretrainedModel(model, None, "", ()), "bert", methods=("lora",))
    step = replace(recorded(StepOf(model, TASKS[task], batch, labels, heads), spec), rates=asdict(DEVICE))
    left = spec.without({layer.name: "no gradient" for layer in spec.layers if ".layer.0." in layer.name})
    profile = LatencyProfile(batch_size=SAMPLES, sequence_length=TOKENS)
    config = OptimizationConfig(max_trainable_params=1, latency_profile=profile, methods=("lora",))
    found = []
    for one in (spec, left):
        options = enumerate_options(one, {"lora": (2,)})
        table = cost_table(one, Footprint(0.0, 0.0, step), options, config)
        chosen = [n for n, option in enumerate(options) if option.rank and ".layer.0." not in option.layer]
        totals = [table.total(np.array(part)) for part in (chosen, chosen[-2:])]
        found.append([(total["vram_gb"], total["step_ms"]) for total in totals])
    assert found[1] == [pytest.approx(one, rel=1e-12) for one in found[0]]  # the same numbers, in another order
