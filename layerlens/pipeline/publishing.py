"""Jobs whose output directory is a URL: they run into a local directory, which is published when it is whole."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from layerlens.config import OutputConfig, RunConfig
from layerlens.storage import check_publishable, joined, local_or_url, publish
from layerlens.utils.observer import observed_stage

Job = TypeVar("Job", bound=Callable[..., Any])


def published(owned: Collection[str] = ()) -> Callable[[Job], Job]:
    """Decorator of a job that takes a RunConfig, writes to ``output.directory`` and returns a result with ``files``.

    Where the directory is a URL, the job gets a local one, and the ``files`` and ``directory`` of its result are the
    URLs (see ``storage.shown``). The URL is tried before the job begins.

    Args:
        owned: names that belong to the job's result; those of an earlier one are replaced or removed.

    Raises:
        ConfigurationError, OutputError: the URL cannot be written.
    """

    def decorate(job: Job) -> Job:
        @functools.wraps(job)
        def run(*args: Any, **keywords: Any) -> Any:
            given = [*args, *keywords.values()]
            config = next(value for value in given if isinstance(value, RunConfig))
            path, url = local_or_url(config.output.directory)
            if url is None:  # file:// is a local path
                return _call(job, args, keywords, path)
            check_publishable(url)
            with tempfile.TemporaryDirectory(prefix="layerlens-") as work:
                local = Path(work) / "out"
                result = _call(job, args, keywords, local)
                with observed_stage("publish"):
                    publish(local, url, owned)
            return _moved(result, local, url)

        return run  # type: ignore[return-value]

    return decorate


def _call(job: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any], directory: Path) -> Any:
    """The job with a configuration that writes to ``directory``."""
    output = {"output": OutputConfig(directory=str(directory))}

    def changed(value: Any) -> Any:
        return value.model_copy(update=output) if isinstance(value, RunConfig) else value

    return job(*map(changed, args), **{name: changed(value) for name, value in keywords.items()})


def _moved(result: Any, local: Path, url: str) -> Any:
    """The result, with the places of its files at ``url``."""
    files = {
        name: Path(joined(url, path.relative_to(local).as_posix())) if path.is_relative_to(local) else path
        for name, path in result.files.items()
    }
    changed: dict[str, Any] = {"files": files}
    if hasattr(result, "directory"):
        changed["directory"] = Path(url)
    return dataclasses.replace(result, **changed)
