"""What every request passes before anything reads its body: where it comes from, whose it is, how large it may be."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from lococo.serve.failures import ApiError
from lococo.serve.keys import LOCAL, Keys
from lococo.serve.options import is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Nothing of anybody's is behind these.
OPEN = {"/", "/health", "/docs", "/openapi.json"}
# Requests that are let in beside those that the engine takes: for lists, figures, and bodies on their way.
SPARE = 64
BODY_SECONDS = 60.0  # without a further piece of a body, and for those that come at less than `LEAST_RATE`
LEAST_RATE = 4096  # bytes per second
# What somebody on the way may have read from the first of two, and we from the last.
ONCE = {"authorization", "content-length", "content-type", "host", "origin", "transfer-encoding"}


class Gate:
    """ASGI middleware that lets requests through, or answers them itself.

    Args:
        app: What is behind it.
        keys: Those that are known; None: everybody on this machine may come in.
        max_body: Bytes of the largest body.
        max_requests: Those that may be inside at a time, `SPARE` not counted.
    """

    def __init__(self, app: App, *, keys: Keys | None, max_body: int, max_requests: int) -> None:
        self.app = app
        self.keys = keys
        self.max_body = max_body
        self.max_requests = max_requests + SPARE
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        headers = dict(pairs)
        try:
            _check_framing(pairs)
            self._check_origin(headers)
            self._check_length(headers.get("content-length", "0"))
            self._check_room(scope["path"])
            scope.setdefault("state", {})["tenant"] = self._tenant(scope["path"], headers)
        except ApiError as error:
            closing = {"Connection": "close"} if error.code == "ambiguous_headers" else {}
            await JSONResponse(error.body(), error.status, error.reply_headers() | closing)(scope, receive, send)
            return
        self.inside += 1
        try:
            await self.app(scope, self._counted(receive), send)
        finally:
            self.inside -= 1

    def _tenant(self, path: str, headers: dict[str, str]) -> str:
        if self.keys is None:
            return LOCAL
        return "" if path in OPEN else self.keys.tenant(headers.get("authorization", ""))

    def _check_origin(self, headers: dict[str, str]) -> None:
        """Refuse pages of other sites that a browser on this machine shows: without keys they could do everything."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "requests from pages of other sites are refused", code="foreign_origin")
        if self.keys is None and not is_loopback(_name(host)):
            raise ApiError(403, "expected this machine's own name as host, such as 127.0.0.1", code="foreign_host")

    def _check_length(self, length: str) -> None:
        if length.isdecimal() and int(length[:20]) > self.max_body:
            raise self._too_large()

    def _check_room(self, path: str) -> None:
        if self.inside >= self.max_requests and path not in OPEN:
            raise ApiError(429, "too many requests at a time; try again later", code="too_many_requests", retry_after=1)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than the {self.max_body:,} bytes allowed here", code="body_too_large")

    def _counted(self, receive: Receive) -> Receive:
        """Return a `receive` for bodies that are neither larger than allowed, whatever headers say, nor endless."""
        count, whole, begun = 0, False, time.monotonic()

        async def counted() -> MutableMapping[str, Any]:
            nonlocal count, whole
            if whole:
                return await receive()
            left = begun + BODY_SECONDS + count / LEAST_RATE - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), min(BODY_SECONDS, max(0.0, left)))
            except TimeoutError:
                raise ApiError(408, "the body comes too slowly", code="slow") from None
            count += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if count > self.max_body:
                raise self._too_large()
            return message

        return counted


def _check_framing(pairs: list[tuple[str, str]]) -> None:
    """Refuse headers that somebody on the way may read in another sense than we do: whose, or how long, a body is."""
    counts = Counter(name for name, _ in pairs)
    twice = sorted(name for name in ONCE if counts[name] > 1)
    if twice or {"content-length", "transfer-encoding"} <= counts.keys():
        named = twice[0] if twice else "content-length with transfer-encoding"
        raise ApiError(400, f"{named}: these headers can be read in two ways", code="ambiguous_headers")


def _name(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
