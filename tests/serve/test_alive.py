"""Comments in streams that have nothing to say for a while."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from lococo.serve.alive import COMMENT, kept_alive


def test_a_comment_comes_where_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lococo.serve.alive.SECONDS", 0.05)

    async def slow() -> AsyncIterator[str]:
        yield "a"
        yield "b"
        await asyncio.sleep(0.18)
        yield "c"

    async def all_of() -> list[str]:
        return [piece async for piece in kept_alive(slow())]

    got = asyncio.run(all_of())
    assert [piece for piece in got if piece != COMMENT] == ["a", "b", "c"]
    assert 1 <= got.count(COMMENT) <= 3
    assert got[:2] == ["a", "b"]


def test_whoever_makes_the_pieces_learns_that_nobody_reads_them() -> None:
    told = []

    async def endless() -> AsyncIterator[str]:
        try:
            yield "a"
            await asyncio.sleep(60)
            yield "b"
        finally:
            told.append("closed")

    async def leave_early() -> None:
        async def read() -> None:
            async for _ in kept_alive(endless()):
                pass

        task = asyncio.ensure_future(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave_early())
    assert told == ["closed"]


def test_a_fault_passes_through() -> None:
    async def broken() -> AsyncIterator[str]:
        yield "a"
        raise ValueError("broken")

    async def read() -> None:
        async for _ in kept_alive(broken()):
            pass

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(read())
