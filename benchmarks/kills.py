"""Kills ``run``, ``train``, ``sweep`` and ``optimize`` at random system calls, and runs each again.

    python benchmarks/kills.py --kills 30 --out benchmarks/results/kills.json

``kills.c`` is put under the file calls of the C library. Each command writes where an earlier result of another choice
and files of others lie. After every kill the result directory must be the whole old or the whole new one, with the
others' files. Then the same command must end well, with the bytes of an undisturbed run, and nothing of the killed one
may be left. Processes, a sweep's tasks among them, are forked from one that has imported everything, so that a kill
takes seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
COMMANDS = {
    "run": (["run", "config.yaml", "--quiet"], "out"),
    "optimize": (["optimize", "made/statistics.safetensors", "-c", "config.yaml", "-o", "choice", "--quiet"], "choice"),
    "train": (["train", "made/manifest.json", "-c", "config.yaml", "-o", "tuned", "--quiet"], "tuned"),
    "sweep": (["sweep", "sweep.yaml", "--run", "--quiet"], "grid"),
}
"""Each command, and the directory of its result."""
MINE = {"notes.txt": b"mine", "mine/deep/notes.txt": b"mine too"}
TIMES = re.compile(rb'("?created_at"?|written|"seconds"|"measured_ms")[^\n]*')


def main() -> None:
    """Build the library, and begin again with it; then the kills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Stop each command after this time.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COMMANDS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if "LAYERLENS_KILLS" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="layerlens-") as name:
            library = Path(name) / "kills.so"
            subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "kills.c", "-ldl"], check=True)
            given = {**os.environ, "LD_PRELOAD": str(library), "LAYERLENS_KILLS": str(library), "OMP_NUM_THREADS": "1"}
            raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=given, check=False).returncode)
    del os.environ["LD_PRELOAD"]  # what the commands start is not met
    result: dict[str, Any] = {}
    if arguments.out is not None and arguments.out.exists():  # commands that are not tried now keep what is there
        result = json.loads(arguments.out.read_text(encoding="utf-8"))["commands"]
    tried = []
    with tempfile.TemporaryDirectory(prefix="layerlens-") as name:
        _import_everything()
        pristine = _pristine(Path(name))
        for command in COMMANDS:
            if arguments.only in (None, command):
                trial = _Trial(Path(name), pristine, command, arguments.seed)
                result[command] = trial.kills(arguments.kills, arguments.seconds)
                tried.append(result[command])
                print(command, json.dumps(result[command]), flush=True)
                if arguments.out:
                    whole = {"seed": arguments.seed, "commands": result}
                    arguments.out.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(any(found["faults"] for found in tried))


def _import_everything() -> None:
    from layerlens.integrations.torchvision_import import make_torchvision_importable

    make_torchvision_importable()
    import peft  # noqa: F401
    import transformers
    from transformers import BertForSequenceClassification  # noqa: F401

    import layerlens.jobs.checks
    import layerlens.jobs.train
    import layerlens.pipeline
    from layerlens.cli import main  # noqa: F401
    from layerlens.jobs import sweep_run

    transformers.utils.logging.disable_progress_bar()
    layerlens.jobs.checks.TIMING_SECONDS = layerlens.jobs.train.TIMING_SECONDS = 0.002
    sweep_run.POLL_S = 0.02
    sweep_run._start = _forked_task


class _Forked:
    """What ``Popen`` is to the sweep, of a fork of this process."""

    def __init__(self, arguments: list[str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _command(arguments)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def _forked_task(sweep: Any, task: Any, _threads: int) -> _Forked:
    return _Forked(["sweep", str(sweep.path.absolute()), "--task", str(task.task), "--quiet"])


def _command(arguments: list[str]) -> None:
    """The command line in this process, which ends with it."""
    from layerlens.cli.main import main as program

    sys.argv = ["layerlens", *arguments]
    code = 1
    try:
        program()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forked(arguments: list[str], folder: Path, target: int) -> tuple[int, int]:
    """Exit code (below 0: the signal) of the command in ``folder``, killed at this call (0: never); calls counted."""
    library = ctypes.CDLL(os.environ["LAYERLENS_KILLS"])
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.chdir(folder)
        os.environ["LAYERLENS_CACHE_DIR"] = str(folder / "cache")
        log = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        library.kills_arm(target)
        _command(arguments)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), int(library.kills_counted())


def _pristine(folder: Path) -> Path:
    """A job with a finished run in ``made``, and, where each command writes, an earlier result and files of others."""
    from small_job import SETTINGS, write_job

    pristine = write_job(folder / "pristine")
    sweep = {"base": "config.yaml", "directory": "grid", "seeds": [0, 1]}
    (pristine / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    other = {**SETTINGS, "optimization": {**SETTINGS["optimization"], "max_trainable_params": 400}}
    (pristine / "other.yaml").write_text(yaml.safe_dump(other), encoding="utf-8")
    for arguments in (
        ["run", "config.yaml", "-o", "made", "--quiet"],
        ["run", "other.yaml", "-o", "out", "--quiet"],
        ["optimize", "made/statistics.safetensors", "-c", "other.yaml", "-o", "choice", "--quiet"],
        ["train", "out/manifest.json", "-c", "other.yaml", "-o", "tuned", "--quiet"],
    ):
        code, _ = _forked(arguments, pristine, 0)
        assert code == 0, (arguments, (pristine / "said.txt").read_text())
    shutil.rmtree(pristine / "cache", ignore_errors=True)
    for _, output in COMMANDS.values():
        for name, content in MINE.items():
            (pristine / output / name).parent.mkdir(parents=True, exist_ok=True)
            (pristine / output / name).write_bytes(content)
    return pristine


class _Trial:
    """The kills of one command."""

    def __init__(self, folder: Path, pristine: Path, command: str, seed: int) -> None:
        self.work, self.pristine = folder / "work", pristine
        self.arguments, self.output = COMMANDS[command]
        self.command = command
        self.chance = random.Random(f"{command} {seed}")
        self.old = _content(pristine / self.output)
        self._begin()
        code, self.calls = _forked(self.arguments, self.work, -1)
        assert code == 0, (self.work / "said.txt").read_text()
        self.new = _content(self.work / self.output)

    def kills(self, most: int, seconds: float) -> dict[str, Any]:
        """What came of so many kills, or of as many as there was time for."""
        end, count = time.perf_counter() + seconds, 0
        state: Counter[str] = Counter()
        faults: list[str] = []
        while count < most and time.perf_counter() < end:
            number, count = count, count + 1
            target = self.chance.randint(1, self.calls)
            self._begin()
            code, _ = _forked(self.arguments, self.work, target)
            if code != -signal.SIGKILL:
                state["ended before the call"] += 1
            there = _content(self.work / self.output)
            seen = self._seen(there)
            state[seen] += 1
            if seen == "mixed":
                faults.append(f"kill {number} at call {target}: mixed: {_difference(there, self.old, self.new)}")
            faults += [
                f"kill {number} at call {target}: {name} of others is lost" for name in MINE if name not in there
            ]
            code, _ = _forked(self.arguments, self.work, 0)
            if code != 0:
                said = (self.work / "said.txt").read_text().strip().splitlines()[-1:]
                faults.append(f"kill {number} at call {target}: the same command ends with {code}: {said}")
            after = _content(self.work / self.output)
            if after != self.new:
                faults.append(f"kill {number} at call {target}: other bytes: {_difference(after, self.new)}")
            left = [path.name for path in self.work.rglob(".*") if _is_leftover(path.name)]
            if left:
                faults.append(f"kill {number} at call {target}: left behind: {left}")
        return {"kills": count, "calls": self.calls, "found": dict(state), "faults": faults}

    def _seen(self, there: dict[str, bytes]) -> str:
        if self.command == "sweep":  # each task has a result of its own
            done = {name.split("/")[1] for name in self.new if name.startswith("results/")}
            for task in done:
                found = {name: text for name, text in there.items() if name.startswith(f"results/{task}/")}
                if found and found != {name: text for name, text in self.new.items() if name in found}:
                    return "mixed"
                if found and len(found) != sum(name.startswith(f"results/{task}/") for name in self.new):
                    return "mixed"
            return "whole results"
        there = {name: text for name, text in there.items() if not name.startswith("checkpoints/")}
        return "the old one" if there == self.old else "the new one" if there == self.new else "mixed"

    def _begin(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.pristine, self.work)


def _is_leftover(name: str) -> bool:
    return ".new-" in name or re.fullmatch(r"\..+\.[a-z0-9_]{8}", name) is not None


def _content(folder: Path) -> dict[str, bytes]:
    """The files below ``folder`` without what is a time; reports and logs are there, whatever they say."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in Path(name).parts):
            continue
        content = path.read_bytes()
        if path.suffix in (".html", ".jsonl", ".csv", ".txt", ".log") and path.name != "notes.txt":
            content = b""
        if path.name in ("table.json", "checkpoint.json"):
            content = b""
        if path.name == "metrics.json":
            facts = json.loads(content)
            facts.pop("measured")
            content = json.dumps(facts).encode()
        found[name] = TIMES.sub(b"", content)
    return found


def _difference(there: dict[str, bytes], *wholes: dict[str, bytes]) -> str:
    told = []
    for whole in wholes:
        names = sorted({*there, *whole})
        told.append(", ".join(name for name in names if there.get(name) != whole.get(name)))
    return " | ".join(told)[:300]


if __name__ == "__main__":
    main()
