"""What is a URL, and how it survives ``pathlib``.

Options and settings that take a path also take a URL, so both travel as ``Path``. pathlib folds ``s3://bucket/key`` to
``s3:/bucket/key``; ``url_of`` knows that form too and gives the URL back. No file is meant by it: a folder whose name
ends in a colon can still be reached as ``./s3:/...``.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from layerlens.exceptions import ConfigurationError

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
            f"{redacted(url)}: a URL must not hold a password, since URLs are logged and recorded; give credentials in "
            "the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_CONNECTION_STRING ...)"
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
