"""``training.gradient_checkpointing: auto``: from the budget of memory to the blocks that training checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.config import RunConfig
from layerlens.exceptions import InfeasibleError
from layerlens.integrations.transformers import blocks_to_checkpoint
from layerlens.jobs.frontier import traced
from layerlens.manifest.files import read_manifest
from layerlens.models import Manifest
from layerlens.pipeline import optimize_statistics
from layerlens.profiling.statistics_file import load_statistics
from layerlens.tuning import apply, unapply
from layerlens.tuning.base_model import load_base

LATENCY = {"batch_size": 64, "sequence_length": 64}  # activations beside which the tiny model's weights are small


def chosen(statistics: Path, settings: dict[str, Any], folder: Path, checkpointing: Any, **budgets: Any) -> Manifest:
    free = {"max_trainable_params": 1500, "max_flops": None, "latency_target_ms": None, "max_vram_gb": None}
    optimization = {**settings["optimization"], **free, "latency_profile": LATENCY, **budgets}
    training = {"gradient_checkpointing": checkpointing}
    config = RunConfig.model_validate({**settings, "optimization": optimization, "training": training})
    return optimize_statistics(statistics, config, base_dir=folder).manifest


def gb_of(manifest: Manifest) -> float:
    return next(use.total for use in manifest.resources if use.resource == "vram_gb")


def test_as_few_blocks_as_the_budget_needs(settings, saved_statistics, tmp_path):
    plain = chosen(saved_statistics, settings, tmp_path, False)
    every = chosen(saved_statistics, settings, tmp_path, True)
    assert (len(plain.checkpointed), len(every.checkpointed)) == (0, 2)
    assert gb_of(every) < gb_of(plain)
    # With room for everything nothing is checkpointed; nor without a budget of memory.
    assert not chosen(saved_statistics, settings, tmp_path, "auto", max_vram_gb=2 * gb_of(plain)).checkpointed
    assert not chosen(saved_statistics, settings, tmp_path, "auto").checkpointed
    # In between, checkpoints give a better score than none within the same budget.
    budget = 0.5 * (gb_of(plain) + gb_of(every))
    without = chosen(saved_statistics, settings, tmp_path, False, max_vram_gb=budget)
    found = chosen(saved_statistics, settings, tmp_path, "auto", max_vram_gb=budget)
    assert 1 <= len(found.checkpointed) <= 2
    assert found.score > without.score
    assert gb_of(found) <= budget
    assert found.upper_bound >= every.score * (1 - 1e-9)
    too_small = 0.5 * gb_of(every)
    with pytest.raises(InfeasibleError):
        chosen(saved_statistics, settings, tmp_path, "auto", max_vram_gb=too_small)


def test_training_checkpoints_what_was_chosen_and_the_manifest_keeps_it(settings, saved_statistics, tmp_path):
    every = chosen(saved_statistics, settings, tmp_path, True)
    config = tmp_path / "config.yaml"
    budgets = {"max_flops": None, "latency_target_ms": None, "max_vram_gb": 1.02 * gb_of(every)}
    settings["optimization"] |= {**budgets, "latency_profile": LATENCY}
    settings["training"] = {"gradient_checkpointing": "auto", "max_steps": 2, "train_samples": 16, "eval_samples": 8}
    config.write_text(json.dumps(settings))
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["optimize", str(saved_statistics), "-c", str(config), "-o", str(out)])
    assert done.exit_code == 0, done.stderr
    assert "are checkpointed" in " ".join((done.stdout + done.stderr).split())
    manifest = read_manifest(out / "manifest.json")
    assert manifest.checkpointed
    assert list(manifest.checkpointed) == json.loads((out / "manifest.json").read_text())["checkpointed"]
    assert manifest == read_manifest(out / "manifest.yaml")
    base = load_base(manifest, base_dir=tmp_path).model
    tuned = apply(base, manifest)
    flags = {name for name, block in blocks_to_checkpoint(base).items() if block.gradient_checkpointing}
    assert {name.removeprefix("base_model.model.") for name in flags} == set(manifest.checkpointed)
    assert not any(block.gradient_checkpointing for block in blocks_to_checkpoint(unapply(tuned)).values())
    # The same training with and without: the same losses, for checkpoints draw the same dropout again.
    losses = []
    for checkpointing in ("auto", "false"):
        command = [
            "train",
            str(out / "manifest.json"),
            "-c",
            str(config),
            "-o",
            str(tmp_path / checkpointing),
            "--json",
        ]
        done = CliRunner().invoke(app, [*command, "--set", f"training.gradient_checkpointing={checkpointing}"])
        assert done.exit_code == 0, done.stderr
        losses.append(json.loads((tmp_path / checkpointing / "metrics.json").read_text())["after"]["loss"])
        told = " ".join(done.stderr.split())
        assert ("keep their activations" in told) == (checkpointing == "false")
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_frontier_of_memory_has_the_scores_of_runs_with_its_budgets(settings, saved_statistics, tmp_path):
    plain = {"max_flops": None, "latency_target_ms": None, "max_vram_gb": None, "latency_profile": LATENCY}
    settings["optimization"] |= plain
    settings["training"] = {"gradient_checkpointing": "auto"}
    config = RunConfig.model_validate(settings)
    spec, statistics = load_statistics(saved_statistics)
    rows = traced(spec, statistics, config, "vram_gb", points=3).rows
    for row in rows:
        within = config.model_copy(
            update={"optimization": config.optimization.model_copy(update={"max_vram_gb": row.budget})}
        )
        found = optimize_statistics(saved_statistics, within, base_dir=tmp_path).manifest
        assert (row.score, row.upper_bound) == (found.score, found.upper_bound)
