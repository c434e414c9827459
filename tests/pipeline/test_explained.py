"""Why a layer got its option: from the solution of a run, and from what the run left on disk."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from layerlens.config import RunConfig
from layerlens.exceptions import ActivationCacheError, ConfigurationError
from layerlens.jobs.explained import explained, solution_of
from layerlens.jobs.solve import find_allocation, option_tables
from layerlens.manifest import read_manifest
from layerlens.pipeline import optimize_statistics
from layerlens.profiling.statistics_file import load_statistics

LAYER = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture
def parts(saved_statistics):
    return read_manifest(saved_statistics.parent / "manifest.json"), *load_statistics(saved_statistics)


def solved_again(spec, statistics, settings):
    config = RunConfig.model_validate(settings)
    utilities, costs = option_tables(spec, statistics, config)
    return find_allocation(spec, utilities, costs, config.optimization, seed=0, threads=1)


def test_what_the_disk_says_is_what_the_solver_said(parts, settings):
    manifest, spec, statistics = parts
    solution, recorded = solved_again(spec, statistics, settings), solution_of(manifest, spec, statistics)
    assert recorded.explanations == solution.explanations
    for layer in spec.layers:
        assert explained(recorded, layer.name) == explained(solution, layer.name)


def test_figures_are_those_of_the_manifest_and_of_arithmetic(parts):
    manifest, spec, statistics = parts
    solution = solution_of(manifest, spec, statistics)
    for row in manifest.allocations:
        told = explained(solution, row.layer)
        chosen = told.chosen
        assert (chosen.method, chosen.rank, chosen.utility) == (row.method, row.rank, row.utility)
        assert chosen.score == row.total_score
        assert (chosen.costs["trainable_params"], chosen.costs["vram_gb"]) == (row.cost, row.vram)
        for one in told.options:
            paid = sum(price * one.costs[name] for name, price in told.prices.items())
            assert one.net_score == pytest.approx(one.score - paid, rel=1e-12, abs=1e-15)
        others = [one.net_score for one in told.options if one is not chosen]
        assert told.runner_up is not None
        assert told.runner_up.net_score == max(others)
        assert told.explanation.value_to_flip == pytest.approx(chosen.net_score - max(others), rel=1e-9, abs=1e-15)


def test_what_it_would_take_to_win_is_enough(parts, settings):
    """The runner-up wins when its score grows by a little more than is said, and not by a little less."""
    _, spec, statistics = parts
    config = RunConfig.model_validate(settings)
    utilities, costs = option_tables(spec, statistics, config)
    solution = find_allocation(spec, utilities, costs, config.optimization, seed=0, threads=1)
    told = next(
        one
        for layer in spec.layers
        if (one := explained(solution, layer.name)).explanation.fits and (one.explanation.value_to_flip or 0) > 1e-6
    )
    group = next(i for i, one in enumerate(solution.explanations) if told.layer in one.layers)
    own = range(int(solution.problem.offset[group]), int(solution.problem.offset[group + 1]))
    other = next(i for i in own if solution.problem.options[i] == told.explanation.runner_up)
    short = told.explanation.value_to_flip
    for factor, wins in ((0.5, False), (1.5, True)):
        value = solution.problem.value.copy()
        value[other] += factor * short
        net = value - solution.allocation.multipliers @ solution.problem.cost__ro
        assert (max(own, key=lambda index: net[index]) == other) is wins


def test_it_shows_itself(parts):
    manifest, spec, statistics = parts
    told = explained(solution_of(manifest, spec, statistics), "1.attention.self.query")
    assert told.layer == LAYER
    text, page = str(told), told._repr_html_()
    for one in (text, page):
        assert f"{LAYER} has {told.chosen.name}." in one
        assert "net score" in one
    assert page.startswith("<table>")
    assert text.count("chosen") == 1
    assert len(text.splitlines()) == 1 + len(told.options) + 1 + len(told.reasons)
    document = json.loads(json.dumps(told.to_dict()))
    assert document["layer"] == LAYER
    assert len(document["options"]) == len(told.options)


def test_layers_that_choose_alike_are_explained_together(parts, settings, saved_statistics, tmp_path):
    alike = copy.deepcopy(settings)
    alike["optimization"]["constraints"] = {"choose_alike": [["query", "value"]]}
    result = optimize_statistics(saved_statistics, RunConfig.model_validate(alike), base_dir=tmp_path)
    _, spec, statistics = parts
    told = explained(solution_of(result.manifest, spec, statistics), LAYER)
    assert told.layers == (LAYER, LAYER.replace("query", "value"))
    rows = [row for row in result.manifest.allocations if row.layer in told.layers]
    assert told.chosen.costs["trainable_params"] == sum(row.cost for row in rows)
    assert told.chosen.score == pytest.approx(sum(row.total_score for row in rows), rel=1e-12)
    assert "2 layers choose alike" in str(told)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert.encoder.layer.1.attention.self.qeury", f"did you mean '{LAYER}'"),
        ("attention.self.query", "names 2 layers"),
        ("x", "layers are named like 'bert.encoder.layer.0.attention.self'"),
    ],
)
def test_a_layer_that_is_not_there(parts, name, message):
    manifest, spec, statistics = parts
    with pytest.raises(ConfigurationError, match=message):
        explained(solution_of(manifest, spec, statistics), name)


def test_statistics_of_something_else(parts):
    manifest, spec, statistics = parts
    with pytest.raises(ActivationCacheError, match="the statistics that it was chosen by"):
        solution_of(manifest, dataclasses.replace(spec, fingerprint="0" * 64), statistics)
    identity = statistics.provenance["identity"]
    elsewhere = {"identity": {**identity, "data": {**identity["data"], "source": "other.jsonl"}}}
    with pytest.raises(ActivationCacheError, match="were measured on other data"):
        solution_of(manifest, spec, dataclasses.replace(statistics, provenance=elsewhere))
    other = dataclasses.replace(manifest.allocations[0], method="lora", rank=7)
    changed = dataclasses.replace(manifest, allocations=(other, *manifest.allocations[1:]))
    with pytest.raises(ActivationCacheError, match="do not have the option that the manifest chose"):
        solution_of(changed, spec, statistics)
    bare = dataclasses.replace(manifest, provenance=dataclasses.replace(manifest.provenance, config=None))
    with pytest.raises(ConfigurationError, match="does not record"):
        solution_of(bare, spec, statistics)
