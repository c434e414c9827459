"""Processes that are forked from a warm Python are programs like others: arguments, folder, environment, their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TELL = """
import json, os, sys
imported = ["layerlens" in sys.modules, "torch" in sys.modules]
print(json.dumps([__name__, sys.argv, os.getcwd(), sorted(os.environ), *imported]))
print("to the other", file=sys.stderr)
"""


def test_code_and_files_are_run_as_by_a_new_python(warm_python: Any, tmp_path: Path):
    (tmp_path / "tell.py").write_text(TELL)
    for arguments, told in ((("-c", TELL, "a"), ["-c", "a"]), (("tell.py", "a"), ["tell.py", "a"])):
        done = warm_python.run(*arguments, cwd=tmp_path, env={"ONLY": "this"})
        assert (done.returncode, done.stderr) == (0, "to the other\n")
        name, argv, folder, environment, layerlens, torch = json.loads(done.stdout)
        assert (name, argv, folder, environment) == ("__main__", told, str(tmp_path), ["ONLY"])
        assert (layerlens, torch) == (False, True)
    (tmp_path / "neighbour.py").write_text("print('met')")
    assert warm_python.run("-m", "neighbour", cwd=tmp_path).stdout == "met\n"


def test_they_end_as_programs_do(warm_python: Any):
    for code, expected, said in (
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ):
        done = warm_python.run("-c", code)
        assert (done.returncode, done.stderr) == (expected, said)
    failed = warm_python.run("-c", "1 / 0")
    assert failed.returncode == 1
    assert failed.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_program_stands_for_python(warm_python: Any, tmp_path: Path):
    program = warm_python.program("python")
    command = [program, "-c", "import sys; print(sys.stdin.read(), sys.argv[1:]); sys.exit(7)", "a b"]
    done = subprocess.run(command, input="in", capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "in ['a b']\n", "")
    killed = subprocess.run([program, "-c", "import os; os.kill(os.getpid(), 9)"], check=False)
    assert killed.returncode == -signal.SIGKILL
    waiting = "import time; print('ready', flush=True); time.sleep(1800)"
    with subprocess.Popen([program, "-u", "-c", waiting], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait() == -signal.SIGTERM


def test_the_server_ends_with_whoever_started_it(tmp_path: Path):
    """Also where that one is killed; the server here has nothing to import."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import warm_python; from pathlib import Path\n"
        "warm = warm_python.WarmPython(Path('.')); warm._start(); print(warm.server.pid, flush=True)\n"
        "import os; os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    server = int(done.stdout)
    descriptor = os.pidfd_open(server) if Path(f"/proc/{server}").exists() else None
    if descriptor is not None:
        import select

        assert select.select([descriptor], [], [], 1800)[0]
        os.close(descriptor)
