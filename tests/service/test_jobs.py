"""Jobs from submission to result, over HTTP, by the client and the command line."""

from __future__ import annotations

import http.client
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import TOKEN, Serving, run_config_of
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.exceptions import ServiceError
from layerlens.manifest import read_manifest
from layerlens.service.client import Client

ROOT = Path(__file__).parents[2]


def test_a_run_gives_what_it_gives_here(client: Client, finished_run: dict[str, Any], tmp_path: Path):
    assert (finished_run["state"], finished_run["exit_code"], finished_run["attempts"]) == ("succeeded", 0, 1)
    result = client.result(finished_run["id"])
    client.download(finished_run["id"], tmp_path / "out")
    manifest = read_manifest(tmp_path / "out/manifest.json")
    assert manifest.score == result["score"]
    assert manifest.gap == result["gap"] <= 1e-6
    assert (tmp_path / "out/peft/adapter_config.json").is_file()
    assert not result["statistics_from_cache"]


def test_events_tell_the_whole_story_once_and_in_order(client: Client, finished_run: dict[str, Any]):
    events = list(client.events(finished_run["id"]))
    states = [event.data["state"] for event in events if event.type == "state"]
    assert states == ["queued", "running", "succeeded"]
    ended = [event.data["stage"] for event in events if event.type == "stage" and event.data["state"] == "ended"]
    assert ended == ["load", "profile", "solve", "export", "check"]
    numbers = [event.id for event in events]
    assert numbers == sorted(set(numbers))


def test_a_stream_goes_on_after_the_last_event_that_was_seen(client: Client, finished_run: dict[str, Any]):
    events = list(client.events(finished_run["id"]))
    for position in (0, 3, len(events) - 2):
        assert list(client.events(finished_run["id"], events[position].id)) == events[position + 1 :]
    assert list(client.events(finished_run["id"], events[-1].id)) == []


def test_an_optimisation_from_an_upload_and_from_a_job(client: Client, statistics: Path, finished_run: dict[str, Any]):
    config = run_config_of(max_trainable_params=400)
    by_upload = client.wait(client.submit_optimization(config, statistics)["id"])
    by_job = client.wait(client.submit_optimization(config, f"job:{finished_run['id']}")["id"])
    assert by_upload["state"] == by_job["state"] == "succeeded"
    found = client.result(by_upload["id"])
    used = next(use for use in found["resources"] if use["resource"] == "trainable_params")
    assert used["total"] <= 400
    assert found["score"] == pytest.approx(client.result(by_job["id"])["score"], rel=1e-12)
    assert client.upload(statistics) == client.upload(statistics)


def test_infeasible_budgets_fail_as_on_the_command_line(client: Client, statistics: Path):
    config = run_config_of(max_vram_gb=1e-9)
    job = client.wait(client.submit_optimization(config, statistics)["id"])
    assert (job["state"], job["exit_code"]) == ("failed", 3)
    assert "max_vram_gb" in job["error"]
    with pytest.raises(ServiceError, match="the job has no result; it is failed"):
        client.result(job["id"])


def test_the_same_key_gives_the_same_job(client: Client, statistics: Path):
    reference = client.upload(statistics)
    first = client.submit("optimize", run_config_of(), statistics=reference, idempotency_key="key-1")
    again = client.submit("optimize", run_config_of(), statistics=reference, idempotency_key="key-1")
    assert first["id"] == again["id"]
    with pytest.raises(ServiceError, match="was used for another job"):
        client.submit("optimize", run_config_of(max_trainable_params=9), statistics=reference, idempotency_key="key-1")


def test_listing_and_removing(client: Client, statistics: Path, server: Serving):
    job = client.wait(client.submit_optimization(run_config_of(), statistics)["id"])
    assert job["id"] in [one["id"] for one in client.jobs(state="succeeded")]
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    for code in (204, 404):
        connection.request("DELETE", f"/v1/jobs/{job['id']}", headers={"Authorization": f"Bearer {TOKEN}"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == code
    assert not (server.folder / "state/jobs" / job["id"]).exists()


def test_submit_by_the_command_line(server: Serving, statistics: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAYERLENS_TOKEN", TOKEN)
    monkeypatch.setenv("LAYERLENS_SERVER", server.address)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_config_of()))

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    done = invoke("submit", "config.yaml", "--statistics", str(statistics), "-o", "out", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert read_manifest(tmp_path / "out/manifest.json").score == answer["result"]["score"]
    shown = invoke("jobs", "show", answer["id"])
    assert json.loads(shown.stdout)["state"] == "succeeded"
    assert answer["id"] in invoke("jobs", "ls", "--json").stdout
    assert invoke("jobs", "fetch", answer["id"], "-o", "again").exit_code == 0
    (tmp_path / "bad.yaml").write_text("model: {name_or_path: ../../etc}\ndata: {source: x}\noptimization: {}\n")
    refused = invoke("submit", "bad.yaml")
    assert refused.exit_code == 1
    assert refused.output.startswith("error: ")
    assert "no budget given" in refused.output
    infeasible = yaml.safe_dump(run_config_of(max_vram_gb=1e-9))
    (tmp_path / "infeasible.yaml").write_text(infeasible)
    failed = invoke("submit", "infeasible.yaml", "--statistics", str(statistics), "--wait", "--quiet")
    assert failed.exit_code == 3, failed.output


def test_the_demo_of_the_client_finds_its_job_again(
    server: Serving,
    finished_run: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The second call is what a pipeline does that was killed after it had submitted."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_config_of()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAYERLENS_TOKEN", TOKEN)
    monkeypatch.setenv("LAYERLENS_SERVER", server.address)
    demo = ROOT / "demos/service_client.py"
    for output in ("out", "again"):
        monkeypatch.setattr(sys, "argv", [str(demo), "config.yaml", output, "--key", "one-pipeline"])
        runpy.run_path(str(demo), run_name="__main__")
        assert "stage {'at': " in capsys.readouterr().out
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("out", "again")]
    assert manifests[0] == manifests[1]  # created_at too: one job


def test_a_server_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("layerlens.service.client.PAUSES_S", ())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_config_of()))
    done = CliRunner().invoke(app, ["submit", str(tmp_path / "config.yaml"), "--server", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert done.output.startswith("error: http://127.0.0.1:9: cannot be reached (Connection refused)")


def test_documentation_needs_nothing_from_elsewhere(server: Serving):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/docs")
    page = connection.getresponse().read().decode()
    assert "/v1/jobs/{job_id}/events" in page
    assert "<script" not in page
    assert "//" not in page.replace("<!doctype", "")
    connection.request("GET", "/openapi.json")
    document = json.loads(connection.getresponse().read())
    assert document["openapi"].startswith("3.1")
