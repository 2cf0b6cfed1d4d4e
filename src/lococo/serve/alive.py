"""Streams that say now and then that they are still there, so that no proxy on the way gives them up."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

SECONDS = 15.0
COMMENT = ": still at it\n\n"  # server-sent events that begin with a colon mean nothing


async def kept_alive(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """Pass pieces on, with a comment between them wherever nothing comes for `SECONDS`."""
    coming: asyncio.Future[str] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(pieces))
            done, _ = await asyncio.wait({coming}, timeout=SECONDS)
            if not done:
                yield COMMENT
                continue
            try:
                piece = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield piece
    finally:
        if coming is not None and not coming.done():
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await coming
