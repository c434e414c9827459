"""``bench``: quick, says with what it measured, and leaves threads and cores as they were."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from cli_support import Invoke, parsed

from layerlens.bench import speeds
from layerlens.utils.threads import available_cores


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # bench sets them; this puts back what they were
    small = functools.partial(speeds.measure_speeds, small=True, budget_s=0.01)
    monkeypatch.setattr(speeds, "measure_speeds", small)


@pytest.mark.usefixtures("_small")
def test_json_has_limits_kernels_solver_and_what_they_were_measured_with(invoke: Invoke) -> None:
    result = invoke("bench", "--json")
    assert result.exit_code == 0, result.stderr
    found = parsed(result)
    assert found["machine"]["threads"] == len(found["machine"]["cores"]) == 1
    assert found["machine"]["isa"] in ("scalar", "avx2", "avx512")
    assert {"processor", "load_before", "system", "versions"} <= found["machine"].keys()
    assert [limit["unit"] for limit in found["limits"]] == ["GB/s", "GFLOP/s"]
    assert len(found["kernels"]) == 4
    for kernel in found["kernels"]:
        assert min(kernel["seconds"], kernel["rate"], *kernel["peers"].values()) > 0.0
        assert kernel["of_limit"] is None or 0.0 < kernel["of_limit"] <= 1.0  # nothing is faster than the limit
    assert {name.split()[0] for kernel in found["kernels"] for name in kernel["peers"]} == {"numpy", "torch"}
    assert all(solved["seconds"] > 0.0 and 0.0 <= solved["gap"] < 0.1 for solved in found["solver"])


@pytest.mark.usefixtures("_small")
def test_the_table_names_processor_and_threads_and_warns_of_a_busy_machine(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (40.0, 1.0, 1.0))
    result = invoke("bench")
    assert result.exit_code == 0, result.stderr
    assert "1 thread on core" in result.stderr
    assert "diagonal Fisher" in result.stderr
    assert "warning: the load was 40.0" in result.stderr


def test_threads_and_cores_are_as_before_even_after_an_error(all_cores: None) -> None:
    allowed = os.sched_getaffinity(0)
    torch.set_num_threads(1)

    def measured_in_vain() -> None:
        with speeds.pinned(0) as (threads, cores):
            assert threads == available_cores() == torch.get_num_threads()
            assert os.sched_getaffinity(0) == set(cores)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        measured_in_vain()
    assert os.sched_getaffinity(0) == allowed
    assert torch.get_num_threads() == 1


def test_more_threads_than_make_sense_are_refused(invoke: Invoke) -> None:
    result = invoke("bench", "--threads", "100000")
    assert result.exit_code == 2
    assert "would only slow each other down" in result.stderr
