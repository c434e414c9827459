"""The program as a process: how fast it answers, what it imports, and how it ends on signals."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_support import VALID

HEAVY = ("torch", "numpy", "scipy", "pydantic", "yaml", "ortools", "transformers", "peft", "matplotlib")

# A pipeline that works until it is stopped, and leaves a file behind if it is not unwound.
ENDLESS = """
import sys, time
from types import ModuleType
from pathlib import Path
from layerlens.cli.main import main
from layerlens.utils.atomic import staged_directory

def run_config(config, *, base_dir, use_cache, progress, warn):
    with progress.stage("Working", total=3) as advance, staged_directory(base_dir / "out") as staging:
        (staging / "manifest.json").write_text("half")
        print("ready", flush=True)
        time.sleep(60)

fake = ModuleType("layerlens.pipeline")
fake.run_config = run_config
sys.modules["layerlens.pipeline"] = fake
sys.argv = ["layerlens", "run", "config.yaml"]
main()
"""

MOST_TRIALS = 10


def _heard() -> None:
    """A shell in the background hands down an ignored SIGINT, and nohup an ignored SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from layerlens.cli.main import main\n"
        "sys.argv = ['layerlens', '--help']\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    bare = (
        "import sys, typer\n"
        "app = typer.Typer()\n"
        "for name in 'ab':\n"
        "    app.command(name)(lambda x=1: None)\n"
        "sys.argv = ['x', '--help']\n"
        "app()\n"
    )
    seconds, of_typer = [], []
    quick = False
    for _ in range(MOST_TRIALS):  # the least of several: other load makes any one of them dearer
        elapsed, done = _processor_seconds(code)
        seconds.append(elapsed)
        of_typer.append(_processor_seconds(bare)[0])
        # Caches that other programs fill make every import dearer: then what Typer alone needs is the measure.
        quick = min(seconds) < max(0.5, 1.75 * min(of_typer))
        if quick:
            break
    assert done.stderr.strip() == "[]"
    assert "validate" in done.stdout
    assert quick, (seconds, of_typer)


def _processor_seconds(code: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "the terminal was closed"),
    ],
)
@pytest.mark.parametrize("times", [1, 3])
def test_signals_unwind_the_run(tmp_path: Path, number: signal.Signals, code: int, word: str, times: int) -> None:
    """One line and nothing left behind, also where an impatient user presses Ctrl-C again while it is cleaned up."""
    (tmp_path / "config.yaml").write_text(VALID, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heard,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.02)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == code
    # What was guessed is said before; the end is one line.
    assert stderr.splitlines()[-1] == (
        f"error: {word}; no result was written; run it again, and finished statistics come from the cache"
    )
    assert len(stderr.splitlines()) <= 2
    assert os.listdir(tmp_path) == ["config.yaml"]


# A program whose cleaning up is slow, and one that is stopped where nothing can be raised: a weak reference's callback.
SLOW = """
import sys, time
from layerlens.cli import main
from layerlens.cli.errors import guarded

@main.app.command("slow")
@guarded()
def slow() -> None:
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.5)
        print("cleaned up", flush=True)

@main.app.command("callback")
@guarded()
def callback() -> None:
    import weakref

    class Thing:
        pass

    thing = Thing()

    def gone(_reference):
        print("ready", flush=True)
        time.sleep(30)

    reference = weakref.ref(thing, gone)
    del thing
    time.sleep(60)

sys.argv = ["layerlens", sys.argv[1]]
main.main()
"""


@pytest.mark.parametrize("name", ["slow", "callback"])
def test_nothing_but_one_line_whenever_it_is_stopped(name: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heard,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(2 if name == "slow" else 1):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        stdout, stderr = process.communicate(timeout=600)
    assert (process.returncode, stderr) == (130, "error: interrupted\n")
    assert stdout == ("cleaned up\n" if name == "slow" else "")


def test_who_starts_it_with_a_signal_ignored_is_heard() -> None:
    code = (
        "import signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from layerlens.cli.signals import catch_signals\n"
        "catch_signals()\n"
        "print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize(
    ("to", "code", "words"),
    [
        ("| head -c 0", 2, "its reader closed it"),
        ("> /dev/full", 2, "No space left on device"),
        (">&-", 2, "it is closed"),
    ],
)
def test_a_document_that_cannot_be_shown_is_one_line(tmp_path: Path, to: str, code: int, words: str) -> None:
    command = f"{sys.executable} -m layerlens cache ls --json --cache-dir {tmp_path}"
    shell = f"set -o pipefail; {{ sleep 0.5; {command}; }} {to}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr == f"error: cannot write to standard output: {words}; the files that were written stay\n"


def test_a_text_whose_reader_has_gone_is_silent_and_stderr_may_be_full() -> None:
    shell = f"set -o pipefail; {{ sleep 0.5; {sys.executable} -m layerlens version; }} | head -c 0"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
    full = f"{sys.executable} -m layerlens validate no-such-file.yaml 2> /dev/full"
    assert subprocess.run(["bash", "-c", full], check=False).returncode == 2


def test_reader_that_has_seen_enough() -> None:
    done = subprocess.run(
        f"{sys.executable} -m layerlens schema | head -c 1", shell=True, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("{", "")
