"""Several real processes on one job: forked from a server that has imported everything once, or started by torchrun."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# pytest's importlib mode does not let test files import their neighbours, and child processes need them by name.
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import ranks  # noqa: E402
from comparison import statistics_in  # noqa: E402

from layerlens.models import ModelStatistics  # noqa: E402

Start = Callable[..., list[ranks.Outcome]]


@pytest.fixture(scope="session")
def start() -> Start:
    """``start(size, work, arguments_of_rank)``: run ``work(*arguments)`` in ``size`` processes; what came of each."""
    # The server imports what it preloads by PYTHONPATH alone, and says nothing when it cannot.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])

    def run(size: int, work: Callable[..., Any], arguments: Callable[[int], tuple[Any, ...]]) -> list[ranks.Outcome]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=ranks.one, args=(there, rank, size, port, work, arguments(rank)))
            process.start()
            there.close()
            started.append((process, here))
        outcomes = []
        for process, here in started:
            try:
                outcomes.append(here.recv())
            except EOFError:  # it was killed
                outcomes.append(ranks.Outcome(None, "killed", 0))
            process.join()
        return outcomes

    return run


@pytest.fixture(scope="session")
def _session_settings(tiny_bert_dir: Path, reviews_jsonl: Path) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(tiny_bert_dir), "head_fit_samples": 32},
        "data": {"source": str(reviews_jsonl), "calibration_samples": 26, "max_length": 16, "batch_size": 3},
        "profiling": {
            "adapter_sites": "all",
            "all_weights": True,
            "ntk_samples": 10,
            "statistics": [
                "fisher", "gradient", "input_scale", "spectrum", "whitened_spectrum", "factors", "sketched_spectrum",
                "sketched_factors", "ntk",
            ],
        },
        "optimization": {
            "max_trainable_params": 1500,
            "methods": ["lora", "adapter", "prefix"],
            "latency_profile": {"batch_size": 2, "sequence_length": 16},
            "lora_ranks": [1, 2, 4],
        },
        "runtime": {"threads": 1, "saving_time_share": 1},
        "distributed": {"timeout_s": 600},
    }  # fmt: skip


@pytest.fixture
def settings(_session_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A configuration with every kind of statistic, on nine batches of uneven length."""
    own = copy.deepcopy(_session_settings)
    own["runtime"]["cache_dir"] = str(tmp_path / "cache")
    return own


@pytest.fixture(scope="session")
def one(_session_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one process has written."""
    folder = tmp_path_factory.mktemp("one")
    _, files = ranks.run(_session_settings | {"runtime": {"threads": 1, "cache_dir": str(folder / "cache")}}, folder)
    return Path(files["statistics"]).parent


@pytest.fixture
def whole(one: Path) -> ModelStatistics:
    """What one process measures."""
    return statistics_in(one)
