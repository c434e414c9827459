"""One thread setting for everything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layerlens.exceptions import ConfigurationError
from layerlens.utils import threads
from layerlens.utils.threads import THREAD_VARIABLES, available_cores, resolve_threads, set_threads


def test_zero_means_the_cores_of_this_process(all_cores: None) -> None:
    assert resolve_threads(0) == available_cores()
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))
    assert resolve_threads(3) == 3  # up to four for each core
    with pytest.raises(ConfigurationError, match="0 \\(all cores\\) or more, got -1"):
        resolve_threads(-1)


def test_far_more_threads_than_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available_cores", lambda: 2)
    assert resolve_threads(8) == 8
    with pytest.raises(ConfigurationError, match=r"^runtime\.threads: 9 threads on 2 cores .*; use at most 8, or 0 "):
        resolve_threads(9)


def test_every_pool_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    for variable in THREAD_VARIABLES:
        monkeypatch.setenv(variable, "9")
    before = torch.get_num_threads()
    try:
        assert set_threads(1) == 1
        assert torch.get_num_threads() == 1
        assert {os.environ[variable] for variable in THREAD_VARIABLES} == {"1"}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("own", "parent", "quota"),
    [("max 100000", "max 100000", None), ("150000 100000", "max 100000", 1.5), ("max 100000", "50000 100000", 0.5)],
)
def test_cgroup_v2_quota(tmp_path: Path, own: str, parent: str, quota: float | None) -> None:
    (tmp_path / "group/own").mkdir(parents=True)
    (tmp_path / "group/own/cpu.max").write_text(own)
    (tmp_path / "group/cpu.max").write_text(parent)
    membership = tmp_path / "membership"
    membership.write_text("0::/group/own\n")
    assert threads._cgroup_quota(tmp_path, membership) == quota


def test_cgroup_v1_quota(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert threads._cgroup_quota(tmp_path, tmp_path / "no-membership") == 2.0
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert threads._cgroup_quota(tmp_path, tmp_path / "no-membership") is None


def test_quota_lowers_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cgroup_quota", lambda *_: 0.5)
    assert available_cores() == 1


def test_idle_threads_sleep_unless_the_user_decided(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "20")
    threads.let_idle_threads_sleep()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["OPENBLAS_THREAD_TIMEOUT"]) == ("PASSIVE", "20")
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT")
    threads.let_idle_threads_sleep()
    assert os.environ["OPENBLAS_THREAD_TIMEOUT"] == "4"
