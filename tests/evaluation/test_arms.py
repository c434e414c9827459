"""Arms that are written with numbers: blocks by depth, kinds of layers, manifests, and the cheapest choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from layerlens.config import LatencyProfile, StudyConfig
from layerlens.config.study_arms import CheapestArm, LayersArm, ManifestArm, written_arm
from layerlens.evaluation.arms import Sets, layers_of, manifest_ranks
from layerlens.evaluation.results import ResultsFile
from layerlens.evaluation.study import Study, needed_by
from layerlens.evaluation.study_task import StudyTask, lora_layers
from layerlens.exceptions import ConfigurationError
from layerlens.manifest import write_manifest
from layerlens.models import LoraSettings, Manifest, ManifestRow, ModelFacts, Provenance, ResourceUse
from layerlens.rank_rules import params_of

GIVEN = LatencyProfile(peak_gflops=50.0, memory_bandwidth_gb_s=10.0, op_overhead_us=1.0)
BUDGET = 1000
ARMS = ("uniform", "top:1", "bottom:1:v,o", "only:ffn", "cheapest:0.6", "cheapest:0.9:trainable_params", "top:1_svd")


@pytest.fixture(scope="module")
def study(module_task: StudyTask, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Of the tiny task, with costs of a device whose figures are given."""
    path = tmp_path_factory.mktemp("arms") / "tiny.jsonl"
    return Study(module_task, ResultsFile.open(path), {"all": BUDGET}, arms=ARMS, device=GIVEN)


def test_what_is_written_is_read() -> None:
    assert written_arm("top:4") == LayersArm("top", 4)
    assert written_arm("bottom:2:v+o") == LayersArm("bottom", 2, ("v", "o"))
    assert written_arm("only:ffn") == LayersArm("only", 0, ("ffn",))
    assert written_arm("cheapest") == CheapestArm()
    assert written_arm("cheapest:0.9:vram_gb") == CheapestArm(0.9, "vram_gb")
    assert written_arm("manifest:a/b:c.json") == ManifestArm("a/b:c.json")
    assert written_arm("auto") is None
    given = StudyConfig(arms=("top:2_svd", "cheapest:0.95", "manifest:x_svd"))
    assert given.arms == ("uniform", "top:2_svd", "cheapest:0.95", "manifest:x_svd")


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ("top:0", "not a number of blocks"),
        ("top", "not a number of blocks"),
        ("bottom:two", "'two' is not a number of blocks"),
        ("top:2:", "names no kind of layer"),
        ("only:v,,o", "names no kind of layer"),
        ("cheapest:1.5", "'1.5' is not a share"),
        ("cheapest:nan", "'nan' is not a share"),
        ("cheapest:0.9:gold", "'gold' is not a resource; known: trainable_params"),
        ("manifest:", "gives no file"),
        ("middle:2", "unknown arm 'middle:2'; known: uniform"),
        ("adalora_svd", "unknown arm"),
    ],
)
def test_what_cannot_be_read_is_told(arm: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        StudyConfig(arms=(arm,))


def test_layers_by_depth_and_kind_have_as_many_parameters(study: Study) -> None:
    layers = lora_layers(study.task)
    by_name = {layer.name: layer for layer in layers}
    top, values, wide = (study.ranks(arm, BUDGET) for arm in ("top:1", "bottom:1:v,o", "only:ffn"))
    assert {by_name[name].block for name in top} == {1}
    assert len(top) == len(layers) // 2
    assert {(by_name[name].block, by_name[name].role) for name in values} == {(0, "value"), (0, "attention_output")}
    assert {by_name[name].role for name in wide} == {"ffn_up", "ffn_down"}
    for ranks in (top, wide):
        assert BUDGET - max(layer.n_in + layer.n_out for layer in layers) < params_of(layers, ranks) <= BUDGET
    assert study.ranks("top:1_svd", BUDGET) == top
    named = layers_of(LayersArm("top", 2, ("*.query",)), study.task)
    assert [layer.role for layer in named] == ["query", "query"]


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        (LayersArm("top", 3), "top:3 asks for 3 blocks; the model has 2 blocks"),
        (LayersArm("only", 0, ("gate",)), "no layers of the kind 'gate'; its roles: attention_output"),
        (LayersArm("top", 1, ("*.layer.0.*",)), "names no layer of the top 1 blocks"),
        (LayersArm("top", 1, ("nothing",)), "no layer is called 'nothing'"),
    ],
)
def test_layers_that_the_model_has_not(study: Study, arm: LayersArm, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        layers_of(arm, study.task)


def test_a_model_without_blocks_says_so(study: Study) -> None:
    spec = replace(study.task.spec, layers=[replace(layer, block=None) for layer in study.task.spec.layers])
    with pytest.raises(ConfigurationError, match="no blocks that LayerLens knows"):
        layers_of(LayersArm("bottom", 1), replace(study.task, spec=spec))


def test_the_cheapest_choice_keeps_its_share_at_the_least_cost(study: Study) -> None:
    assert needed_by(("cheapest:0.9",)) == (("gradient", "input_scale"), False)
    ranks, more = study._choice("cheapest:0.6", BUDGET)
    saving = more["saving"]
    assert saving["saves"]
    assert saving["kept_share"] >= 0.6
    assert saving["least_cost_share"] <= saving["cost_share"] < 1.0
    sets = Sets.of(study.task, study.with_step, BUDGET, profile=study.profile, ranks=sorted(set(ranks.values())))
    told = sets.predicted(ranks)
    assert told["kept"] == pytest.approx(saving["kept_share"])
    assert told["cost_share"] == pytest.approx(saving["cost_share"])
    assert told["step_ms"] > 0.0
    uniform = study.ranks("uniform", BUDGET)
    assert sets.predicted(uniform)["kept"] == pytest.approx(1.0)
    assert sets.predicted(uniform)["cost_share"] == pytest.approx(1.0)
    # Every other choice that keeps as much, of uniform LoRA's rank on some of the layers, costs at least as much.
    names, rank = list(uniform), max(uniform.values())
    generator = np.random.default_rng(0)
    for _ in range(200):
        some = {name: rank for name in names if generator.random() < 0.5}
        if not some:
            continue
        other = sets.predicted(some)
        assert other["kept"] < 0.6 or other["cost_share"] >= saving["least_cost_share"] - 1e-9
    fewer, of_parameters = study._choice("cheapest:0.9:trainable_params", BUDGET)
    assert params_of(study.layers, fewer) < params_of(study.layers, uniform)
    assert of_parameters["saving"]["kept_share"] >= 0.9


def _write(folder: Path, sizes: dict[str, tuple[str, int]]) -> Path:
    rows = [ManifestRow(name, method, size, 0.0, size, 0.0, 0.0, 0.0, 0.0) for name, (method, size) in sizes.items()]
    used = {"trainable_params": float(sum(row.cost for row in rows)), "flops": 0.0, "vram_gb": 0.0, "latency_ms": 0.0}
    manifest = Manifest(
        ModelFacts(name_or_path="tiny"),
        tuple(rows),
        tuple(ResourceUse(name, None, 0.0, amount, amount, 0.0, "exact") for name, amount in used.items()),
        0.0, 0.0, 0.0, "optimal", "greedy", "auto", "gain",
        lora=LoraSettings(alpha_over_r=2.0),
        provenance=Provenance(seed=0),
    )  # fmt: skip
    return write_manifest(manifest, folder, created_at="2026-01-31T12:00:00Z")["manifest_json"]


def test_a_manifest_is_an_arm_within_its_budget(study: Study, tmp_path: Path) -> None:
    first, second = (layer.name for layer in lora_layers(study.task)[:2])
    _write(tmp_path, {first: ("lora", 2), second: ("none", 0)})
    other = Study(
        study.task, study.results, {"all": BUDGET, "small": 10}, arms=("uniform", "manifest:manifest.json"),
        base_dir=tmp_path,
    )  # fmt: skip
    assert other.ranks("manifest:manifest.json", BUDGET) == {first: 2}
    told: list[str] = []
    wanted = other.within_budgets(("uniform", "manifest:manifest.json"), told.append)
    assert ("small", "manifest:manifest.json") not in wanted
    assert ("all", "manifest:manifest.json") in wanted
    assert "more than the budget of 10" in told[0]
    path = _write(tmp_path, {"bert.elsewhere": ("lora", 2)})
    with pytest.raises(ConfigurationError, match=r"adapts bert\.elsewhere, which this model does not have"):
        manifest_ranks(ManifestArm(str(path)), study.task, Path())
    path = _write(tmp_path, {first: ("adapter", 2)})
    with pytest.raises(ConfigurationError, match="has adapter; a study trains LoRA"):
        manifest_ranks(ManifestArm(str(path)), study.task, Path())
