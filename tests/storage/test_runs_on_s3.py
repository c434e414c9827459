"""A whole job between buckets: configuration, model, data and cache from S3, results to S3, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from s3_server import SECRET, S3Server, client_of
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.manifest import read_manifest
from layerlens.storage import read_bytes, read_text


@pytest.fixture
def config_url(s3: S3Server, bucket: str, tiny_bert_dir: Path, reviews_jsonl: Path) -> str:
    """A configuration in the bucket beside its model and its data."""
    client, name = client_of(s3), bucket.removeprefix("s3://")
    for path in tiny_bert_dir.iterdir():
        client.put_object(Bucket=name, Key=f"job/model/{path.name}", Body=path.read_bytes())
    client.put_object(Bucket=name, Key="job/reviews.jsonl", Body=reviews_jsonl.read_bytes())
    config = {
        "model": {"name_or_path": f"{bucket}/job/model", "head_fit_samples": 16},
        "data": {"source": "reviews.jsonl", "calibration_samples": 16, "max_length": 12},
        "optimization": {
            "max_trainable_params": 1500,
            "lora_ranks": [1, 2],
            "latency_profile": {"batch_size": 2, "sequence_length": 16},
        },
        "output": {"directory": "out"},
        "runtime": {"threads": 1, "cache_dir": f"{bucket}/cache"},
    }
    client.put_object(Bucket=name, Key="job/config.yaml", Body=yaml.safe_dump(config).encode())
    return f"{bucket}/job/config.yaml"


def test_a_whole_job_between_buckets(config_url: str, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["--verbose", *arguments])
        assert done.exit_code == 0, done.output
        assert SECRET not in done.output
        return done.stdout

    first = json.loads(invoke("run", config_url, "--json"))
    out = f"{bucket}/job/out"
    assert first["directory"] == out
    assert first["files"]["manifest_json"] == f"{out}/manifest.json"
    assert not first["statistics_from_cache"]
    manifest = read_manifest(Path(f"{out}/manifest.json"))
    assert [row.layer for row in manifest.allocations] == [row["layer"] for row in first["allocations"]]
    # Another machine, whose own cache is empty, takes the statistics from the shared one.
    monkeypatch.setenv("LAYERLENS_CACHE", str(tmp_path / "another-machine"))
    assert json.loads(invoke("run", config_url, "--json"))["statistics_from_cache"]
    again = invoke("optimize", f"{out}/statistics.safetensors", "-c", config_url, "-o", f"{bucket}/again", "--json")
    assert json.loads(again)["allocations"] == first["allocations"]
    # The chosen options are trained and exported between buckets too; nothing stays here of what was published.
    training = ("--set", "training.max_steps=2", "--set", "training.batch_size=4", "--set", "training.eval_samples=8")
    trained = json.loads(
        invoke("train", f"{out}/manifest.json", "-c", config_url, "-o", f"{bucket}/tuned", *training, "--json")
    )
    assert trained["files"]["metrics"] == f"{bucket}/tuned/metrics.json"
    assert json.loads(read_text(f"{bucket}/tuned/metrics.json", 1 << 20))["after"] == trained["after"]
    assert not list((tmp_path / "another-machine/unpublished").iterdir())
    exported = json.loads(
        invoke("export", f"{out}/manifest.json", "--to", "peft", "--lora-part", "-o", f"{bucket}/peft", "--json")
    )
    assert exported["directory"] == f"{bucket}/peft"
    assert read_bytes(f"{exported['files']['peft']}/adapter_config.json")
    applied = invoke("apply", f"{bucket}/again/manifest.yaml", "-o", f"{bucket}/adapter", "--json")
    assert json.loads(applied)["files"]["peft"] == f"{bucket}/adapter/peft"
    assert list(tmp_path.iterdir()) == [tmp_path / "another-machine"] or not (tmp_path / "s3:").exists()


def test_a_shared_cache_that_is_down_costs_no_run(config_url: str, bucket: str, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app, ["run", config_url, "--set", "runtime.cache_dir=s3://no-such-bucket/cache", "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert "warning: runtime.cache_dir: s3://no-such-bucket/cache cannot be written" in done.output
    assert (tmp_path / "out/manifest.json").is_file()


def test_an_output_that_cannot_be_written_is_said_before_the_work(config_url: str, monkeypatch, tmp_path: Path):
    monkeypatch.setattr("layerlens.jobs.load.load_dataset", lambda *_: pytest.fail("work has begun"))
    done = CliRunner().invoke(app, ["run", config_url, "-o", "s3://no-such-bucket/out"])
    assert done.exit_code == 2
    guess, error = done.output.splitlines()
    assert guess.startswith("model.task: sequence-classification, guessed from 2 classes")
    assert error.startswith("error: cannot write s3://no-such-bucket/out: ")
