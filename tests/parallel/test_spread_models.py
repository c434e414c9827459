"""A model that is spread, over places by accelerate or processes by FSDP2, gives the statistics of the whole one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import ranks
from comparison import assert_same_measurement, statistics_in

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, LayerLensError
from layerlens.pipeline import run_config

SPREAD = {
    "bert.embeddings": "cpu", "bert.encoder.layer.0": "disk", "bert.encoder.layer.1": "cpu", "bert.pooler": "disk",
    "classifier": "cpu",
}  # fmt: skip


def test_a_model_on_two_processes_or_partly_on_disk_measures_as_the_whole(start, settings, one, whole, tmp_path):
    alone = json.loads((one / "manifest.json").read_text())
    for name, size in (("disk", 1), ("shards", 2)):
        spread = settings | {
            "model": settings["model"] | ({"device_map": SPREAD} if size == 1 else {}),
            "distributed": {"timeout_s": 600, "sharding": "fsdp" if size > 1 else "none"},
            "runtime": settings["runtime"] | {"cache_dir": f"cache of {name}"},
            "output": {"directory": name},
        }
        outcomes = start(size, ranks.run, lambda rank, job=spread: (job, tmp_path))
        assert [outcome.error for outcome in outcomes] == [""] * size
        assert_same_measurement(whole, statistics_in(tmp_path / name))
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["model"]["fingerprint"] == alone["model"]["fingerprint"]
        choices = [
            [(row["layer"], row["method"], row["rank"]) for row in each["allocations"]] for each in (alone, manifest)
        ]
        assert choices[0] == choices[1]
        for file in ("peft/adapter_model.safetensors", "peft/adapter_config.json"):
            assert (tmp_path / name / file).read_bytes() == (one / file).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distributed": {"sharding": "fsdp"}}, "sharding: fsdp: only one process was started; start several"),
        ({"model.device_map": {"": 7}}, "model.device_map: there is no GPU 7; torch sees 0"),
        ({"model.device_map": {"": "tape"}}, "must be a GPU's number, cuda:NUMBER, cpu or disk, got 'tape'"),
        ({"model.device_map": SPREAD | {"classifier": "disk"}}, "puts the new task head classifier."),
        ({"distributed": {"backend": "nccl"}, "RANK": 1}, "backend: nccl needs runtime.device: cuda, got cpu"),
        ({"distributed": {"sharding": "fsdp"}, "model.device_map": "auto", "RANK": 1}, "cannot be combined with"),
    ],
)  # fmt: skip
def test_what_cannot_be_spread_is_refused_in_a_line(start, settings, tmp_path, changes, message):
    job: dict[str, Any] = settings | {"distributed": changes.get("distributed", {})}
    if "model.device_map" in changes:
        job["model"] = settings["model"] | {"device_map": changes["model.device_map"]}
    if "RANK" in changes:
        outcomes = start(2, ranks.run, lambda rank: (job, tmp_path))
        assert all(message in outcome.error for outcome in outcomes), outcomes
        return
    with pytest.raises(LayerLensError) as refused:
        run_config(RunConfig.model_validate(job), base_dir=tmp_path)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"factory": "a:b", "device_map": "auto"}, "device_map is for models of transformers"),
        ({"name_or_path": "x", "max_memory": {"cpu": "1GiB"}}, "belong to device_map; give it too"),
    ],
)
def test_placement_that_means_nothing_is_refused(settings, model, message):
    with pytest.raises((ConfigurationError, ValueError), match=message):
        RunConfig.model_validate(settings | {"model": model})
