"""Three processes measure what one does; whichever of them stops, what was measured is not lost."""

from __future__ import annotations

import re
from typing import Any

import pytest
import ranks
from comparison import assert_same_measurement, statistics_in

from layerlens.profiling.cache import SensitivityCache


def test_several_processes_measure_what_one_does(start, settings, whole, tmp_path):
    outcomes = start(3, ranks.run, lambda rank: (settings, tmp_path))
    assert [outcome.error for outcome in outcomes] == [""] * 3
    assert len({outcome.value[0] for outcome in outcomes}) == 1  # all return what the first has written
    found = statistics_in(tmp_path / "out")
    assert found.provenance["processes"] == 3
    assert found.provenance["identity"] == whole.provenance["identity"]
    assert_same_measurement(whole, found)
    assert [entry.state for entry in SensitivityCache(tmp_path / "cache").entries()] == ["ok"]  # no part is left


@pytest.mark.parametrize(("how", "size"), [("killed", 3), ("the disk is on fire", 1), ("the plug is pulled", 2)])
def test_a_process_that_stops_loses_no_finished_batch(start, settings, whole, tmp_path, how, size):
    settings["distributed"]["timeout_s"] = 10 if how == "killed" else 600
    first, second = start(2, ranks.stopped_run, lambda rank: (settings, tmp_path, 3 if rank else None, how))
    if how == "killed":  # nobody could say why; a launcher such as torchrun would have told
        assert "process 1 has sent no heartbeat" in first.error
    else:
        assert first.error.startswith("ProcessLostError: process 1 on ")
        assert first.error.endswith(f"stopped: {how}")
        assert second.error == f"RuntimeError: {how}"
    assert first.exit_code == 1
    assert not (tmp_path / "out").exists()
    parts = [entry.key.partition(".")[2] for entry in SensitivityCache(tmp_path / "cache").entries()]
    assert set(parts) <= {"partial", "partial-1"}
    assert "partial-1" in parts  # process 0 may have been told before its first batch
    settings["distributed"]["timeout_s"] = 600
    again = start(size, ranks.stopped_run, lambda rank: (settings, tmp_path, None, ""))
    assert [outcome.error for outcome in again] == [""] * size
    assert sum(outcome.value for outcome in again) <= 9 - 3  # process 1 had measured three of the nine batches
    assert_same_measurement(whole, statistics_in(tmp_path / "out"))
    assert [entry.state for entry in SensitivityCache(tmp_path / "cache").entries()] == ["ok"]
    if size == 2:  # as many as before: as if nothing had happened
        at_once = settings | {"runtime": settings["runtime"] | {"cache_dir": "new"}, "output": {"directory": "at once"}}
        start(size, ranks.run, lambda rank: (at_once, tmp_path))
        assert_same_measurement(statistics_in(tmp_path / "at once"), statistics_in(tmp_path / "out"), exact=True)


STOPPED = re.compile(r"^process \d+ on \S+ stopped: ")


def refused(start: Any, arguments: Any, size: int = 2) -> str:
    """The one reason that all processes give; one that comes late hears it from another, which has stopped by then."""
    outcomes = start(size, ranks.run, arguments)
    assert {outcome.exit_code for outcome in outcomes} == {2}
    messages = {STOPPED.sub("", outcome.error.partition(": ")[2]) for outcome in outcomes}
    assert len(messages) == 1, messages
    return messages.pop()


def test_more_processes_than_batches_are_refused(start, settings, tmp_path):
    settings["data"]["batch_size"] = 26
    message = "2 processes for 1 batches of calibration samples; start at most 1, or lower data.batch_size"
    assert refused(start, lambda rank: (settings, tmp_path)) == message


def test_processes_with_other_configurations_are_refused(start, settings, tmp_path):
    other = settings | {"data": settings["data"] | {"batch_size": 4}}
    message = refused(start, lambda rank: (other if rank else settings, tmp_path))
    assert message == (
        "process 1 has another configuration than process 0: data.batch_size is 4 there and 3 in process 0; give all "
        "processes the same file"
    )


def test_a_cache_that_is_not_shared_is_refused(start, settings, tmp_path):
    settings["runtime"]["cache_dir"] = "cache"  # below each process's own folder
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    message = refused(start, lambda rank: (settings, tmp_path / str(rank)))
    assert message.startswith("runtime.cache_dir: process 1 on ")
    assert message.endswith("give a directory that all machines share, or run with --no-cache")
    assert not list((tmp_path / "0/cache").glob(".shared-*"))
