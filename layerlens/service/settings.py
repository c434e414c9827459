"""What the operator of a server decides, and the tokens that he gives out.

Tokens are read once, kept as hashes, compared in constant time, never logged.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from layerlens.exceptions import ConfigurationError

MIB = 1 << 20
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


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of one server.

    Args:
        state_dir: where jobs, their results and uploads are kept.
        roots: folders that models, data and statistics of jobs may lie in; relative paths start from the first.
        host, port: where to listen.
        tokens: who may use it; none only on a loopback address.
        allow_urls: beginnings of URLs that jobs may read from and write to.
        allow_packages: packages that ``package:NAME`` may import.
        allow_hub: whether jobs may load models and data sets from the Hugging Face hub.
        allow_code: modules whose functions jobs may name (``module:function``), their sub-modules with them.
        allow_pickles: whether models may be pickles (``.pt``, ``.bin`` ...), which run what they say when loaded.
        max_running: jobs that run at the same time.
        max_queued: jobs that may wait.
        rate_per_s, burst: requests that one token (without tokens: one address) may make.
        max_body_bytes: largest request; uploads of statistics have their own limit.
        max_upload_bytes: largest statistics file that is taken.
        max_streams: event streams that may be open.
        max_connections: connections that may be open; fewer where the system allows fewer open files.
        max_connections_per_address: of them from one address; 0: three quarters.
        job_timeout_s: a job that takes longer is ended and marked as failed.
        max_attempts: how often a job is started again whose process died with the server.
        threads: threads of one job; 0: all cores.
    """

    state_dir: Path
    roots: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = 8642
    tokens: Tokens = field(default_factory=Tokens)
    allow_urls: tuple[str, ...] = ()
    allow_packages: tuple[str, ...] = ()
    allow_hub: bool = False
    allow_code: tuple[str, ...] = ()
    allow_pickles: bool = False
    max_running: int = 1
    max_queued: int = 1000
    rate_per_s: float = 50.0
    burst: int = 200
    max_body_bytes: int = MIB
    max_upload_bytes: int = 256 * MIB
    max_streams: int = 100
    max_connections: int = 2000
    max_connections_per_address: int = 0
    job_timeout_s: float = 24 * 3600.0
    max_attempts: int = 3
    threads: int = 0

    def check(self) -> None:
        """Refuse what would not be safe or cannot work.

        Raises:
            ConfigurationError: a public address without a token, or a root that is not a folder.
        """
        if not self.roots:
            raise ConfigurationError("--root: give at least one folder from which jobs may read models and data")
        for root in self.roots:
            if not root.is_dir():
                raise ConfigurationError(f"--root: {root} is not a directory")
        for prefix in self.allow_urls:
            if "://" not in prefix:
                raise ConfigurationError(f"--allow-url: {prefix!r} is not a URL; give one such as s3://bucket/models")
        if not self.tokens and not is_loopback(self.host):
            raise ConfigurationError(
                f"--host {self.host} can be reached from elsewhere, and no token is set; set LAYERLENS_SERVE_TOKEN or "
                "--token-file (`python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes one), or listen on "
                "127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether every address of ``host`` is of this machine only; a name that does not resolve is not."""
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)} if host else {"0.0.0.0"}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in addresses)


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
            raise ConfigurationError(f"{source}: has no token; write one per line")
    for token in found:
        if len(token) < SHORTEST or not token.isascii() or " " in token:
            raise ConfigurationError(f"{source}: a token must be {SHORTEST} or more ASCII characters without spaces")
    return Tokens(found)
