"""Prometheus metrics: names by its conventions, the same in the dashboard, and what a job pushes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from layerlens.service.metrics import ServiceMetrics
from layerlens.service.store import JobStore
from layerlens.telemetry.metrics import RunMetrics

MONITORING = Path(__file__).parents[2] / "demos/monitoring"


def needs(*programs: str) -> pytest.MarkDecorator:
    """Debian's packages prometheus and prometheus-pushgateway; scripts/check_monitoring.sh insists on them."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing and os.environ.get("LAYERLENS_REQUIRE_SERVERS"):
        pytest.fail(f"not installed: {', '.join(missing)}")
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def exposition(tmp_path: Path) -> str:
    """What a server shows after jobs of every outcome."""
    store = JobStore(tmp_path / "jobs.sqlite")
    metrics = ServiceMetrics(store)
    for outcome, error in (("succeeded", ""), ("failed", "InfeasibleError"), ("interrupted", "")):
        metrics.runs.ended("run", outcome, 1.5, error)
    metrics.runs.stage("run", "profile", 1.0)
    metrics.runs.cache.labels("hit").inc()
    metrics.runs.gap.labels("run").set(1e-7)
    metrics.runs.budget_used.labels("run", "flops").set(0.9)
    metrics.runs.adapted.labels("run", "lora").set(3)
    metrics.requests.labels("GET", "/v1/jobs", "200").inc()
    metrics.seconds.labels("GET", "/v1/jobs").observe(0.01)
    return metrics.exposition()[0].decode()


def test_names_follow_the_conventions(exposition: str):
    families = {family.name: family for family in text_string_to_metric_families(exposition)}
    assert len(families) >= 11
    for name, family in families.items():
        if name.endswith("_created"):
            continue
        assert re.fullmatch(r"layerlens(_[a-z]+)+", name)
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert name.endswith("_seconds")


@needs("promtool")
@pytest.mark.parametrize(
    ("checked", "content"), [("metrics", None), ("rules", "alerts.yml"), ("config", "prometheus.yml")]
)
def test_promtool_finds_nothing(exposition: str, checked: str, content: str | None, tmp_path: Path):
    for path in MONITORING.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "layerlens-token").write_text("token")
    command = ["promtool", "check", checked, *([] if content is None else [str(tmp_path / content)])]
    done = subprocess.run(command, input=exposition, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if content is None:
        assert done.stdout + done.stderr == ""


@needs("prometheus", "prometheus-pushgateway")
def test_prometheus_finds_what_a_job_pushed_to_a_gateway(tiny_optimize, tmp_path: Path):
    """Real processes: the job pushes, Prometheus scrapes the gateway, and answers a query of the dashboard."""
    gateway_port, port = free_port(), free_port()
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\nscrape_configs:\n  - job_name: batch\n    honor_labels: true\n"
        f"    static_configs: [{{targets: ['127.0.0.1:{gateway_port}']}}]\n"
    )
    commands = [
        ["prometheus-pushgateway", f"--web.listen-address=127.0.0.1:{gateway_port}"],
        ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
         f"--web.listen-address=127.0.0.1:{port}"],
    ]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen(command, **quiet) for command in commands]
    try:
        until(lambda: ask(gateway_port, "/-/ready"))
        result = tiny_optimize(
            tmp_path, telemetry={"push_gateway": f"http://127.0.0.1:{gateway_port}", "job": "nightly"}
        )
        query = quote('layerlens_budget_used_ratio{job="nightly",resource="vram_gb"}')
        found = until(lambda: json.loads(ask(port, f"/api/v1/query?query={query}"))["data"]["result"])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    share = next(use.total / use.budget for use in result.manifest.resources if use.resource == "vram_gb")
    assert float(found[0]["value"][1]) == share


def until(answer: Callable[[], Any]) -> Any:
    """The first answer that is not empty, however busy the machine is."""
    end = time.monotonic() + 1800
    while True:
        with contextlib.suppress(OSError):
            found = answer()
            if found:
                return found
        assert time.monotonic() < end
        time.sleep(0.2)


def ask(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
        return response.read().decode()


def test_dashboard_and_alerts_ask_for_metrics_that_exist(exposition: str):
    known = set(re.findall(r"^(layerlens\w+?)(?:\{| )", exposition, re.MULTILINE))
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    alerts = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    assert len(asked) >= 10
    for expression in asked:
        names = set(re.findall(r"layerlens\w+", expression))
        assert names
        assert names <= known, expression


def test_a_batch_job_pushes_its_metrics(tiny_optimize, tmp_path: Path):
    pushed: dict[str, bytes] = {}

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            pushed[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(202)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    result = tiny_optimize(tmp_path, telemetry={"push_gateway": address, "job": "nightly"})
    server.shutdown()
    server.server_close()
    ((path, body),) = pushed.items()
    assert path == "/metrics/job/nightly/kind/optimize"
    text = body.decode()
    assert 'layerlens_runs_total{kind="optimize",outcome="succeeded"} 1.0' in text
    share = next(use.total / use.budget for use in result.manifest.resources if use.resource == "vram_gb")
    assert f'layerlens_budget_used_ratio{{kind="optimize",resource="vram_gb"}} {share!r}' in text


def test_registries_do_not_share(tmp_path: Path):
    first, second = RunMetrics(CollectorRegistry()), RunMetrics(CollectorRegistry())
    first.ended("run", "succeeded", 1.0)
    assert b"outcome=" not in generate_latest(second.registry)
