"""Jobs whose output directory is a URL: they run into a local directory, which is published when it is whole."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from layerlens.config import OutputConfig, RunConfig
from layerlens.storage import check_publishable, joined, local_or_url, publish
from layerlens.utils.launch import is_main_process
from layerlens.utils.observer import observed_stage
from layerlens.utils.places import default_cache_dir

Job = TypeVar("Job", bound=Callable[..., Any])


def published(
    owned: Collection[str] = (), *, keyword: str | None = None, resumes: bool = False
) -> Callable[[Job], Job]:
    """Decorator of a job that writes to a directory and returns a result with ``files``.

    Where the directory is a URL, the job gets a local one, and the ``files`` and ``directory`` of its result are the
    URLs (see ``storage.shown``). The URL is tried before the job begins.

    Args:
        owned: names that belong to the job's result; those of an earlier one are replaced or removed.
        keyword: the keyword argument that names the directory; ``output.directory`` of the job's RunConfig when None.
        resumes: the job goes on where it was stopped, so its local directory stays in the cache until it is published.

    Raises:
        ConfigurationError, OutputError: the URL cannot be written.
    """

    def decorate(job: Job) -> Job:
        @functools.wraps(job)
        def run(*args: Any, **keywords: Any) -> Any:
            def into(directory: Path) -> Any:
                if keyword is not None:
                    return job(*args, **{**keywords, keyword: directory})
                output = {"output": OutputConfig(directory=str(directory))}

                def changed(value: Any) -> Any:
                    return value.model_copy(update=output) if isinstance(value, RunConfig) else value

                return job(*map(changed, args), **{name: changed(value) for name, value in keywords.items()})

            given = (*args, *keywords.values())
            config = next(value for value in given if isinstance(value, RunConfig))
            path, url = local_or_url(config.output.directory if keyword is None else keywords[keyword])
            if url is None:  # file:// is a local path
                return into(path)
            if is_main_process():
                check_publishable(url)
            with _working_directory(url, resumes) as local:
                result = into(local)
                if is_main_process():
                    with observed_stage("publish"):
                        publish(local, url, owned)
            if resumes and is_main_process():
                shutil.rmtree(local)
            return _moved(result, local, url)

        return run  # type: ignore[return-value]

    return decorate


@contextmanager
def _working_directory(url: str, stays: bool) -> Iterator[Path]:
    """Where the job for ``url`` writes; one that ``stays`` is the same for every attempt on this machine."""
    if stays:
        yield default_cache_dir() / "unpublished" / hashlib.sha256(url.encode()).hexdigest()[:32]
        return
    with tempfile.TemporaryDirectory(prefix="layerlens-") as work:
        yield Path(work) / "out"


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
