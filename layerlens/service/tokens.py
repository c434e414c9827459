"""Bearer tokens: read once, kept as hashes, compared in constant time, never logged."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from layerlens.exceptions import ConfigurationError

VARIABLE = "LAYERLENS_SERVE_TOKEN"
SHORTEST = 16


class Tokens:
    """The tokens that a server takes; false when there are none, and then everybody may.

    Only SHA-256 digests are kept, so that no dump or traceback of the server shows a token.
    """

    def __init__(self, tokens: Sequence[str] = ()) -> None:
        self._digests = tuple(hashlib.sha256(token.encode()).digest() for token in tokens)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"<{len(self._digests)} tokens>"

    def holder(self, authorization: str | None) -> str | None:
        """A short name for the holder of the token in an Authorization header; None if no token fits.

        Every token is compared, and all of their digests' bytes, so that the time tells nothing.
        """
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogatepass")).digest()
        found = None
        for known in self._digests:
            if hmac.compare_digest(digest, known):
                found = known.hex()[:8]
        return found if scheme.lower() == "bearer" else None


def load_tokens(path: Path | None) -> Tokens:
    """Tokens of a file (one a line, # begins a comment), or the one in LAYERLENS_SERVE_TOKEN; both if both are there.

    Raises:
        ConfigurationError: the file cannot be read, others than its owner can read it, or a token is too short.
    """
    found = [os.environ[VARIABLE].strip()] if os.environ.get(VARIABLE, "").strip() else []
    source = VARIABLE
    if path is not None:
        source = f"--token-file {path}"
        try:
            mode = path.stat().st_mode
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from error
        if mode & (stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigurationError(f"{source}: others than its owner can read it; run: chmod 600 {path}")
        found += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ConfigurationError(f"{source}: has no token; write one a line")
    for token in found:
        if len(token) < SHORTEST or not token.isascii() or " " in token:
            raise ConfigurationError(f"{source}: a token must be {SHORTEST} or more ASCII characters without spaces")
    return Tokens(found)
