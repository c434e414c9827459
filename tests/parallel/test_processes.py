"""What processes say to each other, and how they end when one of them does not answer."""

from __future__ import annotations

import json
import time

import pytest
import ranks
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.exceptions import ConfigurationError
from layerlens.utils.launch import Place, place_of_this_process
from layerlens.utils.processes import ALONE

COMPLETE = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


def test_alone_everything_is_immediate():
    assert ALONE.alone
    assert ALONE.first
    assert ALONE.everyone("topic", 5) == [5]
    assert ALONE.from_first("topic", 5) == 5
    assert list(ALONE.share_of(range(4))) == [0, 1, 2, 3]
    ALONE.check()


def test_sums_words_and_shares(start):
    outcomes = start(3, ranks.talk, lambda rank: (10,))
    values = [outcome.value for outcome in outcomes]
    assert [outcome.error for outcome in outcomes] == [""] * 3
    assert values[0][0] == [33.0] * 3  # 10 + 11 + 12
    for rank, (_, copied, said, told, sent, share) in enumerate(values):
        assert (copied, said, told) == ([0.0, 0.0], [0, 1, 2], "from 0")
        assert share == list(range(7))[rank::3]
        assert sent == ([b"\0", b"\1\1", b"\2\2\2"] if rank == 0 else [])


def test_sums_that_are_spread_by_rows(start):
    outcomes = start(4, ranks.spread_sums, lambda rank: ())
    assert [outcome.error for outcome in outcomes] == [""] * 4
    assert [outcome.value[0] for outcome in outcomes] == [[2, 2]] * 4
    factor = 2 * (0 + 1 + 2 + 3) + 4 * 10  # over both batches and all processes
    assert outcomes[0].value[1] == [[factor * (2.0 * row), factor * (2.0 * row + 1)] for row in range(6)]
    assert outcomes[1].value[1] is None


def test_a_process_that_vanishes_is_missed_and_nobody_waits_for_ever(start):
    begin = time.monotonic()
    first, killed = start(2, ranks.wait_for_the_lost, lambda rank: (5.0,))
    assert killed.error == "killed"
    assert "process 1 has sent no heartbeat for 5 s (distributed.timeout_s)" in first.error
    assert first.exit_code == 1
    assert time.monotonic() - begin < 600  # of 5 s; a busy machine may take longer to notice


def test_the_launcher_s_variables():
    assert place_of_this_process({}) == Place()
    assert place_of_this_process({"WORLD_SIZE": "1"}) == Place()
    assert place_of_this_process({"MASTER_ADDR": "set by the cluster for everyone"}) == Place()
    assert place_of_this_process(COMPLETE) == Place(1, 3, 1, 2)
    assert place_of_this_process(COMPLETE | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}) == Place(1, 3, 0, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MASTER_ADDR": ""}, "RANK, WORLD_SIZE, MASTER_PORT are set but MASTER_ADDR is not; start several processes "),
        ({"MASTER_PORT": "x"}, "environment variable MASTER_PORT: must be a whole number, got 'x'"),
        ({"RANK": "3"}, "RANK is 3 and WORLD_SIZE 3: ranks go from 0 to 2"),
        ({"RANK": ""}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set but RANK is not"),
        ({"WORLD_SIZE": "many"}, "environment variable WORLD_SIZE: must be a whole number, got 'many'"),
    ],
)
def test_variables_that_do_not_fit_together_are_refused(changed, message):
    with pytest.raises(ConfigurationError) as refused:
        place_of_this_process(COMPLETE | changed)
    assert message in str(refused.value)


def test_the_reason_is_left_where_torchrun_looks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1/error.json"))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "none.yaml")])
    assert done.exit_code == 2
    reason = json.loads((tmp_path / "1/error.json").read_text())["message"]
    assert reason.startswith("no configuration file at ")
    assert f"error: process 1: {reason}" in done.output
