"""One S3 server for all tests of storage, and a bucket for each."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

# pytest's importlib mode does not let test files import their neighbours.
sys.path.insert(0, str(Path(__file__).parent))

from s3_server import S3Server, make_bucket, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """``s3://NAME`` of an empty bucket, with the environment of its client set."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LAYERLENS_CACHE", str(tmp_path / "own-cache"))
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    make_bucket(s3, name)
    return f"s3://{name}"
