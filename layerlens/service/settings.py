"""What the operator of a server decides."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from pathlib import Path

from layerlens.exceptions import ConfigurationError
from layerlens.service.tokens import Tokens

MIB = 1 << 20


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
    job_timeout_s: float = 24 * 3600.0
    max_attempts: int = 3
    threads: int = 0

    def check(self) -> None:
        """Refuse what would not be safe or cannot work.

        Raises:
            ConfigurationError: a public address without a token, or a root that is no folder.
        """
        if not self.roots:
            raise ConfigurationError("--root: give at least one folder that models and data may lie in")
        for root in self.roots:
            if not root.is_dir():
                raise ConfigurationError(f"--root: {root} is no directory")
        for prefix in self.allow_urls:
            if "://" not in prefix:
                raise ConfigurationError(f"--allow-url: {prefix!r} is no URL; give one such as s3://bucket/models")
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
