"""What a training step is predicted to need and to take for any choice, against a trace of that very step."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from step_cases import DEVICE, MODELS, SAMPLES, TOKENS, batch_of, bert, case, some_choices

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.cost import cost_table
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.jobs.find import find_allocation
from layerlens.jobs.recorded_step import StepOf, recorded
from layerlens.methods import enumerate_options
from layerlens.models import NONE, Footprint, UtilityTable
from layerlens.models.step import StepRecord
from layerlens.registry import TASKS


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
