"""How much processor time every test file takes, its child processes included, and which worker runs what, and when.

``pytest --record-times`` writes ``tests/times.json`` and prints what takes most. The record has two uses: workers of
pytest-xdist begin with what took longest, so that no worker ends with a long file while the others have nothing to do;
and ``pytest --quick`` takes the files that need 0.6 s at most. A folder of ``TOGETHER`` goes to one worker.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

RECORD = Path(__file__).with_name("times.json")
SHOWN = 25
UNKNOWN_S = 5.0
"""What a file that nobody has timed is taken for."""
TOGETHER = ("tests/service", "tests/parallel", "tests/vision_language")
"""Servers, processes that have imported everything, and detectors are started once for all files of these folders."""
QUICK_S = 0.6
"""A file that took no longer is part of ``--quick``."""


def processor_time() -> float:
    """Seconds of this process, of its children that have ended, and (on Linux) of those that still run."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_running, _children(os.getpid())))


def _children(process: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [int(child) for child in path.read_text().split()]
        except OSError:  # the thread has ended
            continue
    return found


def _running(process: int) -> float:
    """Seconds of a process that runs, and of all that it has started."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime of proc(5)
    return own + sum(map(_running, _children(process)))


def recorded() -> dict[str, float]:
    """Seconds by file, as the last ``--record-times`` of it has written them."""
    return dict(json.loads(RECORD.read_text())) if RECORD.exists() else {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-times", action="store_true", help="write each file's processor time to tests/times.json and print it"
    )
    parser.addoption(
        "--quick", action="store_true", help=f"only the test files that tests/times.json has with at most {QUICK_S:g} s"
    )


def scope_of(test: str) -> str:
    """What goes to one worker: a file, or a folder whose files share what is dear to start."""
    file = test.split("::")[0]
    return next((folder for folder in TOGETHER if file.startswith(f"{folder}/")), file)


class ByFolder(LoadFileScheduling):
    """``--dist loadfile``, with some folders as if they were one file."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


class Timing:
    """The plugin, in the process that runs tests, in the one that prints, or in one that does both."""

    def __init__(self, config: pytest.Config) -> None:
        self.records, self.quick = config.getoption("--record-times"), config.getoption("--quick")
        self.worker = hasattr(config, "workerinput")
        self.begin = 0.0
        self.of_test: dict[str, float] = {}
        self.of_file: dict[str, float] = defaultdict(float)
        self.of_workers = 0.0

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        if not self.quick or collection_path.suffix != ".py":
            return None
        name = collection_path.relative_to(RECORD.parents[1]).as_posix()
        helper = not collection_path.name.startswith("test_")
        return None if helper or recorded().get(name, UNKNOWN_S) <= QUICK_S else True

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.worker:  # xdist must keep the order: --no-loadscope-reorder
            times, files = recorded(), {item.nodeid.split("::")[0] for item in items}
            of_scope: dict[str, float] = defaultdict(float)
            for file in files:
                of_scope[scope_of(file)] += times.get(file, UNKNOWN_S)
            items.sort(key=lambda item: -of_scope[scope_of(item.nodeid)])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> ByFolder | None:
        return ByFolder(config, log) if config.getoption("dist") == "loadfile" else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if self.records:
            self.begin = processor_time()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if self.records and call.when == "teardown":
            # A server of an earlier test that has ended without having been waited for takes its seconds with it.
            report.processor_s = max(0.0, processor_time() - self.begin)
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        if hasattr(report, "processor_s"):
            self.of_test[report.nodeid] = report.processor_s
            self.of_file[report.nodeid.split("::")[0]] += report.processor_s

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.worker:
            session.config.workeroutput["processor_s"] = processor_time()  # type: ignore[attr-defined]
        elif self.records:
            times = recorded() | {name: round(seconds, 1) for name, seconds in self.of_file.items()}
            times = {name: seconds for name, seconds in times.items() if (RECORD.parents[1] / name).is_file()}
            longest_first = sorted(times.items(), key=lambda item: (-item[1], item[0]))
            RECORD.write_text(json.dumps(dict(longest_first), indent=0) + "\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.of_workers += node.workeroutput.get("processor_s", 0.0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.records:
            return
        for what, times in (("test", self.of_test), ("file", self.of_file)):
            terminalreporter.section(f"processor time by {what}")
            for name, seconds in sorted(times.items(), key=lambda item: -item[1])[:SHOWN]:
                terminalreporter.write_line(f"{seconds:8.1f} s  {name}")
        tests, whole = sum(self.of_file.values()), self.of_workers or processor_time()
        terminalreporter.write_line(f"{tests:8.1f} s  all tests; with imports and collecting {whole:.1f} s")
