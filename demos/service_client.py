"""Sends a configuration to a LayerLens server, follows the job and fetches its results, from Python.

    LAYERLENS_TOKEN=... python demos/service_client.py config.yaml out --server http://127.0.0.1:8642

Killed and started again with the same --key, it finds the job that it sent instead of sending another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from layerlens.service.client import Client


def main() -> None:
    """Submit, follow, fetch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--server", help="address; $LAYERLENS_SERVER or this machine")
    parser.add_argument("--key", help="names this submission")
    arguments = parser.parse_args()
    client = Client(arguments.server)  # the token comes from LAYERLENS_TOKEN
    job = client.submit_run(arguments.config, idempotency_key=arguments.key)
    for event in client.events(job["id"]):  # continues after the last event when the connection breaks
        print(event.type, event.data)
    job = client.job(job["id"])
    if job["state"] != "succeeded":
        raise SystemExit(f"{job['state']}: {job['error']}")
    result = client.result(job["id"])
    client.download(job["id"], arguments.output)
    print(f"score {result['score']:.6g}, gap {result['gap']:.2g}, in {arguments.output}")


if __name__ == "__main__":
    main()
