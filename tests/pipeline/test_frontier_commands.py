"""``layerlens optimize --frontier`` and ``--sweep``, and their other names on real statistics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from layerlens.cli.main import app


@pytest.fixture
def invoke(settings, saved_statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A command on the saved statistics and a configuration with one budget; wide, plain output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return lambda command, *arguments: CliRunner().invoke(
        app, [command, str(saved_statistics), "--config", "config.yaml", *arguments]
    )


def test_frontier_shows_a_row_for_each_budget_and_names_its_files(invoke, tmp_path):
    result = invoke("frontier", "--at", "0.3k", "--at", "900")
    assert result.exit_code == 0, result.stderr
    assert "300" in result.stderr
    assert "out/frontier.csv" in result.stderr
    assert (tmp_path / "out" / "frontier.svg").is_file()


def test_frontier_as_json(invoke):
    result = invoke("frontier", "--json", "--points", "3", "--resource", "flops")
    content = json.loads(result.stdout)
    assert content["resource"] == "flops"
    assert [row["kind"] for row in content["certified"]] == ["certified"] * 3


def test_a_sweep_writes_a_manifest_for_each_budget(invoke, tmp_path):
    result = invoke("optimize", "--budget-sweep", "trainable_params=300,900", "--json")
    assert result.exit_code == 0, result.stderr
    scores = [entry["score"] for entry in json.loads(result.stdout)]
    assert scores == sorted(scores)
    for budget in (300, 900):
        manifest = json.loads((tmp_path / "out" / f"trainable_params-{budget}" / "manifest.json").read_text())
        assert sum(row["cost"] for row in manifest["allocations"]) <= budget
    assert "300" in invoke("optimize", "--budget-sweep", "trainable_params=300").stderr


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("params=1", "--sweep: got 'params=1'; give RESOURCE=B1,B2,..."),
        ("flops", "--sweep: got 'flops'"),
        ("flops=a", "--sweep: must be a number such as 300000, 300k or 1.5M, got 'a'"),
        ("trainable_params=0", "OptimizationConfig.max_trainable_params"),
    ],
)
def test_a_sweep_that_cannot_be_read_is_refused(invoke, tmp_path, sweep, message):
    result = invoke("optimize", "--budget-sweep", sweep)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def bare(saved_statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A command on a copy of what a run wrote, without a configuration file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "out").mkdir()
    for name in ("manifest.json", "statistics.safetensors"):
        shutil.copy(saved_statistics.parent / name, tmp_path / "out" / name)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_optimize_takes_the_configuration_from_the_manifest(bare, tmp_path):
    before = (tmp_path / "out/manifest.json").read_bytes()
    result = bare("optimize", "out", "--max-params", "0.9k", "--method", "lora", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["directory"] == str(tmp_path / "out/optimized")
    uses = {use["resource"]: use for use in told["resources"]}
    assert (uses["trainable_params"]["budget"], uses["vram_gb"]["budget"]) == (900.0, 0.1)  # the other budgets stay
    assert {row["method"] for row in told["allocations"]} <= {"none", "lora"}
    assert (tmp_path / "out/manifest.json").read_bytes() == before  # the run's own choice stays
    shown = bare("show", "out/optimized", "--layer", told["allocations"][1]["layer"])  # by the statistics above it
    assert shown.exit_code == 0, shown.stderr
    assert bare("diff", "out", "out/optimized", "--exit-code").exit_code == 1


def test_the_manifest_s_configuration_gives_the_manifest_s_choice(bare, tmp_path):
    for place in ("out", "out/statistics.safetensors"):
        assert bare("optimize", place, "-o", "again").exit_code == 0
        assert bare("diff", "out", "again", "--exit-code").exit_code == 0


def test_frontier_goes_beside_the_statistics(bare, tmp_path):
    result = bare("frontier", "out", "--points", "2")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out/frontier.csv").is_file()
    assert (tmp_path / "out/manifest.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimize", "nowhere"], "nowhere: no such file or directory; give a manifest, or the directory"),
        (["optimize", "."], "no such file; `layerlens run` writes it"),
        (
            ["optimize", "alone.safetensors"],
            "no manifest beside it that records its configuration; give one with -c",
        ),
        (["optimize", "out", "--max-params", "many"], "--max-params many"),
        (["optimize", "out", "--set", "optimization.max_vram=1"], "unknown key, did you mean 'max_vram_gb'?"),
        (["frontier", "alone.safetensors"], "give one with -c CONFIG"),
        (["diff", "out", "uniform-lora:3"], "rank 3 is not on offer; the manifest's LoRA ranks are 1, 2, 4"),
    ],
)
def test_what_is_not_there_is_named(bare, tmp_path, arguments, message):
    shutil.copy(tmp_path / "out/statistics.safetensors", tmp_path / "alone.safetensors")
    result = bare(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_manifest_without_a_configuration(bare, tmp_path):
    path = tmp_path / "out/manifest.json"
    document = json.loads(path.read_text())
    del document["provenance"]["config"]
    path.write_text(json.dumps(document))
    result = bare("optimize", "out")
    assert result.exit_code == 2
    assert "the manifest does not record its run's configuration; give one with -c CONFIG" in result.stderr


def test_a_choice_beside_uniform_lora(bare, settings):
    told = json.loads(bare("diff", "out", "uniform-lora:4", "--json").stdout)
    figures = {one["name"]: one for one in told["figures"]}
    ranks = {tuple(one["second"]) for one in told["layers"]}
    assert ranks == {("lora", 4), ("none", 0)}
    assert figures["trainable_params"]["second"] > settings["optimization"]["max_trainable_params"]
    within = json.loads(bare("diff", "out", "uniform-lora", "--json").stdout)
    figures = {one["name"]: one for one in within["figures"]}
    assert figures["trainable_params"]["second"] <= settings["optimization"]["max_trainable_params"]
    assert figures["score"]["second"] < figures["score"]["first"]
