"""Token times of LayerLens' client beside those of an independent client, requests in turn, on a real server.

    python benchmarks/server_client_benchmark.py [--rounds 20] [--output benchmarks/results/server_client.json]

Starts `transformers serve` with the toy language model of the demos (trained first if the cache lacks it). The other
client is Python's http.client reading lines. Each round asks with both, in changing order; the figures are medians over
rounds of the mean time per token. Run it on a quiet machine: on a busy one two requests differ more than two clients.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "demos"))

from toys.language_model import cached_language_model, example

from layerlens.utils.places import default_cache_dir
from layerlens.vision_language import ServerModel

# What the `transformers` program runs, without torchvision, which cannot be imported beside a CPU-only torch.
SERVE = "import sys; sys.modules['torchvision'] = None; from transformers.cli.transformers import main; main()"


def independent(port: int, model: str, messages: list[dict[str, str]]) -> float:
    """Mean milliseconds between the events that carry text."""
    times = []
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        body = {"model": model, "messages": messages, "max_tokens": 64, "temperature": 0, "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
    return float(1e3 * np.mean(np.diff(times)))


def main() -> None:
    """Serve, ask, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model = str(cached_language_model(default_cache_dir()))
    with socket.socket() as free, tempfile.TemporaryDirectory() as home:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        (Path(home) / "hub").mkdir()
        command = [sys.executable, "-c", SERVE, "serve", model, "--port", str(port), "--host", "127.0.0.1"]
        server = subprocess.Popen(
            [*command, "--device", "cpu"], env={**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            figures = compare(port, model, arguments.rounds)
        finally:
            server.kill()
            server.wait()
    figures |= {"rounds": arguments.rounds, "load": os.getloadavg()[0], "machine": platform.machine()}
    print(json.dumps(figures, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare(port: int, model: str, rounds: int) -> dict[str, float]:
    """Medians of both, and the median of the paired ratios."""
    messages, _ = example(np.random.default_rng(3), 3)
    ours, theirs = [], []
    with closing(ServerModel(f"http://127.0.0.1:{port}", model=model, retries=20)) as llm:
        llm.generate(messages, 64)  # waits for the server, loads the model
        independent(port, model, messages)
        for number in range(rounds):
            for client in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                if client == "ours":
                    ours.append(float(np.mean(llm.generate(messages, 64).token_ms)))
                else:
                    theirs.append(independent(port, model, messages))
    return {
        "layerlens_ms_per_token": float(np.median(ours)),
        "independent_ms_per_token": float(np.median(theirs)),
        "ratio": float(np.median(np.array(ours) / np.array(theirs))),
    }


if __name__ == "__main__":
    main()
