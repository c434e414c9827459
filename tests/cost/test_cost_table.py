"""Costs against counts made by hand, and the roofline against its formula."""

from __future__ import annotations

import numpy as np
import pytest

from layerlens.config import LatencyProfile, OptimizationConfig
from layerlens.cost import base_use, cost_table
from layerlens.cost.rates import NOMINAL, Roofline
from layerlens.methods import enumerate_options, trainable_params
from layerlens.models import RESOURCES, LayerSpec, ModelSpec, ModelStatistics, Option

SPEC = ModelSpec(
    "m",
    1000,
    [
        LayerSpec("att", 8, "attention", n_in=8, n_out=8, d_kv=4, num_heads=2, methods=("prefix",)),
        LayerSpec("fc", 8, "linear", n_in=8, n_out=32, methods=("lora", "adapter")),
    ],
)
STATISTICS = ModelStatistics((), 2, 20, 1.0, activation_bytes=100.0, forward_flops=2000.0)
PROFILE = LatencyProfile(batch_size=2, sequence_length=5, peak_gflops=1, memory_bandwidth_gb_s=1, op_overhead_us=1000)


def config(**values: object) -> OptimizationConfig:
    return OptimizationConfig(max_trainable_params=10, latency_profile=PROFILE, **values)


def column(option: Option, **values: object) -> dict[str, float]:
    table = cost_table(SPEC, STATISTICS, [option], config(**values))
    return dict(zip(RESOURCES, table.cost__ro[:, 0], strict=True))


def test_trainable_parameters_follow_the_formulas():
    att, fc = SPEC.layers
    assert trainable_params(fc, "lora", 3) == 3 * (8 + 32)
    assert trainable_params(fc, "adapter", 3) == 2 * 32 * 3 + 3 + 32
    assert trainable_params(att, "prefix", 3) == 2 * 3 * 4 + 2
    assert trainable_params(fc, "none", 0) == 0


def test_options_are_none_first_and_only_what_a_layer_takes():
    options = enumerate_options(SPEC, {"lora": (4, 1, 4), "prefix": (2,)})
    assert [(o.layer, o.method, o.rank) for o in options] == [
        ("att", "none", 0),
        ("att", "prefix", 2),
        ("fc", "none", 0),
        ("fc", "lora", 1),
        ("fc", "lora", 4),
    ]


def test_lora_costs():
    found = column(Option("fc", "lora", 2))
    assert found["flops"] == 10 * 2 * 2 * (8 + 32)
    # weight + gradient + two Adam moments for each parameter, and the kept h (8) and A h (2) of 10 tokens
    assert found["vram_gb"] == pytest.approx(1e-9 * (16 * 80 + 4 * 10 * (8 + 2)))
    # four operations of 1 ms overhead; at 1 GFLOP/s and 1 GB/s the work itself is some µs
    assert 4.0 < found["latency_ms"] < 4.01


def test_adapter_and_prefix_flops():
    assert column(Option("fc", "adapter", 2))["flops"] == 10 * 4 * 2 * 32
    assert column(Option("att", "prefix", 2))["flops"] == 10 * 4 * 2 * 8


def test_sgd_needs_no_moments():
    adam, sgd = (column(Option("fc", "lora", 2), optimizer=name)["vram_gb"] for name in ("adamw", "sgd"))
    assert adam - sgd == pytest.approx(1e-9 * 8 * 80)


def test_none_costs_nothing_and_more_rank_never_costs_less():
    options = enumerate_options(SPEC, {"lora": (1, 2, 4, 8), "adapter": (1, 2, 4), "prefix": (1, 2, 4)})
    table = cost_table(SPEC, STATISTICS, options, config())
    for index, option in enumerate(options):
        if option.method == "none":
            assert not table.cost__ro[:, index].any()
        elif options[index - 1].method == option.method:
            assert np.all(table.cost__ro[:, index] >= table.cost__ro[:, index - 1])


def test_base_use_is_measured_where_it_can_be_and_estimated_from_parameters_otherwise():
    measured = base_use(SPEC, STATISTICS, config())
    assert measured["vram_gb"] == pytest.approx(1e-9 * (4000 + 100 * 10))
    # 20,000 FLOPs at 1 GFLOP/s beat 5,000 bytes at 1 GB/s; then 1 ms for the call and for each of the two layers
    assert measured["latency_ms"] == pytest.approx(0.02 + 3.0)
    assert measured["trainable_params"] == measured["flops"] == 0.0
    estimated = base_use(SPEC, None, config())
    assert estimated["vram_gb"] == pytest.approx(1e-9 * (4000 + 4 * 16 * 10))


def test_the_roofline_takes_the_slower_side_and_the_users_figures():
    roofline = Roofline.of(LatencyProfile(device_type="gpu", peak_gflops=2.0, op_overhead_us=0))
    assert roofline.bandwidth_gb_s == NOMINAL["gpu"][1]
    assert roofline.time_ms(flops=4e6, n_bytes=1) == pytest.approx(2.0)
    assert roofline.time_ms(flops=1, n_bytes=3e9) == pytest.approx(2.0)
    assert Roofline.of(LatencyProfile(op_overhead_us=0)).time_ms(0, 0) == 0.0
