"""Which worker runs which tests: whole files, and whole folders that share what is dear to start, the longest first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processor_time
import pytest
from processor_time import TOGETHER, Timing, recorded, scope_of

ROOT = Path(__file__).parents[2]


def test_a_file_or_a_folder_goes_to_one_worker():
    assert scope_of("tests/cli/test_bench.py::test_x[a::b]") == "tests/cli/test_bench.py"
    assert {scope_of(f"{folder}/test_x.py::test_y") for folder in TOGETHER} == set(TOGETHER)
    assert all((ROOT / folder).is_dir() for folder in TOGETHER)


def test_workers_begin_with_what_takes_longest(monkeypatch: pytest.MonkeyPatch):
    names = ["tests/a.py::x", "tests/service/b.py::x", "tests/c.py::x", "tests/service/d.py::x", "tests/a.py::y"]
    monkeypatch.setattr(
        processor_time, "recorded", lambda: {"tests/a.py": 3.0, "tests/service/b.py": 2.0, "tests/service/d.py": 2.0}
    )
    items: Any = [SimpleNamespace(nodeid=name) for name in names]
    options = {"--record-times": False, "--quick": False}
    config: Any = SimpleNamespace(getoption=options.__getitem__, workerinput={})
    Timing(config).pytest_collection_modifyitems(items)
    # c.py, which nobody has timed, is taken for UNKNOWN_S.
    assert [item.nodeid for item in items] == [names[2], names[1], names[3], names[0], names[4]]


def test_no_file_took_less_than_nothing():
    assert all(seconds >= 0.0 for seconds in recorded().values())
