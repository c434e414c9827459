"""What a plan answers: why a layer got its option, what more of a budget buys, how it differs, and what it holds."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

import layerlens
from layerlens.exceptions import ConfigurationError, InfeasibleError, ManifestError
from layerlens.jobs.solve import recorded_config

VALUE = "bert.encoder.layer.1.attention.self.value"


@pytest.fixture
def statistics(bert, bert_batches):
    return layerlens.profile(bert, bert_batches, threads=1)


@pytest.fixture
def plan(statistics, bert):
    return layerlens.choose(statistics, bert, max_trainable_params=900)


def test_why_names_the_option_that_the_plan_has_also_after_loading(plan, tmp_path):
    rows = {one.layer: one for one in plan.manifest.allocations}
    for name in (VALUE, "bert.encoder.layer.0.attention.self.query"):
        why = plan.why(name)
        assert (why.chosen.method, why.chosen.rank) == (rows[name].method, rows[name].rank)
        assert why.chosen.net_score >= max(one.net_score for one in why.options) - 1e-12 or why.runner_up is not None
    plan.save(tmp_path / "out")
    assert layerlens.load(tmp_path / "out").why(VALUE).to_dict() == plan.why(VALUE).to_dict()


def test_why_of_an_unknown_layer_names_the_nearest(plan):
    with pytest.raises(ConfigurationError, match=r"did you mean .*attention\.self\.value"):
        plan.why("bert.encoder.layer.1.attention.self.valu")


def test_a_manifest_alone_says_that_statistics_lack(plan, tmp_path):
    plan.save(tmp_path / "out")
    (tmp_path / "out/statistics.safetensors").unlink()
    alone = layerlens.load(tmp_path / "out/manifest.json")
    for ask in (lambda: alone.why(VALUE), alone.frontier):
        with pytest.raises(ManifestError, match=r"no statistics beside the manifest \(statistics.safetensors\)"):
            ask()


def test_statistics_that_cannot_be_read_leave_the_plan_and_a_note(plan, tmp_path):
    plan.save(tmp_path / "out")
    (tmp_path / "out/statistics.safetensors").write_bytes(b"no statistics")
    loaded = layerlens.load(tmp_path / "out")
    assert loaded.ranks == plan.ranks
    assert "the statistics beside the manifest cannot be used" in loaded.notes[0]


def test_the_frontier_at_the_plans_own_budget_is_the_plan(plan):
    found = plan.frontier(budgets=["900", 2000])
    assert [row.budget for row in found.rows] == [900.0, 2000.0]
    assert found.rows[0].score == plan.manifest.score
    assert found.rows[1].score > found.rows[0].score
    assert found.chosen == (plan.trainable_params, plan.manifest.score)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert "900" in str(found)
    assert "2,000" in str(found)
    assert "data:image/svg+xml;base64," in found._repr_html_()


def test_the_frontier_is_drawn_on_the_axes_that_are_given(plan):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    found = plan.frontier("vram_gb", points=3)
    assert len(found.rows) == 3
    assert found.plot(axes) is axes
    assert "GB" in axes.get_xlabel()
    assert "the plan" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("params",), ConfigurationError, "unknown resource 'params'; known: trainable_params"),
        (("trainable_params", ["12x"]), ConfigurationError, "budgets: must be a number such as 300000, 300k"),
        (("trainable_params", (), 1), ConfigurationError, "points: must be a whole number, at least 2, got 1"),
        (("vram_gb", [1e-9]), InfeasibleError, "max_vram_gb"),
    ],
)
def test_a_frontier_of_nonsense_is_refused(plan, arguments, error, message):
    with pytest.raises(error, match=message):
        plan.frontier(*arguments)


def test_diff_takes_plans_manifests_and_directories(plan, statistics, tmp_path):
    larger = layerlens.choose(statistics, max_trainable_params=2000)
    plan.save(tmp_path / "out")
    found = layerlens.diff(tmp_path / "out", larger)
    layers = {one.layer for one in found.layers}
    assert layers == {name for name in plan.ranks | larger.ranks if plan.ranks.get(name) != larger.ranks.get(name)}
    assert layers
    assert not layerlens.diff(plan, tmp_path / "out/manifest.json")
    assert not layerlens.diff(plan.manifest, layerlens.load(tmp_path / "out"))
    with pytest.raises(ConfigurationError, match="second: must be a Plan, a Manifest, or the directory or file"):
        layerlens.diff(plan, {"a": 1})
    with pytest.raises(ConfigurationError, match=r"has no manifest\.json"):
        layerlens.diff(plan, tmp_path)


def test_estimate_of_one_rank_needs_the_configuration_alone(bert, plan, tmp_path):
    bert.save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    found = layerlens.estimate(tmp_path / "model", rank=4, targets=["query", "value"], sequence_length=8)
    assert found.trainable_params == 4 * 4 * (32 + 32)  # two layers in two blocks
    with pytest.raises(ConfigurationError, match="a manifest has its own ranks"):
        layerlens.estimate(plan, rank=4)


def test_to_dict_is_json_and_has_the_manifest_whole(plan, tmp_path):
    said = plan.to_dict()
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    plan.save(tmp_path / "out")
    written = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    written.pop("created_at")
    assert {key: said[key] for key in written} == written
    assert (said["ranks"], said["lora_share"], said["notes"]) == (plan.ranks, 1.0, list(plan.notes))


def test_a_plan_is_not_pickled_and_copies_are_itself(plan):
    with pytest.raises(TypeError, match=r"use plan\.save\(DIRECTORY\) and layerlens\.load"):
        pickle.dumps(plan)
    assert copy.copy(plan) is plan
    assert copy.deepcopy({"plan": plan})["plan"] is plan


def test_a_profile_is_one_file_that_choose_takes(statistics, plan, tmp_path):
    file = statistics.save(tmp_path / "measured.safetensors")
    again = layerlens.choose(file, max_trainable_params=900)
    assert again.manifest.allocations == plan.manifest.allocations
    assert again.notes == plan.notes
    assert not layerlens.diff(plan, again)
    assert statistics.save(tmp_path / "folder") == tmp_path / "folder/statistics.safetensors"
    assert layerlens.choose(tmp_path / "folder", max_trainable_params=900).ranks == plan.ranks
    loaded = layerlens.Profile.load(file)
    assert (loaded.notes, loaded.model) == (statistics.notes, statistics.model)
    assert recorded_config(loaded.config) == recorded_config(statistics.config)
    said = [json.dumps(one.statistics.provenance, sort_keys=True) for one in (loaded, statistics)]
    assert said[0] == said[1]
    assert loaded.save(tmp_path / "twice.safetensors").read_bytes() == file.read_bytes()


def test_choose_takes_the_directory_of_an_earlier_plan(plan, tmp_path):
    plan.save(tmp_path / "out")
    assert layerlens.choose(tmp_path / "out", max_trainable_params=900).ranks == plan.ranks
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/manifest.yaml").unlink()
    with pytest.raises(ManifestError, match="its model and settings are unknown"):
        layerlens.choose(tmp_path / "out", max_trainable_params=900)
