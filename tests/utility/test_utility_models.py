"""Every utility model against its formula, worked out by hand on small statistics."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerlens.config import ProfilingConfig
from layerlens.exceptions import ActivationCacheError, ProfilingError
from layerlens.methods import enumerate_options
from layerlens.models import LayerSpec, LayerStatistics, MethodStatistics, ModelSpec, ModelStatistics, Option
from layerlens.registry import UTILITY_MODELS
from layerlens.utility import (
    metrics_from_cache,
    model_for,
    needed_statistics,
    utility_table,
    weighted_table,
)

AUTO = "auto"
RANKS = {"lora": (1, 4), "adapter": (4,), "prefix": (1, 2)}
SPEC = ModelSpec(
    "m",
    100,
    [
        LayerSpec("att", 8, "attention", num_heads=2, methods=("prefix",), block=0),
        LayerSpec("fc", 8, "linear", methods=("lora", "adapter"), block=0),
    ],
)
STATISTICS = ModelStatistics(
    (
        LayerStatistics("att", {"prefix": MethodStatistics(9.0, 20.0, 4.0, 0.5, np.array([3.0, 2.0, 1.0, -1.0]))}),
        LayerStatistics(
            "fc",
            {
                "lora": MethodStatistics(16.0, 50.0, 9.0, 2.0, np.array([8.0, 4.0, -2.0])),
                "adapter": MethodStatistics(4.0, 50.0, -1.0, 8.0, np.array([2.0])),
            },
        ),
    ),
    n_samples=10,
    n_tokens=100,
    mean_loss=1.0,
    activation_bytes=0.0,
    forward_flops=0.0,
)
OPTIONS = enumerate_options(SPEC, RANKS)


def utilities(name: str) -> dict[tuple[str, str, int], float]:
    table = utility_table(name, SPEC, STATISTICS, OPTIONS, {"gradient_energy": 1.0})
    return {(o.layer, o.method, o.rank): float(u) for o, u in zip(table.options, table.utility, strict=True)}


def test_signal_is_the_root_of_the_noise_corrected_energy_times_the_root_of_the_rank():
    assert utilities("signal") == {
        ("att", "none", 0): 0.0,
        # energy 4 at input mean square 0.5, taken at the block's LoRA input mean square 2: 4 · 4 = 16
        ("att", "prefix", 1): 4.0,
        ("att", "prefix", 2): pytest.approx(4.0 * np.sqrt(2)),
        ("fc", "none", 0): 0.0,
        ("fc", "lora", 1): 3.0,
        ("fc", "lora", 4): 6.0,
        ("fc", "adapter", 4): 0.0,  # nothing is left of its energy once the noise is taken off
    }


def test_tempered_is_half_way_between_signal_and_even_spreading():
    found = utilities("tempered")
    assert found["att", "prefix", 1] == 2.0  # (4 · 4)^¼
    assert found["fc", "lora", 4] == pytest.approx(9.0**0.25 * 2.0)
    assert found["fc", "adapter", 4] == 0.0


def test_tempered_energy_leaves_the_noise_in():
    found = utilities("tempered_energy")
    assert found["fc", "lora", 1] == 2.0  # 16^¼
    assert found["fc", "adapter", 4] == pytest.approx((4.0 * 2.0 / 8.0) ** 0.25 * 2.0)


def test_tempered_log_counts_the_parameters_of_a_rank():
    found = utilities("tempered_log")
    assert found["fc", "lora", 1] == pytest.approx(2.0 * 16 * np.log(2))  # 16^¼, 8 + 8 parameters a rank
    assert found["fc", "lora", 4] == pytest.approx(2.0 * 16 * np.log(5))
    # (4 · 2/8)^¼ = 1; 2 · 8 parameters and a bias a unit of width
    assert found["fc", "adapter", 4] == pytest.approx(17 * np.log(5))
    assert found["att", "prefix", 2] == pytest.approx((9.0 * 4.0) ** 0.25 * 16 * np.log(3))
    assert found["fc", "none", 0] == 0.0


@given(st.lists(st.tuples(st.floats(1.0, 100.0), st.integers(9, 40)), min_size=3, max_size=6), st.integers(2, 8))
def test_tempered_log_gives_uniform_lora_where_energies_are_equal(layers, rank):
    """The marginal value of a rank for its parameters is E^¼ · log((r + 2)/(r + 1)): the same in every layer."""
    sizes = [size for _, size in layers]
    specs = [LayerSpec(str(n), 8, "linear", n_in=s, n_out=2 * s, methods=("lora",)) for n, s in enumerate(sizes)]
    spec = ModelSpec("m", 1, specs)
    found = ModelStatistics(
        tuple(LayerStatistics(str(n), {"lora": MethodStatistics(e, 1.0, 1.0, 1.0)}) for n, (e, _) in enumerate(layers)),
        10, 100, 1.0, 0.0, 0.0,
    )  # fmt: skip
    options = enumerate_options(spec, {"lora": (rank, rank + 1)})
    table = utility_table("tempered_log", spec, found, options, {})
    value = {(o.layer, o.rank): u for o, u in zip(table.options, table.utility, strict=True)}
    for n, (energy, size) in enumerate(layers):
        step = value[str(n), rank + 1] - value[str(n), rank]
        assert step / (3 * size) == pytest.approx(energy**0.25 * np.log((rank + 2) / (rank + 1)), rel=1e-9)


def test_gradient_is_the_same_law_with_the_noise_left_in():
    found = utilities("gradient")
    assert found["fc", "lora", 4] == 8.0
    assert found["fc", "adapter", 4] == pytest.approx(np.sqrt(4.0 * 2.0 / 8.0) * 2.0)


def test_whitened_sums_half_of_the_positive_part_of_the_spectrum():
    found = utilities("whitened")
    assert found["fc", "lora", 1] == 4.0
    assert found["fc", "lora", 4] == 6.0
    assert found["att", "prefix", 1] == 2.5  # two heads, so two directions for each pair
    assert found["att", "prefix", 2] == 3.0


def test_uniform_sees_ranks_only():
    assert utilities("uniform")["att", "prefix", 1] == utilities("uniform")["fc", "lora", 1] == 1.0


def test_every_model_that_can_be_configured_is_there():
    offered = set(ProfilingConfig.model_json_schema()["properties"]["utility_model"]["enum"])
    assert {model.name for model in UTILITY_MODELS.values()} == offered == set(UTILITY_MODELS)


def test_auto_spreads_where_the_budget_pays_for_rank_2_everywhere():
    # fc takes 8 + 8 parameters a rank; the attention layer cannot take LoRA
    assert model_for(AUTO, SPEC, 31) == "tempered_energy"
    assert model_for(AUTO, SPEC, 32) == model_for(AUTO, SPEC, None) == "tempered_log"
    assert model_for("signal", SPEC, 31) == "signal"
    prefixes = ModelSpec("m", 100, [SPEC.layers[0]])  # 2 · 8 parameters a pair
    assert model_for(AUTO, prefixes, 31) == "tempered_energy"
    assert model_for(AUTO, prefixes, 32) == "tempered_log"
    for name in ("tempered_energy", "tempered_log"):
        assert set(needed_statistics(name, {})) <= set(needed_statistics(AUTO, {}))


def test_whitened_without_spectra_says_what_to_do():
    bare = ModelStatistics(
        (LayerStatistics("fc", {"lora": MethodStatistics(1.0, 1.0, 1.0, 1.0)}),), 10, 100, 1.0, 0.0, 0.0
    )
    with pytest.raises(
        ProfilingError, match=r"profiling\.utility_model: 'whitened' needs the statistic 'whitened_spectrum'"
    ):
        utility_table("whitened", SPEC, bare, [Option("fc", "lora", 1)], {})


LAYERS = ModelSpec("m", 1, [LayerSpec(name, 8) for name in "abc"])


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=3, max_size=3),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_weighted_scores_follow_the_formula_and_grow_with_rank(values, energy_weight, fisher_weight):
    cache = {name: {"grad_norm": g, "fisher_trace": f} for name, (g, f) in zip("abc", values, strict=True)}
    weights = {"gradient_energy": energy_weight, "fisher": fisher_weight}
    options = enumerate_options(LAYERS, {"lora": (1, 2, 8)})
    table = weighted_table(LAYERS, metrics_from_cache(cache), options, weights)
    energies = np.array([g * g for g, _ in values])
    fishers = np.array([f for _, f in values])
    share = [x / x.max() if x.max() > 0 else x for x in (energies, fishers)]
    score = (energy_weight * share[0] + fisher_weight * share[1]) / (energy_weight + fisher_weight)
    for option, utility in zip(options, table.utility, strict=True):
        expected = score["abc".index(option.layer)] * np.sqrt(option.rank / 8)
        assert utility == pytest.approx(expected, rel=1e-12, abs=1e-300)
    assert np.all((table.utility >= 0) & (table.utility <= 1 + 1e-12))


def test_a_metric_that_no_layer_has_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture):
    cache = {name: {"grad_norm": 1.0, "fisher_trace": 2.0} for name in "abc"}
    options = enumerate_options(LAYERS, {"lora": (1,)})
    both = {"gradient_energy": 0.5, "proxy_eval": 0.5}
    with caplog.at_level(logging.WARNING, logger="layerlens"):
        table = weighted_table(LAYERS, metrics_from_cache(cache), options, both)
    assert "proxy_eval" in caplog.text
    alone = weighted_table(LAYERS, metrics_from_cache(cache), options, {"gradient_energy": 1.0})
    assert np.array_equal(table.utility, alone.utility)


def test_a_metric_of_some_layers_only_is_refused_by_layer():
    cache = {"a": {"grad_norm": 1.0}, "b": {}, "c": {"grad_norm": 1.0}}
    options = enumerate_options(LAYERS, {"lora": (1,)})
    with pytest.raises(ActivationCacheError, match=r"^b: no value for gradient_energy \('grad_norm'\)"):
        weighted_table(LAYERS, metrics_from_cache(cache), options, {"gradient_energy": 1.0})
    with pytest.raises(ActivationCacheError, match="no layer has any of the weighted metrics; give fisher_trace"):
        weighted_table(LAYERS, metrics_from_cache(cache), options, {"fisher": 1.0})
