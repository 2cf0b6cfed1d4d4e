"""Logs as JSON lines: what was asked for and how it went, never what was said."""

import json
import logging
import secrets
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from typing import Any, TextIO

from lococo.serve.gate import App, Receive, Scope, Send

log = logging.getLogger("lococo.serve")


class JsonLines(logging.Formatter):
    """One JSON object per line; of an exception its kind and places, since its message may quote a prompt."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as its line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line.update(getattr(record, "facts", {}))
        if record.exc_info and record.exc_info[0] is not None:
            frames = traceback.extract_tb(record.exc_info[2])
            line["exception"] = record.exc_info[0].__name__
            line["at"] = [f"{frame.name}:{frame.lineno}" for frame in frames][-8:]
        return json.dumps(line, ensure_ascii=False, default=str)


def to_stream(stream: TextIO = sys.stderr) -> None:
    """Write the log of this server, and uvicorn's own, to a stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name in ("lococo.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


class Journal:
    """ASGI middleware that notes every request at its end.

    Args:
        app: What is behind it.
        counted: Called with the route, the status and the seconds of each.
    """

    def __init__(self, app: App, *, counted: Callable[[str, int, float], None]) -> None:
        self.app = app
        self.counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and note how it went."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, request_id = time.monotonic(), 0, secrets.token_hex(8)

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except BaseException:
            status = status or 500
            raise
        finally:
            seconds = time.monotonic() - begun
            # The pattern and not the path, which a client can fill with anything.
            route = getattr(scope.get("route"), "path", "(none)")
            self.counted(route, status, seconds)
            facts = {
                "request": request_id,
                "tenant": scope.get("state", {}).get("tenant", ""),
                "method": scope["method"] if scope["method"] in METHODS else "(other)",
                "route": route,
                "status": status,
                "seconds": round(seconds, 4),
            }
            log.info("request", extra={"facts": facts | scope.get("state", {}).get("facts", {})})


METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
