"""A real server process, started by the command line, and jobs for it that take a second or two."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerlens.service.client import Client

TOKEN = "a-token-of-the-tests-0123456789"
LAYERLENS = str(Path(sys.executable).with_name("layerlens"))  # not -m: a checkout that is not installed may be here
SERVER_THREADS = 1
OTHER_TOKEN = "another-token-of-the-tests-9876"


@dataclass
class Serving:
    """How a server is started; start it again and it finds its state."""

    folder: Path
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    token: str | None = TOKEN
    process: subprocess.Popen[str] | None = None
    address: str = ""
    port: int = 0
    descriptors: int = 0
    """As ``ulimit -n``, which sets the hard limit too; 0: those of the tests."""

    def start(self) -> Serving:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        environment.pop("LAYERLENS_SERVE_TOKEN", None)
        if self.token:
            environment["LAYERLENS_SERVE_TOKEN"] = self.token
        log = (self.folder / "server.log").open("a")
        command = [
            LAYERLENS, "--verbose", "serve", "--root", str(self.folder), "--state-dir",
            str(self.folder / "state"), "--port", str(self.port), "--threads", str(SERVER_THREADS), *self.options,
        ]  # fmt: skip
        if self.descriptors:
            command = ["bash", "-c", f'ulimit -n {self.descriptors} && exec "$@"', "-", *command]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
        log.close()
        seen = 0
        for _ in range(36_000):
            text = (self.folder / "server.log").read_text()
            found = re.findall(r"listens on (http\S+:(\d+))", text)
            seen = len(found)
            if seen > self.starts:
                self.address, self.port, self.starts = found[-1][0], int(found[-1][1]), seen
                return self
            if self.process.poll() is not None:
                raise RuntimeError(text)
            time.sleep(0.05)
        raise RuntimeError("the server did not start: " + text)

    starts: int = 0

    def client(self, token: str | None = None) -> Client:
        return Client(self.address, token or self.token, timeout_s=600)

    def kill(self) -> None:
        """As the kernel does when memory is short, or power fails."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """As an operator or an orchestrator does."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=600)

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()


def run_config_of(model: str = "model", data: str = "reviews.jsonl", **optimization: Any) -> dict[str, Any]:
    """The configuration of a run of the tiny model below a server's root."""
    return {
        "model": {"name_or_path": model, "head_fit_samples": 16},
        "data": {"source": data, "calibration_samples": 16, "max_length": 12, "batch_size": 4},
        "optimization": {
            "max_trainable_params": 1500,
            "lora_ranks": [1, 2],
            "latency_profile": {"batch_size": 2, "sequence_length": 12},
            "check_predictions": False,  # it times the model for seconds
            **optimization,
        },
    }


BEARER = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


def ask(
    server: Serving, method: str, path: str, body: Any = None, headers: dict[str, str] | None = BEARER, **more: Any
) -> tuple[int, str]:
    """Status and body of one request, by a client that refuses nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    try:
        connection.request(method, path, body=body, headers=headers or {}, **more)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def submit(server: Serving, config: Any, **more: Any) -> tuple[int, str]:
    status, text = ask(server, "POST", "/v1/jobs", json.dumps({"kind": "run", "config": config, **more}))
    return status, json.loads(text).get("detail", "")


def changed(section: str, **fields: Any) -> dict[str, Any]:
    config = run_config_of()
    return {**config, section: {**config.get(section, {}), **fields}}
