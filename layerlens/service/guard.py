"""In front of every request: token, rate, size. Pure ASGI, so that a body is refused while it comes in."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from layerlens.service.settings import ServiceSettings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/report-frame", "/healthz", "/readyz", "/docs", "/openapi.json")
UPLOAD_PATH = "/v1/statistics"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
MOST_CALLERS = 10_000


class Guard:
    """The middleware.

    Without tokens the server listens on loopback only; then requests must also name it by a local name, or a page in a
    browser could reach it under a name of its own (DNS rebinding).
    """

    def __init__(self, app: App, settings: ServiceSettings) -> None:
        self.app, self.settings = app, settings
        self.buckets = Buckets(settings.rate_per_s, settings.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        caller = (scope.get("client") or ("?", 0))[0]
        if not self.settings.tokens:
            name = headers.get("host", "").lower()
            host = name if name.endswith("]") else name.rpartition(":")[0] or name
            if host not in LOCAL_NAMES:
                await refuse(send, 403, "this server has no tokens and answers to localhost only")
                return
        elif scope["path"] not in OPEN_PATHS:
            holder = self.settings.tokens.holder(headers.get("authorization"))
            wait = self.buckets.take(f"refused {caller}") if holder is None else 0.0
            if wait:
                why = "too many requests without a valid token"
                await refuse(send, 429, why, {"retry-after": str(round(wait + 1))})
                return
            if holder is None:
                why = "a valid token is needed: send `Authorization: Bearer TOKEN`"
                await refuse(send, 401, why, {"www-authenticate": "Bearer"})
                return
            caller = holder
        wait = 0.0 if scope["path"] in OPEN_PATHS else self.buckets.take(caller)
        if wait:
            await refuse(send, 429, "too many requests; wait a little", {"retry-after": str(round(wait + 1))})
            return
        upload = scope["path"] == UPLOAD_PATH
        limit = self.settings.max_upload_bytes if upload else self.settings.max_body_bytes
        await self._limited(scope, receive, send, headers, limit)

    async def _limited(self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], limit: int) -> None:
        too_large = f"the body is larger than {limit} bytes"
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > limit:
            await refuse(send, 413, too_large, {"connection": "close"})
            return
        came = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > limit:
                raise HTTPException(413, too_large, {"connection": "close"})  # the application answers with it
            return message

        await self.app(scope, counted, send)


class Buckets:
    """Token buckets by caller: ``burst`` at once, ``rate`` a second after that. Times are monotonic."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self.levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> float:
        """Take one; 0.0, or the seconds until there is one."""
        now = time.monotonic()
        level, last = self.levels.pop(caller, (float(self.burst), now))
        level = min(float(self.burst), level + (now - last) * self.rate)
        allowed = level >= 1.0
        self.levels[caller] = (level - 1.0 if allowed else level, now)
        while len(self.levels) > MOST_CALLERS:  # whoever was silent longest has a full bucket anyway
            self.levels.popitem(last=False)
        return 0.0 if allowed else (1.0 - level) / self.rate


async def refuse(send: Send, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
    """Answer with a problem."""
    body = json.dumps({"detail": detail}).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    encoded = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
