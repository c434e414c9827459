"""Jobs whose directory is a URL: what is published, and what stays for the next attempt."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from layerlens.config import OutputConfig, RunConfig
from layerlens.exceptions import OutputError
from layerlens.jobs.result import published
from layerlens.storage import read_text

CONFIG = RunConfig(
    model={"name_or_path": "m"}, data={"source": "d.jsonl"}, optimization={"max_trainable_params": 1}
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    files: dict[str, Path]
    directory: Path


def work(directory: Path, *, fails: bool) -> Result:
    """Counts its attempts in a file that stays, as checkpoints do."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "attempts"
    path.write_text((path.read_text() if path.exists() else "") + "x")
    if fails:
        raise OutputError("stopped")
    return Result({"attempts": path}, directory)


def resuming(config: RunConfig, *, fails: bool = False) -> Result:
    with published(config.output.directory, Path(), resumes=True) as place:
        return place.publish(work(place.directory, fails=fails))


def resuming_by_keyword(config: RunConfig, *, output: Path, fails: bool = False) -> Result:
    with published(output, Path(), resumes=True) as place:
        return place.publish(work(place.directory, fails=fails))


def beginning_anew(config: RunConfig, *, fails: bool = False) -> Result:
    with published(config.output.directory, Path()) as place:
        return place.publish(work(place.directory, fails=fails))


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LAYERLENS_CACHE", str(tmp_path / "cache"))
    return f"memory://{uuid.uuid4().hex}/out"


def by_keyword(config: RunConfig, *, fails: bool = False) -> Result:
    return resuming_by_keyword(config, output=Path(config.output.directory), fails=fails)


@pytest.mark.parametrize(("job", "attempts"), [(resuming, "xx"), (by_keyword, "xx"), (beginning_anew, "x")])
def test_a_job_goes_on_where_it_was_stopped_until_it_is_published(job, attempts: str, url: str, tmp_path: Path):
    config = CONFIG.model_copy(update={"output": OutputConfig(directory=url)})
    with pytest.raises(OutputError, match="stopped"):
        job(config, fails=True)
    result = job(config)
    assert read_text(f"{url}/attempts", 100) == attempts
    assert (str(result.directory), str(result.files["attempts"])) == (str(Path(url)), str(Path(f"{url}/attempts")))
    assert not list(tmp_path.rglob("attempts"))


def test_one_process_of_several_publishes(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    resuming(CONFIG.model_copy(update={"output": OutputConfig(directory=url)}))
    with pytest.raises(Exception, match="no such object"):
        read_text(f"{url}/attempts", 100)


def test_a_file_url_is_a_local_directory(tmp_path: Path):
    result = beginning_anew(CONFIG.model_copy(update={"output": OutputConfig(directory=f"file://{tmp_path}/out")}))
    assert result.files["attempts"] == tmp_path / "out/attempts"
