"""URLs beside paths: reading them apart, opening their file systems, and each failure as one line.

Credentials, regions and endpoints come from where each library looks for them: AWS_* and ~/.aws, Google's application
default credentials, AZURE_STORAGE_*, FSSPEC_<SCHEME>_*. Passwords never appear in what is shown.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from layerlens.exceptions import ConfigurationError, LayerLensError, OutputError, StorageError

DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
"""Scheme -> the package that has its driver."""
EXTRAS = {"s3fs": "layerlens[storage]", "gcsfs": "layerlens[gcs]", "adlfs": "layerlens[azure-storage]"}
LONGEST_REASON = 200


def open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of ``url`` and the path in it.

    Raises:
        ConfigurationError: no such scheme, or its driver is not installed.
    """
    scheme = url.partition(":")[0]
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{redacted(url)}: URLs need fsspec; run: pip install 'layerlens[storage]'") from error
    if scheme not in fsspec.available_protocols():
        raise ConfigurationError(f"{redacted(url)}: unknown scheme {scheme!r}; use s3://, gs://, az:// or file://")
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = DRIVERS.get(scheme)
        needed = f"pip install '{EXTRAS[package]}'" if package else f"what fsspec says: {error}"
        raise ConfigurationError(f"{redacted(url)}: the driver of {scheme}:// is missing; run: {needed}") from error
    except Exception as error:  # drivers look for credentials here, and each has errors of its own
        raise ConfigurationError(f"{redacted(url)}: cannot be opened: {reason(error)}") from error
    return filesystem, path.rstrip("/")


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Failures in the block become a StorageError that names ``url``."""
    try:
        yield
    except LayerLensError:
        raise
    except FileNotFoundError as error:
        raise StorageError(f"{redacted(url)}: there is no such object") from error
    except Exception as error:  # botocore, google and azure share no base class below this
        raise StorageError(f"{redacted(url)}: cannot be read: {reason(error)}") from error


@contextmanager
def writing(url: str) -> Iterator[None]:
    """Failures in the block become an OutputError that names ``url``."""
    try:
        yield
    except LayerLensError:
        raise
    except Exception as error:
        raise OutputError(
            f"cannot write {redacted(url)}: {reason(error)}; check that the bucket exists, that the store can be "
            "reached and that the credentials in the environment may write there"
        ) from error


def reason(error: BaseException) -> str:
    """The first line of what a driver says, without secrets."""
    cause = error.__cause__ if isinstance(error, OSError) and error.__cause__ is not None else error
    text = str(cause).strip() or str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    return redacted(first)[:LONGEST_REASON]


def exists(filesystem: Any, path: str) -> bool:
    """Whether there is an object at ``path`` now, whatever an earlier listing said."""
    filesystem.invalidate_cache()
    return bool(filesystem.exists(path))


def files_below(filesystem: Any, root: str) -> dict[str, dict[str, Any]]:
    """Every object below ``root``: its name relative to ``root``, and what the store says of it."""
    filesystem.invalidate_cache()
    found = filesystem.find(root, detail=True)
    return {posixpath.relpath(path, root): info for path, info in sorted(found.items()) if path.rstrip("/") != root}


def safe_name(name: str) -> bool:
    """Whether a name that a store gave stays below the folder it is written to."""
    return bool(name) and not name.startswith("/") and ".." not in Path(name).parts


_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+]+):/+(?P<rest>.*)", re.DOTALL)
_PASSWORD = re.compile(r"(//[^/@:]*):[^/@]*@")
_QUERY = re.compile(r"\?\S*")


def url_of(place: Path | str) -> str | None:
    """The URL that ``place`` means; None where it is a path on this machine.

    >>> url_of(Path("s3://bucket/out")), url_of("file:///data/x"), url_of("out"), url_of("package:name")
    ('s3://bucket/out', 'file:///data/x', None, None)

    Raises:
        ConfigurationError: the URL has a password in it.
    """
    match = _URL.fullmatch(str(place))
    if match is None:
        return None
    scheme, rest = match["scheme"].lower(), match["rest"]
    url = f"{scheme}:///{rest}" if scheme in ("file", "local") else f"{scheme}://{rest}"
    if _PASSWORD.search(url):
        raise ConfigurationError(
            f"{redacted(url)}: a URL must not contain a password, because URLs are logged and recorded; give "
            "credentials in the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, "
            "AZURE_STORAGE_CONNECTION_STRING ...)"
        )
    return url


def local_or_url(place: Path | str) -> tuple[Path, str | None]:
    """``place`` as a local path, or as a URL of another machine; ``file://`` is a local path."""
    url = url_of(place)
    if url is None:
        return Path(place), None
    if not url.startswith(("file:", "local:")):
        return Path(place), url
    return Path(unquote(urlsplit(url).path)), None


def joined(url: str, name: str) -> str:
    """``name`` below ``url``."""
    return f"{url.rstrip('/')}/{name}"


def shown(place: Path | str) -> str:
    """``place`` as a user would write it: a URL with both slashes, or the path."""
    return url_of(place) or str(place)


def redacted(text: str) -> str:
    """``text`` without passwords and query strings (signed URLs carry secrets there), to be shown or logged."""
    return _QUERY.sub("", _PASSWORD.sub(r"\1:***@", text))
