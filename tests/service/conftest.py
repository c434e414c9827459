"""One server for all tests that only talk to it, and servers of their own for those that kill it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# pytest's importlib mode does not let test files import their neighbours.
sys.path.insert(0, str(Path(__file__).parent))

from serving import SERVER_THREADS, Serving, run_config_of

from layerlens.config import RunConfig
from layerlens.pipeline import run_config
from layerlens.service.client import Client


@pytest.fixture(scope="session")
def statistics(tiny_bert_dir: Path, reviews_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """statistics.safetensors of a run of the tiny model, on one thread as the server's: more round otherwise."""
    folder = tmp_path_factory.mktemp("statistics")
    config = RunConfig.model_validate(
        run_config_of(str(tiny_bert_dir), str(reviews_jsonl)) | {"runtime": {"threads": SERVER_THREADS}}
    )
    return run_config(config, base_dir=folder, use_cache=False).files["statistics"]


@pytest.fixture(scope="session")
def new_server(
    tiny_bert_dir: Path, reviews_jsonl: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Serving]]:
    """``new_server("--max-running", "2")`` starts one with a root of its own; all end with the tests."""
    started: list[Serving] = []

    def start(*options: str, **fields: Any) -> Serving:
        folder = tmp_path_factory.mktemp("server")
        shutil.copytree(tiny_bert_dir, folder / "model")
        shutil.copy(reviews_jsonl, folder / "reviews.jsonl")
        serving = Serving(folder, options, **fields).start()
        started.append(serving)
        return serving

    yield start
    for serving in started:
        serving.stop()


@pytest.fixture(scope="session")
def server(new_server: Callable[..., Serving]) -> Serving:
    """The shared server."""
    return new_server("--max-running", "2", "--rate", "1000", "--burst", "1000", "--max-body-kb", "64")


@pytest.fixture(scope="session")
def client(server: Serving) -> Client:
    return server.client()


@pytest.fixture(scope="session")
def finished_run(client: Client) -> dict[str, Any]:
    """A run that has succeeded."""
    job = client.submit_run(run_config_of())
    return client.wait(job["id"])
