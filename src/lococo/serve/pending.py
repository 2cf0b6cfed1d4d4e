"""A request to the engine, as the event loop sees it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from lococo.cache import SlotCache
from lococo.serve.engine import Engine
from lococo.serve.failures import too_long
from lococo.serve.feed import Feed
from lococo.serve.jobs import Event, Failed, Finished, Held, Job, Layout, Sampling


class ClientGone(Exception):
    """The client does not wait for its answer any more."""


class Pending:
    """Hands a request in, and gives its events out as they come.

    Args:
        engine: Works on it.
        request: Of the client, who may go away.
        feed: What is to be read.
        timeout: Seconds until it is given up.
        settings: Others of `Job`.

    Raises:
        ApiError: If the engine takes no more.
    """

    def __init__(self, engine: Engine, request: Request, feed: Feed, *, timeout: float, **settings: Any) -> None:
        self._engine = engine
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        tenant = request.scope["state"]["tenant"]
        self.job = Job(tenant, feed, self._tell, time.monotonic() + timeout, **settings)
        engine.submit(self.job)
        self._watch = asyncio.create_task(self._until_gone())

    def _tell(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[Event]:
        """Yield all events.

        Raises:
            ApiError: If the request failed.
            ClientGone: If the client went away; the request is cancelled then.
        """
        try:
            while True:
                event = await self._events.get()
                if event is None:
                    raise ClientGone
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Finished | Held):
                    return
        finally:
            self._watch.cancel()
            self._engine.cancel(self.job)  # no harm is done to one that is finished

    async def _until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._engine.cancel(self.job)
        self._events.put_nowait(None)


def answering(
    engine: Engine,
    request: Request,
    layout: Layout,
    sampling: Sampling,
    *,
    timeout: float,
    limit: int,
    goes_on: bool,
    base: SlotCache | None = None,
) -> Pending:
    """Ask for an answer.

    Args:
        engine: Works on it.
        request: Of the client.
        layout: The prompt.
        sampling: How to answer.
        timeout: Seconds until it is given up.
        limit: Longest prompt, tokens.
        goes_on: Whether a later prompt may go on from this one.
        base: What was read before.

    Raises:
        ApiError: If the prompt is too long, or the engine takes no more.
    """
    if len(layout.ids) > limit:
        raise too_long(limit)
    feed = Feed(list(layout.ids), closed=True)
    kept = layout if goes_on else None
    return Pending(engine, request, feed, timeout=timeout, sampling=sampling, layout=kept, base=base)
