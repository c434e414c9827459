"""Why a layer got its option: from the solution of a run, and from what the run left on disk."""

from __future__ import annotations

import copy
import dataclasses
import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.cli.tables import as_json, show
from layerlens.config import RunConfig
from layerlens.exceptions import ActivationCacheError, ConfigurationError
from layerlens.jobs.explained import explained, solution_of
from layerlens.jobs.find import find_allocation
from layerlens.jobs.solve import option_tables
from layerlens.manifest import read_manifest
from layerlens.manifest.frozen import why_no_deeper
from layerlens.models import RESOURCES, FrozenStage, Manifest, ManifestRow, ModelFacts, ResourceUse
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
    with pytest.raises(ActivationCacheError, match="the statistics that the choice is based on"):
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


def test_what_keeps_the_backward_pass_from_going_deeper_is_said_everywhere(saved_statistics, settings, tmp_path):
    """In the result, its summary, its JSON, the report and ``show --layer``, with figures of the cost table."""
    config = RunConfig.model_validate(settings)
    config = config.model_copy(
        update={"optimization": config.optimization.model_copy(update={"max_flops": None, "latency_target_ms": None})}
    )
    spec, statistics = load_statistics(saved_statistics)
    _, costs = option_tables(spec, statistics, config)
    assert costs.depth is not None
    step = costs.depth.cost__sr[:, RESOURCES.index("step_ms")]
    budget = costs.base["step_ms"] + 0.5 * float(step[0] + step[-1])  # half of the depth
    optimization = config.optimization.model_copy(update={"max_step_ms": budget, "max_vram_gb": None})
    config = config.model_copy(update={"optimization": optimization})
    result = optimize_statistics(saved_statistics, config, base_dir=tmp_path)
    assert result.frozen
    for stage in result.frozen:
        assert set(stage.cost) <= set(RESOURCES)
        assert 0.0 < stage.cost["step_ms"] <= step[0]
    told = why_no_deeper(result.manifest, result.frozen)
    assert " frozen" in told
    console = Console(record=True, width=300, file=io.StringIO())
    show(result, console, explain=True)
    assert told in console.export_text()
    assert as_json(result)["frozen_stages"] == [dataclasses.asdict(stage) for stage in result.frozen]
    assert told in result.files["report"].read_text(encoding="utf-8").replace("&#39;", "'")
    layer = next(row.layer for row in result.manifest.allocations)
    command = ["show", str(result.files["manifest_json"]), "--layer", layer, "--statistics", str(saved_statistics)]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.stderr
    assert told in shown.stderr.replace("\n", " ")
    asked = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert [stage["name"] for stage in asked["frozen_stages"]] == [stage.name for stage in result.frozen]


def test_the_sentence_says_because_only_where_the_budget_is_the_reason():
    def row(layer: str, method: str) -> ManifestRow:
        return ManifestRow(layer, method, 4, 0.0, 9, 0.0, 0.0, 0.0, 0.0)

    def manifest(price: float, *rows: ManifestRow, room: float = 0.0) -> Manifest:
        use = ResourceUse("step_ms", 90.0, 50.0, 40.0 - room, 90.0 - room, price, "")
        return Manifest(ModelFacts(), rows, (use,), 0.0, 0.0, 0.0, "optimal", "", "", "")

    half = (row("enc.3.q", "none"), row("enc.3.up", "lora"), row("dec.0.up", "lora"))
    whole = (row("enc.2.q", "none"), row("enc.2.up", "none"), *half[1:])
    near, far = FrozenStage("enc.2.up", {"step_ms": 1.0}, 0.0, 0.0), FrozenStage("enc.2.q", {"step_ms": 2.0}, 3.0, 0.1)
    other = FrozenStage("enc.1.up", {"step_ms": 4.0}, 90.0, 0.9)
    assert why_no_deeper(manifest(0.5, *whole), [near, far, other]) == (
        "Block 2 of enc is frozen because going deeper costs 2 ms for 10 % of the score."
    )
    deeper = [FrozenStage("enc.3.q", {"step_ms": 2.0}, 3.0, 0.1)]
    said = "enc.3.q is frozen; going deeper would cost 2 ms for 10 % of the score"
    assert why_no_deeper(manifest(0.0, *half, room=5.0), deeper) == f"{said}."
    assert why_no_deeper(manifest(0.0, *half, room=1.0), deeper) == (
        f"{said}, and does not fit into the budgets with the other layers."
    )
    assert "no option there is worth its cost" in why_no_deeper(manifest(0.5, *whole), [near])
    assert why_no_deeper(manifest(0.5, *whole), []) == ""
    assert why_no_deeper(manifest(0.5, row("a.0.q", "none")), [near]) == ""
