"""A manifest's figures are the same for every instruction set that this machine has, also where ghost norms decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from layerlens.config import RunConfig
from layerlens.kernels import _dispatch, ghost_norms
from layerlens.models import LayerStatistics, ModelStatistics
from layerlens.pipeline import optimize_statistics
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes

SAMPLES, TOKENS, WIDTH = 24, 33, 75


def with_traces(statistics: ModelStatistics, isa: str) -> tuple[ModelStatistics, list[float]]:
    """The same with traces, and the signals that follow, from ghost norms that this instruction set summed."""
    rng = np.random.default_rng(0)
    layers, traces = [], []
    for layer in statistics.layers:
        made = {}
        for method, one in layer.by_method.items():
            h__nti, d__nto = rng.standard_normal((2, SAMPLES, TOKENS, WIDTH)).astype(np.float32)
            _dispatch._force(isa)
            trace = float(ghost_norms(h__nti, d__nto, threads=1).mean()) * 1e-4
            _dispatch._force(None)
            traces.append(trace)
            made[method] = replace(one, trace=trace, signal=trace * 0.7)
        layers.append(LayerStatistics(layer.layer, made))
    return replace(statistics, layers=tuple(layers)), traces


@pytest.mark.skipif(len(_dispatch.available_isas()) < 2, reason="this machine has one instruction set")
def test_figures_do_not_depend_on_the_instruction_set(settings, saved_statistics: Path, tmp_path: Path):
    settings["profiling"]["utility_model"] = "signal"
    config = RunConfig.model_validate(settings)
    spec, statistics = load_statistics(saved_statistics)
    found, traces = {}, {}
    for isa in _dispatch.available_isas():
        of_isa, traces[isa] = with_traces(statistics, isa)
        path = tmp_path / f"{isa}.safetensors"
        path.write_bytes(statistics_to_bytes(spec, of_isa))
        found[isa] = optimize_statistics(path, config, base_dir=tmp_path).manifest.fields()
        assert traces[isa] == pytest.approx(traces["scalar"], rel=1e-6)  # what each is held to against its twin
        assert found[isa] == found["scalar"]
    assert traces["scalar"] != traces[_dispatch.available_isas()[-1]]  # so the digits are what makes them equal
