"""How far a noun walks: the functions of LayerLens that are handed it, or a part of it, before the work begins.

Counted by running, with a profile hook. Where a count grows, a function hands on what it does not need.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
import yaml

from layerlens.config import RunConfig
from layerlens.jobs.job import Job
from layerlens.jobs.train import train_manifest
from layerlens.models import Manifest
from layerlens.pipeline import run_config

ROOT = Path(__file__).parents[2] / "layerlens"
MANIFEST_WALK = 9
"""Half of the functions that were handed a whole manifest before ``Choice`` and typed sections were nouns (18)."""
CONFIGURATION_WALK = 17
"""What a whole configuration passes through now, with a new head to fit; before ``Job`` was a noun, the same rule (with
what held a configuration then) counted 21."""


class Reached(BaseException):
    """The place up to which is counted."""


def functions_handed(wanted: Callable[[Any], bool], work: Callable[[], Any]) -> set[str]:
    """Functions of LayerLens that get an argument which is ``wanted``, while ``work`` runs up to ``Reached``."""
    found: dict[CodeType, str] = {}

    def hook(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code in found or not code.co_filename.startswith(str(ROOT)):
            return
        n_named = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        if any(_holds(frame.f_locals.get(name), wanted) for name in code.co_varnames[:n_named]):
            found[code] = f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_firstlineno} {code.co_name}"

    sys.setprofile(hook)
    try:
        with suppress(Reached):
            work()
    finally:
        sys.setprofile(None)
    return {name for name in found.values() if not name.rsplit(" ", 1)[1].startswith("<")}


def _holds(value: Any, wanted: Callable[[Any], bool]) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    return wanted(value) or (isinstance(value, (list, tuple, set, frozenset)) and any(map(wanted, value)))


@pytest.fixture
def job(tiny_bert_dir: Path, reviews_jsonl: Path, tmp_path: Path) -> RunConfig:
    """A configuration whose run has left a manifest with every method in ``tmp_path``/out."""
    settings = {
        "model": {
            "name_or_path": str(tiny_bert_dir), "task": "sequence-classification", "head_fit_samples": 32,
        },
        "data": {"source": str(reviews_jsonl), "calibration_samples": 24, "max_length": 16, "batch_size": 8},
        "profiling": {"adapter_sites": "all"},
        "optimization": {
            "max_trainable_params": 1500, "methods": ["lora", "adapter", "prefix"], "lora_ranks": [1, 2],
            "adapter_sizes": [1, 2], "prefix_lengths": [2, 4],
            "latency_profile": {"batch_size": 2, "sequence_length": 16},
            "constraints": {"min_layers": {"lora": 1, "adapter": 1, "prefix": 1}},
        },
        "runtime": {"threads": 1, "cache_dir": "cache"},
        "training": {"epochs": 1, "batch_size": 4},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    config = RunConfig.model_validate(settings)
    run_config(config, base_dir=tmp_path)
    return config


def test_a_manifest_on_its_way_into_training(job: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def first_step(*arguments: Any, **more: Any) -> None:
        raise Reached

    monkeypatch.setattr(torch.optim.AdamW, "step", first_step)
    walked = functions_handed(
        lambda value: isinstance(value, Manifest),
        lambda: train_manifest(tmp_path / "out/manifest.json", job, base_dir=tmp_path, output=tmp_path / "trained"),
    )
    others = {name for name in walked if not name.startswith("models/")}  # its own questions are no way
    assert len(others) <= MANIFEST_WALK, "\n".join(sorted(others))


def test_a_configuration_on_its_way_into_the_measurement(
    job: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All of it: a function that takes one section is handed what it reads, and is not counted."""

    def measuring(*arguments: Any, **more: Any) -> None:
        raise Reached

    monkeypatch.setattr("layerlens.jobs.measure.measure_share", measuring)
    walked = functions_handed(
        lambda value: isinstance(value, (RunConfig, Job)),
        lambda: run_config(job, base_dir=tmp_path, use_cache=False),
    )
    assert any(name.endswith(" fit_new_head") for name in walked)
    assert len(walked) <= CONFIGURATION_WALK, "\n".join(sorted(walked))
